//! The xDS client against the xDS server of this crate, over TCP: first config, updates, rejections, outages.
#![cfg(feature = "server")]

use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                Cluster,
                cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy},
            },
            core::v3::{
                Address, AggregatedConfigSource, ConfigSource, Locality, SocketAddress, address,
                config_source::ConfigSourceSpecifier, socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
            listener::v3::{ApiListener, Listener},
            route::v3::{
                Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost, route, route_action, route_match,
            },
        },
        extensions::filters::{
            http::router::v3::Router,
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier,
                http_filter::ConfigType,
            },
        },
    },
    google::protobuf::{Any, UInt32Value},
};
use examples::port::Port;
use mesh_xds::{
    Bootstrap, TargetWatch, XdsClient,
    ads::PlaintextConnect,
    bootstrap::Timing,
    server::{AdsServer, ResourceCache, ResourceSet},
    snapshot::{ClusterEntry, ResourceErrorKind, Snapshot, TargetState},
    status::ClientResourceStatus,
};
use prost::{Message, Name};
use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};
use tokio::time::timeout;

/// A guard against hanging, not a limit on speed.
const GUARD: Duration = Duration::from_secs(30);

/// An address where nobody listens, and that nobody else is given while the test keeps it.
fn nobody() -> Port {
    Port::take(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port")
}

fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn ads() -> Option<ConfigSource> {
    let specifier = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
}

fn listener(name: &str, routes: &str) -> Listener {
    let router = HttpFilter {
        name: "router".into(),
        config_type: Some(ConfigType::TypedConfig(any(&Router::default()))),
        ..HttpFilter::default()
    };
    let http = HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::Rds(Rds { config_source: ads(), route_config_name: routes.into() })),
        http_filters: vec![router],
        ..HttpConnectionManager::default()
    };
    Listener {
        name: name.into(),
        api_listener: Some(ApiListener { api_listener: Some(any(&http)) }),
        ..Listener::default()
    }
}

fn routes(name: &str, clusters: &[&str]) -> RouteConfiguration {
    let route = |cluster: &&str| Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(route_match::PathSpecifier::Prefix(format!("/{cluster}"))),
            ..RouteMatch::default()
        }),
        action: Some(route::Action::Route(RouteAction {
            cluster_specifier: Some(route_action::ClusterSpecifier::Cluster((*cluster).into())),
            ..RouteAction::default()
        })),
        ..Route::default()
    };
    RouteConfiguration {
        name: name.into(),
        virtual_hosts: vec![VirtualHost {
            name: "all".into(),
            domains: vec!["*".into()],
            routes: clusters.iter().map(route).collect(),
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    }
}

fn cluster(name: &str) -> Cluster {
    Cluster {
        name: name.into(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: ads(), service_name: String::new() }),
        ..Cluster::default()
    }
}

fn endpoints(name: &str, ports: &[u16]) -> ClusterLoadAssignment {
    let endpoint = |port: &u16| {
        let socket = SocketAddress {
            address: "127.0.0.1".into(),
            port_specifier: Some(PortSpecifier::PortValue(u32::from(*port))),
            ..SocketAddress::default()
        };
        let address = Address { address: Some(address::Address::SocketAddress(socket)) };
        LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address: Some(address), ..Endpoint::default() })),
            ..LbEndpoint::default()
        }
    };
    ClusterLoadAssignment {
        cluster_name: name.into(),
        endpoints: vec![LocalityLbEndpoints {
            locality: Some(Locality::default()),
            lb_endpoints: ports.iter().map(endpoint).collect(),
            load_balancing_weight: Some(UInt32Value { value: 1 }),
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    }
}

fn greeter(ports: &[u16]) -> ResourceSet {
    ResourceSet::new()
        .listener(listener("greeter", "greeter-routes"))
        .route(routes("greeter-routes", &["v1"]))
        .cluster(cluster("v1"))
        .endpoints(endpoints("v1", ports))
}

fn client(server: SocketAddr) -> XdsClient {
    client_with(server, Timing { backoff_base: Duration::from_millis(50), ..Timing::default() })
}

fn client_with(server: SocketAddr, timing: Timing) -> XdsClient {
    let bootstrap = Bootstrap::builder().server(&server.to_string()).node_id("test-node").timing(timing).build();
    XdsClient::new(Arc::new(bootstrap.expect("a valid bootstrap")), Arc::new(PlaintextConnect))
}

/// Waits for a state that `wanted` accepts.
async fn until<T>(watch: &mut TargetWatch, wanted: impl Fn(&TargetState) -> Option<T>) -> T {
    timeout(GUARD, async {
        loop {
            if let Some(found) = wanted(&watch.state()) {
                return found;
            }
            watch.changed().await.expect("the client is alive");
        }
    })
    .await
    .unwrap_or_else(|_| panic!("no such state; the last one is {:?}", watch.state()))
}

async fn ready(watch: &mut TargetWatch, wanted: impl Fn(&Snapshot) -> bool) -> Arc<Snapshot> {
    until(watch, |state| match state {
        TargetState::Ready(snapshot) if wanted(snapshot) => Some(snapshot.clone()),
        _ => None,
    })
    .await
}

/// The ports of a cluster's endpoints.
fn ports(snapshot: &Snapshot, cluster: &str) -> BTreeSet<u16> {
    match snapshot.clusters.get(cluster) {
        Some(ClusterEntry::Ready { endpoints, .. }) => endpoints
            .priorities
            .iter()
            .flatten()
            .flat_map(|locality| &locality.endpoints)
            .map(|endpoint| endpoint.address.port())
            .collect(),
        other => panic!("cluster {cluster} is {other:?}"),
    }
}

#[tokio::test]
async fn a_target_becomes_ready_and_follows_its_endpoints() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1, 2]));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let client = client(server.addr());
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    let first = ready(&mut watch, |_| true).await;
    assert_eq!(ports(&first, "v1"), BTreeSet::from([1, 2]));
    assert_eq!(first.virtual_host, Some(0));
    assert!(first.version.contains("lds=") && first.version.contains("eds="), "{}", first.version);

    cache.set(greeter(&[2, 3]));
    let second = ready(&mut watch, |snapshot| ports(snapshot, "v1") == BTreeSet::from([2, 3])).await;
    assert!(Arc::ptr_eq(&first.listener, &second.listener), "an unchanged listener keeps its pointer");
    assert!(Arc::ptr_eq(&first.routes, &second.routes), "unchanged routes keep their pointer");

    let status = client.status();
    assert!(status.servers[0].connected);
    assert_eq!(status.resources.len(), 4);
    assert!(status.resources.iter().all(|resource| resource.client_status == ClientResourceStatus::Acked));
}

