//! Certificates in files: first read, replacement in place, damage, metrics.

use crate::support::*;
use mesh_tls::{
    ClientSettings, ClientTls, FileSource, FileSourceConfig, PeerCheck, Source, SourceError, TlsError, TrustRoots,
};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use std::{path::Path, sync::Arc, time::Duration};
use tokio::{runtime::Handle, time::Instant};

fn config(dir: &Path) -> FileSourceConfig {
    FileSourceConfig {
        certificate_file: Some(dir.join("cert.pem")),
        private_key_file: Some(dir.join("key.pem")),
        ca_certificate_file: Some(dir.join("ca.pem")),
        ..FileSourceConfig::new("default", provider())
    }
}

fn open(config: FileSourceConfig) -> Result<FileSource, SourceError> {
    FileSource::new(config, &Handle::current())
}

fn write(dir: &Path, file: &str, text: &str) {
    std::fs::write(dir.join(file), text).unwrap();
}

fn write_all(dir: &Path, pair: &Pair, ca: &Ca) {
    write(dir, "cert.pem", &pair.chain);
    write(dir, "key.pem", &pair.key);
    write(dir, "ca.pem", &ca.pem());
}

fn held(source: &FileSource) -> String {
    source.current().identity.as_ref().unwrap().spiffe_id().unwrap().to_string()
}

#[tokio::test]
async fn the_first_read_names_the_file_and_what_is_wrong_with_it() {
    let ca = Ca::new("ca");
    let (pair, other) = (ca.svid(ALICE), ca.svid(BOB));
    let half = &pair.chain[..pair.chain.len() / 2];
    for (file, text, expected) in [
        ("cert.pem", None, "No such file"),
        ("key.pem", None, "No such file"),
        ("ca.pem", None, "No such file"),
        ("cert.pem", Some("garbage"), "holds no PEM certificate"),
        ("cert.pem", Some(half), "is malformed"),
        (
            "cert.pem",
            Some("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"),
            "certificate 1 cannot be used",
        ),
        ("key.pem", Some("garbage"), "holds no PEM private key"),
        ("key.pem", Some(pair.chain.as_str()), "holds no PEM private key"),
        (
            "key.pem",
            Some("-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n"),
            "private key cannot be used",
        ),
        ("key.pem", Some(other.key.as_str()), "the private key does not belong to the certificate spiffe://td/alice"),
        ("ca.pem", Some(""), "holds no PEM certificate"),
        (
            "ca.pem",
            Some("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"),
            "certificate 1 cannot be used",
        ),
    ] {
        let dir = tempfile::tempdir().unwrap();
        write_all(dir.path(), &pair, &ca);
        match text {
            Some(text) => write(dir.path(), file, text),
            None => std::fs::remove_file(dir.path().join(file)).unwrap(),
        }
        let error = open(config(dir.path())).unwrap_err();
        assert_eq!(error.file.as_deref(), Some(dir.path().join(file).as_path()), "{error}");
        assert!(error.reason.contains(expected), "{file} {text:?}: {error}");
        assert!(error.to_string().starts_with("certificate source \"default\": "), "{error}");

        // the same, lazily: the handshake says it
        let lazy = FileSourceConfig { lazy: true, ..config(dir.path()) };
        let source: Arc<dyn Source> = Arc::new(open(lazy).unwrap());
        let client = ClientTls::new(ClientSettings::mtls(source.clone()), provider()).unwrap();
        let (near, _far) = tokio::io::duplex(1024);
        let refused = client.connect(near, None).await.unwrap_err();
        assert!(matches!(refused, TlsError::NotReady { .. }) && refused.to_string().contains(expected), "{refused}");
        let settings = mesh_tls::ServerSettings::mtls(source);
        let server = mesh_tls::Acceptor::new(settings, provider()).unwrap();
        let (_near, far) = tokio::io::duplex(1024);
        let refused = server.accept(far).await.unwrap_err();
        assert!(refused.to_string().contains(expected), "{refused}");
    }
}

