//! One endpoint: its state, its usable connections, and who waits for one.

use super::{
    ConnectError, Connectivity, Connector,
    connector::Opened,
    preconnect::{AT_ONCE, Demand, Foresight},
    supervisor::{self, Supervised},
};
use crate::{
    error::chain,
    outbound::cluster::{Permit, Resource},
    transport::{Connection, Events, Kind, Lease, Protocol},
};
use arc_swap::ArcSwapOption;
use mesh_xds::resource::RoutingPriority;
use smallvec::SmallVec;
use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU8, Ordering},
    },
};
use tokio::{
    sync::{Notify, watch},
    time::sleep,
};

/// One endpoint's connections.
///
/// Costs little until used: no connection, no task, no allocation but its own. Dropping it drains its connections and
/// stops its tasks.
pub(crate) struct Subchannel {
    address: SocketAddr,
    state: AtomicU8,
    /// Connections are made ahead of requests.
    preconnects: bool,
    /// What [`ready`](Self::ready) looks at; `None` without a usable connection.
    pool: ArcSwapOption<Pool>,
    core: Mutex<Option<Box<Core>>>,
    connector: Arc<Connector>,
    me: Weak<Self>,
}

type Pool = SmallVec<[Connection; 2]>;

/// All that changes, made on first use.
struct Core {
    /// The usable connections.
    connections: Pool,
    /// Attempts under way.
    attempts: usize,
    /// Callers waiting in `acquire`.
    waiters: usize,
    /// Times in a row that attempts failed.
    failures: u32,
    /// No attempt until the timer says so.
    in_backoff: bool,
    /// The number of the timer that counts; those before it are stale.
    timer: u32,
    last_error: Option<Arc<ConnectError>>,
    removed: bool,
    notify: Arc<Notify>,
    /// Those who wait are to look again, once the change is published.
    wake: bool,
    /// Attempts and timers end when it is dropped.
    stop: watch::Sender<()>,
    /// Supervisors see their connections off when it is dropped.
    retire: watch::Sender<()>,
}

/// What a waiting caller is to do.
enum Next {
    Wait,
    Fail(Arc<ConnectError>),
}

/// A caller in `acquire`: counted, and heard of by the connections.
struct Waiter<'a> {
    subchannel: &'a Subchannel,
    notify: Arc<Notify>,
}

/// What connections tell their subchannel.
struct Listener {
    subchannel: Weak<Subchannel>,
    notify: Arc<Notify>,
}

