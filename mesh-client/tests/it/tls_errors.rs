//! What callers are told when TLS does not come about: whose certificate, which check, what was wanted and what there was.

use crate::support::{ANY, assert_says, prompt_hello};
use examples::{
    backend::{Backend, Options},
    server::tls,
};
use mesh_client::Mesh;
use mesh_tls::{
    Acceptor, ClientSettings, Identity, MemorySource, Roots, SanMatcher, ServerSettings, Source, TrustRoots,
    default_provider,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
    date_time_ymd,
};
use std::sync::Arc;
use tonic::{Code, Status};

const CLIENT: &str = "spiffe://td/client";
const SERVER: &str = "spiffe://td/server";

/// A certificate authority.
struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn roots(&self) -> Arc<TrustRoots> {
        Arc::new(TrustRoots::from_pem(self.0.pem().as_bytes()).unwrap())
    }

    fn issue(&self, id: &str, edit: impl FnOnce(&mut CertificateParams)) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        edit(&mut params);
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        Identity::from_pem(certificate.as_bytes(), key.serialize_pem().as_bytes(), &default_provider()).unwrap()
    }
}

fn source(identity: Identity, roots: Arc<TrustRoots>) -> Arc<dyn Source> {
    Arc::new(MemorySource::new("test", Some(identity), Some(roots)))
}

/// What a caller with these settings is told by a server with this identity, which trusts these clients.
async fn told(server: Identity, clients: Arc<TrustRoots>, client: ClientSettings) -> (Status, String) {
    let acceptor = Acceptor::new(ServerSettings::mtls(source(server, clients)), default_provider()).unwrap();
    let backend = Backend::start("b", ANY, Options { accept: tls(acceptor), ..Options::default() }).await.unwrap();
    let mesh = Mesh::builder().fallback_tls(client).build().await.unwrap();
    let status = prompt_hello(&mesh.fixed_channel(&[backend.addr()]).unwrap()).await.unwrap_err();
    assert_eq!((status.code(), backend.state().calls()), (Code::Unavailable, 0), "{}", status.message());
    (status, backend.addr().to_string())
}

fn plain(_: &mut CertificateParams) {}

#[tokio::test]
async fn a_server_of_another_name_is_named_with_the_one_that_was_wanted() {
    let ca = Authority::new("root");
    let client = ClientSettings {
        san_matchers: vec![SanMatcher::Exact("spiffe://td/wanted".into())],
        ..ClientSettings::mtls(source(ca.issue(CLIENT, plain), ca.roots()))
    };
    let (status, address) = told(ca.issue(SERVER, plain), ca.roots(), client).await;
    assert_says(
        status.message(),
        &[&address, "the server's certificate", "wanted spiffe://td/wanted", "offered", SERVER],
    );
}

#[tokio::test]
async fn a_server_whose_certificate_is_over_or_not_yet_valid_is_named_with_the_time() {
    let ca = Authority::new("root");
    let client = || ClientSettings::mtls(source(ca.issue(CLIENT, plain), ca.roots()));
    let old = ca.issue(SERVER, |params| params.not_after = date_time_ymd(2021, 3, 4));
    let (status, address) = told(old, ca.roots(), client()).await;
    assert_says(status.message(), &[&address, "the server's certificate", SERVER, "expired at 2021-03-04", "it is 20"]);
    let early = ca.issue(SERVER, |params| params.not_before = date_time_ymd(2089, 3, 4));
    let (status, address) = told(early, ca.roots(), client()).await;
    assert_says(status.message(), &[&address, SERVER, "is not valid before 2089-03-04"]);
}

#[tokio::test]
async fn a_server_of_an_unknown_authority_is_named_with_its_issuer() {
    let (ca, other) = (Authority::new("ours"), Authority::new("somebody elses"));
    let client = ClientSettings::mtls(source(ca.issue(CLIENT, plain), ca.roots()));
    let (status, address) = told(other.issue(SERVER, plain), ca.roots(), client).await;
    assert_says(
        status.message(),
        &[
            &address,
            "the server's certificate",
            SERVER,
            "somebody elses",
            "not signed by a certificate authority that we trust",
        ],
    );
}

#[tokio::test]
async fn a_server_that_refuses_our_certificate_is_quoted_and_the_certificate_named() {
    let (ca, other) = (Authority::new("theirs"), Authority::new("ours"));
    let client = || ClientSettings::mtls(source(other.issue(CLIENT, plain), ca.roots()));
    let (status, address) = told(ca.issue(SERVER, plain), ca.roots(), client()).await;
    assert_says(
        status.message(),
        &[
            &address,
            "the server refused our certificate",
            CLIENT,
            "does not trust the certificate authority",
            "unknown_ca",
        ],
    );
    let old = ca.issue(CLIENT, |params| params.not_after = date_time_ymd(2021, 3, 4));
    let client = ClientSettings::mtls(source(old, ca.roots()));
    let (status, address) = told(ca.issue(SERVER, plain), ca.roots(), client).await;
    assert_says(status.message(), &[&address, "the server refused our certificate", CLIENT, "expired"]);
}

#[tokio::test]
async fn a_server_that_wants_a_certificate_of_who_has_none_says_so() {
    let ca = Authority::new("root");
    let roots = Arc::new(MemorySource::new("roots", None, Some(ca.roots())));
    let (status, address) = told(ca.issue(SERVER, plain), ca.roots(), ClientSettings::new(Roots::Source(roots))).await;
    assert_says(
        status.message(),
        &[&address, "the server refused us", "requires a client certificate and we presented none"],
    );
}
