//! Aggregates and DNS clusters.

use super::*;
use crate::resource::{Decoder, DnsDiscovery};
use envoy_types::pb::envoy::config::{
    cluster::v3::{
        Cluster as Proto,
        cluster::{ClusterDiscoveryType, DiscoveryType},
    },
    core::v3::{Address, SocketAddress, address::Address as Kind, socket_address::PortSpecifier},
    endpoint::v3::{
        ClusterLoadAssignment as ProtoAssignment, Endpoint as ProtoEndpoint, LbEndpoint, LocalityLbEndpoints,
        lb_endpoint::HostIdentifier,
    },
};
use prost::Message;
use std::{collections::BTreeMap, net::SocketAddr};

fn aggregate(name: &str, children: &[&str]) -> Resource {
    let discovery = Discovery::Aggregate(children.iter().map(|name| Arc::from(*name)).collect());
    Resource::Cluster(Arc::new(Cluster { discovery, ..Cluster::fixed(name, Arc::default()) }))
}

fn fixed(name: &str) -> Resource {
    Resource::Cluster(Arc::new(Cluster::fixed(name, assignment(name, 1))))
}

fn dns(name: &str, hosts: &[&str]) -> Resource {
    let endpoint = |host: &&str| {
        let port_specifier = Some(PortSpecifier::PortValue(80));
        let socket = SocketAddress { address: (*host).to_owned(), port_specifier, ..SocketAddress::default() };
        let address = Some(Address { address: Some(Kind::SocketAddress(socket)) });
        let host_identifier = Some(HostIdentifier::Endpoint(ProtoEndpoint { address, ..ProtoEndpoint::default() }));
        LbEndpoint { host_identifier, ..LbEndpoint::default() }
    };
    let lb_endpoints = hosts.iter().map(endpoint).collect();
    let proto = Proto {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::StrictDns.into())),
        load_assignment: Some(ProtoAssignment {
            endpoints: vec![LocalityLbEndpoints { lb_endpoints, ..LocalityLbEndpoints::default() }],
            ..ProtoAssignment::default()
        }),
        ..Proto::default()
    };
    let providers = BTreeMap::new();
    let cluster = Cluster::decode(&proto.encode_to_vec(), &mut Decoder::new(&providers)).unwrap();
    Resource::Cluster(Arc::new(cluster))
}

/// A target that sends to `name` alone.
fn to(name: &str) -> Play {
    let mut play = Play::new();
    play.good(listener("r"));
    play.good(routes("r", &[name]));
    play
}

fn leaves(snapshot: &Snapshot, name: &str) -> String {
    match &snapshot.clusters[name] {
        ClusterEntry::Aggregate { leaves, .. } => leaves.join(" "),
        ClusterEntry::Failed(error) => error.to_string(),
        ClusterEntry::Ready { .. } => panic!("{name} is no aggregate"),
    }
}

fn addresses(snapshot: &Snapshot, name: &str) -> Vec<SocketAddr> {
    let ClusterEntry::Ready { endpoints, .. } = &snapshot.clusters[name] else { panic!("{snapshot:?}") };
    endpoints.priorities.iter().flatten().flat_map(|l| &l.endpoints).map(|e| e.address).collect()
}

fn answer(last: u8) -> Result<Vec<IpAddr>, ResourceError> {
    Ok(vec![IpAddr::from([10, 0, 0, last])])
}

fn failure() -> Result<Vec<IpAddr>, ResourceError> {
    Err(ResourceError { kind: ResourceErrorKind::Unresolved, message: "DNS lookup failed".into() })
}

#[test]
fn an_aggregate_is_spread_out_into_its_leaves() {
    let mut play = to("agg");
    play.good(aggregate("agg", &["a", "inner", "missing", "b"]));
    assert_eq!(play.wanted(Cds), ["a", "agg", "b", "inner", "missing"]);
    play.good(aggregate("inner", &["c", "a"]));
    for name in ["a", "b"] {
        play.good(fixed(name));
    }
    assert!(matches!(play.state(), TargetState::Pending { .. }), "c is wanted too");
    play.good(fixed("c"));
    play.absent(Cds, "missing", Absence::Removed);
    assert_eq!(leaves(&play.ready(), "agg"), "a c b");
    // Nothing new: nothing published.
    play.good(fixed("missing"));
    assert_eq!(leaves(&play.ready(), "agg"), "a c missing b");
    play.bad(Cds, "missing");
    assert!(!play.published());
    for name in ["a", "b", "c", "missing"] {
        play.absent(Cds, name, Absence::Removed);
    }
    let failed = leaves(&play.ready(), "agg");
    assert!(failed.contains("none of its clusters can be used"), "{failed}");
    play.good(routes("r", &["agg"]));
    assert!(play.published());
    play.ready();
    play.bad(Cds, "a");
    let failed = leaves(&play.ready(), "agg");
    assert!(failed.contains("MAGLEV"), "{failed}");
}

