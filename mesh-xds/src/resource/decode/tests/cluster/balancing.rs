//! Load-balancing policies and what surrounds them (gRFC A42, A52, A55, A68; Envoy).

use super::*;
use crate::resource::{
    ConsistentHashing, CustomLb, Extensions, HashFunction, HealthStatus, HealthStatuses, LocalityLb, Maglev,
    MetadataValue, PeakEwma, RingHash, SlowStart, SubsetFallback, WeightedRoundRobin,
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::cluster::{
                CommonLbConfig, LbSubsetConfig, MaglevLbConfig, RingHashLbConfig, SlowStartConfig as LegacySlowStart,
                common_lb_config::{
                    ConsistentHashingLbConfig as LegacyHashing, LocalityConfigSpecifier, ZoneAwareLbConfig,
                },
                lb_subset_config::LbSubsetSelector,
            },
            core::v3::{HealthStatusSet, RuntimeDouble},
        },
        extensions::load_balancing_policies::{
            client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin, common::v3::ConsistentHashingLbConfig,
            least_request::v3::least_request::SelectionMethod, maglev::v3::Maglev as ProtoMaglev,
            pick_first::v3::PickFirst, random_subsetting::v3::RandomSubsetting, ring_hash::v3::RingHash as ProtoRing,
            subset::v3::Subset,
        },
    },
    google::protobuf::{FloatValue, Struct, UInt64Value, Value, value::Kind},
};
use std::time::Duration;

