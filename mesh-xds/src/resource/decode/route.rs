//! RDS validation: configuration, virtual hosts and routes (gRFC A27, A28, A31).

use super::{Decoder, Invalid, Valid, action::Surroundings};
use crate::resource::{Action, AttemptCount, DomainPattern, Route, RouteConfiguration, VirtualHost};
use envoy_types::pb::envoy::config::route::v3::{
    Route as ProtoRoute, RouteConfiguration as Proto, VirtualHost as ProtoVirtualHost, route::Action as ProtoAction,
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
            ("internal_only_headers", !proto.internal_only_headers.is_empty()),
            ("vhost_header", !proto.vhost_header.is_empty()),
            ("ignore_path_parameters_in_path_matching", proto.ignore_path_parameters_in_path_matching),
            ("route_specifiers", !proto.route_specifiers.is_empty()),
        ]);
        let mut plugins = Vec::with_capacity(proto.cluster_specifier_plugins.len());
        for (index, plugin) in proto.cluster_specifier_plugins.into_iter().enumerate() {
            let name = plugin.extension.map(|extension| extension.name).unwrap_or_default();
            if !plugin.is_optional {
                return self.at_index("cluster_specifier_plugins", index, |cx| {
                    Err(cx.invalid(format!(
                        "unknown plugin \"{name}\" and not optional: clusters are not chosen by plugins (such as RLS) here"
                    )))
                });
            }
            plugins.push(name);
        }
        let edits = self.header_edits(
            (proto.request_headers_to_add, proto.request_headers_to_remove),
            (proto.response_headers_to_add, proto.response_headers_to_remove),
        )?;
        let limit = proto.max_direct_response_body_size_bytes.map_or(4096, |limit| limit.value as usize);
        let mirrors = self.mirrors(proto.request_mirror_policies, &Arc::default())?;
        let around = Surroundings { plugins: &plugins, max_body: limit, mirrors: &mirrors, hedge: None };
        let virtual_hosts = proto
            .virtual_hosts
            .into_iter()
            .enumerate()
            .map(|(index, host)| self.at_index("virtual_hosts", index, |cx| cx.virtual_host(host, around)))
            .collect::<Valid<_>>()?;
        let most_specific_edits_win = proto.most_specific_header_mutations_wins;
        let filter_overrides = self.filter_overrides(proto.typed_per_filter_config)?;
        Ok(RouteConfiguration {
            name: proto.name.into(),
            virtual_hosts,
            edits,
            most_specific_edits_win,
            filter_overrides,
        })
    }

    fn virtual_host(&mut self, proto: ProtoVirtualHost, around: Surroundings<'_>) -> Valid<VirtualHost> {
        self.ignored(&[
            ("require_tls", proto.require_tls != 0),
            ("cors", proto.cors.is_some()),
            ("retry_policy_typed_config", proto.retry_policy_typed_config.is_some()),
            ("per_request_buffer_limit_bytes", proto.per_request_buffer_limit_bytes.is_some()),
            ("request_body_buffer_limit", proto.request_body_buffer_limit.is_some()),
            ("matcher", proto.matcher.is_some()),
            ("route_specifiers", !proto.route_specifiers.is_empty()),
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
        let mirrors = self.mirrors(proto.request_mirror_policies, around.mirrors)?;
        let hedge = match proto.hedge_policy {
            Some(policy) => self.at("hedge_policy", |cx| Ok(cx.hedge(&policy)))?,
            None => None,
        };
        let around = Surroundings { mirrors: &mirrors, hedge, ..around };
        let attempt_count = AttemptCount {
            in_request: proto.include_request_attempt_count,
            in_response: proto.include_attempt_count_in_response,
            after_timeout: proto.include_is_timeout_retry_header,
        };
        let filter_overrides = self.filter_overrides(proto.typed_per_filter_config)?;
        let edits = self.header_edits(
            (proto.request_headers_to_add, proto.request_headers_to_remove),
            (proto.response_headers_to_add, proto.response_headers_to_remove),
        )?;
        let mut routes = Vec::with_capacity(proto.routes.len());
        for (index, route) in proto.routes.into_iter().enumerate() {
            if let Some(route) = self.at_index("routes", index, |cx| cx.route(route, around))? {
                routes.push(route);
            }
        }
        let rate_limits = self.rate_limits(proto.rate_limits)?;
        Ok(VirtualHost {
            name: proto.name.into(),
            domains,
            routes,
            retry_policy,
            attempt_count,
            filter_overrides,
            edits,
            rate_limits,
        })
    }

    /// gRFC A27.
    fn domain(&mut self, domain: &str) -> Valid<DomainPattern> {
        DomainPattern::parse(domain)
            .ok_or_else(|| self.invalid(format!("\"{domain}\" is not a domain: use name, *suffix, prefix* or *")))
    }

    /// `None`: the route is skipped, with a note (gRFC A28).
    fn route(&mut self, proto: ProtoRoute, around: Surroundings<'_>) -> Valid<Option<Route>> {
        let Some(matches) = proto.r#match else { return Err(self.invalid_at("match", "is missing")) };
        let Some(matches) = self.at("match", |cx| cx.route_match(matches))? else { return Ok(None) };
        let action = match proto.action {
            Some(ProtoAction::Route(action)) => {
                match self.at("route", |cx| cx.forward(action, &matches.path, around))? {
                    Some(forward) => Action::Forward(Arc::new(forward)),
                    None => return Ok(None),
                }
            }
            Some(ProtoAction::Redirect(redirect)) => {
                Action::Redirect(Arc::new(self.at("redirect", |cx| cx.redirect(redirect))?))
            }
            Some(ProtoAction::DirectResponse(direct)) => {
                self.at("direct_response", |cx| cx.direct_response(direct, around.max_body))?
            }
            Some(ProtoAction::FilterAction(_)) => unsupported("filter_action"),
            Some(ProtoAction::NonForwardingAction(_)) => Action::NonForwarding,
            None => unsupported("none"),
        };
        if let Action::Unsupported(reason) = &action {
            self.note("action", format!("{reason}: requests on this route fail"));
        }
        self.ignored(&[
            ("tracing", proto.tracing.is_some()),
            ("per_request_buffer_limit_bytes", proto.per_request_buffer_limit_bytes.is_some()),
            ("request_body_buffer_limit", proto.request_body_buffer_limit.is_some()),
            ("route_specifiers", !proto.route_specifiers.is_empty()),
        ]);
        let filter_overrides = self.filter_overrides(proto.typed_per_filter_config)?;
        let edits = self.header_edits(
            (proto.request_headers_to_add, proto.request_headers_to_remove),
            (proto.response_headers_to_add, proto.response_headers_to_remove),
        )?;
        Ok(Some(Route { name: proto.name.into(), matches, action, filter_overrides, edits }))
    }
}

fn unsupported(action: &str) -> Action {
    Action::Unsupported(format!("route action {action} is not supported").into())
}
