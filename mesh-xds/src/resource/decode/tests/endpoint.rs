//! EDS (gRFC A27), and that the hand-written reader agrees with the generated one.

use super::*;
use crate::resource::{ClusterLoadAssignment, FractionalPercent, HealthStatus, MetadataValue};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{
                Address, EnvoyInternalAddress, Locality, Metadata, Pipe, SocketAddress, address,
                socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment as Proto, Endpoint, LbEndpoint, LedsClusterLocalityConfig, LocalityLbEndpoints,
                cluster_load_assignment::{Policy, policy::DropOverload},
                lb_endpoint::HostIdentifier,
                locality_lb_endpoints::LbConfig,
            },
        },
        r#type::v3::FractionalPercent as ProtoFraction,
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use proptest::{prelude::any as arbitrary, prelude::prop, prop_assert_eq, proptest};
use std::sync::Arc;

pub(super) fn endpoint(address: &str, port: u32) -> LbEndpoint {
    let socket = SocketAddress {
        address: address.into(),
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..SocketAddress::default()
    };
    let address = Some(Address { address: Some(address::Address::SocketAddress(socket)) });
    LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() })),
        ..LbEndpoint::default()
    }
}

fn locality(zone: &str, priority: u32, endpoints: Vec<LbEndpoint>) -> LocalityLbEndpoints {
    LocalityLbEndpoints {
        locality: Some(Locality { zone: zone.into(), ..Locality::default() }),
        lb_endpoints: endpoints,
        load_balancing_weight: uint(1),
        priority,
        ..LocalityLbEndpoints::default()
    }
}

fn good() -> Proto {
    Proto {
        cluster_name: "c".into(),
        endpoints: vec![
            locality("a", 0, vec![endpoint("10.0.0.1", 80), endpoint("10.0.0.2", 80)]),
            locality("b", 0, vec![endpoint("::1", 80)]),
        ],
        ..Proto::default()
    }
}

fn accepted(proto: &Proto) -> ClusterLoadAssignment {
    match decode(ResourceType::ClusterLoadAssignment, proto).unwrap() {
        (Resource::ClusterLoadAssignment(endpoints), _) => ClusterLoadAssignment::clone(&endpoints),
        (other, _) => panic!("{other:?}"),
    }
}

fn host(proto: &mut Proto) -> &mut Endpoint {
    match proto.endpoints[0].lb_endpoints[0].host_identifier.as_mut().unwrap() {
        HostIdentifier::Endpoint(endpoint) => endpoint,
        other => panic!("{other:?}"),
    }
}

fn socket(proto: &mut Proto) -> &mut SocketAddress {
    match host(proto).address.as_mut().unwrap().address.as_mut().unwrap() {
        address::Address::SocketAddress(socket) => socket,
        other => panic!("{other:?}"),
    }
}

const ADDRESS: &str = "endpoints[0].lb_endpoints[0].endpoint.address";

