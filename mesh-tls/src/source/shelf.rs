//! What all sources have in common: the newest material, its announcement, the last error, metrics, a task that brings more.

use super::{
    Source,
    expiry::{self, Expiry, Stage},
};
use crate::{Identity, Material, SourceError, TrustRoots};
use arc_swap::{ArcSwap, ArcSwapOption};
use std::{
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{runtime::Handle, sync::watch, task::JoinHandle};

/// Holds the material of one source.
#[derive(Debug)]
pub(crate) struct Shelf {
    name: String,
    current: ArcSwap<Material>,
    generation: watch::Sender<u64>,
    /// Serializes changes, so that generations are published in order.
    changing: Mutex<()>,
    last_error: ArcSwapOption<String>,
    expiry: Expiry,
    expires: metrics::Gauge,
    errors: metrics::Counter,
}

/// A source whose material lies on a shelf.
pub(crate) trait Shelved: Send + Sync + fmt::Debug + 'static {
    fn shelf(&self) -> &Shelf;
}

/// Ends when it is dropped.
#[derive(Debug)]
pub(crate) struct Task(JoinHandle<()>);

impl Shelf {
    /// Empty: generation 0. Expiry is watched on `runtime`, or else on that of whoever brings a certificate.
    pub(crate) fn new(name: String, runtime: Option<&Handle>) -> Self {
        metrics::describe_gauge!(
            "mesh_tls_certificate_expiry_seconds",
            metrics::Unit::Seconds,
            "Unix time at which the certificate of the source expires; less the time now it is the time to expiry"
        );
        metrics::describe_counter!(
            "mesh_tls_reload_errors_total",
            "Failed attempts of the source to get newer certificates"
        );
        Self {
            current: ArcSwap::default(),
            generation: watch::Sender::new(0),
            changing: Mutex::new(()),
            last_error: ArcSwapOption::empty(),
            expiry: Expiry::new(name.clone(), runtime.cloned()),
            expires: metrics::gauge!("mesh_tls_certificate_expiry_seconds", "source" => name.clone()),
            errors: metrics::counter!("mesh_tls_reload_errors_total", "source" => name.clone()),
            name,
        }
    }

    pub(crate) fn current(&self) -> Arc<Material> {
        self.current.load_full()
    }

    /// An error of this source.
    pub(crate) fn error(&self, file: Option<PathBuf>, reason: impl Into<String>) -> SourceError {
        SourceError { name: self.name.clone(), file, reason: reason.into() }
    }

    /// Makes this the newest material.
    pub(crate) fn publish(&self, identity: Option<Arc<Identity>>, roots: Option<Arc<TrustRoots>>) {
        self.change(|_| (identity, roots));
    }

    /// [`change`](Self::change), unless it would replace a certificate that is valid by one that is not.
    pub(crate) fn improve(
        &self,
        identity: &Option<Arc<Identity>>,
        change: impl FnOnce(&Material) -> (Option<Arc<Identity>>, Option<Arc<TrustRoots>>),
    ) {
        let now = SystemTime::now();
        let is_good = |identity: &Arc<Identity>| identity.check_validity(now).is_ok();
        match identity.as_ref().map(|identity| identity.check_validity(now)) {
            Some(Err(error)) if self.current.load().identity.as_ref().is_some_and(is_good) => {
                self.failed(&self.error(None, error.to_string()));
            }
            _ => self.change(change),
        }
    }

    /// Makes what `change` makes of the newest material the newest.
    pub(crate) fn change(&self, change: impl FnOnce(&Material) -> (Option<Arc<Identity>>, Option<Arc<TrustRoots>>)) {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current.load();
        let generation = before.generation + 1;
        let (identity, roots) = change(&before);
        if let Some(identity) = &identity {
            let not_after = identity.not_after().duration_since(UNIX_EPOCH).unwrap_or_default();
            self.expires.set(not_after.as_secs_f64());
            tracing::info!(source = %self.name, generation, certificate = %identity.name(), "new certificates");
        } else {
            tracing::info!(source = %self.name, generation, "new trust roots");
        }
        let same = match (&before.identity, &identity) {
            (Some(before), Some(now)) => Arc::ptr_eq(before, now),
            _ => false,
        };
        if !same {
            self.expiry.of(identity.as_ref());
        }
        self.last_error.store(None);
        self.current.store(Arc::new(Material { identity, roots, generation }));
        self.generation.send_replace(generation);
    }

    /// There was nothing new, and no error either.
    pub(crate) fn unchanged(&self) {
        self.last_error.store(None);
    }

    /// Nothing new could be had; what there is stays in use.
    pub(crate) fn failed(&self, error: &SourceError) {
        self.errors.increment(1);
        let now = SystemTime::now();
        let of = |identity: &Arc<Identity>| {
            let left = identity.not_after().duration_since(now).unwrap_or_default();
            (Duration::from_secs(left.as_secs()), expiry::stage(identity, now))
        };
        let (left, stage) = self.current.load().identity.as_ref().map(of).unzip();
        match stage {
            Some(Stage::Soon) => {
                tracing::error!(%error, expires_in = ?left, "no new certificates; the last good ones stay in use and expire soon");
            }
            Some(Stage::Expired) => tracing::error!(%error, "no new certificates; those in use have expired"),
            Some(Stage::Good) | None => {
                tracing::warn!(%error, expires_in = ?left, "no new certificates; the last good ones stay in use");
            }
        }
        self.last_error.store(Some(Arc::new(error.to_string())));
    }
}

impl<S: Shelved> Source for S {
    fn name(&self) -> &str {
        &self.shelf().name
    }

    fn current(&self) -> Arc<Material> {
        self.shelf().current()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.shelf().generation.subscribe()
    }

    fn last_error(&self) -> Option<String> {
        self.shelf().last_error.load().as_deref().cloned()
    }
}

impl From<JoinHandle<()>> for Task {
    fn from(task: JoinHandle<()>) -> Self {
        Self(task)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}
