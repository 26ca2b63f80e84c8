//! The connections that are being served, and how they are told to end.

use super::{Chain, Config};
use crate::transport::Control;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::timeout,
};

/// What a client that has connected may take to say something, once no more are accepted.
const NOTICE: Duration = Duration::from_secs(1);

/// The open connections of one listening socket.
pub(super) struct Connections {
    state: Mutex<State>,
    /// How many there are, those included that are not served yet.
    count: watch::Sender<usize>,
    phase: watch::Sender<Phase>,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Phase {
    Serving,
    Stopping,
    Aborting,
}

#[derive(Default)]
struct State {
    next: u64,
    open: HashMap<u64, (Ending, Arc<Chain>)>,
}

/// The means to end a connection.
pub(super) enum Ending {
    Http2(Control),
    Http1(Arc<Http1>),
}

/// Of a connection of HTTP/1.1.
#[derive(Default)]
pub(super) struct Http1 {
    pub(super) leave: Notify,
    pub(super) abort: Notify,
}

/// Counts as a connection while it lives.
pub(super) struct Counted(Arc<Connections>);

/// A connection's entry; given up when it is dropped.
pub(super) struct Entry<'a> {
    connections: &'a Connections,
    number: u64,
}

impl Ending {
    fn leave(&self) {
        match self {
            Self::Http2(control) => control.leave(),
            Self::Http1(http1) => http1.leave.notify_one(),
        }
    }

    fn abort(&self) {
        match self {
            Self::Http2(control) => control.abort(),
            Self::Http1(http1) => http1.abort.notify_one(),
        }
    }
}

impl Connections {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), count: watch::Sender::new(0), phase: watch::Sender::new(Phase::Serving) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection that was accepted.
    pub(super) fn count(self: &Arc<Self>) -> Counted {
        self.count.send_modify(|count| *count += 1);
        Counted(Arc::clone(self))
    }

    /// Registers a connection that is served. One that comes too late is told to leave at once, or cut.
    pub(super) fn enter(&self, ending: Ending, chain: &Arc<Chain>) -> Entry<'_> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        match *self.phase.borrow() {
            Phase::Serving => {}
            Phase::Stopping => ending.leave(),
            Phase::Aborting => ending.abort(),
        }
        state.open.insert(number, (ending, Arc::clone(chain)));
        Entry { connections: self, number }
    }

    /// All connections leave, and no others are accepted.
    pub(super) fn stop(&self) {
        let state = self.state();
        self.phase.send_modify(|phase| {
            if *phase == Phase::Serving {
                *phase = Phase::Stopping;
            }
        });
        state.open.values().for_each(|(ending, _)| ending.leave());
    }

    /// The connections of chains that are not in this configuration leave. Which those are.
    pub(super) fn leave_chains(&self, config: &Config) -> Vec<u64> {
        let state = self.state();
        let gone = state.open.iter().filter(|(_, (_, chain))| !config.has(chain));
        gone.map(|(number, (ending, _))| {
            ending.leave();
            *number
        })
        .collect()
    }

    /// Closes what is left of these.
    pub(super) fn abort_those(&self, numbers: &[u64]) {
        let state = self.state();
        numbers.iter().filter_map(|number| state.open.get(number)).for_each(|(ending, _)| ending.abort());
    }

    /// Closes what is left, and what comes later.
    pub(super) fn abort(&self) {
        let state = self.state();
        self.phase.send_replace(Phase::Aborting);
        state.open.values().for_each(|(ending, _)| ending.abort());
    }

    /// Waits until [`stop`](Self::stop) was called.
    pub(super) async fn stopping(&self) {
        // Fails when the sender is gone, and it is in `self`.
        let _ = self.phase.subscribe().wait_for(|phase| *phase >= Phase::Stopping).await;
    }

    /// Waits until a client that has not spoken yet has had its time: a moment after [`stop`](Self::stop), or [`abort`](Self::abort).
    pub(super) async fn closed_to_the_silent(&self) {
        self.stopping().await;
        let _ = timeout(NOTICE, self.phase.subscribe().wait_for(|phase| *phase == Phase::Aborting)).await;
    }

    /// Waits until no connection is left.
    pub(super) async fn ended(&self) {
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        self.connections.state().open.remove(&self.number);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}
