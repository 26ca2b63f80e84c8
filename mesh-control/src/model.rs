//! The configuration, whatever form it was written in: services, routes, and policies, each with its place.

use crate::problem::{At, Located};
use std::{
    collections::BTreeMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Everything of one configuration.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Who can be called.
    pub services: Vec<Service>,
    /// How requests are routed.
    pub routings: Vec<Routing>,
    /// How clusters behave.
    pub policies: Vec<Policy>,
}

/// Which document an object was read from.
#[derive(Clone, Debug)]
pub struct Object {
    /// `ServiceEntry`, ...
    pub kind: &'static str,
    /// `metadata.namespace`, `default` when not given.
    pub namespace: String,
    /// `metadata.name`.
    pub name: Located<String>,
}

/// A host with its ports and endpoints.
#[derive(Clone, Debug)]
pub struct Service {
    /// The document.
    pub object: Object,
    /// Fully qualified, lower-case.
    pub hosts: Vec<Located<String>>,
    /// At least one.
    pub ports: Vec<Port>,
    /// Who serves it.
    pub endpoints: Vec<Workload>,
    /// Names that its certificates must carry, when not the SPIFFE ids of the endpoints.
    pub subject_alt_names: Vec<String>,
}

/// A port of a service.
#[derive(Clone, Debug)]
pub struct Port {
    /// The port that clients name.
    pub number: Located<u16>,
    /// Key of [`Workload::ports`].
    pub name: String,
    /// What is spoken on it.
    pub protocol: Protocol,
    /// Port of the endpoints that do not say their own.
    pub target: Option<u16>,
}

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// HTTP/1.1.
    Http,
    /// HTTP/2, with prior knowledge.
    Http2,
    /// gRPC, over HTTP/2.
    Grpc,
    /// Anything else: not routed.
    Opaque,
}

/// An endpoint.
#[derive(Clone, Debug)]
pub struct Workload {
    /// Its address and the place of it.
    pub address: Located<IpAddr>,
    /// By port name.
    pub ports: BTreeMap<String, u16>,
    /// What subsets select on.
    pub labels: BTreeMap<String, String>,
    /// Region, zone, sub-zone.
    pub locality: Locality,
    /// Greater than zero.
    pub weight: u32,
    /// The identity it runs under.
    pub service_account: Option<String>,
}

/// `region/zone/subzone`; missing parts are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Locality {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Sub-zone.
    pub sub_zone: String,
}

/// The routes of one or more hosts.
#[derive(Clone, Debug)]
pub struct Routing {
    /// The document.
    pub object: Object,
    /// Fully qualified, lower-case; may start with `*`.
    pub hosts: Vec<Located<String>>,
    /// First match wins.
    pub routes: Vec<Route>,
}

/// One route.
#[derive(Clone, Debug)]
pub struct Route {
    /// Where it was read.
    pub at: At,
    /// For explain; may be empty.
    pub name: String,
    /// Any of these; empty matches all.
    pub matches: Vec<RouteMatch>,
    /// What is done.
    pub action: Action,
    /// The answer given instead, or the time added.
    pub fault: Option<Fault>,
    /// Header edits.
    pub headers: HeaderEdits,
}

/// All parts must match.
#[derive(Clone, Debug, Default)]
pub struct RouteMatch {
    /// For explain; may be empty.
    pub name: String,
    /// The path.
    pub uri: Option<StringMatch>,
    /// The path is compared without regard to case.
    pub ignore_uri_case: bool,
    /// Header name (or pseudo-header) to what it must be; `None`: it must be there.
    pub headers: BTreeMap<String, Option<StringMatch>>,
    /// The same, inverted.
    pub without_headers: BTreeMap<String, Option<StringMatch>>,
    /// Query parameter to what it must be; `None`: it must be there.
    pub query: BTreeMap<String, Option<StringMatch>>,
    /// Only for this port of the host.
    pub port: Option<u16>,
}

/// A comparison of a whole string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StringMatch {
    /// Equal.
    Exact(String),
    /// Starts with.
    Prefix(String),
    /// The whole matches (RE2).
    Regex(String),
}

/// What a route does.
#[derive(Clone, Debug)]
pub enum Action {
    /// Forward to one of the destinations.
    Forward(Box<Forward>),
    /// Answer with a redirect.
    Redirect(Redirect),
    /// Answer at once.
    Direct(Direct),
}

/// Forwarding.
#[derive(Clone, Debug, Default)]
pub struct Forward {
    /// At least one, drawn by weight.
    pub destinations: Vec<Destination>,
    /// Of the whole call; `None` or zero: no limit.
    pub timeout: Option<Duration>,
    /// `None`: the default policy.
    pub retries: Option<Retries>,
    /// Copies of requests, whose answers are thrown away.
    pub mirrors: Vec<Mirror>,
    /// Path and authority edits.
    pub rewrite: Option<Rewrite>,
}

