//! Which part of a cluster's endpoints takes a request: subsets by metadata, priorities as Envoy shares them, zones, and new endpoints.

#![allow(deprecated, reason = "control planes still send the deprecated fields")]

use crate::support::{
    CLUSTER, TARGET, World, assert_says, assignment,
    echo::{Echo, Way, get},
    edit, edit_cluster, envoy_mesh, mesh_on, service, until,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{
                    Cluster,
                    cluster::{
                        CommonLbConfig, LbConfig, LbSubsetConfig, RoundRobinLbConfig, SlowStartConfig,
                        common_lb_config::{LocalityConfigSpecifier, ZoneAwareLbConfig},
                        lb_subset_config::{
                            LbSubsetFallbackPolicy, LbSubsetSelector,
                            lb_subset_selector::LbSubsetSelectorFallbackPolicy,
                        },
                    },
                },
                core::v3::{HealthStatus, Metadata},
                endpoint::v3::{ClusterLoadAssignment, cluster_load_assignment},
                route::v3::{RouteAction, RouteConfiguration, route},
            },
            r#type::v3::Percent,
        },
        google::protobuf::{Duration, Struct, UInt32Value, UInt64Value, Value, value::Kind},
    },
    util::pack_any,
};
use futures::future::join_all;
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{collections::BTreeMap, net::SocketAddr};

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// `filter_metadata["envoy.lb"]`
fn lb(entries: &[(&str, &str)]) -> Metadata {
    let value =
        |(key, text): &(&str, &str)| ((*key).to_owned(), Value { kind: Some(Kind::StringValue((*text).to_owned())) });
    let fields = entries.iter().map(value).collect();
    Metadata { filter_metadata: [("envoy.lb".to_owned(), Struct { fields })].into(), ..Metadata::default() }
}

async fn started(count: usize) -> (ControlPlane, Vec<Echo>) {
    let backends = join_all(NAMES[..count].iter().map(|name| Echo::start(name))).await;
    let endpoints: Vec<_> = backends.iter().map(|backend| ("v1", backend.addr())).collect();
    (ControlPlane::builder().yaml(service(&endpoints)).start().await.unwrap(), backends)
}

fn serve(cp: &ControlPlane, assignment: ClusterLoadAssignment) {
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(assignment));
}

/// The only route asks for this metadata.
fn ask_for(cp: &ControlPlane, entries: &[(&str, &str)]) {
    edit::<RouteConfiguration>(cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let route = &mut config.virtual_hosts[0].routes[0];
        let Some(route::Action::Route(RouteAction { metadata_match, .. })) = &mut route.action else { panic!() };
        *metadata_match = (!entries.is_empty()).then(|| lb(entries));
    });
}

