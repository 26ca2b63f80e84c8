//! Streams on which nothing moves.

use crate::time::after;
use std::{
    fmt,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep_until};

/// How long a stream may stand still, and when something last moved on it: either way, whichever task saw it.
#[derive(Debug)]
pub(crate) struct Idle {
    began: Instant,
    /// Of the last movement, in nanoseconds since `began`.
    moved: AtomicU64,
    /// Envoy's `RouteAction.idle_timeout`: of the whole call.
    stream: Option<Duration>,
    /// Envoy's `RetryPolicy.per_try_idle_timeout`: of each attempt.
    per_try: Option<Duration>,
}

/// Which of the limits passed, and its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StoodStill {
    pub(crate) limit: Duration,
    pub(crate) per_try: bool,
}

/// Waits until a stream has stood still for too long.
#[derive(Debug)]
pub(crate) struct IdleTimer {
    limit: StoodStill,
    /// The stream, or the attempt, began then.
    since: Instant,
    sleep: Pin<Box<Sleep>>,
}

impl Idle {
    /// `None`: there is no limit.
    pub(crate) fn new(stream: Option<Duration>, per_try: Option<Duration>, now: Instant) -> Option<Self> {
        (stream.is_some() || per_try.is_some()).then(|| Self { began: now, moved: AtomicU64::new(0), stream, per_try })
    }

    /// Something moved.
    pub(crate) fn moved(&self, now: Instant) {
        let since = now.saturating_duration_since(self.began).as_nanos();
        self.moved.fetch_max(u64::try_from(since).unwrap_or(u64::MAX), Relaxed);
    }

    /// When what began at `since` will have stood still for `limit`, if nothing moves.
    fn ends(&self, limit: Duration, since: Instant) -> Instant {
        after((self.began + Duration::from_nanos(self.moved.load(Relaxed))).max(since), limit)
    }

    /// The limit of the whole stream.
    pub(crate) fn of_stream(&self) -> Option<IdleTimer> {
        self.stream.map(|limit| self.timer(StoodStill { limit, per_try: false }))
    }

    /// The limit of an attempt that begins now, until its response does.
    pub(crate) fn of_attempt(&self, now: Instant) -> Option<IdleTimer> {
        self.per_try.map(|limit| self.timer_since(StoodStill { limit, per_try: true }, now))
    }

    /// The shorter of both: what holds for the body of the response.
    pub(crate) fn of_body(&self) -> Option<IdleTimer> {
        let limits = [(self.stream, false), (self.per_try, true)];
        let limits = limits.into_iter().filter_map(|(limit, per_try)| Some(StoodStill { limit: limit?, per_try }));
        limits.min_by_key(|limit| limit.limit).map(|limit| self.timer(limit))
    }

    fn timer(&self, limit: StoodStill) -> IdleTimer {
        self.timer_since(limit, self.began)
    }

    fn timer_since(&self, limit: StoodStill, since: Instant) -> IdleTimer {
        IdleTimer { limit, since, sleep: Box::pin(sleep_until(self.ends(limit.limit, since))) }
    }
}

impl IdleTimer {
    /// Ready when `idle`'s stream has stood still for the limit.
    pub(crate) fn poll(&mut self, idle: &Idle, cx: &mut Context<'_>) -> Poll<StoodStill> {
        loop {
            if self.sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let ends = idle.ends(self.limit.limit, self.since);
            if ends <= Instant::now() {
                return Poll::Ready(self.limit);
            }
            self.sleep.as_mut().reset(ends);
        }
    }
}

impl fmt::Display for StoodStill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let source = if self.per_try { "per_try_idle_timeout of the retry policy" } else { "the route's idle_timeout" };
        write!(f, "nothing moved on the stream for {:?} ({source})", self.limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    const S: fn(u64) -> Duration = Duration::from_secs;

    #[tokio::test(start_paused = true)]
    async fn every_movement_starts_the_wait_anew() {
        let begun = Instant::now();
        let idle = Idle::new(Some(S(10)), Some(S(4)), begun).unwrap();
        let mut timer = idle.of_body().unwrap();
        let wait = poll_fn(|cx| timer.poll(&idle, cx));
        let moves = async {
            for _ in 0..3 {
                tokio::time::sleep(S(3)).await;
                idle.moved(Instant::now());
            }
        };
        let (ended, ()) = tokio::join!(wait, moves);
        assert_eq!(ended, StoodStill { limit: S(4), per_try: true });
        assert_eq!(begun.elapsed().as_secs(), 13);
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_limit_there_is_nothing_to_watch() {
        assert!(Idle::new(None, None, Instant::now()).is_none());
        let idle = Idle::new(Some(S(1)), None, Instant::now()).unwrap();
        assert!(idle.of_attempt(Instant::now()).is_none());
        assert_eq!(idle.of_body().unwrap().limit, StoodStill { limit: S(1), per_try: false });
    }
}
