//! Policies beside round robin: what callers and backends see of each.

use crate::support::{
    CLUSTER, GUARD, HOUR, TARGET, World, assert_says, assignment,
    echo::{Way, get},
    edit_cluster, greeter, hello, hello_with,
    memory::{Host, Memory},
    routes, service, to, until,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{Cluster, LoadBalancingPolicy, load_balancing_policy::Policy},
                core::v3::{HealthStatus, RuntimeDouble, TypedExtensionConfig},
            },
            extensions::load_balancing_policies::{
                least_request::v3::{LeastRequest, least_request::SelectionMethod},
                pick_first::v3::PickFirst,
                random_subsetting::v3::RandomSubsetting,
                round_robin::v3::RoundRobin,
            },
        },
        google::protobuf::{Any, Struct, UInt32Value, Value, value::Kind},
    },
    util::pack_any,
};
use examples::backend::Backend;
use futures::future::join_all;
use mesh_client::{
    Mesh,
    balance::{EndpointInfo, EndpointPicker, Endpoints, LbPolicyFactory, PickRequest},
};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use prost::Message;
use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];

/// `xds.type.v3.TypedStruct`
#[derive(Clone, PartialEq, Message)]
struct TypedStruct {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(message, optional, tag = "2")]
    value: Option<Struct>,
}

fn typed(name: &str, fields: &[(&str, Kind)]) -> Any {
    let value = |(key, kind): &(&str, Kind)| ((*key).to_owned(), Value { kind: Some(kind.clone()) });
    let value = Some(Struct { fields: fields.iter().map(value).collect() });
    let typed = TypedStruct { type_url: format!("type.googleapis.com/{name}"), value };
    Any { type_url: "type.googleapis.com/xds.type.v3.TypedStruct".into(), value: typed.encode_to_vec() }
}

fn list(configs: Vec<Any>) -> LoadBalancingPolicy {
    let policy = |config: Any| Policy {
        typed_extension_config: Some(TypedExtensionConfig { name: "lb".into(), typed_config: Some(config) }),
    };
    LoadBalancingPolicy { policies: configs.into_iter().map(policy).collect() }
}

/// gRFC A52.
fn policy(configs: Vec<Any>) -> impl FnOnce(&mut Cluster) {
    move |cluster| cluster.load_balancing_policy = Some(list(configs))
}

async fn backends(count: usize) -> Vec<Backend> {
    join_all(NAMES[..count].iter().map(|name| greeter(name))).await
}

/// The greeter on these backends, without retries.
async fn control_plane(backends: &[Backend], change: impl FnOnce(&mut Cluster)) -> ControlPlane {
    plane_of(backends.iter().map(Backend::addr), change).await
}

async fn plane_of(addresses: impl Iterator<Item = SocketAddr>, change: impl FnOnce(&mut Cluster)) -> ControlPlane {
    let endpoints: Vec<_> = addresses.map(|address| ("v1", address)).collect();
    let routes = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let cp = ControlPlane::builder().yaml(service(&endpoints) + &routes).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, change);
    cp
}

#[tokio::test]
async fn pick_first_stays_with_one_endpoint_until_it_cannot_be_reached() {
    let mut backends = backends(3).await;
    let config = pack_any(PickFirst { shuffle_address_list: false });
    let world = World::on(control_plane(&backends, policy(vec![config])).await).await;
    let all_at = async |name: &str| {
        for way in Way::BOTH {
            assert_eq!(way.calls(&world.mesh, 15).await, [(name.to_owned(), 15)].into(), "{way:?}");
        }
    };
    all_at("a").await;
    assert_eq!(backends[1].connections() + backends[2].connections(), 0, "the others are left alone");
    backends[0].kill().await;
    until("the next one takes over", async || hello(&world.channel).await.is_ok_and(|reply| reply.backend == "b"))
        .await;
    all_at("b").await;
    backends[0].restart().await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    all_at("b").await;
}

