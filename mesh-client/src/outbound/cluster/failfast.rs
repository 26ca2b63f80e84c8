//! Failfast (Linkerd): once calls have waited in vain for an endpoint to be ready, those that follow do not wait.

use super::{Connectivity, Link, LiveCluster, Unavailable, unavailable};
use std::sync::{Arc, atomic::Ordering::Relaxed};

impl<L: Link> LiveCluster<L> {
    /// A call has waited for a connection as long as it may. From now on calls fail at once, until an endpoint is ready or one is there
    /// that was not tried. Why nothing is ready.
    #[cold]
    pub(crate) fn stalled(&self) -> Arc<Unavailable> {
        self.stalled.store(true, Relaxed);
        Arc::new(unavailable(&self.name, &self.writer().set))
    }

    /// Why a call that would have to wait is to fail at once; `None`: it may wait. Endpoints go on being connected to meanwhile, so
    /// that none of this needs a call to end it.
    pub(crate) fn fails_fast(&self) -> Option<Arc<Unavailable>> {
        if !self.stalled.load(Relaxed) {
            return None;
        }
        let writer = self.writer();
        let hopeful = |state| matches!(state, Connectivity::Ready | Connectivity::Idle);
        if writer.set.usable().any(|endpoint| hopeful(endpoint.connectivity())) {
            self.stalled.store(false, Relaxed);
            return None;
        }
        Some(Arc::new(unavailable(&self.name, &writer.set)))
    }
}
