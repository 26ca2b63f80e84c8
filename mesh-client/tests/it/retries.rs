//! Retries: every condition of Envoy's, and what a gRPC server says of when to come back.

use crate::support::{
    GUARD, H2Server, HOUR, TARGET, Then, World,
    echo::{Way, get, joined},
    raw_h2::{END_HEADERS, END_STREAM, GOAWAY, HEADERS, RawH2, field},
    routes, service, to,
};
use bytes::Bytes;
use h2::Reason;
use http::{Request, StatusCode};
use http_body_util::Full;
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::net::TcpListener;
use tonic::Code;
use tower::{Layer, ServiceExt, service_fn};

/// One route to the greeter whose failures are retried.
fn retried(conditions: &str, attempts: u32, backoff: &str) -> String {
    let retries = format!("{{attempts: {attempts}, retryOn: \"{conditions}\", backoff: {backoff}}}");
    routes(&format!("[{{route: [{{destination: {}}}], retries: {retries}}}]", to("")))
}

/// How the first attempt is answered.
#[derive(Clone, Copy, Debug)]
enum First {
    Status(u16),
    Reset(Reason),
    Cut,
}

/// A server that answers the first request so, and all others with 200; and how many it saw.
async fn server(first: First) -> (H2Server, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let server = H2Server::start(move |mut served| {
        match first {
            _ if count.fetch_add(1, SeqCst) > 0 => served.status(200),
            First::Status(status) => served.status(status),
            First::Reset(reason) => served.respond.send_reset(reason),
            First::Cut => return Then::Cut,
        }
        Then::GoOn
    })
    .await;
    (server, seen)
}

/// A mesh whose channels go by Envoy's rules.
async fn envoy_mesh(address: SocketAddr, routes: &str) -> (ControlPlane, Mesh) {
    let cp = ControlPlane::builder().yaml(service(&[("one", address)]) + routes).start().await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy);
    let mesh = mesh.build().await.unwrap();
    (cp, mesh)
}

/// The status of a plain request through a channel; `None`: it failed.
async fn by_channel(mesh: &Mesh) -> Option<StatusCode> {
    let request = Request::get("/x").body(Full::<Bytes>::default()).unwrap();
    let call = mesh.channel(TARGET).unwrap().oneshot(request);
    tokio::time::timeout(GUARD, call).await.expect("hangs").ok().map(|response| response.status())
}

/// The same through the layer.
async fn by_layer(mesh: &Mesh) -> Option<StatusCode> {
    let inner = service_fn(|_| async { Ok::<_, Infallible>(http::Response::new(Full::<Bytes>::default())) });
    let uri = format!("http://{}/x", &TARGET["xds:///".len()..]);
    let request = Request::get(uri).body(Full::<Bytes>::default()).unwrap();
    let call = mesh.layer().layer(inner).oneshot(request);
    let response = tokio::time::timeout(GUARD, call).await.expect("hangs").ok()?;
    assert!(response.body().is_mesh());
    Some(response.status())
}

#[tokio::test]
async fn envoys_conditions_decide_what_is_retried() {
    use First::{Cut, Reset, Status};
    let cases = [
        ("5xx", Status(500), true),
        ("5xx", Status(404), false),
        ("5xx", Reset(Reason::CANCEL), true),
        ("gateway-error", Status(502), true),
        ("gateway-error", Status(504), true),
        ("gateway-error", Status(500), false),
        ("gateway-error", Cut, true),
        ("retriable-4xx", Status(409), true),
        ("retriable-4xx", Status(404), false),
        ("retriable-4xx", Reset(Reason::CANCEL), false),
        ("reset", Reset(Reason::INTERNAL_ERROR), true),
        ("reset", Cut, true),
        ("reset", Status(503), false),
        ("connect-failure", Status(503), false),
        ("connect-failure", Reset(Reason::CANCEL), false),
        ("retriable-status-codes,418", Status(418), true),
        ("retriable-status-codes,418", Status(503), false),
        ("retriable-4xx,gateway-error", Status(503), true),
        // What the server has seen was sent.
        ("reset-before-request", Reset(Reason::CANCEL), false),
        ("reset-before-request", Cut, false),
        ("reset-before-request", Status(503), false),
        ("refused-stream", Reset(Reason::CANCEL), false),
        ("refused-stream", Status(503), false),
    ];
    for (conditions, first, retries) in cases {
        for layer in [false, true] {
            let (server, seen) = server(first).await;
            let (_cp, mesh) = envoy_mesh(server.addr(), &retried(conditions, 1, "1ms")).await;
            let status = if layer { by_layer(&mesh).await } else { by_channel(&mesh).await };
            let expected = match (retries, first) {
                (true, _) => Some(StatusCode::OK),
                (false, Status(status)) => Some(StatusCode::from_u16(status).unwrap()),
                (false, _) => None,
            };
            let attempts = 1 + usize::from(retries);
            assert_eq!((status, seen.load(SeqCst)), (expected, attempts), "{conditions}, {first:?}, layer: {layer}");
        }
    }
}