#[tokio::test]
async fn a_bad_cluster_is_rejected_by_itself_and_the_last_good_version_stays() {
    let cache = ResourceCache::new();
    let both = || {
        greeter(&[1])
            .route(routes("greeter-routes", &["v1", "v2"]))
            .cluster(cluster("v2"))
            .endpoints(endpoints("v2", &[9]))
    };
    cache.set(both());
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let client = client(server.addr());
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    ready(&mut watch, |_| true).await;
    let mut nacks = cache.nacks();

    let bad = Cluster { lb_policy: LbPolicy::ClusterProvided as i32, ..cluster("v1") };
    let moved = Cluster { lb_policy: LbPolicy::Random as i32, ..cluster("v2") };
    cache.set(both().cluster(bad).cluster(moved));
    let nack = timeout(GUARD, nacks.recv()).await.unwrap().unwrap();
    assert!(nack.detail.contains("\"v1\"") && nack.detail.contains("lb_policy: CLUSTER_PROVIDED"), "{}", nack.detail);
    let neighbour = ready(&mut watch, |snapshot| {
        matches!(&snapshot.clusters["v2"], ClusterEntry::Ready { cluster, .. }
            if cluster.lb_policy == mesh_xds::resource::LbPolicy::Random)
    })
    .await;
    assert_eq!(ports(&neighbour, "v1"), BTreeSet::from([1]), "the last good version of v1 is in force");
    let status = client.status();
    let v1 = status.resources.iter().find(|r| &*r.name == "v1" && r.error_state.is_some()).unwrap();
    assert_eq!(v1.client_status, ClientResourceStatus::Nacked);
    assert!(!v1.version.is_empty(), "the accepted version is still named");
}

#[tokio::test]
async fn a_removed_listener_makes_the_target_absent_and_comes_back() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let client = client(server.addr());
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    ready(&mut watch, |_| true).await;
    cache.set(ResourceSet::new());
    let cause = until(&mut watch, |state| match state {
        TargetState::Absent(cause) => Some(cause.clone()),
        _ => None,
    })
    .await;
    assert_eq!(cause.kind, ResourceErrorKind::DoesNotExist);
    assert!(cause.message.contains("Listener \"greeter\""), "{}", cause.message);
    cache.set(greeter(&[4]));
    let back = ready(&mut watch, |_| true).await;
    assert_eq!(ports(&back, "v1"), BTreeSet::from([4]));
}

