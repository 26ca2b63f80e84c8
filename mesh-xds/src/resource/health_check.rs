//! Active health checks (`envoy.config.core.v3.HealthCheck`).

use super::StringMatcher;
use std::{ops::Range, sync::Arc, time::Duration};

/// How the endpoints of a cluster are probed, and what makes one healthy or not.
///
/// Made by [`http`](Self::http), [`grpc`](Self::grpc) or [`tcp`](Self::tcp) and changed by field in code; Envoy's defaults otherwise.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HealthCheck {
    /// What is asked.
    pub checker: HealthChecker,
    /// Of one check, its connection included. In code: 1 s.
    pub timeout: Duration,
    /// From the end of a check to the next. In code: 5 s.
    pub interval: Duration,
    /// The first check is up to this long late. Default zero.
    pub initial_jitter: Duration,
    /// Every interval is up to this much longer. Default zero.
    pub interval_jitter: Duration,
    /// And up to so many percent of itself; default 0.
    pub interval_jitter_percent: u32,
    /// Failures in a row that make an endpoint unhealthy; greater than zero. An answer that says so counts at once. In code: 3.
    pub unhealthy_threshold: u32,
    /// Successes in a row that make an endpoint healthy again; greater than zero. At the start one is enough. In code: 2.
    pub healthy_threshold: u32,
    /// Of every endpoint that does not say another.
    pub alt_port: Option<u16>,
    /// A connection serves more than one check. Default true.
    pub reuse_connection: bool,
    /// Between checks while the cluster was never connected to for a request. Default 60 s.
    pub no_traffic_interval: Duration,
    /// The same for healthy endpoints; `None`: `no_traffic_interval`.
    pub no_traffic_healthy_interval: Option<Duration>,
    /// Of unhealthy endpoints; `None`: `interval`.
    pub unhealthy_interval: Option<Duration>,
    /// Right after an endpoint became unhealthy; `None`: that of unhealthy ones.
    pub unhealthy_edge_interval: Option<Duration>,
    /// Right after an endpoint became healthy; `None`: `interval`.
    pub healthy_edge_interval: Option<Duration>,
    /// Each failure is an event, not only the first and the one that made an endpoint unhealthy. Default false.
    pub always_log_failures: bool,
    /// Each success is an event. Default false.
    pub always_log_successes: bool,
}

/// What a check asks of an endpoint.
#[derive(Clone, Debug, PartialEq)]
pub enum HealthChecker {
    /// An HTTP request.
    Http(HttpHealthCheck),
    /// `grpc.health.v1.Health/Check`.
    Grpc(GrpcHealthCheck),
    /// A TCP connection, and what is said on it.
    Tcp(TcpHealthCheck),
}

/// An HTTP check.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HttpHealthCheck {
    /// `:authority`; `None`: the endpoint's own, or the cluster's name.
    pub host: Option<String>,
    /// With its query; starts with `/`.
    pub path: String,
    /// Default GET.
    pub method: http::Method,
    /// Set on the request.
    pub headers: Vec<(http::HeaderName, http::HeaderValue)>,
    /// What a healthy endpoint answers; empty: 200.
    pub expected_statuses: Vec<Range<u16>>,
    /// Failures that count towards the threshold. Any other unexpected status makes the endpoint unhealthy at once.
    pub retriable_statuses: Vec<Range<u16>>,
    /// HTTP/2 instead of HTTP/1.1, where TLS does not negotiate one.
    pub http2: bool,
    /// Has to match the header `x-envoy-upstream-healthchecked-cluster` up to its first `-`.
    pub service_name: Option<StringMatcher>,
    /// Parts of the response body, in this order.
    pub receive: Vec<Vec<u8>>,
    /// Bytes of the body that are looked at; default 1024, 0 is all.
    pub response_buffer_size: u64,
}

/// A gRPC check.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GrpcHealthCheck {
    /// As the server registers it; empty is the server as a whole.
    pub service: String,
    /// `:authority`; `None`: the endpoint's own, or the cluster's name.
    pub authority: Option<String>,
    /// Sent along.
    pub metadata: Vec<(http::HeaderName, http::HeaderValue)>,
}

/// A TCP check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TcpHealthCheck {
    /// Sent once connected; empty: nothing.
    pub send: Vec<u8>,
    /// Parts of the answer, in this order, with anything between; none: being connected is enough.
    pub receive: Vec<Vec<u8>>,
}

/// What an endpoint says of its own health checks (`Endpoint.health_check_config`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EndpointHealthCheck {
    /// `port_value`: the port to check.
    pub port: Option<u16>,
    /// `hostname`: `:authority` of its checks, or empty.
    pub hostname: Arc<str>,
    /// `address`: where to check.
    pub address: Option<std::net::SocketAddr>,
    /// `disable_active_health_check`
    pub disabled: bool,
}

impl HealthCheck {
    /// Asks for this path, with its query, and expects 200.
    pub fn http(path: impl Into<String>) -> Self {
        Self::new(HealthChecker::Http(HttpHealthCheck {
            host: None,
            path: path.into(),
            method: http::Method::GET,
            headers: Vec::new(),
            expected_statuses: Vec::new(),
            retriable_statuses: Vec::new(),
            http2: false,
            service_name: None,
            receive: Vec::new(),
            response_buffer_size: 1024,
        }))
    }

    /// Asks the gRPC health service for this service; empty is the server as a whole.
    pub fn grpc(service: impl Into<String>) -> Self {
        Self::new(HealthChecker::Grpc(GrpcHealthCheck { service: service.into(), ..GrpcHealthCheck::default() }))
    }

    /// Connects, and closes again.
    pub fn tcp() -> Self {
        Self::new(HealthChecker::Tcp(TcpHealthCheck::default()))
    }

    /// One every 5 s that takes at most 1 s; three failures to be unhealthy, two successes to be healthy again.
    pub fn new(checker: HealthChecker) -> Self {
        Self {
            checker,
            timeout: Duration::from_secs(1),
            interval: Duration::from_secs(5),
            initial_jitter: Duration::ZERO,
            interval_jitter: Duration::ZERO,
            interval_jitter_percent: 0,
            unhealthy_threshold: 3,
            healthy_threshold: 2,
            alt_port: None,
            reuse_connection: true,
            no_traffic_interval: Duration::from_secs(60),
            no_traffic_healthy_interval: None,
            unhealthy_interval: None,
            unhealthy_edge_interval: None,
            healthy_edge_interval: None,
            always_log_failures: false,
            always_log_successes: false,
        }
    }

    /// From the end of a check to the next.
    #[must_use]
    pub fn interval(mut self, interval: Duration) -> Self {
        self.interval = interval;
        self
    }

    /// Of one check.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Failures in a row that make an endpoint unhealthy, and successes that make it healthy again; at least 1 each.
    #[must_use]
    pub fn thresholds(mut self, unhealthy: u32, healthy: u32) -> Self {
        (self.unhealthy_threshold, self.healthy_threshold) = (unhealthy.max(1), healthy.max(1));
        self
    }

    /// Between checks while the cluster was never connected to for a request.
    #[must_use]
    pub fn no_traffic_interval(mut self, interval: Duration) -> Self {
        self.no_traffic_interval = interval;
        self
    }
}
