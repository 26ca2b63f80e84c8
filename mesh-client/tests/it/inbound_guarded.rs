//! What would open a server, or freeze what it is told: nothing of the application's that panics, no odd limit, and nothing that is forgotten.

use crate::{
    inbound_filters::{configured, deny, filter, route},
    inbound_xds::{Pair, chain, chain_with, manager, mutual},
    mtls::control_plane,
    support::{
        ANY, GUARD,
        inbound::Serving,
        policies::{Issuer, client, get, plain, tell},
        until,
    },
};
use envoy_types::pb::envoy::{
    config::core::v3::{DataSource, data_source::Specifier},
    extensions::transport_sockets::tls::v3::{
        CertificateValidationContext, DownstreamTlsContext, TlsCertificate, common_tls_context::ValidationContextType,
    },
};
use http::Version;
use mesh_client::{
    Inbound, TlsRenewal,
    inbound::{InboundBuilder, Limits, Serving as State},
};
use mesh_tls::{ClientSettings, PeerCheck};
use rcgen::SanType;
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const OFTEN: Duration = Duration::from_millis(20);

async fn own(inbound: Inbound) {
    inbound.serve(tower::service_fn(tell)).await.unwrap();
}

/// A file that is replaced at once, as those who replace such files do it.
fn write(file: &Path, text: &str) {
    let next = file.with_extension("next");
    std::fs::write(&next, text).unwrap();
    std::fs::rename(next, file).unwrap();
}

