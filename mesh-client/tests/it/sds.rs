//! Certificates by SDS, ways to connect by endpoint, and what a TLS handshake offers.

use crate::{
    mtls::{config, control_plane, mutual_greeter},
    support::{
        CLUSTER, GUARD, TARGET, World, assert_says, assignment, edit, edit_cluster, greeter, hello, mesh_on,
        prompt_hello, until,
    },
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::cluster::TransportSocketMatch,
            core::v3::{
                AggregatedConfigSource, ApiConfigSource, ConfigSource, DataSource, HealthStatus, Metadata,
                TransportSocket, TypedExtensionConfig, config_source::ConfigSourceSpecifier, data_source::Specifier,
                transport_socket::ConfigType,
            },
            endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
        },
        extensions::transport_sockets::{
            raw_buffer::v3::RawBuffer,
            tls::v3::{
                CertificateValidationContext, CommonTlsContext, SdsSecretConfig, Secret, SpiffeCertValidatorConfig,
                TlsCertificate, UpstreamTlsContext, common_tls_context::ValidationContextType, secret::Type,
                spiffe_cert_validator_config::TrustDomain,
            },
        },
    },
    google::protobuf::{Struct, Value, value::Kind},
};
use envoy_types::util::pack_any;
use examples::backend::Backend;
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_tls::{ClientHello, FirstBytes, Identity, MemorySource, Mode, TrustRoots};
use mesh_xds::server::ResourceType;
use std::{path::Path, sync::Arc};
use tempfile::TempDir;
use tokio::{io::AsyncReadExt, net::TcpListener};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

pub(crate) fn over_ads() -> Option<ConfigSource> {
    let specifier = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
}

/// What Istio's agent serves to its proxy.
pub(crate) fn from_the_agent() -> Option<ConfigSource> {
    let specifier = ConfigSourceSpecifier::ApiConfigSource(ApiConfigSource::default());
    Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() })
}

pub(crate) fn by_name(own: &str, roots: &str, source: impl Fn() -> Option<ConfigSource>) -> CommonTlsContext {
    let named = |name: &str| SdsSecretConfig { name: name.to_owned(), sds_config: source() };
    CommonTlsContext {
        tls_certificate_sds_secret_configs: vec![named(own)],
        validation_context_type: Some(ValidationContextType::ValidationContextSdsSecretConfig(named(roots))),
        ..CommonTlsContext::default()
    }
}

pub(crate) fn socket(common: CommonTlsContext) -> TransportSocket {
    let context = UpstreamTlsContext { common_tls_context: Some(common), ..UpstreamTlsContext::default() };
    TransportSocket { name: "tls".to_owned(), config_type: Some(ConfigType::TypedConfig(pack_any(context))) }
}

/// The content of a file, or its name.
pub(crate) fn data(path: &Path, by_file: bool) -> Option<DataSource> {
    if by_file { file(path) } else { text(path) }
}

fn text(path: &Path) -> Option<DataSource> {
    let text = std::fs::read_to_string(path).unwrap();
    Some(DataSource { specifier: Some(Specifier::InlineString(text)), ..DataSource::default() })
}

fn file(path: &Path) -> Option<DataSource> {
    let name = path.to_str().unwrap().to_owned();
    Some(DataSource { specifier: Some(Specifier::Filename(name)), ..DataSource::default() })
}

/// Serves the files of an identity as secrets: `own` and `roots`.
fn serve_secrets(cp: &ControlPlane, files: &Path, part: impl Fn(&Path) -> Option<DataSource>) {
    let certificate = TlsCertificate {
        certificate_chain: part(&files.join("cert.pem")),
        private_key: part(&files.join("key.pem")),
        ..TlsCertificate::default()
    };
    let context = CertificateValidationContext {
        trusted_ca: part(&files.join("ca.pem")),
        ..CertificateValidationContext::default()
    };
    serve_secret(cp, "own", Type::TlsCertificate(certificate));
    serve_secret(cp, "roots", Type::ValidationContext(context));
}

