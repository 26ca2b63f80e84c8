//! Who polls the h2 connection, and when.
//!
//! One task per connection, the driver. Once woken it lets the scheduler go round before it polls, so that all that
//! callers queue meanwhile leaves in one write. A caller that finds the connection idle polls it itself and saves the
//! task switch. The connection sits in a mutex that is only ever tried.

use super::{Shared, is_open};
use crate::transport::{
    fate::Fate,
    io::{Activity, Io},
};
use bytes::Bytes;
use futures::task::AtomicWaker;
use h2::client::{Connection, SendRequest};
use std::{
    cell::Cell,
    pin::Pin,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, TryLockError,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};
use tokio::time::{Sleep, sleep};

/// How long a connection may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);

const RUNNING: u8 = 0;
const SHUT: u8 = 1;
const ABORTED: u8 = 2;

thread_local! {
    /// The address of the [`Alarm`] that this thread silences; 0: none.
    static QUIET: Cell<usize> = const { Cell::new(0) };
}

/// While it lives, wakes of its driver by this thread are ignored; at its end the thread polls the connection itself.
///
/// Of this driver only: the body of a request may be the response of another connection.
pub(super) struct Quiet<'a> {
    engine: &'a Engine,
    outer: usize,
}

/// The connection and the means to have it polled.
pub(super) struct Engine {
    connection: Mutex<Option<Connection<Io, Bytes>>>,
    alarm: Arc<Alarm>,
    /// `alarm` as a waker: the one h2 and the socket know, whoever polls.
    waker: Waker,
    phase: AtomicU8,
    pub(super) activity: Arc<Activity>,
    /// What was first heard of its end.
    pub(super) fate: OnceLock<Fate>,
}

/// Wakes the driver, unless the waking thread is [`Quiet`].
struct Alarm {
    driver: AtomicWaker,
}

/// The task of one connection.
pub(super) struct Driver {
    shared: Arc<Shared>,
    /// Tells whether h2 takes new streams; dropped when shut, so that h2 can end.
    probe: Option<SendRequest<Bytes>>,
    /// [`Activity::reads`] when limits were last looked at.
    reads: u32,
    yielded: bool,
    farewell: Option<Pin<Box<Sleep>>>,
}

impl<'a> Quiet<'a> {
    pub(super) fn new(engine: &'a Engine) -> Self {
        Self { engine, outer: QUIET.replace(engine.alarm.address()) }
    }
}

impl Drop for Quiet<'_> {
    fn drop(&mut self) {
        QUIET.set(self.outer);
        self.engine.poll_from_caller();
    }
}

impl Alarm {
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if QUIET.get() != self.address() {
            self.driver.wake();
        }
    }
}

impl Engine {
    pub(super) fn new(connection: Connection<Io, Bytes>, activity: Arc<Activity>) -> Self {
        let alarm = Arc::new(Alarm { driver: AtomicWaker::new() });
        Self {
            connection: Mutex::new(Some(connection)),
            waker: Waker::from(Arc::clone(&alarm)),
            alarm,
            phase: AtomicU8::new(RUNNING),
            activity,
            fate: OnceLock::new(),
        }
    }

    /// Polls the connection in the caller's task, or has the driver do it if someone else is polling.
    fn poll_from_caller(&self) {
        let wake = match self.connection.try_lock() {
            Ok(mut slot) => match slot.as_mut() {
                Some(connection) => {
                    let reads = self.activity.reads();
                    let polled = Pin::new(connection).poll(&mut Context::from_waker(&self.waker));
                    let ended = polled.is_ready();
                    if let Poll::Ready(Err(error)) = polled {
                        self.ends(Fate::of(&error));
                    }
                    if ended {
                        *slot = None;
                    }
                    // What arrived, the driver looks at.
                    ended || self.activity.reads() != reads
                }
                None => false,
            },
            // Whoever polls now may have looked before our frames were queued.
            Err(_) => true,
        };
        if wake {
            self.alarm.driver.wake();
        }
    }

    /// What is first heard counts.
    fn ends(&self, fate: Fate) {
        let _ = self.fate.set(fate);
    }

    /// No sender is left: the driver sees h2 to its end.
    pub(super) fn shut(&self) {
        self.phase.fetch_max(SHUT, Ordering::SeqCst);
        self.alarm.driver.wake();
    }

    /// The driver drops the connection.
    pub(super) fn abort(&self) {
        self.phase.store(ABORTED, Ordering::SeqCst);
        self.alarm.driver.wake();
    }

    /// Drops the connection, which fails every stream still open.
    fn finish(&self) {
        drop(self.connection.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>, probe: SendRequest<Bytes>) -> Self {
        // One less than the count, so that the first poll looks.
        let reads = shared.h2().engine.activity.reads().wrapping_sub(1);
        Self { shared, probe: Some(probe), reads, yielded: false, farewell: None }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { shared, probe, reads, yielded, farewell } = &mut *self;
        let engine = &shared.h2().engine;
        if !*yielded && shared.load.snapshot().in_flight() > 1 {
            *yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        *yielded = false;
        engine.alarm.driver.register(cx.waker());
        match engine.phase.load(Ordering::SeqCst) {
            ABORTED => return Poll::Ready(()),
            SHUT => {
                *probe = None;
                let farewell = farewell.get_or_insert_with(|| Box::pin(sleep(FAREWELL)));
                if farewell.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
            }
            _ => {}
        }
        let mut slot = match engine.connection.try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::WouldBlock) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Err(TryLockError::Poisoned(_)) => return Poll::Ready(()),
        };
        let Some(connection) = slot.as_mut() else { return Poll::Ready(()) };
        if let Poll::Ready(result) = Pin::new(&mut *connection).poll(&mut Context::from_waker(&engine.waker)) {
            if let Err(error) = result {
                engine.ends(Fate::of(&error));
                tracing::debug!(%error, "connection ended");
            }
            return Poll::Ready(());
        }
        let now = engine.activity.reads();
        if std::mem::replace(reads, now) != now {
            // The peer may have said something about new streams.
            shared.set_limit(connection.max_concurrent_send_streams());
            if let Some(Err(fate)) = probe.as_mut().map(is_open) {
                if let Some(fate) = fate {
                    engine.ends(fate);
                }
                drop(slot);
                shared.close();
            }
        }
        Poll::Pending
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        self.shared.close();
        self.shared.h2().engine.finish();
        self.shared.end();
    }
}