fn names(seen: &BTreeMap<String, usize>) -> String {
    seen.keys().cloned().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn the_route_chooses_endpoints_by_their_metadata() {
    let (cp, backends) = started(4).await;
    let addresses: Vec<SocketAddr> = backends.iter().map(Echo::addr).collect();
    let mut served = assignment(&[&addresses], HealthStatus::Healthy);
    let metadata = [
        lb(&[("version", "1"), ("stage", "prod")]),
        lb(&[("version", "2"), ("stage", "prod")]),
        lb(&[("version", "2"), ("stage", "dev")]),
        Metadata::default(),
    ];
    for (endpoint, metadata) in served.endpoints[0].lb_endpoints.iter_mut().zip(metadata) {
        endpoint.metadata = Some(metadata);
    }
    serve(&cp, served);
    let subsets = |fallback: LbSubsetFallbackPolicy| {
        move |cluster: &mut Cluster| {
            let selector = |keys: &[&str]| LbSubsetSelector {
                keys: keys.iter().map(|key| (*key).to_owned()).collect(),
                ..LbSubsetSelector::default()
            };
            cluster.lb_subset_config = Some(LbSubsetConfig {
                fallback_policy: fallback.into(),
                default_subset: lb(&[("stage", "dev")]).filter_metadata.remove("envoy.lb"),
                subset_selectors: vec![selector(&["version"]), selector(&["version", "stage"])],
                ..LbSubsetConfig::default()
            });
        }
    };
    edit_cluster(&cp, CLUSTER, subsets(LbSubsetFallbackPolicy::NoFallback));
    ask_for(&cp, &[("version", "2")]);
    let world = World::on(cp).await;
    for way in Way::BOTH {
        assert_eq!(names(&way.spread(&world.mesh, 20).await), "b c", "{way:?}");
    }
    let change = async |entries: &[(&str, &str)], expected: &str| {
        ask_for(&world.cp, entries);
        until(expected, async || names(&Way::Channel.spread(&world.mesh, 12).await) == expected).await;
    };
    change(&[("version", "1")], "a").await;
    change(&[("version", "2"), ("stage", "dev")], "c").await;

    // No endpoint has it, or no selector has the key.
    for asked in [[("version", "3")], [("color", "red")]] {
        ask_for(&world.cp, &asked);
        until("nobody has it", async || {
            let error = Way::Layer.backend(&world.mesh, get("/x")).await;
            error.contains("has the metadata") && error.contains(&format!("{}={}", asked[0].0, asked[0].1))
        })
        .await;
    }
    assert_says(&Way::Channel.backend(&world.mesh, get("/x")).await, &["color=red"]);
    edit_cluster(&world.cp, CLUSTER, subsets(LbSubsetFallbackPolicy::AnyEndpoint));
    until("any", async || names(&Way::Channel.spread(&world.mesh, 12).await) == "a b c d").await;
    edit_cluster(&world.cp, CLUSTER, subsets(LbSubsetFallbackPolicy::DefaultSubset));
    until("the default", async || names(&Way::Channel.spread(&world.mesh, 12).await) == "c").await;
    change(&[("version", "1")], "a").await;
    change(&[], "c").await;
}

#[tokio::test]
async fn each_selector_falls_back_in_its_own_way() {
    let (cp, backends) = started(4).await;
    let addresses: Vec<SocketAddr> = backends.iter().map(Echo::addr).collect();
    let mut served = assignment(&[&addresses], HealthStatus::Healthy);
    let metadata = [("1", "prod"), ("2", "prod"), ("2", "dev"), ("3", "")];
    for (endpoint, (version, stage)) in served.endpoints[0].lb_endpoints.iter_mut().zip(metadata) {
        endpoint.metadata = Some(lb(&[("version", version), ("stage", stage), ("color", "blue")]));
    }
    serve(&cp, served);
    edit_cluster(&cp, CLUSTER, |cluster| {
        let selector = |keys: &[&str], fallback: LbSubsetSelectorFallbackPolicy, reduced: &[&str]| LbSubsetSelector {
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            fallback_policy: fallback.into(),
            fallback_keys_subset: reduced.iter().map(|key| (*key).to_owned()).collect(),
            ..LbSubsetSelector::default()
        };
        cluster.lb_subset_config = Some(LbSubsetConfig {
            fallback_policy: LbSubsetFallbackPolicy::AnyEndpoint.into(),
            default_subset: lb(&[("stage", "dev")]).filter_metadata.remove("envoy.lb"),
            subset_selectors: vec![
                selector(&["color"], LbSubsetSelectorFallbackPolicy::NoFallback, &[]),
                selector(&["version"], LbSubsetSelectorFallbackPolicy::AnyEndpoint, &[]),
                selector(&["stage"], LbSubsetSelectorFallbackPolicy::DefaultSubset, &[]),
                selector(&["stage", "version"], LbSubsetSelectorFallbackPolicy::KeysSubset, &["stage"]),
            ],
            ..LbSubsetConfig::default()
        });
    });
    let world = World::on(cp).await;
    for way in Way::BOTH {
        let expect = async |entries: &[(&str, &str)], expected: &str| {
            ask_for(&world.cp, entries);
            until(expected, async || names(&way.spread(&world.mesh, 12).await) == expected).await;
        };
        expect(&[("version", "1")], "a").await;
        // ANY_ENDPOINT
        expect(&[("version", "9")], "a b c d").await;
        // DEFAULT_SUBSET
        expect(&[("stage", "test")], "c").await;
        // KEYS_SUBSET: without the version; and from there on as the selector of those keys says.
        expect(&[("stage", "prod"), ("version", "9")], "a b").await;
        expect(&[("stage", "test"), ("version", "9")], "c").await;
        // NO_FALLBACK, although the cluster as a whole has one.
        ask_for(&world.cp, &[("color", "red")]);
        until("nobody has it", async || way.backend(&world.mesh, get("/x")).await.contains("color=red")).await;
    }
}

#[tokio::test]
async fn under_envoys_rules_priorities_spill_over_and_panic_disregards_health() {
    let (cp, backends) = started(4).await;
    let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| backends[i].addr());
    let layout = |unhealthy: &[SocketAddr], status: HealthStatus| {
        let mut served = assignment(&[&[a, b], &[c, d]], HealthStatus::Healthy);
        for locality in &mut served.endpoints {
            for endpoint in &mut locality.lb_endpoints {
                let text = format!("{:?}", endpoint.host_identifier);
                if unhealthy.iter().any(|address| text.contains(&format!("PortValue({})", address.port()))) {
                    endpoint.health_status = status.into();
                }
            }
        }
        served
    };
    serve(&cp, layout(&[a], HealthStatus::Unhealthy));
    let (mesh, grpc) = (envoy_mesh(&cp).await, mesh_on(&cp).await);
    let _used = [mesh.channel(TARGET).unwrap(), grpc.channel(TARGET).unwrap()];
    // Half of priority 0, times 1.4: it covers 70 %, the rest goes on.
    let seen = Way::Layer.spread(&mesh, 400).await;
    let first = seen.get("b").copied().unwrap_or(0);
    assert!((240..=320).contains(&first) && !seen.contains_key("a"), "{seen:?}");
    // gRPC knows no such thing.
    assert_eq!(names(&Way::Channel.spread(&grpc, 20).await), "b");

    // A factor of 200: half of it covers everything.
    let mut served = layout(&[a], HealthStatus::Unhealthy);
    let overprovisioning_factor = Some(UInt32Value { value: 200 });
    served.policy =
        Some(cluster_load_assignment::Policy { overprovisioning_factor, ..cluster_load_assignment::Policy::default() });
    serve(&cp, served);
    until("all is covered", async || names(&Way::Layer.spread(&mesh, 40).await) == "b").await;

    // Degraded endpoints take what healthy ones of all priorities do not cover.
    serve(&cp, layout(&[b, c, d], HealthStatus::Degraded));
    until("degraded endpoints help out", async || names(&Way::Layer.spread(&mesh, 60).await).contains("b")).await;
    let seen = Way::Layer.spread(&mesh, 400).await;
    assert!((220..=340).contains(seen.get("a").unwrap_or(&0)), "70 % are covered: {seen:?}");

    // Fewer than half are well in either: everybody is asked.
    serve(&cp, layout(&[a, b, c, d], HealthStatus::Unhealthy));
    until("panic", async || names(&Way::Layer.spread(&mesh, 40).await) == "a b c d").await;
    until("gRPC fails", async || Way::Channel.spread(&grpc, 1).await.keys().all(|name| name.len() > 1)).await;
    edit_cluster(&cp, CLUSTER, |cluster| {
        let never = Some(Percent { value: 0.0 });
        cluster.common_lb_config = Some(CommonLbConfig { healthy_panic_threshold: never, ..CommonLbConfig::default() });
    });
    until("no panic", async || Way::Layer.spread(&mesh, 1).await.keys().all(|name| name.len() > 1)).await;
}

