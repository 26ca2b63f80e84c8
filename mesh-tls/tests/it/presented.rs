//! What clients of open connections showed, looked at again when whom we trust changed, or our certificate.

use crate::support::*;
use mesh_tls::PeerCheck;
use rcgen::date_time_ymd;
use std::{
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap()
}

#[tokio::test]
async fn who_was_let_in_stays_when_his_certificate_is_over_and_ours_is_renewed() {
    let (ca, other) = (Ca::new("ca"), Ca::new("other"));
    let end = now().as_secs() + 3;
    let short = ca.issue(|params| {
        params.subject_alt_names.push(uri(BOB));
        params.not_after = date_time_ymd(1970, 1, 1) + Duration::from_secs(end);
    });
    let own = source(&ca.svid(ALICE), ca.roots());
    let server = mtls_server(&own);
    let client = mtls_client(&source(&short, ca.roots()));
    let (_near, accepted) = handshake(&client, &server, None).await;
    let presented = accepted.unwrap().presented();
    until(|| now().as_secs() > end).await;
    own.set_identity(Arc::new(ca.svid(ALICE).identity()));
    assert!(server.admits(&presented), "our certificate is another one");
    let late = handshake(&client, &server, None).await.1.unwrap_err().to_string();
    assert!(late.contains("expired"), "{late}");
    own.set_roots(ca.roots());
    assert!(server.admits(&presented), "the same roots, read again");
    own.set_roots(other.roots());
    assert!(!server.admits(&presented), "others are trusted");
    own.set_roots(ca.roots());
    assert!(server.admits(&presented));
}

#[tokio::test]
async fn a_client_with_a_spiffe_id_has_no_other_name_whatever_is_asked() {
    let ca = Ca::new("ca");
    let server = |check| {
        let settings = mesh_tls::ServerSettings::mtls(source(&ca.svid(ALICE), ca.roots()));
        mesh_tls::Acceptor::new(mesh_tls::ServerSettings { check, ..settings }, provider()).unwrap()
    };
    let lax = server(PeerCheck::Chain);
    for (names, good) in [
        (&[BOB][..], true),
        (&["https://a.test/", "https://b.test/"], true),
        (&[BOB, ALICE], false),
        (&[BOB, "https://a.test/"], false),
        (&["https://a.test/", "SPIFFE://td/x"], false),
    ] {
        let pair = ca.issue(|params| params.subject_alt_names.extend(names.iter().map(|name| uri(name))));
        let client = mtls_client(&source(&pair, ca.roots()));
        let accepted = handshake(&client, &lax, None).await.1;
        assert_eq!(accepted.is_ok(), good, "{names:?}");
        if let Err(error) = accepted {
            assert!(error.to_string().contains("URI"), "{error}");
        }
    }
}
