//! LDS: `envoy.config.listener.v3.Listener` with an `api_listener`.

use super::{FractionalPercent, HeaderMatcher, RouteConfiguration};
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
    /// In order; the last one is the router (gRFC A39).
    pub http_filters: Vec<HttpFilter>,
}

/// `rds` or an inline `route_config`.
#[derive(Clone, Debug, PartialEq)]
pub enum RouteSource {
    /// The name of a RouteConfiguration served over the same ADS stream.
    Rds(Arc<str>),
    /// Given in the listener.
    Inline(Arc<RouteConfiguration>),
}

/// One entry of `http_filters`.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpFilter {
    /// Instance name: the key of `typed_per_filter_config`.
    pub name: Arc<str>,
    /// The filter and its validated config.
    pub config: HttpFilterConfig,
    /// Off unless a route turns it on.
    pub disabled: bool,
}

/// The filters this library implements. Unknown optional filters are dropped at validation, with a note.
#[derive(Clone, Debug, PartialEq)]
pub enum HttpFilterConfig {
    /// The terminal filter.
    Router,
    /// `envoy.extensions.filters.http.fault.v3.HTTPFault` (gRFC A33).
    Fault(Arc<FaultConfig>),
}

/// Fault injection (gRFC A33). Delay first, then abort; independent draws.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultConfig {
    /// Added latency.
    pub delay: Option<FaultDelay>,
    /// The answer given instead of a call.
    pub abort: Option<FaultAbort>,
    /// Only requests that match all of these are touched.
    pub headers: Vec<HeaderMatcher>,
    /// At most this many at once in the process; `None` is unlimited, 0 is none.
    pub max_active_faults: Option<u32>,
}

/// `FaultDelay`.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultDelay {
    /// Fixed; `None` when taken from `x-envoy-fault-delay-request` (ms).
    pub fixed: Option<Duration>,
    /// Share of requests delayed.
    pub percentage: FractionalPercent,
}

/// `FaultAbort`.
#[derive(Clone, Debug, PartialEq)]
pub enum FaultAbort {
    /// Answer with this HTTP status (200..600).
    Http {
        /// The status.
        status: u16,
        /// Share of requests aborted.
        percentage: FractionalPercent,
    },
    /// Answer with this gRPC status.
    Grpc {
        /// The code.
        code: u32,
        /// Share of requests aborted.
        percentage: FractionalPercent,
    },
    /// Taken from the `x-envoy-fault-abort-*` request headers.
    Header {
        /// Upper bound of the share.
        percentage: FractionalPercent,
    },
}
