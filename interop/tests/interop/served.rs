//! Our own server, HTTP/2 and HTTP/1.1 over mutual TLS as the control plane says, with clients of others.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use examples::backend::{Backend, Options};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use interop::envoy::Envoy;
use interop::{Outcome, free_addr, report};
use mesh_client::inbound::RequestBody;
use mesh_client::{ConnectionInfo, Inbound, Mesh};
use mesh_control::ControlPlane;
use mesh_control::model::MtlsMode;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::Endpoint;
use tower::Service;

use crate::common::{call, greeter, guarded, listed};
use crate::identity::{OFFERED, s_client};

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";
const ENVOY: &str = "spiffe://cluster.local/ns/default/sa/envoy";
/// Guards against a wait that never ends.
const READY: Duration = Duration::from_secs(30);
/// More than a window and a buffer, in bytes.
const LARGE: usize = 1 << 20;

/// Nobody at all where `/denied` begins.
const DENIED: &str = "---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: nobody, namespace: default}
spec:
  selector: {matchLabels: {app: greeter}}
  action: DENY
  rules: [{to: [{operation: {paths: [/denied*]}}]}]
";

/// A mesh of strict mutual TLS, and our server in it.
async fn served() -> (ControlPlane, Inbound, tempfile::TempDir) {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let control = ControlPlane::builder()
        .yaml(guarded(addr, &["envoy", "client"]) + DENIED)
        .ca(dir.path())
        .mtls(MtlsMode::Strict);
    let control =
        ["client", "envoy", "stranger"].iter().fold(control, |control, name| control.identity("default", *name));
    let control = control.start().await.unwrap();
    let bootstrap = control.bootstrap_for("default", "greeter");
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let inbound = mesh.inbound(addr).await.unwrap();
    let (serving, (routes, _)) = (inbound.clone(), greeter());
    let service = tower::service_fn(move |request| answer(routes.clone(), request));
    tokio::spawn(async move { serving.serve(service).await });
    tokio::time::timeout(READY, inbound.ready()).await.expect("the control plane knows the server");
    (control, inbound, dir)
}

/// gRPC to the greeter; to anything else the version, who the caller is, and the length of what came.
async fn answer(mut routes: Routes, request: Request<RequestBody>) -> Result<Response<Body>, Infallible> {
    if request.headers().get("content-type").is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc")) {
        return routes.call(request).await;
    }
    let connection = request.extensions().get::<ConnectionInfo>().expect("it came over our own connections");
    let caller = connection.peer().and_then(|peer| peer.spiffe_id()).map(ToString::to_string).unwrap_or_default();
    let version = request.version();
    let length = request.into_body().collect().await.map_or(0, |body| body.to_bytes().len());
    Ok(Response::new(Body::new(Full::from(format!("{version:?} {caller} {length}")))))
}

/// Asks Envoy at `addr`: the status, and what our server said.
async fn ask(addr: SocketAddr, path: &str, body: usize) -> (StatusCode, String) {
    let client = Client::builder(TokioExecutor::new()).build_http();
    let request = Request::post(format!("http://{addr}{path}")).body(Full::new(Bytes::from(vec![b'x'; body]))).unwrap();
    let answer = tokio::time::timeout(READY, client.request(request)).await.expect("it is answered").unwrap();
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&body).into_owned())
}

/// Calls of the greeter through Envoy.
async fn greeted(envoy: &Envoy) -> Outcome {
    call(Endpoint::from_shared(format!("http://{}", envoy.outbound())).unwrap().connect_lazy(), 50, &[]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn envoy_is_served_over_both_versions_as_far_as_it_is_let_in() {
    let (control, inbound, _dir) = served().await;
    let ca = control.ca().unwrap();
    let elsewhere = Backend::start("not asked", ANY, Options::default()).await.unwrap();
    let start = async |account: &str| {
        Envoy::mutual(&ca.socket("default", account), elsewhere.addr(), inbound.local_addr(), SERVER).await.unwrap()
    };
    let (mut envoy, mut stranger) = (start("envoy").await, start("stranger").await);

    for round in ["at first", "after a rotation"] {
        for (addr, version) in [(envoy.outbound(), "HTTP/2.0"), (envoy.outbound_http1(), "HTTP/1.1")] {
            for length in [0, 10, LARGE] {
                let expected = format!("{version} {ENVOY} {length}");
                assert_eq!(ask(addr, "/allowed", length).await, (StatusCode::OK, expected), "{round}");
            }
            let (status, said) = ask(addr, "/denied/by/path", 0).await;
            assert_eq!((status, said.contains("RBAC")), (StatusCode::FORBIDDEN, true), "{round}, {version}: {said}");
        }
        let seen = greeted(&envoy).await;
        assert_eq!(seen.callers.get(ENVOY), Some(&50), "{round}: {seen:?}");

        let before = envoy.counter("ssl_context_update_by_sds").await.unwrap();
        ca.rotate_all().unwrap();
        let updated = async {
            while envoy.counter("ssl_context_update_by_sds").await.unwrap() <= before {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(READY, updated).await.expect("Envoy takes the new certificate");
    }
    for addr in [stranger.outbound(), stranger.outbound_http1()] {
        assert_eq!(ask(addr, "/allowed", 0).await.0, StatusCode::FORBIDDEN, "it is another account");
    }
    let denied = greeted(&stranger).await;
    assert_eq!(denied.ended_with("PERMISSION_DENIED"), 50, "{denied:?}");
    assert_eq!(elsewhere.state().calls(), 0);
    envoy.running().unwrap();
    stranger.running().unwrap();
    let path = "Envoy -> mesh server, HTTP/2 and HTTP/1.1";
    report::row(path, "mTLS by SDS, the caller's identity", &format!("{ENVOY}, through a rotation"));
    report::row(path, "a denied path, another account", &format!("403; {}", listed(&denied.codes)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn openssl_sees_our_servers_chain_and_protocols() {
    let (control, inbound, _dir) = served().await;
    let ca = control.ca().unwrap();
    let (addr, client) = (inbound.local_addr(), ca.identity_dir("default", "client"));
    for (offered, chosen) in [(OFFERED, "h2"), ("http/1.1", "http/1.1"), ("http/1.1,h2", "h2")] {
        let said = s_client(addr, offered, &client, true, false).await;
        for expected in ["Verify return code: 0 (ok)", &format!("ALPN protocol: {chosen}"), "mesh development CA"] {
            assert!(said.contains(expected), "{offered}: {expected}: {said}");
        }
    }
    let refused = s_client(addr, OFFERED, &client, false, true).await;
    assert!(refused.contains("alert certificate required") || refused.contains("alert number 116"), "{refused}");
    report::row(
        "openssl s_client -> mesh server",
        "chain, ALPN, refusal",
        "verified; h2, http/1.1; certificate required",
    );
}