pub(crate) fn serve_secret(cp: &ControlPlane, name: &str, secret: Type) {
    let secret = Secret { name: name.to_owned(), r#type: Some(secret) };
    cp.cache().update(ResourceType::Secret, name, pack_any(secret));
}

/// Where the control plane's CA keeps the client's identity.
/// A control plane, a server over mutual TLS, and a cluster of it whose certificates are the secrets `own` and `roots`.
async fn by_secrets(roots: &str) -> (ControlPlane, Backend, TempDir) {
    let (cp, dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = Some(socket(by_name("own", roots, over_ads))));
    (cp, backend, dir)
}

pub(crate) fn client_files(dir: &TempDir) -> std::path::PathBuf {
    dir.path().join("ca/ns/default/sa/client")
}

#[tokio::test]
async fn certificates_come_as_secrets_and_are_rotated_by_them() {
    let (cp, backend, dir) = by_secrets("roots").await;
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    // The first call waits for the secrets: they come when it is under way.
    let first = tokio::spawn({
        let channel = channel.clone();
        async move { hello(&channel).await }
    });
    let asked =
        async || mesh.status().unwrap().resources.iter().filter(|r| r.type_url.ends_with(".Secret")).count() == 2;
    until("both secrets are asked for", asked).await;
    serve_secrets(&cp, &client_files(&dir), text);
    assert_eq!(first.await.unwrap().unwrap().peer, CLIENT);

    let before = backend.connections();
    cp.ca().unwrap().rotate_all().unwrap();
    serve_secrets(&cp, &client_files(&dir), text);
    until("connections are made anew", async || {
        assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
        backend.connections() > before
    })
    .await;
}

#[tokio::test]
async fn a_secret_that_is_wrong_or_gone_takes_nothing_away_and_is_named() {
    let (cp, _backend, dir) = by_secrets("roots").await;
    let files = client_files(&dir);
    serve_secrets(&cp, &files, text);
    // The wrong kind of secret first.
    let context = CertificateValidationContext { trusted_ca: text(&files.join("ca.pem")), ..Default::default() };
    serve_secret(&cp, "own", Type::ValidationContext(context));
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &[TARGET, CLUSTER, "\"own\"", "is not a tls_certificate"]);
    // A key that does not belong to the certificate.
    let other = mesh_tls_key();
    let certificate = TlsCertificate {
        certificate_chain: text(&files.join("cert.pem")),
        private_key: Some(DataSource { specifier: Some(Specifier::InlineString(other)), ..DataSource::default() }),
        ..TlsCertificate::default()
    };
    serve_secret(&cp, "own", Type::TlsCertificate(certificate));
    until("the key is found not to belong to it", async || {
        prompt_hello(&channel)
            .await
            .is_err_and(|status| status.message().contains("own") && status.message().contains("key"))
    })
    .await;
    serve_secrets(&cp, &files, text);
    until("the right secrets serve", async || hello(&channel).await.is_ok()).await;
    // What is broken afterwards changes nothing.
    serve_secret(&cp, "own", Type::GenericSecret(Default::default()));
    cp.cache().remove(ResourceType::Secret, "roots");
    until("the control plane is told", async || {
        mesh.status().unwrap().resources.iter().any(|r| &*r.name == "own" && r.error_state.is_some())
    })
    .await;
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
}