impl Subchannel {
    /// Idle: no connection, no task.
    pub(crate) fn new(address: SocketAddr, connector: Arc<Connector>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            address,
            state: AtomicU8::new(Connectivity::Idle as u8),
            preconnects: connector.settings.preconnect_ratio > 1.0 || connector.foresight.is_some(),
            pool: ArcSwapOption::empty(),
            core: Mutex::new(None),
            connector,
            me: Weak::clone(me),
        })
    }

    /// One atomic load.
    pub(crate) fn state(&self) -> Connectivity {
        match self.state.load(Ordering::Acquire) {
            0 => Connectivity::Idle,
            1 => Connectivity::Connecting,
            2 => Connectivity::Ready,
            _ => Connectivity::TransientFailure,
        }
    }

    /// A stream on a usable connection, if one has capacity now: no lock, no wait.
    pub(crate) fn ready(&self) -> Option<Lease> {
        let lease = self.take()?;
        if self.preconnects {
            self.preconnect();
        }
        Some(lease)
    }

    fn take(&self) -> Option<Lease> {
        let pool = self.pool.load();
        match pool.as_ref()?.as_slice() {
            [only] => only.lease(),
            many => least_loaded(many),
        }
    }

    /// A stream: at once, or after connecting, or once one is free. The caller bounds the time.
    ///
    /// # Errors
    ///
    /// The cause, when the attempt fails, while the endpoint is in backoff, and once it was removed.
    ///
    /// # Cancel safety
    ///
    /// A dropped future takes nothing with it; an attempt it started goes on.
    pub(crate) async fn acquire(&self, priority: RoutingPriority) -> Result<Lease, Arc<ConnectError>> {
        if let Some(lease) = self.ready() {
            return Ok(lease);
        }
        let waiter = Waiter::new(self);
        let lease = loop {
            let mut notified = std::pin::pin!(waiter.notify.notified());
            notified.as_mut().enable();
            if let Some(lease) = self.take() {
                break lease;
            }
            match self.next(priority) {
                Next::Wait => notified.await,
                Next::Fail(error) => return Err(error),
            }
        };
        // It waits no longer, and is not counted twice.
        drop(waiter);
        if self.preconnects {
            self.preconnect();
        }
        Ok(lease)
    }

    /// Why the last attempt failed; `None` once one succeeded.
    pub(crate) fn last_error(&self) -> Option<Arc<ConnectError>> {
        self.lock().as_ref()?.last_error.clone()
    }

    /// Streams in flight on the usable connections.
    pub(crate) fn in_flight(&self) -> u32 {
        self.pool.load().as_ref().map_or(0, |pool| pool.iter().map(Connection::in_flight).sum())
    }

    /// The endpoint was removed: no new stream; connections close when their last stream ends, at the latest after the drain
    /// time. Idempotent.
    pub(crate) fn drain(&self) {
        let connections = self.with_core(|core| {
            core.removed = true;
            core.end_backoff();
            core.stop = watch::Sender::new(());
            core.retire = watch::Sender::new(());
            core.attempts = 0;
            core.wake = true;
            std::mem::take(&mut core.connections)
        });
        for connection in connections {
            connection.drain();
        }
    }

    /// The endpoint is unhealthy. Its connections close now, if the cluster says so (`close_connections_on_host_health_failure`);
    /// or, if `drain`, they take no new streams, and close when their last stream ends, at the latest after the drain time. The next
    /// request connects again.
    pub(crate) fn unhealthy(&self, drain: bool) {
        let cut = self.connector.settings.close_on_health_failure;
        if !(cut || drain) || self.lock().is_none() {
            return;
        }
        let connections = self.with_core(|core| {
            core.retire = watch::Sender::new(());
            core.wake = true;
            std::mem::take(&mut core.connections)
        });
        for connection in connections {
            if cut {
                connection.abort(Kind::Unhealthy);
            } else {
                connection.drain();
            }
        }
    }

    /// Makes connections for requests that are to be expected.
    #[cold]
    fn preconnect(&self) {
        if let Some(Foresight { due, .. }) = &self.connector.foresight {
            due.notify_one();
        }
        if self.connector.settings.preconnect_ratio <= 1.0 {
            return;
        }
        self.with_core(|core| {
            for _ in 0..AT_ONCE {
                let demand = self.demand_of(core);
                if core.removed || core.in_backoff || !demand.exceeds(self.connector.settings.preconnect_ratio) {
                    return;
                }
                if self.room(core) == 0 {
                    return;
                }
                self.attempt(core, RoutingPriority::Default);
            }
        });
    }

    /// Streams, and room for them.
    pub(crate) fn demand(&self) -> Demand {
        self.lock().as_ref().map_or_else(Demand::default, |core| self.demand_of(core))
    }

    fn demand_of(&self, core: &Core) -> Demand {
        Demand {
            waiting: core.waiters,
            active: core.connections.iter().map(|c| c.in_flight() as usize).sum(),
            room: core.connections.iter().map(|c| c.room() as usize).sum::<usize>()
                + core.attempts * self.streams_expected(),
        }
    }

    /// Makes one more connection, for requests that the cluster expects, if there may be one.
    pub(crate) fn foresee(&self) {
        self.with_core(|core| {
            if !core.removed && !core.in_backoff && self.room(core) > 0 {
                self.attempt(core, RoutingPriority::Default);
            }
        });
    }

    /// Streams that a connection will have room for.
    fn streams_expected(&self) -> usize {
        match self.connector.settings.protocol {
            Protocol::Http1 => 1,
            // RFC 9113 section 6.5.2 recommends no less.
            Protocol::Http2 => self.connector.settings.transport.max_concurrent_streams.map_or(100, |max| max as usize),
        }
    }

    /// How many more connections there may be.
    fn room(&self, core: &Core) -> usize {
        (self.connector.settings.max_connections_per_host as usize)
            .saturating_sub(core.connections.len() + core.attempts)
    }

    /// What a caller without a stream does now; starts an attempt where one helps.
    fn next(&self, priority: RoutingPriority) -> Next {
        self.with_core(|core| {
            if core.removed {
                return Next::Fail(Arc::new(ConnectError::Removed { address: self.address }));
            }
            let hopeless = core.connections.is_empty() && core.attempts == 0 && core.in_backoff;
            if hopeless && let Some(error) = &core.last_error {
                return Next::Fail(Arc::clone(error));
            }
            // HTTP/1.1 carries one request per connection; one more HTTP/2 connection serves many.
            let wanted = match self.connector.settings.protocol {
                Protocol::Http1 => core.waiters,
                Protocol::Http2 => 1,
            };
            if !core.in_backoff && core.attempts < wanted && self.room(core) > 0 {
                self.attempt(core, priority);
            }
            Next::Wait
        })
    }

    /// Starts one attempt, unless the cluster is at `max_connections` and this endpoint has a connection to wait for. The connection
    /// counts for the `priority` of who needed it, and serves all.
    fn attempt(&self, core: &mut Core, priority: RoutingPriority) {
        let breaker = self.connector.breaker.as_ref();
        let permit = breaker.and_then(|breaker| breaker.acquire(priority, Resource::Connections).ok());
        if permit.is_none() && self.connector.breaker.is_some() && core.connections.len() + core.attempts > 0 {
            return;
        }
        core.attempts += 1;
        self.connector.used.store(true, Ordering::Relaxed);
        let (me, connector, address) = (Weak::clone(&self.me), Arc::clone(&self.connector), self.address);
        let listener = Arc::new(Listener { subchannel: Weak::clone(&self.me), notify: Arc::clone(&core.notify) });
        let mut stop = core.stop.subscribe();
        self.connector.runtime.spawn(async move {
            let result = tokio::select! {
                _ = stop.changed() => return,
                result = connector.open(address, listener) => result,
            };
            match (me.upgrade(), result) {
                (Some(me), result) => me.attempted(result, permit),
                (None, Ok(opened)) => opened.connection.drain(),
                (None, Err(_)) => {}
            }
        });
    }

    fn attempted(&self, result: Result<Opened, ConnectError>, permit: Option<Permit>) {
        match result {
            Ok(opened) => self.add(opened, permit, true),
            Err(error) => {
                tracing::debug!(error = &error as &dyn std::error::Error, "attempt failed");
                self.connector.settings.numbers.failed(&error);
                let error = Arc::new(error);
                let news = self.with_core(|core| {
                    if core.removed {
                        return false;
                    }
                    core.attempts -= 1;
                    let before = core.last_error.replace(Arc::clone(&error));
                    if !std::mem::replace(&mut core.in_backoff, true) {
                        // Attempts that fail beside each other are one failure.
                        core.failures = core.failures.saturating_add(1);
                        self.start_timer(core);
                    }
                    core.wake = true;
                    before.is_some_and(|before| chain(&*before) != chain(&*error))
                });
                // Who is refused is told the reason of today.
                if news {
                    self.connector.changed();
                }
            }
        }
    }

    /// Ends the backoff after its time, and tries again by itself.
    fn start_timer(&self, core: &mut Core) {
        core.timer = core.timer.wrapping_add(1);
        let timer = core.timer;
        let delay = self.connector.settings.backoff.delay(core.failures, fastrand::f64());
        let me = Weak::clone(&self.me);
        let mut stop = core.stop.subscribe();
        self.connector.runtime.spawn(async move {
            tokio::select! {
                _ = stop.changed() => return,
                () = sleep(delay) => {}
            }
            let Some(me) = me.upgrade() else { return };
            me.with_core(|core| {
                if core.timer != timer {
                    return;
                }
                core.in_backoff = false;
                if !core.removed && core.attempts == 0 && (core.connections.is_empty() || core.waiters > 0) {
                    me.attempt(core, RoutingPriority::Default);
                }
                core.wake = true;
            });
        });
    }

    /// Takes a new connection in, unless the endpoint was removed meanwhile. `attempted`: it came from an attempt.
    pub(super) fn add(&self, opened: Opened, permit: Option<Permit>, attempted: bool) {
        let Opened { connection, generation } = opened;
        let retired = self.with_core(|core| {
            if core.removed {
                return None;
            }
            core.attempts -= usize::from(attempted);
            core.failures = 0;
            core.last_error = None;
            core.end_backoff();
            connection.set_starved(core.waiters > 0);
            core.connections.push(connection.clone());
            core.wake = true;
            Some(core.retire.subscribe())
        });
        match retired {
            Some(retired) => {
                self.connector.settings.numbers.opened();
                if !connection.is_usable() {
                    // It closed before anyone listened.
                    self.remove_unusable();
                }
                let supervised = Supervised {
                    subchannel: Weak::clone(&self.me),
                    connector: Arc::clone(&self.connector),
                    connection,
                    generation,
                    address: self.address,
                };
                self.connector.runtime.spawn(supervisor::run(supervised, permit, retired));
            }
            None => connection.drain(),
        }
    }

    pub(super) fn listener(&self) -> Arc<dyn Events> {
        let notify = self.with_core(|core| Arc::clone(&core.notify));
        Arc::new(Listener { subchannel: Weak::clone(&self.me), notify })
    }

    fn remove_unusable(&self) {
        self.with_core(|core| {
            core.connections.retain(|connection| connection.is_usable());
            // Who waited for a stream of it may have to connect.
            core.wake = true;
        });
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<Core>>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the core, and publishes what follows from it. `change` must not end or drain a connection, which calls
    /// back.
    fn with_core<R>(&self, change: impl FnOnce(&mut Core) -> R) -> R {
        let mut slot = self.lock();
        let core = slot.get_or_insert_with(Box::default);
        let result = change(core);
        let published = self.pool.load();
        let same = match published.as_deref() {
            None => core.connections.is_empty(),
            Some(pool) => {
                pool.len() == core.connections.len() && pool.iter().zip(&core.connections).all(|(a, b)| a.is(b))
            }
        };
        if !same {
            let pool = (!core.connections.is_empty()).then(|| Arc::new(core.connections.clone()));
            self.pool.store(pool);
        }
        let state = match core {
            _ if core.removed => Connectivity::Idle,
            _ if !core.connections.is_empty() => Connectivity::Ready,
            _ if core.failures > 0 => Connectivity::TransientFailure,
            _ if core.attempts > 0 => Connectivity::Connecting,
            _ => Connectivity::Idle,
        };
        if self.state.swap(state as u8, Ordering::AcqRel) != state as u8 {
            self.connector.changed();
        }
        if std::mem::take(&mut core.wake) {
            core.notify.notify_waiters();
        }
        result
    }
}

