//! `RouteMatch`: paths, headers, query parameters, cookies and fractions (gRFC A28, Envoy).

use super::{Decoder, Valid};
use crate::resource::{
    CookieMatcher, PathMatcher, PathTemplate, QueryParameterMatcher, QueryParameterMatcherKind, RouteMatch,
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
        // To match without them would match too much.
        let unknowable = [
            ("tls_context", proto.tls_context.is_some(), "a client has no downstream TLS connection"),
            ("dynamic_metadata", !proto.dynamic_metadata.is_empty(), "no filter sets dynamic metadata in a client"),
            ("filter_state", !proto.filter_state.is_empty(), "no filter sets filter state in a client"),
        ];
        if let Some((field, _, reason)) = unknowable.iter().find(|(_, set, _)| *set) {
            self.note(field, format!("{reason}: not supported, the route is skipped"));
            return Ok(None);
        }
        Ok(Some(RouteMatch { path, headers, query, cookies, grpc_only: proto.grpc.is_some(), fraction }))
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