#[tokio::test]
async fn a_route_to_a_missing_cluster_fails_that_cluster_alone() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]).route(routes("greeter-routes", &["v1", "ghost"])));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let timing = Timing { resource_timeout: Some(Duration::from_millis(300)), ..Timing::default() };
    let client = client_with(server.addr(), timing);
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    let snapshot = ready(&mut watch, |_| true).await;
    assert_eq!(ports(&snapshot, "v1"), BTreeSet::from([1]));
    match &snapshot.clusters["ghost"] {
        ClusterEntry::Failed(cause) => assert!(cause.message.contains("\"ghost\""), "{}", cause.message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_outage_keeps_what_is_in_force_and_an_edit_made_meanwhile_arrives() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]));
    let port = nobody();
    let server = AdsServer::bind(port.addr(), cache.clone()).await.unwrap();
    let client = client(port.addr());
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    ready(&mut watch, |_| true).await;
    server.shutdown().await;
    timeout(GUARD, async {
        while client.status().servers[0].connected || client.status().servers[0].last_error.is_none() {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the loss is noticed");
    assert!(matches!(watch.state(), TargetState::Ready(_)));
    cache.set(greeter(&[7]));
    let _server = AdsServer::bind(port.addr(), cache).await.unwrap();
    let after = ready(&mut watch, |snapshot| ports(snapshot, "v1") == BTreeSet::from([7])).await;
    assert_eq!(after.virtual_host, Some(0));
}

#[tokio::test]
async fn an_unreachable_control_plane_is_named_in_the_pending_state() {
    let unused = nobody();
    let client = client(unused.addr());
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    let cause = until(&mut watch, |state| match state {
        TargetState::Pending { cause } => cause.clone(),
        other => panic!("{other:?}"),
    })
    .await;
    assert_eq!(cause.kind, ResourceErrorKind::Unreachable);
    for part in [unused.addr().to_string().as_str(), "test-node", "refused", "greeter"] {
        assert!(cause.message.contains(part), "{} does not name {part}", cause.message);
    }
    // A second watch knows at once.
    let other = client.watch(None, "other", "other").unwrap();
    assert!(matches!(other.state(), TargetState::Pending { cause: Some(_) }));
}

#[tokio::test]
async fn dropping_the_last_watch_unsubscribes_and_dropping_the_client_disconnects() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let client = client(server.addr());
    let mut first = client.watch(None, "greeter", "greeter").unwrap();
    let mut second = client.watch(None, "greeter", "greeter").unwrap();
    ready(&mut first, |_| true).await;
    ready(&mut second, |_| true).await;
    drop(first);
    assert_eq!(client.status().resources.len(), 4);
    drop(second);
    assert_eq!(client.status().resources.len(), 0);
    // The client itself still holds the connection for a while.
    let mut streams = cache.streams();
    drop(client);
    timeout(GUARD, streams.wait_for(|streams| streams.is_empty())).await.expect("disconnects").unwrap();
}

async fn drop_and_watch_again() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]));
    let server = AdsServer::bind("127.0.0.1:0", cache).await.expect("binds");
    let client = client(server.addr());
    for round in 0..100 {
        let mut watch = client.watch(None, "greeter", "greeter").expect("a known authority");
        ready(&mut watch, |_| true).await;
        drop(watch);
        // Not at all, or anywhere between here and the unsubscription on the wire.
        for _ in 0..round % 5 {
            tokio::task::yield_now().await;
        }
        let mut again = client.watch(None, "greeter", "greeter").expect("a known authority");
        let snapshot = ready(&mut again, |_| true).await;
        assert_eq!(ports(&snapshot, "v1"), BTreeSet::from([1]));
    }
}

#[tokio::test]
async fn a_target_that_is_dropped_and_watched_again_at_once_is_ready() {
    drop_and_watch_again().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_is_dropped_and_watched_again_is_ready_on_many_threads() {
    drop_and_watch_again().await;
}

#[tokio::test]
async fn two_targets_swap_their_clusters_in_one_update_of_shared_routes() {
    let serve = |clusters: [&str; 2]| {
        let host = |(name, cluster): (&str, &str)| VirtualHost {
            name: name.into(),
            domains: vec![name.into()],
            ..routes("", &[cluster]).virtual_hosts.remove(0)
        };
        let virtual_hosts = ["a", "b"].into_iter().zip(clusters).map(host).collect();
        let shared = RouteConfiguration { virtual_hosts, ..routes("shared", &[]) };
        ["a", "b"].iter().fold(ResourceSet::new().route(shared), |set, name| set.listener(listener(name, "shared")))
    };
    let full = |clusters| {
        serve(clusters)
            .cluster(cluster("x"))
            .cluster(cluster("y"))
            .endpoints(endpoints("x", &[1]))
            .endpoints(endpoints("y", &[2]))
    };
    let cache = ResourceCache::new();
    let (there, back) = (["x", "y"], ["y", "x"]);
    cache.set(full(there));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let client = client(server.addr());
    let mut a = client.watch(None, "a", "a").unwrap();
    let mut b = client.watch(None, "b", "b").unwrap();
    for round in 0..10 {
        let now = if round % 2 == 0 { there } else { back };
        cache.set(full(now));
        ready(&mut a, |snapshot| snapshot.clusters.contains_key(now[0])).await;
        ready(&mut b, |snapshot| snapshot.clusters.contains_key(now[1])).await;
    }
}

#[tokio::test]
async fn a_new_cluster_that_is_late_displaces_nothing_before_its_timer() {
    let cache = ResourceCache::new();
    cache.set(greeter(&[1]));
    let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await.unwrap();
    let limit = Duration::from_secs(1);
    let client = client_with(server.addr(), Timing { resource_timeout: Some(limit), ..Timing::default() });
    let mut watch = client.watch(None, "greeter", "greeter").unwrap();
    ready(&mut watch, |_| true).await;
    let asked = tokio::time::Instant::now();
    cache.set(greeter(&[1]).route(routes("greeter-routes", &["ghost"])));
    ready(&mut watch, |snapshot| matches!(snapshot.clusters.get("ghost"), Some(ClusterEntry::Failed(_)))).await;
    assert!(asked.elapsed() >= limit, "given up after {:?}", asked.elapsed());
}
