//! New certificates and new roots while connections are made; and no old decision kept.

use crate::support::*;
use mesh_tls::{
    ClientSettings, ClientTls, FileSource, FileSourceConfig, Reason, Source, TlsError, TlsVersion, TlsVersions,
    TrustRoots,
};
use rustls::HandshakeKind;
use rustls_pki_types::{CertificateDer, pem::PemObject};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::{io::AsyncReadExt, sync::watch};

fn write(dir: &Path, pair: &Pair, roots: &str) {
    std::fs::write(dir.join("cert.pem"), &pair.chain).unwrap();
    std::fs::write(dir.join("key.pem"), &pair.key).unwrap();
    std::fs::write(dir.join("ca.pem"), roots).unwrap();
}

fn files(dir: &Path) -> Arc<FileSource> {
    let config = FileSourceConfig {
        certificate_file: Some(dir.join("cert.pem")),
        private_key_file: Some(dir.join("key.pem")),
        ca_certificate_file: Some(dir.join("ca.pem")),
        ..FileSourceConfig::new("rotated", provider())
    };
    Arc::new(FileSource::new(config, &tokio::runtime::Handle::current()).unwrap())
}

/// The authority is exchanged 8 times by the book: both trusted, then new leaves, then the old one removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_and_authorities_rotate_under_handshakes_without_a_failure() {
    let (near, far) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut ca = Ca::new("ca 0");
    write(near.path(), &ca.svid(ALICE), &ca.pem());
    write(far.path(), &ca.svid(BOB), &ca.pem());
    let (alice, bob) = (files(near.path()), files(far.path()));
    let client = ClientTls::new(ClientSettings::mtls(alice.clone()), provider()).unwrap();
    let server = mtls_server(&bob);
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    let mut progress = Vec::new();
    for _ in 0..4 {
        let (client, server, stop) = (client.clone(), server.clone(), stop.clone());
        let (done, seen) = watch::channel(0u64);
        progress.push(seen);
        workers.push(tokio::spawn(async move {
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let (near, far) = handshake(&client, &server, None).await;
                let (stream, peer) = near.unwrap();
                assert_eq!(peer.to_string(), BOB);
                assert!(stream.generation() <= client.generation());
                far.unwrap();
                count += 1;
                done.send_replace(count);
            }
            count
        }));
    }
    let mut steps = 0;
    let mut step = async |alice_pair: &Pair, bob_pair: &Pair, roots: &str| {
        write(near.path(), alice_pair, roots);
        write(far.path(), bob_pair, roots);
        assert!(alice.reload_now().unwrap() && bob.reload_now().unwrap());
        steps += 1;
        // the handshakes that began before are over when each worker has finished two more
        for worker in &mut progress {
            let target = *worker.borrow_and_update() + 2;
            worker.wait_for(|count| *count >= target).await.unwrap();
        }
        let (near, far) = handshake(&client, &server, None).await;
        assert_eq!(near.unwrap().1.certificate(), der::<CertificateDer<'_>>(&bob_pair.chain).as_ref());
        assert_eq!(far.unwrap().peer().unwrap().certificate(), der::<CertificateDer<'_>>(&alice_pair.chain).as_ref());
    };
    let (mut alice_pair, mut bob_pair) = (ca.svid(ALICE), ca.svid(BOB));
    for round in 1..=8 {
        let next = Ca::new(&format!("ca {round}"));
        let both = ca.pem() + &next.pem();
        step(&alice_pair, &bob_pair, &both).await;
        (alice_pair, bob_pair) = (next.svid(ALICE), next.svid(BOB));
        step(&alice_pair, &bob_pair, &both).await;
        step(&alice_pair, &bob_pair, &next.pem()).await;
        ca = next;
    }
    stop.store(true, Ordering::Relaxed);
    let mut total = 0;
    for worker in workers {
        total += worker.await.unwrap();
    }
    assert_eq!(steps, 24);
    assert!(total >= 192, "{total} handshakes");
    assert_eq!(alice.current().generation, 25);
}

fn der<T: PemObject>(pem: &str) -> T {
    T::from_pem_slice(pem.as_bytes()).unwrap()
}

/// A server that offers session tickets, as rustls comes.
fn ticket_server(ca: &Ca) -> tokio_rustls::TlsAcceptor {
    let pair = ca.issue(|params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("bob.example".try_into().unwrap())];
    });
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![der(&pair.chain)], der(&pair.key))
        .unwrap();
    Arc::new(config).into()
}

