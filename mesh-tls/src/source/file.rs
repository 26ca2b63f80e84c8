//! Certificates in files that are replaced in place (gRFC A29 `file_watcher`, gRFC A65 `tls` channel credentials).

use super::Source;
use crate::{CryptoProvider, Identity, Material, MaterialError, SourceError, TrustRoots};
use arc_swap::{ArcSwap, ArcSwapOption};
use std::{
    collections::hash_map::RandomState,
    fmt,
    hash::BuildHasher,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, UNIX_EPOCH},
};
use tokio::{runtime::Handle, sync::watch, task::JoinHandle};

/// After a failed read the next one comes soon, as the files may be in the middle of being replaced.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Certificate, key, roots, bundle map.
const FILES: usize = 4;

type Hashes = [u64; FILES];

struct ReadError {
    file: Option<PathBuf>,
    reason: String,
}

/// Settings of a [`FileSource`]. Certificate and key are given both or not at all.
#[derive(Clone, Debug)]
pub struct FileSourceConfig {
    /// The name in messages and metrics: that of the certificate provider instance.
    pub name: String,
    /// PEM chain, leaf first.
    pub certificate_file: Option<PathBuf>,
    /// PEM key.
    pub private_key_file: Option<PathBuf>,
    /// PEM roots. Ignored when there is a bundle map (gRFC A87).
    pub ca_certificate_file: Option<PathBuf>,
    /// SPIFFE bundle map in JSON.
    pub spiffe_trust_bundle_map_file: Option<PathBuf>,
    /// Time between two reads. Default 600 s.
    pub refresh_interval: Duration,
    /// Start without material when the first read fails, and go on trying.
    pub lazy: bool,
    /// Loads the keys.
    pub provider: Arc<CryptoProvider>,
}

/// Reads files at an interval and keeps the last good material.
///
/// A read that fails, or whose key does not belong to its certificate, changes nothing; it is tried again after one
/// second, then at doubled intervals up to the refresh interval. The task that reads ends when the source is dropped.
pub struct FileSource {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

struct Shared {
    config: FileSourceConfig,
    current: ArcSwap<Material>,
    generation: watch::Sender<u64>,
    last_error: ArcSwapOption<String>,
    /// What the current material was read from, as keyed hashes: no second copy of the key is kept.
    seen: Mutex<Option<Hashes>>,
    hasher: RandomState,
    expiry: metrics::Gauge,
    errors: metrics::Counter,
}

impl FileSourceConfig {
    /// No files yet, and every default.
    pub fn new(name: impl Into<String>, provider: Arc<CryptoProvider>) -> Self {
        Self {
            name: name.into(),
            certificate_file: None,
            private_key_file: None,
            ca_certificate_file: None,
            spiffe_trust_bundle_map_file: None,
            refresh_interval: Duration::from_secs(600),
            lazy: false,
            provider,
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        match (&self.certificate_file, &self.private_key_file) {
            (Some(_), None) => return Err("certificate_file is set, but private_key_file is not"),
            (None, Some(_)) => return Err("private_key_file is set, but certificate_file is not"),
            (None, None) if self.ca_certificate_file.is_none() && self.spiffe_trust_bundle_map_file.is_none() => {
                return Err("no file is set");
            }
            _ => {}
        }
        if self.refresh_interval.is_zero() { Err("refresh_interval must be greater than zero") } else { Ok(()) }
    }
}

impl FileSource {
    /// Reads the files once, on the calling thread, and starts the task that reads them again.
    ///
    /// # Errors
    /// The settings are inconsistent, or the first read failed and `lazy` is not set.
    pub fn new(config: FileSourceConfig, runtime: &Handle) -> Result<Self, SourceError> {
        if let Err(reason) = config.check() {
            return Err(SourceError { name: config.name, file: None, reason: reason.into() });
        }
        metrics::describe_gauge!(
            "mesh_tls_certificate_expiry_seconds",
            metrics::Unit::Seconds,
            "Unix time at which the certificate of the source expires"
        );
        metrics::describe_counter!("mesh_tls_reload_errors_total", "Failed reads of the files of the source");
        let shared = Arc::new(Shared {
            current: ArcSwap::default(),
            generation: watch::Sender::new(0),
            last_error: ArcSwapOption::empty(),
            seen: Mutex::new(None),
            hasher: RandomState::new(),
            expiry: metrics::gauge!("mesh_tls_certificate_expiry_seconds", "source" => config.name.clone()),
            errors: metrics::counter!("mesh_tls_reload_errors_total", "source" => config.name.clone()),
            config,
        });
        let first = shared.reload();
        let failed = match first {
            Ok(_) => false,
            Err(_) if shared.config.lazy => true,
            Err(error) => return Err(error),
        };
        let task = runtime.spawn(poll(shared.clone(), failed));
        Ok(Self { shared, task })
    }

