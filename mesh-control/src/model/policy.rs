//! How the clusters of a host behave: subsets, and their settings.

use super::{Object, Workload};
use crate::problem::Located;
use std::{collections::BTreeMap, time::Duration};

/// How the clusters of a host behave.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The document.
    pub object: Object,
    /// Fully qualified, lower-case; may start with `*`.
    pub host: Located<String>,
    /// Of every subset that does not say otherwise.
    pub traffic: TrafficPolicy,
    /// Groups of endpoints.
    pub subsets: Vec<Subset>,
}

/// A named group of endpoints.
#[derive(Clone, Debug)]
pub struct Subset {
    /// Its name.
    pub name: Located<String>,
    /// All must be equal; empty selects every endpoint.
    pub labels: BTreeMap<String, String>,
    /// Replaces parts of the policy's.
    pub traffic: TrafficPolicy,
}

/// Settings of clusters. `None`: not said.
#[derive(Clone, Debug, Default)]
pub struct TrafficPolicy {
    /// How an endpoint is chosen.
    pub load_balancer: Option<LoadBalancer>,
    /// Limits and timeouts.
    pub connection_pool: Option<ConnectionPool>,
    /// When an endpoint is left out.
    pub outlier_detection: Option<OutlierDetection>,
    /// Encryption.
    pub tls: Option<Tls>,
    /// Limit of concurrent retries.
    pub retry_budget: Option<RetryBudget>,
    /// By port: replaces all of the above.
    pub ports: BTreeMap<u16, Self>,
}

/// How an endpoint is chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LoadBalancer {
    /// `None`: round robin.
    pub algorithm: Option<Algorithm>,
    /// New endpoints get less.
    pub warmup: Option<Warmup>,
    /// Who is near; `None`: as the mesh says.
    pub locality: Option<LocalityLb>,
}

/// `localityLbSetting`: requests stay near their client. Localities are `REGION/ZONE/SUBZONE`, where parts may be missing or `*`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LocalityLb {
    /// False: localities do not count.
    pub enabled: bool,
    /// Shares of localities.
    pub distribute: Vec<Distribute>,
    /// Which region comes after one's own.
    pub failover: Vec<Failover>,
    /// Labels, `KEY` or `KEY=VALUE`: endpoints that are like the client in more of them, from the first on, come first.
    pub failover_priority: Vec<String>,
}

/// Where the requests of clients go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Distribute {
    /// The clients there.
    pub from: String,
    /// Percent by locality, 100 together.
    pub to: Vec<(String, u32)>,
}

/// Where the requests of a region go when it cannot take them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failover {
    /// The region of the clients.
    pub from: String,
    /// The next region.
    pub to: String,
}

/// What chooses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// In turn.
    RoundRobin,
    /// Fewest in flight of two draws.
    LeastRequest,
    /// At random.
    Random,
    /// The same for requests that are alike.
    Hash(ConsistentHash),
}

/// Consistent hashing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsistentHash {
    /// What makes requests alike; `None`: nothing that the data plane knows.
    pub key: Option<HashKey>,
    /// Where endpoints are looked up.
    pub table: HashTable,
}

/// What is hashed of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HashKey {
    /// A header of this name.
    Header(String),
    /// A query parameter of this name.
    QueryParameter(String),
    /// A cookie.
    Cookie {
        /// Its name.
        name: String,
        /// Where it is sent.
        path: String,
        /// `Some`: it is made when it is missing; zero: for the session.
        ttl: Option<Duration>,
    },
}

/// A table of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HashTable {
    /// A ring of at least so many entries.
    Ring(Option<u64>),
    /// Maglev, of this prime size.
    Maglev(Option<u64>),
}

/// How new endpoints are warmed up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Warmup {
    /// How long.
    pub duration: Duration,
    /// 1 is linear; greater: faster at first.
    pub aggression: Option<f64>,
    /// Percent of its weight that an endpoint begins with.
    pub minimum_percent: Option<f64>,
}

/// Limits and timeouts of a cluster's connections.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConnectionPool {
    /// Connections.
    pub max_connections: Option<u32>,
    /// To connect.
    pub connect_timeout: Option<Duration>,
    /// TCP keepalive.
    pub tcp_keepalive: Option<TcpKeepalive>,
    /// Longest life of a connection.
    pub max_connection_duration: Option<Duration>,
    /// Requests that wait for a connection.
    pub max_pending_requests: Option<u32>,
    /// Requests in flight.
    pub max_requests: Option<u32>,
    /// Requests of one connection; 0 is no limit.
    pub max_requests_per_connection: Option<u32>,
    /// Retries in flight.
    pub max_retries: Option<u32>,
    /// A connection without requests is closed after this.
    pub idle_timeout: Option<Duration>,
    /// HTTP/2 streams of one connection.
    pub max_concurrent_streams: Option<u32>,
    /// HTTP/1.1 ports are spoken to with HTTP/2.
    pub upgrade_to_http2: bool,
}

/// TCP keepalive; `None` is the system's own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TcpKeepalive {
    /// Probes unanswered before the connection is dead.
    pub probes: Option<u32>,
    /// Idle time before the first.
    pub time: Option<Duration>,
    /// Between probes.
    pub interval: Option<Duration>,
}

/// When an endpoint is left out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutlierDetection {
    /// 5xx (and connection failures) in a row; 0: off.
    pub consecutive_5xx: Option<u32>,
    /// 502, 503, 504 in a row; 0: off.
    pub consecutive_gateway: Option<u32>,
    /// Failures of our own side in a row, counted apart when `split_local`.
    pub consecutive_local: Option<u32>,
    /// Local failures are not counted as 5xx.
    pub split_local: bool,
    /// Between two looks.
    pub interval: Option<Duration>,
    /// First time out.
    pub base_ejection_time: Option<Duration>,
    /// 0..=100.
    pub max_ejection_percent: Option<u32>,
    /// Below this percentage of healthy endpoints all are used.
    pub min_health_percent: Option<u32>,
}

/// Encryption towards the endpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tls {
    /// What kind.
    pub mode: TlsMode,
    /// Server name; `None`: the default of the mode.
    pub sni: Option<String>,
    /// Any of these must be in the server's certificate; empty: the default of the mode.
    pub subject_alt_names: Vec<String>,
    /// The server's certificate is not verified.
    pub insecure_skip_verify: bool,
}

/// Kinds of encryption.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// None.
    Disable,
    /// TLS; verified against this file, or the system's roots.
    Simple {
        /// Path on the client.
        ca: Option<String>,
    },
    /// TLS with a certificate of our own.
    Mutual {
        /// Path on the client.
        certificate: String,
        /// Path on the client.
        key: String,
        /// Path on the client.
        ca: Option<String>,
    },
    /// Mutual TLS with the identities of the mesh.
    Mesh,
}

/// Limit of concurrent retries as a share of the requests in flight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RetryBudget {
    /// 0..=100.
    pub percent: f64,
    /// Always allowed.
    pub min_concurrency: u32,
}

impl Policy {
    /// The subset of this name.
    pub fn subset(&self, name: &str) -> Option<&Subset> {
        self.subsets.iter().find(|s| s.name.value == name)
    }
}

impl Subset {
    /// Whether the endpoint belongs to it.
    pub fn selects(&self, workload: &Workload) -> bool {
        self.labels.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
    }
}
