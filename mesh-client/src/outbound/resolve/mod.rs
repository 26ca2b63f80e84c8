//! Target -> live [`Routing`]: waits (bounded) for the first configuration, then follows it.

mod routing;
mod target;

pub(crate) use routing::{Facts, Routing, UpstreamRef};
pub(crate) use target::Target;
pub use target::TargetError;

use crate::{outbound::upstream::Upstreams, task::Task};
use arc_swap::{ArcSwap, Guard};
use mesh_xds::{
    TargetWatch,
    snapshot::{ResourceError, TargetState},
};
use std::{fmt, sync::Arc};
use tokio::sync::watch;

/// The live configuration of one target. One task follows the watch; requests load one pointer.
pub(crate) struct Resolver {
    state: Arc<ArcSwap<State>>,
    changed: watch::Receiver<()>,
    _task: Task,
}

/// What requests to the target find.
#[derive(Clone)]
pub(crate) enum State {
    /// Nothing complete yet, and why.
    Pending(Option<Arc<ResourceError>>),
    /// Compiled and live.
    Ready(Arc<Routing>),
    /// The control plane does not know the target.
    Absent(Arc<ResourceError>),
}

impl Resolver {
    /// Follows `watch` until dropped. Must be called inside the mesh's runtime.
    pub(crate) fn spawn(
        mut watch: TargetWatch,
        upstreams: Arc<Upstreams>,
        facts: Arc<Facts>,
        runtime: &tokio::runtime::Handle,
    ) -> Self {
        let first = compile(watch.state(), None, &upstreams, &facts);
        let state = Arc::new(ArcSwap::from_pointee(first));
        let (notify, changed) = watch::channel(());
        let live = state.clone();
        let task = Task::on(runtime, async move {
            loop {
                // `changed` remembers what came between `state()` and now.
                if watch.changed().await.is_err() {
                    return;
                }
                let old = live.load_full();
                let new = compile(watch.state(), Some(&old), &upstreams, &facts);
                live.store(Arc::new(new));
                drop(old);
                let _ = notify.send(());
            }
        });
        Self { state, changed, _task: task }
    }

    /// The current state: one pointer load.
    pub(crate) fn state(&self) -> Guard<Arc<State>> {
        self.state.load()
    }

    /// Waits until the target is ready or known to be absent. The caller bounds the time. Cancel safe.
    pub(crate) async fn settled(&self) -> State {
        let mut changed = self.changed.clone();
        loop {
            changed.borrow_and_update();
            let state = State::clone(&self.state.load());
            if !matches!(state, State::Pending(_)) {
                return state;
            }
            if changed.changed().await.is_err() {
                return state;
            }
        }
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match **self.state() {
            State::Pending(_) => "Pending",
            State::Ready(_) => "Ready",
            State::Absent(_) => "Absent",
        })
    }
}

fn compile(state: TargetState, old: Option<&State>, upstreams: &Arc<Upstreams>, facts: &Arc<Facts>) -> State {
    match state {
        TargetState::Pending { cause } => match old {
            // A target that was served once goes on being served.
            Some(State::Ready(routing)) => State::Ready(routing.clone()),
            _ => State::Pending(cause),
        },
        TargetState::Absent(cause) => State::Absent(cause),
        TargetState::Ready(snapshot) => {
            let old = old.and_then(|o| if let State::Ready(r) = o { Some(&**r) } else { None });
            State::Ready(Arc::new(Routing::compile(snapshot, old, upstreams, facts)))
        }
    }
}
