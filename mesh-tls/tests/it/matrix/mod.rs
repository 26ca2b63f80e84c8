//! Bad certificates, each presented by a careless server and by a careless client, over TLS 1.2 and 1.3: each is refused
//! with its reason, and none by a panic.

mod cases;
mod forge;

use crate::support::*;
use cases::{Case, Rules};
use mesh_tls::{Acceptor, ClientSettings, Mode, Roots, ServerSettings, TlsVersion, TlsVersions};
use rustls::{
    ClientConfig, DigitallySignedStruct, Error, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert, Resumption,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
    version::{TLS12, TLS13},
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use std::sync::Arc;
use tokio::io::AsyncReadExt;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Presents anything, and trusts everyone: what no settings of ours do.
#[derive(Debug)]
struct Careless(Arc<CertifiedKey>);

impl Careless {
    fn new(chain: &[CertificateDer<'static>], key: &[u8]) -> Arc<Self> {
        let key = PrivateKeyDer::Pkcs8(key.to_vec().into());
        let key = provider().key_provider.load_private_key(key).unwrap();
        Arc::new(Self(Arc::new(CertifiedKey::new(chain.to_vec(), key))))
    }
}

impl ResolvesServerCert for Careless {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Careless {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ServerCertVerifier for Careless {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

fn raw_version(version: TlsVersion) -> &'static rustls::SupportedProtocolVersion {
    match version {
        TlsVersion::V1_2 => &TLS12,
        TlsVersion::V1_3 => &TLS13,
    }
}

/// What our client says to a server with this certificate.
async fn said_by_client(case: &Case, rules: &Rules, version: TlsVersion) -> Result<(), String> {
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[raw_version(version)])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Careless::new(&case.chain, &case.key));
    let settings = ClientSettings {
        check: rules.check,
        san_matchers: rules.san_matchers.clone(),
        versions: TlsVersions::only(version),
        ..ClientSettings::new(Roots::Source(rules.source()))
    };
    let client = client(settings);
    let (near, far) = tokio::io::duplex(1 << 20);
    let server = async {
        // what a server with a bad certificate thinks does not matter here
        let _ = TlsAcceptor::from(Arc::new(config)).accept(far).await;
    };
    let (connected, ()) = tokio::join!(client.connect(near, None), server);
    connected.map(drop).map_err(|e| e.to_string())
}

/// What our server says to a client with this certificate.
async fn said_by_server(case: &Case, rules: &Rules, own: &Pair, version: TlsVersion) -> Result<(), String> {
    let careless = Careless::new(&case.chain, &case.key);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[raw_version(version)])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(careless.clone())
        .with_client_cert_resolver(careless);
    config.resumption = Resumption::disabled();
    let settings = ServerSettings {
        roots: Roots::Source(rules.source()),
        check: rules.check,
        san_matchers: rules.san_matchers.clone(),
        versions: TlsVersions::only(version),
        mode: Mode::Strict,
        ..ServerSettings::mtls(source(own, rules.roots.clone()))
    };
    let server = Acceptor::new(settings, provider()).unwrap();
    let (near, far) = tokio::io::duplex(1 << 20);
    let client = async {
        let name = ServerName::try_from("localhost").unwrap();
        if let Ok(mut stream) = TlsConnector::from(Arc::new(config)).connect(name, near).await {
            // under TLS 1.3 the refusal comes after the handshake
            let _ = stream.read_u8().await;
        }
    };
    let server = async {
        let accepted = server.accept(far).await;
        accepted.map(drop).map_err(|e| e.to_string())
    };
    tokio::join!(client, server).1
}

#[tokio::test]
async fn each_bad_certificate_is_refused_with_its_reason_on_both_sides_and_over_both_versions() {
    let own = Ca::new("own").svid(BOB);
    let (good, rules) = cases::good();
    let cases = cases::bad();
    assert!(cases.len() >= 40, "{}", cases.len());
    let mut wrong = Vec::new();
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        assert_eq!(said_by_client(&good, &rules, version).await, Ok(()));
        assert_eq!(said_by_server(&good, &rules, &own, version).await, Ok(()));
        for (name, case, rules, reason) in &cases {
            let by_client = said_by_client(case, rules, version).await;
            let by_server = said_by_server(case, rules, &own, version).await;
            for (side, said) in [("client", by_client), ("server", by_server)] {
                match said {
                    Err(said) if said.contains(reason) && said.len() < 4096 => {}
                    Err(said) => wrong.push(format!("{name}, {version:?}: the {side} said: {said}")),
                    Ok(()) => wrong.push(format!("{name}, {version:?}: the {side} accepted it")),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len() * 4, wrong.join("\n"));
}
