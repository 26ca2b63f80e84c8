//! RDS validation (gRFC A27, A28, A31).

use super::{Decoder, Invalid, Valid, u32_or};
use crate::resource::{
    Action, ClusterSpecifier, DomainPattern, Forward, HeaderMatcher, HeaderMatcherKind, MaxStreamDuration, PathMatcher,
    Route, RouteConfiguration, RouteMatch, SafeRegex, StringMatcher, StringPattern, VirtualHost, WeightedCluster,
};
use envoy_types::pb::envoy::config::route::v3::{
    Route as ProtoRoute, RouteAction, RouteConfiguration as Proto, RouteMatch as ProtoMatch,
    VirtualHost as ProtoVirtualHost, WeightedCluster as ProtoWeighted, route::Action as ProtoAction,
    route_action::ClusterSpecifier as ProtoSpecifier, route_match::PathSpecifier,
};
use std::sync::Arc;

impl RouteConfiguration {
    /// Decodes and validates a serialized `envoy.config.route.v3.RouteConfiguration`.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        let proto: Proto = cx.message(bytes)?;
        if proto.name.is_empty() {
            return Err(cx.invalid_at("name", "must not be empty"));
        }
        cx.route_configuration(proto)
    }
}

impl Decoder<'_> {
    pub(super) fn route_configuration(&mut self, proto: Proto) -> Valid<RouteConfiguration> {
        self.ignored(&[
            ("vhds", proto.vhds.is_some()),
            ("request_headers_to_add", !proto.request_headers_to_add.is_empty()),
            ("request_headers_to_remove", !proto.request_headers_to_remove.is_empty()),
            ("response_headers_to_add", !proto.response_headers_to_add.is_empty()),
            ("response_headers_to_remove", !proto.response_headers_to_remove.is_empty()),
            ("request_mirror_policies", !proto.request_mirror_policies.is_empty()),
            ("typed_per_filter_config", !proto.typed_per_filter_config.is_empty()),
        ]);
        let mut plugins = Vec::with_capacity(proto.cluster_specifier_plugins.len());
        for (index, plugin) in proto.cluster_specifier_plugins.into_iter().enumerate() {
            let name = plugin.extension.map(|extension| extension.name).unwrap_or_default();
            if !plugin.is_optional {
                return self.at_index("cluster_specifier_plugins", index, |cx| {
                    Err(cx.invalid(format!("unknown plugin \"{name}\" and not optional")))
                });
            }
            plugins.push(name);
        }
        let virtual_hosts = proto
            .virtual_hosts
            .into_iter()
            .enumerate()
            .map(|(index, host)| self.at_index("virtual_hosts", index, |cx| cx.virtual_host(host, &plugins)))
            .collect::<Valid<_>>()?;
        Ok(RouteConfiguration { name: proto.name.into(), virtual_hosts })
    }

    fn virtual_host(&mut self, proto: ProtoVirtualHost, plugins: &[String]) -> Valid<VirtualHost> {
        self.ignored(&[
            ("request_headers_to_add", !proto.request_headers_to_add.is_empty()),
            ("request_headers_to_remove", !proto.request_headers_to_remove.is_empty()),
            ("response_headers_to_add", !proto.response_headers_to_add.is_empty()),
            ("response_headers_to_remove", !proto.response_headers_to_remove.is_empty()),
            ("request_mirror_policies", !proto.request_mirror_policies.is_empty()),
            ("rate_limits", !proto.rate_limits.is_empty()),
            ("hedge_policy", proto.hedge_policy.is_some()),
            ("matcher", proto.matcher.is_some()),
        ]);
        if proto.domains.is_empty() {
            return Err(self.invalid_at("domains", "must not be empty"));
        }
        let domains = proto
            .domains
            .iter()
            .enumerate()
            .map(|(index, domain)| self.at_index("domains", index, |cx| cx.domain(domain)))
            .collect::<Valid<_>>()?;
        let retry_policy = match proto.retry_policy {
            Some(policy) => Some(self.at("retry_policy", |cx| cx.retry_policy(policy))?),
            None => None,
        };
        let filter_overrides = self.filter_overrides(proto.typed_per_filter_config)?;
        let mut routes = Vec::with_capacity(proto.routes.len());
        for (index, route) in proto.routes.into_iter().enumerate() {
            if let Some(route) = self.at_index("routes", index, |cx| cx.route(route, plugins))? {
                routes.push(route);
            }
        }
        Ok(VirtualHost { name: proto.name.into(), domains, routes, retry_policy, filter_overrides })
    }

    /// gRFC A27.
    fn domain(&mut self, domain: &str) -> Valid<DomainPattern> {
        let lower = domain.to_ascii_lowercase();
        let invalid = |rest: &str| rest.is_empty() || rest.contains('*');
        let pattern = if lower == "*" {
            return Ok(DomainPattern::Any);
        } else if let Some(rest) = lower.strip_prefix('*') {
            (!invalid(rest)).then(|| DomainPattern::Suffix(rest.to_owned()))
        } else if let Some(rest) = lower.strip_suffix('*') {
            (!invalid(rest)).then(|| DomainPattern::Prefix(rest.to_owned()))
        } else {
            (!invalid(&lower)).then_some(DomainPattern::Exact(lower))
        };
        pattern.ok_or_else(|| self.invalid(format!("\"{domain}\" is not a domain: use name, *suffix, prefix* or *")))
    }

    /// `None`: the route is skipped, with a note (gRFC A28).
    fn route(&mut self, proto: ProtoRoute, plugins: &[String]) -> Valid<Option<Route>> {
        let Some(matches) = proto.r#match else { return Err(self.invalid_at("match", "is missing")) };
        let Some(matches) = self.at("match", |cx| cx.route_match(matches))? else { return Ok(None) };
        let action = match proto.action {
            Some(ProtoAction::Route(action)) => match self.at("route", |cx| cx.forward(action, plugins))? {
                Some(forward) => Action::Forward(Arc::new(forward)),
                None => return Ok(None),
            },
            Some(ProtoAction::Redirect(_)) => unsupported("redirect"),
            Some(ProtoAction::DirectResponse(_)) => unsupported("direct_response"),
            Some(ProtoAction::FilterAction(_)) => unsupported("filter_action"),
            Some(ProtoAction::NonForwardingAction(_)) => unsupported("non_forwarding_action"),
            None => unsupported("none"),
        };
        if let Action::Unsupported(reason) = &action {
            self.note("action", format!("{reason}: requests on this route fail"));
        }
        self.ignored(&[
            ("request_headers_to_add", !proto.request_headers_to_add.is_empty()),
            ("request_headers_to_remove", !proto.request_headers_to_remove.is_empty()),
            ("response_headers_to_add", !proto.response_headers_to_add.is_empty()),
            ("response_headers_to_remove", !proto.response_headers_to_remove.is_empty()),
        ]);
        let filter_overrides = self.filter_overrides(proto.typed_per_filter_config)?;
        Ok(Some(Route { name: proto.name.into(), matches, action, filter_overrides }))
    }

    fn route_match(&mut self, proto: ProtoMatch) -> Valid<Option<RouteMatch>> {
        let case_sensitive = proto.case_sensitive.is_none_or(|value| value.value);
        let fold = |text: String| if case_sensitive { text } else { text.to_ascii_lowercase() };
        let path = match proto.path_specifier {
            Some(PathSpecifier::Prefix(prefix)) => PathMatcher::Prefix { prefix: fold(prefix), case_sensitive },
            Some(PathSpecifier::Path(path)) => PathMatcher::Exact { path: fold(path), case_sensitive },
            Some(PathSpecifier::SafeRegex(regex)) => PathMatcher::Regex(self.at("safe_regex", |cx| cx.regex(&regex))?),
            Some(PathSpecifier::PathSeparatedPrefix(prefix)) => {
                let flag = if case_sensitive { "" } else { "(?i)" };
                let regex = SafeRegex::new(&format!("{flag}{}(?:/.*)?", regex::escape(&prefix)));
                PathMatcher::Regex(regex.map_err(|error| self.invalid_at("path_separated_prefix", error.to_string()))?)
            }
            Some(PathSpecifier::ConnectMatcher(_)) => {
                return Err(self.invalid_at("connect_matcher", "not supported"));
            }
            Some(PathSpecifier::PathMatchPolicy(_)) => {
                return Err(self.invalid_at("path_match_policy", "not supported"));
            }
            None => return Err(self.invalid("has no path_specifier")),
        };
        let mut headers = self.header_matchers("headers", proto.headers)?;
        if proto.grpc.is_some() {
            let pattern = StringPattern::Prefix("application/grpc".to_owned());
            headers.push(HeaderMatcher {
                name: "content-type".to_owned(),
                kind: HeaderMatcherKind::String(StringMatcher { pattern, ignore_case: false }),
                invert: false,
                treat_missing_as_empty: false,
            });
        }
        let fraction = match proto.runtime_fraction.and_then(|fraction| fraction.default_value) {
            Some(fraction) => Some(self.fraction("runtime_fraction.default_value", fraction)?),
            None => None,
        };
        // gRFC A28 for query parameters; the others would make the route match too much as well.
        let unsupported = [
            ("query_parameters", !proto.query_parameters.is_empty()),
            ("cookies", !proto.cookies.is_empty()),
            ("dynamic_metadata", !proto.dynamic_metadata.is_empty()),
            ("filter_state", !proto.filter_state.is_empty()),
            ("tls_context", proto.tls_context.is_some()),
        ];
        if let Some((field, _)) = unsupported.iter().find(|(_, set)| *set) {
            self.note(field, "not supported, the route is skipped");
            return Ok(None);
        }
        Ok(Some(RouteMatch { path, headers, fraction }))
    }

    fn forward(&mut self, proto: RouteAction, plugins: &[String]) -> Valid<Option<Forward>> {
        let cluster = match proto.cluster_specifier {
            Some(ProtoSpecifier::Cluster(name)) if name.is_empty() => {
                return Err(self.invalid_at("cluster", "must not be empty"));
            }
            Some(ProtoSpecifier::Cluster(name)) => ClusterSpecifier::Cluster(name.into()),
            Some(ProtoSpecifier::WeightedClusters(weighted)) => {
                self.at("weighted_clusters", |cx| cx.weighted_clusters(weighted))?
            }
            Some(ProtoSpecifier::ClusterHeader(_)) => {
                self.note("cluster_header", "not supported, the route is skipped");
                return Ok(None);
            }
            Some(ProtoSpecifier::ClusterSpecifierPlugin(name)) => {
                if !plugins.contains(&name) {
                    return Err(self.invalid_at("cluster_specifier_plugin", format!("\"{name}\" is not declared")));
                }
                self.note("cluster_specifier_plugin", "not supported, optional, the route is skipped");
                return Ok(None);
            }
            Some(ProtoSpecifier::InlineClusterSpecifierPlugin(_)) => {
                self.note("inline_cluster_specifier_plugin", "not supported, the route is skipped");
                return Ok(None);
            }
            None => {
                self.note("cluster_specifier", "is missing, the route is skipped");
                return Ok(None);
            }
        };
        self.ignored(&[
            ("prefix_rewrite", !proto.prefix_rewrite.is_empty()),
            ("regex_rewrite", proto.regex_rewrite.is_some()),
            ("path_rewrite_policy", proto.path_rewrite_policy.is_some()),
            ("path_rewrite", !proto.path_rewrite.is_empty()),
            ("host_rewrite_specifier", proto.host_rewrite_specifier.is_some()),
            ("request_mirror_policies", !proto.request_mirror_policies.is_empty()),
            ("rate_limits", !proto.rate_limits.is_empty()),
            ("hash_policy", !proto.hash_policy.is_empty()),
            ("hedge_policy", proto.hedge_policy.is_some()),
            ("idle_timeout", proto.idle_timeout.is_some()),
            ("internal_redirect_policy", proto.internal_redirect_policy.is_some()),
            ("metadata_match", proto.metadata_match.is_some()),
        ]);
        let timeout = self.duration("timeout", proto.timeout)?;
        let max_stream_duration = match proto.max_stream_duration {
            None => MaxStreamDuration::default(),
            Some(proto) => self.at("max_stream_duration", |cx| {
                Ok(MaxStreamDuration {
                    max_stream_duration: cx.duration("max_stream_duration", proto.max_stream_duration)?,
                    grpc_timeout_header_max: cx.duration("grpc_timeout_header_max", proto.grpc_timeout_header_max)?,
                })
            })?,
        };
        let retry_policy = match proto.retry_policy {
            Some(policy) => Some(self.at("retry_policy", |cx| cx.retry_policy(policy))?),
            None => None,
        };
        Ok(Some(Forward { cluster, timeout, max_stream_duration, retry_policy }))
    }

    fn weighted_clusters(&mut self, proto: ProtoWeighted) -> Valid<ClusterSpecifier> {
        let mut total: u64 = 0;
        let mut clusters = Vec::with_capacity(proto.clusters.len());
        for (index, entry) in proto.clusters.into_iter().enumerate() {
            let weight = u32_or(entry.weight, 0);
            total += u64::from(weight);
            let cluster = self.at_index("clusters", index, |cx| {
                if entry.name.is_empty() {
                    return Err(cx.invalid_at("name", "must not be empty"));
                }
                cx.ignored(&[
                    ("request_headers_to_add", !entry.request_headers_to_add.is_empty()),
                    ("request_headers_to_remove", !entry.request_headers_to_remove.is_empty()),
                    ("response_headers_to_add", !entry.response_headers_to_add.is_empty()),
                    ("response_headers_to_remove", !entry.response_headers_to_remove.is_empty()),
                    ("host_rewrite_specifier", entry.host_rewrite_specifier.is_some()),
                    ("metadata_match", entry.metadata_match.is_some()),
                ]);
                let filter_overrides = cx.filter_overrides(entry.typed_per_filter_config)?;
                Ok(WeightedCluster { name: entry.name.into(), weight, filter_overrides })
            })?;
            if weight > 0 {
                clusters.push(cluster);
            }
        }
        if total == 0 {
            return Err(self.invalid("the weights add up to zero"));
        }
        if total > u64::from(u32::MAX) {
            return Err(self.invalid(format!("the weights add up to {total}, more than {}", u32::MAX)));
        }
        Ok(ClusterSpecifier::Weighted(clusters))
    }
}

fn unsupported(action: &str) -> Action {
    Action::Unsupported(format!("route action {action} is not supported").into())
}
