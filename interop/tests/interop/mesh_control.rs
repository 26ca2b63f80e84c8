//! Our control plane serves real clients, with the YAML of the quickstart.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use interop::envoy::Envoy;
use interop::{ccore, grpcgo, report};
use mesh_control::ControlPlane;
use tonic::transport::Endpoint;

use crate::common::{Backends, assert_share, call, listed};

const YAML: &str = concat!(
    include_str!("../../../examples/mesh/services.yaml"),
    "\n---\n",
    include_str!("../../../examples/mesh/routes.yaml"),
    "\n---\n",
    include_str!("../../../examples/mesh/policies.yaml"),
);
const SERVICE: &str = "greeter.default.svc.cluster.local:50051";
const ROUTE: &str = "outbound|50051||greeter.default.svc.cluster.local";
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn mesh_control_serves_a_ccore_client() {
    let backends = Backends::start_together().await;
    let control = ControlPlane::builder().yaml(backends.written_into(YAML)).listen(ANY).start().await.unwrap();
    let (target, bootstrap) = (format!("xds:///{SERVICE}"), control.bootstrap());

    let split = ccore::call(&target, &bootstrap, 1000, &[]).await.unwrap();
    assert_eq!(split.ended_with("OK"), 1000, "{split:?}");
    assert_share(split.answered_by("v2"), 1000, 0.1);
    assert!(split.backends.contains_key("v1-a") && split.backends.contains_key("v1-b"), "{split:?}");

    let canary = ccore::call(&target, &bootstrap, 50, &[("x-canary", "1")]).await.unwrap();
    assert_eq!(canary.answered_by("v2"), 50, "{canary:?}");

    let path = "mesh-control -> C-core";
    report::row(path, "90/10 split", &listed(&split.backends));
    report::row(path, "x-canary: 1", &listed(&canary.backends));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn mesh_control_serves_a_grpc_go_client() {
    let backends = Backends::start_together().await;
    let control = ControlPlane::builder().yaml(backends.written_into(YAML)).listen(ANY).start().await.unwrap();

    let split = grpcgo::call(&format!("xds:///{SERVICE}"), &control.bootstrap(), 1000).await.unwrap();
    assert_eq!(split.ended_with("OK"), 1000, "{split:?}");
    assert_share(split.answered_by("v2"), 1000, 0.1);
    assert!(split.backends.contains_key("v1-a") && split.backends.contains_key("v1-b"), "{split:?}");

    report::row("mesh-control -> grpc-go", "90/10 split", &listed(&split.backends));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn mesh_control_serves_envoy() {
    let backends = Backends::start_together().await;
    let control = ControlPlane::builder().yaml(backends.written_into(YAML)).listen(ANY).start().await.unwrap();
    let mut envoy = Envoy::start(control.addr(), ROUTE).await.unwrap();
    let channel = Endpoint::from_shared(format!("http://{}", envoy.listener()))
        .unwrap()
        .origin(format!("http://{SERVICE}").parse().unwrap())
        .connect_lazy();

    let split = call(channel.clone(), 1000, &[]).await;
    assert_eq!(split.ended_with("OK"), 1000, "{split:?}");
    assert_share(split.answered_by("v2"), 1000, 0.1);
    assert!(split.backends.contains_key("v1-a") && split.backends.contains_key("v1-b"), "{split:?}");

    let canary = call(channel, 50, &[("x-canary", "1")]).await;
    assert_eq!(canary.answered_by("v2"), 50, "{canary:?}");

    envoy.running().unwrap();
    assert_eq!(envoy.counter("update_rejected").await.unwrap(), 0, "Envoy refused something");
    let path = "mesh-control -> Envoy";
    report::row(path, "90/10 split", &listed(&split.backends));
    report::row(path, "x-canary: 1", &listed(&canary.backends));
}