#[test]
fn bad_assignments_are_rejected() {
    rejects(
        ResourceType::ClusterLoadAssignment,
        &good(),
        &[
            ("cluster_name", "empty", |e| e.cluster_name.clear()),
            ("endpoints", "there is priority 2, but no 1", |e| e.endpoints[1].priority = 2),
            ("endpoints", "there is priority 1, but no 0", |e| {
                e.endpoints.remove(0);
                e.endpoints[0].priority = 1;
            }),
            ("endpoints[1].locality", "twice in priority 0", |e| {
                e.endpoints[1].locality = e.endpoints[0].locality.clone();
            }),
            ("endpoints[1].lb_endpoints[0].endpoint.address", "10.0.0.1:80 is used twice", |e| {
                e.endpoints[1].lb_endpoints[0] = endpoint("10.0.0.1", 80);
            }),
            ("endpoints", "add up to 4294967296", |e| e.endpoints[0].load_balancing_weight = uint(u32::MAX)),
            ("endpoints[0].lb_endpoints[0].load_balancing_weight", "greater than zero", |e| {
                e.endpoints[0].lb_endpoints[0].load_balancing_weight = uint(0);
            }),
            ("endpoints[0].lb_endpoints", "add up to 4294967296", |e| {
                e.endpoints[0].lb_endpoints[0].load_balancing_weight = uint(u32::MAX);
            }),
            ("endpoints[0].lb_endpoints[0].endpoint", "missing", |e| {
                e.endpoints[0].lb_endpoints[0].host_identifier = None;
            }),
            ("endpoints[0].lb_endpoints[0].endpoint_name", "not supported", |e| {
                e.endpoints[0].lb_endpoints[0].host_identifier = Some(HostIdentifier::EndpointName("x".into()));
            }),
            ("endpoints[0].lb_config", "not supported", |e| {
                let leds = LedsClusterLocalityConfig::default();
                e.endpoints[0].lb_config = Some(LbConfig::LedsClusterLocalityConfig(leds));
            }),
            (ADDRESS, "missing", |e| host(e).address = None),
            (ADDRESS, "no socket_address", |e| host(e).address = Some(Address::default())),
            (ADDRESS, "pipe", |e| {
                host(e).address = Some(Address { address: Some(address::Address::Pipe(Pipe::default())) });
            }),
            (ADDRESS, "envoy_internal_address", |e| {
                let internal = address::Address::EnvoyInternalAddress(EnvoyInternalAddress::default());
                host(e).address = Some(Address { address: Some(internal) });
            }),
            (ADDRESS, "\"example.com\" is not an IP address", |e| socket(e).address = "example.com".into()),
            (ADDRESS, "protocol must be TCP", |e| socket(e).protocol = 1),
            (ADDRESS, "named_port", |e| {
                socket(e).port_specifier = Some(PortSpecifier::NamedPort("http".into()));
            }),
            (ADDRESS, "no port_value", |e| socket(e).port_specifier = None),
            (ADDRESS, "port 65536", |e| socket(e).port_specifier = Some(PortSpecifier::PortValue(65536))),
            ("policy.drop_overloads[0].category", "empty", |e| {
                e.policy = Some(Policy { drop_overloads: vec![DropOverload::default()], ..Policy::default() });
            }),
            ("policy.drop_overloads[0].drop_percentage", "denominator", |e| {
                let drop = DropOverload {
                    category: "x".into(),
                    drop_percentage: Some(ProtoFraction { numerator: 1, denominator: 5 }),
                };
                e.policy = Some(Policy { drop_overloads: vec![drop], ..Policy::default() });
            }),
        ],
    );
}

#[test]
fn localities_without_weight_are_skipped() {
    for weight in [None, uint(0)] {
        let mut proto = good();
        proto.endpoints[0].load_balancing_weight = weight;
        let assignment = accepted(&proto);
        assert_eq!(assignment.priorities.len(), 1);
        assert_eq!(assignment.priorities[0].len(), 1);
        assert_eq!(assignment.priorities[0][0].id.zone, "b");
    }
}

#[test]
fn the_same_locality_may_be_in_two_priorities() {
    let mut proto = good();
    proto.endpoints[1] = locality("a", 1, vec![endpoint("10.0.0.9", 80)]);
    assert_eq!(accepted(&proto).priorities.len(), 2);
}

#[test]
fn an_assignment_may_be_empty() {
    let proto = Proto { cluster_name: "c".into(), ..Proto::default() };
    assert_eq!(accepted(&proto).priorities, Vec::<Vec<crate::resource::Locality>>::new());
}