/// The connection with the fewest streams that has room; the next best if it filled up meanwhile.
fn least_loaded(connections: &[Connection]) -> Option<Lease> {
    loop {
        let best = connections.iter().filter(|connection| connection.has_capacity()).min_by_key(|c| c.in_flight())?;
        if let Some(lease) = best.lease() {
            return Some(lease);
        }
    }
}

impl Drop for Subchannel {
    fn drop(&mut self) {
        let core = self.core.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        for connection in core.map(|core| core.connections).into_iter().flatten() {
            connection.drain();
        }
    }
}

impl Default for Core {
    fn default() -> Self {
        Self {
            connections: Pool::new(),
            attempts: 0,
            waiters: 0,
            failures: 0,
            in_backoff: false,
            timer: 0,
            last_error: None,
            removed: false,
            notify: Arc::new(Notify::new()),
            wake: false,
            stop: watch::Sender::new(()),
            retire: watch::Sender::new(()),
        }
    }
}

impl Core {
    /// Attempts are allowed again, and the timer means nothing any more.
    fn end_backoff(&mut self) {
        self.in_backoff = false;
        self.timer = self.timer.wrapping_add(1);
    }
}

impl<'a> Waiter<'a> {
    fn new(subchannel: &'a Subchannel) -> Self {
        let notify = subchannel.with_core(|core| {
            core.waiters += 1;
            for connection in &core.connections {
                connection.set_starved(true);
            }
            Arc::clone(&core.notify)
        });
        Self { subchannel, notify }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.subchannel.with_core(|core| {
            core.waiters -= 1;
            if core.waiters == 0 {
                for connection in &core.connections {
                    connection.set_starved(false);
                }
            }
        });
    }
}

impl Events for Listener {
    fn capacity(&self) {
        self.notify.notify_one();
    }

    fn raised(&self) {
        self.notify.notify_waiters();
    }

    fn unusable(&self) {
        if let Some(subchannel) = self.subchannel.upgrade() {
            subchannel.remove_unusable();
        }
    }
}

impl fmt::Debug for Subchannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subchannel")
            .field("address", &self.address)
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}
