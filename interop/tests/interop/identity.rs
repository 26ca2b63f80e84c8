//! Mutual TLS with real peers, by certificates of our own authority.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use examples::backend::{Backend, Options};
use examples::server::{acceptor, tls};
use interop::envoy::Envoy;
use interop::report;
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_tls::Mode;
use tokio::process::Command;
use tonic::transport::Endpoint;

use crate::common::call;

const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// Of which our servers speak the second.
pub(crate) const OFFERED: &str = "http/1.0,h2";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/server";

fn yaml(envoy: SocketAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: greeter, namespace: default}}
spec:
  hosts: [greeter.default.svc.cluster.local]
  resolution: STATIC
  ports: [{{number: 50051, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: 127.0.0.1, ports: {{grpc: {}}}, serviceAccount: envoy}}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: greeter, namespace: default}}
spec:
  host: greeter.default.svc.cluster.local
  trafficPolicy: {{tls: {{mode: ISTIO_MUTUAL}}}}
",
        envoy.port()
    )
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn envoy_speaks_mutual_tls_with_certificates_from_our_sds() {
    let dir = tempfile::tempdir().unwrap();
    let control = ControlPlane::builder().ca(dir.path()).identity("default", "client");
    let control = control.identity("default", "envoy").identity("default", "server").start().await.unwrap();
    let ca = control.ca().unwrap();
    let plain = Backend::start("behind-envoy", ANY, Options::default()).await.unwrap();
    let acceptor = acceptor(&ca.identity_dir("default", "server"), Mode::Strict).unwrap();
    let secured = Backend::start("ours", ANY, Options { accept: tls(acceptor), ..Options::default() }).await.unwrap();
    let sds = ca.socket("default", "envoy");
    let mut envoy = Envoy::mutual(&sds, plain.addr(), secured.addr(), SERVER).await.unwrap();

    control.apply(&yaml(envoy.listener())).await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&control.bootstrap()).unwrap().build().await.unwrap();
    let to_envoy = mesh.channel("xds:///greeter.default.svc.cluster.local:50051").unwrap();
    to_envoy.ready(Duration::from_secs(20)).await.unwrap();
    let from_envoy = Endpoint::from_shared(format!("http://{}", envoy.outbound())).unwrap().connect_lazy();

    for round in ["at first", "after a rotation"] {
        let asked = call(to_envoy.clone(), 50, &[]).await;
        assert_eq!(asked.answered_by("behind-envoy"), 50, "{round}: {asked:?}");
        let asked = call(from_envoy.clone(), 50, &[]).await;
        assert_eq!(asked.answered_by("ours"), 50, "{round}: {asked:?}");
        let before = envoy.counter("ssl_context_update_by_sds").await.unwrap();
        ca.rotate_all().unwrap();
        let updated = async {
            while envoy.counter("ssl_context_update_by_sds").await.unwrap() <= before {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), updated).await.expect("Envoy takes the new certificate");
    }
    envoy.running().unwrap();
    assert_eq!(envoy.counter("update_rejected").await.unwrap(), 0, "Envoy refused a secret");
    report::row("mesh-control -> Envoy by SDS", "mutual TLS both ways", "100 and 100 calls, through a rotation");
}

/// What `openssl s_client`, which offers these protocols, says of our server; with `wait` it goes on until the server ends the connection.
pub(crate) async fn s_client(addr: SocketAddr, alpn: &str, identity: &Path, certificate: bool, wait: bool) -> String {
    let mut command = Command::new("openssl");
    command.args(["s_client", "-connect", &addr.to_string(), "-alpn", alpn, "-CAfile"]).arg(identity.join("ca.pem"));
    if certificate {
        command.arg("-cert").arg(identity.join("cert.pem")).arg("-key").arg(identity.join("key.pem"));
    }
    if wait {
        command.arg("-ign_eof");
    }
    let output = command.stdin(Stdio::null()).output();
    let output = tokio::time::timeout(Duration::from_secs(20), output).await.expect("openssl ends").unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn openssl_sees_the_chain_and_the_protocol() {
    let dir = tempfile::tempdir().unwrap();
    let control = ControlPlane::builder().ca(dir.path()).identity("default", "client").identity("default", "server");
    let control = control.start().await.unwrap();
    let ca = control.ca().unwrap();
    let acceptor = acceptor(&ca.identity_dir("default", "server"), Mode::Strict).unwrap();
    let server = Backend::start("ours", ANY, Options { accept: tls(acceptor), ..Options::default() }).await.unwrap();
    let client = ca.identity_dir("default", "client");

    let said = s_client(server.addr(), OFFERED, &client, true, false).await;
    for expected in ["Verify return code: 0 (ok)", "ALPN protocol: h2", "mesh development CA"] {
        assert!(said.contains(expected), "{expected}: {said}");
    }
    let refused = s_client(server.addr(), OFFERED, &client, false, true).await;
    assert!(refused.contains("alert certificate required") || refused.contains("alert number 116"), "{refused}");

    // The authority itself: its own certificate, for its names.
    let said = s_client(control.ca_addr().unwrap(), OFFERED, &client, false, false).await;
    assert!(said.contains("Verify return code: 0 (ok)") && said.contains("ALPN protocol: h2"), "{said}");
    report::row("openssl s_client -> ours", "chain, ALPN, refusal", "verified, h2, certificate required");
}
