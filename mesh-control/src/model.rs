//! The configuration, whatever form it was written in: services, routes, and policies, each with its place.

mod policy;
mod route;
mod security;
mod telemetry;

use crate::problem::{At, Located};
use std::{collections::BTreeMap, fmt};

pub use policy::{
    Algorithm, ConnectionPool, ConsistentHash, Distribute, Failover, HashKey, HashTable, LoadBalancer, LocalityLb,
    OutlierDetection, Policy, RetryBudget, Subset, TcpKeepalive, Tls, TlsMode, TrafficPolicy, Warmup,
};
pub use route::{
    Abort, Action, Destination, Direct, Fault, Forward, HeaderEdits, HeaderOps, Mirror, Redirect, Retries, Rewrite,
    Route, RouteMatch, Routing, StringMatch,
};
pub(crate) use security::Scoped;
pub use security::{
    Attribute, Authorization, AuthzAction, Clause, IpBlock, JwksUri, JwtKeys, JwtRule, MtlsMode, PeerAuthentication,
    RequestAuthentication, Rule, Security, Selector,
};
pub use telemetry::{Telemetry, Tracing};

/// Everything of one configuration.
#[derive(Clone, Debug, Default)]
pub struct Model {
    /// Who can be called.
    pub services: Vec<Service>,
    /// How requests are routed.
    pub routings: Vec<Routing>,
    /// How clusters behave.
    pub policies: Vec<Policy>,
    /// Who may call whom.
    pub security: Security,
    /// What clients trace.
    pub telemetries: Vec<Telemetry>,
    /// What holds where no policy says otherwise.
    pub mesh: MeshDefaults,
}

/// What Istio's `meshConfig` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MeshDefaults {
    /// `localityLbSetting`; by default enabled, with nothing said: failover to the next nearest.
    pub locality: LocalityLb,
    /// `rootNamespace`: policies in it are about every namespace. Default `istio-system`.
    pub root_namespace: String,
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
    /// What its endpoints are found by.
    pub resolution: Resolution,
    /// Who serves it. None of a service that is resolved by DNS: its hosts themselves are looked up.
    pub endpoints: Vec<Workload>,
    /// Names that its certificates must carry, when not the SPIFFE ids of the endpoints.
    pub subject_alt_names: Vec<String>,
}

/// What the endpoints of a service are found by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resolution {
    /// Their IP addresses.
    #[default]
    Static,
    /// DNS: every address of a name is an endpoint.
    Dns,
    /// DNS: all addresses of the only name are one endpoint.
    DnsRoundRobin,
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
    /// Its IP address, or a name where the service is resolved by DNS; and the place of it.
    pub address: Located<String>,
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

impl Default for MeshDefaults {
    fn default() -> Self {
        Self {
            locality: LocalityLb { enabled: true, ..LocalityLb::default() },
            root_namespace: "istio-system".to_owned(),
        }
    }
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
    pub fn port(&self, port: &Port) -> u16 {
        self.ports.get(&port.name).copied().or(port.target).unwrap_or(port.number.value)
    }

    /// Whether it says, by Istio's label, that it takes mutual TLS.
    pub(crate) fn says_mtls(&self) -> bool {
        self.labels.get("security.istio.io/tlsMode").is_some_and(|mode| mode == "istio")
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