/// Where to.
#[derive(Clone, Debug)]
pub struct Destination {
    /// Fully qualified host, and its place.
    pub host: Located<String>,
    /// A subset that a policy of the host defines.
    pub subset: Option<Located<String>>,
    /// `None`: the host's only port, or the port of the request.
    pub port: Option<Located<u16>>,
    /// Share of the sum of the weights.
    pub weight: u32,
    /// Header edits for this destination.
    pub headers: HeaderEdits,
}

/// Retries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retries {
    /// After the first attempt; 0: never.
    pub attempts: u32,
    /// Of each attempt.
    pub per_try_timeout: Option<Duration>,
    /// Envoy and gRPC conditions, and HTTP statuses, by comma; empty: the default.
    pub on: String,
    /// Base of the exponential backoff.
    pub backoff: Option<Duration>,
    /// Retries may go to other priorities than the first attempt.
    pub remote_localities: bool,
    /// A retry avoids the hosts tried before.
    pub ignore_previous_hosts: bool,
}

/// Fault injection.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fault {
    /// Time added, and the percentage of requests (0..=100).
    pub delay: Option<(Duration, f64)>,
    /// Answer given, and the percentage of requests (0..=100).
    pub abort: Option<(Abort, f64)>,
}

/// The answer of an injected fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abort {
    /// An HTTP status.
    Http(u16),
    /// A gRPC status code.
    Grpc(u32),
}

/// A copy of requests.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// Where to.
    pub destination: Destination,
    /// 0..=100.
    pub percentage: f64,
}

/// Path and authority edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Replaces the matched prefix or path.
    pub uri: Option<String>,
    /// Replaces the matches of the expression (RE2) by the substitution.
    pub uri_regex: Option<(String, String)>,
    /// Replaces the authority.
    pub authority: Option<String>,
}

/// A redirect.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Redirect {
    /// New path.
    pub uri: Option<String>,
    /// New authority.
    pub authority: Option<String>,
    /// New port.
    pub port: Option<u16>,
    /// New scheme.
    pub scheme: Option<String>,
    /// 301, 302, 303, 307 or 308.
    pub code: u16,
}

/// An answer given at once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Direct {
    /// HTTP status.
    pub status: u16,
    /// Body.
    pub body: Vec<u8>,
}

/// Header edits of requests and responses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderEdits {
    /// On the way out.
    pub request: HeaderOps,
    /// On the way back.
    pub response: HeaderOps,
}

/// Header edits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderOps {
    /// Replaced.
    pub set: BTreeMap<String, String>,
    /// Appended.
    pub add: BTreeMap<String, String>,
    /// Taken out.
    pub remove: Vec<String>,
}

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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadBalancer {
    /// In turn.
    RoundRobin,
    /// Fewest in flight of two draws.
    LeastRequest,
    /// At random.
    Random,
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

impl Object {
    /// Where it begins for the reader: at its name.
    pub fn at(&self) -> &At {
        &self.name.at
    }
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{}", self.kind, self.namespace, self.name.value)
    }
}

impl Workload {
    /// Where it serves a port of its service.
    pub fn socket_address(&self, port: &Port) -> SocketAddr {
        let number = self.ports.get(&port.name).copied().or(port.target).unwrap_or(port.number.value);
        SocketAddr::new(self.address.value, number)
    }
}

impl RouteMatch {
    /// Whether every request matches.
    pub fn takes_all(&self) -> bool {
        let any_path = self.uri.as_ref().is_none_or(|uri| *uri == StringMatch::Prefix("/".to_owned()));
        any_path
            && self.headers.is_empty()
            && self.without_headers.is_empty()
            && self.query.is_empty()
            && self.port.is_none()
    }
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

impl Model {
    /// The service of this host.
    pub fn service(&self, host: &str) -> Option<&Service> {
        self.services.iter().find(|s| s.hosts.iter().any(|h| h.value == host))
    }

    /// The routing of this host: an exact host wins over a wildcard, a longer wildcard over a shorter.
    pub fn routing(&self, host: &str) -> Option<&Routing> {
        let hosts = self.routings.iter().flat_map(|r| r.hosts.iter().map(move |h| (r, h.value.as_str())));
        most_specific(hosts, host)
    }

    /// The policy of this host, chosen in the same way.
    pub fn policy(&self, host: &str) -> Option<&Policy> {
        most_specific(self.policies.iter().map(|p| (p, p.host.value.as_str())), host)
    }
}

/// Whether `pattern` (a host, `*.suffix` or `*`) covers `host`.
pub(crate) fn covers(pattern: &str, host: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
        None => pattern == host,
    }
}

fn most_specific<'a, T>(patterns: impl Iterator<Item = (&'a T, &'a str)>, host: &str) -> Option<&'a T> {
    let matching = patterns.filter(|(_, pattern)| covers(pattern, host));
    // `reduce` keeps the first of equals.
    let rank = |pattern: &str| (!pattern.starts_with('*'), pattern.len());
    matching.reduce(|best, next| if rank(next.1) > rank(best.1) { next } else { best }).map(|(item, _)| item)
}
