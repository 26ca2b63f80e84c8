//! The connections that are open, and how they are told to end.

use super::ConnectionInfo;
use crate::transport::Control;
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep, sleep_until, timeout},
};

/// What a client that has connected may take to say something, once no more are accepted.
const NOTICE: Duration = Duration::from_secs(1);

/// The open connections of one listening socket.
pub(super) struct Connections {
    state: Mutex<State>,
    /// How many there are, those included that are not served yet.
    count: watch::Sender<usize>,
    phase: watch::Sender<Phase>,
    /// How often all of them were told to be made anew.
    epoch: AtomicU64,
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
    open: HashMap<u64, Member>,
}

#[derive(Clone)]
struct Member {
    info: ConnectionInfo,
    ending: Ending,
}

/// The means to end a connection.
#[derive(Clone)]
pub(super) enum Ending {
    Http2(Control),
    Http1(Arc<Http1>),
    /// Somebody else's server speaks on it.
    Foreign,
}

/// Of a connection of HTTP/1.1.
#[derive(Default)]
pub(super) struct Http1 {
    pub(super) leave: Notify,
    pub(super) abort: Notify,
}

/// Counts as a connection while it lives.
pub(super) struct Counted {
    connections: Arc<Connections>,
    epoch: u64,
}

/// The means to end one connection.
#[derive(Clone)]
pub(super) struct Handle {
    connections: Arc<Connections>,
    number: u64,
}

/// A connection's entry; given up when it is dropped.
pub(super) struct Entry(Handle);

impl Member {
    fn leave(&self) {
        match &self.ending {
            Ending::Http2(control) => control.leave(),
            Ending::Http1(http1) => http1.leave.notify_one(),
            Ending::Foreign => self.info.leave(),
        }
    }

    fn abort(&self) {
        match &self.ending {
            Ending::Http2(control) => control.abort(),
            Ending::Http1(http1) => {
                http1.abort.notify_one();
                // Whoever it was handed on to speaks something else by now.
                self.info.farewell().cut();
            }
            Ending::Foreign => self.info.farewell().cut(),
        }
    }
}

impl Connections {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            count: watch::Sender::new(0),
            phase: watch::Sender::new(Phase::Serving),
            epoch: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection that was accepted.
    pub(super) fn count(self: &Arc<Self>) -> Counted {
        self.count.send_modify(|count| *count += 1);
        Counted { connections: Arc::clone(self), epoch: self.epoch() }
    }

    /// Registers a connection that is served. One that comes too late is told to leave at once, or cut.
    pub(super) fn enter(self: &Arc<Self>, info: ConnectionInfo, ending: Ending) -> Entry {
        let member = Member { info, ending };
        let mut state = self.state();
        let number = state.next;
        state.next += 1;
        match *self.phase.borrow() {
            Phase::Serving => {}
            Phase::Stopping => member.leave(),
            Phase::Aborting => member.abort(),
        }
        state.open.insert(number, member);
        Entry(Handle { connections: Arc::clone(self), number })
    }

    /// That of connections that are accepted now.
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// All connections leave, and those that were accepted before will as soon as they enter.
    pub(super) fn renew(self: &Arc<Self>) {
        // Who enters is in the list below, or sees this.
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.drain(Duration::MAX, |_| false);
    }

    pub(super) fn is_stopping(&self) -> bool {
        *self.phase.borrow() >= Phase::Stopping
    }

    /// All connections leave, and no others are accepted.
    pub(super) fn stop(&self) {
        let state = self.state();
        self.phase.send_modify(|phase| {
            if *phase == Phase::Serving {
                *phase = Phase::Stopping;
            }
        });
        state.open.values().for_each(Member::leave);
    }

    /// The connections that are not kept leave; each is cut when its time to drain is over, or this if it is less. How many they are.
    pub(super) fn drain(self: &Arc<Self>, within: Duration, keep: impl Fn(&ConnectionInfo) -> bool) -> usize {
        // Choosing takes a moment: others may enter and go meanwhile.
        let open: Vec<_> = self.state().open.iter().map(|(number, member)| (*number, member.clone())).collect();
        let gone: Vec<_> = open.into_iter().filter(|(_, member)| !keep(&member.info)).collect();
        let now = Instant::now();
        // Whose end no clock can tell is never cut.
        let end = |member: &Member| now.checked_add(member.info.limits().drain_timeout.min(within));
        gone.iter().for_each(|(_, member)| member.leave());
        let mut ends: Vec<_> = gone.iter().filter_map(|(number, member)| Some((end(member)?, *number))).collect();
        ends.sort_unstable();
        let (connections, count) = (Arc::downgrade(self), gone.len());
        if !ends.is_empty() {
            tokio::spawn(async move {
                for (end, number) in ends {
                    sleep_until(end).await;
                    let Some(connections) = connections.upgrade() else { return };
                    connections.abort_one(number);
                }
            });
        }
        count
    }

    fn abort_one(&self, number: u64) {
        if let Some(member) = self.state().open.get(&number) {
            member.abort();
        }
    }

    /// Closes what is left, and what comes later.
    pub(super) fn abort(&self) {
        let state = self.state();
        self.phase.send_replace(Phase::Aborting);
        state.open.values().for_each(Member::abort);
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

impl Entry {
    pub(super) fn handle(&self) -> Handle {
        self.0.clone()
    }
}

impl Handle {
    /// The connection leaves, and is cut when its time to drain is over, or this if it is less.
    pub(super) fn drain(self, within: Duration) {
        let member = self.connections.state().open.get(&self.number).cloned();
        let Some(member) = member else { return };
        member.leave();
        tokio::spawn(async move {
            sleep(member.info.limits().drain_timeout.min(within)).await;
            self.connections.abort_one(self.number);
        });
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let gone = self.0.connections.state().open.remove(&self.0.number);
        if let Some(member) = gone {
            // Nobody has to wait for its end any more.
            member.info.farewell().cut();
        }
    }
}

impl Counted {
    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.connections.count.send_modify(|count| *count -= 1);
    }
}