#[tokio::test]
async fn settings_that_cannot_work_are_refused() {
    let none = FileSourceConfig::new("x", provider());
    for (config, expected) in [
        (none.clone(), "no file is set"),
        (FileSourceConfig { certificate_file: Some("c".into()), ..none.clone() }, "private_key_file is not"),
        (FileSourceConfig { private_key_file: Some("k".into()), ..none.clone() }, "certificate_file is not"),
        (
            FileSourceConfig { ca_certificate_file: Some("c".into()), refresh_interval: Duration::ZERO, ..none },
            "refresh_interval",
        ),
    ] {
        let error = open(config).unwrap_err();
        assert!(error.file.is_none() && error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn files_replaced_one_by_one_are_taken_when_they_fit_together() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    write_all(dir.path(), &ca.svid(ALICE), &ca);
    let start = Instant::now();
    let source = open(config(dir.path())).unwrap();
    let mut generations = source.changed();
    assert_eq!((*generations.borrow_and_update(), held(&source).as_str()), (1, ALICE));

    let next = ca.svid("spiffe://td/alice2");
    write(dir.path(), "cert.pem", &next.chain);
    assert!(source.reload_now().unwrap_err().to_string().contains("does not belong"));
    assert_eq!(held(&source), ALICE, "the last good pair stays");
    assert!(source.last_error().unwrap().contains("does not belong"));
    assert_eq!(source.current().generation, 1);

    // the task sees the mismatch at its interval, and the fitting key one retry later
    tokio::time::sleep_until(start + Duration::from_millis(600_500)).await;
    assert!(!generations.has_changed().unwrap());
    write(dir.path(), "key.pem", &next.key);
    generations.changed().await.unwrap();
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(601) && waited < Duration::from_secs(610), "{waited:?}");
    assert_eq!(held(&source), "spiffe://td/alice2");
    assert_eq!(source.last_error(), None);
}

#[tokio::test(start_paused = true)]
async fn nothing_changes_when_the_files_do_not() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let pair = ca.svid(ALICE);
    write_all(dir.path(), &pair, &ca);
    let source = open(FileSourceConfig { refresh_interval: Duration::from_secs(5), ..config(dir.path()) }).unwrap();
    let generations = source.changed();
    write_all(dir.path(), &pair, &ca); // touched, same contents
    assert!(!source.reload_now().unwrap());
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert!(!generations.has_changed().unwrap());
    write(dir.path(), "ca.pem", &Ca::new("new").pem());
    assert!(source.reload_now().unwrap());
    assert_eq!(source.current().generation, 2);
}

#[tokio::test(start_paused = true)]
async fn a_lazy_source_gets_ready_when_its_files_appear() {
    let dir = tempfile::tempdir().unwrap();
    let source = open(FileSourceConfig { lazy: true, ..config(dir.path()) }).unwrap();
    let mut generations = source.changed();
    assert_eq!(source.current().generation, 0);
    let ca = Ca::new("ca");
    write_all(dir.path(), &ca.svid(ALICE), &ca);
    generations.changed().await.unwrap();
    assert_eq!(held(&source), ALICE);
}

#[tokio::test(start_paused = true)]
async fn the_task_ends_with_its_source() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    write_all(dir.path(), &ca.svid(ALICE), &ca);
    let source = open(config(dir.path())).unwrap();
    let mut generations = source.changed();
    drop(source);
    assert!(generations.changed().await.is_err(), "nobody is left to send");
}

