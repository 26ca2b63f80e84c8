//! Certificates whose time is over, or about to be, or has not come.

use crate::support::*;
use mesh_tls::{ClientSettings, ClientTls, FileSource, FileSourceConfig, MemorySource, Source};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::{
    io,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};
use tokio::runtime::Handle;
use tracing_subscriber::fmt::MakeWriter;

const HOUR: Duration = Duration::from_secs(3600);

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'w> MakeWriter<'w> for Log {
    type Writer = Self;

    fn make_writer(&'w self) -> Self {
        self.clone()
    }
}

impl Log {
    /// Until this is dropped, what the thread logs is in the log.
    fn begin(&self) -> tracing::subscriber::DefaultGuard {
        let subscriber = tracing_subscriber::fmt().with_writer(self.clone()).with_ansi(false).finish();
        tracing::subscriber::set_default(subscriber)
    }

    /// The lines with all of these words since the last look.
    fn take(&self, words: &[&str]) -> Vec<String> {
        let text = String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap();
        text.lines().filter(|line| words.iter().all(|word| line.contains(word))).map(str::to_owned).collect()
    }
}

/// The states of both sources. Looked at once: that sets a gauge back.
fn states(snapshotter: &Snapshotter) -> [f64; 2] {
    let all = snapshotter.snapshot().into_vec();
    ["files", "memory"].map(|source| {
        let of_source = |key: &metrics::Key| key.labels().any(|label| label.value() == source);
        let found = all.iter().find_map(|(key, .., value)| match value {
            DebugValue::Gauge(value) if key.key().name() == "mesh_tls_certificate_state" && of_source(key.key()) => {
                Some(value.0)
            }
            _ => None,
        });
        found.unwrap()
    })
}

/// Valid from so long ago, for so long from now on.
fn lasting(ca: &Ca, id: &str, since: Duration, left: Duration) -> Pair {
    ca.issue(|params| {
        params.subject_alt_names.push(uri(id));
        params.not_before = (SystemTime::now() - since).into();
        params.not_after = (SystemTime::now() + left).into();
    })
}

fn expired(ca: &Ca) -> Pair {
    ca.issue(|params| {
        params.subject_alt_names.push(uri(ALICE));
        params.not_after = rcgen::date_time_ymd(2021, 3, 4);
    })
}

fn early(ca: &Ca) -> Pair {
    ca.issue(|params| {
        params.subject_alt_names.push(uri(ALICE));
        params.not_before = rcgen::date_time_ymd(2089, 3, 4);
    })
}

fn write(dir: &Path, pair: &Pair, ca: &Ca) {
    for (file, text) in [("cert.pem", &pair.chain), ("key.pem", &pair.key), ("ca.pem", &ca.pem())] {
        std::fs::write(dir.join(file), text).unwrap();
    }
}

fn config(dir: &Path, name: &str) -> FileSourceConfig {
    FileSourceConfig {
        certificate_file: Some(dir.join("cert.pem")),
        private_key_file: Some(dir.join("key.pem")),
        ca_certificate_file: Some(dir.join("ca.pem")),
        ..FileSourceConfig::new(name, provider())
    }
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_nobody_renews_is_an_alarm_before_it_expires_and_after() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let log = Log::default();
    let _guard = log.begin();
    let (ca, dir) = (Ca::new("ca"), tempfile::tempdir().unwrap());
    // A sixth of 24 h is 4 h.
    let pair = lasting(&ca, ALICE, 12 * HOUR, 12 * HOUR);
    write(dir.path(), &pair, &ca);
    let files = FileSource::new(config(dir.path(), "files"), &Handle::current()).unwrap();
    let memory = MemorySource::new("memory", Some(pair.identity()), Some(ca.roots()));
    tokio::time::sleep(7 * HOUR + HOUR / 2).await;
    assert_eq!(log.take(&["in use"]), Vec::<String>::new());
    tokio::time::sleep(HOUR).await;
    let warned = log.take(&["WARN", "expires soon", ALICE, "expires_in=14", "expires=20"]);
    for source in ["files", "memory"] {
        assert_eq!(warned.iter().filter(|line| line.contains(source)).count(), 1, "{warned:?}");
    }
    assert_eq!(states(&snapshotter), [1.0; 2]);
    assert_eq!(files.last_error(), None, "no attempt failed");
    // Seldom, while it lasts.
    tokio::time::sleep(3 * HOUR).await;
    let warned = log.take(&["WARN", "expires soon"]);
    assert!((4..=8).contains(&warned.len()), "{warned:?}");
    tokio::time::sleep(HOUR).await;
    let over = log.take(&["ERROR", "has expired", ALICE]);
    assert_eq!(over.len(), 2, "{over:?}");
    assert_eq!(states(&snapshotter), [2.0; 2]);
    // A new one ends it.
    let next = lasting(&ca, BOB, HOUR, 1000 * HOUR);
    write(dir.path(), &next, &ca);
    assert!(files.reload_now().unwrap());
    memory.set_identity(Arc::new(next.identity()));
    tokio::time::sleep(20 * HOUR).await;
    assert_eq!(log.take(&["in use"]), Vec::<String>::new());
    assert_eq!(states(&snapshotter), [0.0; 2]);
    drop((files, memory));
    tokio::time::sleep(2000 * HOUR).await;
    assert_eq!(log.take(&["in use"]), Vec::<String>::new(), "nobody uses it");
}

