//! The connections of an endpoint: how many there are, how long they live, and when they are made.

#![allow(deprecated, reason = "control planes still send the deprecated fields")]

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, Then, World, assert_says, assignment, echo::Way, edit_cluster, greeter,
    hello, hello_with, http_backend, routes, rule, service, to, until,
};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::config::{
            cluster::v3::{CircuitBreakers, Cluster, circuit_breakers::Thresholds, cluster::PreconnectPolicy},
            core::v3::{HealthStatus, Http2ProtocolOptions, KeepaliveSettings},
        },
        google::protobuf::{DoubleValue, Duration as ProtoDuration, UInt32Value},
    },
    util::pack_any,
};
use examples::greeter::{HelloReply, HelloRequest, greeter_client::GreeterClient};
use http_body_util::{BodyExt, Full};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinSet};
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
    edit_cluster(&cp, CLUSTER, per_host(3));
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

/// A cluster that opens up to so many HTTP/2 connections per endpoint (gRFC A105).
fn per_host(max: u32) -> impl FnOnce(&mut Cluster) {
    move |cluster| {
        let thresholds = Thresholds { max_connections: Some(UInt32Value { value: max }), ..Thresholds::default() };
        cluster.circuit_breakers =
            Some(CircuitBreakers { per_host_thresholds: vec![thresholds], ..CircuitBreakers::default() });
    }
}

/// A call in a task of its own, with a far deadline.
fn spawn_by(way: Way, mesh: &Mesh) -> tokio::task::JoinHandle<Result<HelloReply, tonic::Status>> {
    let mesh = mesh.clone();
    tokio::spawn(async move { way.hello_with(&mesh, |r| r.set_timeout(HOUR)).await })
}

#[tokio::test]
async fn our_own_limit_of_streams_counts_beside_the_peers() {
    for way in Way::BOTH {
        let (server, held) = H2Server::holding(u32::MAX).await;
        let yaml = pooled(&[server.addr()], "{http: {maxConcurrentStreams: 1}}");
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, per_host(2));
        let world = World::on(cp).await;
        let calls: Vec<_> = (0..3).map(|_| spawn_by(way, &world.mesh)).collect();
        until("one call waits", async || held.lock().unwrap().len() == 2 && world.channel.load().pending == 1).await;
        assert_eq!(server.accepted(), 2);
        let connections: Vec<_> = held.lock().unwrap().iter().map(|served| served.connection).collect();
        assert_ne!(connections[0], connections[1], "one stream each");
        for served in std::mem::take(&mut *held.lock().unwrap()) {
            served.ok();
        }
        until("the third has its turn", async || held.lock().unwrap().len() == 1).await;
        held.lock().unwrap().remove(0).ok();
        for call in calls {
            tokio::time::timeout(GUARD, call).await.expect("hangs").unwrap().unwrap();
        }
    }
}

#[tokio::test]
async fn idle_connections_are_closed() {
    for (protocol, pool) in [("GRPC", "{http: {idleTimeout: 100ms}}"), ("HTTP", "{http: {idleTimeout: 100ms}}")] {
        let server = http_backend("r1").await;
        let yaml = pooled(&[server.addr()], pool).replace("GRPC", protocol);
        let world = World::new(&yaml).await;
        assert_eq!(get(&world.mesh).await, "hello from r1 at /x\n");
        until("the idle connection is closed", async || world.channel.load().connections == 0).await;
        assert_eq!(get(&world.mesh).await, "hello from r1 at /x\n");
        assert_eq!(server.connections(), 2, "{protocol}: the next request connects again");
    }
}

