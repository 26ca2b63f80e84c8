//! Certificates of SDS servers that are not the control plane, as the agents of SPIRE and Istio are: from code, by the bootstrap, and by
//! the configuration.

use crate::{
    mtls::{MUTUAL, config, control_plane, mutual_greeter},
    sds::{by_name, from_the_agent, socket},
    support::{CLUSTER, GUARD, TARGET, assert_says, edit_cluster, hello, prompt_hello, until},
};
use envoy_types::pb::envoy::config::core::v3::{
    ApiConfigSource, ConfigSource, GrpcService,
    config_source::ConfigSourceSpecifier,
    grpc_service::{GoogleGrpc, TargetSpecifier},
};
use mesh_client::{
    Mesh,
    identity::{SdsConfig, SdsSource},
};
use mesh_control::ControlPlane;
use mesh_tls::{Mode, Source, default_provider, ready};
use std::{sync::Arc, time::Duration};
use tokio::{runtime::Handle, time::timeout};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// The socket on which the client's identity is served.
fn agent(cp: &ControlPlane) -> String {
    format!("unix:{}", cp.ca().unwrap().socket("default", "client").display())
}

fn sds(server: &str) -> SdsConfig {
    SdsConfig::new("agent", server, default_provider()).unwrap()
}

/// A bootstrap of this control plane, with these fields besides.
fn bootstrap(cp: &ControlPlane, more: &str) -> String {
    format!(
        r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}], "node": {{"id": "t"}}{more}}}"#,
        cp.addr()
    )
}

#[tokio::test]
async fn identity_and_roots_come_over_a_unix_socket_and_are_rotated_under_calls() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let source = Arc::new(SdsSource::new(sds(&agent(&cp)), &Handle::current()).unwrap());
    let builder = Mesh::builder().bootstrap_json(&bootstrap(&cp, "")).unwrap();
    let mesh = builder.certificate_provider("default", source.clone()).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
    let (first, before) = (source.current(), backend.connections());
    assert!(first.identity.is_some() && first.roots.is_some());
    cp.ca().unwrap().rotate_all().unwrap();
    until("connections are made anew", async || {
        assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
        backend.connections() > before
    })
    .await;
    let second = source.current();
    assert!(second.generation > first.generation);
    assert!(!Arc::ptr_eq(first.identity.as_ref().unwrap(), second.identity.as_ref().unwrap()));
    // The root is replaced as well: both are trusted for a while.
    cp.ca().unwrap().rotate_root().unwrap();
    until("the new root has come", async || source.current().generation > second.generation).await;
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
}

#[tokio::test]
async fn spires_secret_of_all_trust_domains_says_whose_roots_count() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    let all = SdsConfig { roots: Some("ALL".to_owned()), ..sds(&agent(&cp)) };
    let source = Arc::new(SdsSource::new(all, &Handle::current()).unwrap());
    let builder = Mesh::builder().bootstrap_json(&bootstrap(&cp, "")).unwrap();
    let mesh = builder.certificate_provider("default", source.clone()).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
    let first = source.current();
    assert_eq!(first.roots.as_ref().unwrap().trust_domains(), ["cluster.local".parse().unwrap()]);
    // The bootstrap's plugin too, and a root that is replaced.
    let plugin = format!(
        r#", "certificate_providers": {{"default": {{"plugin_name": "sds", "config": {{"server_uri": "{}", "root_name": "ALL"}}}}}}"#,
        agent(&cp)
    );
    cp.ca().unwrap().rotate_root().unwrap();
    until("the new root has come", async || source.current().generation > first.generation).await;
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
    let mesh = Mesh::builder().bootstrap_json(&bootstrap(&cp, &plugin)).unwrap().build().await.unwrap();
    assert_eq!(hello(&mesh.channel(TARGET).unwrap()).await.unwrap().peer, CLIENT);
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named_and_found_when_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ca");
    let path = folder.join("ns/default/sa/client/api.sock");
    let source = SdsSource::new(sds(&format!("unix:{}", path.display())), &Handle::current()).unwrap();
    until("it is missed", async || source.last_error().is_some()).await;
    assert_says(&source.last_error().unwrap(), &["agent", path.to_str().unwrap(), "No such file"]);
    assert_eq!(source.current().generation, 0);
    let start = || async {
        let builder = ControlPlane::builder().ca(folder.clone()).identity("default", "client");
        builder.start().await.unwrap()
    };
    let cp = start().await;
    let material = timeout(GUARD, ready(&source)).await.expect("it is asked again");
    assert!(material.generation > 0);
    until("both have come", async || {
        let now = source.current();
        now.identity.is_some() && now.roots.is_some()
    })
    .await;
    // What there is stays while the server is away, and is renewed when it is back.
    cp.shutdown().await;
    let kept = source.current();
    assert!(kept.identity.is_some());
    let _again = start().await;
    until("the new certificate has come", async || {
        let now = source.current();
        !Arc::ptr_eq(now.identity.as_ref().unwrap(), kept.identity.as_ref().unwrap())
    })
    .await;
}