fn long(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn policy(config: Any) -> LbPolicy {
    accepted(&with(|c| c.load_balancing_policy = policies(vec![config]))).0.lb_policy
}

fn typed(name: &str, fields: &[(&str, Kind)]) -> Any {
    let value = |(key, kind): &(&str, Kind)| ((*key).to_owned(), Value { kind: Some(kind.clone()) });
    let typed = filter::TypedStruct {
        type_url: format!("type.googleapis.com/{name}"),
        value: Some(Struct { fields: fields.iter().map(value).collect() }),
    };
    Any { type_url: "type.googleapis.com/xds.type.v3.TypedStruct".into(), value: typed.encode_to_vec() }
}

#[test]
fn policies_have_their_defaults_and_what_is_said() {
    assert_eq!(policy(any(&ProtoRing::default())), LbPolicy::RingHash(RingHash::default()));
    let hashing = ConsistentHashingLbConfig {
        use_hostname_for_hashing: true,
        hash_balance_factor: uint(150),
        ..Default::default()
    };
    let ring = ProtoRing {
        minimum_ring_size: long(10),
        maximum_ring_size: long(20),
        hash_function: 2,
        consistent_hashing_lb_config: Some(hashing),
        ..ProtoRing::default()
    };
    let hashing = ConsistentHashing { use_hostname: true, balance_factor: Some(150) };
    let expected =
        RingHash { min_size: 10, max_size: 20, function: HashFunction::MurmurHash2, hashing, request_header: None };
    assert_eq!(policy(any(&ring)), LbPolicy::RingHash(expected));
    assert_eq!(policy(any(&ProtoMaglev::default())), LbPolicy::Maglev(Maglev::default()));
    assert_eq!(policy(any(&PickFirst { shuffle_address_list: true })), LbPolicy::PickFirst { shuffle: true });
    let part = RandomSubsetting { subset_size: uint(3), child_policy: policies(vec![any(&LeastRequest::default())]) };
    let child = LbPolicy::least_request(2).into();
    assert_eq!(policy(any(&part)), LbPolicy::RandomSubsetting { subset_size: 3, child });
}

#[test]
fn grpcs_names_are_known_in_a_typed_struct() {
    let ring = [("minRingSize", Kind::NumberValue(64.0)), ("requestHashHeader", Kind::StringValue("X-Key".into()))];
    let expected = RingHash { min_size: 64, request_header: Some("x-key".parse().unwrap()), ..RingHash::default() };
    assert_eq!(policy(typed("ring_hash_experimental", &ring)), LbPolicy::RingHash(expected));
    assert_eq!(policy(typed("a.b/round_robin", &[])), LbPolicy::RoundRobin);
    let ewma = [("decayMs", Kind::NumberValue(500.0)), ("penaltyMs", Kind::NumberValue(0.0))];
    let expected = PeakEwma { decay: Duration::from_millis(500), penalty: Duration::ZERO, ..PeakEwma::default() };
    assert_eq!(policy(typed("peak_ewma", &ewma)), LbPolicy::PeakEwma(expected));
}

#[test]
fn a_policy_of_the_program_wins_over_ours_of_the_same_name() {
    let mut extensions = Extensions::default();
    extensions.add_lb_policy("round_robin");
    extensions.add_lb_policy("com.example.mine");
    let known = |config: Any| {
        let proto = with(|c| c.load_balancing_policy = policies(vec![any(&ClusterProvided::default()), config]));
        let providers = BTreeMap::new();
        let mut decoder = Decoder::new(&providers).with_extensions(&extensions);
        Cluster::decode(&proto.encode_to_vec(), &mut decoder).map(|cluster| cluster.lb_policy)
    };
    let custom =
        |name: &str| LbPolicy::Custom(CustomLb { name: name.into(), config: serde_json::json!({"n": 1.0}) }.into());
    let fields = [("n", Kind::NumberValue(1.0))];
    assert_eq!(known(typed("round_robin", &fields)).unwrap(), custom("round_robin"));
    assert_eq!(known(typed("com.example.mine", &fields)).unwrap(), custom("com.example.mine"));
    let error = known(typed("com.example.other", &fields)).unwrap_err();
    assert!(error.reason.contains("com.example.other"), "{error}");
}

#[test]
fn the_legacy_fields_say_the_same() {
    let ring = with(|c| {
        c.lb_policy = ProtoPolicy::RingHash as i32;
        c.lb_config = Some(LbConfig::RingHashLbConfig(RingHashLbConfig {
            minimum_ring_size: long(10),
            hash_function: 1,
            ..RingHashLbConfig::default()
        }));
        c.common_lb_config = Some(CommonLbConfig {
            consistent_hashing_lb_config: Some(LegacyHashing { hash_balance_factor: uint(120), ..Default::default() }),
            ..CommonLbConfig::default()
        });
    });
    let hashing = ConsistentHashing { use_hostname: false, balance_factor: Some(120) };
    let expected = RingHash { min_size: 10, function: HashFunction::MurmurHash2, hashing, ..RingHash::default() };
    assert_eq!(accepted(&ring).0.lb_policy, LbPolicy::RingHash(expected));
    for unknown in [i32::MIN, -1, 2, i32::MAX] {
        let ring = with(|c| {
            c.lb_policy = ProtoPolicy::RingHash as i32;
            let config = RingHashLbConfig { hash_function: unknown, ..RingHashLbConfig::default() };
            c.lb_config = Some(LbConfig::RingHashLbConfig(config));
        });
        let error = decode(ResourceType::Cluster, &ring).unwrap_err();
        assert!(error.path.ends_with("ring_hash_lb_config.hash_function"), "{error}");
    }
    let maglev = with(|c| {
        c.lb_policy = ProtoPolicy::Maglev as i32;
        c.lb_config = Some(LbConfig::MaglevLbConfig(MaglevLbConfig { table_size: long(1009) }));
    });
    let expected = Maglev { table_size: 1009, ..Maglev::default() };
    assert_eq!(accepted(&maglev).0.lb_policy, LbPolicy::Maglev(expected));
}

#[test]
fn what_surrounds_a_policy_is_taken() {
    let plain = accepted(&good()).0.lb;
    assert_eq!((plain.panic_threshold, plain.localities, plain.slow_start), (50.0, LocalityLb::Weighted, None));
    let cluster = with(|c| {
        c.lb_config = Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
            slow_start_config: Some(LegacySlowStart { slow_start_window: seconds(30), ..LegacySlowStart::default() }),
            ..LeastRequestLbConfig::default()
        }));
        c.lb_policy = ProtoPolicy::LeastRequest as i32;
        c.common_lb_config = Some(CommonLbConfig {
            healthy_panic_threshold: Some(Percent { value: 20.0 }),
            // HEALTHY, UNHEALTHY (ignored), DRAINING.
            override_host_status: Some(HealthStatusSet { statuses: vec![1, 2, 3] }),
            locality_config_specifier: Some(LocalityConfigSpecifier::ZoneAwareLbConfig(ZoneAwareLbConfig {
                min_cluster_size: long(3),
                fail_traffic_on_panic: true,
                ..ZoneAwareLbConfig::default()
            })),
            ..CommonLbConfig::default()
        });
    });
    let lb = accepted(&cluster).0.lb;
    assert_eq!((lb.panic_threshold, lb.fail_on_panic), (20.0, true));
    assert_eq!(lb.localities, LocalityLb::ZoneAware { enabled: 100.0, min_cluster_size: 3 });
    let slow = SlowStart { window: Duration::from_secs(30), aggression: 1.0, min_weight: 10.0 };
    assert_eq!(lb.slow_start, Some(slow));
    let statuses = HealthStatuses::NONE.and(HealthStatus::Healthy).and(HealthStatus::Draining);
    assert_eq!(lb.override_host_statuses, statuses);
}

