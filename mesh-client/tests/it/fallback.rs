//! TLS of clusters that say nothing of it: the fallback credentials of gRFC A29.

use crate::{
    mesh_layer::{URI, get, reviews, send, text},
    mtls::{MUTUAL, config, control_plane, mutual_greeter},
    sds::client_files,
    support::{ANY, CLUSTER, TARGET, assert_says, edit_cluster, hello, mesh_on, prompt_hello, until},
};
use envoy_types::{
    pb::envoy::{
        config::core::v3::{TransportSocket, transport_socket::ConfigType},
        extensions::transport_sockets::raw_buffer::v3::RawBuffer,
    },
    util::pack_any,
};
use examples::{
    backend::{Backend, Options},
    server::tls,
};
use mesh_client::{BuildError, Mesh};
use mesh_control::{ControlPlane, ca::CertificateAuthority};
use mesh_tls::{
    Acceptor, ClientSettings, Identity, MemorySource, Mode, Roots, SanMatcher, ServerSettings, TrustRoots,
    default_provider,
};
use std::{path::Path, sync::Arc, time::Duration};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
const SERVER: &str = "spiffe://cluster.local/ns/default/sa/greeter";

/// Certificate, key and roots of this folder.
fn source(files: &Path) -> Arc<MemorySource> {
    let read = |name: &str| std::fs::read(files.join(name)).unwrap();
    let identity = Identity::from_pem(&read("cert.pem"), &read("key.pem"), &default_provider()).unwrap();
    let roots = TrustRoots::from_pem(&read("ca.pem")).unwrap();
    Arc::new(MemorySource::new("given", Some(identity), Some(Arc::new(roots))))
}

/// Mutual TLS with a server of this name.
fn mutual(files: &Path, server: &str) -> ClientSettings {
    ClientSettings { san_matchers: vec![SanMatcher::Exact(server.into())], ..ClientSettings::mtls(source(files)) }
}

async fn mesh_with(cp: &ControlPlane, fallback: ClientSettings) -> Mesh {
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().fallback_tls(fallback);
    builder.build().await.unwrap()
}

#[tokio::test]
async fn clusters_without_a_transport_socket_have_the_fallback_and_all_others_their_own() {
    let (cp, dir) = control_plane().await;
    let (backend, acceptor) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    assert!(prompt_hello(&mesh_on(&cp).await.channel(TARGET).unwrap()).await.is_err(), "plaintext unless it is told");
    let mesh = mesh_with(&cp, mutual(&client_files(&dir), SERVER)).await;
    assert_eq!(hello(&mesh.channel(TARGET).unwrap()).await.unwrap().peer, CLIENT);
    let fixed = mesh.fixed_channel(&[backend.addr()]).unwrap();
    assert_eq!(hello(&fixed).await.unwrap().peer, CLIENT, "targets without a control plane too");

    // The fallback would refuse this server: what the cluster says comes first.
    let wary = mesh_with(&cp, mutual(&client_files(&dir), "spiffe://cluster.local/ns/default/sa/other")).await;
    let channel = wary.channel(TARGET).unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_says(status.message(), &[CLUSTER, "sa/other", SERVER]);
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    until("the cluster's own TLS is used", async || prompt_hello(&channel).await.is_ok_and(|r| r.peer == CLIENT)).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    until("the fallback is used again", async || prompt_hello(&channel).await.is_err()).await;
    acceptor.set_mode(Mode::Permissive);
    edit_cluster(&cp, CLUSTER, |cluster| {
        let config_type = Some(ConfigType::TypedConfig(pack_any(RawBuffer {})));
        cluster.transport_socket = Some(TransportSocket { name: "raw".to_owned(), config_type });
    });
    until("raw_buffer is plaintext", async || prompt_hello(&channel).await.is_ok_and(|r| r.peer.is_empty())).await;
}

#[tokio::test]
async fn the_layer_speaks_http1_over_the_fallback() {
    let dir = tempfile::tempdir().unwrap();
    let ca = CertificateAuthority::open(&dir.path().join("ca"), "cluster.local", Duration::from_secs(600)).unwrap();
    let folder = |account| ca.issue("default", account).unwrap();
    let settings = ServerSettings::mtls(source(&folder("reviews")));
    let settings = ServerSettings { alpn: vec![b"http/1.1".to_vec()], ..settings };
    let options = Options { accept: tls(Acceptor::new(settings, default_provider()).unwrap()), ..Options::default() };
    let backend = Backend::http("secure", ANY, options).await.unwrap();
    let cp = ControlPlane::builder().yaml(reviews(&[backend.addr()], "timeout: 10s", "{}")).start().await.unwrap();
    let plain = send(&mesh_on(&cp).await, get(URI)).await;
    assert!(plain.is_err() || plain.unwrap().status().is_server_error());
    let mesh = mesh_with(&cp, mutual(&folder("client"), "spiffe://cluster.local/ns/default/sa/reviews")).await;
    let response = send(&mesh, get(URI)).await.unwrap();
    assert!(response.body().is_mesh() && response.status().is_success());
    assert!(text(response).await.contains("secure"));
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_refused_at_once() {
    let empty = Arc::new(MemorySource::empty("none"));
    let settings = ClientSettings { sni: Some("not a name".into()), ..ClientSettings::new(Roots::Source(empty)) };
    let error = Mesh::builder().fallback_tls(settings).build().await.unwrap_err();
    assert!(matches!(error, BuildError::Fallback(_)), "{error}");
    assert_says(&error.to_string(), &["fallback", "not a name"]);
}
