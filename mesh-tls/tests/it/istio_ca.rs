//! Istio's certificate authority protocol, against an authority on 127.0.0.1.

use crate::support::*;
use mesh_tls::{
    Acceptor, CaAuth, CaTls, ClientAuth, ConnectInfo, IstioCaConfig, IstioCaSource, Roots, ServerSettings, Source,
    grpc::{CertificateRequest, CertificateResponse, IstioCa, IstioCaServer, Kind},
    ready,
};
use rcgen::{CertificateSigningRequestParams, ExtendedKeyUsagePurpose, SanType};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tokio::{net::TcpListener, runtime::Handle};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpConnectInfo},
};

/// Signs for whoever has the token, or any client certificate; and remembers what it saw.
#[derive(Clone)]
struct Authority(Arc<Inner>);

struct Inner {
    ca: Ca,
    /// The one that takes the place of `ca`.
    next: Ca,
    token: &'static str,
    /// Whom it takes the caller for.
    names: &'static str,
    lifetime: Mutex<Duration>,
    spoil: Mutex<Spoil>,
    seen: Mutex<Vec<Seen>>,
}

#[derive(Clone, Copy, PartialEq)]
enum Spoil {
    Nothing,
    NoRoot,
    TwoRoots,
    ForeignKey,
    Down,
}

#[derive(Debug)]
struct Seen {
    caller: Option<String>,
    asked: Vec<SanType>,
    cluster: String,
    signer: Option<String>,
    key: Vec<u8>,
}

impl Authority {
    fn new(names: &'static str) -> Self {
        Self(Arc::new(Inner {
            ca: Ca::new("istio"),
            next: Ca::new("next"),
            token: "good",
            names,
            lifetime: Mutex::new(Duration::from_secs(3600)),
            spoil: Mutex::new(Spoil::Nothing),
            seen: Mutex::default(),
        }))
    }

    fn server(&self) -> IstioCaServer<Self> {
        IstioCaServer::new(self.clone())
    }

    async fn plaintext(&self) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = futures::stream::unfold(listener, |l| async { Some((l.accept().await.map(|(io, _)| io), l)) });
        tokio::spawn(Server::builder().add_service(self.server()).serve_with_incoming(incoming));
        address
    }

    /// Over TLS, as `istiod.test`.
    async fn tls(&self, client_auth: ClientAuth) -> SocketAddr {
        let own = self.0.ca.issue(|p| p.subject_alt_names.push(SanType::DnsName("istiod.test".try_into().unwrap())));
        let settings = ServerSettings { client_auth, ..ServerSettings::mtls(source(&own, self.0.ca.roots())) };
        let acceptor = Acceptor::new(settings, provider()).unwrap();
        let incoming = acceptor.incoming(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = incoming.local_addr().unwrap();
        tokio::spawn(Server::builder().add_service(self.server()).serve_with_incoming(incoming));
        address
    }

    fn seen(&self) -> usize {
        self.0.seen.lock().unwrap().len()
    }
}

impl IstioCa for Authority {
    async fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let Inner { ca, next, token, names, lifetime, spoil, seen } = &*self.0;
        let spoil = *spoil.lock().unwrap();
        let peer = request.extensions().get::<ConnectInfo<TcpConnectInfo>>().and_then(|info| info.peer.clone());
        let bearer = format!("Bearer {token}");
        let known = peer.is_some() || request.metadata().get("authorization").is_some_and(|value| *value == *bearer);
        if !known {
            return Err(Status::unauthenticated("request authenticate failure"));
        }
        if spoil == Spoil::Down {
            return Err(Status::unavailable("not now"));
        }
        let cluster = request.metadata().get("clusterid").unwrap().to_str().unwrap().to_owned();
        let message = request.into_inner();
        let mut csr = CertificateSigningRequestParams::from_pem(&message.csr).unwrap();
        let signer = message.metadata.and_then(|m| m.fields.get("CertSigner").cloned()).and_then(|v| v.kind);
        let signer = signer.map(|kind| match kind {
            Kind::StringValue(text) => text,
            other => panic!("{other:?}"),
        });
        seen.lock().unwrap().push(Seen {
            caller: peer.map(|peer| peer.to_string()),
            asked: csr.params.subject_alt_names.clone(),
            cluster,
            signer,
            key: rcgen::PublicKeyData::der_bytes(&csr.public_key).to_vec(),
        });
        if spoil == Spoil::ForeignKey {
            let chain = vec![ca.svid(names).chain, ca.pem()];
            return Ok(Response::new(CertificateResponse { cert_chain: chain }));
        }
        csr.params.subject_alt_names = vec![uri(names)];
        csr.params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        csr.params.not_before = (SystemTime::now() - Duration::from_secs(60)).into();
        csr.params.not_after = (SystemTime::now() + *lifetime.lock().unwrap()).into();
        let mut chain = vec![ca.sign(csr)];
        match spoil {
            Spoil::NoRoot => {}
            Spoil::TwoRoots => chain.push(ca.pem() + &next.pem()),
            _ => chain.push(ca.pem()),
        }
        Ok(Response::new(CertificateResponse { cert_chain: chain }))
    }
}

