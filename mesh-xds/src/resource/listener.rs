//! LDS: `envoy.config.listener.v3.Listener` with an `api_listener`.

use super::{HttpFilter, HttpFilterConfig, RouteConfiguration};
use std::{sync::Arc, time::Duration};

/// A client-side listener: the entry of one target.
#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    /// Resource name.
    pub name: Arc<str>,
    /// The `api_listener`'s connection manager.
    pub http: HttpConnectionManager,
}

/// What a client honours of `HttpConnectionManager`.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpConnectionManager {
    /// Where the routes come from.
    pub routes: RouteSource,
    /// `common_http_protocol_options.max_stream_duration` (gRFC A31); zero means no limit.
    pub max_stream_duration: Option<Duration>,
    /// `stream_idle_timeout`, where it is set: for routes without an `idle_timeout`; zero means no limit. Not gRPC's.
    pub stream_idle_timeout: Option<Duration>,
    /// `tracing`, where it is set.
    pub tracing: Option<Tracing>,
    /// In order; the last one is the router (gRFC A39).
    pub http_filters: Vec<HttpFilter>,
}

/// The shares of new traces that are recorded, of `HttpConnectionManager.Tracing`: 0.0..=1.0.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tracing {
    /// `client_sampling`: of requests with `x-client-trace-id`.
    pub client: f64,
    /// `random_sampling`: of the others.
    pub random: f64,
    /// `overall_sampling`: of those that are to be.
    pub overall: f64,
}

impl HttpConnectionManager {
    /// The clusters that its filters call.
    pub fn service_clusters(&self) -> impl Iterator<Item = &Arc<str>> {
        self.http_filters.iter().flat_map(|filter| match &filter.config {
            HttpFilterConfig::GlobalRateLimit(limit) => vec![&limit.cluster],
            HttpFilterConfig::Jwt(jwt) => jwt.clusters().collect(),
            _ => Vec::new(),
        })
    }
}

/// `rds` or an inline `route_config`.
#[derive(Clone, Debug, PartialEq)]
pub enum RouteSource {
    /// The name of a RouteConfiguration served over the same ADS stream.
    Rds(Arc<str>),
    /// Given in the listener.
    Inline(Arc<RouteConfiguration>),
}