#[test]
fn subsets_are_taken_from_either_place() {
    let text = |text: &str| Value { kind: Some(Kind::StringValue(text.into())) };
    let default = Struct { fields: [("stage".to_owned(), text("prod"))].into() };
    let selector = |keys: &[&str], fallback| LbSubsetSelector {
        keys: keys.iter().map(|key| (*key).to_owned()).collect(),
        fallback_policy: fallback,
        ..LbSubsetSelector::default()
    };
    let legacy = with(|c| {
        c.lb_subset_config = Some(LbSubsetConfig {
            fallback_policy: 2,
            default_subset: Some(default.clone()),
            subset_selectors: vec![selector(&["version", "stage"], 0), selector(&["version"], 1)],
            ..LbSubsetConfig::default()
        });
    });
    let subsets = accepted(&legacy).0.lb.subsets.unwrap();
    assert_eq!(subsets.fallback, SubsetFallback::Default);
    assert_eq!(subsets.default_subset, [("stage".into(), MetadataValue::String("prod".into()))].into());
    assert_eq!(subsets.selectors[0].keys, ["stage", "version"], "in order");
    assert_eq!((&subsets.selectors[0].fallback, &subsets.selectors[1].fallback), (&None, &Some(SubsetFallback::None)));
    let config =
        Subset { fallback_policy: 1, subset_lb_policy: policies(vec![any(&Random::default())]), ..Subset::default() };
    let (cluster, _) = accepted(&with(|c| c.load_balancing_policy = policies(vec![any(&config)])));
    assert_eq!((cluster.lb_policy, &cluster.lb.subsets.unwrap().fallback), (LbPolicy::Random, &SubsetFallback::Any));
}

#[test]
fn weighted_round_robin_has_the_defaults_and_limits_of_a58() {
    let of = |proto: &ClientSideWeightedRoundRobin| match policy(any(proto)) {
        LbPolicy::WeightedRoundRobin(config) => WeightedRoundRobin::clone(&config),
        other => panic!("{other:?}"),
    };
    assert_eq!(of(&ClientSideWeightedRoundRobin::default()), WeightedRoundRobin::default());
    let said = ClientSideWeightedRoundRobin {
        enable_oob_load_report: Some(BoolValue { value: true }),
        blackout_period: seconds(0),
        weight_expiration_period: seconds(60),
        weight_update_period: seconds(0),
        metric_names_for_computing_utilization: vec!["named_metrics.queue".into()],
        ..ClientSideWeightedRoundRobin::default()
    };
    let expected = WeightedRoundRobin {
        oob_period: Some(Duration::from_secs(10)),
        blackout: Duration::ZERO,
        expiration: Duration::from_secs(60),
        update: Duration::from_millis(100),
        error_penalty: 1.0,
        utilization_metrics: vec!["named_metrics.queue".into()],
    };
    assert_eq!(of(&said), expected);
    let bad = ClientSideWeightedRoundRobin {
        error_utilization_penalty: Some(FloatValue { value: -1.0 }),
        ..ClientSideWeightedRoundRobin::default()
    };
    let proto = with(|c| c.load_balancing_policy = policies(vec![any(&bad)]));
    let error = decode(ResourceType::Cluster, &proto).unwrap_err();
    assert!(error.path.ends_with("error_utilization_penalty") && error.reason.contains("negative"), "{error}");
}

