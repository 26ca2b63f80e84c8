//! The connections of an endpoint, as requests through `mesh.layer()` see them, over HTTP/1.1 and HTTP/2. What channels see is in
//! `connections`.

#![allow(deprecated, reason = "control planes still send the deprecated fields")]

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, Then, World, assert_says, assignment,
    echo::{Way, get},
    edit_cluster, http_backend, routes, rule, service, to, until,
};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::config::{
            cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
            core::v3::{HealthStatus, Http2ProtocolOptions, KeepaliveSettings},
        },
        google::protobuf::{Duration as ProtoDuration, UInt32Value},
    },
    util::pack_any,
};
use http_body_util::{BodyExt, Full};
use mesh_client::{BoxError, Mesh};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{net::SocketAddr, time::Duration};
use tokio::task::JoinHandle;
use tower::{Layer, ServiceExt, service_fn};

/// The port's protocol in Istio: HTTP/2, HTTP/1.1.
const BOTH: [&str; 2] = ["GRPC", "HTTP"];

/// The greeter's host on these endpoints, in this protocol, without retries and without a timeout; with this traffic policy.
fn served(endpoints: &[SocketAddr], protocol: &str, traffic: &str) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|address| ("v1", *address)).collect();
    let route = format!("[{{route: [{{destination: {}}}], timeout: 0s, retries: {{attempts: 0}}}}]", to(""));
    service(&endpoints).replace("GRPC", protocol) + &routes(&route) + &rule(traffic, &[])
}

/// A request through the layer, read to its end.
async fn fetch(mesh: &Mesh) -> Result<String, BoxError> {
    let inner = service_fn(|_| async { Err::<http::Response<Full<Bytes>>, _>("not for the inner client") });
    let uri = format!("http://{}/x", &TARGET["xds:///".len()..]);
    let request = http::Request::get(uri).body(Full::<Bytes>::default()).unwrap();
    let response = mesh.layer().layer(inner).oneshot(request).await?;
    Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec())?)
}

/// The same in a task of its own.
fn spawn(mesh: &Mesh) -> JoinHandle<Result<String, BoxError>> {
    let mesh = mesh.clone();
    tokio::spawn(async move { fetch(&mesh).await })
}

/// How a request that is under way ends.
async fn ended(request: JoinHandle<Result<String, BoxError>>) -> String {
    tokio::time::timeout(GUARD, request).await.expect("hangs").unwrap().unwrap_err().to_string()
}

#[tokio::test]
async fn another_connection_is_made_when_the_streams_of_all_are_used_up() {
    // Requests wait until they are let go, by connection.
    let (server, held) = H2Server::holding(u32::MAX).await;
    // Two streams of our own on each of up to two connections.
    let yaml = served(&[server.addr()], "GRPC", "{connectionPool: {http: {maxConcurrentStreams: 2}}}");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let max_connections = Some(UInt32Value { value: 2 });
        let thresholds = vec![Thresholds { max_connections, ..Thresholds::default() }];
        cluster.circuit_breakers =
            Some(CircuitBreakers { per_host_thresholds: thresholds, ..CircuitBreakers::default() });
    });
    let world = World::on(cp).await;
    let mut requests = Vec::new();
    for arrived in 1..=4 {
        requests.push(spawn(&world.mesh));
        until("the request has arrived", async || held.lock().unwrap().len() == arrived).await;
        assert_eq!(server.accepted(), arrived.div_ceil(2), "no sooner than it is needed");
    }
    requests.push(spawn(&world.mesh));
    until("the fifth waits", async || world.channel.load().pending == 1).await;
    assert_eq!((held.lock().unwrap().len(), server.accepted()), (4, 2));
    held.lock().unwrap().remove(0).status(200);
    until("the fifth has its turn", async || held.lock().unwrap().len() == 4 && world.channel.load().pending == 0)
        .await;
    for served in std::mem::take(&mut *held.lock().unwrap()) {
        served.status(200);
    }
    for request in requests {
        tokio::time::timeout(GUARD, request).await.expect("hangs").unwrap().unwrap();
    }
    assert!(world.channel.load().is_idle());
}

#[tokio::test]
async fn connections_in_use_are_replaced_when_they_are_old() {
    for protocol in BOTH {
        let backend = http_backend("r1").await;
        let yaml = served(&[backend.addr()], protocol, "{connectionPool: {tcp: {maxConnectionDuration: 50ms}}}");
        let world = World::new(&yaml).await;
        until("it is replaced twice", async || {
            fetch(&world.mesh).await.unwrap();
            backend.connections() >= 3
        })
        .await;
        until("the old ones are closed", async || world.channel.load().connections <= 1).await;
    }
}

