//! Certificates in files that are replaced in place (gRFC A29 `file_watcher`, gRFC A65 `tls` channel credentials).

use super::shelf::{Shelf, Shelved, Task};
use crate::{CryptoProvider, Identity, Material, MaterialError, RevocationPolicy, SourceError, TrustRoots};
use std::{
    collections::hash_map::RandomState,
    fmt,
    hash::BuildHasher,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::runtime::Handle;
use zeroize::Zeroizing;

/// After a failed read the next one comes soon, as the files may be in the middle of being replaced.
const FIRST_RETRY: Duration = Duration::from_secs(1);

/// Certificate, key, roots, bundle map, revocation lists.
const FILES: usize = 5;

/// What a file holds; wiped when dropped, as it may be a key.
type Content = Zeroizing<Vec<u8>>;
type Hashes = [u64; FILES];

/// What was taken over, by the hashes of the files.
#[derive(Debug, Default)]
struct Seen {
    all: Option<Hashes>,
    /// Of the roots and lists alone.
    roots: Option<[u64; FILES - 2]>,
}

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
    /// PEM revocation lists for the roots, of either kind.
    pub crl_file: Option<PathBuf>,
    /// What missing and old revocation lists mean.
    pub revocation: RevocationPolicy,
    /// Time between two reads. Default 600 s.
    pub refresh_interval: Duration,
    /// Start without material when the first read fails, and go on trying.
    pub lazy: bool,
    /// Loads the keys.
    pub provider: Arc<CryptoProvider>,
}

/// Reads files at an interval and keeps the last good material.
///
/// A read that fails, whose key does not belong to its certificate, or whose certificate has expired or is not yet valid, changes nothing; it is tried again after one
/// second, then at doubled intervals up to the refresh interval. The task that reads ends when the source is dropped.
pub struct FileSource {
    shared: Arc<Shared>,
    _task: Task,
}

struct Shared {
    config: FileSourceConfig,
    shelf: Shelf,
    /// What the current material was read from, as keyed hashes: no second copy of the key is kept.
    seen: Mutex<Seen>,
    hasher: RandomState,
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
            crl_file: None,
            revocation: RevocationPolicy::default(),
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
        let shared = Arc::new(Shared {
            shelf: Shelf::new(config.name.clone(), Some(runtime)),
            seen: Mutex::default(),
            hasher: RandomState::new(),
            config,
        });
        let first = shared.reload();
        let failed = match first {
            Ok(_) => false,
            Err(_) if shared.config.lazy => true,
            Err(error) => return Err(error),
        };
        let task = runtime.spawn(poll(shared.clone(), failed)).into();
        Ok(Self { shared, _task: task })
    }

    /// Reads the files now, on the calling thread. Returns whether anything changed.
    ///
    /// # Errors
    /// The read failed; the last good material stays.
    pub fn reload_now(&self) -> Result<bool, SourceError> {
        self.shared.reload()
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
        match self.read(seen.all) {
            Ok(None) => {
                self.shelf.unchanged();
                Ok(false)
            }
            Ok(Some((material, hashes, None))) => {
                let [_, _, of_roots @ ..] = hashes;
                *seen = Seen { all: Some(hashes), roots: Some(of_roots) };
                self.shelf.publish(material.identity, material.roots);
                Ok(true)
            }
            // Roots and lists count all the same; the certificate may only be early.
            Ok(Some((material, hashes, Some(ReadError { file, reason })))) => {
                let [_, _, of_roots @ ..] = hashes;
                if seen.roots != Some(of_roots) && material.roots.is_some() {
                    self.shelf.change(|before| (before.identity.clone(), material.roots));
                }
                *seen = Seen { all: None, roots: Some(of_roots) };
                let error = self.shelf.error(file, reason);
                self.shelf.failed(&error);
                Err(error)
            }
            Err(ReadError { file, reason }) => {
                let error = self.shelf.error(file, reason);
                self.shelf.failed(&error);
                Err(error)
            }
        }
    }

    /// New material, or `None` when the files are as `seen`; and why its certificate is not used, when that is not valid now.
    fn read(&self, seen: Option<Hashes>) -> Result<Option<(Material, Hashes, Option<ReadError>)>, ReadError> {
        let config = &self.config;
        let bundle_file = config.spiffe_trust_bundle_map_file.as_deref();
        let ca_file = config.ca_certificate_file.as_deref().filter(|_| bundle_file.is_none());
        let [certificate, key] = [&config.certificate_file, &config.private_key_file].map(Option::as_deref);
        let files = [certificate, key, ca_file, bundle_file, config.crl_file.as_deref()];
        let contents = read_all(&files)?;
        let hashes = contents.each_ref().map(|content| self.hasher.hash_one(content.as_deref()));
        if seen == Some(hashes) {
            return Ok(None);
        }
        // what is replaced while it is read shows here; what is replaced a little later shows as a key mismatch
        if read_all(&files)? != contents {
            return Err(ReadError { file: None, reason: "the files are being replaced".into() });
        }
        let [certificate, key, ca, bundle, lists] = &contents;
        let at = |file: Option<&Path>| {
            let file = file.map(Path::to_owned);
            move |error: MaterialError| ReadError { file, reason: error.to_string() }
        };
        let (mut material, mut untimely) = (Material::default(), None);
        if let (Some(certificate), Some(key)) = (certificate, key) {
            let key = crate::material::private_key(key).map_err(at(files[1]))?;
            let chain = crate::material::certificates(certificate).map_err(at(files[0]))?;
            let identity = Identity::from_der(chain, key, &config.provider).map_err(|error| {
                let of_key = matches!(error, MaterialError::Key(_) | MaterialError::KeyMismatch(_));
                at(files[usize::from(of_key)])(error)
            })?;
            match identity.check_validity(SystemTime::now()) {
                Ok(()) => material.identity = Some(Arc::new(identity)),
                Err(error) => untimely = Some(at(files[0])(error)),
            }
        }
        let mut roots = match (bundle, ca) {
            (Some(bundle), _) => Some(TrustRoots::from_bundle_map(bundle).map_err(at(files[3]))?),
            (None, Some(ca)) => Some(TrustRoots::from_pem(ca).map_err(at(files[2]))?),
            (None, None) => None,
        };
        if let Some(lists) = lists {
            let with_lists = |roots: TrustRoots| roots.with_crl_pem(lists, config.revocation);
            roots = roots.map(with_lists).transpose().map_err(at(files[4]))?;
        }
        material.roots = roots.map(Arc::new);
        Ok(Some((material, hashes, untimely)))
    }
}

fn read_all(files: &[Option<&Path>; FILES]) -> Result<[Option<Content>; FILES], ReadError> {
    let mut contents = [const { None }; FILES];
    for (content, file) in contents.iter_mut().zip(files) {
        if let Some(file) = file {
            let read = std::fs::read(file);
            let read = read.map_err(|e| ReadError { file: Some(file.to_path_buf()), reason: e.to_string() })?;
            *content = Some(Zeroizing::new(read));
        }
    }
    Ok(contents)
}

/// Holds at compile time: what was read of a key file is wiped.
const _: fn() = || {
    fn is_wiped<T: zeroize::ZeroizeOnDrop>() {}
    is_wiped::<Content>();
};

impl Shelved for FileSource {
    fn shelf(&self) -> &Shelf {
        &self.shared.shelf
    }
}

impl fmt::Debug for FileSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileSource")
            .field("config", &self.shared.config)
            .field("current", &self.shared.shelf.current())
            .finish_non_exhaustive()
    }
}
