//! Aggregate clusters: requests go to the first of several clusters that can take them (gRFC A37, A75, `envoy.clusters.aggregate`).

use crate::support::{
    CLUSTER, World, assert_says, assignment,
    echo::{Echo, Way, get},
    edit_cluster, envoy_mesh, mesh_on, nobody, service, until,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{
                    CircuitBreakers, Cluster, OutlierDetection,
                    circuit_breakers::Thresholds,
                    cluster::{ClusterDiscoveryType, CustomClusterType, DiscoveryType, EdsClusterConfig},
                },
                core::v3::{AggregatedConfigSource, ConfigSource, HealthStatus, config_source::ConfigSourceSpecifier},
                endpoint::v3::ClusterLoadAssignment,
            },
            extensions::clusters::aggregate::v3::ClusterConfig,
        },
        google::protobuf::UInt32Value,
    },
    util::pack_any,
};
use futures::future::join_all;
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::net::SocketAddr;

const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// A control plane that serves the greeter, whose cluster tests replace; and servers.
async fn started(count: usize) -> (ControlPlane, Vec<Echo>) {
    let backends = join_all(NAMES[..count].iter().map(|name| Echo::start(name))).await;
    (ControlPlane::builder().yaml(service(&[("v1", backends[0].addr())])).start().await.unwrap(), backends)
}

/// Serves a cluster with these endpoints, by priority, all of the same health.
fn leaf(cp: &ControlPlane, name: &str, priorities: &[&[SocketAddr]]) {
    leaf_with(cp, name, assignment(priorities, HealthStatus::Healthy), |_| {});
}

pub(crate) fn leaf_with(
    cp: &ControlPlane,
    name: &str,
    endpoints: ClusterLoadAssignment,
    change: impl FnOnce(&mut Cluster),
) {
    let ads = Some(ConfigSourceSpecifier::Ads(AggregatedConfigSource::default()));
    let eds_config = Some(ConfigSource { config_source_specifier: ads, ..ConfigSource::default() });
    let mut cluster = Cluster {
        name: name.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { service_name: name.to_owned(), eds_config }),
        ..Cluster::default()
    };
    change(&mut cluster);
    let endpoints = ClusterLoadAssignment { cluster_name: name.to_owned(), ..endpoints };
    cp.cache().update(ResourceType::ClusterLoadAssignment, name, pack_any(endpoints));
    cp.cache().update(ResourceType::Cluster, name, pack_any(cluster));
}

fn discovery(clusters: &[&str]) -> Option<ClusterDiscoveryType> {
    let config = ClusterConfig { clusters: clusters.iter().map(|name| (*name).to_owned()).collect() };
    let typed_config = Some(pack_any(config));
    Some(ClusterDiscoveryType::ClusterType(CustomClusterType { name: "envoy.clusters.aggregate".into(), typed_config }))
}

/// Serves an aggregate of this name.
pub(crate) fn aggregate(cp: &ControlPlane, name: &str, clusters: &[&str]) {
    let cluster = Cluster { name: name.to_owned(), cluster_discovery_type: discovery(clusters), ..Cluster::default() };
    cp.cache().update(ResourceType::Cluster, name, pack_any(cluster));
}