fn start(config: IstioCaConfig) -> Arc<IstioCaSource> {
    Arc::new(IstioCaSource::new(config, &Handle::current()).unwrap())
}

fn by_token(address: SocketAddr, tls: CaTls, file: &std::path::Path) -> IstioCaConfig {
    IstioCaConfig::new("istio", address.to_string(), tls, CaAuth::TokenFile(file.into()), provider())
}

async fn generation(source: &IstioCaSource, at_least: u64) {
    source.changed().wait_for(|now| *now >= at_least).await.unwrap();
}

#[tokio::test]
async fn the_token_file_is_read_for_every_request_and_the_key_is_ours_alone() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    let authority = Authority::new(ALICE);
    let address = authority.plaintext().await;
    let mut config = by_token(address, CaTls::Plaintext, &token);
    config.spiffe_id = Some(ALICE.parse().unwrap());
    config.metadata.insert("CertSigner".into(), "mine".into());
    let source = start(config);
    until(|| source.last_error().is_some()).await;
    let said = source.last_error().unwrap();
    assert!(said.contains("token: No such file"), "{said}");
    std::fs::write(&token, "bad\n").unwrap();
    until(|| source.last_error().unwrap().contains("Unauthenticated: request authenticate failure")).await;
    std::fs::write(&token, "good\n").unwrap();
    source.renew();
    let material = ready(&*source).await;
    let identity = material.identity.as_ref().unwrap();
    assert_eq!(identity.spiffe_id().unwrap().as_str(), ALICE);
    assert_eq!(source.last_error(), None);
    // what we asked for, and that it works
    {
        let seen = authority.0.seen.lock().unwrap();
        assert_eq!(seen[0].asked, [uri(ALICE)]);
        assert_eq!((seen[0].cluster.as_str(), seen[0].signer.as_deref()), ("Kubernetes", Some("mine")));
    }
    let bob = mtls_client(&crate::support::source(&authority.0.ca.svid(BOB), authority.0.ca.roots()));
    let (near, far) = handshake(&bob, &mtls_server(&source), None).await;
    assert_eq!(near.unwrap().1.to_string(), ALICE);
    assert_eq!(far.unwrap().peer().unwrap().to_string(), BOB);
    // the next certificate has another key
    source.renew();
    generation(&source, 2).await;
    let seen = authority.0.seen.lock().unwrap();
    assert_ne!(seen[0].key, seen[1].key);
    let shown = format!("{source:?}");
    assert!(!shown.contains("good"), "{shown}");
}

#[tokio::test]
async fn certificates_are_renewed_in_time_and_a_failing_authority_costs_nothing_before_they_end() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "good").unwrap();
    let authority = Authority::new(ALICE);
    *authority.0.lifetime.lock().unwrap() = Duration::from_secs(8);
    let mut config = by_token(authority.plaintext().await, CaTls::Plaintext, &token);
    config.renew_at = 0.05;
    let source = start(config);
    let server = mtls_server(&source);
    let bob = mtls_client(&crate::support::source(&authority.0.ca.svid(BOB), authority.0.ca.roots()));
    generation(&source, 4).await;
    handshake(&bob, &server, None).await.1.unwrap();
    *authority.0.spoil.lock().unwrap() = Spoil::Down;
    until(|| source.last_error().is_some()).await;
    let said = source.last_error().unwrap();
    assert!(said.contains("not now"), "{said}");
    handshake(&bob, &server, None).await.1.unwrap();
    let before = source.current().generation;
    *authority.0.spoil.lock().unwrap() = Spoil::Nothing;
    generation(&source, before + 1).await;
    assert_eq!(source.last_error(), None);
}

