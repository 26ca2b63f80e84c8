//! The global rate limit filter.

use crate::resource::{
    FractionalPercent, GlobalRateLimitConfig, RateLimitOfRoute,
    decode::{Decoder, Valid},
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::{ApiVersion, grpc_service::TargetSpecifier},
        ratelimit::v3::RateLimitServiceConfig,
    },
    extensions::filters::http::ratelimit::v3::{RateLimit, RateLimitPerRoute},
};
use std::{sync::Arc, time::Duration};

impl Decoder<'_> {
    pub(super) fn global_rate_limit(&mut self, proto: RateLimit) -> Valid<GlobalRateLimitConfig> {
        self.ignored(&[("metadata_namespace", !proto.metadata_namespace.is_empty())]);
        if !matches!(proto.request_type.as_str(), "" | "both") {
            self.note("request_type", "a client knows no difference of internal and external requests: both count");
        }
        let Some(service) = proto.rate_limit_service else {
            return Err(self.invalid_at("rate_limit_service", "is missing"));
        };
        let (cluster, authority) = self.at("rate_limit_service", |cx| cx.rate_limit_service(service))?;
        let timeout = match self.duration("timeout", proto.timeout)? {
            None => Some(Duration::from_millis(20)),
            Some(Duration::ZERO) => None,
            set => set,
        };
        let (none, all) = (FractionalPercent(0), FractionalPercent::HUNDRED);
        let deny = if proto.failure_mode_deny { all } else { none };
        Ok(GlobalRateLimitConfig {
            domain: self.filled("domain", proto.domain)?,
            stage: self.stage(proto.stage)?,
            cluster,
            authority,
            timeout,
            deny_on_error: self.runtime_fraction("failure_mode_deny_percent", proto.failure_mode_deny_percent, deny)?,
            status_on_error: self.error_status("status_on_error", proto.status_on_error, 500)?,
            resource_exhausted: proto.rate_limited_as_resource_exhausted,
            x_headers: proto.enable_x_ratelimit_headers == 1,
            ratelimited_header: !proto.disable_x_envoy_ratelimited_header,
            retry_after: proto.enable_retry_after_header,
            status: self.error_status("rate_limited_status", proto.rate_limited_status, 429)?,
            response_edits: self.added_headers("response_headers_to_add", proto.response_headers_to_add)?,
            enabled: self.runtime_fraction("filter_enabled", proto.filter_enabled, all)?,
            enforced: self.runtime_fraction("filter_enforced", proto.filter_enforced, all)?,
            rate_limits: self.rate_limits(proto.rate_limits)?,
        })
    }

    /// The cluster, and the authority if it says one.
    fn rate_limit_service(&mut self, proto: RateLimitServiceConfig) -> Valid<(Arc<str>, Option<String>)> {
        if !matches!(ApiVersion::try_from(proto.transport_api_version), Ok(ApiVersion::V3 | ApiVersion::Auto)) {
            return Err(self.invalid_at("transport_api_version", "must be V3"));
        }
        let Some(service) = proto.grpc_service else { return Err(self.invalid_at("grpc_service", "is missing")) };
        self.at("grpc_service", |cx| {
            cx.ignored(&[
                ("timeout", service.timeout.is_some()),
                ("initial_metadata", !service.initial_metadata.is_empty()),
                ("retry_policy", service.retry_policy.is_some()),
            ]);
            match service.target_specifier {
                Some(TargetSpecifier::EnvoyGrpc(envoy)) => cx.at("envoy_grpc", |cx| {
                    let cluster = cx.filled("cluster_name", envoy.cluster_name)?;
                    Ok((cluster.into(), Some(envoy.authority).filter(|authority| !authority.is_empty())))
                }),
                Some(TargetSpecifier::GoogleGrpc(_)) => {
                    Err(cx.invalid_at("google_grpc", "not supported: name a cluster by envoy_grpc"))
                }
                None => Err(cx.invalid("has neither envoy_grpc nor google_grpc")),
            }
        })
    }

    pub(super) fn rate_limit_per_route(&mut self, proto: RateLimitPerRoute) -> Valid<RateLimitOfRoute> {
        self.ignored(&[("override_option", proto.override_option != 0)]);
        Ok(RateLimitOfRoute {
            virtual_host: self.virtual_host_limits("vh_rate_limits", proto.vh_rate_limits)?,
            rate_limits: self.rate_limits(proto.rate_limits)?,
            domain: proto.domain,
        })
    }
}
