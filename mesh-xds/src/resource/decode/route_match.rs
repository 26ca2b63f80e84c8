//! `RouteMatch`: paths, headers, query parameters, cookies, fractions, and facts beside the request (gRFC A28, Envoy).

use super::{Decoder, Valid};
use crate::resource::{
    CookieMatcher, FilterStateMatcher, MetadataMatch, PathMatcher, PathTemplate, QueryParameterMatcher,
    QueryParameterMatcherKind, RouteMatch, TlsContextMatch, ValueMatch,
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::TypedExtensionConfig,
        route::v3::{
            CookieMatcher as ProtoCookie, QueryParameterMatcher as ProtoQuery, RouteMatch as Proto,
            query_parameter_matcher::QueryParameterMatchSpecifier, route_match::PathSpecifier,
        },
    },
    extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
    r#type::matcher::v3::{
        FilterStateMatcher as ProtoFilterState, MetadataMatcher as ProtoMetadata, ValueMatcher as ProtoValue,
        double_matcher, filter_state_matcher, list_matcher, metadata_matcher::path_segment::Segment, value_matcher,
    },
};
use std::sync::Arc;

impl Decoder<'_> {
    /// `None`: the route is skipped, with a note.
    pub(super) fn route_match(&mut self, proto: Proto) -> Valid<Option<RouteMatch>> {
        let case_sensitive = proto.case_sensitive.is_none_or(|value| value.value);
        let path = self.path_matcher(proto.path_specifier, case_sensitive)?;
        let headers = self.header_matchers("headers", proto.headers)?;
        let query = proto.query_parameters.into_iter().enumerate();
        let query = query
            .map(|(index, proto)| self.at_index("query_parameters", index, |cx| cx.query_parameter(proto)))
            .collect::<Valid<_>>()?;
        let cookies = proto.cookies.into_iter().enumerate();
        let cookies = cookies
            .map(|(index, proto)| self.at_index("cookies", index, |cx| cx.cookie(proto)))
            .collect::<Valid<_>>()?;
        let fraction = match proto.runtime_fraction.and_then(|fraction| fraction.default_value) {
            Some(fraction) => Some(self.fraction("runtime_fraction.default_value", fraction)?),
            None => None,
        };
        let tls = proto.tls_context.map_or_else(TlsContextMatch::default, |tls| TlsContextMatch {
            presented: tls.presented.map(|flag| flag.value),
            validated: tls.validated.map(|flag| flag.value),
        });
        let metadata = proto.dynamic_metadata.into_iter().enumerate();
        let metadata = metadata
            .map(|(index, proto)| self.at_index("dynamic_metadata", index, |cx| cx.metadata_match_of(proto)))
            .collect::<Valid<_>>()?;
        let mut filter_state = Vec::with_capacity(proto.filter_state.len());
        for (index, proto) in proto.filter_state.into_iter().enumerate() {
            match self.at_index("filter_state", index, |cx| cx.filter_state_matcher(proto))? {
                Some(matcher) => filter_state.push(matcher),
                // To match without it would match too much.
                None => return Ok(None),
            }
        }
        let grpc_only = proto.grpc.is_some();
        Ok(Some(RouteMatch { path, headers, query, cookies, grpc_only, tls, metadata, filter_state, fraction }))
    }

    pub(super) fn metadata_match_of(&mut self, proto: ProtoMetadata) -> Valid<MetadataMatch> {
        let filter = self.filled("filter", proto.filter)?.into();
        if proto.path.is_empty() {
            return Err(self.invalid_at("path", "must not be empty"));
        }
        let path = proto.path.into_iter().enumerate().map(|(index, segment)| {
            self.at_index("path", index, |cx| match segment.segment {
                Some(Segment::Key(key)) => cx.filled("key", key),
                None => Err(cx.invalid_at("key", "must not be empty")),
            })
        });
        let path = path.collect::<Valid<_>>()?;
        let Some(value) = proto.value else { return Err(self.invalid_at("value", "is missing")) };
        let value = self.at("value", |cx| cx.value_match_of(value))?;
        Ok(MetadataMatch { filter, path, value, invert: proto.invert })
    }

    fn value_match_of(&mut self, proto: ProtoValue) -> Valid<ValueMatch> {
        use value_matcher::MatchPattern;
        Ok(match proto.match_pattern {
            Some(MatchPattern::NullMatch(_)) => ValueMatch::Null,
            Some(MatchPattern::BoolMatch(flag)) => ValueMatch::Bool(flag),
            Some(MatchPattern::PresentMatch(present)) => ValueMatch::Present(present),
            Some(MatchPattern::StringMatch(matcher)) => {
                ValueMatch::String(self.at("string_match", |cx| cx.string_matcher(matcher))?)
            }
            Some(MatchPattern::DoubleMatch(double)) => match double.match_pattern {
                Some(double_matcher::MatchPattern::Exact(number)) => ValueMatch::Number(number),
                Some(double_matcher::MatchPattern::Range(range)) => {
                    ValueMatch::Range { start: range.start, end: range.end }
                }
                None => return Err(self.invalid_at("double_match", "has neither range nor exact")),
            },
            Some(MatchPattern::ListMatch(list)) => match list.match_pattern {
                Some(list_matcher::MatchPattern::OneOf(matcher)) => {
                    let matcher = self.at("list_match", |cx| cx.at("one_of", |cx| cx.value_match_of(*matcher)))?;
                    ValueMatch::OneOf(Box::new(matcher))
                }
                None => return Err(self.invalid_at("list_match", "has no match_pattern")),
            },
            Some(MatchPattern::OrMatch(or)) => self.at("or_match", |cx| {
                let any = or.value_matchers.into_iter().enumerate();
                let any = any.map(|(index, proto)| cx.at_index("value_matchers", index, |cx| cx.value_match_of(proto)));
                Ok(ValueMatch::Or(any.collect::<Valid<_>>()?))
            })?,
            None => return Err(self.invalid("has no match_pattern")),
        })
    }

    /// `None`: the route is skipped, with a note.
    fn filter_state_matcher(&mut self, proto: ProtoFilterState) -> Valid<Option<FilterStateMatcher>> {
        let key = self.filled("key", proto.key)?.into();
        match proto.matcher {
            Some(filter_state_matcher::Matcher::StringMatch(matcher)) => {
                let value = self.at("string_match", |cx| cx.string_matcher(matcher))?;
                Ok(Some(FilterStateMatcher { key, value }))
            }
            Some(filter_state_matcher::Matcher::AddressMatch(_)) => {
                self.note("address_match", "a client's filter state is strings: not supported, the route is skipped");
                Ok(None)
            }
            None => Err(self.invalid("has no matcher")),
        }
    }

    fn path_matcher(&mut self, proto: Option<PathSpecifier>, case_sensitive: bool) -> Valid<PathMatcher> {
        let fold = |text: String| if case_sensitive { text } else { text.to_ascii_lowercase() };
        Ok(match proto {
            Some(PathSpecifier::Prefix(prefix)) => PathMatcher::Prefix { prefix: fold(prefix), case_sensitive },
            Some(PathSpecifier::Path(path)) => PathMatcher::Exact { path: fold(path), case_sensitive },
            Some(PathSpecifier::SafeRegex(regex)) => PathMatcher::Regex(self.at("safe_regex", |cx| cx.regex(&regex))?),
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                // Envoy's rule for the field: `^[^?#]+[^?#/]$`.
                if prefix.len() < 2 || prefix.ends_with('/') || prefix.contains(['?', '#']) {
                    let reason = format!("\"{prefix}\" is too short, ends in /, or has a ? or #");
                    return Err(self.invalid_at("path_separated_prefix", reason));
                }
                PathMatcher::Separated { prefix: fold(prefix), case_sensitive }
            }
            Some(PathSpecifier::ConnectMatcher(_)) => {
                return Err(self.invalid_at("connect_matcher", "not supported"));
            }
            Some(PathSpecifier::PathMatchPolicy(policy)) => {
                PathMatcher::Template(self.at("path_match_policy", |cx| cx.path_template(&policy))?)
            }
            None => return Err(self.invalid("has no path_specifier")),
        })
    }

    fn path_template(&mut self, policy: &TypedExtensionConfig) -> Valid<Arc<PathTemplate>> {
        let Some(config) = &policy.typed_config else { return Err(self.invalid_at("typed_config", "is missing")) };
        let config: UriTemplateMatchConfig = self.at("typed_config", |cx| cx.any(config))?;
        let template = PathTemplate::new(&config.path_template);
        template.map(Arc::new).map_err(|reason| self.invalid_at("typed_config.path_template", reason))
    }

    pub(super) fn query_parameter(&mut self, proto: ProtoQuery) -> Valid<QueryParameterMatcher> {
        if proto.name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let kind = match proto.query_parameter_match_specifier {
            Some(QueryParameterMatchSpecifier::StringMatch(matcher)) => {
                QueryParameterMatcherKind::String(self.at("string_match", |cx| cx.string_matcher(matcher))?)
            }
            Some(QueryParameterMatchSpecifier::PresentMatch(present)) => QueryParameterMatcherKind::Present(present),
            None => QueryParameterMatcherKind::Present(true),
        };
        Ok(QueryParameterMatcher { name: proto.name, kind })
    }

    fn cookie(&mut self, proto: ProtoCookie) -> Valid<CookieMatcher> {
        if proto.name.is_empty() {
            return Err(self.invalid_at("name", "must not be empty"));
        }
        let Some(value) = proto.string_match else { return Err(self.invalid_at("string_match", "is missing")) };
        let value = self.at("string_match", |cx| cx.string_matcher(value))?;
        Ok(CookieMatcher { name: proto.name, value, invert: proto.invert_match })
    }
}
