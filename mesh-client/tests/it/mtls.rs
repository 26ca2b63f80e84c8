//! Mutual TLS through channels: switched on and rotated under load, and what a caller is told when it cannot be.

use crate::support::{
    ANY, CLUSTER, GUARD, TARGET, World, assert_says, greeter, hello, mesh_on, prompt_hello, routes, rule, service, to,
    until,
};
use examples::{
    backend::{Backend, Options},
    server::{acceptor, tls},
};
use mesh_client::{Explain, Mesh, MeshChannel};
use mesh_control::{ControlPlane, Event};
use mesh_tls::Mode;
use std::{
    path::Path,
    sync::{Arc, Mutex},
};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";
pub(crate) const MUTUAL: &str = "{tls: {mode: ISTIO_MUTUAL}}";

/// A greeter with a certificate of the control plane's CA.
pub(crate) async fn mutual_greeter(cp: &ControlPlane, mode: Mode) -> (Backend, mesh_tls::Acceptor) {
    let identity = cp.ca().unwrap().ensure("default", "greeter").unwrap();
    let acceptor = acceptor(&identity, mode).unwrap();
    let options = Options { accept: tls(acceptor.clone()), ..Options::default() };
    (Backend::start("mutual", ANY, options).await.unwrap(), acceptor)
}

/// A control plane with a CA, which has issued the client's identity.
pub(crate) async fn control_plane() -> (ControlPlane, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::builder().ca(dir.path().join("ca")).identity("default", "client").start().await.unwrap();
    (cp, dir)
}

/// The greeter's service with this traffic policy, without retries that would hide a failure.
pub(crate) fn config(backend: &Backend, traffic: &str) -> String {
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    service(&[("one", backend.addr())]) + &route + &rule(traffic, &[])
}

/// A bootstrap of this control plane with these certificate providers.
fn bootstrap(cp: &ControlPlane, providers: &str) -> String {
    format!(
        r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}],
            "node": {{"id": "test"}}, "certificate_providers": {providers}}}"#,
        cp.addr()
    )
}

fn provider(name: &str, files: &[(&str, &Path)]) -> String {
    let files: Vec<_> = files.iter().map(|(key, path)| format!(r#""{key}": "{}""#, path.display())).collect();
    format!(
        r#"{{"{name}": {{"plugin_name": "file_watcher", "config": {{"refresh_interval": "1s", {}}}}}}}"#,
        files.join(", ")
    )
}

/// The greeter's channel of a mesh with these certificate providers.
async fn channel_with(cp: &ControlPlane, providers: &str) -> MeshChannel {
    let mesh = Mesh::builder().bootstrap_json(&bootstrap(cp, providers)).unwrap().build().await.unwrap();
    mesh.channel(TARGET).unwrap()
}

/// Callers in the background, and who the backend saw.
struct Load {
    seen: Arc<Mutex<Vec<String>>>,
    stop: watch::Sender<bool>,
    callers: JoinSet<()>,
}

impl Load {
    /// A call that fails ends the test when it is stopped.
    fn start(channel: &MeshChannel) -> Self {
        let (seen, stop, mut callers) = (Arc::new(Mutex::new(Vec::new())), watch::Sender::new(false), JoinSet::new());
        for _ in 0..4 {
            let (channel, seen, stop) = (channel.clone(), Arc::clone(&seen), stop.subscribe());
            callers.spawn(async move {
                while !*stop.borrow() {
                    let reply = hello(&channel).await.expect("no call fails");
                    seen.lock().unwrap().push(reply.peer);
                    tokio::task::yield_now().await;
                }
            });
        }
        Self { seen, stop, callers }
    }

    /// How many calls came from this identity.
    fn from(&self, peer: &str) -> usize {
        self.seen.lock().unwrap().iter().filter(|p| *p == peer).count()
    }

    async fn stop(mut self) {
        self.stop.send_replace(true);
        while let Some(end) = self.callers.join_next().await {
            end.unwrap();
        }
    }
}

#[tokio::test]
async fn mutual_tls_is_switched_on_under_load() {
    let (cp, _dir) = control_plane().await;
    let (backend, acceptor) = mutual_greeter(&cp, Mode::Permissive).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let world = World::on(cp).await;
    let load = Load::start(&world.channel);
    until("plaintext serves", async || load.from("") > 50).await;
    assert_eq!(load.from(CLIENT), 0);
    world.cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    until("the backend knows its caller", async || load.from(CLIENT) > 200).await;
    acceptor.set_mode(Mode::Strict);
    load.stop().await;

    let explain = Explain::default();
    let reply = crate::support::hello_with(&world.channel, |r| drop(r.extensions_mut().insert(explain.clone()))).await;
    assert_eq!(reply.unwrap().peer, CLIENT);
    assert_says(explain.explanation().get("peer").unwrap(), &[SERVER]);
}

#[tokio::test]
async fn certificates_are_rotated_under_load() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let world = World::on(cp).await;
    let load = Load::start(&world.channel);
    until("calls are made", async || load.from(CLIENT) > 50).await;
    for rotation in 1..=2 {
        let before = backend.connections();
        world.cp.ca().unwrap().rotate_all().unwrap();
        until(&format!("connections are made anew after rotation {rotation}"), async || backend.connections() > before)
            .await;
        let calls = load.from(CLIENT);
        until("calls go on", async || load.from(CLIENT) > calls + 50).await;
    }
    assert_eq!(load.from(""), 0);
    load.stop().await;
}

#[tokio::test]
async fn a_server_of_another_name_is_not_called_and_both_names_are_said() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    let wanted = "spiffe://cluster.local/ns/default/sa/other";
    let traffic = format!("{{tls: {{mode: ISTIO_MUTUAL, subjectAltNames: [\"{wanted}\"]}}}}");
    cp.apply(&config(&backend, &traffic)).await.unwrap();
    let world = World::on(cp).await;
    let status = prompt_hello(&world.channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &[TARGET, CLUSTER, "wanted", wanted, "offered", SERVER]);
    assert_eq!(backend.state().calls(), 0);

    let traffic = traffic.replace(wanted, SERVER);
    world.cp.apply(&config(&backend, &traffic)).await.unwrap();
    until("the right name is taken", async || hello(&world.channel).await.is_ok_and(|r| r.peer == CLIENT)).await;
}