/// A private key of nobody.
/// SPIRE's secret `ALL`: these domains with these roots.
fn by_domain(domains: &[(&str, String)]) -> Type {
    let inline = |pem: &str| {
        Some(DataSource { specifier: Some(Specifier::InlineString(pem.to_owned())), ..DataSource::default() })
    };
    let domain = |(name, pem): &(&str, String)| TrustDomain {
        name: (*name).to_owned(),
        trust_bundle: inline(pem),
        ..TrustDomain::default()
    };
    let config = SpiffeCertValidatorConfig { trust_domains: domains.iter().map(domain).collect(), trust_bundles: None };
    let typed_config = Some(pack_any(config));
    let custom = TypedExtensionConfig { name: "envoy.tls.cert_validator.spiffe".to_owned(), typed_config };
    let context = CertificateValidationContext { custom_validator_config: Some(custom), ..Default::default() };
    Type::ValidationContext(context)
}

#[tokio::test]
async fn each_trust_domain_is_verified_by_its_own_roots_alone() {
    let (cp, _backend, dir) = by_secrets("ALL").await;
    let files = client_files(&dir);
    serve_secrets(&cp, &files, text);
    let ours = std::fs::read_to_string(files.join("ca.pem")).unwrap();
    let theirs = {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap().pem()
    };
    serve_secret(&cp, "ALL", by_domain(&[("cluster.local", ours.clone()), ("partner.example", theirs.clone())]));
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
    // A partner's root does not speak for our domain, nor ours for theirs.
    for (domains, reason) in [
        (vec![("cluster.local", theirs), ("partner.example", ours.clone())], "trust for trust domain cluster.local"),
        (
            vec![("partner.example", ours)],
            "its trust domain cluster.local is not one of those that we trust (partner.example)",
        ),
    ] {
        serve_secret(&cp, "ALL", by_domain(&domains));
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        let status = prompt_hello(&channel).await.unwrap_err();
        assert_says(status.message(), &[TARGET, CLUSTER, reason]);
    }
}

#[tokio::test]
async fn a_secret_whose_time_is_over_replaces_nothing_and_says_since_when() {
    let (cp, _backend, dir) = by_secrets("roots").await;
    let files = client_files(&dir);
    serve_secrets(&cp, &files, text);
    let old = {
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names = vec![rcgen::SanType::URI(CLIENT.try_into().unwrap())];
        params.not_after = rcgen::date_time_ymd(2021, 3, 4);
        let key = rcgen::KeyPair::generate().unwrap();
        let inline =
            |text| Some(DataSource { specifier: Some(Specifier::InlineString(text)), ..DataSource::default() });
        TlsCertificate {
            certificate_chain: inline(params.self_signed(&key).unwrap().pem()),
            private_key: inline(key.serialize_pem()),
            ..TlsCertificate::default()
        }
    };
    serve_secret(&cp, "own", Type::TlsCertificate(old.clone()));
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_says(status.message(), &[TARGET, CLUSTER, "secret own", CLIENT, "the certificate expired at 2021-03-04"]);
    serve_secrets(&cp, &files, text);
    until("the right secrets serve", async || hello(&channel).await.is_ok()).await;
    serve_secret(&cp, "own", Type::TlsCertificate(old));
    let version = || {
        let all = mesh.status().unwrap().resources;
        all.into_iter().find(|resource| &*resource.name == "own").map(|resource| resource.version)
    };
    let before = version();
    until("it has come", async || version() != before).await;
    for _ in 0..20 {
        assert_eq!(hello(&channel).await.unwrap().peer, CLIENT);
    }
}

fn mesh_tls_key() -> String {
    rcgen::KeyPair::generate().unwrap().serialize_pem()
}

