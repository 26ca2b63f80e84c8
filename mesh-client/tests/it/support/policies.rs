//! What policies of servers are tested with: certificates, tokens, a service that tells what it saw, clients.

use super::{ANY, GUARD, inbound::Serving};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body_util::{BodyExt, Empty, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    inbound::{InboundBuilder, JwtClaims},
    trace,
};
use mesh_control::ca::CertificateAuthority;
use mesh_tls::{
    ClientSettings, ClientTls, FileSource, FileSourceConfig, Identity, MemorySource, Mode, ServerSettings, TrustRoots,
    default_provider,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use std::{
    convert::Infallible,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tempfile::TempDir;
use tokio::net::TcpStream;

/// Certificates of one authority.
pub(crate) struct Authority {
    pub(crate) ca: CertificateAuthority,
    _dir: TempDir,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ca =
            CertificateAuthority::open(&dir.path().join("ca"), "cluster.local", Duration::from_secs(3600)).unwrap();
        Self { ca, _dir: dir }
    }

    pub(crate) fn source(&self, namespace: &str, account: &str) -> Arc<FileSource> {
        let dir = self.ca.ensure(namespace, account).unwrap();
        let file = |name: &str| Some(Path::new(&dir).join(name));
        let config = FileSourceConfig {
            certificate_file: file("cert.pem"),
            private_key_file: file("key.pem"),
            ca_certificate_file: file("ca.pem"),
            ..FileSourceConfig::new("test", default_provider())
        };
        Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap())
    }

    /// Permissive: plaintext is taken too.
    pub(crate) fn server(&self) -> ServerSettings {
        let settings = ServerSettings::mtls(self.source("shop", "server"));
        ServerSettings { mode: Mode::Permissive, alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()], ..settings }
    }

    pub(crate) fn client(&self, namespace: &str, account: &str) -> ClientTls {
        self.client_of(Version::HTTP_2, namespace, account)
    }

    pub(crate) fn client_of(&self, version: Version, namespace: &str, account: &str) -> ClientTls {
        client(version, ClientSettings::mtls(self.source(namespace, account)))
    }
}

/// A client of this version.
pub(crate) fn client(version: Version, settings: ClientSettings) -> ClientTls {
    let alpn = if version == Version::HTTP_2 { b"h2".to_vec() } else { b"http/1.1".to_vec() };
    ClientTls::new(ClientSettings { alpn: vec![alpn], ..settings }, default_provider()).unwrap()
}

/// An authority for any certificates, which issues through another.
pub(crate) struct Issuer {
    root: Signer,
    intermediate: Signer,
}

type Signer = CertifiedIssuer<'static, KeyPair>;

impl Issuer {
    pub(crate) fn new() -> Self {
        let params = || {
            let mut params = CertificateParams::new(vec![]).unwrap();
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
            params
        };
        let root = CertifiedIssuer::self_signed(params(), KeyPair::generate().unwrap()).unwrap();
        let intermediate = CertifiedIssuer::signed_by(params(), KeyPair::generate().unwrap(), &root).unwrap();
        Self { root, intermediate }
    }

    /// What it is trusted by, in PEM.
    pub(crate) fn roots(&self) -> String {
        self.root.pem()
    }

    /// A chain and its key, in PEM: of this subject, with these alternative names.
    pub(crate) fn pem(&self, subject: &str, names: Vec<SanType>) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, subject);
        params.subject_alt_names = names;
        let chain = params.signed_by(&key, &self.intermediate).unwrap().pem() + &self.intermediate.pem();
        (chain, key.serialize_pem())
    }

    /// The same, beside whom it trusts.
    pub(crate) fn source(&self, subject: &str, names: Vec<SanType>) -> Arc<MemorySource> {
        let (chain, key) = self.pem(subject, names);
        let identity = Identity::from_pem(chain.as_bytes(), key.as_bytes(), &default_provider());
        let roots = TrustRoots::from_pem(self.root.pem().as_bytes()).unwrap();
        Arc::new(MemorySource::new("test", Some(identity.unwrap()), Some(Arc::new(roots))))
    }
}

