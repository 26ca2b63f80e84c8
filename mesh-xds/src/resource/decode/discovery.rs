//! Where the endpoints of a cluster come from (gRFC A27, A37; Envoy's DNS clusters).

use super::{Decoder, Valid, type_name};
use crate::resource::{ClusterLoadAssignment, Discovery, DnsDiscovery, DnsRefresh, LookupFamily, dns::placeholder};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster as Proto,
                cluster::{ClusterDiscoveryType, CustomClusterType, DiscoveryType},
            },
            core::v3::{SocketAddress, address::Address, socket_address::PortSpecifier},
            endpoint::v3::{ClusterLoadAssignment as ProtoAssignment, LbEndpoint, lb_endpoint::HostIdentifier},
        },
        extensions::clusters::{aggregate::v3::ClusterConfig, dns::v3::DnsCluster},
    },
    google::protobuf::Duration as ProtoDuration,
};
use prost::Message as _;
use std::{sync::Arc, time::Duration};

const AGGREGATE: &str = "envoy.extensions.clusters.aggregate.v3.ClusterConfig";
const DNS: &str = "envoy.extensions.clusters.dns.v3.DnsCluster";
/// Envoy's `gt` of `dns_refresh_rate` and `gte` of the intervals after failures.
const MIN_RATE: Duration = Duration::from_millis(1);

/// What a DNS cluster says of its lookups, in its own fields or in a [`DnsCluster`].
struct Lookups {
    logical: bool,
    every: Option<ProtoDuration>,
    failure: Option<(Option<ProtoDuration>, Option<ProtoDuration>)>,
    respect_ttl: bool,
    min_ttl: Option<ProtoDuration>,
    jitter: Option<ProtoDuration>,
    family: LookupFamily,
}