#[tokio::test]
async fn secrets_and_contexts_may_name_files() {
    let (cp, _backend, dir) = by_secrets("roots").await;
    let files = client_files(&dir);
    serve_secrets(&cp, &files, file);
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("the files are read", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;

    let path = |name: &str| files.join(name).display().to_string();
    let own = format!("file-cert:{}~{}", path("cert.pem"), path("key.pem"));
    let roots = format!("file-root:{}", path("ca.pem"));
    let by_file = by_name(&own, &roots, from_the_agent);
    let inline = CommonTlsContext {
        tls_certificates: vec![TlsCertificate {
            certificate_chain: text(&files.join("cert.pem")),
            private_key: text(&files.join("key.pem")),
            ..TlsCertificate::default()
        }],
        validation_context_type: Some(ValidationContextType::ValidationContext(CertificateValidationContext {
            trusted_ca: text(&files.join("ca.pem")),
            ..CertificateValidationContext::default()
        })),
        ..CommonTlsContext::default()
    };
    for common in [by_file, inline] {
        edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = Some(socket(common)));
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        until("the context serves", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
    }
}

#[tokio::test]
async fn istios_names_are_the_identity_that_the_application_gave() {
    let (cp, dir) = control_plane().await;
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let istio = || Some(socket(by_name("default", "ROOTCA", from_the_agent)));
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket = istio());
    let bootstrap =
        format!(r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}]}}"#, cp.addr());
    let none = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let status = prompt_hello(&none.channel(TARGET).unwrap()).await.unwrap_err();
    assert_says(status.message(), &[CLUSTER, "the workload's own identity", "`default`"]);

    let read = |name: &str| std::fs::read(client_files(&dir).join(name)).unwrap();
    let identity = Identity::from_pem(&read("cert.pem"), &read("key.pem"), &mesh_tls::default_provider()).unwrap();
    let roots = Arc::new(TrustRoots::from_pem(&read("ca.pem")).unwrap());
    let source = Arc::new(MemorySource::new("given", Some(identity), Some(roots)));
    let builder = Mesh::builder().bootstrap_json(&bootstrap).unwrap().certificate_provider("default", source);
    let channel = builder.build().await.unwrap().channel(TARGET).unwrap();
    until("the given identity is used", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
    // The instance of the bootstrap is the identity as well.
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("the bootstrap's is used", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
}

fn tls_mode(mode: &str) -> Struct {
    let value = Value { kind: Some(Kind::StringValue(mode.to_owned())) };
    Struct { fields: [("tlsMode".to_owned(), value)].into() }
}

/// What Istio sends for auto-mTLS.
fn auto_mtls() -> Vec<TransportSocketMatch> {
    let plain =
        TransportSocket { name: "raw".to_owned(), config_type: Some(ConfigType::TypedConfig(pack_any(RawBuffer {}))) };
    vec![
        TransportSocketMatch {
            name: "tlsMode-istio".to_owned(),
            r#match: Some(tls_mode("istio")),
            transport_socket: Some(socket(by_name("default", "ROOTCA", from_the_agent))),
        },
        TransportSocketMatch {
            name: "tlsMode-disabled".to_owned(),
            r#match: Some(Struct::default()),
            transport_socket: Some(plain),
        },
    ]
}

/// Says of the endpoint with this port that it speaks mTLS, or not.
fn label(cp: &ControlPlane, port: u16, mutual: bool) {
    edit(cp, ResourceType::ClusterLoadAssignment, CLUSTER, |endpoints: &mut ClusterLoadAssignment| {
        for endpoint in endpoints.endpoints.iter_mut().flat_map(|locality| &mut locality.lb_endpoints) {
            if format!("{:?}", endpoint.host_identifier).contains(&format!("PortValue({port})")) {
                let filter_metadata = [("envoy.transport_socket_match".to_owned(), tls_mode("istio"))].into();
                endpoint.metadata = mutual.then(|| Metadata { filter_metadata, ..Metadata::default() });
            }
        }
    });
}

#[tokio::test]
async fn each_endpoint_is_spoken_to_as_its_metadata_says() {
    let (cp, _dir) = control_plane().await;
    let (secure, acceptor) = mutual_greeter(&cp, Mode::Strict).await;
    let plain = greeter("plain").await;
    cp.apply(&config(&secure, "{}")).await.unwrap();
    let both = [secure.addr(), plain.addr()];
    cp.cache().update(
        ResourceType::ClusterLoadAssignment,
        CLUSTER,
        pack_any(assignment(&[&both], HealthStatus::Healthy)),
    );
    label(&cp, secure.addr().port(), true);
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket_matches = auto_mtls());
    let world = World::on(cp).await;
    let mut names = Vec::new();
    for _ in 0..8 {
        let reply = hello(&world.channel).await.unwrap();
        assert_eq!(reply.peer, if reply.backend == "mutual" { CLIENT } else { "" });
        names.push(reply.backend);
    }
    assert!(names.iter().any(|name| name == "mutual") && names.iter().any(|name| name == "plain"), "{names:?}");
    // The server stops to want TLS, and says so: new connections, no failed call.
    acceptor.set_mode(Mode::Permissive);
    label(&world.cp, secure.addr().port(), false);
    until("both are plaintext", async || {
        let mut peers = Vec::new();
        for _ in 0..4 {
            peers.push(hello(&world.channel).await.unwrap().peer);
        }
        peers.iter().all(String::is_empty)
    })
    .await;
}