#[tokio::test]
async fn shuffled_pick_first_starts_anywhere_and_then_stays() {
    let backends = backends(4).await;
    let config = pack_any(PickFirst { shuffle_address_list: true });
    let cp = control_plane(&backends, policy(vec![config])).await;
    for way in Way::BOTH {
        let mut firsts = BTreeMap::new();
        for _ in 0..24 {
            let mesh = crate::support::mesh_on(&cp).await;
            // Of a target that nobody holds any more nothing is remembered.
            let _channel = mesh.channel(TARGET).unwrap();
            let seen = way.calls(&mesh, 5).await;
            assert_eq!(seen.len(), 1, "{seen:?}");
            *firsts.entry(seen.into_keys().next().unwrap()).or_insert(0) += 1;
        }
        assert!(firsts.len() >= 3, "{way:?}: {firsts:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn peak_ewma_leaves_slow_and_failing_endpoints() {
    let ewma = [("penaltyMs", Kind::NumberValue(20_000.0)), ("decayMs", Kind::NumberValue(60_000.0))];
    for way in Way::BOTH {
        let net = Memory::new();
        let hosts = NAMES[..3].iter().map(|name| net.host(name)).collect::<Vec<_>>();
        hosts.iter().for_each(|host| host.set_delay(Duration::from_millis(10)));
        let mesh =
            net.mesh(&plane_of(hosts.iter().map(Host::addr), policy(vec![typed("peak_ewma", &ewma)])).await).await;
        let _channel = mesh.channel(TARGET).unwrap();
        // Many at once: each is asked.
        join_all((0..24).map(|_| way.backend(&mesh, get("/x")))).await;
        assert!(hosts.iter().all(|host| !host.seen("/x").is_empty()));
        hosts[0].set_delay(Duration::from_millis(700));
        until("the slow one was asked", async || way.backend(&mesh, get("/x")).await == "a").await;
        let seen = way.spread(&mesh, 100).await;
        assert_eq!(seen.get("a"), None, "{seen:?}");
        // It fails at once, which is quick: the penalty makes it dear.
        hosts[1].set_status(503);
        until("the failing one was asked", async || way.backend(&mesh, get("/x")).await == "b").await;
        let seen = way.spread(&mesh, 100).await;
        assert_eq!(seen.get("b"), None, "{seen:?}");
        assert!(
            seen["c"] > 40 && seen["a"] > 5,
            "one of two draws: the slow one is better than the failing one: {seen:?}"
        );
    }
}

#[tokio::test]
async fn a_client_uses_its_own_part_of_the_endpoints() {
    let backends = backends(5).await;
    let child = Some(list(vec![pack_any(RoundRobin::default())]));
    let config = RandomSubsetting { subset_size: Some(UInt32Value { value: 2 }), child_policy: child };
    let cp = control_plane(&backends, policy(vec![pack_any(config)])).await;
    let mut parts = BTreeMap::new();
    for _ in 0..12 {
        let mesh = crate::support::mesh_on(&cp).await;
        let _channel = mesh.channel(TARGET).unwrap();
        for way in Way::BOTH {
            let seen = way.calls(&mesh, 10).await;
            assert_eq!(seen.values().collect::<Vec<_>>(), [&5, &5], "{seen:?}");
            *parts.entry(seen.into_keys().collect::<Vec<_>>()).or_insert(0) += 1;
        }
    }
    assert!(parts.values().all(|times| times % 2 == 0), "either way the part is the same: {parts:?}");
    assert!(parts.len() >= 3, "clients have different parts: {parts:?}");
    let used: std::collections::BTreeSet<_> = parts.keys().flatten().collect();
    assert!(used.len() >= 4, "together they use nearly all: {parts:?}");
}

#[tokio::test]
async fn least_request_of_many_draws_finds_the_idle_endpoint() {
    let backends = backends(5).await;
    let config = LeastRequest { choice_count: Some(UInt32Value { value: 10 }), ..LeastRequest::default() };
    let world = World::on(control_plane(&backends, policy(vec![pack_any(config)])).await).await;
    for backend in &backends[..4] {
        backend.state().set_delay(Duration::from_millis(1500));
    }
    // Eight slow calls on each of four.
    let slow: Vec<_> = (0..32)
        .map(|i| {
            let (mesh, way) = (world.mesh.clone(), Way::BOTH[i % 2]);
            tokio::spawn(async move { way.hello_with(&mesh, |r| r.set_timeout(GUARD)).await })
        })
        .collect();
    until("they are busy, and all other answers were read", async || {
        let busy = backends[..4].iter().map(|backend| backend.state().in_flight()).sum::<u64>();
        busy >= 20 && u64::from(world.channel.load().requests) == busy
    })
    .await;
    // A draw misses it with a chance of 0.8^10; of two draws it would be found by a third.
    let seen = join_all((0..6).map(|i| Way::BOTH[i % 2].hello(&world.mesh))).await;
    let idle = seen.iter().filter(|reply| reply.as_ref().is_ok_and(|reply| reply.backend == "e")).count();
    assert!(idle >= 3, "{idle} of 6 went to the idle one");
    for call in slow {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn least_request_by_a_full_scan_always_finds_the_idle_endpoint() {
    let backends = backends(5).await;
    let config = LeastRequest { selection_method: SelectionMethod::FullScan.into(), ..LeastRequest::default() };
    let world = World::on(control_plane(&backends, policy(vec![pack_any(config)])).await).await;
    for backend in &backends[..4] {
        backend.state().set_delay(Duration::from_secs(3600));
    }
    let mut held = tokio::task::JoinSet::new();
    let busy = || backends[..4].iter().filter(|backend| backend.state().in_flight() > 0).count();
    until("four are busy", async || {
        let channel = world.channel.clone();
        held.spawn(async move { hello_with(&channel, |r| r.set_timeout(GUARD)).await });
        tokio::time::sleep(Duration::from_millis(5)).await;
        busy() == 4
    })
    .await;
    for way in Way::BOTH {
        for _ in 0..10 {
            assert_eq!(way.greeter(&world.mesh, &[]).await, "e", "{way:?}");
        }
    }
}

#[tokio::test]
async fn the_bias_of_least_request_turns_load_into_weight() {
    let backends = backends(2).await;
    // Load counts for nothing: by weight alone, 1 to 4, although the second is busy.
    let bias = Some(RuntimeDouble { default_value: 0.0, runtime_key: String::new() });
    let config = LeastRequest { active_request_bias: bias, ..LeastRequest::default() };
    let cp = control_plane(&backends, policy(vec![pack_any(config)])).await;
    let addresses: Vec<_> = backends.iter().map(|backend| backend.addr()).collect();
    let mut served = assignment(&[&addresses], HealthStatus::Healthy);
    for (endpoint, weight) in served.endpoints[0].lb_endpoints.iter_mut().zip([1, 4]) {
        endpoint.load_balancing_weight = Some(UInt32Value { value: weight });
    }
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(served));
    let world = World::on(cp).await;
    until("both are connected", async || Way::Channel.calls(&world.mesh, 10).await.len() == 2).await;
    backends[1].state().set_delay(HOUR);
    let held: Vec<_> = (0..40)
        .map(|i| {
            let (mesh, way) = (world.mesh.clone(), Way::BOTH[i % 2]);
            tokio::spawn(async move { way.hello_with(&mesh, |r| r.set_timeout(GUARD)).await })
        })
        .collect();
    let taken = async || backends[1].state().in_flight();
    // 40 requests, of which four fifths hang: by load, nearly all would go to the first.
    until("most hang", async || taken().await >= 24).await;
    assert!(taken().await <= 39, "{}", taken().await);
    held.iter().for_each(tokio::task::JoinHandle::abort);
}

/// The endpoint whose port is the greatest, or that a header names by its place.
struct Greatest;

struct GreatestPicker {
    best: usize,
    step: usize,
}

impl LbPolicyFactory for Greatest {
    fn build(&self, config: &serde_json::Value, endpoints: Vec<EndpointInfo>) -> Box<dyn EndpointPicker> {
        let best = (0..endpoints.len()).max_by_key(|i| endpoints[*i].address.port()).unwrap_or(0);
        Box::new(GreatestPicker { best, step: usize::from(config["step"] == 1.0) })
    }
}

impl EndpointPicker for GreatestPicker {
    fn pick(&self, request: &PickRequest<'_>, endpoints: &dyn Endpoints) -> Option<usize> {
        match request.headers.and_then(|headers| headers.get("x-place")) {
            Some(place) => place.to_str().ok()?.parse().ok(),
            None => Some((self.best + self.step) % endpoints.len()),
        }
    }
}

#[tokio::test]
async fn a_policy_of_the_programs_own_chooses() {
    let mut backends = backends(3).await;
    let step = [("step", Kind::NumberValue(1.0))];
    // What is not known is passed over.
    let configs =
        vec![typed("com.example.Unknown", &[]), typed("com.example.Greatest", &step), pack_any(RoundRobin::default())];
    let cp = control_plane(&backends, policy(configs)).await;
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
    let mesh = builder.lb_policy("Greatest", Greatest).build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    let best = (0..3).max_by_key(|i| backends[*i].addr().port()).unwrap();
    let chosen = (best + 1) % 3;
    for way in Way::BOTH {
        assert_eq!(way.calls(&mesh, 10).await, [(NAMES[chosen].to_owned(), 10)].into());
        for (place, name) in NAMES.iter().enumerate().take(3) {
            assert_eq!(way.greeter(&mesh, &[("x-place", &place.to_string())]).await, *name);
        }
    }
    // A choice that cannot be reached: another takes its place.
    backends[chosen].kill().await;
    for way in Way::BOTH {
        until("another one serves", async || way.hello(&mesh).await.is_ok()).await;
        let seen = way.calls(&mesh, 10).await;
        assert!(seen.keys().all(|name| name != NAMES[chosen]), "{seen:?}");
    }
    // A mesh without it takes the next policy of the list.
    let other = crate::support::mesh_on(&cp).await;
    let _channel = other.channel(TARGET).unwrap();
    backends[chosen].restart().await.unwrap();
    for way in Way::BOTH {
        until("round robin", async || way.calls(&other, 6).await.len() == 3).await;
    }
}

#[tokio::test]
async fn a_cluster_without_a_policy_that_is_known_is_refused() {
    let backends = backends(1).await;
    let cp = control_plane(&backends, |_| {}).await;
    let world = World::on(cp).await;
    edit_cluster(&world.cp, CLUSTER, policy(vec![typed("com.example.Unknown", &[])]));
    until("it is refused", async || {
        world.mesh.status().unwrap().resources.iter().any(|resource| resource.error_state.is_some())
    })
    .await;
    let status = world.mesh.status().unwrap();
    let error = status.resources.iter().find_map(|resource| resource.error_state.as_ref()).unwrap();
    assert_says(&format!("{error:?}"), &["no supported policy", "com.example.Unknown"]);
    for way in Way::BOTH {
        assert!(way.hello(&world.mesh).await.is_ok(), "the last good configuration serves on");
    }
}
