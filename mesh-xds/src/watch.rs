//! A watched target, server listener or secret: the latest [`State`] and a way to wait for the next.

use crate::{
    resource::Secret,
    snapshot::{ServerSnapshot, Snapshot, State},
};
use std::{any::Any, fmt, sync::Arc};
use tokio::sync::watch;

/// A subscription. Dropping it unsubscribes.
pub struct Watch<S> {
    name: Arc<str>,
    state: watch::Receiver<State<S>>,
    /// Keeps the source alive.
    _source: Arc<dyn Any + Send + Sync>,
}

/// A subscription to one target.
pub type TargetWatch = Watch<Snapshot>;

/// A subscription to what one listening address of a server is to do.
pub type ServerWatch = Watch<ServerSnapshot>;

/// A subscription to one secret.
pub type SecretWatch = Watch<Secret>;

/// The source is gone: there will be no further state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the source of the target is closed")]
pub struct Closed;

impl<S> Watch<S> {
    pub(crate) fn new(name: Arc<str>, state: watch::Receiver<State<S>>, source: Arc<dyn Any + Send + Sync>) -> Self {
        Self { name, state, _source: source }
    }

    /// The name of the resource (of a target and a server: of the listener), or the target of another source.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The latest state. Cheap: clones `Arc`s.
    pub fn state(&self) -> State<S> {
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

impl<S> fmt::Debug for Watch<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("name", &self.name).finish_non_exhaustive()
    }
}