#[tokio::test]
async fn connections_in_use_are_replaced_when_they_are_old() {
    let backend = greeter("one").await;
    let yaml = pooled(&[backend.addr()], "{tcp: {maxConnectionDuration: 50ms}}");
    let world = World::new(&yaml).await;
    // A stream on the first connection outlives its time to take new ones.
    let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
    let mut replies = GreeterClient::new(world.channel.clone()).say_hellos(request).await.unwrap().into_inner();
    until("it is replaced twice", async || {
        hello(&world.channel).await.unwrap();
        backend.connections() >= 3
    })
    .await;
    for _ in 0..100 {
        assert_eq!(replies.message().await.unwrap().unwrap().backend, "one", "what runs on an old connection goes on");
    }
    drop(replies);
    until("the old ones are closed", async || world.channel.load().connections <= 1).await;
}

#[tokio::test]
async fn http2_keepalive_is_the_clusters() {
    let silent = H2Server::start(|_| Then::Freeze).await;
    let cp = ControlPlane::builder().yaml(service(&[("v1", silent.addr())])).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let second = |seconds, nanos| Some(ProtoDuration { seconds, nanos });
        let keepalive = KeepaliveSettings { interval: second(1, 0), timeout: second(2, 0), ..Default::default() };
        let http2 = Http2ProtocolOptions { connection_keepalive: Some(keepalive), ..Default::default() };
        cluster.typed_extension_protocol_options.clear();
        cluster.http2_protocol_options = Some(http2);
    });
    // The mesh has none of its own.
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().keepalive(None).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    let call = hello_with(&channel, |r| r.set_timeout(HOUR));
    let status = tokio::time::timeout(GUARD, call).await.expect("nobody noticed").unwrap_err();
    assert_says(status.message(), &["keepalive PING", &silent.addr().to_string()]);
}

/// Whether the kernel's keepalive timer runs on our socket to this port.
#[cfg(target_os = "linux")]
pub(crate) fn probed_by_tcp(port: u16) -> bool {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let to = format!(":{port:04X}");
    // sl local_address rem_address st tx:rx tr:when: timer 2 is keepalive, state 1 is established.
    table
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .any(|fields| fields[2].ends_with(&to) && fields[3] == "01" && fields[5].starts_with("02:"))
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn tcp_keepalive_probes_the_peer() {
    let (probed, plain) = (greeter("probed").await, greeter("plain").await);
    let pool = "{tcp: {tcpKeepalive: {time: 60s, interval: 5s, probes: 3}}}";
    let world = World::new(&pooled(&[probed.addr()], pool)).await;
    hello(&world.channel).await.unwrap();
    // The timer is seen once nothing else is: data in flight has one of its own.
    until("the kernel's timer runs", async || probed_by_tcp(probed.addr().port())).await;
    let world = World::new(&service(&[("v1", plain.addr())])).await;
    hello(&world.channel).await.unwrap();
    assert!(!probed_by_tcp(plain.addr().port()));
}

#[tokio::test]
async fn connections_are_made_ahead_of_requests() {
    let backend = http_backend("slow").await;
    let yaml = service(&[("v1", backend.addr())]).replace("GRPC", "HTTP");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let ratio = Some(DoubleValue { value: 2.0 });
        cluster.preconnect_policy =
            Some(PreconnectPolicy { per_upstream_preconnect_ratio: ratio, ..PreconnectPolicy::default() });
    });
    let world = World::on(cp).await;
    assert_eq!(world.channel.load().connections, 0, "none without a request");
    backend.state().set_delay(HOUR);
    let mut requests = Vec::new();
    for in_flight in 1..=3u64 {
        let mesh = world.mesh.clone();
        requests.push(tokio::spawn(async move { get(&mesh).await }));
        until("two connections for each request", async || {
            backend.state().in_flight() == in_flight && backend.connections() == 2 * in_flight
        })
        .await;
    }
    requests.iter().for_each(tokio::task::JoinHandle::abort);
}