#[tokio::test]
async fn a_connection_that_cannot_be_made_is_tried_again_on_connect_failure_only() {
    for way in Way::BOTH {
        for conditions in ["connect-failure", "reset-before-request", "retriable-4xx", "refused-stream"] {
            // The first connection is closed before it says a word; the address serves from then on.
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let (_cp, mesh) = envoy_mesh(listener.local_addr().unwrap(), &retried(conditions, 50, "100ms")).await;
            let serve = async {
                drop(listener.accept().await.unwrap());
                let (tcp, _) = listener.accept().await.unwrap();
                let mut h2: h2::server::Connection<_, Bytes> = h2::server::handshake(tcp).await.unwrap();
                while let Some(Ok((_, mut respond))) = h2.accept().await {
                    respond.send_response(http::Response::new(()), true).unwrap();
                }
            };
            let status = tokio::select! {
                sent = way.send(&mesh, get("/x"), "") => sent.ok().map(|response| response.status()),
                () = serve => panic!("the connection was closed"),
            };
            // Without a connection nothing of the request was sent.
            let retries = ["connect-failure", "reset-before-request"].contains(&conditions);
            let expected = retries.then_some(StatusCode::OK);
            assert_eq!(status, expected, "{conditions}");
        }
    }
}

/// An HTTP/2 server whose first connections go away at their first request, or, if `early`, before it; and how many it had.
async fn leaving(connections: usize, early: bool) -> (RawH2, Arc<AtomicUsize>) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let server = RawH2::start(move |mut peer| {
        let leaves = count.fetch_add(1, SeqCst) < connections;
        async move {
            peer.greet(&[]).await?;
            if !(leaves && early) {
                let stream = peer.request().await?;
                if !leaves {
                    peer.frame(HEADERS, END_HEADERS | END_STREAM, stream, &field(":status", "200")).await?;
                    return peer.silence().await;
                }
            }
            // No stream was taken, and no error.
            peer.frame(GOAWAY, 0, 0, &[0; 8]).await
        }
    })
    .await;
    (server, seen)
}

#[tokio::test]
async fn a_connection_that_goes_away_before_a_request_was_sent_is_tried_again_on_reset_before_request() {
    for (conditions, retries) in [("reset-before-request", true), ("retriable-4xx", false), ("refused-stream", false)] {
        for way in Way::BOTH {
            let (server, seen) = leaving(2, true).await;
            let (_cp, mesh) = envoy_mesh(server.addr(), &retried(conditions, 50, "100ms")).await;
            let result = way.send(&mesh, get("/x"), "").await;
            assert_eq!(result.is_ok(), retries, "{conditions}, {way:?}: {result:?}");
            assert_eq!(seen.load(SeqCst) > 2, retries, "{conditions}, {way:?}");
        }
    }
}

#[tokio::test]
async fn a_request_that_a_goaway_excludes_is_sent_again_once_and_then_on_refused_stream_only() {
    // What was sent and refused did not die before it was sent.
    for (conditions, retries) in [("refused-stream", true), ("reset-before-request", false), ("retriable-4xx", false)] {
        for way in Way::BOTH {
            let (server, seen) = leaving(2, false).await;
            let (_cp, mesh) = envoy_mesh(server.addr(), &retried(conditions, 1, "1ms")).await;
            let result = way.send(&mesh, get("/x"), "").await;
            let expected = if retries { (true, 3) } else { (false, 2) };
            assert_eq!((result.is_ok(), seen.load(SeqCst)), expected, "{conditions}, {way:?}: {result:?}");
            let (server, _) = leaving(1, false).await;
            let (_cp, mesh) = envoy_mesh(server.addr(), &retried(conditions, 1, "1ms")).await;
            way.send(&mesh, get("/x"), "").await.unwrap();
        }
    }
}

