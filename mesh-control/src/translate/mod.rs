//! [`Model`] to xDS resources, pure: the same model always yields the same bytes.
//!
//! The shapes and names are those of Istio's generator for gRPC clients: listener `HOST:PORT` (an `api_listener` whose
//! routes come over ADS), route configuration `outbound|PORT||HOST`, cluster `outbound|PORT|SUBSET|HOST` (endpoints over
//! ADS under the same name), and for servers `xds.istio.io/grpc/lds/inbound/IP:PORT`. Beyond it, everything of a DestinationRule is
//! said: outlier detection, timeouts, all limits; and endpoints that speak mutual TLS are spoken to with it where no rule says how.

mod cluster;
mod endpoint;
mod inbound;
mod listener;
mod locality;
mod route;
mod telemetry;
mod tls;

pub(crate) use inbound::{PREFIX as SERVER_LISTENER_PREFIX, listener_of};
pub(crate) use tls::PROVIDER;

use crate::{
    model::{
        Locality, MeshDefaults, Model, MtlsMode, Policy, Port, Protocol, Resolution, Routing, Security, Service,
        Subset, Workload,
    },
    problem::At,
};
use envoy_types::{
    pb::{
        envoy::config::core::v3::{
            AggregatedConfigSource, ApiVersion, ConfigSource, config_source::ConfigSourceSpecifier,
        },
        google::protobuf::{self, Any},
    },
    util::pack_any,
};
use mesh_xds::server::{ResourceSet, ResourceType, Tailor};
use std::{collections::BTreeMap, time::Duration};

/// What a translation depends on besides the model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Of the SPIFFE ids that servers are expected to have.
    pub trust_domain: String,
    /// Which connections servers take where no PeerAuthentication says it; PERMISSIVE by default.
    pub mtls: MtlsMode,
}

/// One port of one host.
pub(crate) struct Target<'a> {
    pub(crate) host: &'a str,
    pub(crate) port: &'a Port,
    pub(crate) service: &'a Service,
    pub(crate) routing: Option<&'a Routing>,
    pub(crate) policy: Option<&'a Policy>,
    pub(crate) mesh: &'a MeshDefaults,
    pub(crate) security: &'a Security,
}

impl Default for Options {
    fn default() -> Self {
        Self { trust_domain: "cluster.local".to_owned(), mtls: MtlsMode::Permissive }
    }
}

/// Every resource of the model.
pub fn translate(model: &Model, options: &Options) -> ResourceSet {
    let mut set = ResourceSet::new();
    for target in targets(model) {
        for name in listener::names(target.host, target.port.number.value) {
            let (any, tailor) = listener::listener(&target, name.clone(), &model.telemetries);
            insert(&mut set, ResourceType::Listener, &name, any, tailor);
        }
        set.insert(ResourceType::RouteConfiguration, target.cluster_name(None), target.routes(model).0);
        for subset in std::iter::once(None).chain(target.subsets().iter().map(Some)) {
            let name = target.cluster_name(subset);
            let cluster = cluster::cluster(&target, subset, options);
            let tailor = locality::cluster(&target, subset, &cluster);
            insert(&mut set, ResourceType::Cluster, &name, pack_any(cluster), tailor);
            if target.has_eds() {
                let assignment = endpoint::assignment(&target, subset, options);
                let tailor = locality::endpoints(&target, subset, &assignment);
                insert(&mut set, ResourceType::ClusterLoadAssignment, &name, pack_any(assignment), tailor);
            }
        }
    }
    inbound::listeners(model, options, &mut set);
    set
}

fn insert(set: &mut ResourceSet, resource_type: ResourceType, name: &str, any: Any, tailor: Option<Tailor>) {
    match tailor {
        None => set.insert(resource_type, name, any),
        Some(tailor) => set.insert_tailored(resource_type, name, any, tailor),
    };
}

/// What listeners, routes and clusters are made for: every port of every host that speaks HTTP.
pub(crate) fn targets(model: &Model) -> impl Iterator<Item = Target<'_>> {
    let hosts = model.services.iter().flat_map(|service| service.hosts.iter().map(move |host| (service, &host.value)));
    hosts.flat_map(move |(service, host)| {
        let routed = service.ports.iter().filter(|port| port.protocol != Protocol::Opaque);
        routed.map(move |port| {
            let (routing, policy) = (model.routing(host), model.policy(host));
            Target { host, port, service, routing, policy, mesh: &model.mesh, security: &model.security }
        })
    })
}

impl<'a> Target<'a> {
    /// The route configuration, and where each of its routes was read.
    pub(crate) fn routes(&self, model: &Model) -> (Any, Vec<&'a At>) {
        let (configuration, places) = route::configuration(self, model);
        (pack_any(configuration), places)
    }

    pub(crate) fn cluster(&self, subset: Option<&Subset>, options: &Options) -> Any {
        pack_any(cluster::cluster(self, subset, options))
    }

    /// Whether its endpoints are a resource of their own.
    pub(crate) fn has_eds(&self) -> bool {
        self.service.resolution == Resolution::Static
    }

    pub(crate) fn endpoints(&self, subset: Option<&Subset>, options: &Options) -> Any {
        pack_any(endpoint::assignment(self, subset, options))
    }

    /// The endpoints of a subset, in the order of their localities.
    fn by_locality(&self, subset: Option<&Subset>) -> BTreeMap<&'a Locality, Vec<&'a Workload>> {
        let mut localities: BTreeMap<&Locality, Vec<&Workload>> = BTreeMap::new();
        for workload in self.service.endpoints.iter().filter(|w| subset.is_none_or(|s| s.selects(w))) {
            localities.entry(&workload.locality).or_default().push(workload);
        }
        localities
    }

    pub(crate) fn subsets(&self) -> &'a [Subset] {
        self.policy.map_or(&[], |policy| &policy.subsets)
    }

    fn cluster_name(&self, subset: Option<&Subset>) -> String {
        cluster_name(self.port.number.value, subset.map_or("", |s| &s.name.value), self.host)
    }
}

/// `outbound|PORT|SUBSET|HOST`; without a subset also the name of the route configuration.
fn cluster_name(port: u16, subset: &str, host: &str) -> String {
    format!("outbound|{port}|{subset}|{host}")
}

/// Over the stream that this resource came on.
fn ads() -> ConfigSource {
    ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource {})),
        resource_api_version: ApiVersion::V3.into(),
        ..ConfigSource::default()
    }
}

fn duration(duration: Duration) -> protobuf::Duration {
    protobuf::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

fn uint32(value: u32) -> protobuf::UInt32Value {
    protobuf::UInt32Value { value }
}

impl From<&Locality> for envoy_types::pb::envoy::config::core::v3::Locality {
    fn from(locality: &Locality) -> Self {
        Self { region: locality.region.clone(), zone: locality.zone.clone(), sub_zone: locality.sub_zone.clone() }
    }
}

#[cfg(test)]
mod tests;
