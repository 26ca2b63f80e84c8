//! Connections that are made, and what both sides learn.

use crate::support::*;
use mesh_tls::{
    Acceptor, ClientAuth, ClientSettings, Mode, PeerCheck, Roots, SanMatcher, ServerSettings, TlsError, TrustRoots,
};
use rcgen::SanType;
use std::{sync::Arc, time::Duration};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn both_sides_learn_who_the_other_is() {
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (near, far) = handshake(&client, &server, None).await;
    let ((mut near, bob), mut far) = (near.unwrap(), far.unwrap());
    assert_eq!(bob.spiffe_id().unwrap().to_string(), BOB);
    assert_eq!(far.peer().unwrap().spiffe_id().unwrap().to_string(), ALICE);
    assert!(far.is_tls());
    assert_eq!(far.server_name(), None, "no SNI unless configured");
    echo(&mut near, &mut far).await;
}

#[tokio::test]
async fn server_name_of_connect_wins_over_the_setting() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(ALICE), ca.roots());
    let settings = ClientSettings { sni: Some("set.example".into()), ..ClientSettings::mtls(identity) };
    let client = client(settings);
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (_near, far) = handshake(&client, &server, None).await;
    assert_eq!(far.unwrap().server_name(), Some("set.example"));
    let (_near, far) = handshake(&client, &server, Some("endpoint.example")).await;
    assert_eq!(far.unwrap().server_name(), Some("endpoint.example"));
    let (_near, far) = handshake(&client, &server, Some("10.0.0.1")).await;
    assert_eq!(far.unwrap().server_name(), None);
    let (near, _far) = handshake(&client, &server, Some("not a name")).await;
    assert!(matches!(near, Err(TlsError::ServerName(_))), "{near:?}");
}

#[tokio::test]
async fn the_application_protocol_is_negotiated() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(ALICE), ca.roots());
    let client = client(ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(identity) });
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (near, far) = handshake(&client, &server, None).await;
    assert_eq!(near.unwrap().0.alpn(), Some(&b"h2"[..]));
    assert_eq!(far.unwrap().alpn(), Some(&b"h2"[..]));
}

#[tokio::test]
async fn intermediate_certificates_are_followed() {
    let root = Ca::new("root");
    let ca = root.intermediate("middle", |_| {});
    let mut pair = ca.svid(BOB);
    pair.chain.push_str(&ca.pem());
    let client = mtls_client(&source(&root.svid(ALICE), root.roots()));
    let server = mtls_server(&source(&pair, root.roots()));
    let (near, _far) = handshake(&client, &server, None).await;
    assert_eq!(near.unwrap().1.to_string(), BOB);
}

#[tokio::test]
async fn one_matching_san_matcher_is_enough() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(ALICE), ca.roots());
    let prefix = SanMatcher::Matches {
        description: "prefix \"spiffe://td/b\"".into(),
        matches: Arc::new(|san| san.starts_with("spiffe://td/b")),
    };
    let san_matchers = vec![SanMatcher::Exact("spiffe://td/other".into()), prefix];
    let client = client(ClientSettings { san_matchers, ..ClientSettings::mtls(identity) });
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (near, _far) = handshake(&client, &server, None).await;
    near.unwrap();
}

#[tokio::test]
async fn the_server_name_that_was_sent_replaces_the_matchers_when_asked() {
    let ca = Ca::new("ca");
    let pair = ca.issue(|params| {
        params.subject_alt_names = vec![uri(BOB), SanType::DnsName("*.bob.example".try_into().unwrap())];
    });
    let server = mtls_server(&source(&pair, ca.roots()));
    let client = client(ClientSettings {
        auto_sni_san: true,
        san_matchers: vec![SanMatcher::Exact("spiffe://td/other".into())],
        ..ClientSettings::mtls(source(&ca.svid(ALICE), ca.roots()))
    });
    handshake(&client, &server, Some("a.bob.example")).await.0.unwrap();
    let said = handshake(&client, &server, Some("bob.example")).await.0.unwrap_err().to_string();
    assert!(said.contains("wanted DNS:bob.example, offered [URI:spiffe://td/bob, DNS:*.bob.example]"), "{said}");
    // nothing was sent: the matchers count
    let said = handshake(&client, &server, None).await.0.unwrap_err().to_string();
    assert!(said.contains("wanted spiffe://td/other"), "{said}");
}

