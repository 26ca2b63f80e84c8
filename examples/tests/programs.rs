//! The programs as a user runs them: processes of their own, on a control plane with the quickstart's YAML.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Output, Stdio};

use examples::backend::{Backend, HttpBackend, Options};
use mesh_control::ControlPlane;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";
const YAML: [&str; 3] =
    [include_str!("../mesh/services.yaml"), include_str!("../mesh/routes.yaml"), include_str!("../mesh/policies.yaml")];

/// The services of the quickstart's YAML, and a control plane that knows where they are.
struct Running {
    control: ControlPlane,
    _greeters: [Backend; 3],
    _reviews: HttpBackend,
}

impl Running {
    async fn start() -> Self {
        let greeter = async |name| Backend::start(name, ANY, Options::default()).await.unwrap();
        let greeters = [greeter("v1-a").await, greeter("v1-b").await, greeter("v2-a").await];
        let reviews = Backend::http("reviews", ANY, Options::default()).await.unwrap();
        let ports = greeters.iter().map(Backend::addr).chain([reviews.addr()]).map(|addr| addr.port().to_string());
        let yaml = ["6001", "6002", "6003", "6080"]
            .iter()
            .zip(ports)
            .fold(YAML.join("\n---\n"), |yaml, (placeholder, port)| yaml.replace(placeholder, &port));
        let control = ControlPlane::builder().yaml(yaml).listen(ANY).start().await.unwrap();
        Self { control, _greeters: greeters, _reviews: reviews }
    }

    async fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = command(program, args);
        command.env("GRPC_XDS_BOOTSTRAP_CONFIG", self.control.bootstrap());
        command.output().await.unwrap()
    }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command
        .args(args)
        .env_remove("GRPC_XDS_BOOTSTRAP")
        .env_remove("GRPC_XDS_BOOTSTRAP_CONFIG")
        .env_remove("RUST_LOG")
        .kill_on_drop(true);
    command
}

