//! Upstreams that mean harm over HTTP/1.1: requests fail in time, with a cause, and memory stays flat.

use crate::{
    hostile::{FLOOD, Flat},
    support::{
        GUARD, TARGET, World, assert_says,
        echo::{Way, get},
        envoy_mesh,
        raw_h2::RawH2,
        routes, service, to, until,
        way::Failed,
    },
};
use http_body_util::BodyExt;
use mesh_client::{BoxError, Error};
use mesh_control::ControlPlane;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tonic::body::Body;
use tower::ServiceExt;

/// Of a response whose body is to follow.
const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

/// The greeter's host on this server, over HTTP/1.1, by Envoy's rules, without retries; a request may take so long.
async fn world(server: &RawH2, timeout: &str) -> World {
    let route = format!("[{{route: [{{destination: {}}}], timeout: {timeout}, retries: {{attempts: 0}}}}]", to(""));
    let yaml = service(&[("v1", server.addr())]).replace("GRPC", "HTTP") + &routes(&route);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = envoy_mesh(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    World { cp, mesh, channel }
}

/// Answers a request with this, and then with more and more of that, until the client ends it. How much it wrote, is counted.
async fn flooding(begin: &'static str, more: &'static str) -> (RawH2, Arc<AtomicUsize>) {
    let written = Arc::<AtomicUsize>::default();
    let count = written.clone();
    let server = RawH2::start(move |mut peer| {
        let count = count.clone();
        async move {
            peer.http1_request().await?;
            peer.write(begin.as_bytes()).await?;
            let chunk = more.repeat((64 << 10) / more.len() + 1);
            while count.load(SeqCst) < FLOOD {
                peer.write(chunk.as_bytes()).await?;
                count.fetch_add(chunk.len(), SeqCst);
            }
            std::future::pending().await
        }
    })
    .await;
    (server, written)
}

/// A request whose response is read, and thrown away: how it failed.
async fn fails(world: &World, way: Way) -> BoxError {
    let call = async {
        let request = get("/x").body(Body::empty()).unwrap();
        let mut body = way.wire(&world.mesh).oneshot(request).await?.into_body();
        while let Some(frame) = body.frame().await {
            frame?;
        }
        Ok(())
    };
    let error: BoxError = tokio::time::timeout(GUARD, call).await.expect("it does not end").unwrap_err();
    until("all is given back", async || world.channel.load().is_idle()).await;
    error
}

/// The whole of an error, causes included.
fn told(error: &BoxError) -> String {
    let mut at: Option<&(dyn std::error::Error + 'static)> = Some(&**error);
    let mut text = String::new();
    while let Some(error) = at {
        text += &format!("{error}; ");
        at = error.source();
    }
    text
}

/// A flood that holds a request to its time only.
async fn is_held_to_its_time(begin: &'static str, more: &'static str) {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let (server, _) = flooding(begin, more).await;
        let error = told(&fails(&world(&server, "500ms").await, way).await);
        assert_says(&error, &["deadline of 500ms exceeded", &server.addr().to_string()]);
    }
    flat.check();
}

/// A flood that ends the connection long before it was all taken.
async fn is_refused(begin: &'static str, more: &'static str, cause: &str) {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let (server, written) = flooding(begin, more).await;
        let error = told(&fails(&world(&server, "3600s").await, way).await);
        assert_says(&error, &[&server.addr().to_string(), cause]);
        assert!(written.load(SeqCst) < FLOOD, "all of it was taken");
    }
    flat.check();
}

#[tokio::test]
async fn headers_that_never_end_hold_a_request_to_its_time_only() {
    for way in Way::BOTH {
        let server = RawH2::start(|mut peer| async move {
            peer.http1_request().await?;
            peer.write(b"HTTP/1.1 200 OK\r\nx-slow: ").await?;
            loop {
                tokio::time::sleep(Duration::from_millis(100)).await;
                peer.write(b".").await?;
            }
        })
        .await;
        let world = world(&server, "500ms").await;
        let error = fails(&world, way).await;
        let own = error.downcast_ref::<Failed>().and_then(|failed| failed.0.downcast_ref::<Error>());
        assert!(own.is_some_and(Error::is_timeout), "{error:?}");
        assert_says(&error.to_string(), &["before the response began", &server.addr().to_string()]);
    }
}

#[tokio::test]
async fn one_header_that_is_too_large_is_refused() {
    is_refused("HTTP/1.1 200 OK\r\nx-large: ", "xxxxxxxx", "too large").await;
}

#[tokio::test]
async fn too_many_headers_are_refused() {
    is_refused("HTTP/1.1 200 OK\r\n", "x-more: of this\r\n", "too large").await;
}

#[tokio::test]
async fn a_storm_of_interim_responses_holds_a_request_to_its_time_only() {
    is_held_to_its_time("", "HTTP/1.1 103 Early Hints\r\nlink: </style.css>\r\n\r\n").await;
}

#[tokio::test]
async fn a_body_without_end_holds_a_request_to_its_time_only() {
    is_held_to_its_time(CHUNKED, "10\r\n0123456789abcdef\r\n").await;
    is_held_to_its_time("HTTP/1.1 200 OK\r\ncontent-length: 9999999999\r\n\r\n", "0123456789abcdef").await;
}

#[tokio::test]
async fn a_body_without_end_that_nobody_reads_is_not_taken() {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let (server, written) = flooding(CHUNKED, "10\r\n0123456789abcdef\r\n").await;
        let world = world(&server, "3600s").await;
        let response = way.wire(&world.mesh).oneshot(get("/x").body(Body::empty()).unwrap()).await.unwrap();
        let mut before = 0;
        until("no more is taken", async || {
            tokio::time::sleep(Duration::from_millis(100)).await;
            std::mem::replace(&mut before, written.load(SeqCst)) == written.load(SeqCst)
        })
        .await;
        assert!(before < FLOOD, "all of it was taken");
        drop(response);
        until("all is given back", async || world.channel.load().is_idle()).await;
    }
    flat.check();
}

#[tokio::test]
async fn an_extension_of_a_chunk_without_end_is_refused() {
    is_refused("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5;", "a=b;", "chunk extensions over limit").await;
}

#[tokio::test]
async fn trailers_without_end_are_refused() {
    is_refused("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n", "x-more: of this\r\n", "trailers").await;
}

#[tokio::test]
async fn what_is_not_http_is_refused() {
    is_refused("SSH-2.0-OpenSSH_9.2\r\n", "\r\n", "invalid HTTP version").await;
}

#[tokio::test]
async fn a_response_that_nobody_asked_for_is_nobodys_answer() {
    let server = RawH2::start(|mut peer| async move {
        loop {
            peer.http1_request().await?;
            let (own, poison) =
                ("HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nmine", "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n");
            peer.write(format!("{own}{poison}poison").as_bytes()).await?;
        }
    })
    .await;
    let world = world(&server, "3600s").await;
    for call in 0..40 {
        // A connection that is being closed may take one more request with it, but never answer it wrongly.
        if let Ok(response) = Way::BOTH[call % 2].send(&world.mesh, get("/x"), "").await {
            assert_eq!(response.body(), "mine");
        }
    }
    assert!(server.accepted() >= 20, "a connection that said more than it was asked is not used again");
}