#[tokio::test]
async fn connections_are_foreseen_on_the_endpoints_that_come_next() {
    let backends = [http_backend("one").await, http_backend("two").await];
    let yaml = service(&[("v1", backends[0].addr()), ("v1", backends[1].addr())]).replace("GRPC", "HTTP");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let ratio = Some(DoubleValue { value: 2.0 });
        cluster.preconnect_policy =
            Some(PreconnectPolicy { predictive_preconnect_ratio: ratio, ..PreconnectPolicy::default() });
    });
    let world = World::on(cp).await;
    assert_eq!(world.channel.load().connections, 0, "none without a request");
    backends.iter().for_each(|backend| backend.state().set_delay(HOUR));
    let counts = || {
        let mut connections: Vec<_> = backends.iter().map(|backend| backend.connections()).collect();
        connections.sort_unstable();
        (backends.iter().map(|backend| backend.state().in_flight()).sum::<u64>(), connections)
    };
    let mesh = world.mesh.clone();
    let first = tokio::spawn(async move { get(&mesh).await });
    until("one for the request, and one at the other endpoint", async || counts() == (1, vec![1, 1])).await;
    let mesh = world.mesh.clone();
    let second = tokio::spawn(async move { get(&mesh).await });
    until("twice as many as requests", async || {
        let (in_flight, connections) = counts();
        in_flight == 2 && connections.iter().sum::<u64>() == 4
    })
    .await;
    first.abort();
    second.abort();
}

#[tokio::test]
async fn a_cluster_makes_so_many_handshakes_at_once_and_no_more() {
    for way in Way::BOTH {
        const ENDPOINTS: usize = 160;
        const CALLS: usize = 320;
        // Endpoints that take connections and, for now, say nothing: each handshake begun stays.
        let mut listeners = Vec::new();
        for _ in 0..ENDPOINTS {
            listeners.push(TcpListener::bind("127.0.0.1:0").await.unwrap());
        }
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        let (begun, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
        let mut servers = JoinSet::new();
        for listener in listeners {
            let (begun, go) = (begun.clone(), go.clone());
            servers.spawn(async move {
                let (tcp, _) = listener.accept().await.unwrap();
                // The preface says that the handshake has begun. To be told that there may be something to read is not enough.
                assert!(tcp.peek(&mut [0]).await.unwrap() > 0);
                begun.fetch_add(1, SeqCst);
                go.acquire().await.unwrap().forget();
                let mut h2: h2::server::Connection<_, Bytes> = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, mut respond))) = h2.accept().await {
                    let head = http::Response::builder().header("content-type", "application/grpc");
                    respond.send_response(head.header("grpc-status", "0").body(()).unwrap(), true).unwrap();
                }
            });
        }
        let world = World::new(&pooled(&addresses, "{tcp: {connectTimeout: 20s}}")).await;
        let calls: Vec<_> = (0..CALLS).map(|_| spawn_by(way, &world.mesh)).collect();
        until("as many as may be have begun", async || begun.load(SeqCst) == 64).await;
        until("all others wait", async || world.channel.load().pending as usize == CALLS).await;
        assert_eq!(begun.load(SeqCst), 64);
        go.add_permits(ENDPOINTS);
        for call in calls {
            // An empty response: only that it came counts.
            let _ = tokio::time::timeout(GUARD, call).await.expect("hangs").unwrap();
        }
    }
}

#[tokio::test]
async fn a_stream_to_a_removed_endpoint_is_cut_when_its_time_to_drain_is_over() {
    let (old, new) = (greeter("old").await, greeter("new").await);
    let cp = ControlPlane::builder().yaml(service(&[("old", old.addr())])).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().drain_timeout(Duration::from_millis(300));
    let channel = builder.build().await.unwrap().channel(TARGET).unwrap();
    let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
    let mut replies = GreeterClient::new(channel.clone()).say_hellos(request).await.unwrap().into_inner();
    replies.message().await.unwrap().unwrap();
    cp.apply(&service(&[("new", new.addr())])).await.unwrap();
    until("new calls go to the new endpoint", async || hello(&channel).await.unwrap().backend == "new").await;
    let removed = tokio::time::Instant::now();
    let mut after = 0;
    let status = loop {
        match tokio::time::timeout(GUARD, replies.message()).await.expect("neither goes on nor ends") {
            Ok(reply) => {
                assert_eq!(reply.expect("an error comes before the end").backend, "old");
                after += 1;
            }
            Err(status) => break status,
        }
    };
    assert!(after > 0 && removed.elapsed() >= Duration::from_millis(150), "{after} in {:?}", removed.elapsed());
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &["its time to drain is over", &old.addr().to_string()]);
    until("its connection is gone", async || channel.load().connections == 1 && old.state().in_flight() == 0).await;
    assert!(channel.load().is_idle());
}