/// What the handler saw, as text: path, headers that matter, claims, trace.
pub(crate) async fn tell<B>(request: Request<B>) -> Result<Response<Full<Bytes>>, Infallible> {
    let header = |name: &str| {
        request.headers().get(name).map_or("-".into(), |value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    let subject = request.extensions().get::<JwtClaims>().and_then(|claims| claims.subject()).unwrap_or("-").to_owned();
    let trace = trace::current().map_or("-".to_owned(), |context| context.trace_id().to_string());
    let (sub, xfcc) = (header("x-sub"), header("x-forwarded-client-cert"));
    let text = format!("path={} x-sub={sub} subject={subject} trace={trace} xfcc={xfcc}", request.uri());
    Ok(Response::new(Full::new(text.into())))
}

/// On our own transport.
pub(crate) async fn serve(builder: InboundBuilder) -> Serving {
    Serving::of(builder.bind(ANY).await.unwrap(), tower::service_fn(tell))
}

/// Status, body, headers.
pub(crate) type Answer = (u16, String, http::HeaderMap);

/// One request over one connection.
pub(crate) async fn exchange<IO>(version: Version, io: IO, mut request: Request<Empty<Bytes>>) -> Answer
where
    IO: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(io);
    let exchange = async {
        let response = if version == Version::HTTP_2 {
            let (mut sender, connection) =
                hyper::client::conn::http2::handshake(TokioExecutor::new(), io).await.unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await
        } else {
            let host = request.uri().authority().unwrap().as_str().parse().unwrap();
            request.headers_mut().insert("host", host);
            *request.uri_mut() = request.uri().path_and_query().unwrap().as_str().parse().unwrap();
            let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
            tokio::spawn(connection);
            sender.send_request(request).await
        };
        let (head, body) = response.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), String::from_utf8_lossy(&body).into_owned(), head.headers)
    };
    tokio::time::timeout(GUARD, exchange).await.unwrap()
}

pub(crate) fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://shop.test{path}")).body(Empty::new()).unwrap()
}

/// The same with a header more.
pub(crate) fn with(mut request: Request<Empty<Bytes>>, name: &'static str, value: &[u8]) -> Request<Empty<Bytes>> {
    request.headers_mut().append(name, http::HeaderValue::from_bytes(value).unwrap());
    request
}

/// The same over either version, in plaintext or with this certificate.
pub(crate) async fn ask(
    version: Version,
    addr: SocketAddr,
    client: Option<&ClientTls>,
    request: Request<Empty<Bytes>>,
) -> Answer {
    let tcp = TcpStream::connect(addr).await.unwrap();
    match client {
        Some(client) => exchange(version, client.connect(tcp, None).await.unwrap().0, request).await,
        None => exchange(version, tcp, request).await,
    }
}

pub(crate) async fn plain(addr: SocketAddr, request: Request<Empty<Bytes>>) -> Answer {
    ask(Version::HTTP_2, addr, None, request).await
}

pub(crate) async fn secured(addr: SocketAddr, client: &ClientTls, request: Request<Empty<Bytes>>) -> Answer {
    ask(Version::HTTP_2, addr, Some(client), request).await
}

/// RFC 7515 appendix A.1 would be symmetric: these are made with a key of the test.
pub(crate) struct Tokens {
    pair: KeyPair,
    kid: &'static str,
}

impl Tokens {
    pub(crate) fn new() -> Self {
        Self::named("")
    }

    /// Its key has this name.
    pub(crate) fn named(kid: &'static str) -> Self {
        Self { pair: KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap(), kid }
    }

    pub(crate) fn jwks(&self) -> String {
        let (kid, x) = (self.kid, b64(self.pair.public_key_raw()));
        format!(r#"{{"keys": [{{"kty": "OKP", "crv": "Ed25519", "kid": "{kid}", "x": "{x}"}}]}}"#)
    }

    /// Of this issuer and subject, good for ten minutes.
    pub(crate) fn of(&self, issuer: &str, subject: &str) -> String {
        let exp = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs() + 600;
        self.token(&serde_json::json!({"iss": issuer, "sub": subject, "exp": exp}))
    }

    pub(crate) fn token(&self, claims: &serde_json::Value) -> String {
        use rcgen::SigningKey as _;
        let header = serde_json::json!({"alg": "EdDSA", "kid": self.kid}).to_string();
        let signed = format!("{}.{}", b64(header.as_bytes()), b64(claims.to_string().as_bytes()));
        let signature = self.pair.sign(signed.as_bytes()).unwrap();
        format!("{signed}.{}", b64(&signature))
    }
}

fn b64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    bytes.chunks(3).fold(String::new(), |mut text, chunk| {
        let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..=chunk.len() {
            text.push(DIGITS[(word >> (18 - 6 * digit)) as usize & 63].into());
        }
        text
    })
}

pub(crate) fn with_token(path: &str, token: &str) -> Request<Empty<Bytes>> {
    with(get(path), "authorization", format!("Bearer {token}").as_bytes())
}
