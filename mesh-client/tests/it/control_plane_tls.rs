//! The control plane's own connection: TLS with roots of its own, our certificate, tokens (gRFC A65, A97).

use crate::support::{ANY, GUARD, TARGET, assert_says, greeter, hello, routes, service, to, until};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use futures::stream::{BoxStream, StreamExt as _};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_tls::{Acceptor, ClientAuth, Identity, MemorySource, PeerCheck, ServerSettings, TrustRoots};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, SanType,
};
use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tonic::{Request, Response, Status, Streaming, transport::Server};

struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// Chain and key of a leaf with these names.
    fn issue(&self, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// The same, with a SPIFFE id besides.
    fn svid(&self, id: &str, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = CertificateParams::new(names).unwrap();
        params.subject_alt_names.push(SanType::URI(id.try_into().unwrap()));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.0).unwrap().pem(), key.serialize_pem())
    }

    /// A bundle map that trusts this CA for `domain`.
    fn bundle_map(&self, domain: &str) -> String {
        let x5c: String = self.0.pem().lines().filter(|line| !line.starts_with("---")).collect();
        let key = format!(r#"{{"kty": "EC", "use": "x509-svid", "x5c": ["{x5c}"]}}"#);
        format!(r#"{{"trust_domains": {{"{domain}": {{"keys": [{key}]}}}}}}"#)
    }

    /// Accepts connections as 127.0.0.1, from clients of this CA or without certificate.
    fn acceptor(&self) -> Acceptor {
        self.acceptor_as(&self.issue(&["127.0.0.1"]))
    }

    fn acceptor_as(&self, (chain, key): &(String, String)) -> Acceptor {
        let identity = Identity::from_pem(chain.as_bytes(), key.as_bytes(), &mesh_tls::default_provider()).unwrap();
        let roots = Arc::new(TrustRoots::from_pem(self.0.pem().as_bytes()).unwrap());
        let source = Arc::new(MemorySource::new("control plane", Some(identity), Some(roots)));
        let settings = ServerSettings {
            client_auth: ClientAuth::Optional,
            check: PeerCheck::Chain,
            ..ServerSettings::mtls(source)
        };
        Acceptor::new(settings, mesh_tls::default_provider()).unwrap()
    }
}

/// A bootstrap with TLS credentials from this folder.
fn bootstrap(server: SocketAddr, dir: &Path, files: &[(&str, &str)], token: Option<&Path>) -> String {
    let files: Vec<_> =
        files.iter().map(|(field, name)| format!(r#""{field}": "{}""#, dir.join(name).display())).collect();
    let call = token.map_or(String::new(), |path| {
        format!(
            r#", "call_creds": [{{"type": "jwt_token_file", "config": {{"jwt_token_file": "{}"}}}}]"#,
            path.display()
        )
    });
    format!(
        r#"{{"xds_servers": [{{"server_uri": "{server}", "channel_creds": [{{"type": "tls", "config":
            {{"refresh_interval": "1s", {}}}}}]{call}}}], "node": {{"id": "test"}}}}"#,
        files.join(", ")
    )
}

/// Ends TLS in front of a plaintext control plane. Who came is written down.
async fn tls_in_front_of(upstream: SocketAddr, acceptor: Acceptor) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let (addr, seen) = (listener.local_addr().unwrap(), Arc::<Mutex<Vec<String>>>::default());
    let book = seen.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let (acceptor, book) = (acceptor.clone(), book.clone());
            tokio::spawn(async move {
                let Ok(mut secure) = acceptor.accept(socket).await else { return };
                book.lock().unwrap().push(secure.peer().map_or(String::new(), ToString::to_string));
                let mut upstream = TcpStream::connect(upstream).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut secure, &mut upstream).await;
            });
        }
    });
    (addr, seen)
}

