//! A count that never passes its limit: one atomic.

use crate::atomic::{AtomicU32, Ordering};

/// How many of something are in use. The limit is the caller's, and may be another each time.
#[derive(Debug)]
pub(crate) struct Slots(AtomicU32);

impl Slots {
    pub(crate) fn new() -> Self {
        Self(AtomicU32::new(0))
    }

    /// Takes one unless `limit` are in use, whatever the number of threads. Returns how many are then.
    #[inline]
    pub(crate) fn take(&self, limit: u32) -> Option<u32> {
        let taken = self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| (n < limit).then(|| n + 1));
        taken.ok().map(|before| before + 1)
    }

    /// Gives one back that was taken. Returns how many are in use then.
    #[inline]
    pub(crate) fn give_back(&self) -> u32 {
        self.0.fetch_sub(1, Ordering::AcqRel) - 1
    }

    /// How many are in use.
    #[inline]
    pub(crate) fn in_use(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }
}