#[tokio::test]
async fn a_socket_for_others_is_never_used_in_plaintext_instead() {
    let (cp, _dir) = control_plane().await;
    let plain = greeter("plain").await;
    cp.apply(&config(&plain, "{}")).await.unwrap();
    label(&cp, plain.addr().port(), true);
    edit_cluster(&cp, CLUSTER, |cluster| cluster.transport_socket_matches = auto_mtls());
    let world = World::on(cp).await;
    let status = prompt_hello(&world.channel).await.unwrap_err();
    assert_eq!(status.code(), tonic::Code::Unavailable);
    assert_says(status.message(), &[CLUSTER, &plain.addr().to_string(), "TLS"]);
    assert_eq!(plain.state().calls(), 0);
}

#[tokio::test]
async fn the_server_name_is_the_endpoints_and_istios_protocols_are_offered() {
    let (cp, _dir) = control_plane().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (backend, _) = mutual_greeter(&cp, Mode::Strict).await;
    cp.apply(&config(&backend, "{}")).await.unwrap();
    let mut endpoints = assignment(&[&[listener.local_addr().unwrap()]], HealthStatus::Healthy);
    let Some(HostIdentifier::Endpoint(endpoint)) = &mut endpoints.endpoints[0].lb_endpoints[0].host_identifier else {
        panic!()
    };
    endpoint.hostname = "greeter.example.com:8443".to_owned();
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(endpoints));
    edit_cluster(&cp, CLUSTER, |cluster| {
        let common = CommonTlsContext {
            alpn_protocols: ["istio-peer-exchange", "istio", "h2"].map(str::to_owned).into(),
            ..by_name("default", "ROOTCA", from_the_agent)
        };
        let context = UpstreamTlsContext {
            common_tls_context: Some(common),
            sni: "not.this.one".to_owned(),
            auto_host_sni: true,
            ..UpstreamTlsContext::default()
        };
        let config_type = Some(ConfigType::TypedConfig(pack_any(context)));
        cluster.transport_socket = Some(TransportSocket { name: "tls".to_owned(), config_type });
    });
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    let call = tokio::spawn(async move { hello(&channel).await });
    let hello = tokio::time::timeout(GUARD, async {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut bytes = Vec::new();
        loop {
            socket.read_buf(&mut bytes).await.unwrap();
            match ClientHello::read(&bytes) {
                FirstBytes::Incomplete => {}
                FirstBytes::Hello(hello) => break hello,
                FirstBytes::Other => panic!("no TLS"),
            }
        }
    });
    let hello = hello.await.expect("nobody connects");
    call.abort();
    assert_eq!(hello.server_name.as_deref(), Some("greeter.example.com"));
    let alpn: Vec<_> = hello.alpn.iter().map(|name| String::from_utf8_lossy(name)).collect();
    assert_eq!(alpn, ["istio-h2", "istio", "h2"]);
}
