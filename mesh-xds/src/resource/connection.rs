//! How connections to the endpoints of a cluster are made, and how long they live.

use std::time::Duration;

/// Settings of the connections of one cluster, beside its timeouts and limits.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ConnectionOptions {
    /// `common_http_protocol_options.max_connection_duration`: a connection this old takes no new requests. `None`: any age.
    pub max_duration: Option<Duration>,
    /// `max_connection_duration_jitter`: the duration is drawn from `max_duration` to so many percent more; 0..=100, default 0.
    pub max_duration_jitter: f64,
    /// `upstream_connection_options.tcp_keepalive`; `None`: the system probes nothing.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// `http2_protocol_options.connection_keepalive`; `None`: what the client was built with.
    pub http2_keepalive: Option<Http2Keepalive>,
    /// `http2_protocol_options.max_concurrent_streams`: streams that we open at once on a connection, beside the peer's own limit.
    /// `None`: the peer's limit alone.
    pub max_concurrent_streams: Option<u32>,
    /// `http2_protocol_options.initial_stream_window_size` in bytes, 65,535..=2^31-1; `None`: the client's default.
    pub stream_window: Option<u32>,
    /// `http2_protocol_options.initial_connection_window_size` in bytes, 65,535..=2^31-1; `None`: the client's default.
    pub connection_window: Option<u32>,
    /// `preconnect_policy.per_upstream_preconnect_ratio`: for so many times the requests in flight an endpoint has connections;
    /// 1..=3, default 1: none is made before it is needed.
    pub preconnect_ratio: f64,
    /// `preconnect_policy.predictive_preconnect_ratio`: for so many times the requests in flight the cluster has connections, on the
    /// endpoints that have none yet before others; 1..=3, default 1.
    pub predictive_preconnect_ratio: f64,
    /// `close_connections_on_host_health_failure`: an endpoint that is found unhealthy or is ejected loses its connections at once,
    /// with the requests on them. Default false.
    pub close_on_health_failure: bool,
}

/// TCP keepalive (`envoy.config.core.v3.TcpKeepalive`). `None` is the system's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Probes without an answer before the connection is dead.
    pub probes: Option<u32>,
    /// Idle time before the first probe; whole seconds.
    pub time: Option<Duration>,
    /// Between probes; whole seconds.
    pub interval: Option<Duration>,
}

/// PINGs of HTTP/2 (`envoy.config.core.v3.KeepaliveSettings`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Http2Keepalive {
    /// Between PINGs; greater than zero.
    pub interval: Duration,
    /// The connection is closed when a PING has no answer for this long; greater than zero.
    pub timeout: Duration,
    /// The interval is drawn from `interval` to so many percent more; 0..=100, default 15.
    pub jitter: f64,
}

impl Default for ConnectionOptions {
    fn default() -> Self {
        Self {
            max_duration: None,
            max_duration_jitter: 0.0,
            tcp_keepalive: None,
            http2_keepalive: None,
            max_concurrent_streams: None,
            stream_window: None,
            connection_window: None,
            preconnect_ratio: 1.0,
            predictive_preconnect_ratio: 1.0,
            close_on_health_failure: false,
        }
    }
}
