//! A watched target: the latest [`TargetState`] and a way to wait for the next.

use crate::snapshot::TargetState;
use std::{any::Any, fmt, sync::Arc};
use tokio::sync::watch;

/// A subscription to one target. Dropping it unsubscribes.
pub struct TargetWatch {
    name: Arc<str>,
    state: watch::Receiver<TargetState>,
    /// Keeps the source alive.
    _source: Arc<dyn Any + Send + Sync>,
}

/// The source is gone: there will be no further state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the source of the target is closed")]
pub struct Closed;

impl TargetWatch {
    pub(crate) fn new(name: Arc<str>, state: watch::Receiver<TargetState>, source: Arc<dyn Any + Send + Sync>) -> Self {
        Self { name, state, _source: source }
    }

    /// The LDS name, or the target of another source.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The latest state. Cheap: clones `Arc`s.
    pub fn state(&self) -> TargetState {
        self.state.borrow().clone()
    }

    /// Waits for a state that was published after the last call of this method (or after the watch was made). May
    /// return once for a state that [`state`](Self::state) has already given.
    ///
    /// # Errors
    /// The source is gone.
    ///
    /// # Cancel safety
    /// Cancel safe: no change is lost.
    pub async fn changed(&mut self) -> Result<(), Closed> {
        self.state.changed().await.map_err(|_| Closed)
    }
}

impl fmt::Debug for TargetWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TargetWatch").field("name", &self.name).finish_non_exhaustive()
    }
}
