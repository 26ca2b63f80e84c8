//! Who polls the connection, and when.
//!
//! One task per connection, the driver. Once woken it lets the scheduler go round before it polls, so that all that
//! callers queue meanwhile leaves in one write. A caller that finds the connection idle polls it itself and saves the
//! task switch. The connection sits in a mutex that is only ever tried.

use super::{Shared, fault::Fault, outbox::Link, wire::Wire};
use crate::transport::{fate::Fate, io::Activity};
use futures::task::AtomicWaker;
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
    wire: Mutex<Option<Wire>>,
    pub(super) link: Link,
    /// The alarm as a waker: the one the socket knows, whoever polls.
    waker: Waker,
    phase: AtomicU8,
    pub(super) activity: Arc<Activity>,
    /// What was first heard of its end.
    pub(super) fate: OnceLock<Fate>,
}

/// Wakes the driver, unless the waking thread is [`Quiet`].
#[derive(Debug, Default)]
pub(super) struct Alarm {
    driver: AtomicWaker,
}

/// The task of one connection.
pub(super) struct Driver {
    shared: Arc<Shared>,
    /// [`Activity::reads`] when limits were last looked at.
    reads: u32,
    yielded: bool,
    farewell: Option<Pin<Box<Sleep>>>,
}

impl<'a> Quiet<'a> {
    pub(super) fn new(engine: &'a Engine) -> Self {
        Self { engine, outer: QUIET.replace(engine.link.alarm.address()) }
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

    /// Whom it wakes.
    pub(super) fn wakes(&self, driver: &Waker) {
        self.driver.register(driver);
    }

    /// There is something to do.
    pub(super) fn ring(&self) {
        if QUIET.get() != self.address() {
            self.driver.wake();
        }
    }
}

impl Wake for Alarm {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.ring();
    }
}

impl Engine {
    pub(super) fn new(link: Link, wire: Wire, activity: Arc<Activity>) -> Self {
        let waker = Waker::from(Arc::clone(&link.alarm));
        let wire = Mutex::new(Some(wire));
        Self { wire, link, waker, phase: AtomicU8::new(RUNNING), activity, fate: OnceLock::new() }
    }

    /// Polls the connection. True: it is over, and its streams know.
    fn poll(&self, slot: &mut Option<Wire>) -> bool {
        let Some(wire) = slot else { return true };
        let Poll::Ready(fault) = wire.poll(&self.link, &mut Context::from_waker(&self.waker)) else { return false };
        tracing::debug!(%fault, "connection ended");
        if let Some(&reason) = self.link.goaway.get() {
            self.ends(Fate::GoAway(reason));
        }
        self.ends(fault.fate());
        wire.fail(&self.link, &fault);
        *slot = None;
        true
    }

    /// What is first heard counts.
    fn ends(&self, fate: Fate) {
        let _ = self.fate.set(fate);
    }

    /// Polls the connection in the caller's task, or has the driver do it if someone else is polling.
    fn poll_from_caller(&self) {
        let wake = match self.wire.try_lock() {
            Ok(mut slot) => {
                let reads = self.activity.reads();
                // What arrived, the driver looks at.
                self.poll(&mut slot) || self.activity.reads() != reads
            }
            // Whoever polls now may have looked before our frames were queued.
            Err(_) => true,
        };
        if wake {
            self.link.alarm.driver.wake();
        }
    }

    /// No stream is left: says goodbye and closes.
    pub(super) fn shut(&self) {
        self.phase.fetch_max(SHUT, Ordering::SeqCst);
        self.link.leave();
        self.link.alarm.driver.wake();
    }

    /// The driver drops the connection.
    pub(super) fn abort(&self) {
        self.phase.store(ABORTED, Ordering::SeqCst);
        self.link.alarm.driver.wake();
    }

    /// Drops the connection, which fails every stream still open.
    fn finish(&self) {
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(mut wire) = wire {
            wire.fail(&self.link, &Fault::Closed);
        }
    }
}

impl Driver {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        // One less than the count, so that the first poll looks.
        let reads = shared.h2().engine.activity.reads().wrapping_sub(1);
        Self { shared, reads, yielded: false, farewell: None }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { shared, reads, yielded, farewell } = &mut *self;
        let engine = &shared.h2().engine;
        if !*yielded && shared.load.snapshot().in_flight() > 1 {
            *yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        *yielded = false;
        engine.link.alarm.wakes(cx.waker());
        match engine.phase.load(Ordering::SeqCst) {
            ABORTED => return Poll::Ready(()),
            SHUT => {
                let farewell = farewell.get_or_insert_with(|| Box::pin(sleep(FAREWELL)));
                if farewell.as_mut().poll(cx).is_ready() {
                    return Poll::Ready(());
                }
            }
            _ => {}
        }
        let mut slot = match engine.wire.try_lock() {
            Ok(slot) => slot,
            Err(TryLockError::WouldBlock) => {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            Err(TryLockError::Poisoned(_)) => return Poll::Ready(()),
        };
        if engine.poll(&mut slot) {
            return Poll::Ready(());
        }
        drop(slot);
        let now = engine.activity.reads();
        if std::mem::replace(reads, now) != now {
            // The peer may have said something about new streams.
            shared.set_limit(engine.link.limit.load(Ordering::SeqCst));
            if let Some(&reason) = engine.link.goaway.get() {
                engine.ends(Fate::GoAway(reason));
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
