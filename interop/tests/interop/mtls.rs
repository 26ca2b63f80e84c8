//! Mutual TLS and authorization by our control plane, with servers and clients of others.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use interop::{Outcome, ccore, free_addr, grpcgo, report};
use mesh_client::{Inbound, Mesh, TlsRenewal};
use mesh_control::ControlPlane;
use mesh_control::model::MtlsMode;
use mesh_tls::{ClientSettings, ServerSettings, Source, WorkloadApiConfig, WorkloadApiSource, WorkloadEndpoint};

use crate::common::{call, call_plainly, guarded, listed, serve};

const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Guards against a wait that never ends.
const READY: Duration = Duration::from_secs(30);

/// A control plane with a certificate authority of its own, in whose mesh every call is mutual TLS.
async fn strict(addr: SocketAddr) -> (ControlPlane, tempfile::TempDir) {
    strict_with(addr, Duration::from_secs(3600)).await
}

/// The same, with certificates that last so long.
async fn strict_with(addr: SocketAddr, lifetime: Duration) -> (ControlPlane, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let control = ControlPlane::builder()
        .yaml(guarded(addr, &["client"]))
        .ca(dir.path())
        .certificate_lifetime(lifetime)
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn our_server_lets_in_whom_it_should_of_ccore_and_grpc_go() {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict(addr).await;
    let bootstrap = control.bootstrap_for("default", "greeter");
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let inbound = mesh.inbound(addr).await.unwrap();
    serve(&inbound);
    tokio::time::timeout(READY, inbound.ready()).await.expect("the control plane knows the server");

    for account in ["client", "stranger"] {
        let bootstrap = control.bootstrap_for("default", account);
        let ccore = ccore::call(TARGET, &bootstrap, 20, &[]).await.unwrap();
        let grpc_go = grpcgo::call(TARGET, &bootstrap, 20).await.unwrap();
        for (path, seen) in [("C-core -> mesh server", ccore), ("grpc-go -> mesh server", grpc_go)] {
            if account == "client" {
                assert_eq!(seen.ended_with("OK"), 20, "{path}: {seen:?}");
                assert_eq!(seen.callers.get(CLIENT), Some(&20), "{path}: {seen:?}");
                report::row(path, "mTLS, the caller's identity", &listed(&seen.callers));
            } else {
                assert_eq!(seen.ended_with("PERMISSION_DENIED"), 20, "{path}: {seen:?}");
                report::row(path, "another account", &listed(&seen.codes));
            }
        }
    }
}

/// Certificates are replaced at half of this.
const LIFETIME: Duration = Duration::from_secs(6);
/// Two lifetimes, in which a root is replaced, and a little.
const REPLACED: Duration = Duration::from_secs(14);
/// As many certificates are seen in that time at least.
const CERTIFICATES: usize = 4;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn a_grpc_go_client_and_our_server_follow_files_that_are_replaced() {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict_with(addr, LIFETIME).await;
    let bootstrap = control.bootstrap_for("default", "greeter");
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let inbound = mesh.inbound(addr).await.unwrap();
    let seen = serve(&inbound);
    tokio::time::timeout(READY, inbound.ready()).await.expect("the control plane knows the server");

    control.ca().unwrap().rotate_root().unwrap();
    let called = grpcgo::call_anew(TARGET, &control.bootstrap_for("default", "client"), REPLACED).await.unwrap();
    assert_eq!(called.ended_with("OK"), called.total(), "{called:?}");
    assert_eq!(called.callers.get(CLIENT), Some(&called.total()), "{called:?}");
    let (theirs, ours) = (seen.lock().unwrap().len(), called.certificates.len());
    assert!(theirs >= CERTIFICATES && ours >= CERTIFICATES, "{theirs} and {ours} certificates: {called:?}");
    report::row("grpc-go -> mesh server", "files and the root replaced", &replaced(called.total(), theirs, ours));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn our_client_and_a_grpc_go_server_follow_files_that_are_replaced() {
    let addr = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict_with(addr, LIFETIME).await;
    let mut server = grpcgo::Server::start(addr, &control.bootstrap_for("default", "greeter")).await.unwrap();
    let bootstrap = control.bootstrap_for("default", "client");
    let renewal = TlsRenewal::Within(Duration::from_millis(200));
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().tls_renewal(renewal).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(READY).await.unwrap();

    // What our client sees of the server, by handshakes beside its own.
    let ca = control.ca().unwrap();
    let tls = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(identity(&control, "client")) };
    let tls = mesh_tls::ClientTls::new(tls, mesh_tls::default_provider()).unwrap();
    tokio::time::timeout(READY, tls.ready()).await.unwrap();

    ca.rotate_root().unwrap();
    let (mut calls, mut certificates) = (0, BTreeSet::new());
    let end = tokio::time::Instant::now() + REPLACED;
    while tokio::time::Instant::now() < end {
        let called = call(channel.clone(), 10, &[]).await;
        assert_eq!(called.ended_with("OK"), 10, "after {calls} calls: {called:?}");
        assert_eq!(called.callers.get(CLIENT), Some(&10), "{called:?}");
        calls += called.total();
        let tcp = tokio::net::TcpStream::connect(addr).await.unwrap();
        let (_, peer) = tls.connect(tcp, None).await.unwrap();
        certificates.insert(peer.certificate().to_vec());
    }
    server.running().unwrap();
    let (theirs, ours) = (certificates.len(), server.certificates().unwrap());
    assert!(theirs >= CERTIFICATES && ours >= CERTIFICATES, "{theirs} and {ours} certificates");
    report::row("mesh -> grpc-go server", "files and the root replaced", &replaced(calls, theirs, ours));
}

fn replaced(calls: u64, theirs: usize, ours: usize) -> String {
    format!("{calls} calls, 0 failed; {theirs} certificates of grpc-go's, {ours} of ours")
}

/// The identity that our Workload API gives to this account.
fn identity(control: &ControlPlane, account: &str) -> Arc<dyn Source> {
    let socket = control.ca().expect("it has one").socket("default", account);
    let config = WorkloadApiConfig::new(account, WorkloadEndpoint::Unix(socket), mesh_tls::default_provider());
    Arc::new(WorkloadApiSource::new(config, &tokio::runtime::Handle::current()))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn go_spiffe_has_identities_of_our_workload_api() {
    let nowhere = free_addr(IpAddr::V4(Ipv4Addr::LOCALHOST)).unwrap();
    let (control, _dir) = strict(nowhere).await;
    let socket = control.ca().unwrap().socket("default", "client");

    let server = identity(&control, "greeter");
    tokio::time::timeout(READY, mesh_tls::ready(&*server)).await.expect("our source follows our Workload API");
    let inbound = Inbound::builder().tls(ServerSettings::mtls(server.clone())).bind("127.0.0.1:0").await.unwrap();
    serve(&inbound);
    let called = grpcgo::call_with_svid(&socket, inbound.local_addr(), 20).await.unwrap();
    assert_eq!(called.callers.get(CLIENT), Some(&20), "{called:?}");
    assert_eq!(called.servers.get("spiffe://cluster.local/ns/default/sa/greeter"), Some(&20), "{called:?}");
    report::row("go-spiffe -> mesh server", "SVIDs of our Workload API", &listed(&called.callers));

    let mut go = grpcgo::Server::start_with_svid(&socket).await.unwrap();
    let tls = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(server) };
    let tls = mesh_tls::ClientTls::new(tls, mesh_tls::default_provider()).unwrap();
    let tcp = tokio::net::TcpStream::connect(go.addr()).await.unwrap();
    let (stream, peer) = tls.connect(tcp, None).await.unwrap();
    assert_eq!(peer.to_string(), CLIENT);
    assert_eq!(stream.alpn(), Some(&b"h2"[..]));
    go.running().unwrap();
    report::row("mesh -> go-spiffe server", "SVIDs of our Workload API", &peer.to_string());
}