#[test]
fn bad_policies_are_rejected_with_the_place() {
    let ring = |change: fn(&mut ProtoRing)| {
        let mut ring = ProtoRing::default();
        change(&mut ring);
        policies(vec![any(&ring)])
    };
    for (list, path, reason) in [
        (ring(|r| r.maximum_ring_size = long(8_388_609)), "maximum_ring_size", "not between 1 and 8388608"),
        (
            ring(|r| (r.minimum_ring_size, r.maximum_ring_size) = (long(20), long(10))),
            "minimum_ring_size",
            "more than the most",
        ),
        (ring(|r| r.hash_function = 9), "hash_function", "unknown function 9"),
        (ring(|r| r.hash_balance_factor = uint(99)), "hash_balance_factor", "below 100"),
        (
            policies(vec![any(&ProtoMaglev { table_size: long(1000), ..ProtoMaglev::default() })]),
            "table_size",
            "not a prime",
        ),
        (
            policies(vec![any(&ProtoMaglev { table_size: long(5_000_077), ..ProtoMaglev::default() })]),
            "table_size",
            "more than 5000011",
        ),
        (policies(vec![any(&RandomSubsetting::default())]), "subset_size", "greater than zero"),
        (
            policies(vec![typed(
                "ring_hash_experimental",
                &[("requestHashHeader", Kind::StringValue("k-bin".into()))],
            )]),
            "requestHashHeader",
            "binary",
        ),
        (policies(vec![typed("peak_ewma", &[("decayMs", Kind::NumberValue(-1.0))])]), "decayMs", "not between"),
    ] {
        let error = decode(ResourceType::Cluster, &with(|c| c.load_balancing_policy = list)).unwrap_err();
        assert!(error.path.ends_with(path) && error.reason.contains(reason), "{error}");
    }
}

#[test]
fn least_request_has_a_bias_and_a_way_to_choose() {
    let bias = |value| Some(RuntimeDouble { default_value: value, runtime_key: String::new() });
    let taken = |config: LeastRequest| {
        let (cluster, notes) = accepted(&with(|c| c.load_balancing_policy = policies(vec![any(&config)])));
        (cluster.lb_policy, notes.len())
    };
    let least = |bias, full_scan| LbPolicy::LeastRequest { choice_count: 2, bias, full_scan };
    let said = LeastRequest { active_request_bias: bias(0.5), ..LeastRequest::default() };
    assert_eq!(taken(said), (least(Some(0.5), false), 0));
    let said = LeastRequest { active_request_bias: bias(1.0), ..LeastRequest::default() };
    assert_eq!(taken(said), (LbPolicy::least_request(2), 0), "the default");
    let said = LeastRequest { active_request_bias: bias(-1.0), ..LeastRequest::default() };
    assert_eq!(taken(said), (LbPolicy::least_request(2), 1), "Envoy's answer, and a note");
    let said = LeastRequest { selection_method: SelectionMethod::FullScan.into(), ..LeastRequest::default() };
    assert_eq!(taken(said), (least(None, true), 0));
    let legacy = with(|c| {
        c.lb_policy = ProtoPolicy::LeastRequest as i32;
        c.lb_config = Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
            active_request_bias: bias(0.0),
            ..LeastRequestLbConfig::default()
        }));
    });
    assert_eq!(accepted(&legacy).0.lb_policy, least(Some(0.0), false));
}
