//! Bad certificates, on either side, each refused with its reason; and what the refused side is told.

use crate::{handshake::bundle_map, support::*};
use mesh_tls::{
    Acceptor, ClientSettings, Mode, PeerCheck, Reason, Refusal, Roots, SanMatcher, ServerSettings, Side, TlsError,
    TrustRoots,
};
use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, date_time_ymd};
use std::sync::Arc;

/// A server with this certificate, a client with these rules: why the client refuses, and what the server is told.
async fn client_refuses(pair: &Pair, roots: Arc<TrustRoots>, check: PeerCheck, sans: &[&str]) -> (Refusal, String) {
    let ca = Ca::new("ca");
    let san_matchers = sans.iter().map(|san| SanMatcher::Exact((*san).into())).collect();
    let identity = source(&ca.svid(ALICE), roots);
    let client = client(ClientSettings { check, san_matchers, ..ClientSettings::mtls(identity) });
    let server = mtls_server(&source(pair, ca.roots()));
    let (near, far) = handshake(&client, &server, None).await;
    (refusal(near.unwrap_err()), far.unwrap_err().to_string())
}

/// A client with this certificate, a server with these rules: why the server refuses, and what the client is told.
async fn server_refuses(pair: &Pair, roots: Arc<TrustRoots>, check: PeerCheck, sans: &[&str]) -> (Refusal, String) {
    let ca = Ca::new("ca");
    let san_matchers = sans.iter().map(|san| SanMatcher::Exact((*san).into())).collect();
    let settings = ServerSettings { check, san_matchers, ..ServerSettings::mtls(source(&ca.svid(BOB), roots)) };
    let server = Acceptor::new(settings, provider()).unwrap();
    let client = mtls_client(&source(pair, ca.roots()));
    let (near, far) = handshake(&client, &server, None).await;
    (refusal(far.unwrap_err()), near.unwrap_err().to_string())
}

fn refusal(error: TlsError) -> Refusal {
    match error {
        TlsError::Refused(refusal) => *refusal,
        other => panic!("refused for another reason: {other}"),
    }
}

/// A bad certificate, the rules it breaks, what the refusing side says and what the refused side is told.
struct Case {
    pair: Pair,
    check: PeerCheck,
    sans: &'static [&'static str],
    says: &'static str,
    told: &'static str,
}

fn cases(ca: &Ca) -> Vec<(&'static str, Case)> {
    let case = |pair, check, says, told| Case { pair, check, sans: &[], says, told };
    let chain = |edit: fn(&mut CertificateParams), says, told| {
        let pair = ca.issue(|params| {
            params.subject_alt_names.push(uri("spiffe://td/mallory"));
            edit(params);
        });
        case(pair, PeerCheck::Spiffe, says, told)
    };
    let self_signed = |edit: fn(&mut CertificateParams)| {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names.push(uri("spiffe://td/mallory"));
        edit(&mut params);
        Pair { chain: params.self_signed(&key).unwrap().pem(), key: key.serialize_pem() }
    };
    let old = ca.intermediate("old", |params| params.not_after = date_time_ymd(2020, 5, 1));
    let mut under_old = old.svid("spiffe://td/mallory");
    under_old.chain.push_str(&old.pem());
    vec![
        (
            "expired",
            chain(|p| p.not_after = date_time_ymd(2020, 5, 1), "it expired at 2020-05-01T00:00:00Z", "has expired"),
        ),
        (
            "not yet valid",
            chain(
                |p| p.not_before = date_time_ymd(2090, 1, 1),
                "not valid before 2090-01-01T00:00:00Z",
                "not valid yet",
            ),
        ),
        (
            "expired intermediate",
            case(under_old, PeerCheck::Chain, "a certificate in its chain expired at 2020-05-01", "has expired"),
        ),
        (
            "wrong usage",
            chain(
                |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning],
                "extended key usage does not include",
                "unsupported_certificate",
            ),
        ),
        (
            "two URI SANs",
            chain(
                |p| p.subject_alt_names.push(uri("spiffe://td/admin")),
                "it has [spiffe://td/mallory, spiffe://td/admin]",
                "bad_certificate",
            ),
        ),
        (
            "no URI SAN",
            chain(
                |p| p.subject_alt_names.clear(),
                "exactly one URI SAN with a SPIFFE id, it has none",
                "bad_certificate",
            ),
        ),
        (
            "a URI that is no SPIFFE id",
            chain(
                |p| p.subject_alt_names = vec![uri("https://td/mallory")],
                "\"https://td/mallory\" does not begin with spiffe://",
                "bad_certificate",
            ),
        ),
        (
            "a malformed SPIFFE id",
            chain(
                |p| p.subject_alt_names = vec![uri("spiffe://td/a/../b")],
                "relative path segment",
                "bad_certificate",
            ),
        ),
        ("another authority", case(Ca::new("evil").svid(BOB), PeerCheck::Spiffe, "its issuer (CN=evil", "unknown_ca")),
        (
            "another authority of the same name",
            case(Ca::new("trusted").svid(BOB), PeerCheck::Spiffe, "its issuer (CN=trusted", "unknown_ca"),
        ),
        ("self-signed", case(self_signed(|_| {}), PeerCheck::Spiffe, "is not signed by a certificate", "unknown_ca")),
        (
            "an authority itself",
            case(
                self_signed(|p| p.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained)),
                PeerCheck::Chain,
                "it is a signing certificate, not a leaf",
                "bad_certificate",
            ),
        ),
        (
            "a leaf that may sign",
            chain(
                |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign),
                "it is a signing certificate",
                "bad_certificate",
            ),
        ),
        (
            "another name than wanted",
            Case {
                sans: &["spiffe://td/ns/a", "db.example"],
                ..chain(
                    |_| {},
                    "wanted [spiffe://td/ns/a, db.example], offered URI:spiffe://td/mallory",
                    "its name is not allowed here",
                )
            },
        ),
    ]
}