#[tokio::test]
async fn a_peer_that_went_silent_is_noticed_by_the_clusters_pings() {
    let silent = H2Server::start(|_| Then::Freeze).await;
    let cp = ControlPlane::builder().yaml(served(&[silent.addr()], "GRPC", "{}")).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let second = |seconds, nanos| Some(ProtoDuration { seconds, nanos });
        let keepalive =
            KeepaliveSettings { interval: second(1, 0), timeout: second(0, 200_000_000), ..Default::default() };
        cluster.typed_extension_protocol_options.clear();
        cluster.http2_protocol_options =
            Some(Http2ProtocolOptions { connection_keepalive: Some(keepalive), ..Default::default() });
    });
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().keepalive(None).build().await.unwrap();
    assert_says(&ended(spawn(&mesh)).await, &["keepalive PING", &silent.addr().to_string()]);
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn tcp_keepalive_probes_the_peer() {
    for protocol in BOTH {
        let backend = http_backend("r1").await;
        let pool = "{connectionPool: {tcp: {tcpKeepalive: {time: 60s, interval: 5s, probes: 3}}}}";
        let world = World::new(&served(&[backend.addr()], protocol, pool)).await;
        fetch(&world.mesh).await.unwrap();
        until("the kernel's timer runs", async || crate::connections::probed_by_tcp(backend.addr().port())).await;
    }
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_peer_that_takes_nothing_is_given_up_after_the_tcp_user_timeout() {
    // It accepts, and reads nothing: the window closes, and what is left of a body cannot be sent.
    let deaf = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let cp = ControlPlane::builder().yaml(served(&[deaf.local_addr().unwrap()], "HTTP", "{}")).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
    let mesh = builder.tcp_user_timeout(Duration::from_millis(300)).build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        let body = Full::from(vec![0; 64 << 20]);
        let error = way.send_body(&mesh, get("/x").method("POST"), body).await.unwrap_err();
        let causes = std::iter::successors(Some(&*error as &dyn std::error::Error), |error| error.source());
        let told = causes.map(ToString::to_string).collect::<Vec<_>>().join("; ");
        assert_says(&told, &["timed out", &deaf.local_addr().unwrap().to_string()]);
    }
}

#[tokio::test]
async fn a_request_to_a_removed_endpoint_goes_on_until_its_time_to_drain_is_over() {
    for protocol in BOTH {
        let (old, new) = (http_backend("old").await, http_backend("new").await);
        let cp = ControlPlane::builder().yaml(served(&[old.addr()], protocol, "{}")).start().await.unwrap();
        let builder =
            Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().drain_timeout(Duration::from_millis(300));
        let mesh = builder.build().await.unwrap();
        old.state().set_delay(HOUR);
        let cut = spawn(&mesh);
        until("it is under way", async || old.state().in_flight() == 1).await;
        cp.apply(&served(&[new.addr()], protocol, "{}")).await.unwrap();
        until("new requests go to the new endpoint", async || {
            let answer = tokio::time::timeout(Duration::from_millis(100), fetch(&mesh)).await;
            answer.is_ok_and(|answer| answer.is_ok_and(|text| text.contains("new")))
        })
        .await;
        assert_says(&ended(cut).await, &["its time to drain is over", &old.addr().to_string()]);
        until("its connection is gone", async || old.state().in_flight() == 0).await;
    }
}

#[tokio::test]
async fn an_endpoint_that_the_control_plane_finds_unhealthy_loses_its_connections() {
    for protocol in BOTH {
        let (bad, good) = (http_backend("bad").await, http_backend("good").await);
        let yaml = served(&[bad.addr()], protocol, "{}");
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, |cluster| cluster.close_connections_on_host_health_failure = true);
        let world = World::on(cp).await;
        bad.state().set_delay(HOUR);
        let cut = spawn(&world.mesh);
        until("it is under way", async || bad.state().in_flight() == 1).await;
        let mut served = assignment(&[&[bad.addr(), good.addr()]], HealthStatus::Healthy);
        served.endpoints[0].lb_endpoints[0].health_status = HealthStatus::Unhealthy.into();
        world.cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(served));
        assert_says(&ended(cut).await, &["its endpoint is unhealthy", &bad.addr().to_string()]);
        for _ in 0..5 {
            assert_eq!(fetch(&world.mesh).await.unwrap(), "hello from good at /x\n");
        }
        until("its connection is closed", async || world.channel.load().connections == 1).await;
    }
}

#[tokio::test]
async fn an_ejected_endpoint_loses_its_connections_where_the_cluster_says_so() {
    for protocol in BOTH {
        let (bad, good) = (http_backend("bad").await, http_backend("good").await);
        let outlier = "{outlierDetection: {consecutive5xxErrors: 1, interval: 3000s, baseEjectionTime: 3000s, \
                       maxEjectionPercent: 50}}";
        let yaml = served(&[bad.addr(), good.addr()], protocol, outlier);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, |cluster| cluster.close_connections_on_host_health_failure = true);
        let world = World::on(cp).await;
        // One request is held there, the next one fails there.
        bad.state().set_delay(HOUR);
        let mut requests = Vec::new();
        until("one is held", async || {
            requests.push(spawn(&world.mesh));
            tokio::task::yield_now().await;
            bad.state().in_flight() == 1
        })
        .await;
        bad.state().set_delay(Duration::ZERO);
        bad.state().set_unavailable(true);
        until("it is ejected", async || {
            let _ = fetch(&world.mesh).await;
            world.explain().contains("ejected for")
        })
        .await;
        let mut cut = 0;
        for request in requests {
            // Those that were answered went to the other endpoint.
            if let Err(error) = tokio::time::timeout(GUARD, request).await.expect("hangs").unwrap() {
                assert_says(&error.to_string(), &["its endpoint is unhealthy", &bad.addr().to_string()]);
                cut += 1;
            }
        }
        assert!(cut >= 1, "what was held is cut");
    }
}