#[tokio::test]
async fn the_control_plane_is_verified_by_its_roots_and_knows_our_certificate() {
    let backend = greeter("one").await;
    let route = routes(&format!("[{{route: [{{destination: {}}}]}}]", to("")));
    let yaml = service(&[("one", backend.addr())]) + &route;
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let (ours, stranger, dir) = (Ca::new("ours"), Ca::new("stranger"), tempfile::tempdir().unwrap());
    let (front, seen) = tls_in_front_of(cp.addr(), ours.acceptor()).await;
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let (chain, key) = ours.issue(&["client.example"]);
    write("cert.pem", &chain);
    write("key.pem", &key);
    write("ca.pem", &stranger.0.pem());
    let files = [("ca_certificate_file", "ca.pem"), ("certificate_file", "cert.pem"), ("private_key_file", "key.pem")];
    let json = bootstrap(front, dir.path(), &files, None);
    let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    until("the control plane is refused with the reason", async || {
        mesh.status()
            .unwrap()
            .servers
            .iter()
            .any(|server| server.last_error.as_ref().is_some_and(|error| error.contains("certificate")))
    })
    .await;
    assert!(seen.lock().unwrap().is_empty());
    // The right roots come, in place.
    write("ca.pem", &ours.0.pem());
    tokio::time::timeout(GUARD, channel.ready(GUARD)).await.unwrap().unwrap();
    hello(&channel).await.unwrap();
    assert_says(&seen.lock().unwrap()[0], &["client.example"]);
}

#[tokio::test]
async fn the_control_plane_is_verified_by_the_bundle_of_its_trust_domain() {
    let backend = greeter("one").await;
    let route = routes(&format!("[{{route: [{{destination: {}}}]}}]", to("")));
    let yaml = service(&[("one", backend.addr())]) + &route;
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let (ours, stranger, dir) = (Ca::new("ours"), Ca::new("stranger"), tempfile::tempdir().unwrap());
    let file = dir.path().join("map.json");
    let write = |map: &str| {
        // In one step: half a map would be another error.
        std::fs::write(dir.path().join("next"), map).unwrap();
        std::fs::rename(dir.path().join("next"), &file).unwrap();
    };
    let id = "spiffe://prod.example/control-plane";
    // Most SVIDs name no host; one that does has to name this one.
    for (names, fits) in [(&[][..], true), (&["127.0.0.1"], true), (&["other.example"], false)] {
        let (front, _) = tls_in_front_of(cp.addr(), ours.acceptor_as(&ours.svid(id, names))).await;
        let json = bootstrap(front, dir.path(), &[("spiffe_trust_bundle_map_file", "map.json")], None);
        let mut parsed = mesh_xds::Bootstrap::from_json(&json).unwrap();
        parsed.timing.backoff_base = std::time::Duration::from_millis(20);
        parsed.timing.backoff_max = std::time::Duration::from_millis(100);
        write(&stranger.bundle_map("prod.example"));
        let mesh = Mesh::builder().bootstrap(parsed).build().await.unwrap();
        let channel = mesh.channel(TARGET).unwrap();
        let refused = async |reason: &str| {
            until(&format!("the control plane is refused: {reason}"), async || {
                let servers = mesh.status().unwrap().servers;
                servers.iter().any(|server| server.last_error.as_ref().is_some_and(|error| error.contains(reason)))
            })
            .await;
        };
        refused("not signed by a certificate authority that we trust for trust domain prod.example").await;
        // The right authority, and another's domain.
        write(&ours.bundle_map("test.example"));
        refused("its trust domain prod.example is not one of those that we trust (test.example)").await;
        write(&ours.bundle_map("prod.example"));
        if fits {
            tokio::time::timeout(GUARD, channel.ready(GUARD)).await.unwrap().unwrap();
            hello(&channel).await.unwrap();
        } else {
            refused("no subject alternative name matches: wanted 127.0.0.1").await;
        }
    }
    // A certificate of the right authority without a SPIFFE id is nobody's.
    let (front, _) = tls_in_front_of(cp.addr(), ours.acceptor()).await;
    let json = bootstrap(front, dir.path(), &[("spiffe_trust_bundle_map_file", "map.json")], None);
    let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    until("it is refused", async || {
        let servers = mesh.status().unwrap().servers;
        servers
            .iter()
            .any(|server| server.last_error.as_ref().is_some_and(|error| error.contains("exactly one URI SAN")))
    })
    .await;
    // Nor are the roots of the system asked when there is no map.
    std::fs::remove_file(&file).unwrap();
    let (front, _) = tls_in_front_of(cp.addr(), ours.acceptor_as(&ours.svid(id, &[]))).await;
    let json = bootstrap(front, dir.path(), &[("spiffe_trust_bundle_map_file", "map.json")], None);
    let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    until("the missing file is said", async || {
        let servers = mesh.status().unwrap().servers;
        servers.iter().any(|server| server.last_error.as_ref().is_some_and(|error| error.contains("map.json")))
    })
    .await;
}