#[tokio::test]
async fn all_roots_are_trusted_while_the_authority_replaces_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "good").unwrap();
    let authority = Authority::new(ALICE);
    *authority.0.spoil.lock().unwrap() = Spoil::TwoRoots;
    let source = start(by_token(authority.plaintext().await, CaTls::Plaintext, &token));
    ready(&*source).await;
    let server = mtls_server(&source);
    for signer in [&authority.0.ca, &authority.0.next] {
        let bob = mtls_client(&crate::support::source(&signer.svid(BOB), authority.0.ca.roots()));
        let (near, far) = handshake(&bob, &server, None).await;
        assert_eq!(near.unwrap().1.to_string(), ALICE);
        assert_eq!(far.unwrap().peer().unwrap().to_string(), BOB);
    }
}

#[tokio::test]
async fn the_current_certificate_authenticates_the_next_request() {
    let authority = Authority::new(ALICE);
    let address = authority.tls(ClientAuth::Required).await;
    let first = authority.0.ca.svid("spiffe://td/provisioned");
    let roots = Roots::Source(source(&first, authority.0.ca.roots()));
    let tls = CaTls::Verified { roots, server_name: Some("istiod.test".into()) };
    let auth = CaAuth::Certificate(source(&first, authority.0.ca.roots()));
    let source = start(IstioCaConfig::new("istio", address.to_string(), tls, auth, provider()));
    ready(&*source).await;
    source.renew();
    generation(&source, 2).await;
    let seen = authority.0.seen.lock().unwrap();
    let callers: Vec<_> = seen.iter().map(|seen| seen.caller.as_deref()).collect();
    assert_eq!(callers, [Some("spiffe://td/provisioned"), Some(ALICE)]);
}

#[tokio::test]
async fn an_authority_of_another_name_gets_no_token() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "good").unwrap();
    let authority = Authority::new(ALICE);
    let address = authority.tls(ClientAuth::Off).await;
    let roots = Roots::Source(source(&authority.0.ca.svid(BOB), authority.0.ca.roots()));
    let other = CaTls::Verified { roots: roots.clone(), server_name: Some("other.test".into()) };
    let refused = start(by_token(address, other, &token));
    until(|| refused.last_error().is_some()).await;
    let said = refused.last_error().unwrap();
    assert!(said.contains("wanted other.test, offered DNS:istiod.test"), "{said}");
    assert_eq!(authority.seen(), 0);
    let right = CaTls::Verified { roots, server_name: Some("istiod.test".into()) };
    ready(&*start(by_token(address, right, &token))).await;
}

#[tokio::test]
async fn answers_that_cannot_be_used_are_refused_with_their_reason() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "good").unwrap();
    let authority = Authority::new(BOB);
    let address = authority.plaintext().await;
    for (spoil, wanted, reason) in [
        (Spoil::NoRoot, BOB, "it has no root after our certificate"),
        (Spoil::ForeignKey, BOB, "the private key does not belong to the certificate spiffe://td/bob"),
        (Spoil::Nothing, ALICE, "the certificate is spiffe://td/bob's, we are spiffe://td/alice"),
    ] {
        *authority.0.spoil.lock().unwrap() = spoil;
        let mut config = by_token(address, CaTls::Plaintext, &token);
        config.spiffe_id = Some(wanted.parse().unwrap());
        let source = start(config);
        until(|| source.last_error().is_some()).await;
        let said = source.last_error().unwrap();
        assert!(said.contains(reason), "{said}");
        assert_eq!(source.current().generation, 0);
    }
    for (edit, reason) in [
        ((|c| c.address = "nowhere".into()) as fn(&mut IstioCaConfig), "is not host:port"),
        (|c| c.renew_at = 1.0, "renew_at must lie between 0 and 1"),
        (|c| c.lifetime = Duration::ZERO, "at least one second"),
        (|c| c.address = "istiod.istio-system.svc:15010".into(), "the token would go in the clear to istiod"),
        (|c| c.address = "[2001:db8::1]:15010".into(), "which is not this machine"),
        (|c| c.auth = CaAuth::Certificate(Arc::new(mesh_tls::MemorySource::empty("none"))), "in plaintext"),
    ] {
        let mut config = by_token(address, CaTls::Plaintext, &token);
        edit(&mut config);
        let said = IstioCaSource::new(config, &Handle::current()).unwrap_err().to_string();
        assert!(said.contains(reason), "{said}");
    }
    for (host, tls) in
        [("localhost", CaTls::Plaintext), ("[::1]", CaTls::Plaintext), ("ca.test", CaTls::DangerousPlaintext)]
    {
        let mut config = by_token(address, tls, &token);
        config.address = format!("{host}:1");
        IstioCaSource::new(config, &Handle::current()).expect(host);
    }
}
