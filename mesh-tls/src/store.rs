//! One rustls configuration at a time, made from the newest material of up to two sources.

use crate::{Identity, Source, TlsError, TrustRoots};
use arc_swap::ArcSwapOption;
use futures::future::select_all;
use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

/// Between two looks for an error while material is awaited.
const LOOK: Duration = Duration::from_millis(20);

/// Where the roots of a configuration come from.
#[derive(Clone, Debug)]
pub(crate) enum RootsFrom {
    Source(Arc<dyn Source>),
    /// The source of the identity: both are then taken from one material.
    Identity,
    Fixed(Arc<TrustRoots>),
    Nowhere,
}

/// Caches what was built from the material. A handshake costs two generation loads and one pointer load.
pub(crate) struct Store<C> {
    identity: Option<Arc<dyn Source>>,
    roots: RootsFrom,
    built: ArcSwapOption<Built<C>>,
    /// Serializes building, so that an older generation never replaces a newer one.
    building: Mutex<()>,
}

/// A configuration with the material it was made from.
pub(crate) struct Built<C> {
    pub(crate) config: Arc<C>,
    /// Sum of the generations of the sources: grows when either changes.
    pub(crate) generation: u64,
    /// The name of our certificate, for messages.
    pub(crate) own: Option<Arc<str>>,
}

/// Follows the generation of the material behind a [`ClientTls`](crate::ClientTls) or an [`Acceptor`](crate::Acceptor).
#[derive(Debug)]
pub struct Generations {
    sources: Vec<Arc<dyn Source>>,
    seen: u64,
    receivers: Vec<watch::Receiver<u64>>,
}

/// What a configuration is built from.
pub(crate) struct Parts {
    pub(crate) identity: Option<Arc<Identity>>,
    pub(crate) roots: Option<Arc<TrustRoots>>,
}

impl<C> Store<C> {
    pub(crate) fn new(identity: Option<Arc<dyn Source>>, roots: RootsFrom) -> Self {
        let roots = match (&identity, roots) {
            (Some(identity), RootsFrom::Source(source))
                if std::ptr::addr_eq(&raw const **identity, &raw const *source) =>
            {
                RootsFrom::Identity
            }
            (_, roots) => roots,
        };
        Self { identity, roots, built: ArcSwapOption::empty(), building: Mutex::new(()) }
    }

    /// The sources that can change.
    pub(crate) fn sources(&self) -> impl Iterator<Item = &Arc<dyn Source>> {
        let roots = match &self.roots {
            RootsFrom::Source(source) => Some(source),
            RootsFrom::Identity | RootsFrom::Fixed(_) | RootsFrom::Nowhere => None,
        };
        self.identity.iter().chain(roots)
    }

    pub(crate) fn generation(&self) -> u64 {
        generation(self.sources())
    }

    pub(crate) fn generations(&self) -> Generations {
        // subscribed first: what changes in between is then seen twice rather than never
        let receivers = self.sources().map(|source| source.changed()).collect();
        Generations { sources: self.sources().cloned().collect(), seen: self.generation(), receivers }
    }

    /// The configuration of the newest material; `build` is called when there is none yet.
    pub(crate) fn get(&self, build: impl FnOnce(&Parts) -> Result<C, TlsError>) -> Result<Arc<Built<C>>, TlsError> {
        if let Some(built) = self.fresh() {
            return Ok(built);
        }
        let _one_at_a_time = self.building.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(built) = self.fresh() {
            return Ok(built);
        }
        let (parts, generation) = self.parts()?;
        let config = Arc::new(build(&parts)?);
        let own = parts.identity.map(|identity| identity.name().into());
        let built = Arc::new(Built { config, generation, own });
        self.built.store(Some(built.clone()));
        Ok(built)
    }

    /// Waits until there is material, or until it is known why there is none. For ever, if neither comes.
    pub(crate) async fn ready(&self) {
        let mut changes: Vec<_> = self.sources().map(|source| source.changed()).collect();
        while !changes.is_empty() && matches!(self.parts(), Err(TlsError::NotReady { reason: None, .. })) {
            let any = select_all(changes.iter_mut().map(|change| Box::pin(change.changed())));
            // An error is no change, so it is looked for.
            if let Ok((Err(_), ..)) = timeout(LOOK, any).await {
                sleep(LOOK).await;
            }
        }
    }

    fn fresh(&self) -> Option<Arc<Built<C>>> {
        self.built.load_full().filter(|built| built.generation == self.generation())
    }

    pub(crate) fn parts(&self) -> Result<(Parts, u64), TlsError> {
        let missing = |source: &Arc<dyn Source>, missing| TlsError::NotReady {
            name: source.name().to_owned(),
            missing,
            reason: source.last_error(),
        };
        let mut generation = 0;
        let mut parts = Parts { identity: None, roots: None };
        if let Some(source) = &self.identity {
            let material = source.current();
            generation += material.generation;
            parts.identity = Some(material.identity.clone().ok_or_else(|| missing(source, "certificate"))?);
            if matches!(self.roots, RootsFrom::Identity) {
                parts.roots = Some(material.roots.clone().ok_or_else(|| missing(source, "trust roots"))?);
            }
        }
        match &self.roots {
            RootsFrom::Source(source) => {
                let material = source.current();
                generation += material.generation;
                parts.roots = Some(material.roots.clone().ok_or_else(|| missing(source, "trust roots"))?);
            }
            RootsFrom::Fixed(roots) => parts.roots = Some(roots.clone()),
            RootsFrom::Identity | RootsFrom::Nowhere => {}
        }
        Ok((parts, generation))
    }
}

/// Grows when any of them changes.
fn generation<'a>(sources: impl Iterator<Item = &'a Arc<dyn Source>>) -> u64 {
    sources.map(|source| source.current().generation).sum()
}

impl Generations {
    /// Waits until the generation differs from the last one returned (at first: from that of the call that made this), and returns it. Never
    /// returns when nothing can change.
    ///
    /// # Cancel safety
    /// A change is never lost.
    pub async fn changed(&mut self) -> u64 {
        loop {
            let now = generation(self.sources.iter());
            if now != self.seen {
                self.seen = now;
                return now;
            }
            if self.receivers.is_empty() {
                return std::future::pending().await;
            }
            let changes = self.receivers.iter_mut().map(|receiver| Box::pin(receiver.changed()));
            let (result, index, others) = select_all(changes).await;
            drop(others);
            if result.is_err() {
                self.receivers.swap_remove(index);
            }
        }
    }
}

impl<C> fmt::Debug for Store<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Store").field("identity", &self.identity).field("roots", &self.roots).finish_non_exhaustive()
    }
}