/// Remembers the tokens of streams, and ends them when it is told.
struct Doorman {
    tokens: Arc<Mutex<Vec<String>>>,
    end: watch::Receiver<u32>,
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Doorman {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let token = request.metadata().get("authorization").map(|value| value.to_str().unwrap().to_owned());
        self.tokens.lock().unwrap().push(token.unwrap_or_default());
        let (mut end, mut requests) = (self.end.clone(), request.into_inner());
        end.mark_unchanged();
        let stream = futures::stream::once(async move {
            loop {
                tokio::select! {
                    _ = end.changed() => return Err(Status::unavailable("ended by the test")),
                    message = requests.next() => if message.is_none() {
                        return Err(Status::cancelled("the client left"));
                    },
                }
            }
        });
        Ok(Response::new(stream.boxed()))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state of the world only"))
    }
}

#[tokio::test]
async fn each_stream_carries_the_token_of_the_file_and_none_goes_over_plaintext() {
    let tokens: Arc<Mutex<Vec<String>>> = Arc::default();
    let (ends, end) = watch::channel(0);
    let listener = TcpListener::bind(ANY).await.unwrap();
    let upstream = listener.local_addr().unwrap();
    let service = AggregatedDiscoveryServiceServer::new(Doorman { tokens: tokens.clone(), end });
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    tokio::spawn(Server::builder().add_service(service).serve_with_incoming(incoming));
    let (ca, dir) = (Ca::new("ours"), tempfile::tempdir().unwrap());
    let (front, _) = tls_in_front_of(upstream, ca.acceptor()).await;
    std::fs::write(dir.path().join("ca.pem"), ca.0.pem()).unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "first\n").unwrap();

    let json = bootstrap(front, dir.path(), &[("ca_certificate_file", "ca.pem")], Some(&token));
    let mut parsed = mesh_xds::Bootstrap::from_json(&json).unwrap();
    parsed.timing.backoff_base = std::time::Duration::from_millis(20);
    let mesh = Mesh::builder().bootstrap(parsed).build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    let last = || tokens.lock().unwrap().last().cloned();
    until("the first stream comes", async || last().is_some()).await;
    assert_eq!(last().unwrap(), "Bearer first");
    std::fs::write(&token, "second").unwrap();
    ends.send_replace(1);
    until("the next stream has the new token", async || last().unwrap() == "Bearer second").await;
    // A token that cannot be read is an error with the file's name.
    std::fs::remove_file(&token).unwrap();
    ends.send_replace(2);
    until("the missing token is said", async || {
        let servers = mesh.status().unwrap().servers;
        servers.iter().any(|server| server.last_error.as_ref().is_some_and(|error| error.contains("jwt_token_file")))
    })
    .await;
    drop(mesh);

    std::fs::write(&token, "secret").unwrap();
    let plain = format!(
        r#"{{"xds_servers": [{{"server_uri": "{upstream}", "channel_creds": [{{"type": "insecure"}}],
            "call_creds": [{{"type": "jwt_token_file", "config": {{"jwt_token_file": "{}"}}}}]}}]}}"#,
        token.display()
    );
    let count = tokens.lock().unwrap().len();
    let mesh = Mesh::builder().bootstrap_json(&plain).unwrap().build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    until("a plaintext stream comes", async || tokens.lock().unwrap().len() > count).await;
    assert_eq!(last().unwrap(), "");
}