#[tokio::test]
async fn a_secret_that_the_server_lacks_or_that_is_another_kind_is_named() {
    let (cp, _dir) = control_plane().await;
    let wrong = SdsConfig { certificate: Some("ROOTCA".into()), roots: None, ..sds(&agent(&cp)) };
    let source = SdsSource::new(wrong, &Handle::current()).unwrap();
    until("it is refused", async || source.last_error().is_some()).await;
    assert_says(&source.last_error().unwrap(), &["ROOTCA", "is not a tls_certificate"]);
    let roots = SdsConfig { certificate: None, ..sds(&agent(&cp)) };
    let source = SdsSource::new(roots, &Handle::current()).unwrap();
    let material = timeout(GUARD, ready(&source)).await.unwrap();
    assert!(material.identity.is_none() && material.roots.is_some());
    for server in ["10.0.0.1:80", "agent.test:80"] {
        let told = SdsSource::new(sds(server), &Handle::current()).unwrap_err().to_string();
        assert_says(&told, &["agent", "in the clear", server]);
        let wanted = SdsConfig { dangerous_plaintext: true, ..sds(server) };
        SdsSource::new(wanted, &Handle::current()).expect("it is said");
    }
    SdsSource::new(sds("localhost:1"), &Handle::current()).expect("nobody else hears it");
    let nothing = SdsConfig { certificate: None, roots: None, ..sds("unix:/a") };
    assert_says(&SdsSource::new(nothing, &Handle::current()).unwrap_err().to_string(), &["agent", "neither"]);
    assert_says(&SdsConfig::new("a", "ftp://a", default_provider()).unwrap_err().to_string(), &["ftp://a"]);
}

#[tokio::test]
async fn the_bootstrap_names_an_sds_server_as_a_certificate_provider() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    let plugin = format!(
        r#", "certificate_providers": {{"default": {{"plugin_name": "sds", "config": {{"server_uri": "{}"}}}}}}"#,
        agent(&cp)
    );
    let mesh = Mesh::builder().bootstrap_json(&bootstrap(&cp, &plugin)).unwrap().build().await.unwrap();
    cp.apply(&config(&backend, MUTUAL)).await.unwrap();
    assert_eq!(hello(&mesh.channel(TARGET).unwrap()).await.unwrap().peer, CLIENT);
    // Istio's own names, which its proxies ask its agent for.
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let istio = Some(socket(by_name("default", "ROOTCA", from_the_agent)));
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = istio);
    let channel = mesh.channel(TARGET).unwrap();
    until("the agent's secrets are used", async || hello(&channel).await.is_ok_and(|r| r.peer == CLIENT)).await;
}

#[tokio::test]
async fn a_cluster_names_an_sds_server_that_the_bootstrap_allows() {
    let (cp, _dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let target = agent(&cp);
    let by_target = || {
        let google = GoogleGrpc { target_uri: target.clone(), stat_prefix: "sds".to_owned(), ..GoogleGrpc::default() };
        let target_specifier = Some(TargetSpecifier::GoogleGrpc(google));
        let service = GrpcService { target_specifier, ..GrpcService::default() };
        let api = ApiConfigSource { grpc_services: vec![service], ..ApiConfigSource::default() };
        let specifier = ConfigSourceSpecifier::ApiConfigSource(api);
        Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
    };
    let own = Some(socket(by_name("default", "ROOTCA", by_target)));
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = own);
    let services =
        format!(r#", "allowed_grpc_services": {{"{target}": {{"channel_creds": [{{"type": "insecure"}}]}}}}"#);
    let allowed = Mesh::builder().bootstrap_json(&bootstrap(&cp, &services)).unwrap().build().await.unwrap();
    let channel = allowed.channel(TARGET).unwrap();
    until("the agent's secrets are used", async || hello(&channel).await.is_ok_and(|r| r.peer == CLIENT)).await;
    // Without that the names are the workload's own, which this mesh does not have: never the server that the resource names.
    let wary = Mesh::builder().bootstrap_json(&bootstrap(&cp, "")).unwrap().build().await.unwrap();
    let status = timeout(Duration::from_secs(30), prompt_hello(&wary.channel(TARGET).unwrap())).await.unwrap();
    assert_says(status.unwrap_err().message(), &[CLUSTER, "the workload's own identity"]);
}
