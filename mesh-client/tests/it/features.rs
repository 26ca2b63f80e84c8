//! Features that no other file shows: authorities, B3, traces that go through a server, the limit of an attempt.

use crate::support::{
    H2Server, TARGET, Then, World,
    echo::{Echo, Way, get, joined},
    greeter, hello, hello_with, mesh_on, routes, service, to, until,
};
use bytes::Bytes;
use envoy_types::util::pack_any;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use mesh_client::{Mesh, Profile, trace::ScopeLayer};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::net::TcpListener;
use tower::{Layer, ServiceExt};

/// One route to the greeter, with these fields beside its destination.
fn route(fields: &str) -> String {
    routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")))
}

#[tokio::test]
async fn b3_headers_go_on_to_the_backend() {
    for way in Way::BOTH {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&seen);
        let server = H2Server::start(move |served| {
            keep.lock().unwrap().push(served.request.headers().get("b3").cloned());
            served.ok();
            Then::GoOn
        })
        .await;
        let world = World::new(&service(&[("one", server.addr())])).await;
        let sent = "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1";
        let call = way.hello_with(&world.mesh, |r| drop(r.metadata_mut().insert("b3", sent.parse().unwrap())));
        call.await.unwrap();
        let seen = seen.lock().unwrap();
        let got = seen[0].as_ref().expect("no b3 header arrived").to_str().unwrap();
        assert!(got.starts_with("80f198ee56343ba864fe8b2a57d3eff7-") && got.ends_with("-1"), "{got}");
    }
}

const TRACE: &str = "80f198ee56343ba864fe8b2a57d3eff7";
const SPAN: &str = "e457b5a2e4d86bd1";

#[tokio::test]
async fn the_many_headers_of_b3_go_on_to_the_backend() {
    let backend = Echo::start("one").await;
    let world = World::new(&service(&[("one", backend.addr())])).await;
    for way in Way::BOTH {
        for (name, value) in [("x-b3-sampled", "1"), ("x-b3-sampled", "0"), ("x-b3-flags", "1")] {
            let request = get("/").header("x-b3-traceid", TRACE).header("x-b3-spanid", SPAN).header(name, value);
            way.send(&world.mesh, request, "").await.unwrap();
            let seen = backend.last();
            assert_eq!((seen.header("x-b3-traceid"), seen.header("x-b3-spanid")), (TRACE.into(), SPAN.into()));
            assert_eq!(seen.header(name), value, "{way:?}");
            assert_eq!((seen.header("b3"), seen.header("traceparent")), (String::new(), String::new()), "as it came");
        }
    }
}

#[tokio::test]
async fn a_server_that_calls_on_continues_the_trace_of_its_caller() {
    let backend = Echo::start("one").await;
    let world = World::new(&service(&[("one", backend.addr())])).await;
    for way in Way::BOTH {
        // A server whose handler knows nothing of traces.
        let mesh = world.mesh.clone();
        let handler = tower::service_fn(move |_: Request<hyper::body::Incoming>| {
            let mesh = mesh.clone();
            async move { way.send(&mesh, get("/behind"), "").await.map(|response| response.map(Full::new)) }
        });
        let handler = ScopeLayer::new().layer(handler);
        let handler = hyper::service::service_fn(move |request| handler.clone().oneshot(request));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front = listener.local_addr().unwrap();
        let server = async {
            let (tcp, _) = listener.accept().await.unwrap();
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(tcp), handler).await.unwrap();
        };
        let calls = async {
            // Called without a mesh between, so that its caller's headers are what the test says.
            let tcp = tokio::net::TcpStream::connect(front).await.unwrap();
            let (mut caller, connection) = hyper::client::conn::http1::handshake(TokioIo::new(tcp)).await.unwrap();
            let connection = tokio::spawn(connection);
            let parent = format!("00-{TRACE}-{SPAN}-01");
            let single = format!("{TRACE}-{SPAN}-1");
            for sent in [
                &[("x-b3-traceid", TRACE), ("x-b3-spanid", SPAN), ("x-b3-sampled", "1")][..],
                &[("b3", &single)],
                &[("traceparent", &parent), ("tracestate", "a=1"), ("baggage", "user=1")],
            ] {
                let request = sent.iter().fold(Request::get("/").header("host", "front"), |r, (k, v)| r.header(*k, *v));
                let response = caller.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
                assert_eq!(joined(response.headers(), "x-backend"), "one");
                response.into_body().collect().await.unwrap();
                let seen = backend.last();
                assert_eq!(seen.path(), "/behind");
                for (name, value) in sent {
                    assert_eq!(seen.header(name), *value, "{name}, {way:?}");
                }
            }
            // Without a trace each call begins its own.
            let request = Request::get("/").header("host", "front").body(Full::<Bytes>::default()).unwrap();
            caller.send_request(request).await.unwrap();
            assert!(!backend.last().header("traceparent").contains(TRACE), "the next request is another one");
            drop(caller);
            connection.await.unwrap().unwrap();
        };
        tokio::join!(server, calls);
    }
}

#[tokio::test]
async fn each_attempt_has_its_own_limit_under_the_envoy_profile() {
    for way in Way::BOTH {
        let attempts = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&attempts);
        let held = Mutex::new(Vec::new());
        let server = H2Server::start(move |served| {
            if count.fetch_add(1, SeqCst) == 0 {
                held.lock().unwrap().push(served); // never answered
            } else {
                served.ok();
            }
            Then::GoOn
        })
        .await;
        let retries = "retries: {attempts: 2, perTryTimeout: 100ms, retryOn: \"gateway-error,reset\", backoff: 1ms}";
        let yaml = service(&[("one", server.addr())]) + &route(retries);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let mesh =
            Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy).build().await.unwrap();
        let call = way.hello_with(&mesh, |r| r.set_timeout(crate::support::GUARD));
        call.await.unwrap();
        assert_eq!(attempts.load(SeqCst), 2);
    }
}

#[tokio::test]
async fn a_target_with_an_authority_is_asked_of_its_own_control_plane() {
    let backend = greeter("one").await;
    let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())])).start().await.unwrap();
    let empty = ControlPlane::builder().start().await.unwrap();
    // The authority's listener has an xdstp name; what it refers to is asked of the default server.
    let name = "xdstp://team/envoy.config.listener.v3.Listener/greeter.default.svc.cluster.local:50051";
    let resources = cp.cache().resources();
    let listener = resources.get(ResourceType::Listener, "greeter.default.svc.cluster.local:50051").unwrap();
    let mut listener: envoy_types::pb::envoy::config::listener::v3::Listener =
        prost::Message::decode(&*listener.value).unwrap();
    listener.name = name.to_owned();
    empty.cache().update(ResourceType::Listener, name, pack_any(listener));
    let server = |cp: &ControlPlane| {
        format!(r#"[{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}]"#, cp.addr())
    };
    let json = format!(
        r#"{{"xds_servers": {}, "node": {{"id": "test"}}, "authorities": {{"team": {{"xds_servers": {}}}}}}}"#,
        server(&cp),
        server(&empty)
    );
    let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
    let channel = mesh.channel("xds://team/greeter.default.svc.cluster.local:50051").unwrap();
    until("the channel serves", async || hello(&channel).await.is_ok_and(|r| r.backend == "one")).await;
    // The same name without the authority is found nowhere but on the default server.
    let elsewhere = mesh_on(&empty).await.channel(TARGET).unwrap();
    hello_with(&elsewhere, |r| r.set_timeout(Duration::from_secs(20))).await.unwrap_err();
}