/// A greeter server, killed when it is dropped.
struct Server {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// A greeter server on a free port, and its address.
async fn serve(args: &[&str]) -> (Server, String) {
    let mut command = command(env!("CARGO_BIN_EXE_greeter-server"), &["--listen", "127.0.0.1:0"]);
    let mut child = command.args(args).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines.next_line().await.unwrap().unwrap();
    let (_, addr) = line.split_once(" listens on ").unwrap();
    (Server { child, lines }, addr.to_owned())
}

/// What it printed, when it ended well.
#[track_caller]
fn printed(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// How many answers the greeter client counted of this backend.
fn count(printed: &str, backend: &str) -> u32 {
    let line = printed.lines().find(|line| line.split_whitespace().nth(1) == Some(backend));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_smallest_clients_reach_their_services() {
    let running = Running::start().await;
    let tonic = printed(&running.run(env!("CARGO_BIN_EXE_tonic-client"), &[]).await);
    assert!(tonic.trim_end().ends_with("says: Hello mesh"), "{tonic}");

    let (_outside, outside) = serve(&["--name", "outside", "--http"]).await;
    let urls = ["http://reviews.default.svc.cluster.local:9080/reviews/1", &format!("http://{outside}/x")];
    let hyper = printed(&running.run(env!("CARGO_BIN_EXE_hyper-client"), &urls).await);
    assert!(hyper.contains("200 OK through the mesh\nhello from reviews at /reviews/1"), "{hyper}");
    assert!(hyper.contains("200 OK past the mesh\nhello from outside at /x"), "{hyper}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_client_counts_by_backend_and_explains() {
    let running = Running::start().await;
    let program = env!("CARGO_BIN_EXE_greeter-client");
    let split = printed(&running.run(program, &[TARGET, "--requests", "500"]).await);
    let (v1, v2) = (count(&split, "v1-a") + count(&split, "v1-b"), count(&split, "v2-a"));
    assert_eq!(v1 + v2, 500, "{split}");
    assert!((17..=83).contains(&v2), "a tenth within five standard deviations: {split}");

    let canary = printed(&running.run(program, &[TARGET, "--requests", "30", "--header", "x-canary=1"]).await);
    assert_eq!(count(&canary, "v2-a"), 30, "{canary}");

    let explained = printed(&running.run(program, &[TARGET, "--explain", "--header", "x-canary=1"]).await);
    assert!(explained.contains("canary"), "{explained}");
    assert!(explained.contains("outbound|50051|v2|greeter.default.svc.cluster.local"), "{explained}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_client_says_what_is_wrong() {
    let program = env!("CARGO_BIN_EXE_greeter-client");
    let missing = command(program, &[TARGET]).output().await.unwrap();
    assert_eq!(missing.status.code(), Some(1));
    let said = String::from_utf8_lossy(&missing.stderr);
    assert!(said.contains("GRPC_XDS_BOOTSTRAP") && said.contains("GRPC_XDS_BOOTSTRAP_CONFIG"), "{said}");

    let running = Running::start().await;
    let unknown = "xds:///nobody.default.svc.cluster.local:1";
    let failed = running.run(program, &[unknown, "--timeout", "5"]).await;
    assert_eq!(failed.status.code(), Some(1));
    let said = String::from_utf8_lossy(&failed.stdout);
    assert!(said.contains("nobody.default.svc.cluster.local:1"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_server_fails_as_told() {
    let (_server, addr) = serve(&["--name", "lone", "--fail-rate", "1"]).await;
    let target = format!("ipv4:{addr}");
    let client = command(env!("CARGO_BIN_EXE_greeter-client"), &[&target, "--requests", "3"]).output().await.unwrap();
    assert_eq!(client.status.code(), Some(1));
    let said = String::from_utf8_lossy(&client.stdout);
    assert!(said.contains("Unavailable: lone was told to fail"), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_server_serves_plain_http_too() {
    let (_works, works) = serve(&["--name", "reviews", "--http"]).await;
    let (_fails, fails) = serve(&["--name", "broken", "--http", "--fail-rate", "1"]).await;
    let running = Running::start().await;
    let (works, fails) = (format!("http://{works}/reviews/1"), format!("http://{fails}/"));
    let said = printed(&running.run(env!("CARGO_BIN_EXE_hyper-client"), &[&works, &fails]).await);
    assert!(said.contains("200 OK past the mesh\nhello from reviews at /reviews/1"), "{said}");
    assert!(said.contains("503 Service Unavailable past the mesh\nbroken was told to fail"), "{said}");
}

#[cfg(unix)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_server_ends_with_its_summary_on_sigterm() {
    let (mut server, addr) = serve(&["--name", "lone"]).await;
    let target = format!("ipv4:{addr}");
    printed(&command(env!("CARGO_BIN_EXE_greeter-client"), &[&target, "--requests", "3"]).output().await.unwrap());
    let pid = server.child.id().unwrap().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.unwrap().success());
    let last = server.lines.next_line().await.unwrap();
    assert_eq!(last.as_deref(), Some("greeter lone answered 3 calls, and failed 0 of them"));
    assert!(server.child.wait().await.unwrap().success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rust_log_chooses_what_is_logged() {
    let (_server, addr) = serve(&["--name", "lone"]).await;
    let target = format!("ipv4:{addr}");
    let mut logged = Vec::new();
    for filter in ["trace", "off"] {
        let mut client = command(env!("CARGO_BIN_EXE_greeter-client"), &[&target]);
        let output = client.env("RUST_LOG", filter).output().await.unwrap();
        assert_eq!(count(&printed(&output), "lone"), 1);
        logged.push(output.stderr.len());
    }
    assert!(logged[0] > 0 && logged[1] == 0, "{logged:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_greeter_server_speaks_mutual_tls_with_certificates_of_the_dev_ca() {
    let folder = tempfile::tempdir().unwrap();
    let control =
        ControlPlane::builder().ca(folder.path()).identity("default", "client").identity("default", "greeter");
    let control = control.listen(ANY).start().await.unwrap();
    let identity = folder.path().join("ns/default/sa/greeter");
    let args = ["--name", "secure", "--strict", "--tls", identity.to_str().unwrap()];
    let servers = [serve(&args).await, serve(&args).await, serve(&args).await];
    let mut yaml = YAML.join("\n---\n");
    for (placeholder, (_, addr)) in ["6001", "6002", "6003"].iter().zip(&servers) {
        yaml = yaml.replace(placeholder, addr.rsplit(':').next().unwrap());
    }
    let yaml = yaml.replace("loadBalancer: {simple: ROUND_ROBIN}", "tls: {mode: ISTIO_MUTUAL}");
    control.apply(&yaml).await.unwrap();

    let program = env!("CARGO_BIN_EXE_greeter-client");
    let mut client = command(program, &[TARGET, "--explain"]);
    let said = printed(&client.env("GRPC_XDS_BOOTSTRAP_CONFIG", control.bootstrap()).output().await.unwrap());
    assert_eq!(count(&said, "secure"), 1, "{said}");
    assert!(said.contains("spiffe://cluster.local/ns/default/sa/greeter"), "{said}");

    let plain = command(program, &[&format!("ipv4:{}", servers[0].1), "--timeout", "5"]).output().await.unwrap();
    assert_eq!(plain.status.code(), Some(1), "{}", String::from_utf8_lossy(&plain.stdout));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn layers_without_a_mesh_hide_failures() {
    let said = printed(&command(env!("CARGO_BIN_EXE_layers-without-a-mesh"), &[]).output().await.unwrap());
    assert!(said.starts_with("the caller made 200 requests, and 0 of them failed"), "{said}");
}
