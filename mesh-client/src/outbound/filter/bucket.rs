//! A token bucket in one atomic.

use crate::atomic::{AtomicU64, Ordering};
use mesh_xds::resource::TokenBucket;
use std::time::Duration;
use tokio::time::Instant;

/// A token bucket that is filled all the time: `tokens_per_fill` in each `fill_interval`, a token at a time (as Envoy's).
///
/// Its state is the instant at which it was, or will have been, empty: what is in it now follows.
#[derive(Debug)]
pub(crate) struct Bucket {
    origin: Instant,
    /// The time in which one token comes, in nanoseconds.
    cost: u64,
    /// The time in which it is full, in nanoseconds.
    full: u64,
    max: u32,
    /// Nanoseconds since the time of `full` before `origin`.
    empty_at: AtomicU64,
}

impl Bucket {
    /// A full one.
    pub(crate) fn new(config: TokenBucket, now: Instant) -> Self {
        let cost = config.fill_interval.as_nanos() / u128::from(config.tokens_per_fill.max(1));
        let cost = cost.min(u128::from(u64::MAX / 8));
        let full = cost.saturating_mul(u128::from(config.max_tokens)).min(u128::from(u64::MAX / 4));
        let nanos = |nanos: u128| u64::try_from(nanos).unwrap_or(u64::MAX / 4);
        Self {
            origin: now,
            cost: nanos(cost).max(1),
            full: nanos(full).max(1),
            max: config.max_tokens,
            empty_at: AtomicU64::new(0),
        }
    }

    /// Takes `tokens` if there are as many. Never more than there are, however many try at once.
    pub(crate) fn take(&self, tokens: u64, now: Instant) -> bool {
        let now = self.at(now);
        let cost = self.cost.saturating_mul(tokens);
        let taken = self.empty_at.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |empty_at| {
            let next = self.base(empty_at, now).saturating_add(cost);
            (next <= now).then_some(next)
        });
        taken.is_ok()
    }

    /// Whole tokens in it.
    pub(crate) fn tokens(&self, now: Instant) -> u32 {
        let now = self.at(now);
        let time = now - self.base(self.empty_at.load(Ordering::Acquire), now).min(now);
        u32::try_from(time / self.cost).unwrap_or(u32::MAX).min(self.max)
    }

    /// The time until there is a token.
    pub(crate) fn next(&self, now: Instant) -> Duration {
        let now = self.at(now);
        let at = self.base(self.empty_at.load(Ordering::Acquire), now).saturating_add(self.cost);
        Duration::from_nanos(at.saturating_sub(now))
    }

    /// The most that can be in it.
    pub(crate) fn max(&self) -> u32 {
        self.max
    }

    /// Tokens per second.
    pub(crate) fn rate(&self) -> f64 {
        1e9 / self.cost as f64
    }

    fn at(&self, now: Instant) -> u64 {
        let since = now.saturating_duration_since(self.origin).as_nanos();
        u64::try_from(since).unwrap_or(u64::MAX / 2).saturating_add(self.full)
    }

    /// More than full is full.
    fn base(&self, empty_at: u64, now: u64) -> u64 {
        empty_at.max(now - self.full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(max_tokens: u32, tokens_per_fill: u32, millis: u64, now: Instant) -> Bucket {
        Bucket::new(TokenBucket { max_tokens, tokens_per_fill, fill_interval: Duration::from_millis(millis) }, now)
    }

    #[test]
    fn tokens_come_one_by_one_and_never_more_than_fit() {
        let start = Instant::now();
        let bucket = bucket(3, 2, 1000, start);
        let at = |millis| start + Duration::from_millis(millis);
        assert_eq!((bucket.tokens(start), bucket.next(start)), (3, Duration::ZERO));
        assert_eq!([0; 4].map(|t| bucket.take(1, at(t))), [true, true, true, false]);
        assert_eq!((bucket.tokens(at(0)), bucket.next(at(100))), (0, Duration::from_millis(400)));
        assert_eq!([499, 500, 999, 1000].map(|t| bucket.take(1, at(t))), [false, true, false, true]);
        assert_eq!(bucket.tokens(at(1_000_000)), 3);
        assert!(!bucket.take(4, at(1_000_000)) && bucket.take(3, at(1_000_000)) && !bucket.take(1, at(1_000_000)));
    }

    #[test]
    fn threads_never_take_more_than_there_is() {
        let now = Instant::now();
        let bucket = bucket(1000, 1, 86_400_000, now);
        let taken: usize = std::thread::scope(|scope| {
            let take = || (0..1000).filter(|_| bucket.take(1, now)).count();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(take)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(taken, 1000);
    }

    #[test]
    fn the_largest_configs_overflow_nothing() {
        let now = Instant::now();
        let bucket = bucket(u32::MAX, 1, u64::MAX / 1_000_000, now);
        assert!(bucket.take(1, now) && bucket.take(1, now + Duration::from_secs(1 << 32)));
        assert!(!bucket.take(u64::MAX, now));
    }
}
