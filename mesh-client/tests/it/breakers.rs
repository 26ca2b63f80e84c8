//! Circuit breakers beyond the limits of one priority: by priority, by endpoint, of retries; and what is told of them.

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, assert_says,
    echo::{Way, get},
    edit, edit_cluster, envoy_mesh, greeter, http_backend, mesh_on, routes, service, to, until,
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{CircuitBreakers, circuit_breakers::Thresholds},
        core::v3::RoutingPriority,
        route::v3::{RouteConfiguration, route::Action},
    },
    google::protobuf::UInt32Value,
};
use futures::{FutureExt, StreamExt, future::LocalBoxFuture, stream::FuturesUnordered};
use mesh_client::{BoxError, Error, Mesh};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// The greeter without retries: requests for `/high` have priority HIGH.
fn two_routes(endpoints: &[std::net::SocketAddr]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|address| ("v1", *address)).collect();
    let destination = to("");
    service(&endpoints)
        + &routes(&format!(
            "[{{name: high, match: [{{uri: {{prefix: /high}}}}], route: [{{destination: {destination}}}], retries: \
             {{attempts: 0}}}}, {{name: rest, route: [{{destination: {destination}}}], retries: {{attempts: 0}}}}]"
        ))
}

/// A control plane that gives the first route priority HIGH and the cluster these limits.
async fn limited(yaml: String, thresholds: Vec<Thresholds>) -> ControlPlane {
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit(&cp, ResourceType::RouteConfiguration, CLUSTER, |routes: &mut RouteConfiguration| {
        let Some(Action::Route(action)) = &mut routes.virtual_hosts[0].routes[0].action else { panic!("it forwards") };
        action.priority = RoutingPriority::High.into();
    });
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.circuit_breakers = Some(CircuitBreakers { thresholds, ..CircuitBreakers::default() });
    });
    cp
}

fn of(priority: RoutingPriority) -> Thresholds {
    Thresholds { priority: priority.into(), ..Thresholds::default() }
}

/// Requests on their way.
type Calls = FuturesUnordered<LocalBoxFuture<'static, Result<http::Response<Bytes>, BoxError>>>;

fn start(calls: &Calls, way: Way, mesh: &Mesh, path: &'static str) {
    let mesh = mesh.clone();
    calls.push(async move { way.send(&mesh, get(path), "").await }.boxed_local());
}

/// As `until`, while the calls go on; none may end.
async fn meanwhile(calls: &mut Calls, what: &str, holds: impl AsyncFnMut() -> bool) {
    tokio::select! {
        () = until(what, holds) => {}
        ended = calls.next() => panic!("{what}: a call ended before: {ended:?}"),
    }
}

/// Why it was refused.
fn refused(error: &BoxError) -> String {
    let error = error.downcast_ref::<Error>().expect("an error of the mesh");
    assert!(error.is_overloaded() && error.is_local() && error.is_unavailable(), "{error:?}");
    assert_eq!(error.to_response().status(), 503);
    assert_eq!(error.to_response().headers()["x-envoy-overloaded"], "true");
    error.to_string()
}

#[tokio::test]
async fn each_priority_has_limits_of_its_own() {
    for way in Way::BOTH {
        let (server, held) = H2Server::holding(u32::MAX).await;
        let default = Thresholds { max_requests: number(1), ..of(RoutingPriority::Default) };
        let high = Thresholds { max_requests: number(2), ..of(RoutingPriority::High) };
        let cp = limited(two_routes(&[server.addr()]), vec![high, default]).await;
        let mesh = mesh_on(&cp).await;
        let mut calls = Calls::new();
        start(&calls, way, &mesh, "/x");
        meanwhile(&mut calls, "one of priority DEFAULT is in flight", async || held.lock().unwrap().len() == 1).await;
        let error = way.send(&mesh, get("/x"), "").await.unwrap_err();
        assert_says(&refused(&error), &["max_requests limit of 1 reached (route rest"]);
        for arrived in [2, 3] {
            start(&calls, way, &mesh, "/high");
            meanwhile(&mut calls, "one of priority HIGH is in flight", async || held.lock().unwrap().len() == arrived)
                .await;
        }
        let error = way.send(&mesh, get("/high"), "").await.unwrap_err();
        assert_says(&refused(&error), &["max_requests limit of 2 reached (priority HIGH) (route high"]);
        assert_eq!(held.lock().unwrap().len(), 3, "nothing more was sent");
        for served in std::mem::take(&mut *held.lock().unwrap()) {
            served.status(200);
        }
        while let Some(done) = calls.next().await {
            done.unwrap();
        }
    }
}