    /// Reads the files now, on the calling thread. Returns whether anything changed.
    ///
    /// # Errors
    /// The read failed; the last good material stays.
    pub fn reload_now(&self) -> Result<bool, SourceError> {
        self.shared.reload()
    }
}

impl Drop for FileSource {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn poll(shared: Arc<Shared>, mut failed: bool) {
    let interval = shared.config.refresh_interval;
    let mut retry = FIRST_RETRY;
    loop {
        let wait = if failed { retry.min(interval) } else { interval };
        tokio::time::sleep(wait).await;
        retry = if failed { retry.saturating_mul(2) } else { FIRST_RETRY };
        let reader = shared.clone();
        // a read that panicked is tried again like one that failed
        failed = !matches!(tokio::task::spawn_blocking(move || reader.reload()).await, Ok(Ok(_)));
    }
}

impl Shared {
    fn reload(&self) -> Result<bool, SourceError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match self.read(*seen) {
            Ok(None) => {
                self.last_error.store(None);
                Ok(false)
            }
            Ok(Some((material, hashes))) => {
                *seen = Some(hashes);
                self.last_error.store(None);
                self.publish(material);
                Ok(true)
            }
            Err(ReadError { file, reason }) => {
                let error = SourceError { name: self.config.name.clone(), file, reason };
                self.errors.increment(1);
                tracing::warn!(%error, "certificates were not read; the last good ones stay in use");
                self.last_error.store(Some(Arc::new(error.to_string())));
                Err(error)
            }
        }
    }

    fn publish(&self, mut material: Material) {
        let generation = self.current.load().generation + 1;
        material.generation = generation;
        if let Some(identity) = &material.identity {
            let not_after = identity.not_after().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.expiry.set(not_after.as_secs_f64());
            tracing::info!(source = %self.config.name, generation, certificate = %identity.name(), "certificates were read");
        } else {
            tracing::info!(source = %self.config.name, generation, "trust roots were read");
        }
        self.current.store(Arc::new(material));
        self.generation.send_replace(generation);
    }

    /// New material, or `None` when the files are as `seen`.
    fn read(&self, seen: Option<Hashes>) -> Result<Option<(Material, Hashes)>, ReadError> {
        let config = &self.config;
        let bundle_file = config.spiffe_trust_bundle_map_file.as_deref();
        let ca_file = config.ca_certificate_file.as_deref().filter(|_| bundle_file.is_none());
        let files = [config.certificate_file.as_deref(), config.private_key_file.as_deref(), ca_file, bundle_file];
        let contents = read_all(&files)?;
        let hashes = contents.each_ref().map(|content| self.hasher.hash_one(content));
        if seen == Some(hashes) {
            return Ok(None);
        }
        // what is replaced while it is read shows here; what is replaced a little later shows as a key mismatch
        if read_all(&files)? != contents {
            return Err(ReadError { file: None, reason: "the files are being replaced".into() });
        }
        let [certificate, key, ca, bundle] = &contents;
        let at = |file: Option<&Path>| {
            let file = file.map(Path::to_owned);
            move |error: MaterialError| ReadError { file, reason: error.to_string() }
        };
        let mut material = Material::default();
        if let (Some(certificate), Some(key)) = (certificate, key) {
            let key = crate::material::private_key(key).map_err(at(files[1]))?;
            let chain = crate::material::certificates(certificate).map_err(at(files[0]))?;
            let identity = Identity::from_der(chain, key, &config.provider).map_err(|error| {
                let of_key = matches!(error, MaterialError::Key(_) | MaterialError::KeyMismatch(_));
                at(files[usize::from(of_key)])(error)
            })?;
            material.identity = Some(Arc::new(identity));
        }
        if let Some(bundle) = bundle {
            material.roots = Some(Arc::new(TrustRoots::from_bundle_map(bundle).map_err(at(files[3]))?));
        } else if let Some(ca) = ca {
            material.roots = Some(Arc::new(TrustRoots::from_pem(ca).map_err(at(files[2]))?));
        }
        Ok(Some((material, hashes)))
    }
}

fn read_all(files: &[Option<&Path>; FILES]) -> Result<[Option<Vec<u8>>; FILES], ReadError> {
    let mut contents = [const { None }; FILES];
    for (content, file) in contents.iter_mut().zip(files) {
        if let Some(file) = file {
            let read = std::fs::read(file);
            *content = Some(read.map_err(|e| ReadError { file: Some(file.to_path_buf()), reason: e.to_string() })?);
        }
    }
    Ok(contents)
}

impl Source for FileSource {
    fn name(&self) -> &str {
        &self.shared.config.name
    }

    fn current(&self) -> Arc<Material> {
        self.shared.current.load_full()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }

    fn last_error(&self) -> Option<String> {
        self.shared.last_error.load().as_deref().cloned()
    }
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSource")
            .field("config", &self.shared.config)
            .field("current", &self.shared.current.load())
            .finish_non_exhaustive()
    }
}