#[test]
fn an_aggregate_must_not_contain_itself() {
    let mut play = to("agg");
    play.good(aggregate("agg", &["x", "leaf"]));
    play.good(aggregate("x", &["y"]));
    play.good(aggregate("y", &["agg"]));
    play.good(fixed("leaf"));
    let failed = leaves(&play.ready(), "agg");
    assert!(failed.contains("agg -> x -> y -> agg"), "{failed}");
    play.good(aggregate("y", &["leaf"]));
    assert_eq!(leaves(&play.ready(), "agg"), "leaf");
    play.good(aggregate("agg", &["agg"]));
    assert!(leaves(&play.ready(), "agg").contains("agg -> agg"));
}

#[test]
fn a_leaf_is_at_most_fifteen_below() {
    for (aggregates, deep) in [(15, false), (16, true)] {
        let mut play = to("0");
        for i in 0..aggregates {
            play.good(aggregate(&i.to_string(), &[&(i + 1).to_string()]));
        }
        play.good(fixed(&aggregates.to_string()));
        let found = leaves(&play.ready(), "0");
        if deep {
            assert!(found.contains("nested too deep") && found.contains("0 -> 1 -> 2"), "{found}");
        } else {
            assert_eq!(found, "15");
        }
    }
}

#[test]
fn the_names_of_a_dns_cluster_are_looked_up_while_it_is_used() {
    let mut play = to("d");
    let cluster: Arc<str> = "d".into();
    play.good(dns("d", &["one", "two", "10.9.9.9"]));
    let [job] = <[Job; 1]>::try_from(play.graph.take_jobs()).unwrap();
    assert_eq!((&*job.cluster, job.discovery.names.len()), ("d", 3));
    let told = |play: &mut Play, place, answer| play.graph.answered(&cluster, job.generation, place, answer);
    assert!(told(&mut play, 0, answer(1)));
    assert!(matches!(play.state(), TargetState::Pending { .. }), "two was not answered yet");
    assert!(told(&mut play, 1, failure()));
    let snapshot = play.ready();
    assert_eq!(addresses(&snapshot, "d"), ["10.0.0.1:80".parse().unwrap(), "10.9.9.9:80".parse().unwrap()]);
    assert!(snapshot.version.contains("dns="), "{}", snapshot.version);
    // The last good ones stay; what stays the same is not published.
    assert!(told(&mut play, 0, failure()) && told(&mut play, 0, answer(1)) && told(&mut play, 1, failure()));
    assert!(!play.published());
    assert!(told(&mut play, 1, answer(1)));
    assert_eq!(addresses(&play.ready(), "d").len(), 2, "an address counts once");
    // The same again is no new job, other names are; what was stays in force until they are answered.
    play.good(dns("d", &["one", "two", "10.9.9.9"]));
    assert!(play.graph.take_jobs().is_empty());
    play.ready();
    play.good(dns("d", &["three"]));
    let [next] = <[Job; 1]>::try_from(play.graph.take_jobs()).unwrap();
    assert!(!play.published() && job.stop.has_changed().is_err() && next.stop.has_changed().is_ok());
    assert!(!told(&mut play, 0, answer(7)), "its job is over");
    assert!(play.graph.answered(&cluster, next.generation, 0, answer(3)));
    assert_eq!(addresses(&play.ready(), "d"), ["10.0.0.3:80".parse().unwrap()]);
    play.graph.unwatch(&key());
    assert!(next.stop.has_changed().is_err(), "nobody uses it any more");
    assert!(!play.graph.answered(&cluster, next.generation, 0, answer(4)));
}

#[test]
fn addresses_need_no_lookup_and_a_failed_one_fails_the_cluster_alone() {
    let mut play = Play::new();
    play.good(listener("r"));
    play.good(routes("r", &["literal", "named"]));
    play.good(dns("literal", &["10.1.1.1", "::1"]));
    play.good(dns("named", &["x"]));
    let jobs = play.graph.take_jobs();
    let named = jobs.iter().find(|job| &*job.cluster == "named").unwrap();
    play.graph.answered(&named.cluster, named.generation, 0, failure());
    let snapshot = play.ready();
    assert_eq!(addresses(&snapshot, "literal").len(), 2);
    match &snapshot.clusters["named"] {
        ClusterEntry::Failed(error) => assert!(error.message.contains("DNS lookup failed"), "{error}"),
        other => panic!("{other:?}"),
    }
    play.graph.answered(&named.cluster, named.generation, 0, answer(1));
    let snapshot = play.ready();
    let ClusterEntry::Ready { cluster, endpoints } = &snapshot.clusters["named"] else { panic!() };
    let Discovery::Dns(discovery) = &cluster.discovery else { panic!() };
    assert!(!DnsDiscovery::clone(discovery).logical);
    assert_eq!(&*endpoints.priorities[0][0].endpoints[0].hostname, "x", "for auto_host_rewrite");
}
