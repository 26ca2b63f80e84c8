//! Where keys come from: given, from a file, or fetched, with a cache, a refresh before it is too old, and bounded attempts.

use super::keys::KeySet;
use crate::{BoxError, Explain, MeshChannel};
use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::{Request, header};
use http_body_util::{BodyExt as _, Limited};
use mesh_tls::JwtBundles;
use mesh_xds::resource::{JwksSource, RemoteJwks};
use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::watch, time::Instant};
use tower_service::Service as _;

/// No set of keys is larger.
const MAX_BYTES: usize = 1 << 20;
/// A key that is not known has the keys fetched again, this often at most.
const UNKNOWN_KEY_PAUSE: Duration = Duration::from_secs(5);
/// Keys are fetched again so long before they are too old.
const AHEAD: Duration = Duration::from_secs(5);
/// A file is looked at this often.
const FILE_AGE: Duration = Duration::from_secs(10);
/// After it could not be read.
const FILE_PAUSE: Duration = Duration::from_secs(1);
/// A fetch that finds that there is a newer set already is repeated at once, so many times.
const OVERTAKEN: u32 = 3;
/// How long a fetch waits for the first keys of JWT SVIDs, before it says why there are none.
const FIRST_BUNDLES: Duration = Duration::from_secs(4);
/// Between two attempts of one fetch.
const RETRY_PAUSE: Duration = Duration::from_millis(200);

/// Fetches a JSON Web Key Set: for [`JwtProvider::fetched_by`](crate::inbound::JwtProvider::fetched_by).
pub trait FetchKeys: Send + Sync + 'static {
    /// The set, as it is served.
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>>;

    /// Follows a number that changes with the set, where it is known when there is a new one: that is fetched before the next token is verified.
    /// `None`: it is not known.
    fn changed(&self) -> Option<watch::Receiver<u64>> {
        None
    }
}

/// The keys of one source.
pub(crate) struct KeyStore {
    current: ArcSwapOption<KeySet>,
    remote: Option<Remote>,
}

struct Remote {
    fetch: Arc<dyn FetchKeys>,
    timeout: Duration,
    cache: Duration,
    pause: Duration,
    retries: u32,
    /// How much longer the last good keys stay while fetches fail: those of files, which are replaced and not let expire, for ever.
    stale: Duration,
    /// Says that there is a newer set.
    changes: Option<watch::Receiver<u64>>,
    /// Of the set that is used.
    generation: AtomicU64,
    state: Mutex<State>,
    /// Fetches that ended.
    ended: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    /// The last one failed.
    failing: bool,
    /// When what is there is too old.
    expires: Option<Instant>,
    /// When a fetch that nobody waits for may be tried again.
    again: Option<Instant>,
    /// When one for an unknown key may.
    unknown: Option<Instant>,
}

/// Why keys are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// There are none, or they are too old.
    Needed,
    /// One that is not among them is asked for.
    Unknown,
}

/// All stores of one server, as long as a configuration uses them.
#[derive(Debug, Default)]
pub(crate) struct Shelf(Mutex<Vec<(JwksSource, Weak<KeyStore>)>>);

impl Shelf {
    /// The store of a source. `fetch` is asked where the keys are to be fetched; `None`: they cannot be.
    pub(crate) fn store(
        &self,
        source: &JwksSource,
        fetch: impl FnOnce(&RemoteJwks) -> Option<Arc<dyn FetchKeys>>,
    ) -> Result<Arc<KeyStore>, String> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|(_, store)| store.strong_count() > 0);
        if let Some(store) = known.iter().find(|(of, _)| of == source).and_then(|(_, store)| store.upgrade()) {
            return Ok(store);
        }
        let store = Arc::new(KeyStore::new(source, fetch)?);
        if let JwksSource::Remote(RemoteJwks { async_fetch: true, .. }) = source
            && tokio::runtime::Handle::try_current().is_ok()
        {
            store.start(Why::Needed);
        }
        known.push((source.clone(), Arc::downgrade(&store)));
        Ok(store)
    }
}