#[tokio::test]
async fn refused_streams_are_retried_beyond_the_one_time_without_a_policy() {
    let cases =
        [("refused-stream", Some(StatusCode::OK), 3), ("reset-before-request", None, 2), ("retriable-4xx", None, 2)];
    for (conditions, status, attempts) in cases {
        for layer in [false, true] {
            let seen = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&seen);
            let server = H2Server::start(move |mut served| {
                if count.fetch_add(1, SeqCst) < 2 {
                    served.respond.send_reset(Reason::REFUSED_STREAM);
                } else {
                    served.status(200);
                }
                Then::GoOn
            })
            .await;
            let (_cp, mesh) = envoy_mesh(server.addr(), &retried(conditions, 1, "1ms")).await;
            let got = if layer { by_layer(&mesh).await } else { by_channel(&mesh).await };
            assert_eq!((got, seen.load(SeqCst)), (status, attempts), "{conditions}, layer: {layer}");
        }
    }
}

#[tokio::test]
async fn statuses_of_grpc_are_retried_by_their_name() {
    let names =
        [("cancelled", 1), ("deadline-exceeded", 4), ("resource-exhausted", 8), ("internal", 13), ("unavailable", 14)];
    for (condition, code) in names {
        for (profile, way) in [Profile::Envoy, Profile::Grpc].into_iter().flat_map(|p| Way::BOTH.map(|way| (p, way))) {
            // ABORTED has no name there.
            for sent in [code, 10] {
                let seen = Arc::new(AtomicUsize::new(0));
                let count = Arc::clone(&seen);
                let server = H2Server::start(move |served| {
                    if count.fetch_add(1, SeqCst) > 0 {
                        served.ok();
                    } else {
                        served.fail(sent, &[]);
                    }
                    Then::GoOn
                })
                .await;
                let yaml = service(&[("one", server.addr())]) + &retried(condition, 1, "1ms");
                let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
                let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile);
                let mesh = builder.build().await.unwrap();
                let request = get("/x").method("POST").header("content-type", "application/grpc");
                // One empty message.
                let response = way.send(&mesh, request, "\0\0\0\0\0").await.unwrap();
                let expected = if sent == code { (String::new(), 2) } else { (sent.to_string(), 1) };
                let got = (joined(response.headers(), "grpc-status"), seen.load(SeqCst));
                assert_eq!(got, expected, "{condition}, {sent}, {profile:?}, {way:?}");
            }
        }
    }
}

/// A call by gRPC's rules to a server whose first answer is UNAVAILABLE with this pushback: how it ended, and the attempts made.
async fn pushed_back(way: Way, pushback: &[&'static str], backoff: &str) -> (Code, usize) {
    let seen = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&seen);
    let trailers: Vec<_> = pushback.iter().map(|value| ("grpc-retry-pushback-ms", *value)).collect();
    let server = H2Server::start(move |served| {
        if count.fetch_add(1, SeqCst) > 0 {
            served.ok();
        } else {
            served.fail(14, &trailers);
        }
        Then::GoOn
    })
    .await;
    let world = World::new(&(service(&[("one", server.addr())]) + &retried("unavailable", 2, backoff))).await;
    let call = way.hello_with(&world.mesh, |r| r.set_timeout(2 * HOUR));
    let result = tokio::time::timeout(GUARD, call).await.expect("does not come back when the server says");
    (result.map_or_else(|status| status.code(), |_| Code::Ok), seen.load(SeqCst))
}

#[tokio::test]
async fn a_server_says_when_to_retry() {
    for way in Way::BOTH {
        let begun = tokio::time::Instant::now();
        // Instead of the back-off, which would take an hour.
        assert_eq!(pushed_back(way, &["150"], "3600s").await, (Code::Ok, 2));
        assert!(begun.elapsed() >= Duration::from_millis(150), "{:?}", begun.elapsed());
        assert_eq!(pushed_back(way, &["0"], "3600s").await, (Code::Ok, 2));
        assert_eq!(pushed_back(way, &[], "1ms").await, (Code::Ok, 2));
    }
}

#[tokio::test]
async fn a_server_forbids_a_retry() {
    for way in Way::BOTH {
        for pushback in [&["-1"][..], &["soon"], &[""], &["1.5"], &["10", "20"], &["99999999999"]] {
            assert_eq!(pushed_back(way, pushback, "1ms").await, (Code::Unavailable, 1), "{pushback:?}");
        }
    }
}
