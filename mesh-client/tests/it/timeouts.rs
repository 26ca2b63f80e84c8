//! A timeout says which one it was, of what length, at which attempt.

use crate::support::{
    ANY, CLUSTER, H2Server, TARGET, Then, assert_says,
    code::{Local, fixed},
    echo::{Echo, Way, get},
    hello, routes, service, to,
};
use bytes::Bytes;
use futures::StreamExt;
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_client::{
    BoxError, Error, Mesh, MeshBuilder, Profile,
    policy::{Cluster, Policy},
};
use mesh_control::ControlPlane;
use mesh_xds::resource::HttpProtocol;
use std::{
    net::SocketAddr,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tonic::Code;

/// Refuses as many requests, and never answers the others.
async fn server(refused: usize) -> H2Server {
    let (held, seen) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    H2Server::start(move |served| {
        if seen.fetch_add(1, SeqCst) >= refused {
            held.lock().unwrap().push(served);
        } else if served.request.headers().contains_key("grpc-timeout") {
            served.fail(14, &[]);
        } else {
            served.status(503);
        }
        Then::GoOn
    })
    .await
}

async fn mesh(server: &H2Server, fields: &str, profile: Profile) -> (ControlPlane, Mesh) {
    mesh_with(server.addr(), fields, |mesh| mesh.profile(profile)).await
}

async fn mesh_with(
    server: SocketAddr,
    fields: &str,
    with: impl FnOnce(MeshBuilder) -> MeshBuilder,
) -> (ControlPlane, Mesh) {
    let http = format!("[{{route: [{{destination: {}}}], {fields}}}]", to(""));
    let yaml = service(&[("one", server)]) + &routes(&http);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = with(Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap()).build().await.unwrap();
    (cp, mesh)
}

#[tokio::test]
async fn of_the_response_headers_once_the_request_was_sent() {
    let limit = Duration::from_millis(80);
    for way in Way::BOTH {
        let server = server(0).await;
        let fields = "retries: {attempts: 2, retryOn: reset, backoff: 1ms}";
        let with = |mesh: MeshBuilder| mesh.profile(Profile::Envoy).response_headers_timeout(limit);
        let (_cp, mesh) = mesh_with(server.addr(), fields, with).await;
        let error = way.send(&mesh, get("/"), "body").await.unwrap_err().downcast::<Error>().unwrap();
        let said = "had no headers 80ms after the request was sent (response_headers_timeout)";
        assert_says(&error.to_string(), &[said, "attempt 3", CLUSTER]);
        assert!(error.is_timeout());
        assert_eq!((error.http_status().as_u16(), error.code()), (504, Code::DeadlineExceeded));
    }
    // gRPC's conditions: as any attempt without an answer.
    let server = server(0).await;
    let fields = "retries: {attempts: 1, retryOn: deadline-exceeded, backoff: 1ms}";
    let (_cp, mesh) = mesh_with(server.addr(), fields, |mesh| mesh.response_headers_timeout(limit)).await;
    let status = hello(&mesh.channel(TARGET).unwrap()).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_says(status.message(), &["response_headers_timeout", "attempt 2"]);
}

#[tokio::test]
async fn of_the_response_headers_leaves_slow_requests_and_slow_bodies_alone() {
    let limit = Duration::from_millis(500);
    let backend = Echo::start("v1").await;
    for profile in [Profile::Grpc, Profile::Envoy] {
        let with = |mesh: MeshBuilder| mesh.profile(profile).response_headers_timeout(limit);
        let (_cp, mesh) = mesh_with(backend.addr(), "timeout: 0s", with).await;
        for way in Way::BOTH {
            let pieces = futures::stream::iter(["a", "b", "c"]).then(|piece| async move {
                tokio::time::sleep(Duration::from_millis(300)).await;
                Ok::<_, BoxError>(Frame::data(Bytes::from(piece)))
            });
            let body = StreamBody::new(Box::pin(pieces));
            let response = way.send_body(&mesh, get("/").method("POST"), body).await.unwrap();
            assert_eq!(response.status(), 200);
            assert_eq!(&backend.last().body[..], b"abc");
        }
    }
}

#[tokio::test]
async fn of_the_response_headers_over_http1() {
    for way in Way::BOTH {
        let silent = tokio::net::TcpListener::bind(ANY).await.unwrap();
        let cluster = Cluster { http_protocol: Some(HttpProtocol::Http1), ..Cluster::of("target", []) };
        let policy = Policy::default().with_target(cluster).with_timeout(Duration::ZERO);
        let limit = |mesh: MeshBuilder| mesh.response_headers_timeout(Duration::from_millis(80));
        let code = Local::with(&fixed(&[silent.local_addr().unwrap()]), policy, limit).await;
        for body in ["", "body"] {
            let error = way.send(&code.mesh, get("/").method("POST"), body).await.unwrap_err();
            assert_says(&error.to_string(), &["had no headers 80ms after the request was sent", "attempt 1"]);
        }
    }
}

#[tokio::test]
async fn of_the_route_in_the_second_attempt() {
    for way in Way::BOTH {
        let server = server(1).await;
        let fields = "timeout: 300ms, retries: {attempts: 2, retryOn: \"5xx\", backoff: 1ms}";
        let (_cp, mesh) = mesh(&server, fields, Profile::Envoy).await;
        let error = way.send(&mesh, get("/"), "").await.unwrap_err().to_string();
        let endpoint = format!("endpoint {}", server.addr());
        assert_says(&error, &["deadline of 300ms exceeded", "before the response began", "set by the route's timeout"]);
        assert_says(&error, &["attempt 2", &endpoint, CLUSTER]);
    }
}

#[tokio::test]
async fn of_the_last_attempt() {
    for way in Way::BOTH {
        let server = server(0).await;
        let fields = "retries: {attempts: 2, perTryTimeout: 50ms, retryOn: reset, backoff: 1ms}";
        let (_cp, mesh) = mesh(&server, fields, Profile::Envoy).await;
        let error = way.send(&mesh, get("/"), "").await.unwrap_err().to_string();
        assert_says(&error, &["within its limit of 50ms (per_try_timeout)", "attempt 3", CLUSTER]);
    }
}

#[tokio::test]
async fn of_the_caller_in_the_third_attempt() {
    for way in Way::BOTH {
        let server = server(2).await;
        let fields = "retries: {attempts: 3, retryOn: unavailable, backoff: 1ms}";
        let (_cp, mesh) = mesh(&server, fields, Profile::Grpc).await;
        let call = way.hello_with(&mesh, |request| request.set_timeout(Duration::from_millis(400)));
        let status = call.await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["deadline of 400ms exceeded", "set by the caller's grpc-timeout", "attempt 3"]);
    }
}