#[tokio::test]
async fn a_provider_that_the_bootstrap_lacks_is_refused_and_never_means_plaintext() {
    let (cp, dir) = control_plane().await;
    // It would take plaintext.
    let backend = greeter("plain").await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let mut events = cp.events();
    let ca = dir.path().join("ca/ns/default/sa/client/ca.pem");
    for providers in ["{}".to_owned(), provider("another", &[("ca_certificate_file", &ca)])] {
        let channel = channel_with(&cp, &providers).await;
        let status = prompt_hello(&channel).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert_says(status.message(), &[TARGET, CLUSTER, "\"default\"", "certificate_providers"]);
        let nack = async {
            loop {
                if let Some(Event::Nack(nack)) = events.next().await {
                    break nack;
                }
            }
        };
        let nack = tokio::time::timeout(GUARD, nack).await.expect("no NACK came");
        assert_says(&nack.detail, &[CLUSTER, "default"]);
    }
    assert_eq!((backend.state().calls(), backend.connections()), (0, 0));
}

#[tokio::test]
async fn a_caller_without_certificate_is_refused_and_told_why() {
    let (cp, dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let ca = dir.path().join("ca/ns/default/sa/client/ca.pem");
    let channel = channel_with(&cp, &provider("default", &[("ca_certificate_file", &ca)])).await;
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &[TARGET, CLUSTER, &backend.addr().to_string(), "certificate"]);
    // One that speaks plaintext is refused as well.
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_eq!(backend.state().calls(), 0);
}

#[tokio::test]
async fn certificate_files_that_are_missing_are_named_until_they_come() {
    let (cp, dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let (from, late) = (dir.path().join("ca/ns/default/sa/client"), dir.path().join("late"));
    let [cert, key, ca] = ["cert.pem", "key.pem", "ca.pem"].map(|name| late.join(name));
    let files = [("certificate_file", &*cert), ("private_key_file", &*key), ("ca_certificate_file", &*ca)];
    let channel = channel_with(&cp, &provider("default", &files)).await;
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &[TARGET, CLUSTER, "late/", ".pem", "No such file"]);
    std::fs::create_dir(&late).unwrap();
    for file in ["ca.pem", "key.pem", "cert.pem"] {
        std::fs::copy(from.join(file), late.join(file)).unwrap();
    }
    until("the files are read", async || hello(&channel).await.is_ok_and(|r| r.peer == CLIENT)).await;
}
