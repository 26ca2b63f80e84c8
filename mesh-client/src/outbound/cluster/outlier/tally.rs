//! The counts of one endpoint: how requests ended in an interval, and failures in a row.

use crate::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// How many requests ended well and badly in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) successes: u32,
    pub(crate) failures: u32,
}

/// Failures in the upper half, successes in the lower, so that both are taken at one moment.
#[derive(Debug, Default)]
pub(crate) struct Interval(AtomicU64);

/// Failures in a row.
#[derive(Debug, Default)]
pub(crate) struct Row(AtomicU32);

const FAILURE: u64 = 1 << 32;

impl Interval {
    #[inline]
    pub(crate) fn count(&self, failed: bool) {
        self.0.fetch_add(if failed { FAILURE } else { 1 }, Relaxed);
    }

    /// Takes what was counted since the last time. Nothing is counted twice, or lost.
    pub(crate) fn take(&self) -> Tally {
        let packed = self.0.swap(0, Relaxed);
        let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).expect("masked to 32 bits");
        Tally { successes: half(packed), failures: half(packed >> 32) }
    }
}

impl Row {
    /// One more. True: the row is as long as `threshold` (0: never), and starts anew. Of failures at the same moment several may find
    /// it complete, and one at least does.
    pub(crate) fn completes(&self, threshold: u32) -> bool {
        let row = self.0.fetch_add(1, Relaxed).saturating_add(1);
        let complete = threshold != 0 && row >= threshold;
        if complete {
            self.0.store(0, Relaxed);
        }
        complete
    }

    /// Writes only when there is something to clear, so that successes do not fight over the cache line.
    #[inline]
    pub(crate) fn clear(&self) {
        if self.0.load(Relaxed) != 0 {
            self.0.store(0, Relaxed);
        }
    }
}