#[tokio::test]
async fn requests_stay_in_the_zone_as_long_as_it_gets_no_more_than_its_share() {
    let (cp, backends) = started(4).await;
    let [a, b, c, d] = [0, 1, 2, 3].map(|i: usize| backends[i].addr());
    // Two zones of one priority.
    let zones = |near: &[SocketAddr], far: &[SocketAddr]| {
        let mut served = assignment(&[near, far], HealthStatus::Healthy);
        served.endpoints[1].priority = 0;
        served
    };
    serve(&cp, zones(&[a, b], &[c, d]));
    edit_cluster(&cp, CLUSTER, |cluster| {
        let zone =
            ZoneAwareLbConfig { min_cluster_size: Some(UInt64Value { value: 2 }), ..ZoneAwareLbConfig::default() };
        cluster.common_lb_config = Some(CommonLbConfig {
            locality_config_specifier: Some(LocalityConfigSpecifier::ZoneAwareLbConfig(zone)),
            ..CommonLbConfig::default()
        });
    });
    let mut bootstrap: serde_json::Value = serde_json::from_str(&cp.bootstrap()).unwrap();
    bootstrap["node"]["locality"] = serde_json::json!({"zone": "zone-0"});
    let mesh = Mesh::builder().bootstrap_json(&bootstrap.to_string()).unwrap().profile(Profile::Envoy);
    let mesh = mesh.zone_share(0.5).build().await.unwrap();
    let _used = mesh.channel(TARGET).unwrap();
    assert_eq!(names(&Way::Layer.spread(&mesh, 40).await), "a b", "half of the endpoints for half of the clients");
    // A quarter of the endpoints can serve half of its clients only.
    serve(&cp, zones(&[a], &[b, c, d]));
    until("the rest goes elsewhere", async || Way::Layer.spread(&mesh, 40).await.len() == 4).await;
    let seen = Way::Layer.spread(&mesh, 400).await;
    assert!((160..=240).contains(&seen["a"]), "{seen:?}");
    // Who does not know where it is goes everywhere.
    let elsewhere = envoy_mesh(&cp).await;
    let seen = Way::Layer.spread(&elsewhere, 400).await;
    assert!((60..=140).contains(&seen["a"]), "{seen:?}");
}

