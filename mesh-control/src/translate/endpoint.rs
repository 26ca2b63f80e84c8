//! EDS: the endpoints of a cluster by locality.

use super::{Options, Target, tls, uint32};
use crate::model::{Locality, Resolution, Subset, Workload};
use envoy_types::pb::envoy::config::{
    core::v3::{
        Address, HealthStatus, SocketAddress,
        address::Address as Kind,
        socket_address::{PortSpecifier, Protocol},
    },
    endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
};

/// Endpoints by IP address are sent over EDS; names stand in the cluster.
pub(super) fn assignment(target: &Target<'_>, subset: Option<&Subset>, options: &Options) -> ClusterLoadAssignment {
    let by_endpoint = tls::auto(target, subset, options) == tls::Auto::Some;
    let metadata = |w: &Workload| (by_endpoint && target.speaks_mtls(w, options)).then(tls::endpoint_metadata);
    let locality = |(locality, workloads): (&Locality, Vec<&Workload>)| LocalityLbEndpoints {
        locality: Some(locality.into()),
        load_balancing_weight: Some(uint32(workloads.iter().fold(0, |sum, w| sum.saturating_add(w.weight)))),
        lb_endpoints: workloads
            .into_iter()
            .map(|w| LbEndpoint {
                metadata: metadata(w),
                ..endpoint(&w.address.value, w.port(target.port), Some(w.weight))
            })
            .collect(),
        ..LocalityLbEndpoints::default()
    };
    if target.service.resolution != Resolution::Static && target.service.endpoints.is_empty() {
        let port = target.port.target.unwrap_or(target.port.number.value);
        // Istio: the host itself.
        let endpoints = LocalityLbEndpoints {
            lb_endpoints: vec![endpoint(target.host, port, None)],
            ..LocalityLbEndpoints::default()
        };
        return ClusterLoadAssignment {
            cluster_name: target.cluster_name(subset),
            endpoints: vec![endpoints],
            ..ClusterLoadAssignment::default()
        };
    }
    ClusterLoadAssignment {
        cluster_name: target.cluster_name(subset),
        endpoints: target.by_locality(subset).into_iter().map(locality).collect(),
        ..ClusterLoadAssignment::default()
    }
}

fn endpoint(address: &str, port: u16, weight: Option<u32>) -> LbEndpoint {
    let socket = SocketAddress {
        protocol: Protocol::Tcp.into(),
        address: address.to_owned(),
        port_specifier: Some(PortSpecifier::PortValue(port.into())),
        ..SocketAddress::default()
    };
    let address = Address { address: Some(Kind::SocketAddress(socket)) };
    LbEndpoint {
        health_status: HealthStatus::Healthy.into(),
        load_balancing_weight: weight.map(uint32),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: Some(address), ..Endpoint::default() })),
        ..LbEndpoint::default()
    }
}
