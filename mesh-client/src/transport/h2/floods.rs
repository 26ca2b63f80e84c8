//! What a client may send that costs us work and gives it nothing.

use super::fault::Fault;
use h2::Reason;
use std::time::Duration;
use tokio::time::Instant;

/// What may be spent at once, at least; and for each stream that may be open: a client may well give up on all of them.
const BUDGET: u32 = 2_000;
const OF_STREAM: u32 = 4;
/// And how often anew.
const WINDOW: Duration = Duration::from_secs(10);
/// A stream that was answered pays for so much.
const EARNED: u32 = 4;

/// A budget for resets, PINGs, SETTINGS, PRIORITY, empty DATA and refused requests: two hundred a second, and as many as go with the
/// requests that are answered; more where many streams may be open. A client that does such things all the time is cut off.
#[derive(Debug)]
pub(super) struct Floods {
    budget: u32,
    left: u32,
    since: Instant,
}

impl Floods {
    /// For a connection of so many streams.
    pub(super) fn new(streams: u32, now: Instant) -> Self {
        let budget = streams.saturating_mul(OF_STREAM).max(BUDGET);
        Self { budget, left: budget, since: now }
    }

    /// Something of this kind happened.
    pub(super) fn charge(&mut self, cost: u32) -> Result<(), Fault> {
        self.charge_at(cost, Instant::now)
    }

    fn charge_at(&mut self, cost: u32, now: impl FnOnce() -> Instant) -> Result<(), Fault> {
        if let Some(left) = self.left.checked_sub(cost) {
            self.left = left;
            return Ok(());
        }
        let now = now();
        if now.duration_since(self.since) < WINDOW {
            return Err(Fault::Broken(Reason::ENHANCE_YOUR_CALM, "too many frames without use"));
        }
        (self.left, self.since) = (self.budget.saturating_sub(cost), now);
        Ok(())
    }

    /// So many streams were answered.
    pub(super) fn earn(&mut self, answered: usize) {
        let earned = u32::try_from(answered).unwrap_or(u32::MAX).saturating_mul(EARNED);
        self.left = self.left.saturating_add(earned).min(self.budget);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_is_renewed_by_time_and_by_work() {
        let start = Instant::now();
        let mut floods = Floods::new(8, start);
        floods.charge_at(BUDGET, || start).expect("within the budget");
        assert!(floods.charge_at(1, || start + WINDOW / 2).is_err());
        floods.earn(1);
        floods.charge_at(EARNED, || start).expect("earned");
        assert!(floods.charge_at(1, || start + WINDOW / 2).is_err());
        floods.charge_at(BUDGET, || start + WINDOW).expect("a new window");
        assert!(floods.charge_at(1, || start + WINDOW).is_err());
    }

    #[test]
    fn all_streams_that_may_be_open_can_be_reset_at_once() {
        let start = Instant::now();
        let mut floods = Floods::new(1024, start);
        (0..2 * 1024).for_each(|_| floods.charge_at(2, || start).expect("ordinary cancels"));
        assert!(floods.charge_at(1, || start).is_err());
    }
}