impl KeyStore {
    fn new(source: &JwksSource, fetch: impl FnOnce(&RemoteJwks) -> Option<Arc<dyn FetchKeys>>) -> Result<Self, String> {
        let remote = |fetch: Arc<dyn FetchKeys>, timeout, cache, pause, retries, stale| Remote {
            changes: fetch.changed(),
            generation: AtomicU64::new(0),
            fetch,
            timeout,
            cache,
            pause,
            retries,
            stale,
            state: Mutex::default(),
            ended: watch::Sender::new(0),
        };
        match source {
            JwksSource::Inline(text) => Ok(Self::fixed(KeySet::parse(text.as_bytes())?)),
            JwksSource::File(path) => {
                let bytes = std::fs::read(&**path).map_err(|error| format!("{path}: {error}"))?;
                let keys = usable(&bytes).map_err(|error| format!("{path}: {error}"))?;
                let file = Arc::new(File(path.clone()));
                let remote = remote(file, Duration::from_secs(5), FILE_AGE, FILE_PAUSE, 0, Duration::MAX);
                remote.state.lock().unwrap_or_else(PoisonError::into_inner).expires = Some(Instant::now() + FILE_AGE);
                Ok(Self { current: ArcSwapOption::from_pointee(keys), remote: Some(remote) })
            }
            JwksSource::Remote(config) => {
                let fetch = fetch(config).ok_or_else(|| format!("there is no cluster `{}`", config.cluster))?;
                let RemoteJwks { timeout, cache_duration, failed_refetch, retries, stale, .. } = *config;
                let remote = remote(fetch, timeout, cache_duration, failed_refetch, retries, stale);
                Ok(Self { current: ArcSwapOption::empty(), remote: Some(remote) })
            }
            other => Err(format!("keys cannot be had from {other:?}")),
        }
    }

    fn fixed(keys: KeySet) -> Self {
        Self { current: ArcSwapOption::from_pointee(keys), remote: None }
    }

    /// The keys, unless they have to be fetched first. Has them fetched again before they are too old.
    pub(crate) fn keys(self: &Arc<Self>) -> Option<Arc<KeySet>> {
        let keys = self.current.load_full()?;
        let Some(remote) = &self.remote else { return Some(keys) };
        let now = Instant::now();
        let (expires, failing) = {
            let state = remote.lock();
            (state.expires?, state.failing)
        };
        let replaced = remote.is_replaced();
        if replaced || now + AHEAD.min(remote.cache / 2) >= expires {
            self.start(Why::Needed);
        }
        let kept = failing && expires.checked_add(remote.stale).is_none_or(|end| now < end);
        ((now < expires && !replaced) || kept).then_some(keys)
    }

    /// Whether another fetch may find a key that is not known.
    pub(crate) fn may_learn(&self) -> bool {
        let Some(remote) = &self.remote else { return false };
        let state = remote.lock();
        // One that runs already costs nothing more.
        state.running || state.unknown.is_none_or(|at| at <= Instant::now())
    }

    /// Waits for a fetch, no longer than it may take.
    pub(crate) async fn fetched(self: &Arc<Self>, why: Why) {
        let Some(remote) = &self.remote else { return };
        let mut ended = remote.ended.subscribe();
        if self.start(why) {
            // The sender lives as long as the store.
            let _ = tokio::time::timeout(remote.longest(), ended.changed()).await;
        }
    }

    /// Has the keys fetched; `false`: not now.
    fn start(self: &Arc<Self>, why: Why) -> bool {
        let Some(remote) = &self.remote else { return false };
        let now = Instant::now();
        let mut state = remote.lock();
        if state.running {
            return true;
        }
        match why {
            Why::Needed if state.again.is_some_and(|at| at > now) => return false,
            Why::Unknown if state.unknown.is_some_and(|at| at > now) => return false,
            _ => {}
        }
        state.running = true;
        state.unknown = Some(now + UNKNOWN_KEY_PAUSE);
        // Until it is known better: a fetch that panics says nothing.
        state.again = Some(now + remote.pause);
        drop(state);
        let running = Running(self.clone());
        tokio::spawn(async move { running.0.run().await });
        true
    }

    async fn run(&self) {
        let Some(remote) = &self.remote else { return };
        let mut generation = remote.newest();
        let mut result = remote.attempt().await;
        for _ in 0..remote.retries {
            if result.is_ok() {
                break;
            }
            tokio::time::sleep(RETRY_PAUSE).await;
            generation = remote.newest();
            result = remote.attempt().await;
        }
        // Who waits for this one is not to be told that there is a newer one.
        for _ in 0..OVERTAKEN {
            if result.is_err() || remote.newest() == generation {
                break;
            }
            generation = remote.newest();
            result = remote.attempt().await;
        }
        let now = Instant::now();
        let mut state = remote.lock();
        match result {
            Ok(keys) => {
                tracing::debug!(keys = keys.len(), "the keys of tokens were fetched");
                self.current.store(Some(Arc::new(keys)));
                remote.generation.store(generation, Ordering::Release);
                (state.failing, state.expires, state.again) = (false, Some(now + remote.cache), None);
            }
            Err(error) => {
                metrics::counter!("mesh_jwks_fetch_failures_total").increment(1);
                let kept = state.expires.and_then(|expires| expires.checked_add(remote.stale));
                let kept_for = kept.map(|end| end.saturating_duration_since(now));
                tracing::warn!(
                    error,
                    ?kept_for,
                    "the keys of tokens cannot be fetched; those that there are stay as long as they may"
                );
                (state.failing, state.again) = (true, Some(now + remote.pause));
            }
        }
    }
}

