//! Crypto providers as values, versions of TLS, and keys that nobody gets to see.

use crate::support::*;
use base64::Engine;
use mesh_tls::{
    Acceptor, ClientSettings, ClientTls, CryptoProvider, FileSource, FileSourceConfig, Identity, MemorySource,
    ServerSettings, Source, TlsVersion, TlsVersions,
};
use rustls_pki_types::{PrivateKeyDer, pem::PemObject};
use std::{
    fmt,
    sync::{Arc, Mutex},
};
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
    span,
};

fn identity(pair: &Pair, provider: &CryptoProvider) -> Identity {
    Identity::from_pem(pair.chain.as_bytes(), pair.key.as_bytes(), provider).unwrap()
}

/// Both ends with a provider of their own.
fn ends(near: CryptoProvider, far: CryptoProvider) -> (ClientTls, Acceptor) {
    let ca = Ca::new("ca");
    let (near, far) = (Arc::new(near), Arc::new(far));
    let alice = MemorySource::new("alice", Some(identity(&ca.svid(ALICE), &near)), Some(ca.roots()));
    let bob = MemorySource::new("bob", Some(identity(&ca.svid(BOB), &far)), Some(ca.roots()));
    let client = ClientTls::new(ClientSettings::mtls(Arc::new(alice)), near).unwrap();
    (client, Acceptor::new(ServerSettings::mtls(Arc::new(bob)), far).unwrap())
}

#[cfg(all(feature = "ring", feature = "aws-lc-rs"))]
#[tokio::test]
async fn each_side_uses_the_provider_it_was_given_and_post_quantum_key_exchange_where_both_have_it() {
    use rustls::crypto::{aws_lc_rs, ring};
    for (near, far, group) in [
        (aws_lc_rs::default_provider(), aws_lc_rs::default_provider(), "X25519MLKEM768"),
        (ring::default_provider(), aws_lc_rs::default_provider(), "X25519"),
        (aws_lc_rs::default_provider(), ring::default_provider(), "X25519"),
        (ring::default_provider(), ring::default_provider(), "X25519"),
    ] {
        let (client, server) = ends(near, far);
        let (near, far) = handshake(&client, &server, None).await;
        let (stream, peer) = near.unwrap();
        assert_eq!(peer.to_string(), BOB);
        assert_eq!(far.unwrap().peer().unwrap().to_string(), ALICE);
        assert_eq!(stream.key_exchange().as_deref(), Some(group));
    }
}

#[tokio::test]
async fn the_highest_version_within_both_bounds_is_spoken_and_none_outside() {
    let ca = Ca::new("ca");
    let (alice, bob) = (source(&ca.svid(ALICE), ca.roots()), source(&ca.svid(BOB), ca.roots()));
    let (only_12, only_13) = (TlsVersions::only(TlsVersion::V1_2), TlsVersions::only(TlsVersion::V1_3));
    let both = TlsVersions::default();
    for (near, far, expected) in [
        (both, both, Some(TlsVersion::V1_3)),
        (only_12, both, Some(TlsVersion::V1_2)),
        (both, only_12, Some(TlsVersion::V1_2)),
        (only_13, both, Some(TlsVersion::V1_3)),
        (only_13, only_12, None),
        (only_12, only_13, None),
    ] {
        let client = client(ClientSettings { versions: near, ..ClientSettings::mtls(alice.clone()) });
        let settings = ServerSettings { versions: far, ..ServerSettings::mtls(bob.clone()) };
        let (near, far) = handshake(&client, &Acceptor::new(settings, provider()).unwrap(), None).await;
        match expected {
            Some(version) => {
                assert_eq!(near.unwrap().0.version(), Some(version));
                assert_eq!(far.unwrap().version(), Some(version));
            }
            None => {
                let said = near.unwrap_err().to_string();
                assert!(said.contains("does not support our TLS versions"), "{said}");
                far.unwrap_err();
            }
        }
    }
    let upside_down = TlsVersions { min: TlsVersion::V1_3, max: TlsVersion::V1_2 };
    let settings = ClientSettings { versions: upside_down, ..ClientSettings::mtls(alice) };
    assert!(ClientTls::new(settings, provider()).unwrap_err().to_string().contains("above the highest"));
}