#[tokio::test]
async fn peers_of_each_trust_domain_are_verified_with_its_roots() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let map = bundle_map(&[("td", &ca), ("other", &other)]);
    let client = mtls_client(&source(&ca.svid(ALICE), map.clone()));
    let server = mtls_server(&source(&other.svid("spiffe://other/bob"), map));
    let (near, far) = handshake(&client, &server, None).await;
    assert_eq!(near.unwrap().1.spiffe_id().unwrap().trust_domain_str(), "other");
    assert_eq!(far.unwrap().peer().unwrap().to_string(), ALICE);
}

#[tokio::test]
async fn a_server_is_verified_by_name_when_asked() {
    let ca = Ca::new("ca");
    let pair = ca.issue(|params| {
        params.subject_alt_names = vec![SanType::DnsName("*.control.example".try_into().unwrap())];
    });
    let server = mtls_server(&source(&pair, ca.roots()));
    let identity = source(&ca.svid(ALICE), ca.roots());
    let client = client(ClientSettings { check: PeerCheck::ServerName, ..ClientSettings::mtls(identity) });
    let (near, _far) = handshake(&client, &server, Some("xds.control.example")).await;
    near.unwrap();
    let (near, _far) = handshake(&client, &server, Some("xds.other.example")).await;
    let text = near.unwrap_err().to_string();
    assert!(text.contains("wanted xds.other.example, offered DNS:*.control.example"), "{text}");
    let (near, _far) = handshake(&client, &server, None).await;
    assert!(matches!(near, Err(TlsError::ServerName(_))), "{near:?}");
}

#[tokio::test]
async fn clients_may_come_without_certificate_when_it_is_optional_or_off() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(BOB), ca.roots());
    let anonymous = client(ClientSettings::new(Roots::Source(identity.clone())));
    let known = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    for (client_auth, expected) in [(ClientAuth::Optional, Some(ALICE)), (ClientAuth::Off, None)] {
        let settings = ServerSettings { client_auth, ..ServerSettings::mtls(identity.clone()) };
        let server = Acceptor::new(settings, provider()).unwrap();
        let (near, far) = handshake(&anonymous, &server, None).await;
        near.unwrap();
        assert!(far.unwrap().peer().is_none());
        let (_near, far) = handshake(&known, &server, None).await;
        assert_eq!(far.unwrap().peer().map(ToString::to_string).as_deref(), expected);
    }
}

