//! Certificates handed over by the application, or by another part of the mesh.

use super::shelf::{Shelf, Shelved};
use crate::{Identity, TrustRoots};
use std::sync::Arc;

/// Holds what it is given. A change costs a few allocations; handshakes that begin afterwards use it.
///
/// A certificate that is valid is not replaced by one that has expired or is not yet valid: that is an error of the source (log, metric,
/// [`last_error`](crate::Source::last_error)), and all stays as it was. The first one is taken in any case. That a certificate is about to expire is
/// told by a task of the runtime in which it was given, if it was in one.
#[derive(Debug)]
pub struct MemorySource(Shelf);

impl MemorySource {
    /// A source that holds these, as its first generation.
    pub fn new(name: impl Into<String>, identity: Option<Identity>, roots: Option<Arc<TrustRoots>>) -> Self {
        let source = Self::empty(name);
        source.replace(identity, roots);
        source
    }

    /// A source that has nothing yet: handshakes fail with [`TlsError::NotReady`](crate::TlsError::NotReady).
    pub fn empty(name: impl Into<String>) -> Self {
        Self(Shelf::new(name.into(), None))
    }

    /// Replaces both.
    pub fn replace(&self, identity: Option<Identity>, roots: Option<Arc<TrustRoots>>) {
        self.set(identity.map(Arc::new), roots);
    }

    /// Replaces both, by what others hold too.
    pub fn set(&self, identity: Option<Arc<Identity>>, roots: Option<Arc<TrustRoots>>) {
        self.0.improve(&identity.clone(), |_| (identity, roots));
    }

    /// Replaces our certificate; the roots stay.
    pub fn set_identity(&self, identity: Arc<Identity>) {
        let identity = Some(identity);
        self.0.improve(&identity.clone(), |now| (identity, now.roots.clone()));
    }

    /// Replaces the roots; our certificate stays.
    pub fn set_roots(&self, roots: Arc<TrustRoots>) {
        self.0.change(|now| (now.identity.clone(), Some(roots)));
    }

    /// Says why there is nothing newer, in the log, the metric, and the errors of handshakes that lack something. What there
    /// is stays in use.
    pub fn fail(&self, reason: impl Into<String>) {
        self.0.failed(&self.0.error(None, reason));
    }
}

impl Shelved for MemorySource {
    fn shelf(&self) -> &Shelf {
        &self.0
    }
}