async fn names(mesh: &Mesh, way: Way) -> String {
    way.spread(mesh, 8).await.into_keys().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn requests_go_to_the_first_cluster_that_can_take_them_and_return_to_it() {
    let (cp, backends) = started(3).await;
    let [a, b, c] = [0, 1, 2].map(|i| backends[i].addr());
    // Nobody listens where this one was.
    let refusing = nobody();
    let dead = refusing.addr();
    leaf(&cp, "first", &[&[a]]);
    leaf(&cp, "second", &[&[b], &[c]]);
    aggregate(&cp, CLUSTER, &["first", "second"]);
    let grpc = World::on(cp).await;
    let envoy = envoy_mesh(&grpc.cp).await;
    let all = async |expected: &str| {
        for mesh in [&grpc.mesh, &envoy] {
            for way in Way::BOTH {
                until(expected, async || names(mesh, way).await == expected).await;
            }
        }
    };
    for way in Way::BOTH {
        assert_eq!(names(&grpc.mesh, way).await, "a", "{way:?}");
        assert_eq!(names(&envoy, way).await, "a", "{way:?}");
    }
    // It cannot be connected to: no request fails meanwhile.
    leaf(&grpc.cp, "first", &[&[dead]]);
    for mesh in [&grpc.mesh, &envoy] {
        for _ in 0..20 {
            let seen = Way::Channel.spread(mesh, 4).await;
            assert!(seen.keys().all(|name| name == "a" || name == "b"), "{seen:?}");
        }
    }
    all("b").await;
    // Its second priority, when the first of neither can take any.
    let mut half = assignment(&[&[b], &[c]], HealthStatus::Healthy);
    half.endpoints[0].lb_endpoints[0].health_status = HealthStatus::Unhealthy.into();
    leaf_with(&grpc.cp, "second", half, |_| {});
    all("c").await;
    leaf(&grpc.cp, "first", &[&[a]]);
    all("a").await;
    let text = grpc.explain();
    assert_says(&text, &["`first` of the aggregate", "`second` of the aggregate", &a.to_string(), &c.to_string()]);

    // None of them can: both are named by what the first says.
    leaf(&grpc.cp, "first", &[&[dead]]);
    leaf(&grpc.cp, "second", &[]);
    until("an error", async || {
        Way::Channel
            .backend(&grpc.mesh, get("/x"))
            .await
            .contains("cluster first: none of its 1 endpoints can be reached")
    })
    .await;
}

#[tokio::test]
async fn a_cluster_that_is_missing_is_left_out() {
    let (cp, backends) = started(2).await;
    let [a, b] = [0, 1].map(|i| backends[i].addr());
    leaf(&cp, "second", &[&[b]]);
    aggregate(&cp, CLUSTER, &["first", "second"]);
    let world = World::on(cp).await;
    for way in Way::BOTH {
        assert_eq!(names(&world.mesh, way).await, "b", "{way:?}");
    }
    leaf(&world.cp, "first", &[&[a]]);
    until("a", async || names(&world.mesh, Way::Channel).await == "a").await;
    // What is rejected does not come into force, and takes nothing down.
    leaf_with(&world.cp, "third", assignment(&[], HealthStatus::Healthy), |c| c.lb_policy = 99);
    aggregate(&world.cp, CLUSTER, &["third", "second", "first"]);
    until("b", async || names(&world.mesh, Way::Layer).await == "b").await;
    // Nothing is left of it, for one who never knew better.
    aggregate(&world.cp, CLUSTER, &["nobody", "none"]);
    let mesh = mesh_on(&world.cp).await;
    let error = Way::Channel.backend(&mesh, get("/x")).await;
    assert_says(&error, &["none of its clusters can be used", "\"nobody\": the control plane has none"]);
}

#[tokio::test]
async fn aggregates_may_be_nested_but_not_in_themselves() {
    let (cp, backends) = started(4).await;
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| backends[i].addr());
    let health = |cp: &ControlPlane, name: &str, addr: SocketAddr, health| {
        leaf_with(cp, name, assignment(&[&[addr]], health), |_| {});
    };
    for (name, addr) in [("one", a), ("two", b), ("three", c), ("four", d)] {
        leaf(&cp, name, &[&[addr]]);
    }
    // Twice, and counts where it stands first.
    aggregate(&cp, "inner", &["two", "one", "three"]);
    aggregate(&cp, CLUSTER, &["one", "inner", "four"]);
    let world = World::on(cp).await;
    let expect = async |expected: &str| {
        until(expected, async || names(&world.mesh, Way::Channel).await == expected).await;
        assert_eq!(names(&world.mesh, Way::Layer).await, expected);
    };
    expect("a").await;
    for (name, addr, next) in [("one", a, "b"), ("two", b, "c"), ("three", c, "d")] {
        health(&world.cp, name, addr, HealthStatus::Unhealthy);
        expect(next).await;
    }
    health(&world.cp, "two", b, HealthStatus::Healthy);
    expect("b").await;

    let fails = async |with: &[&str]| {
        let all = async || {
            let error = Way::Channel.backend(&world.mesh, get("/x")).await;
            with.iter().all(|part| error.contains(part))
        };
        until(with[0], all).await;
    };
    aggregate(&world.cp, "inner", &["two", "outer"]);
    aggregate(&world.cp, "outer", &["inner"]);
    fails(&["it contains itself: inner -> outer -> inner"]).await;
    aggregate(&world.cp, "inner", &["two"]);
    expect("b").await;
    // The greeter's is the first, a leaf the sixteenth.
    let deep = |depth: usize| if depth == 14 { "two".to_owned() } else { format!("deep-{}", depth + 1) };
    for depth in 0..14 {
        aggregate(&world.cp, &format!("deep-{depth}"), &[&deep(depth)]);
    }
    aggregate(&world.cp, "deep-14", &["two"]);
    aggregate(&world.cp, CLUSTER, &["deep-0", "four"]);
    fails(&["nested too deep", "16 is the limit", "deep-0 -> deep-1"]).await;
    aggregate(&world.cp, CLUSTER, &["deep-1", "four"]);
    expect("b").await;
}