#[tokio::test]
async fn bundle_maps_are_read_and_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let x5c = ca.x5c();
    let key = |kty: &str, usage: &str, x5c: &str| format!(r#"{{"kty": "{kty}", "use": "{usage}", "x5c": [{x5c}]}}"#);
    let good = key("EC", "x509-svid", &format!("\"{x5c}\""));
    let map = |domain: &str, keys: &str| {
        format!(
            r#"{{"trust_domains": {{"td": {{"spiffe_sequence": 7, "keys": [{good}]}}, "{domain}": {{"keys": [{keys}]}}}}}}"#
        )
    };
    let file = dir.path().join("map.json");
    let config = FileSourceConfig {
        spiffe_trust_bundle_map_file: Some(file.clone()),
        // ignored beside a bundle map (gRFC A87), so it may be missing
        ca_certificate_file: Some(dir.path().join("absent.pem")),
        ..FileSourceConfig::new("map", provider())
    };
    std::fs::write(&file, map("other", &good)).unwrap();
    let source = open(config).unwrap();
    let roots = |source: &FileSource| -> Vec<String> {
        source.current().roots.as_ref().unwrap().trust_domains().iter().map(ToString::to_string).collect()
    };
    assert_eq!(roots(&source), ["other", "td"]);
    for (text, expected) in [
        ("{".to_owned(), "is malformed"),
        ("{}".to_owned(), "trust_domains"),
        (map("Upper", &good), "trust domain \"Upper\" is not valid: the name has 'U'"),
        (map("x", &key("EC", "jwt-svid", "")), "keys[0] has use \"jwt-svid\""),
        (map("x", &key("oct", "x509-svid", "")), "keys[0] has kty \"oct\""),
        (map("x", &key("EC", "x509-svid", "")), "exactly one certificate in x5c, it has 0"),
        (map("x", &key("EC", "x509-svid", "\"AAAA\", \"AAAA\"")), "it has 2"),
        (map("x", &key("EC", "x509-svid", "\"?\"")), "x5c"),
        (map("x", &format!("{good}, {}", key("EC", "x509-svid", "\"AAAA\""))), "keys[1] x5c"),
        (map("x", r#"{"use": "x509-svid"}"#), "has no kty"),
        (map("x", r#"{"kty": "EC"}"#), "has no use"),
    ] {
        std::fs::write(&file, &text).unwrap();
        let error = source.reload_now().unwrap_err();
        assert!(error.to_string().contains(expected), "{text}: {error}");
        assert_eq!(roots(&source), ["other", "td"], "the last good map stays");
    }
    std::fs::write(&file, r#"{"trust_domains": {}}"#).unwrap();
    assert!(source.reload_now().unwrap(), "an empty map is valid");
    assert!(roots(&source).is_empty());
}

#[test]
fn expiry_and_failed_reads_are_measured() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ca = Ca::new("ca");
    let pair = ca.issue(|params| {
        params.subject_alt_names.push(uri(ALICE));
        params.not_after = rcgen::date_time_ymd(2033, 5, 18);
    });
    write_all(dir.path(), &pair, &ca);
    metrics::with_local_recorder(&recorder, || {
        let source = FileSource::new(config(dir.path()), runtime.handle()).unwrap();
        write(dir.path(), "key.pem", "garbage");
        assert!(source.reload_now().is_err() && source.reload_now().is_err());
    });
    let metrics: Vec<_> = snapshotter.snapshot().into_vec();
    let value = |name: &str| {
        let (key, .., value) = metrics.iter().find(|(key, ..)| key.key().name() == name).unwrap();
        let label = key.key().labels().next().unwrap();
        assert_eq!((label.key(), label.value()), ("source", "default"));
        value
    };
    assert!(matches!(value("mesh_tls_certificate_expiry_seconds"), DebugValue::Gauge(g) if g.0 == 1_999_987_200.0));
    assert!(matches!(value("mesh_tls_reload_errors_total"), DebugValue::Counter(2)));
}

/// The roots of the system do not trust a certificate of ours; the handshake works up to there.
#[tokio::test]
async fn system_roots_verify_servers() {
    if TrustRoots::system().is_err() {
        return; // a machine without roots: `TrustRoots::system` has its own test
    }
    let ca = Ca::new("ca");
    let settings = ClientSettings { check: PeerCheck::ServerName, ..ClientSettings::new(mesh_tls::Roots::System) };
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let (near, _far) = handshake(&client(settings), &server, Some("bob.example")).await;
    let text = near.unwrap_err().to_string();
    assert!(text.contains("is not signed by a certificate authority that we trust"), "{text}");
}
