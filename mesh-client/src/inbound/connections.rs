//! The connections that are being served, and how they are told to end.

use super::{Chain, Config};
use crate::transport::Control;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, watch};

/// The open connections of one listening socket.
pub(super) struct Connections {
    state: Mutex<State>,
    /// How many there are.
    count: watch::Sender<usize>,
    stopping: watch::Sender<bool>,
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
        Self { state: Mutex::default(), count: watch::Sender::new(0), stopping: watch::Sender::new(false) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Registers a connection. One that comes too late is told to leave at once.
    pub(super) fn enter(&self, ending: Ending, chain: &Arc<Chain>) -> Entry<'_> {
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        if *self.stopping.borrow() {
            ending.leave();
        }
        state.open.insert(number, (ending, Arc::clone(chain)));
        self.count.send_replace(state.open.len());
        Entry { connections: self, number }
    }

    /// All connections leave, and no others are accepted.
    pub(super) fn stop(&self) {
        let state = self.state();
        self.stopping.send_replace(true);
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

    /// Closes what is left.
    pub(super) fn abort(&self) {
        self.state().open.values().for_each(|(ending, _)| ending.abort());
    }

    /// Waits until [`stop`](Self::stop) was called.
    pub(super) async fn stopping(&self) {
        // Fails when the sender is gone, and it is in `self`.
        let _ = self.stopping.subscribe().wait_for(|stopping| *stopping).await;
    }

    /// Waits until no connection is left.
    pub(super) async fn ended(&self) {
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        let mut state = self.connections.state();
        state.open.remove(&self.number);
        self.connections.count.send_replace(state.open.len());
    }
}