#[tokio::test]
async fn clients_refuse_each_bad_server_certificate_with_its_reason() {
    let ca = Ca::new("trusted");
    for (name, case) in cases(&ca) {
        let (refusal, told) = client_refuses(&case.pair, ca.roots(), case.check, case.sans).await;
        assert_eq!(refusal.side, Side::Server, "{name}");
        assert!(refusal.to_string().starts_with("the server's certificate "), "{name}: {refusal}");
        assert!(refusal.to_string().contains(case.says), "{name}: {refusal}");
        assert!(told.starts_with("the client refused our certificate ") && told.contains(case.told), "{name}: {told}");
    }
}

#[tokio::test]
async fn servers_refuse_each_bad_client_certificate_with_its_reason() {
    let ca = Ca::new("trusted");
    for (name, case) in cases(&ca) {
        let (refusal, told) = server_refuses(&case.pair, ca.roots(), case.check, case.sans).await;
        assert_eq!(refusal.side, Side::Client, "{name}");
        assert!(refusal.to_string().contains(case.says), "{name}: {refusal}");
        assert!(told.starts_with("the server refused our certificate ") && told.contains(case.told), "{name}: {told}");
    }
}

#[tokio::test]
async fn usage_is_checked_for_the_role() {
    let ca = Ca::new("trusted");
    let only = |usage: ExtendedKeyUsagePurpose| {
        ca.issue(|params| {
            params.subject_alt_names.push(uri(BOB));
            params.extended_key_usages = vec![usage];
        })
    };
    let (server_only, client_only) =
        (only(ExtendedKeyUsagePurpose::ServerAuth), only(ExtendedKeyUsagePurpose::ClientAuth));
    let (refusal, _) = client_refuses(&client_only, ca.roots(), PeerCheck::Chain, &[]).await;
    assert_eq!(refusal.reason, Reason::WrongUsage { required: "server authentication" });
    let (refusal, _) = server_refuses(&server_only, ca.roots(), PeerCheck::Chain, &[]).await;
    assert_eq!(refusal.reason, Reason::WrongUsage { required: "client authentication" });

    let client = mtls_client(&source(&client_only, ca.roots()));
    let server = mtls_server(&source(&server_only, ca.roots()));
    let (near, far) = handshake(&client, &server, None).await;
    assert!(near.is_ok() && far.is_ok(), "each in its role is fine");
}

