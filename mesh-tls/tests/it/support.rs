//! A certificate authority and both ends of a connection.

use mesh_tls::{
    Accepted, Acceptor, ClientSettings, ClientStream, ClientTls, CryptoProvider, Identity, MemorySource, PeerIdentity,
    ServerSettings, Source, TlsError, TrustRoots, default_provider,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertificateSigningRequestParams,
    CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams,
    SanType, SerialNumber, date_time_ymd,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{sync::Arc, time::Duration};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};

pub(crate) const ALICE: &str = "spiffe://td/alice";
pub(crate) const BOB: &str = "spiffe://td/bob";

/// A certificate authority.
pub(crate) struct Ca(CertifiedIssuer<'static, KeyPair>);

/// A certificate chain and its key in PEM.
#[derive(Clone)]
pub(crate) struct Pair {
    pub(crate) chain: String,
    pub(crate) key: String,
}

impl Ca {
    pub(crate) fn new(name: &str) -> Self {
        Self(CertifiedIssuer::self_signed(ca_params(name), KeyPair::generate().unwrap()).unwrap())
    }

    /// An intermediate authority below this one.
    pub(crate) fn intermediate(&self, name: &str, edit: impl FnOnce(&mut CertificateParams)) -> Self {
        let mut params = ca_params(name);
        edit(&mut params);
        Self(CertifiedIssuer::signed_by(params, KeyPair::generate().unwrap(), &self.0).unwrap())
    }

    pub(crate) fn pem(&self) -> String {
        self.0.pem()
    }

    pub(crate) fn roots(&self) -> Arc<TrustRoots> {
        Arc::new(TrustRoots::from_pem(self.pem().as_bytes()).unwrap())
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        self.0.der()
    }

    pub(crate) fn key(&self) -> &KeyPair {
        self.0.key()
    }

    /// Signs a request.
    pub(crate) fn sign(&self, request: CertificateSigningRequestParams) -> String {
        request.signed_by(&self.0).unwrap().pem()
    }

    /// A revocation list of these certificates, in DER.
    pub(crate) fn crl(&self, revoked: &[&Pair]) -> Vec<u8> {
        self.crl_until(revoked, date_time_ymd(2090, 1, 1))
    }

    /// The same, outdated at `next_update`.
    pub(crate) fn crl_until(&self, revoked: &[&Pair], next_update: time::OffsetDateTime) -> Vec<u8> {
        let this_update = date_time_ymd(2020, 1, 1);
        let revoked = revoked.iter().map(|pair| RevokedCertParams {
            serial_number: pair.serial(),
            revocation_time: this_update,
            reason_code: None,
            invalidity_date: None,
        });
        let params = CertificateRevocationListParams {
            this_update,
            next_update,
            crl_number: 1.into(),
            issuing_distribution_point: None,
            revoked_certs: revoked.collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.0).unwrap().der().to_vec()
    }

    /// The certificate as `x5c` of a bundle.
    pub(crate) fn x5c(&self) -> String {
        self.pem().lines().filter(|line| !line.starts_with("---")).collect()
    }

    pub(crate) fn issue(&self, edit: impl FnOnce(&mut CertificateParams)) -> Pair {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "leaf");
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        edit(&mut params);
        Pair { chain: params.signed_by(&key, &self.0).unwrap().pem(), key: key.serialize_pem() }
    }

    pub(crate) fn svid(&self, id: &str) -> Pair {
        self.issue(|params| params.subject_alt_names.push(uri(id)))
    }
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Pair {
    /// The chain, and the key in PKCS#8.
    pub(crate) fn der(&self) -> (Vec<Vec<u8>>, Vec<u8>) {
        let chain = CertificateDer::pem_slice_iter(self.chain.as_bytes()).map(|der| der.unwrap().to_vec());
        let key = PrivateKeyDer::from_pem_slice(self.key.as_bytes()).unwrap();
        (chain.collect(), key.secret_der().to_vec())
    }

    fn serial(&self) -> SerialNumber {
        let der = CertificateDer::from_pem_slice(self.chain.as_bytes()).unwrap();
        SerialNumber::from_slice(webpki::EndEntityCert::try_from(&der).unwrap().serial())
    }

    pub(crate) fn identity(&self) -> Identity {
        Identity::from_pem(self.chain.as_bytes(), self.key.as_bytes(), &provider()).unwrap()
    }
}

pub(crate) fn uri(id: &str) -> SanType {
    SanType::URI(id.try_into().unwrap())
}

pub(crate) fn provider() -> Arc<CryptoProvider> {
    default_provider()
}

pub(crate) fn source(pair: &Pair, roots: Arc<TrustRoots>) -> Arc<MemorySource> {
    Arc::new(MemorySource::new("test", Some(pair.identity()), Some(roots)))
}

pub(crate) fn client(settings: ClientSettings) -> ClientTls {
    ClientTls::new(settings, provider()).unwrap()
}

pub(crate) fn mtls_client(source: &Arc<MemorySource>) -> ClientTls {
    client(ClientSettings::mtls(source.clone()))
}

pub(crate) fn mtls_server(source: &Arc<impl Source>) -> Acceptor {
    Acceptor::new(ServerSettings::mtls(source.clone()), provider()).unwrap()
}

pub(crate) type Connected = (ClientStream<DuplexStream>, PeerIdentity);

/// Both ends of a handshake in memory.
pub(crate) async fn handshake(
    client: &ClientTls,
    server: &Acceptor,
    name: Option<&str>,
) -> (Result<Connected, TlsError>, Result<Accepted<DuplexStream>, TlsError>) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    // a server lingers until the client has closed, and a client learns of its refusal by reading
    let client = async {
        let (mut stream, peer) = client.connect(near, name).await?;
        Ok((read_byte(&mut stream).await.map(|()| stream), peer))
    };
    let server = async {
        let mut accepted = server.accept(far).await?;
        accepted.write_all(b"!").await.unwrap();
        accepted.flush().await.unwrap();
        Ok(accepted)
    };
    let (client, server) = tokio::join!(client, server);
    let client = match client {
        Ok((Ok(stream), peer)) => Ok((stream, peer)),
        Ok((Err(error), _)) => match error.downcast::<TlsError>() {
            Ok(refused) => Err(refused),
            Err(error) => panic!("not explained: {error:?}"),
        },
        Err(error) => Err(error),
    };
    (client, server)
}

async fn read_byte(stream: &mut (impl AsyncRead + Unpin)) -> std::io::Result<()> {
    stream.read_u8().await.map(|byte| assert_eq!(byte, b'!'))
}

/// Sends a message there and back.
pub(crate) async fn echo(
    near: &mut (impl AsyncRead + AsyncWrite + Unpin),
    far: &mut (impl AsyncRead + AsyncWrite + Unpin),
) {
    let mut buffer = [0; 5];
    near.write_all(b"hello").await.unwrap();
    near.flush().await.unwrap();
    far.read_exact(&mut buffer).await.unwrap();
    far.write_all(&buffer).await.unwrap();
    far.flush().await.unwrap();
    near.read_exact(&mut buffer).await.unwrap();
    assert_eq!(&buffer, b"hello");
}

/// Waits for something that nothing announces.
pub(crate) async fn until(done: impl Fn() -> bool) {
    let waiting = async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("it does not come");
}
