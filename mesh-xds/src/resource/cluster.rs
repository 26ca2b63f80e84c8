//! CDS: `envoy.config.cluster.v3.Cluster`.

use super::{
    ClusterLoadAssignment, ConnectionOptions, DnsDiscovery, Endpoint, HealthCheck, LbPolicy, LbSettings,
    OutlierDetection, TransportSocket, TransportSocketMatch,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};

/// A validated cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Resource name.
    pub name: Arc<str>,
    /// Where its endpoints come from.
    pub discovery: Discovery,
    /// How an endpoint is chosen.
    pub lb_policy: LbPolicy,
    /// What surrounds the policy: panic threshold, localities, slow start, subsets.
    pub lb: LbSettings,
    /// Default 5 s.
    pub connect_timeout: Duration,
    /// Priority DEFAULT thresholds.
    pub circuit_breakers: CircuitBreakers,
    /// `None`: off.
    pub outlier_detection: Option<Arc<OutlierDetection>>,
    /// `health_checks`; `None`: endpoints are not probed.
    pub health_check: Option<Arc<HealthCheck>>,
    /// `ignore_health_on_host_removal`: an endpoint that leaves the assignment leaves the cluster. Default false: one that passes its
    /// health checks stays until it fails them.
    pub ignore_health_on_host_removal: bool,
    /// Plaintext or TLS, for endpoints that none of `transport_socket_matches` is for.
    pub transport_socket: TransportSocket,
    /// For endpoints with such metadata, instead of `transport_socket`: the first that matches.
    pub transport_socket_matches: Vec<TransportSocketMatch>,
    /// From `typed_extension_protocol_options`; `None` when not said (gRPC then uses HTTP/2, plain HTTP clients HTTP/1.1).
    pub http_protocol: Option<HttpProtocol>,
    /// `common_http_protocol_options.idle_timeout`; default 1 h, zero never.
    pub idle_timeout: Duration,
    /// `max_requests_per_connection`.
    pub max_requests_per_connection: Option<u32>,
    /// How else connections are made and end.
    pub connections: ConnectionOptions,
}

/// Cluster discovery types.
#[derive(Clone, Debug, PartialEq)]
pub enum Discovery {
    /// EDS over ADS; the resource is named by `service_name`, or by the cluster.
    Eds {
        /// Name of the ClusterLoadAssignment.
        service_name: Arc<str>,
    },
    /// Endpoints in the cluster itself.
    Static(Arc<ClusterLoadAssignment>),
    /// Addresses from DNS.
    Dns(Arc<DnsDiscovery>),
    /// Other clusters, in the order of preference (gRFC A37, `envoy.clusters.aggregate`); they may be aggregates, too.
    Aggregate(Arc<[Arc<str>]>),
}

/// Upstream HTTP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpProtocol {
    /// HTTP/1.1
    Http1,
    /// HTTP/2 with prior knowledge, or ALPN under TLS.
    Http2,
}

/// `retry_budget`: retries in flight are limited to a share of the active requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// Percent of active and pending requests, 0..=100; default 20.
    pub percent: f64,
    /// Always allowed; default 3.
    pub min_concurrency: u32,
}

/// `circuit_breakers`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CircuitBreakers {
    /// `thresholds` of priority DEFAULT.
    pub default: Thresholds,
    /// Of the requests of routes with priority HIGH, counted apart.
    pub high: Thresholds,
    /// `per_host_thresholds.max_connections`: connections per endpoint. `None`: HTTP/2 has one (gRFC A105, which allows up to 10: a
    /// further one is made when streams run out), HTTP/1.1 as many as it needs.
    pub max_connections_per_host: Option<u32>,
}

/// The limits of one priority.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Thresholds {
    /// Default 1024 connections.
    pub max_connections: u32,
    /// Default 1024 requests waiting for a connection.
    pub max_pending_requests: u32,
    /// Default 1024 requests in flight (gRFC A32: counted to the end of the stream).
    pub max_requests: u32,
    /// Default 3 retries in flight, unless `retry_budget` is given.
    pub max_retries: u32,
    /// `retry_budget`, which overrides `max_retries`.
    pub retry_budget: Option<RetryBudget>,
    /// `track_remaining`: a gauge says how much is left of each. Default false.
    pub track_remaining: bool,
}

/// The priority of a route's requests (`envoy.config.core.v3.RoutingPriority`): each has circuit breakers of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RoutingPriority {
    /// Where nothing is said.
    #[default]
    Default,
    /// For what must go through.
    High,
}

impl RoutingPriority {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 2] = [Self::Default, Self::High];
}

impl CircuitBreakers {
    /// The limits of this priority.
    pub fn at(&self, priority: RoutingPriority) -> &Thresholds {
        match priority {
            RoutingPriority::Default => &self.default,
            RoutingPriority::High => &self.high,
        }
    }
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_pending_requests: 1024,
            max_requests: 1024,
            max_retries: 3,
            retry_budget: None,
            track_remaining: false,
        }
    }
}

impl Cluster {
    /// A plaintext cluster with every default, over these addresses.
    pub fn of(name: impl Into<Arc<str>>, addresses: impl IntoIterator<Item = SocketAddr>) -> Self {
        let name = name.into();
        let endpoints = addresses.into_iter().map(Endpoint::new).collect();
        Self::fixed(name.clone(), Arc::new(ClusterLoadAssignment::of(name, endpoints)))
    }

    /// A plaintext cluster with every default, over the addresses of names, each `host:port`: STRICT_DNS.
    ///
    /// # Errors
    /// There is no name, or one is not `host:port`.
    pub fn dns<'n>(name: impl Into<Arc<str>>, hosts: impl IntoIterator<Item = &'n str>) -> Result<Self, String> {
        let discovery = Discovery::Dns(Arc::new(DnsDiscovery::strict(hosts)?));
        Ok(Self { discovery, ..Self::fixed(name, Arc::default()) })
    }

    /// An aggregate of other clusters, the first preferred (gRFC A37).
    pub fn aggregate<C: Into<Arc<str>>>(name: impl Into<Arc<str>>, clusters: impl IntoIterator<Item = C>) -> Self {
        let discovery = Discovery::Aggregate(clusters.into_iter().map(Into::into).collect());
        Self { discovery, ..Self::fixed(name, Arc::default()) }
    }

    /// A plaintext cluster with every default, over the given endpoints.
    pub fn fixed(name: impl Into<Arc<str>>, endpoints: Arc<ClusterLoadAssignment>) -> Self {
        Self {
            name: name.into(),
            discovery: Discovery::Static(endpoints),
            lb_policy: LbPolicy::RoundRobin,
            lb: LbSettings::default(),
            connect_timeout: Duration::from_secs(5),
            circuit_breakers: CircuitBreakers::default(),
            outlier_detection: None,
            health_check: None,
            ignore_health_on_host_removal: false,
            transport_socket: TransportSocket::Fallback,
            transport_socket_matches: Vec::new(),
            http_protocol: None,
            idle_timeout: Duration::from_secs(3600),
            max_requests_per_connection: None,
            connections: ConnectionOptions::default(),
        }
    }
}