#[tokio::test]
async fn a_file_that_is_not_valid_now_replaces_nothing() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let (ca, dir) = (Ca::new("ca"), tempfile::tempdir().unwrap());
    write(dir.path(), &ca.svid(BOB), &ca);
    let source = FileSource::new(config(dir.path(), "files"), &Handle::current()).unwrap();
    let held = source.current();
    for (pair, said) in [
        (expired(&ca), "cert.pem: the certificate expired at 2021-03-04T00:00:00Z"),
        (early(&ca), "cert.pem: the certificate is not valid before 2089-03-04T00:00:00Z"),
    ] {
        write(dir.path(), &pair, &ca);
        // Each time: it is not forgotten that it is wrong.
        for _ in 0..2 {
            let error = source.reload_now().unwrap_err().to_string();
            assert!(error.contains(said), "{error}");
        }
        assert!(source.last_error().unwrap().contains(said));
        assert!(Arc::ptr_eq(&source.current(), &held));
    }
    write(dir.path(), &ca.svid(ALICE), &ca);
    assert!(source.reload_now().unwrap());
    assert_eq!(source.last_error(), None);
    let errors = snapshotter
        .snapshot()
        .into_vec()
        .into_iter()
        .find_map(|(key, .., value)| (key.key().name() == "mesh_tls_reload_errors_total").then_some(value));
    assert_eq!(errors, Some(DebugValue::Counter(4)));
}

#[tokio::test]
async fn roots_beside_a_certificate_that_is_not_valid_now_count() {
    let (ca, other, dir) = (Ca::new("ca"), Ca::new("other"), tempfile::tempdir().unwrap());
    write(dir.path(), &ca.svid(BOB), &ca);
    let source = FileSource::new(config(dir.path(), "files"), &Handle::current()).unwrap();
    let held = source.current();
    write(dir.path(), &expired(&ca), &other);
    assert!(source.reload_now().is_err());
    let now = source.current();
    assert_eq!(now.generation, held.generation + 1);
    assert!(Arc::ptr_eq(now.identity.as_ref().unwrap(), held.identity.as_ref().unwrap()), "the last good one stays");
    assert!(!Arc::ptr_eq(now.roots.as_ref().unwrap(), held.roots.as_ref().unwrap()));
    assert!(source.reload_now().is_err());
    assert!(Arc::ptr_eq(&source.current(), &now), "once");
    assert!(source.last_error().unwrap().contains("expired at"));
}

#[tokio::test]
async fn without_one_that_is_valid_the_error_says_since_or_from_when() {
    let ca = Ca::new("ca");
    for (pair, said) in [(expired(&ca), "expired at 2021-03-04"), (early(&ca), "is not valid before 2089-03-04")] {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &pair, &ca);
        let error = FileSource::new(config(dir.path(), "files"), &Handle::current()).unwrap_err();
        assert!(error.to_string().contains(said), "{error}");
        assert_eq!(error.file.as_deref(), Some(dir.path().join("cert.pem").as_path()));
        let lazy = FileSourceConfig { lazy: true, ..config(dir.path(), "files") };
        let source = Arc::new(FileSource::new(lazy, &Handle::current()).unwrap());
        let client = ClientTls::new(ClientSettings::mtls(source), provider()).unwrap();
        let (near, _far) = tokio::io::duplex(1024);
        let error = client.connect(near, None).await.unwrap_err().to_string();
        assert!(error.contains("has no certificate yet") && error.contains(said), "{error}");
    }
}

#[test]
fn memory_keeps_a_good_certificate_and_takes_the_first_as_it_is() {
    let ca = Ca::new("ca");
    let source = MemorySource::new("memory", Some(expired(&ca).identity()), Some(ca.roots()));
    assert_eq!(source.current().generation, 1);
    source.replace(Some(ca.svid(BOB).identity()), Some(ca.roots()));
    let held = source.current();
    assert_eq!(held.generation, 2);
    source.set_identity(Arc::new(early(&ca).identity()));
    assert!(source.last_error().unwrap().contains("is not valid before 2089-03-04"));
    source.replace(Some(expired(&ca).identity()), None);
    assert!(source.last_error().unwrap().contains("expired at 2021-03-04"));
    assert!(Arc::ptr_eq(&source.current(), &held));
    source.set_roots(ca.roots());
    assert_eq!((source.current().generation, source.last_error()), (3, None));
}

#[test]
fn a_certificate_that_begins_within_a_minute_is_valid() {
    let ca = Ca::new("ca");
    let begin = SystemTime::now() + HOUR;
    let identity = ca.issue(|params| (params.not_before, params.not_after) = (begin.into(), (begin + HOUR).into()));
    let identity = identity.identity();
    let begin = identity.not_before();
    let says = |at| identity.check_validity(at).map_err(|error| error.to_string());
    assert!(says(begin - Duration::from_secs(61)).unwrap_err().contains("is not valid before"));
    assert_eq!(says(begin - Duration::from_secs(60)), Ok(()));
    assert_eq!(says(begin + HOUR - Duration::from_secs(1)), Ok(()));
    assert!(says(begin + HOUR).unwrap_err().contains("expired at"));
}
