//! Mutual TLS and authorization by our control plane, with servers and clients of others.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use interop::{Outcome, ccore, free_addr, grpcgo, report};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_control::model::MtlsMode;

use crate::common::{call, listed};

const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Guards against a wait that never ends.
const READY: Duration = Duration::from_secs(30);

/// A greeter at `addr`, that lets in the account `client` alone.
fn yaml(addr: SocketAddr) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: greeter, namespace: default}}
spec:
  hosts: [greeter.default.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 50051, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: {}, ports: {{grpc: {}}}, serviceAccount: greeter, labels: {{app: greeter}}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: greeter, namespace: default}}
spec:
  selector: {{matchLabels: {{app: greeter}}}}
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [cluster.local/ns/default/sa/client]}}}}]}}]
",
        addr.ip(),
        addr.port()
    )
}

/// A control plane with a certificate authority of its own, in whose mesh every call is mutual TLS.
async fn strict(addr: SocketAddr) -> (ControlPlane, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let control = ControlPlane::builder()
        .yaml(yaml(addr))
        .ca(dir.path())
        .mtls(MtlsMode::Strict)
        .identity("default", "client")
        .identity("default", "stranger")
        .start()
        .await
        .unwrap();
    (control, dir)
}

/// Calls by our client, as this account.
async fn call_as(control: &ControlPlane, account: &str) -> Outcome {
    let bootstrap = control.bootstrap_for("default", account);
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(READY).await.unwrap();
    call(channel, 20, &[]).await
}

/// Calls by our client, with no identity, in plain text.
async fn call_plainly(addr: SocketAddr) -> Outcome {
    let mesh = Mesh::builder().build().await.unwrap();
    call(mesh.fixed_channel(&[addr]).unwrap(), 1, &[]).await
}

/// Who may call the server at `addr` may, and nobody else.
async fn obeyed(control: &ControlPlane, addr: SocketAddr, path: &str) {
    let allowed = call_as(control, "client").await;
    assert_eq!(allowed.ended_with("OK"), 20, "{allowed:?}");
    assert_eq!(allowed.callers.get(CLIENT), Some(&20), "{allowed:?}");
    let denied = call_as(control, "stranger").await;
    assert_eq!(denied.ended_with("PERMISSION_DENIED"), 20, "{denied:?}");
    let plain = call_plainly(addr).await;
    assert_eq!(plain.ended_with("UNAVAILABLE"), 1, "{plain:?}");
    report::row(path, "mTLS, the caller's identity", &listed(&allowed.callers));
    report::row(
        path,
        "another account, and plain text",
        &format!("{}; {}", listed(&denied.codes), listed(&plain.codes)),
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn a_grpc_go_server_obeys_our_control_plane() {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict(addr).await;
    let mut server = grpcgo::Server::start(addr, &control.bootstrap_for("default", "greeter")).await.unwrap();
    obeyed(&control, addr, "mesh -> grpc-go server").await;
    server.running().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn a_ccore_server_obeys_our_control_plane() {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict(addr).await;
    let mut server = ccore::Server::start_with_xds(addr, &control.bootstrap_for("default", "greeter")).await.unwrap();
    obeyed(&control, addr, "mesh -> C-core server").await;
    server.running().unwrap();
}
