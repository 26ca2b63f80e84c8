//! A timeout says which one it was, of what length, at which attempt.

use crate::support::{
    CLUSTER, H2Server, TARGET, Then, assert_says,
    echo::{Way, get},
    hello_with, routes, service, to,
};
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use std::{
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
    let http = format!("[{{route: [{{destination: {}}}], {fields}}}]", to(""));
    let yaml = service(&[("one", server.addr())]) + &routes(&http);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile).build().await.unwrap();
    (cp, mesh)
}

#[tokio::test]
async fn of_the_route_in_the_second_attempt() {
    let server = server(1).await;
    let fields = "timeout: 300ms, retries: {attempts: 2, retryOn: \"5xx\", backoff: 1ms}";
    let (_cp, mesh) = mesh(&server, fields, Profile::Envoy).await;
    let error = Way::Channel.send(&mesh, get("/"), "").await.unwrap_err().to_string();
    let endpoint = format!("endpoint {}", server.addr());
    assert_says(&error, &["deadline of 300ms exceeded", "before the response began", "set by the route's timeout"]);
    assert_says(&error, &["attempt 2", &endpoint, CLUSTER]);
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
    let server = server(2).await;
    let fields = "retries: {attempts: 3, retryOn: unavailable, backoff: 1ms}";
    let (_cp, mesh) = mesh(&server, fields, Profile::Grpc).await;
    let channel = mesh.channel(TARGET).unwrap();
    let call = hello_with(&channel, |request| request.set_timeout(Duration::from_millis(400)));
    let status = call.await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_says(status.message(), &["deadline of 400ms exceeded", "set by the caller's grpc-timeout", "attempt 3"]);
}
