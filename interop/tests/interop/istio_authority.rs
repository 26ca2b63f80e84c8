//! What Istio's authority needs: a signing certificate of an operator's own root, and an issuer of tokens such as Kubernetes is.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use interop::istiod::Authority;
use mesh_client::Inbound;
use mesh_client::inbound::RequestBody;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, PKCS_ED25519,
    SigningKey,
};
use serde_json::{Value, json};

/// How long tokens are good for.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);

/// An issuer of tokens for workloads, on 127.0.0.1.
pub(crate) struct Issuer {
    key: KeyPair,
    addr: SocketAddr,
    folder: tempfile::TempDir,
}

impl Issuer {
    pub(crate) async fn start() -> Self {
        let key = KeyPair::generate_for(&PKCS_ED25519).unwrap();
        let inbound = Inbound::builder().bind("127.0.0.1:0").await.unwrap();
        let addr = inbound.local_addr();
        let issuer = Self { key, addr, folder: tempfile::tempdir().unwrap() };
        let about = json!({
            "issuer": issuer.url(),
            "jwks_uri": format!("{}/keys", issuer.url()),
            "id_token_signing_alg_values_supported": ["EdDSA"],
        });
        let about = about.to_string();
        let documents = Arc::new([("/.well-known/openid-configuration", about), ("/keys", issuer.keys())]);
        let service = tower::service_fn(move |request: Request<RequestBody>| {
            let found = documents.iter().find(|(path, _)| *path == request.uri().path());
            let mut answer = Response::new(Full::from(found.map_or(Bytes::new(), |(_, text)| text.clone().into())));
            if found.is_none() {
                *answer.status_mut() = StatusCode::NOT_FOUND;
            }
            async move { Ok::<_, Infallible>(answer) }
        });
        tokio::spawn(async move { inbound.serve(service).await });
        issuer
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// What verifies its tokens: a JSON Web Key Set.
    pub(crate) fn keys(&self) -> String {
        let public = BASE64_URL_SAFE_NO_PAD.encode(self.key.public_key_raw());
        let key = json!({"kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": "1", "x": public});
        json!({"keys": [key]}).to_string()
    }

    /// A file with a token of this account in the namespace `default`, as Kubernetes projects one into a pod.
    pub(crate) fn token_file(&self, account: &str) -> PathBuf {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let claims = json!({
            "iss": self.url(),
            "sub": format!("system:serviceaccount:default:{account}"),
            "aud": ["istio-ca"],
            "iat": now.as_secs(),
            "exp": (now + TOKEN_LIFETIME).as_secs(),
        });
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({"alg": "EdDSA", "kid": "1", "typ": "JWT"})), part(&claims));
        let signature = self.key.sign(signed.as_bytes()).unwrap();
        let file = self.folder.path().join(account);
        std::fs::write(&file, format!("{signed}.{}\n", BASE64_URL_SAFE_NO_PAD.encode(signature))).unwrap();
        file
    }

    /// An authority that takes its tokens, with an intermediate certificate below a root of the operator's own, and a second root that is to
    /// take the place of the first one day.
    pub(crate) fn authority(&self) -> Authority {
        let root = CertifiedIssuer::self_signed(params("root"), KeyPair::generate().unwrap()).unwrap();
        let next = CertifiedIssuer::self_signed(params("next root"), KeyPair::generate().unwrap()).unwrap();
        let signer = CertifiedIssuer::signed_by(params("istiod"), KeyPair::generate().unwrap(), &root).unwrap();
        Authority {
            certificate: signer.pem(),
            key: signer.key().serialize_pem(),
            chain: signer.pem(),
            roots: root.pem() + &next.pem(),
            issuer: self.url(),
        }
    }
}

fn params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

/// The roots in this file.
pub(crate) fn roots(file: &Path) -> mesh_tls::Roots {
    let mut config = mesh_tls::FileSourceConfig::new("istiod's root", mesh_tls::default_provider());
    config.ca_certificate_file = Some(file.into());
    mesh_tls::Roots::Source(Arc::new(mesh_tls::FileSource::new(config, &tokio::runtime::Handle::current()).unwrap()))
}