#[tokio::test]
async fn an_endpoint_that_the_control_plane_finds_unhealthy_loses_its_connections() {
    for cut in [false, true] {
        let (bad, good) = (greeter("bad").await, greeter("good").await);
        let yaml = service(&[("v1", bad.addr()), ("v1", good.addr())]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, |cluster| cluster.close_connections_on_host_health_failure = cut);
        let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().drain_timeout(HOUR);
        let channel = builder.build().await.unwrap().channel(TARGET).unwrap();
        let mut replies = loop {
            let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
            let mut replies = GreeterClient::new(channel.clone()).say_hellos(request).await.unwrap().into_inner();
            if replies.message().await.unwrap().unwrap().backend == "bad" {
                break replies;
            }
        };
        let mut served = assignment(&[&[bad.addr(), good.addr()]], HealthStatus::Healthy);
        served.endpoints[0].lb_endpoints[0].health_status = HealthStatus::Unhealthy.into();
        cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(served));
        if cut {
            let status = loop {
                if let Err(status) = tokio::time::timeout(GUARD, replies.message()).await.expect("hangs") {
                    break status;
                }
            };
            assert_says(status.message(), &["its endpoint is unhealthy", &bad.addr().to_string()]);
        } else {
            until("no new call goes there", async || {
                let before = bad.state().calls();
                hello(&channel).await.unwrap();
                hello(&channel).await.unwrap();
                bad.state().calls() == before
            })
            .await;
            for _ in 0..100 {
                replies.message().await.unwrap().unwrap();
            }
            drop(replies);
        }
        until("all calls go to the other", async || hello(&channel).await.is_ok_and(|r| r.backend == "good")).await;
        until("its connection is closed", async || channel.load().connections == 1).await;
        assert!(channel.load().is_idle());
    }
}

#[tokio::test]
async fn an_ejected_endpoint_loses_its_connections_where_the_cluster_says_so() {
    let (bad, good) = (greeter("bad").await, greeter("good").await);
    let outlier = "{outlierDetection: {consecutive5xxErrors: 1, interval: 3000s, baseEjectionTime: 3000s, maxEjectionPercent: 50}}";
    let no_retry = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let yaml = service(&[("v1", bad.addr()), ("v1", good.addr())]) + &rule(outlier, &[]) + &no_retry;
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| cluster.close_connections_on_host_health_failure = true);
    let world = World::on(cp).await;
    let mut replies = loop {
        let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
        let mut replies = GreeterClient::new(world.channel.clone()).say_hellos(request).await.unwrap().into_inner();
        if replies.message().await.unwrap().unwrap().backend == "bad" {
            break replies;
        }
    };
    bad.state().set_unavailable(true);
    until("it is ejected", async || {
        let _ = hello(&world.channel).await;
        world.explain().contains("ejected for")
    })
    .await;
    let status = loop {
        if let Err(status) = tokio::time::timeout(GUARD, replies.message()).await.expect("hangs") {
            break status;
        }
    };
    assert_says(status.message(), &["its endpoint is unhealthy", &bad.addr().to_string()]);
    until("only one connection is left", async || {
        // The other one may not have been called yet.
        let _ = hello(&world.channel).await;
        world.channel.load().connections == 1
    })
    .await;
}
