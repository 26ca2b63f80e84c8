//! Aggregates (gRFC A37) and DNS clusters.

use super::*;
use crate::resource::{DnsDiscovery, DnsRefresh, LookupFamily};
use envoy_types::pb::envoy::{
    config::{
        cluster::v3::cluster::{DnsLookupFamily, RefreshRate},
        core::v3::{Address, SocketAddress, address::Address as Kind, socket_address::PortSpecifier},
        endpoint::v3::{Endpoint, LbEndpoint, lb_endpoint::HostIdentifier},
    },
    extensions::clusters::{aggregate::v3::ClusterConfig, dns::v3::DnsCluster},
};
use std::sync::Arc;

fn custom(typed_config: Any) -> Option<ClusterDiscoveryType> {
    let name = "x".to_owned();
    Some(ClusterDiscoveryType::ClusterType(CustomClusterType { name, typed_config: Some(typed_config) }))
}

fn aggregate(names: &[&str]) -> Option<ClusterDiscoveryType> {
    custom(any(&ClusterConfig { clusters: names.iter().map(|name| (*name).to_owned()).collect() }))
}

fn endpoint(host: &str) -> LbEndpoint {
    let port_specifier = Some(PortSpecifier::PortValue(80));
    let socket = SocketAddress { address: host.to_owned(), port_specifier, ..SocketAddress::default() };
    let address = Some(Address { address: Some(Kind::SocketAddress(socket)) });
    let host_identifier = Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() }));
    LbEndpoint { host_identifier, load_balancing_weight: uint(3), ..LbEndpoint::default() }
}

fn socket(proto: &mut Proto) -> &mut SocketAddress {
    let endpoint = &mut proto.load_assignment.as_mut().unwrap().endpoints[0].lb_endpoints[0];
    let Some(HostIdentifier::Endpoint(endpoint)) = &mut endpoint.host_identifier else { panic!() };
    let Some(Kind::SocketAddress(socket)) = &mut endpoint.address.as_mut().unwrap().address else { panic!() };
    socket
}

fn dns(kind: DiscoveryType) -> Proto {
    with(|c| {
        c.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind.into()));
        c.eds_cluster_config = None;
        let locality = LocalityLbEndpoints { lb_endpoints: vec![endpoint("one")], ..LocalityLbEndpoints::default() };
        c.load_assignment =
            Some(ClusterLoadAssignment { endpoints: vec![locality], ..ClusterLoadAssignment::default() });
    })
}

fn discovered(proto: &Proto) -> (Arc<DnsDiscovery>, Cluster) {
    let (cluster, _) = accepted(proto);
    let Discovery::Dns(dns) = &cluster.discovery else { panic!("{cluster:?}") };
    (dns.clone(), cluster)
}

#[test]
fn an_aggregate_names_clusters_and_has_no_policy_of_its_own() {
    let proto = with(|c| {
        c.eds_cluster_config = None;
        c.cluster_discovery_type = aggregate(&["a", "b"]);
        c.lb_policy = ProtoPolicy::ClusterProvided as i32;
    });
    let (cluster, notes) = accepted(&proto);
    assert_eq!(cluster.discovery, Discovery::Aggregate(["a".into(), "b".into()].into()));
    assert_eq!(notes, []);
    let said = with(|c| {
        c.cluster_discovery_type = aggregate(&["a"]);
        c.outlier_detection = outlier(|_| {});
    });
    assert_eq!(note_paths(&accepted(&said).1), ["outlier_detection"]);
    rejects(
        ResourceType::Cluster,
        &proto,
        &[
            ("cluster_type.typed_config.clusters", "must name clusters", |c| c.cluster_discovery_type = aggregate(&[])),
            ("cluster_type.typed_config.clusters", "must name clusters", |c| {
                c.cluster_discovery_type = aggregate(&["a", ""]);
            }),
            ("cluster_type", "(envoy.clusters.Other) is not supported", |c| {
                c.cluster_discovery_type = custom(unknown("envoy.clusters.Other"));
            }),
        ],
    );
}