#[tokio::test]
async fn mutual_tls_takes_only_callers_with_one_spiffe_id() {
    let ca = Ca::new("ca");
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let named = |uris: &[&str]| {
        let sans = uris.iter().map(|id| uri(id)).chain([rcgen::SanType::DnsName("a.b".try_into().unwrap())]).collect();
        ca.issue(|params| params.subject_alt_names = sans)
    };
    let two = [ALICE, "spiffe://td/mallory"];
    for uris in [&[][..], &two] {
        let client = mtls_client(&source(&named(uris), ca.roots()));
        let (near, far) = handshake(&client, &server, None).await;
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        assert_eq!(refusal(far.unwrap_err()).reason, Reason::NotOneUri { uris });
        assert!(near.unwrap_err().to_string().contains("bad_certificate"));
    }
    let (near, far) = handshake(&mtls_client(&source(&named(&[ALICE]), ca.roots())), &server, None).await;
    near.unwrap();
    assert_eq!(far.unwrap().peer().unwrap().spiffe_id().unwrap().to_string(), ALICE);
}

#[tokio::test]
async fn trust_domains_are_kept_apart() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let map = bundle_map(&[("td", &ca), ("other", &other)]);
    // signed by a trusted authority, but not by that of its own domain
    let (refusal, _) = client_refuses(&other.svid(BOB), map.clone(), PeerCheck::Chain, &[]).await;
    assert!(refusal.to_string().ends_with("for trust domain td"), "{refusal}");
    let (refusal, told) = server_refuses(&ca.svid("spiffe://elsewhere/x"), map.clone(), PeerCheck::Chain, &[]).await;
    assert!(
        refusal.to_string().contains("trust domain elsewhere is not one of those that we trust ([other, td])"),
        "{refusal}"
    );
    assert!(told.contains("unknown_ca"), "{told}");
    let dns = ca.issue(|params| params.subject_alt_names = vec![rcgen::SanType::DnsName("a.b".try_into().unwrap())]);
    let (refusal, _) = client_refuses(&dns, map, PeerCheck::Chain, &[]).await;
    assert_eq!(refusal.reason, Reason::NotOneUri { uris: vec![] });
    let nobody = Arc::new(TrustRoots::from_bundle_map(br#"{"trust_domains": {}}"#).unwrap());
    let (refusal, _) = client_refuses(&ca.svid(BOB), nobody, PeerCheck::Chain, &[]).await;
    assert!(matches!(refusal.reason, Reason::UnknownTrustDomain { .. }), "{refusal}");
}

#[tokio::test]
async fn without_spiffe_rules_any_name_of_a_trusted_authority_is_accepted() {
    let ca = Ca::new("ca");
    let pair = ca.issue(|_| {});
    let client = mtls_client(&source(&pair, ca.roots()));
    let settings = ServerSettings { check: PeerCheck::Chain, ..ServerSettings::mtls(source(&pair, ca.roots())) };
    let server = Acceptor::new(settings, provider()).unwrap();
    let (near, far) = handshake(&client, &server, None).await;
    assert!(near.unwrap().1.spiffe_id().is_none() && far.is_ok());
}

#[tokio::test]
async fn a_client_without_certificate_is_refused_and_told_so() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(BOB), ca.roots());
    let anonymous = client(ClientSettings::new(Roots::Source(identity.clone())));
    let server = mtls_server(&identity);
    for mode in [Mode::Strict, Mode::Permissive] {
        server.set_mode(mode);
        let (near, far) = handshake(&anonymous, &server, None).await;
        assert_eq!(far.unwrap_err().to_string(), "the client's certificate was refused: none was presented");
        assert_eq!(
            near.unwrap_err().to_string(),
            "the server refused us: it requires a client certificate and we presented none"
        );
    }
}

#[tokio::test]
async fn a_server_that_speaks_plaintext_is_named_as_such() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let (near, mut far) = tokio::io::duplex(64 * 1024);
    let (result, ()) = tokio::join!(client.connect(near, None), async {
        far.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let _ = far.read(&mut [0; 1024]).await;
    });
    assert_eq!(result.unwrap_err().to_string(), "the server does not speak TLS: it answered in plaintext");
    let (near, far) = tokio::io::duplex(64 * 1024);
    drop(far);
    assert!(client.connect(near, None).await.is_err());
}