#[tokio::test]
async fn envoy_shares_requests_among_the_priorities_of_all_clusters() {
    let (cp, backends) = started(4).await;
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| backends[i].addr());
    let mut half = assignment(&[&[a, b]], HealthStatus::Healthy);
    half.endpoints[0].lb_endpoints[1].health_status = HealthStatus::Unhealthy.into();
    leaf_with(&cp, "first", half, |_| {});
    leaf(&cp, "second", &[&[c], &[d]]);
    aggregate(&cp, CLUSTER, &["first", "second"]);
    let world = World::on(cp).await;
    let envoy = envoy_mesh(&world.cp).await;
    // Half of the endpoints times 1.4 cover 70 %.
    for way in Way::BOTH {
        let seen = way.spread(&envoy, 1000).await;
        assert_eq!(seen.len(), 2, "{seen:?}");
        assert!((640..=760).contains(&seen["a"]), "{seen:?}");
        assert!(seen.contains_key("c"), "{seen:?}");
    }
    // gRPC: the first that has any.
    assert_eq!(names(&world.mesh, Way::Channel).await, "a");
}

#[tokio::test]
async fn each_cluster_keeps_its_own_limits_and_outliers() {
    let (cp, backends) = started(2).await;
    let [a, b] = [0, 1].map(|i| backends[i].addr());
    let closed = |cluster: &mut Cluster| {
        let thresholds = Thresholds { max_requests: Some(UInt32Value { value: 0 }), ..Thresholds::default() };
        cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() });
    };
    let watched = |cluster: &mut Cluster| {
        cluster.outlier_detection = Some(OutlierDetection {
            consecutive_5xx: Some(UInt32Value { value: 1 }),
            max_ejection_percent: Some(UInt32Value { value: 100 }),
            enforcing_consecutive_5xx: Some(UInt32Value { value: 100 }),
            ..OutlierDetection::default()
        });
    };
    let endpoints = |addr| assignment(&[&[addr]], HealthStatus::Healthy);
    leaf_with(&cp, "first", endpoints(a), watched);
    leaf_with(&cp, "second", endpoints(b), closed);
    aggregate(&cp, CLUSTER, &["first", "second"]);
    // The aggregate's own limits do not count.
    edit_cluster(&cp, CLUSTER, closed);
    let mesh = mesh_on(&cp).await;
    assert_eq!(names(&mesh, Way::Channel).await, "a");
    // Its only endpoint is ejected: the next one takes its requests, if its breaker lets them in.
    leaf_with(&cp, "first", assignment(&[&[a]], HealthStatus::Draining), watched);
    until("the breaker of the second", async || {
        let error = Way::Channel.backend(&mesh, get("/x")).await;
        error.contains("circuit breaker is open") && error.contains("requests limit of 0")
    })
    .await;
    leaf_with(&cp, "second", endpoints(b), |_| {});
    until("b", async || names(&mesh, Way::Layer).await == "b").await;
    leaf_with(&cp, "first", endpoints(a), closed);
    until("the breaker of the first", async || {
        Way::Layer.backend(&mesh, get("/x")).await.contains("circuit breaker is open")
    })
    .await;
    assert_eq!(mesh.channel(crate::support::TARGET).unwrap().load().requests, 0);
}