#[tokio::test]
async fn permissive_takes_tls_and_plaintext_and_the_mode_can_change() {
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));

    server.set_mode(Mode::Permissive);
    let (near, far) = handshake(&client, &server, None).await;
    assert!(near.is_ok() && far.unwrap().peer().is_some());
    for text in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"x"] {
        let (mut near, far) = tokio::io::duplex(1024);
        near.write_all(text).await.unwrap();
        let mut far = server.accept(far).await.unwrap();
        assert!(!far.is_tls() && far.peer().is_none());
        near.shutdown().await.unwrap();
        let mut read = Vec::new();
        far.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, text, "nothing of what was looked at is lost");
    }

    server.set_mode(Mode::Strict);
    let (mut near, far) = tokio::io::duplex(1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let (refused, _) = tokio::join!(server.accept(far), async {
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await
    });
    assert!(matches!(refused, Err(TlsError::Plaintext(_))), "{refused:?}");

    server.set_mode(Mode::Disabled);
    let (_near, far) = tokio::io::duplex(1024);
    assert!(!server.accept(far).await.unwrap().is_tls(), "nothing needs to be read");
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_is_given_up() {
    let ca = Ca::new("ca");
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    for mode in [Mode::Strict, Mode::Permissive] {
        server.set_mode(mode);
        let (_near, far) = tokio::io::duplex(1024);
        let error = server.accept(far).await.unwrap_err();
        assert!(matches!(error, TlsError::Timeout { limit, .. } if limit == Duration::from_secs(10)), "{error}");
    }
    let (near, far) = tokio::io::duplex(1024);
    drop(near);
    assert!(matches!(server.accept(far).await, Err(TlsError::Closed(_))));
}

#[tokio::test]
async fn both_protocol_versions_are_spoken() {
    let ca = Ca::new("ca");
    for version in [&rustls::version::TLS12, &rustls::version::TLS13] {
        let mut limited = (*provider()).clone();
        limited.cipher_suites.retain(|suite| suite.version() == version);
        // a provider with suites of one version only cannot build a default configuration: go through rustls
        let mut roots = rustls::RootCertStore::empty();
        roots.add(rustls_pki_types::pem::PemObject::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
        let pair = ca.issue(|params| {
            params.subject_alt_names = vec![uri(ALICE), SanType::DnsName("bob.example".try_into().unwrap())];
        });
        let key = rustls_pki_types::pem::PemObject::from_pem_slice(pair.key.as_bytes()).unwrap();
        let chain = vec![rustls_pki_types::pem::PemObject::from_pem_slice(pair.chain.as_bytes()).unwrap()];
        let config = rustls::ClientConfig::builder_with_provider(Arc::new(limited))
            .with_protocol_versions(&[version])
            .unwrap()
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .unwrap();
        let named = ca.issue(|params| {
            params.subject_alt_names = vec![uri(BOB), SanType::DnsName("bob.example".try_into().unwrap())];
        });
        let server = mtls_server(&source(&named, ca.roots()));
        let (near, far) = tokio::io::duplex(64 * 1024);
        let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
        let name = "bob.example".try_into().unwrap();
        let (near, far) = tokio::join!(connector.connect(name, near), server.accept(far));
        let (mut near, mut far) = (near.unwrap(), far.unwrap());
        assert_eq!(near.get_ref().1.protocol_version(), Some(version.version));
        assert_eq!(far.peer().unwrap().uri_sans(), [ALICE]);
        echo(&mut near, &mut far).await;
    }
}

#[test]
fn the_system_has_roots_or_the_error_says_so() {
    match TrustRoots::system() {
        Ok(roots) => assert!(Arc::ptr_eq(&roots, &TrustRoots::system().unwrap()), "read once"),
        Err(error) => assert!(error.to_string().contains("no root certificates"), "{error}"),
    }
}

#[test]
fn keys_are_never_shown() {
    let ca = Ca::new("ca");
    let pair = ca.svid(ALICE);
    let source = source(&pair, ca.roots());
    let (client, server) = (mtls_client(&source), mtls_server(&source));
    let shown = format!("{:?} {source:?} {client:?} {server:?}", pair.identity());
    assert!(shown.contains(ALICE), "{shown}");
    let key: String = pair.key.lines().filter(|line| !line.starts_with("---")).collect();
    use base64::Engine;
    let der = base64::engine::general_purpose::STANDARD.decode(&key).unwrap();
    assert!(!shown.contains(&key[8..24]));
    // the private scalar of a P-256 key in PKCS#8, as a list of numbers
    let numbers = format!("{:?}", &der[36..68]);
    assert!(!shown.contains(&numbers[1..numbers.len() - 1]));
    assert!(!shown.to_lowercase().contains("private_key: ["), "{shown}");
}

pub(crate) fn bundle_map(domains: &[(&str, &Ca)]) -> Arc<TrustRoots> {
    let domains: Vec<_> = domains
        .iter()
        .map(|(domain, ca)| {
            format!(r#""{domain}": {{"keys": [{{"kty": "EC", "use": "x509-svid", "x5c": ["{}"]}}]}}"#, ca.x5c())
        })
        .collect();
    let json = format!(r#"{{"trust_domains": {{{}}}}}"#, domains.join(","));
    Arc::new(TrustRoots::from_bundle_map(json.as_bytes()).unwrap())
}