fn denying(path: &str) -> String {
    format!(r#"{{"filters": [{{"authorize": {{"action": "deny", "rules": [{{"paths": ["{path}"]}}]}}}}]}}"#)
}

async fn of_file(file: &Path, builder: InboundBuilder) -> Serving {
    let builder = builder.file(file).file_refresh(OFTEN);
    Serving::of(builder.bind(ANY).await.unwrap(), tower::service_fn(tell))
}

#[tokio::test]
async fn a_callback_that_panics_holds_up_no_denial() {
    let calls = Arc::<AtomicUsize>::default();
    let counts = calls.clone();
    let panics = move |_: &State| assert!(counts.fetch_add(1, Ordering::SeqCst) == usize::MAX, "as it was told");
    // Of a file.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("inbound.json");
    write(&file, &denying("/one"));
    let serving = of_file(&file, Inbound::builder().on_serving(panics.clone())).await;
    for path in ["/two", "/three"] {
        assert_eq!(plain(serving.addr, get(path)).await.0, 200);
        write(&file, &denying(path));
        until("the denial holds", async || plain(serving.addr, get(path)).await.0 == 403).await;
    }
    assert!(calls.swap(0, Ordering::SeqCst) >= 2);
    // Of a control plane.
    let mut pair = Pair::serving(|_| async {}).await;
    pair.inbound = pair.server.inbound_builder().unwrap().on_serving(panics).bind(ANY).await.unwrap();
    tokio::spawn(own(pair.inbound.clone()));
    let addr = pair.inbound.local_addr();
    for path in ["/two", "/three"] {
        configured(&pair, vec![filter("rbac", deny(path))], vec![route("/", &[])]).await;
        until("the denial holds", async || plain(addr, get(path)).await.0 == 403).await;
    }
    assert!(calls.load(Ordering::SeqCst) >= 1);
}

/// Longer than any clock goes.
fn for_ever() -> Limits {
    Limits::default().drain_timeout(Duration::MAX).max_connection_age(Some(Duration::MAX)).drain_notice(OFTEN)
}

#[tokio::test]
async fn limits_of_for_ever_hold_up_no_denial() {
    let mut pair = Pair::serving(|_| async {}).await;
    let builder = pair.server.inbound_builder().unwrap().limits(for_ever());
    pair.inbound = builder.tls_renewal(TlsRenewal::Within(Duration::MAX)).bind(ANY).await.unwrap();
    tokio::spawn(own(pair.inbound.clone()));
    let addr = pair.inbound.local_addr();
    configured(&pair, vec![], vec![route("/", &[])]).await;
    let held = TcpStream::connect(addr).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http2::handshake::<_, _, http_body_util::Empty<bytes::Bytes>>(
        hyper_util::rt::TokioExecutor::new(),
        hyper_util::rt::TokioIo::new(held),
    )
    .await
    .unwrap();
    let ended = tokio::spawn(connection);
    assert_eq!(sender.send_request(get("/")).await.unwrap().status(), 200);
    // Another chain takes it now: it has to go.
    let filters = || vec![filter("rbac", deny("/secret"))];
    let other = chain_with("other", "", None, |own| *own = manager(vec![route("/", &[])], filters()));
    pair.serve(pair.listener(vec![other]));
    until("the denial holds", async || plain(addr, get("/secret")).await.0 == 403).await;
    tokio::time::timeout(GUARD, ended).await.expect("it was told to go").unwrap().unwrap();
    let filters = vec![filter("rbac", deny("/later"))];
    let again = chain_with("again", "", None, |own| *own = manager(vec![route("/", &[])], filters));
    pair.serve(pair.listener(vec![again]));
    until("a later one too", async || plain(addr, get("/later")).await.0 == 403).await;
    pair.inbound.renew_connections();
    assert_eq!(plain(addr, get("/")).await.0, 200);
}

#[tokio::test]
async fn tls_that_a_file_forgets_stays_until_plaintext_is_said() {
    let (cp, dir) = control_plane().await;
    let certs = cp.ca().unwrap().ensure("default", "greeter").unwrap();
    let file = dir.path().join("inbound.json");
    let named = |name: &str| certs.join(name).display().to_string();
    let tls = format!(
        r#"{{"certificate_file": "{}", "private_key_file": "{}", "ca_certificate_file": "{}"}}"#,
        named("cert.pem"),
        named("key.pem"),
        named("ca.pem")
    );
    write(&file, &format!(r#"{{"tls": {tls}}}"#));
    let serving = of_file(&file, Inbound::builder()).await;
    let in_plaintext = async || {
        let Ok(socket) = TcpStream::connect(serving.addr).await else { return false };
        let handshake = hyper::client::conn::http1::handshake::<_, http_body_util::Empty<bytes::Bytes>>(
            hyper_util::rt::TokioIo::new(socket),
        );
        let (mut sender, connection) = handshake.await.unwrap();
        tokio::spawn(connection);
        let mut request = get("/");
        *request.uri_mut() = "/".parse().unwrap();
        request.headers_mut().insert("host", "x".parse().unwrap());
        sender.send_request(request).await.is_ok()
    };
    assert!(!in_plaintext().await);
    for forgotten in ["{}", r#"{"filters": []}"#] {
        write(&file, forgotten);
        until("it is told", async || serving.inbound.serving().to_string().contains("tls: is missing")).await;
        assert!(!in_plaintext().await, "{forgotten}");
    }
    write(&file, r#"{"tls": {"mode": "disabled"}}"#);
    until("it is said", async || in_plaintext().await).await;
    let error = Inbound::builder().file(&file).bind(ANY).await.map(drop);
    assert!(error.is_ok(), "also at the start: {error:?}");
}

fn uris(ids: &[&str]) -> Vec<SanType> {
    ids.iter().map(|id| SanType::URI((*id).try_into().unwrap())).collect()
}

#[tokio::test]
async fn who_shows_two_names_is_nobody_also_where_the_control_plane_asks_for_none() {
    let issuer = Issuer::new();
    let source = issuer.source("server", uris(&["spiffe://td/server"]));
    let pair = Pair::of(|mesh| mesh.certificate_provider("issuer", source), own).await;
    pair.serve(pair.listener(vec![chain("mutual", "", Some(mutual("issuer")))]));
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
    let addr = pair.inbound.local_addr();
    let admitted = async |names: Vec<SanType>| {
        let settings = ClientSettings::mtls(issuer.source("client", names));
        let client = client(Version::HTTP_2, ClientSettings { check: PeerCheck::Chain, ..settings });
        let (mut stream, _) = client.connect(TcpStream::connect(addr).await.unwrap(), None).await?;
        // Under TLS 1.3 a refusal comes afterwards: what comes else are our SETTINGS.
        let _ = stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
        let read = tokio::time::timeout(GUARD, stream.read_u8()).await.unwrap();
        read.map(drop).map_err(|error| mesh_tls::TlsError::ServerName(error.to_string()))
    };
    let a = "spiffe://cluster.local/ns/a/sa/x";
    admitted(uris(&[a])).await.unwrap();
    for two in [[a, "spiffe://cluster.local/ns/b/sa/y"], [a, "https://b.test/"], ["https://b.test/", a]] {
        assert!(admitted(uris(&two)).await.is_err(), "{two:?}");
    }
    admitted(vec![SanType::DnsName("a.test".try_into().unwrap())]).await.unwrap();
}

/// What a control plane may send of itself: certificate and key, and whom to trust.
fn inline(chain: &str, key: &str, ca: &str) -> DownstreamTlsContext {
    let text = |text: &str| {
        let specifier = Some(Specifier::InlineString(text.to_owned()));
        Some(DataSource { specifier, ..DataSource::default() })
    };
    let mut tls = mutual("default");
    let common = tls.common_tls_context.as_mut().unwrap();
    common.tls_certificate_provider_instance = None;
    common.tls_certificates =
        vec![TlsCertificate { certificate_chain: text(chain), private_key: text(key), ..TlsCertificate::default() }];
    common.validation_context_type = Some(ValidationContextType::ValidationContext(CertificateValidationContext {
        trusted_ca: text(ca),
        ..CertificateValidationContext::default()
    }));
    tls
}

#[tokio::test]
async fn a_chain_that_trusts_others_now_does_not_go_on_as_before_when_it_cannot_be_made() {
    let (old, new) = (Issuer::new(), Issuer::new());
    let pair = Pair::serving(own).await;
    let (certificate, key) = old.pem("server", uris(&["spiffe://td/server"]));
    let secured = |certificate: &str, ca: &str| {
        pair.serve(pair.listener(vec![
            chain("mutual", "tls", Some(inline(certificate, &key, ca))),
            chain("plain", "raw_buffer", None),
        ]));
    };
    let addr = pair.inbound.local_addr();
    let source = old.source("client", uris(&["spiffe://td/client"]));
    let served = async || {
        let client = client(Version::HTTP_2, ClientSettings::mtls(source.clone()));
        let stream = client.connect(TcpStream::connect(addr).await.unwrap(), None).await;
        stream.is_ok()
    };
    let problem = || pair.inbound.serving().to_string().contains("\"mutual\"");
    secured(&certificate, &old.roots());
    until("it serves", async || served().await).await;
    // The same trust: it goes on as before.
    secured("no certificate", &old.roots());
    until("it is told", async || problem()).await;
    assert!(served().await);
    secured(&certificate, &old.roots());
    until("all is well", async || !problem()).await;
    // Others are trusted: it does not.
    secured("no certificate", &new.roots());
    until("it is told", async || problem()).await;
    until("nobody is let in as before", async || !served().await).await;
}
