//! EDS: the endpoints of a cluster by locality.

use super::{Target, uint32};
use crate::model::{Locality, Subset, Workload};
use envoy_types::pb::envoy::config::{
    core::v3::{
        Address, HealthStatus, SocketAddress,
        address::Address as Kind,
        socket_address::{PortSpecifier, Protocol},
    },
    endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
};
use std::{collections::BTreeMap, net::SocketAddr};

pub(super) fn assignment(target: &Target<'_>, subset: Option<&Subset>) -> ClusterLoadAssignment {
    let mut localities: BTreeMap<&Locality, Vec<&Workload>> = BTreeMap::new();
    for workload in target.service.endpoints.iter().filter(|w| subset.is_none_or(|s| s.selects(w))) {
        localities.entry(&workload.locality).or_default().push(workload);
    }
    let locality = |(locality, workloads): (&Locality, Vec<&Workload>)| LocalityLbEndpoints {
        locality: Some(locality.into()),
        load_balancing_weight: Some(uint32(workloads.iter().fold(0, |sum, w| sum.saturating_add(w.weight)))),
        lb_endpoints: workloads.into_iter().map(|w| endpoint(w.socket_address(target.port), w.weight)).collect(),
        ..LocalityLbEndpoints::default()
    };
    ClusterLoadAssignment {
        cluster_name: target.cluster_name(subset),
        endpoints: localities.into_iter().map(locality).collect(),
        ..ClusterLoadAssignment::default()
    }
}

fn endpoint(address: SocketAddr, weight: u32) -> LbEndpoint {
    let socket = SocketAddress {
        protocol: Protocol::Tcp.into(),
        address: address.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
        ..SocketAddress::default()
    };
    let address = Address { address: Some(Kind::SocketAddress(socket)) };
    LbEndpoint {
        health_status: HealthStatus::Healthy.into(),
        load_balancing_weight: Some(uint32(weight)),
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: Some(address), ..Endpoint::default() })),
        ..LbEndpoint::default()
    }
}