/// Remembers every field of every event and span, whoever emits it and at whatever level.
#[derive(Clone, Default)]
pub(crate) struct Captured(pub(crate) Arc<Mutex<String>>);

impl Visit for Captured {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write;
        writeln!(self.0.lock().unwrap(), "{field}={value:?}").unwrap();
    }
}

impl Subscriber for Captured {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, attributes: &span::Attributes<'_>) -> span::Id {
        attributes.record(&mut self.clone());
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, values: &span::Record<'_>) {
        values.record(&mut self.clone());
    }

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        event.record(&mut self.clone());
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// Whether the text has 8 bytes in a row of the secret, in any form that a program prints: letters, base64, hex, numbers.
pub(crate) fn shows(text: &str, secret: &[u8]) -> bool {
    let lower = text.to_lowercase();
    secret.windows(8).any(|window| {
        let hex: String = window.iter().map(|byte| format!("{byte:02x}")).collect();
        let numbers = format!("{window:?}");
        lower.contains(&hex) || text.contains(&numbers[1..numbers.len() - 1])
    })
}

#[tokio::test]
async fn keys_appear_neither_in_debug_nor_in_any_event_or_span() {
    let captured = Captured::default();
    let guard = tracing::subscriber::set_default(captured.clone());
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let (pair, other) = (ca.svid(ALICE), ca.svid(BOB));
    let path = |name: &str| Some(dir.path().join(name));
    let write = |pair: &Pair| {
        std::fs::write(dir.path().join("cert.pem"), &pair.chain).unwrap();
        std::fs::write(dir.path().join("key.pem"), &pair.key).unwrap();
    };
    write(&pair);
    std::fs::write(dir.path().join("ca.pem"), ca.pem()).unwrap();
    let config = FileSourceConfig {
        certificate_file: path("cert.pem"),
        private_key_file: path("key.pem"),
        ca_certificate_file: path("ca.pem"),
        ..FileSourceConfig::new("files", provider())
    };
    let files = Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap());
    let memory = source(&other, ca.roots());
    let (client, server) = (mtls_client(&memory), mtls_server(&files));
    let (near, far) = handshake(&client, &server, None).await;
    let mut shown = format!("{near:?} {far:?} {files:?} {memory:?} {client:?} {server:?} {:?}", files.current());
    // a key that does not fit, and one that is damaged, say nothing of themselves either
    std::fs::write(dir.path().join("key.pem"), &other.key).unwrap();
    shown += &format!("{:?}", files.reload_now().unwrap_err());
    std::fs::write(dir.path().join("key.pem"), pair.key.replace("MIG", "AIG")).unwrap();
    shown += &format!("{:?}", files.reload_now().unwrap_err());
    write(&pair);
    files.reload_now().unwrap();
    drop(guard);
    shown += &captured.0.lock().unwrap();
    // it was listened: rustls logs its handshakes, we our certificates
    assert!(shown.contains(ALICE) && shown.contains("new certificates"), "{shown}");
    for pair in [&pair, &other] {
        let der = PrivateKeyDer::from_pem_slice(pair.key.as_bytes()).unwrap();
        // the private scalar of a P-256 key in PKCS#8; after it comes the public key
        let secret = &der.secret_der()[36..68];
        let base64 = base64::engine::general_purpose::STANDARD.encode(der.secret_der());
        assert!(!shows(&shown, secret));
        assert!(!shown.contains(&base64[48..72]));
    }
    // and what would be shown is found
    assert!(
        shows("[1, 2, 3, 4, 5, 6, 7, 8, 9]", &[1, 2, 3, 4, 5, 6, 7, 8])
            && shows("0102030405060708", &[1, 2, 3, 4, 5, 6, 7, 8])
    );
}