impl Decoder<'_> {
    pub(super) fn discovery(&mut self, name: &str, proto: &mut Proto) -> Valid<Discovery> {
        let kind = match proto.cluster_discovery_type.take() {
            Some(ClusterDiscoveryType::Type(kind)) => DiscoveryType::try_from(kind),
            Some(ClusterDiscoveryType::ClusterType(custom)) => return self.custom_discovery(name, custom, proto),
            // The proto's default is STATIC.
            None => Ok(DiscoveryType::Static),
        };
        match kind {
            Ok(DiscoveryType::Eds) => self.at("eds_cluster_config", |cx| {
                let Some(config) = proto.eds_cluster_config.take() else { return Err(cx.invalid("is missing")) };
                cx.ads("eds_config", config.eds_config.as_ref())?;
                if config.service_name.is_empty() && name.starts_with("xdstp:") {
                    return Err(cx.invalid_at("service_name", "is needed when the cluster's name is an xdstp: name"));
                }
                let service_name =
                    if config.service_name.is_empty() { name.into() } else { config.service_name.into() };
                Ok(Discovery::Eds { service_name })
            }),
            Ok(DiscoveryType::Static) => {
                let Some(assignment) = proto.load_assignment.take() else {
                    return Err(self.invalid_at("load_assignment", "is missing: a STATIC cluster needs its endpoints"));
                };
                let endpoints = self.embedded(name, &assignment)?;
                Ok(Discovery::Static(Arc::new(endpoints)))
            }
            Ok(kind @ (DiscoveryType::LogicalDns | DiscoveryType::StrictDns)) => {
                self.ignored(&[
                    ("dns_resolvers", !proto.dns_resolvers.is_empty()),
                    ("use_tcp_for_dns_lookups", proto.use_tcp_for_dns_lookups),
                    ("dns_resolution_config", proto.dns_resolution_config.is_some()),
                    ("typed_dns_resolver_config", proto.typed_dns_resolver_config.is_some()),
                ]);
                let rate = proto.dns_failure_refresh_rate.take();
                let lookups = Lookups {
                    logical: kind == DiscoveryType::LogicalDns,
                    every: proto.dns_refresh_rate.take(),
                    failure: rate.map(|rate| (rate.base_interval, rate.max_interval)),
                    respect_ttl: proto.respect_dns_ttl,
                    min_ttl: None,
                    jitter: proto.dns_jitter.take(),
                    family: self.lookup_family(proto.dns_lookup_family)?,
                };
                self.dns(name, lookups, proto)
            }
            Ok(other) => Err(self.invalid_at(
                "type",
                format!("{} is not supported: EDS, STATIC, STRICT_DNS and LOGICAL_DNS are", other.as_str_name()),
            )),
            Err(_) => Err(self.invalid_at("type", "unknown discovery type")),
        }
    }

    fn custom_discovery(&mut self, name: &str, custom: CustomClusterType, proto: &mut Proto) -> Valid<Discovery> {
        let any = custom.typed_config.unwrap_or_default();
        match type_name(&any.type_url) {
            AGGREGATE => self.at("cluster_type", |cx| {
                let config: ClusterConfig = cx.at("typed_config", |cx| cx.any(&any))?;
                if config.clusters.is_empty() || config.clusters.iter().any(String::is_empty) {
                    return Err(cx.invalid_at("typed_config.clusters", "must name clusters, none of them empty"));
                }
                Ok(Discovery::Aggregate(config.clusters.into_iter().map(Into::into).collect()))
            }),
            DNS => {
                let lookups = self.at("cluster_type", |cx| {
                    cx.at("typed_config", |cx| {
                        let config: DnsCluster = cx.any(&any)?;
                        cx.ignored(&[("typed_dns_resolver_config", config.typed_dns_resolver_config.is_some())]);
                        Ok(Lookups {
                            logical: config.all_addresses_in_single_endpoint,
                            every: config.dns_refresh_rate,
                            failure: config
                                .dns_failure_refresh_rate
                                .map(|rate| (rate.base_interval, rate.max_interval)),
                            respect_ttl: config.respect_dns_ttl,
                            min_ttl: config.dns_min_refresh_rate,
                            jitter: config.dns_jitter,
                            // Counts from UNSPECIFIED, which is AUTO.
                            family: cx.lookup_family(config.dns_lookup_family.saturating_sub(1).max(0))?,
                        })
                    })
                })?;
                self.dns(name, lookups, proto)
            }
            kind => Err(self.invalid_at("cluster_type", format!("\"{}\" ({kind}) is not supported", custom.name))),
        }
    }

    /// The assignment in a cluster. The endpoint decoder works on bytes, where the time goes for EDS.
    fn embedded(&mut self, name: &str, assignment: &ProtoAssignment) -> Valid<ClusterLoadAssignment> {
        let bytes = assignment.encode_to_vec();
        let mut endpoints = self.at("load_assignment", |cx| cx.assignment(&bytes, true))?;
        if endpoints.name.is_empty() {
            endpoints.name = name.into();
        }
        Ok(endpoints)
    }

    fn dns(&mut self, name: &str, lookups: Lookups, proto: &mut Proto) -> Valid<Discovery> {
        let refresh = self.dns_refresh(&lookups)?;
        let Some(mut assignment) = proto.load_assignment.take() else {
            return Err(self.invalid_at("load_assignment", "is missing: a DNS cluster needs its names"));
        };
        let names = self.at("load_assignment", |cx| cx.dns_names(&mut assignment, lookups.logical))?;
        let template = self.embedded(name, &assignment)?;
        let Lookups { logical, family, .. } = lookups;
        Ok(Discovery::Dns(Arc::new(DnsDiscovery { logical, names, family, refresh, template })))
    }

    fn dns_refresh(&mut self, lookups: &Lookups) -> Valid<DnsRefresh> {
        let default = DnsRefresh::default();
        let every = self.rate("dns_refresh_rate", lookups.every)?.unwrap_or(default.every);
        let failure = match lookups.failure {
            None => (every, every),
            Some((base, max)) => self.at("dns_failure_refresh_rate", |cx| {
                let Some(base) = cx.rate("base_interval", base)? else {
                    return Err(cx.invalid_at("base_interval", "is missing"));
                };
                let max = cx.rate("max_interval", max)?.unwrap_or(base.saturating_mul(10));
                if max < base {
                    return Err(cx.invalid_at("max_interval", format!("{max:?} is less than base_interval, {base:?}")));
                }
                Ok((base, max))
            })?,
        };
        Ok(DnsRefresh {
            every,
            respect_ttl: lookups.respect_ttl,
            min_ttl: self.duration("dns_min_refresh_rate", lookups.min_ttl)?.unwrap_or_default(),
            jitter: self.duration("dns_jitter", lookups.jitter)?.unwrap_or_default(),
            failure,
        })
    }

    fn rate(&mut self, field: &'static str, value: Option<ProtoDuration>) -> Valid<Option<Duration>> {
        match self.duration(field, value)? {
            Some(rate) if rate < MIN_RATE => Err(self.invalid_at(field, format!("{rate:?} is below {MIN_RATE:?}"))),
            rate => Ok(rate),
        }
    }

    fn lookup_family(&mut self, family: i32) -> Valid<LookupFamily> {
        let known = usize::try_from(family).ok().and_then(|family| LookupFamily::ALL.get(family));
        known.copied().ok_or_else(|| self.invalid_at("dns_lookup_family", format!("{family} is unknown")))
    }

    /// Takes the names out of an assignment. gRFC A37 and Envoy: LOGICAL_DNS has exactly one.
    fn dns_names(&mut self, assignment: &mut ProtoAssignment, logical: bool) -> Valid<Vec<Arc<str>>> {
        if logical && assignment.endpoints.len() != 1 {
            let found = assignment.endpoints.len();
            return Err(self.invalid_at("endpoints", format!("LOGICAL_DNS needs exactly one locality, not {found}")));
        }
        let mut names = Vec::new();
        for (index, locality) in assignment.endpoints.iter_mut().enumerate() {
            self.at_index("endpoints", index, |cx| {
                if logical && locality.lb_endpoints.len() != 1 {
                    let found = locality.lb_endpoints.len();
                    let reason = format!("LOGICAL_DNS needs exactly one endpoint, not {found}");
                    return Err(cx.invalid_at("lb_endpoints", reason));
                }
                for (index, endpoint) in locality.lb_endpoints.iter_mut().enumerate() {
                    let name = cx.at_index("lb_endpoints", index, |cx| cx.dns_name(endpoint, names.len()))?;
                    names.push(name);
                }
                Ok(())
            })?;
        }
        if names.is_empty() {
            return Err(self.invalid_at("endpoints", "must not be empty"));
        }
        Ok(names)
    }

    fn dns_name(&mut self, endpoint: &mut LbEndpoint, place: usize) -> Valid<Arc<str>> {
        let address = match &mut endpoint.host_identifier {
            Some(HostIdentifier::Endpoint(endpoint)) => endpoint.address.as_mut().and_then(|a| a.address.as_mut()),
            _ => None,
        };
        let Some(Address::SocketAddress(SocketAddress { address, port_specifier, resolver_name, .. })) = address else {
            return Err(self.invalid_at("endpoint.address", "has no socket_address"));
        };
        if !resolver_name.is_empty() {
            return Err(self.invalid_at("endpoint.address", "resolver_name is not supported"));
        }
        if address.is_empty() || address.contains(['/', ' ', '@', '?', '#']) {
            return Err(self.invalid_at("endpoint.address", format!("\"{address}\" is not a host name")));
        }
        if !matches!(port_specifier, Some(PortSpecifier::PortValue(_))) {
            return Err(self.invalid_at("endpoint.address", "has no port_value"));
        }
        Ok(std::mem::replace(address, placeholder(place).to_string()).into())
    }
}
