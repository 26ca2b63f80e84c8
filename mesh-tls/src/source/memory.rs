//! Certificates handed over by the application.

use super::Source;
use crate::{Identity, Material, TrustRoots};
use arc_swap::ArcSwap;
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::watch;

/// Holds what it is given.
#[derive(Debug)]
pub struct MemorySource {
    name: String,
    current: ArcSwap<Material>,
    generation: Mutex<watch::Sender<u64>>,
}

impl MemorySource {
    /// A source that holds these, as its first generation.
    pub fn new(name: impl Into<String>, identity: Option<Identity>, roots: Option<Arc<TrustRoots>>) -> Self {
        let first = Material { identity: identity.map(Arc::new), roots, generation: 1 };
        Self { name: name.into(), current: ArcSwap::from_pointee(first), generation: Mutex::new(watch::Sender::new(1)) }
    }

    /// Replaces both; handshakes that begin afterwards use them.
    pub fn replace(&self, identity: Option<Identity>, roots: Option<Arc<TrustRoots>>) {
        let sender = self.generation.lock().unwrap_or_else(PoisonError::into_inner);
        let generation = *sender.borrow() + 1;
        self.current.store(Arc::new(Material { identity: identity.map(Arc::new), roots, generation }));
        sender.send_replace(generation);
    }
}

impl Source for MemorySource {
    fn name(&self) -> &str {
        &self.name
    }

    fn current(&self) -> Arc<Material> {
        self.current.load_full()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.generation.lock().unwrap_or_else(PoisonError::into_inner).subscribe()
    }
}
