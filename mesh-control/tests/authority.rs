//! The servers of the dev CA, through their own protocols.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use envoy_types::pb::envoy::{
    extensions::transport_sockets::tls::v3::{Secret, secret::Type},
    service::{
        discovery::v3::DiscoveryRequest, secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
    },
};
use hyper_util::rt::TokioIo;
use mesh_control::ControlPlane;
use mesh_tls::{
    Acceptor, CaAuth, CaTls, ClientSettings, ClientTls, FileSource, FileSourceConfig, Identity, IstioCaConfig,
    IstioCaSource, PeerCheck, Roots, ServerSettings, Source, default_provider,
    grpc::{CertificateRequest, IstioCaClient, JwtSvidRequest, ValidateJwtSvidRequest, WorkloadApiClient},
};
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::net::{TcpStream, UnixStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;

const SERVICE: &str = "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: greeter}
spec:
  hosts: [greeter]
  resolution: STATIC
  ports: [{number: 50051, name: grpc, protocol: GRPC}]
  endpoints: [{address: 127.0.0.1, ports: {grpc: 6001}, serviceAccount: greeter}]
";
const GREETER: &str = "spiffe://cluster.local/ns/default/sa/greeter";

async fn control_plane(dir: &Path, lifetime: u64) -> ControlPlane {
    let builder = ControlPlane::builder().yaml(SERVICE).ca(dir).certificate_lifetime(Duration::from_secs(lifetime));
    builder.start().await.unwrap()
}

fn files(dir: &Path, certificate: bool) -> Arc<dyn Source> {
    let mut config = FileSourceConfig::new("test", default_provider());
    config.certificate_file = certificate.then(|| dir.join("cert.pem"));
    config.private_key_file = certificate.then(|| dir.join("key.pem"));
    config.ca_certificate_file = Some(dir.join("ca.pem"));
    Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap())
}

