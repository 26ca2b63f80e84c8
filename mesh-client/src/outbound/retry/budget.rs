//! The retry budget of a cluster: one atomic, exact under any number of threads.

use crate::outbound::route::Profile;
use mesh_xds::resource::CircuitBreakers;
use std::sync::{
    Arc,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

/// Parts of a whole in [`Limit::share`].
const WHOLE: u64 = 1_000_000;

/// Limits the retries in flight to a share of the active requests, or to a number. Envoy's
/// `circuit_breakers.thresholds.retry_budget` and `max_retries`: a retry counts from the moment it is decided (its
/// back-off included) until it ended or its response head is passed on. Shared by all calls to a cluster; the limit can be
/// changed while retries are in flight.
#[derive(Debug)]
pub struct Budget {
    limit: AtomicU64,
    in_flight: AtomicU32,
}

/// `max(active * share / WHOLE, min)`, packed into one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    share: u32,
    min: u32,
    /// It comes from `max_retries` of a cluster, which gRPC ignores (gRFC A44).
    envoy_only: bool,
}

/// One retry in flight. Dropping it gives it back.
#[derive(Debug)]
#[must_use = "a permit counts only while it is held"]
pub struct Permit(Arc<Budget>);

impl Budget {
    /// At most `percent` (0..=100) of the active requests, and `min` in any case. Envoy's defaults are 20 and 3.
    pub fn percent(percent: f64, min: u32) -> Self {
        Self::new(Limit::percent(percent, min))
    }

    /// At most `max` retries in flight. Envoy's default is 3.
    pub fn fixed(max: u32) -> Self {
        Self::new(Limit { share: 0, min: max, envoy_only: false })
    }

    /// The budget of a cluster: `retry_budget`, else `max_retries`, which binds only calls of the Envoy profile.
    pub(crate) fn of(breakers: &CircuitBreakers) -> Self {
        Self::new(Limit::of(breakers))
    }

    fn new(limit: Limit) -> Self {
        Self { limit: AtomicU64::new(limit.pack()), in_flight: AtomicU32::new(0) }
    }

    /// Takes over a changed configuration; what is in flight stays counted.
    pub(crate) fn update(&self, breakers: &CircuitBreakers) {
        self.limit.store(Limit::of(breakers).pack(), Ordering::Relaxed);
    }

    /// One more retry, if the limit allows it. `active` is the number of requests in flight to the cluster, retries
    /// included. Never overshoots the limit that follows from `active`.
    pub fn try_acquire(self: &Arc<Self>, active: u32) -> Option<Permit> {
        self.try_acquire_as(Profile::Envoy, active)
    }

    /// As [`try_acquire`](Self::try_acquire), for a call by the rules of `profile`.
    pub(crate) fn try_acquire_as(self: &Arc<Self>, profile: Profile, active: u32) -> Option<Permit> {
        let limit = Limit::unpack(self.limit.load(Ordering::Relaxed));
        let max = if limit.envoy_only && profile == Profile::Grpc { u32::MAX } else { limit.max(active) };
        self.in_flight
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| (n < max).then(|| n + 1))
            .ok()
            .map(|_| Permit(self.clone()))
    }

    /// Retries in flight.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Acquire)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Limit {
    fn of(breakers: &CircuitBreakers) -> Self {
        match breakers.retry_budget {
            Some(budget) => Self::percent(budget.percent, budget.min_concurrency),
            None => Self { share: 0, min: breakers.max_retries, envoy_only: true },
        }
    }

    fn percent(percent: f64, min: u32) -> Self {
        // Not a number becomes 0: `as` saturates, and the clamp keeps it in u32.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1_000_000 before")]
        let share = (percent.clamp(0.0, 100.0) * 10_000.0).round() as u32;
        Self { share, min, envoy_only: false }
    }

    fn max(self, active: u32) -> u32 {
        let share = u64::from(active) * u64::from(self.share) / WHOLE;
        u32::try_from(share).unwrap_or(u32::MAX).max(self.min)
    }

    fn pack(self) -> u64 {
        u64::from(self.envoy_only) << 63 | u64::from(self.share) << 32 | u64::from(self.min)
    }

    #[allow(clippy::cast_possible_truncation, reason = "takes the word apart")]
    fn unpack(word: u64) -> Self {
        Self { share: (word << 1 >> 33) as u32, min: word as u32, envoy_only: word >> 63 == 1 }
    }
}

#[cfg(test)]
mod tests;
