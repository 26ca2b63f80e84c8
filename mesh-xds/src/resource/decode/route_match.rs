//! `RouteMatch`: paths, headers, query parameters, cookies, fractions, and facts beside the request (gRFC A28, Envoy).

use super::{Decoder, Valid};
use crate::resource::{
    CookieMatcher, FilterStateMatch, FilterStateMatcher, PathMatcher, PathTemplate, QueryParameterMatcher,
    QueryParameterMatcherKind, RouteMatch, TlsContextMatch,
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
    r#type::matcher::v3::{FilterStateMatcher as ProtoFilterState, filter_state_matcher},
};
use envoy_types::pb::xds::core::v3::CidrRange as ProtoRange;
use std::sync::Arc;

impl Decoder<'_> {
    /// `None`: the route is skipped, with a note.
    pub(super) fn route_match(&mut self, proto: Proto) -> Valid<Option<RouteMatch>> {
        let case_sensitive = proto.case_sensitive.is_none_or(|value| value.value);
        let path = self.path_matcher(proto.path_specifier, case_sensitive)?;
        let headers = self.header_matchers("headers", proto.headers)?;
        let query = self.each("query_parameters", proto.query_parameters, Self::query_parameter)?;
        let cookies = self.each("cookies", proto.cookies, Self::cookie)?;
        let fraction = match proto.runtime_fraction.and_then(|fraction| fraction.default_value) {
            Some(fraction) => Some(self.fraction("runtime_fraction.default_value", fraction)?),
            None => None,
        };
        let tls = proto.tls_context.map_or_else(TlsContextMatch::default, |tls| TlsContextMatch {
            presented: tls.presented.map(|flag| flag.value),
            validated: tls.validated.map(|flag| flag.value),
        });
        let metadata = self.each("dynamic_metadata", proto.dynamic_metadata, Self::metadata_matcher)?;
        let filter_state = self.each("filter_state", proto.filter_state, Self::filter_state_matcher)?;
        let grpc_only = proto.grpc.is_some();
        Ok(Some(RouteMatch { path, headers, query, cookies, grpc_only, tls, metadata, filter_state, fraction }))
    }

    fn filter_state_matcher(&mut self, proto: ProtoFilterState) -> Valid<FilterStateMatcher> {
        let key = self.filled("key", proto.key)?.into();
        let value = match proto.matcher {
            Some(filter_state_matcher::Matcher::StringMatch(matcher)) => {
                FilterStateMatch::String(self.at("string_match", |cx| cx.string_matcher(matcher))?)
            }
            Some(filter_state_matcher::Matcher::AddressMatch(matcher)) => self.at("address_match", |cx| {
                let range =
                    |cx: &mut Self, range: ProtoRange| cx.address_range(&range.address_prefix, range.prefix_len);
                let ranges = cx.each("ranges", matcher.ranges, range)?;
                Ok(FilterStateMatch::Address { ranges, invert: matcher.invert_match })
            })?,
            None => return Err(self.invalid("has no matcher")),
        };
        Ok(FilterStateMatcher { key, value })
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