#[tokio::test]
async fn a_new_endpoint_gets_little_at_first() {
    let (cp, backends) = started(3).await;
    let addresses: Vec<SocketAddr> = backends.iter().map(Echo::addr).collect();
    serve(&cp, assignment(&[&addresses[..2]], HealthStatus::Healthy));
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.lb_config = Some(LbConfig::RoundRobinLbConfig(RoundRobinLbConfig {
            slow_start_config: Some(SlowStartConfig {
                slow_start_window: Some(Duration { seconds: 8, nanos: 0 }),
                min_weight_percent: Some(Percent { value: 1.0 }),
                ..SlowStartConfig::default()
            }),
        }));
    });
    let mesh = envoy_mesh(&cp).await;
    // Endpoints live as long as somebody uses their cluster.
    let _used = mesh.channel(TARGET).unwrap();
    let seen = Way::Layer.spread(&mesh, 40).await;
    assert!(seen.values().all(|count| (16..=24).contains(count)), "all that are new are alike: {seen:?}");
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    serve(&cp, assignment(&[&addresses], HealthStatus::Healthy));
    until("the new one is there", async || Way::Layer.spread(&mesh, 30).await.contains_key("c")).await;
    // One eighth against a half and more.
    let seen = Way::Layer.spread(&mesh, 100).await;
    assert!(seen.get("c").is_none_or(|new| *new <= 22), "{seen:?}");
    until("it gets its share in the end", async || {
        let seen = Way::Layer.spread(&mesh, 90).await;
        seen.get("c").is_some_and(|new| (25..=35).contains(new))
    })
    .await;
}