/// A connection to the authority, with the client's own certificate or without.
async fn secure(cp: &ControlPlane, dir: &Path, certificate: bool) -> Channel {
    let source = files(dir, certificate);
    let settings = ClientSettings {
        identity: certificate.then(|| source.clone()),
        check: PeerCheck::ServerName,
        alpn: vec![b"h2".to_vec()],
        ..ClientSettings::new(Roots::Source(source))
    };
    let (tls, addr) = (ClientTls::new(settings, default_provider()).unwrap(), cp.ca_addr().unwrap());
    let connect = service_fn(move |_: Uri| {
        let tls = tls.clone();
        async move {
            let stream = tls.connect(TcpStream::connect(addr).await.unwrap(), Some("localhost")).await;
            stream.map(|(stream, _)| TokioIo::new(stream)).map_err(std::io::Error::other)
        }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap()
}

async fn socket(path: std::path::PathBuf) -> Channel {
    let connect = service_fn(move |_: Uri| {
        let path = path.clone();
        async move { UnixStream::connect(path).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connect).await.unwrap()
}

async fn sign(channel: Channel, key: &KeyPair, token: Option<&str>) -> Result<Vec<String>, Status> {
    let csr = CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
    let mut request = Request::new(CertificateRequest { csr, validity_duration: 60, metadata: None });
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    Ok(IstioCaClient::new(channel).create_certificate(request).await?.into_inner().cert_chain)
}

#[tokio::test]
async fn istios_ca_signs_for_whom_a_token_or_a_certificate_names() {
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let ca = cp.ca().unwrap();
    let folder = ca.identity_dir("default", "greeter");
    let key = KeyPair::generate().unwrap();
    let name = |chain: &[String]| {
        let key = key.serialize_pem();
        Identity::from_pem(chain[0].as_bytes(), key.as_bytes(), &default_provider()).unwrap().name()
    };
    let nobody = secure(&cp, &folder, false).await;
    let token = std::fs::read_to_string(folder.join("token")).unwrap();
    let chain = sign(nobody.clone(), &key, Some(&token)).await.unwrap();
    assert_eq!((name(&chain).as_str(), chain.last().unwrap()), (GREETER, &ca.root_pem()));

    let chain = sign(secure(&cp, &folder, true).await, &key, None).await.unwrap();
    assert_eq!(name(&chain), GREETER);

    let refused = sign(nobody.clone(), &key, None).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    let other = ca.token("default", "greeter", &["somebody-else".into()]).unwrap();
    let refused = sign(nobody.clone(), &key, Some(&other)).await.unwrap_err();
    assert!(refused.message().contains("another audience"), "{refused}");
    let elsewhere = tempfile::tempdir().unwrap();
    let foreign =
        mesh_control::CertificateAuthority::in_memory(elsewhere.path(), "cluster.local", Duration::from_secs(60));
    let foreign = foreign.unwrap().token("default", "greeter", &["istio-ca".into()]).unwrap();
    let refused = sign(nobody, &key, Some(&foreign)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated, "{refused}");
    assert!(!refused.message().contains(&foreign));
}

/// Who has renewed its certificate while the root is replaced and who has not still know each other.
#[tokio::test]
async fn who_asks_istios_ca_trusts_every_root_while_one_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let ca = cp.ca().unwrap();
    let source = async |account: &str| {
        let folder = ca.issue("default", account).unwrap();
        let tls =
            CaTls::Verified { roots: Roots::Source(files(&folder, false)), server_name: Some("localhost".into()) };
        let address = cp.ca_addr().unwrap().to_string();
        let auth = CaAuth::TokenFile(folder.join("token"));
        let config = IstioCaConfig::new(account, address, tls, auth, default_provider());
        let source = IstioCaSource::new(config, &tokio::runtime::Handle::current()).unwrap();
        mesh_tls::ready(&source).await;
        Arc::new(source)
    };
    let (greeter, client) = (source("greeter").await, source("client").await);
    ca.rotate_root().unwrap();
    greeter.renew();
    greeter.changed().wait_for(|generation| *generation == 2).await.unwrap();
    for (server, client) in [(&greeter, &client), (&client, &greeter)] {
        let acceptor = Acceptor::new(ServerSettings::mtls(server.clone()), default_provider()).unwrap();
        let tls = ClientTls::new(ClientSettings::mtls(client.clone()), default_provider()).unwrap();
        let (near, far) = tokio::io::duplex(1 << 16);
        let ((_, peer), _) = tokio::try_join!(tls.connect(near, None), acceptor.accept(far)).unwrap();
        assert!(peer.to_string().ends_with(server.name()), "{peer}");
    }
}

#[tokio::test]
async fn the_socket_of_a_workload_is_its_workload_api() {
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let ca = cp.ca().unwrap();
    let mut client = WorkloadApiClient::new(socket(ca.socket("default", "greeter")).await);
    let mut svids = client.fetch_x509_svid().await.unwrap().into_inner();
    let first = svids.message().await.unwrap().unwrap();
    assert_eq!(first.svids[0].spiffe_id, GREETER);

    ca.issue("default", "greeter").unwrap();
    let second = svids.message().await.unwrap().unwrap();
    assert_ne!(second.svids[0].x509_svid, first.svids[0].x509_svid);
    assert_eq!(second.svids[0].bundle, first.svids[0].bundle);
    let der = rustls_pki_types::PrivateKeyDer::try_from(second.svids[0].x509_svid_key.clone()).unwrap();
    let chain = vec![second.svids[0].x509_svid.clone().into()];
    assert_eq!(Identity::from_der(chain, der, &default_provider()).unwrap().name(), GREETER);

    let mut bundles = client.fetch_x509_bundles().await.unwrap().into_inner();
    let before = bundles.message().await.unwrap().unwrap().bundles["spiffe://cluster.local"].clone();
    assert_eq!(before, first.svids[0].bundle);
    ca.rotate_root().unwrap();
    let both = bundles.message().await.unwrap().unwrap().bundles["spiffe://cluster.local"].clone();
    assert!(both.starts_with(&before) && both.len() > before.len());

    let wanted = JwtSvidRequest { audience: vec!["me".into()], spiffe_id: String::new() };
    let token = client.fetch_jwt_svid(wanted).await.unwrap().into_inner().svids.remove(0);
    assert_eq!(token.spiffe_id, GREETER);
    let validate = |audience: &str| ValidateJwtSvidRequest { audience: audience.to_owned(), svid: token.svid.clone() };
    let valid = client.validate_jwt_svid(validate("me")).await.unwrap().into_inner();
    assert_eq!(valid.spiffe_id, GREETER);
    assert!(valid.claims.unwrap().fields.contains_key("exp"));
    assert_eq!(client.validate_jwt_svid(validate("you")).await.unwrap_err().code(), Code::InvalidArgument);
    let jwks = client.fetch_jwt_bundles().await.unwrap().into_inner().message().await.unwrap().unwrap();
    assert_eq!(jwks.bundles["spiffe://cluster.local"], ca.jwks().as_bytes());
    let stranger = JwtSvidRequest { audience: vec!["me".into()], spiffe_id: "spiffe://cluster.local/ns/a/sa/b".into() };
    assert_eq!(client.fetch_jwt_svid(stranger).await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test]
async fn the_socket_of_a_workload_is_for_its_owner_and_comes_with_the_identity() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let path = cp.ca().unwrap().socket("default", "greeter");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    cp.shutdown().await;
    // The same folder again: the socket that was left is replaced.
    let cp = control_plane(dir.path(), 600).await;
    let mut client = WorkloadApiClient::new(socket(path).await);
    client.fetch_x509_svid().await.unwrap().into_inner().message().await.unwrap().unwrap();
    drop(cp);
}

#[tokio::test]
async fn the_socket_of_a_workload_is_sds() {
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let ca = cp.ca().unwrap();
    let mut client = SecretDiscoveryServiceClient::new(socket(ca.socket("default", "greeter")).await);
    let (requests, outbound) = tokio::sync::mpsc::channel(4);
    let request = DiscoveryRequest {
        resource_names: vec!["default".into(), "ROOTCA".into(), "unknown".into()],
        ..DiscoveryRequest::default()
    };
    requests.send(request.clone()).await.unwrap();
    let mut responses = client.stream_secrets(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    let mut next = async || {
        let response = responses.message().await.unwrap().unwrap();
        let secrets = response.resources.iter().map(|any| Secret::decode(any.value.as_slice()).unwrap());
        secrets.map(|secret| (secret.name, secret.r#type.unwrap())).collect::<Vec<_>>()
    };
    let first = next().await;
    let names: Vec<_> = first.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["default", "ROOTCA"]);
    assert!(matches!((&first[0].1, &first[1].1), (Type::TlsCertificate(_), Type::ValidationContext(_))));
    ca.issue("default", "greeter").unwrap();
    let second = next().await;
    assert!(first[0] != second[0] && first[1] == second[1]);
}

#[tokio::test]
async fn ads_is_served_over_tls_too_and_secrets_only_where_it_is_asked_for() {
    use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient;
    use mesh_xds::server::{Node, ResourceType};
    let dir = tempfile::tempdir().unwrap();
    let cp = control_plane(dir.path(), 600).await;
    let folder = cp.ca().unwrap().identity_dir("default", "greeter");
    let mut client = AggregatedDiscoveryServiceClient::new(secure(&cp, &folder, true).await);
    let (requests, outbound) = tokio::sync::mpsc::channel(4);
    let type_url = ResourceType::Cluster.type_url().to_owned();
    requests.send(DiscoveryRequest { type_url, ..DiscoveryRequest::default() }).await.unwrap();
    let mut responses = client.stream_aggregated_resources(ReceiverStream::new(outbound)).await.unwrap().into_inner();
    assert_eq!(responses.message().await.unwrap().unwrap().resources.len(), 1);
    assert_eq!(cp.cache().resources().len(ResourceType::Secret), 0);

    let dir = tempfile::tempdir().unwrap();
    let cp = ControlPlane::builder().yaml(SERVICE).ca(dir.path()).secrets_over_ads(true).start().await.unwrap();
    let bootstrap: serde_json::Value = serde_json::from_str(&cp.bootstrap_for("default", "greeter")).unwrap();
    let said = |key: &str| bootstrap["node"]["metadata"][key].as_str().unwrap().to_owned();
    use envoy_types::pb::google::protobuf::{Struct, Value, value::Kind};
    let text = |key: &str| (key.to_owned(), Value { kind: Some(Kind::StringValue(said(key))) });
    let metadata = Struct { fields: ["NAMESPACE", "SERVICE_ACCOUNT"].iter().map(|key| text(key)).collect() };
    let node = Node { metadata: Some(metadata), ..Node::default() };
    let secret = |node: &Node| {
        let any = cp.cache().resources().get_for(node, ResourceType::Secret, "default").unwrap();
        Secret::decode(any.value.as_slice()).unwrap().r#type
    };
    assert!(matches!(secret(&node), Some(Type::TlsCertificate(_))));
    assert_eq!(secret(&Node::default()), None, "nobody gets nobody's key");
}
