//! Global rate limit (`envoy.extensions.filters.http.ratelimit.v3`).

use super::rate_limit::{RateLimit, VirtualHostLimits};
use crate::resource::{FractionalPercent, HeaderOps};
use std::{sync::Arc, time::Duration};

/// `RateLimit`, the filter
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalRateLimitConfig {
    /// Not empty.
    pub domain: String,
    /// 0..=10: which limits of the route count.
    pub stage: u32,
    /// The cluster of the rate limit service.
    pub cluster: Arc<str>,
    /// `:authority` of the questions; `None` is the cluster's name.
    pub authority: Option<String>,
    /// Of a question; `None` is none. Default 20 ms.
    pub timeout: Option<Duration>,
    /// Share of the requests that are refused when the service does not answer; default none.
    pub deny_on_error: FractionalPercent,
    /// HTTP status of those; default 500.
    pub status_on_error: u16,
    /// gRPC calls are refused with RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
    /// `x-ratelimit-limit`, `-remaining` and `-reset` on responses.
    pub x_headers: bool,
    /// `x-envoy-ratelimited` on refusals; default true.
    pub ratelimited_header: bool,
    /// `retry-after` on refusals with status 429.
    pub retry_after: bool,
    /// HTTP status of refusals, at least 400; default 429.
    pub status: u16,
    /// On refusals.
    pub response_edits: HeaderOps,
    /// Share of requests that are asked about; default all.
    pub enabled: FractionalPercent,
    /// Share of refusals that hold; default all.
    pub enforced: FractionalPercent,
    /// Instead of those of the route and the virtual host; empty is none.
    pub rate_limits: Vec<RateLimit>,
}

impl GlobalRateLimitConfig {
    /// The rate limit service in this cluster is asked about the descriptors of all requests, in this domain; Envoy's defaults.
    pub fn of(domain: impl Into<String>, cluster: impl Into<Arc<str>>) -> Self {
        Self {
            domain: domain.into(),
            stage: 0,
            cluster: cluster.into(),
            authority: None,
            timeout: Some(Duration::from_millis(20)),
            deny_on_error: FractionalPercent(0),
            status_on_error: 500,
            resource_exhausted: false,
            x_headers: false,
            ratelimited_header: true,
            retry_after: false,
            status: 429,
            response_edits: HeaderOps::default(),
            enabled: FractionalPercent::HUNDRED,
            enforced: FractionalPercent::HUNDRED,
            rate_limits: Vec::new(),
        }
    }
}

/// `RateLimitPerRoute`
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RateLimitOfRoute {
    /// Which limits of the virtual host count.
    pub virtual_host: VirtualHostLimits,
    /// Instead of all others; empty is none.
    pub rate_limits: Vec<RateLimit>,
    /// Instead of the filter's; empty is none.
    pub domain: String,
}
