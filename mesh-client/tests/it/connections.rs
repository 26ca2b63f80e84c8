//! The connections of an endpoint: how many there are, how long they live, and when they are made.

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, Then, World, edit_cluster, greeter, hello, hello_with, http_backend, rule,
    service, until,
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::config::cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
    google::protobuf::UInt32Value,
};
use http_body_util::{BodyExt, Full};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};
use tower::{Layer, ServiceExt, service_fn};

/// The greeter on these endpoints with this connection pool, as flow map.
fn pooled(endpoints: &[std::net::SocketAddr], pool: &str) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|address| ("v1", *address)).collect();
    service(&endpoints) + &rule(&format!("{{connectionPool: {pool}}}"), &[])
}

/// A request through the layer, read to its end.
async fn get(mesh: &Mesh) -> String {
    let inner = service_fn(|_| async { Err::<http::Response<Full<Bytes>>, _>("not for the inner client") });
    let uri = format!("http://{}/x", &TARGET["xds:///".len()..]);
    let request = http::Request::get(uri).body(Full::<Bytes>::default()).unwrap();
    let response = mesh.layer().layer(inner).oneshot(request).await.unwrap();
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn a_connection_serves_so_many_requests_and_no_more() {
    let backend = greeter("one").await;
    let yaml = pooled(&[backend.addr()], "{http: {maxRequestsPerConnection: 2}}");
    let world = World::new(&yaml).await;
    for served in 1..=7u64 {
        hello(&world.channel).await.unwrap();
        assert_eq!(backend.connections(), served.div_ceil(2), "after {served} calls");
    }
    until("used connections are closed", async || world.channel.load().connections <= 1).await;

    let backend = http_backend("r1").await;
    let yaml = pooled(&[backend.addr()], "{http: {maxRequestsPerConnection: 3}}").replace("GRPC", "HTTP");
    let world = World::new(&yaml).await;
    for served in 1..=7u64 {
        assert_eq!(get(&world.mesh).await, "hello from r1 at /x\n");
        assert_eq!(backend.connections(), served.div_ceil(3), "after {served} requests");
    }
}

#[tokio::test]
async fn another_connection_is_made_when_the_streams_of_all_are_used_up() {
    // Requests wait until they are let go, by connection.
    let held = Arc::new(Mutex::new(Vec::new()));
    let keep = held.clone();
    let server = H2Server::limited(2, move |served| {
        keep.lock().unwrap().push(served);
        Then::GoOn
    })
    .await;
    let cp = ControlPlane::builder().yaml(service(&[("v1", server.addr())])).start().await.unwrap();
    // gRFC A105.
    edit_cluster(&cp, CLUSTER, |cluster| {
        let three = Thresholds { max_connections: Some(UInt32Value { value: 3 }), ..Thresholds::default() };
        cluster.circuit_breakers =
            Some(CircuitBreakers { per_host_thresholds: vec![three], ..CircuitBreakers::default() });
    });
    let world = World::on(cp).await;
    let call = || {
        let channel = world.channel.clone();
        tokio::spawn(async move { hello_with(&channel, |r| r.set_timeout(HOUR)).await })
    };
    let mut calls = Vec::new();
    for arrived in 1..=6 {
        calls.push(call());
        until("the request has arrived", async || held.lock().unwrap().len() == arrived).await;
        assert_eq!(server.accepted(), arrived.div_ceil(2), "no sooner than it is needed");
    }
    let mut streams = BTreeMap::<usize, u32>::new();
    for served in &*held.lock().unwrap() {
        *streams.entry(served.connection).or_default() += 1;
    }
    assert_eq!(streams, [(0, 2), (1, 2), (2, 2)].into());

    // All are full and the cap is reached: the next one waits for a stream.
    calls.push(call());
    until("the seventh waits", async || world.channel.load().pending == 1).await;
    assert_eq!((held.lock().unwrap().len(), server.accepted()), (6, 3));
    let first = held.lock().unwrap().remove(0);
    first.ok();
    until("the seventh has its turn", async || held.lock().unwrap().len() == 6 && world.channel.load().pending == 0)
        .await;
    for served in std::mem::take(&mut *held.lock().unwrap()) {
        served.ok();
    }
    for call in calls {
        tokio::time::timeout(GUARD, call).await.expect("hangs").unwrap().unwrap();
    }
    assert_eq!((server.accepted(), server.open()), (3, 3));
    assert!(world.channel.load().is_idle());
}