#[test]
fn dns_clusters_have_envoys_defaults() {
    let (strict, cluster) = discovered(&dns(DiscoveryType::StrictDns));
    assert_eq!((strict.logical, &*strict.names), (false, &["one".into()][..]));
    assert_eq!((strict.family, strict.refresh), (LookupFamily::Auto, DnsRefresh::default()));
    assert_eq!((strict.refresh.every, cluster.lb_policy), (Duration::from_secs(5), LbPolicy::RoundRobin));
    let (logical, cluster) = discovered(&dns(DiscoveryType::LogicalDns));
    assert!(logical.logical);
    assert_eq!(cluster.lb_policy, LbPolicy::PickFirst { shuffle: false }, "its addresses are one endpoint");
    let ips = ["10.0.0.1", "::1"].map(|ip| ip.parse().unwrap());
    let endpoints = strict.endpoints(&[ips.to_vec()]);
    let found: Vec<_> =
        endpoints.priorities[0][0].endpoints.iter().map(|e| (e.address, e.weight, &*e.hostname)).collect();
    assert_eq!(found, [("10.0.0.1:80".parse().unwrap(), 3, "one"), ("[::1]:80".parse().unwrap(), 3, "one")]);
}

#[test]
fn the_lookups_of_a_dns_cluster_are_as_it_says() {
    let expected = DnsRefresh {
        every: Duration::from_secs(60),
        respect_ttl: true,
        min_ttl: Duration::ZERO,
        jitter: Duration::from_secs(1),
        failure: (Duration::from_secs(2), Duration::from_secs(20)),
    };
    let mut proto = dns(DiscoveryType::StrictDns);
    proto.dns_refresh_rate = seconds(60);
    proto.respect_dns_ttl = true;
    proto.dns_jitter = seconds(1);
    proto.dns_failure_refresh_rate = Some(RefreshRate { base_interval: seconds(2), max_interval: None });
    proto.dns_lookup_family = DnsLookupFamily::V4Preferred.into();
    let (legacy, _) = discovered(&proto);
    assert_eq!((legacy.family, legacy.refresh), (LookupFamily::V4Preferred, expected));
    let typed = DnsCluster {
        dns_refresh_rate: seconds(60),
        respect_dns_ttl: true,
        dns_jitter: seconds(1),
        dns_min_refresh_rate: seconds(4),
        dns_lookup_family: 5,
        all_addresses_in_single_endpoint: true,
        ..DnsCluster::default()
    };
    proto.cluster_discovery_type = custom(any(&typed));
    let (typed, _) = discovered(&proto);
    let expected =
        DnsRefresh { min_ttl: Duration::from_secs(4), failure: (expected.every, expected.every), ..expected };
    assert_eq!((typed.logical, typed.family, typed.refresh), (true, LookupFamily::All, expected));
}

#[test]
fn bad_dns_clusters_are_rejected() {
    const ENDPOINT: &str = "load_assignment.endpoints[0].lb_endpoints[0].endpoint.address";
    rejects(
        ResourceType::Cluster,
        &dns(DiscoveryType::LogicalDns),
        &[
            ("load_assignment", "missing", |c| c.load_assignment = None),
            ("load_assignment.endpoints", "exactly one locality, not 2", |c| {
                let endpoints = &mut c.load_assignment.as_mut().unwrap().endpoints;
                endpoints.push(endpoints[0].clone());
            }),
            ("load_assignment.endpoints[0].lb_endpoints", "exactly one endpoint, not 0", |c| {
                c.load_assignment.as_mut().unwrap().endpoints[0].lb_endpoints.clear();
            }),
            (ENDPOINT, "resolver_name", |c| socket(c).resolver_name = "x".into()),
            (ENDPOINT, "not a host name", |c| socket(c).address.clear()),
            (ENDPOINT, "not a host name", |c| socket(c).address = "a/b".into()),
            (ENDPOINT, "no port_value", |c| socket(c).port_specifier = None),
            ("dns_refresh_rate", "below", |c| c.dns_refresh_rate = seconds(0)),
            ("dns_lookup_family", "unknown", |c| c.dns_lookup_family = 9),
            ("dns_failure_refresh_rate.base_interval", "missing", |c| {
                c.dns_failure_refresh_rate = Some(RefreshRate::default());
            }),
            ("dns_failure_refresh_rate.max_interval", "less than base_interval", |c| {
                c.dns_failure_refresh_rate = Some(RefreshRate { base_interval: seconds(5), max_interval: seconds(1) });
            }),
        ],
    );
    let mut many = dns(DiscoveryType::StrictDns);
    let locality = &mut many.load_assignment.as_mut().unwrap().endpoints[0];
    locality.lb_endpoints.push(endpoint("one"));
    assert_eq!(discovered(&many).0.names.len(), 2);
    rejects(
        ResourceType::Cluster,
        &many,
        &[("load_assignment.endpoints", "must not be empty", |c| {
            c.load_assignment.as_mut().unwrap().endpoints.clear();
        })],
    );
    let mut noted = dns(DiscoveryType::StrictDns);
    noted.use_tcp_for_dns_lookups = true;
    assert_eq!(note_paths(&accepted(&noted).1), ["use_tcp_for_dns_lookups"]);
}
