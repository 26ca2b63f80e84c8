//! Arbitrary bytes never panic, in any type.

use super::*;
use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use proptest::{prelude::any as arbitrary, prelude::prop, proptest};

fn feed(bytes: &[u8]) {
    let providers = providers();
    let _ = peek_name(bytes);
    for kind in ResourceType::ALL {
        let _ = Resource::decode(kind, bytes, &mut Decoder::new(&providers));
    }
}

/// A good resource of each type, as a seed to damage.
fn seeds() -> Vec<Vec<u8>> {
    vec![
        Listener { name: "l".into(), api_listener: Some(Default::default()), ..Default::default() }.encode_to_vec(),
        RouteConfiguration { name: "r".into(), virtual_hosts: vec![Default::default()], ..Default::default() }
            .encode_to_vec(),
        Cluster { name: "c".into(), outlier_detection: Some(Default::default()), ..Default::default() }.encode_to_vec(),
        ClusterLoadAssignment {
            cluster_name: "e".into(),
            endpoints: vec![
                envoy_types::pb::envoy::config::endpoint::v3::LocalityLbEndpoints {
                    lb_endpoints: vec![endpoint::endpoint("10.0.0.1", 80)],
                    load_balancing_weight: uint(1),
                    ..Default::default()
                };
                2
            ],
            ..Default::default()
        }
        .encode_to_vec(),
    ]
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(arbitrary::<u8>(), 0..200)) {
        feed(&bytes);
    }

    #[test]
    fn damaged_resources_never_panic(seed in 0..4usize, at in arbitrary::<prop::sample::Index>(), byte in arbitrary::<u8>(), cut in arbitrary::<prop::sample::Index>()) {
        let mut bytes = seeds().swap_remove(seed);
        let index = at.index(bytes.len());
        bytes[index] = byte;
        feed(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        feed(&bytes);
    }
}
