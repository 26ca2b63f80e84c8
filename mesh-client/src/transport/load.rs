//! How many streams a connection carries, and whether it takes more: one atomic word.

use crate::atomic::{AtomicU64, Ordering};

const CLOSED: u64 = 1 << 31;
const IN_FLIGHT: u64 = CLOSED - 1;
const STARTED: u32 = 32;

/// Bits 0..31: streams in flight; bit 31: takes no new ones; bits 32..: streams started so far (wrapping).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Load(AtomicU64);

/// A view of the word at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Snapshot(u64);

impl Load {
    /// Counts one more stream unless `limit` are in flight or the connection is closed to new ones.
    ///
    /// Returns the word as it is afterwards.
    pub(super) fn try_start(&self, limit: u32) -> Option<Snapshot> {
        // Whoever finds no room was announced before, by another word: no relaxed load.
        let mut word = self.0.load(Ordering::SeqCst);
        loop {
            let now = Snapshot(word);
            if now.is_closed() || now.in_flight() >= limit {
                return None;
            }
            let next = word.wrapping_add((1 << STARTED) + 1);
            match self.0.compare_exchange_weak(word, next, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(Snapshot(next)),
                Err(changed) => word = changed,
            }
        }
    }

    /// Counts one stream less. Returns the word as it is afterwards.
    pub(super) fn finish(&self) -> Snapshot {
        Snapshot(self.0.fetch_sub(1, Ordering::SeqCst) - 1)
    }

    /// Takes no new streams from now on. Returns the word as it was.
    pub(super) fn close(&self) -> Snapshot {
        Snapshot(self.0.fetch_or(CLOSED, Ordering::SeqCst))
    }

    pub(super) fn snapshot(&self) -> Snapshot {
        Snapshot(self.0.load(Ordering::SeqCst))
    }
}

impl Snapshot {
    pub(super) fn in_flight(self) -> u32 {
        // 31 bits: fits.
        (self.0 & IN_FLIGHT) as u32
    }

    pub(super) fn is_closed(self) -> bool {
        self.0 & CLOSED != 0
    }

    pub(super) fn started(self) -> u32 {
        (self.0 >> STARTED) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_to_the_limit_and_back() {
        let load = Load::default();
        assert_eq!(load.try_start(2).expect("room").in_flight(), 1);
        assert_eq!(load.try_start(2).expect("room").in_flight(), 2);
        assert!(load.try_start(2).is_none());
        assert_eq!(load.finish().in_flight(), 1);
        assert_eq!(load.try_start(2).expect("room").started(), 3);
    }

    #[test]
    fn a_closed_connection_takes_none_and_still_counts_down() {
        let load = Load::default();
        load.try_start(9).expect("room");
        assert!(!load.close().is_closed());
        assert!(load.close().is_closed());
        assert!(load.try_start(9).is_none());
        let last = load.finish();
        assert!(last.is_closed());
        assert_eq!(last.in_flight(), 0);
    }

    #[test]
    fn the_started_count_wraps_without_touching_the_rest() {
        let load = Load(AtomicU64::new(u64::from(u32::MAX) << STARTED));
        let after = load.try_start(1).expect("room");
        assert_eq!((after.started(), after.in_flight(), after.is_closed()), (0, 1, false));
    }
}