/// A client that resumes sessions, as rustls comes.
fn resuming_client(ca: &Ca, version: TlsVersion) -> tokio_rustls::TlsConnector {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(der(&ca.pem())).unwrap();
    let pair = ca.svid(ALICE);
    let version = match version {
        TlsVersion::V1_2 => &rustls::version::TLS12,
        TlsVersion::V1_3 => &rustls::version::TLS13,
    };
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_client_auth_cert(vec![der(&pair.chain)], der(&pair.key))
        .unwrap();
    Arc::new(config).into()
}

#[tokio::test]
async fn a_server_whose_authority_was_removed_is_refused_at_the_next_handshake() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        server_with_a_removed_authority(version).await;
    }
}

async fn server_with_a_removed_authority(version: TlsVersion) {
    let ca = Ca::new("ca");
    let server = ticket_server(&ca);
    // control: two plain rustls ends do resume, and the verifier is not asked again
    let resuming = resuming_client(&ca, version);
    let mut kinds = Vec::new();
    for _ in 0..2 {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = "bob.example".try_into().unwrap();
        let (near, far) = tokio::join!(resuming.connect(name, near), server.accept(far));
        let (mut near, mut far) = (near.unwrap(), far.unwrap());
        echo(&mut near, &mut far).await;
        kinds.push(far.get_ref().1.handshake_kind().unwrap());
    }
    assert_eq!(kinds, [HandshakeKind::Full, HandshakeKind::Resumed]);

    let trust = source(&ca.svid(ALICE), ca.roots());
    let settings = ClientSettings { versions: TlsVersions::only(version), ..ClientSettings::mtls(trust.clone()) };
    let client = client(settings);
    for _ in 0..2 {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let (near, far) = tokio::join!(client.connect(near, Some("bob.example")), server.accept(far));
        let ((mut near, _), mut far) = (near.unwrap(), far.unwrap());
        echo(&mut near, &mut far).await;
        assert_eq!(far.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
    }
    let before = client.generation();
    let mut generations = client.generations();
    trust.replace(Some(ca.svid(ALICE).identity()), Some(Ca::new("new").roots()));
    assert_eq!(generations.changed().await, before + 1);
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (near, _far) = tokio::join!(client.connect(near, Some("bob.example")), server.accept(far));
    match near {
        Err(TlsError::Refused(refusal)) => {
            assert!(matches!(refusal.reason, Reason::UnknownCa { .. }), "{refusal}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_client_whose_authority_was_removed_is_refused_at_the_next_handshake() {
    for version in [TlsVersion::V1_2, TlsVersion::V1_3] {
        client_with_a_removed_authority(version).await;
    }
}

async fn client_with_a_removed_authority(version: TlsVersion) {
    let ca = Ca::new("ca");
    let pair = ca.issue(|params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("bob.example".try_into().unwrap())];
    });
    let trust = source(&pair, ca.roots());
    let server = mtls_server(&trust);
    let resuming = resuming_client(&ca, version);
    for _ in 0..2 {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = "bob.example".try_into().unwrap();
        let (near, far) = tokio::join!(resuming.connect(name, near), server.accept(far));
        let (mut near, mut far) = (near.unwrap(), far.unwrap());
        echo(&mut near, &mut far).await;
        assert_eq!(near.get_ref().1.handshake_kind(), Some(HandshakeKind::Full));
        assert!(far.peer().is_some());
    }
    trust.replace(Some(pair.identity()), Some(Ca::new("new").roots()));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let client = async {
        match resuming.connect("bob.example".try_into().unwrap(), near).await {
            Ok(mut near) => near.read_u8().await.unwrap_err(),
            // under TLS 1.2 a client's handshake ends last
            Err(error) => error,
        }
    };
    // an accepted connection is dropped, so that the client does not wait for ever
    let (error, far) = tokio::join!(client, async { server.accept(far).await.map(drop) });
    assert!(matches!(far, Err(TlsError::Refused(_))), "{far:?}");
    assert!(mesh_tls::describe_alert(&error).unwrap().contains("unknown_ca"), "{error}");
}

#[tokio::test]
async fn a_configuration_is_made_once_for_each_generation() {
    let (ca, new) = (Ca::new("ca"), Ca::new("new"));
    let trust = source(&ca.svid(ALICE), ca.roots());
    let client = mtls_client(&trust);
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (near, _far) = handshake(&client, &server, None).await;
    assert_eq!(near.unwrap().0.generation(), client.generation());
    let both = TrustRoots::from_pem((ca.pem() + &new.pem()).as_bytes()).unwrap();
    trust.replace(Some(ca.svid("spiffe://td/alice2").identity()), Some(Arc::new(both)));
    let (near, far) = handshake(&client, &server, None).await;
    assert_eq!(near.unwrap().0.generation(), client.generation());
    assert_eq!(far.unwrap().peer().unwrap().to_string(), "spiffe://td/alice2", "the newest certificate is presented");
}