#[test]
fn endpoints_keep_weight_health_hostname_and_metadata() {
    let mut proto = good();
    let value = |kind| Value { kind: Some(kind) };
    let fields = [
        ("version".to_owned(), value(Kind::StringValue("v2".into()))),
        ("canary".to_owned(), value(Kind::BoolValue(true))),
        ("nested".to_owned(), value(Kind::StructValue(Struct::default()))),
    ];
    let metadata = Metadata {
        filter_metadata: [("envoy.lb".to_owned(), Struct { fields: fields.into() })].into(),
        ..Metadata::default()
    };
    for endpoint in &mut proto.endpoints[0].lb_endpoints {
        endpoint.metadata = Some(metadata.clone());
        endpoint.load_balancing_weight = uint(5);
        endpoint.health_status = 3;
        let Some(HostIdentifier::Endpoint(host)) = &mut endpoint.host_identifier else { panic!() };
        host.hostname = "host".into();
    }
    let assignment = accepted(&proto);
    let [first, second] = &assignment.priorities[0][0].endpoints[..] else { panic!() };
    assert_eq!((first.weight, first.health, &*first.hostname), (5, HealthStatus::Draining, "host"));
    assert!(!first.health.is_usable());
    let lb = &first.metadata.as_ref().unwrap()["envoy.lb"];
    assert_eq!(lb["version"], MetadataValue::String("v2".into()));
    assert_eq!(lb["canary"], MetadataValue::Bool(true));
    assert_eq!(lb.len(), 2);
    assert!(Arc::ptr_eq(&first.hostname, &second.hostname), "hostnames are shared");
}

#[test]
fn drops_are_read_in_order() {
    let mut proto = good();
    let drop = |category: &str, numerator, denominator| DropOverload {
        category: category.into(),
        drop_percentage: Some(ProtoFraction { numerator, denominator }),
    };
    proto.policy =
        Some(Policy { drop_overloads: vec![drop("lb", 60, 0), drop("throttle", 50, 1)], ..Policy::default() });
    let drops = accepted(&proto).drops;
    let read: Vec<_> = drops.iter().map(|drop| (&*drop.category, drop.percentage)).collect();
    assert_eq!(read, [("lb", FractionalPercent(600_000)), ("throttle", FractionalPercent(5_000))]);
}

proptest! {
    /// The naive decoder: the generated one, field by field.
    #[test]
    fn the_hand_written_reader_agrees_with_prost(
        zones in prop::collection::vec(
            (arbitrary::<u8>(), 0..3u32, 0..5u32, prop::collection::vec((0..40u8, 1..3u32, 0..9i32, "[a-c]{0,2}"), 0..6)), 0..5
        )
    ) {
        let mut proto = Proto { cluster_name: "c".into(), ..Proto::default() };
        for (zone, priority, weight, hosts) in zones {
            let hosts = hosts.into_iter().map(|(last, weight, health, hostname)| {
                let mut lb = endpoint(&format!("10.0.{zone}.{last}"), 80);
                lb.load_balancing_weight = uint(weight);
                lb.health_status = health;
                let Some(HostIdentifier::Endpoint(host)) = &mut lb.host_identifier else { unreachable!() };
                host.hostname = hostname;
                lb
            }).collect();
            let mut entry = locality(&zone.to_string(), priority, hosts);
            entry.load_balancing_weight = uint(weight);
            proto.endpoints.push(entry);
        }
        let read = Proto::decode(proto.encode_to_vec().as_slice()).unwrap();
        if let Ok((Resource::ClusterLoadAssignment(ours), _)) = decode(ResourceType::ClusterLoadAssignment, &proto) {
            let mut expected: BTreeMap<u32, Vec<&LocalityLbEndpoints>> = BTreeMap::new();
            for entry in read.endpoints.iter().filter(|entry| u32_or(entry.load_balancing_weight, 0) > 0) {
                expected.entry(entry.priority).or_default().push(entry);
            }
            prop_assert_eq!(expected.len(), ours.priorities.len());
            for (theirs, ours) in expected.values().flatten().zip(ours.priorities.iter().flatten()) {
                prop_assert_eq!(&theirs.locality.as_ref().unwrap().zone, &ours.id.zone);
                prop_assert_eq!(u32_or(theirs.load_balancing_weight, 0), ours.weight);
                prop_assert_eq!(theirs.lb_endpoints.len(), ours.endpoints.len());
                for (theirs, ours) in theirs.lb_endpoints.iter().zip(&ours.endpoints) {
                    let Some(HostIdentifier::Endpoint(host)) = &theirs.host_identifier else { unreachable!() };
                    prop_assert_eq!(host.hostname.as_str(), &*ours.hostname);
                    prop_assert_eq!(u32_or(theirs.load_balancing_weight, 1), ours.weight);
                    prop_assert_eq!(theirs.health_status < 2, ours.health.is_usable());
                }
            }
        }
    }
}