/// A fetch that runs. It is over when this is dropped: at its end, when it panics, when its runtime ends.
struct Running(Arc<KeyStore>);

impl Drop for Running {
    fn drop(&mut self) {
        let Some(remote) = &self.0.remote else { return };
        if std::thread::panicking() {
            metrics::counter!("mesh_jwks_fetch_failures_total").increment(1);
        }
        remote.lock().running = false;
        remote.ended.send_modify(|ended| *ended += 1);
    }
}

/// A set that something can be verified by.
fn usable(bytes: &[u8]) -> Result<KeySet, String> {
    let keys = KeySet::parse(bytes)?;
    if keys.is_usable() { Ok(keys) } else { Err("no key of the set can be used".to_owned()) }
}

impl Remote {
    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The number of the newest set.
    fn newest(&self) -> u64 {
        self.changes.as_ref().map_or(0, |changes| *changes.borrow())
    }

    fn is_replaced(&self) -> bool {
        self.changes.is_some() && self.newest() != self.generation.load(Ordering::Acquire)
    }

    async fn attempt(&self) -> Result<KeySet, String> {
        let fetched = tokio::time::timeout(self.timeout, self.fetch.fetch()).await;
        let fetched = fetched.map_err(|_| format!("no answer within {:?}", self.timeout))?;
        let bytes = fetched.map_err(|error| crate::error::chain(&*error))?;
        usable(&bytes)
    }

    /// All attempts of a fetch, and more.
    fn longest(&self) -> Duration {
        (self.timeout + RETRY_PAUSE).saturating_mul(self.retries.saturating_add(2))
    }
}

/// Over a channel of the mesh. What an `https` URI names is never believed to who answered in the clear, nor to who has not proven a name: one that the cluster's TLS
/// settings ask for, or the URI's host.
pub(crate) struct Fetched {
    pub(crate) channel: MeshChannel,
    pub(crate) uri: http::Uri,
}

impl FetchKeys for Fetched {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>> {
        let mut channel = self.channel.clone();
        let explain = Explain::default();
        let request = Request::get(self.uri.clone()).header(header::ACCEPT, "application/json");
        let request = request.extension(explain.clone());
        let encrypted = self.uri.scheme() == Some(&http::uri::Scheme::HTTPS);
        let host = encrypted.then(|| self.uri.host().unwrap_or_default().to_owned());
        Box::pin(async move {
            let request = request.body(http_body_util::Empty::<Bytes>::new())?;
            let response = channel.call(request).await?;
            if let Some(unproven) = host.and_then(|host| explain.unproven(&host)) {
                return Err(format!("the URI is https, and {unproven}").into());
            }
            if !response.status().is_success() {
                return Err(format!("answered with {}", response.status()).into());
            }
            Ok(Limited::new(response.into_body(), MAX_BYTES).collect().await?.to_bytes())
        })
    }
}

impl FetchKeys for JwtBundles {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>> {
        let bundles = self.clone();
        Box::pin(async move {
            let mut changes = bundles.changed();
            // The bundles hold the sender.
            let _ = tokio::time::timeout(FIRST_BUNDLES, changes.wait_for(|generation| *generation > 0)).await;
            match bundles.bundle_map() {
                Some(map) => Ok(Bytes::copy_from_slice(map.as_bytes())),
                None => Err(bundles.last_error().unwrap_or_else(|| "no JWT bundle has come yet".to_owned()).into()),
            }
        })
    }

    fn changed(&self) -> Option<watch::Receiver<u64>> {
        Some(self.changed())
    }
}

struct File(Arc<str>);

impl FetchKeys for File {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, BoxError>> + Send>> {
        let path = self.0.clone();
        Box::pin(async move { Ok(tokio::task::spawn_blocking(move || std::fs::read(&*path)).await??.into()) })
    }
}

impl fmt::Debug for KeyStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyStore").field("remote", &self.remote.is_some()).finish_non_exhaustive()
    }
}
