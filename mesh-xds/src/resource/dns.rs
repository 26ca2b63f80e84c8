//! DNS clusters (LOGICAL_DNS, STRICT_DNS, `envoy.clusters.dns`): names, what surrounds them, and how often they are looked up.

use super::{ClusterLoadAssignment, Endpoint};
use crate::bootstrap::split_host_port;
use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

/// Where the endpoints of a DNS cluster come from.
#[derive(Clone, Debug, PartialEq)]
pub struct DnsDiscovery {
    /// LOGICAL_DNS: one name, all of whose addresses are one endpoint: the first that can be connected to is used (gRFC A37). Else every
    /// address is an endpoint (STRICT_DNS).
    pub logical: bool,
    /// At least one: the hosts of the endpoints of `load_assignment`, in order. An IP address stands for itself.
    pub names: Vec<Arc<str>>,
    /// `dns_lookup_family`
    pub family: LookupFamily,
    /// When they are looked up again.
    pub refresh: DnsRefresh,
    /// `load_assignment`, each name represented by [`placeholder`].
    pub(crate) template: ClusterLoadAssignment,
}

/// When the names of a DNS cluster are looked up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DnsRefresh {
    /// `dns_refresh_rate`: after an answer; default 5 s.
    pub every: Duration,
    /// `respect_dns_ttl`: by the TTL of the answer instead, where that is not zero.
    pub respect_ttl: bool,
    /// `dns_min_refresh_rate`: a TTL counts as at least this.
    pub min_ttl: Duration,
    /// `dns_jitter`: up to so much later; default 0.
    pub jitter: Duration,
    /// `dns_failure_refresh_rate`: first and longest pause after failures; default `every`.
    pub failure: (Duration, Duration),
}

/// `dns_lookup_family`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum LookupFamily {
    /// IPv6, and IPv4 where there is none.
    #[default]
    Auto,
    /// IPv4
    V4Only,
    /// IPv6
    V6Only,
    /// IPv4, and IPv6 where there is none.
    V4Preferred,
    /// Both.
    All,
}

/// The address that stands for the name at this place of [`DnsDiscovery::names`].
pub(crate) fn placeholder(place: usize) -> IpAddr {
    // Class E: 240.0.0.0 and so on. Only counted, never connected to.
    IpAddr::V4(Ipv4Addr::from_bits(0xf000_0000 | u32::try_from(place).unwrap_or(u32::MAX)))
}

fn place(address: &SocketAddr) -> usize {
    match address.ip() {
        IpAddr::V4(ip) => (ip.to_bits() & 0x0fff_ffff) as usize,
        IpAddr::V6(_) => usize::MAX,
    }
}

impl LookupFamily {
    /// All of them, in the order of their discriminants.
    pub const ALL: [Self; 5] = [Self::Auto, Self::V4Only, Self::V6Only, Self::V4Preferred, Self::All];
}

impl DnsDiscovery {
    /// Every address of each of these, `host:port`, is an endpoint, IPv4 and IPv6; looked up again as by default.
    ///
    /// # Errors
    /// There is none, or one is not `host:port`.
    pub fn strict<'n>(hosts: impl IntoIterator<Item = &'n str>) -> Result<Self, String> {
        let (mut names, mut endpoints) = (Vec::new(), Vec::new());
        for host in hosts {
            let wrong = || format!("\"{host}\" is not host:port");
            let (name, port) = split_host_port(host).ok_or_else(wrong)?;
            let port = port.and_then(|port| port.parse().ok()).ok_or_else(wrong)?;
            if name.is_empty() {
                return Err(wrong());
            }
            endpoints.push(Endpoint::new(SocketAddr::new(placeholder(names.len()), port)));
            names.push(name.into());
        }
        if names.is_empty() {
            return Err("there is no name".into());
        }
        let template = ClusterLoadAssignment::of("", endpoints);
        Ok(Self { logical: false, names, family: LookupFamily::All, refresh: DnsRefresh::default(), template })
    }

    /// The endpoints once the names are resolved: `addresses` has those of each name, in the order of [`names`](Self::names); none where
    /// one is not resolved. An endpoint without a `hostname` has the name for it (Envoy, gRFC A81). An address that several
    /// names have counts once.
    pub fn endpoints(&self, addresses: &[Vec<IpAddr>]) -> ClusterLoadAssignment {
        let mut assignment = self.template.clone();
        let mut seen = HashSet::new();
        for locality in assignment.priorities.iter_mut().flatten() {
            for named in std::mem::take(&mut locality.endpoints) {
                let (Some(name), Some(found)) =
                    (self.names.get(place(&named.address)), addresses.get(place(&named.address)))
                else {
                    continue;
                };
                let hostname = if named.hostname.is_empty() { name.clone() } else { named.hostname.clone() };
                let resolved = found.iter().map(|ip| SocketAddr::new(*ip, named.address.port()));
                locality.endpoints.extend(resolved.filter(|address| seen.insert(*address)).map(|address| Endpoint {
                    address,
                    hostname: hostname.clone(),
                    ..named.clone()
                }));
            }
        }
        assignment
    }
}

impl Default for DnsRefresh {
    fn default() -> Self {
        let every = Duration::from_secs(5);
        Self { every, respect_ttl: false, min_ttl: Duration::ZERO, jitter: Duration::ZERO, failure: (every, every) }
    }
}