#[tokio::test]
async fn each_priority_waits_in_a_line_of_its_own() {
    for way in Way::BOTH {
        let hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let default = Thresholds { max_pending_requests: number(1), ..of(RoutingPriority::Default) };
        let high = Thresholds { max_pending_requests: number(1), ..of(RoutingPriority::High) };
        let cp = limited(two_routes(&[hole.local_addr().unwrap()]), vec![high, default]).await;
        let mesh = envoy_mesh(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(GUARD).await.unwrap();
        let mut calls = Calls::new();
        for (pending, path, limit) in [
            (1, "/x", "max_pending_requests limit of 1 reached (route rest"),
            (2, "/high", "max_pending_requests limit of 1 reached (priority HIGH)"),
        ] {
            start(&calls, way, &mesh, path);
            meanwhile(&mut calls, "it waits", async || channel.load().pending == pending).await;
            let error = way.send(&mesh, get(path), "").await.unwrap_err();
            assert_says(&refused(&error), &[limit]);
        }
        drop(calls);
        until("the lines are empty", async || channel.load().is_idle()).await;
    }
}

#[tokio::test]
async fn retries_are_limited_by_priority() {
    for way in Way::BOTH {
        let backend = greeter("failing").await;
        backend.state().set_unavailable(true);
        let destination = to("");
        let retries = "retries: {attempts: 5, retryOn: unavailable, backoff: 3000s}";
        let yaml = service(&[("v1", backend.addr())])
            + &routes(&format!(
                "[{{name: high, match: [{{headers: {{x-high: {{exact: \"1\"}}}}}}], route: [{{destination: {destination}}}], \
             {retries}}}, {{name: rest, route: [{{destination: {destination}}}], {retries}}}]"
            ));
        let default = Thresholds { max_retries: number(0), ..of(RoutingPriority::Default) };
        let high = Thresholds { max_retries: number(1), ..of(RoutingPriority::High) };
        let cp = limited(yaml, vec![default, high]).await;
        // `max_retries` is a limit by Envoy's rules only.
        let mesh = envoy_mesh(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        way.prompt(&mesh).await.unwrap_err();
        assert_eq!(backend.state().calls(), 1, "no retry");
        let high = |mesh: Mesh| async move {
            way.hello_with(&mesh, |request| {
                request.set_timeout(HOUR);
                request.metadata_mut().insert("x-high", "1".parse().unwrap());
            })
            .await
        };
        let held = tokio::spawn(high(mesh.clone()));
        until("it waits to be retried", async || channel.load().retries == 1).await;
        tokio::time::timeout(GUARD, high(mesh.clone())).await.expect("one retry at a time").unwrap_err();
        held.abort();
        until("all is given back", async || channel.load().is_idle()).await;
    }
}

#[tokio::test]
async fn connections_of_one_endpoint_are_limited_over_http1_too() {
    for way in Way::BOTH {
        let backend = http_backend("one").await;
        backend.state().set_delay(HOUR);
        let cp =
            ControlPlane::builder().yaml(two_routes(&[backend.addr()]).replace("GRPC", "HTTP")).start().await.unwrap();
        edit_cluster(&cp, CLUSTER, |cluster| {
            let thresholds = Thresholds { max_connections: number(2), ..Thresholds::default() };
            cluster.circuit_breakers =
                Some(CircuitBreakers { per_host_thresholds: vec![thresholds], ..CircuitBreakers::default() });
        });
        let mesh = mesh_on(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        let calls: Vec<_> = (0..4).map(|_| way.spawn(&mesh, get("/x"), tonic::body::Body::empty())).collect();
        until("two are sent and two wait", async || backend.state().in_flight() == 2 && channel.load().pending == 2)
            .await;
        assert_eq!((backend.connections(), channel.load().connections), (2, 2));
        calls.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// The last value of a gauge of the greeter's cluster with this label.
fn gauge(snapshotter: &Snapshotter, name: &str, resource: &str) -> Option<f64> {
    let all = snapshotter.snapshot().into_vec();
    all.into_iter().find_map(|(key, _, _, value)| {
        let is = key.key().name() == name && key.key().labels().any(|label| label.value() == resource);
        match value {
            DebugValue::Gauge(value) if is => Some(value.into_inner()),
            _ => None,
        }
    })
}

#[tokio::test]
async fn what_is_left_is_told_where_it_is_asked_for() {
    for way in Way::BOTH {
        let recorder = DebuggingRecorder::new();
        let snapshotter = recorder.snapshotter();
        let _recorder = metrics::set_default_local_recorder(&recorder);
        let (server, held) = H2Server::holding(u32::MAX).await;
        let default = Thresholds { max_requests: number(5), track_remaining: true, ..of(RoutingPriority::Default) };
        let cp = limited(two_routes(&[server.addr()]), vec![default]).await;
        let mesh = mesh_on(&cp).await;
        let mut calls = Calls::new();
        for _ in 0..2 {
            start(&calls, way, &mesh, "/x");
        }
        meanwhile(&mut calls, "both are in flight", async || held.lock().unwrap().len() == 2).await;
        assert_eq!(gauge(&snapshotter, "mesh_circuit_breaker_remaining", "max_requests"), Some(3.0));
        for served in std::mem::take(&mut *held.lock().unwrap()) {
            served.status(200);
        }
        while let Some(done) = calls.next().await {
            done.unwrap();
        }
        assert_eq!(gauge(&snapshotter, "mesh_circuit_breaker_remaining", "max_requests"), Some(5.0));
    }
}
