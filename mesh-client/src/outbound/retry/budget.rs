//! Retry budgets: of Envoy, of Linkerd, and gRPC's throttle, each one atomic and exact under any number of threads.

mod ratio;
mod throttle;

use crate::{
    atomic::{AtomicU64, Ordering},
    outbound::{route::Profile, slots::Slots},
};
use mesh_xds::resource::Thresholds;
use metrics::Gauge;
use ratio::Ratio;
use std::{sync::Arc, time::Duration};
use throttle::Throttle;
use tokio::time::Instant;

/// Parts of a whole in [`Limit::share`].
const WHOLE: u64 = 1_000_000;

/// Limits retries and hedges, so that they never multiply an outage. Shared by all calls to a cluster, or through a layer.
///
/// | made by | limits | is |
/// |---|---|---|
/// | [`percent`](Self::percent), [`fixed`](Self::fixed) | those in flight, to a share of the active requests or a number | Envoy's `retry_budget` and `max_retries` |
/// | [`ratio`](Self::ratio) | those of the last seconds, to a share of the calls that began in them | Linkerd's |
/// | [`throttle`](Self::throttle) | none while more fails than succeeds | gRPC's `retryThrottling` (gRFC A6) |
///
/// No kind ever gives out more than it has, whatever the number of threads.
#[derive(Debug)]
pub struct RetryBudget {
    kind: Kind,
    /// Of those in flight; a cluster's.
    gauge: Option<Gauge>,
}

#[derive(Debug)]
enum Kind {
    Share(Share),
    Ratio(Ratio),
    Throttle(Throttle),
}

/// Those in flight: a retry counts from the moment it is decided (its back-off included) until it ended or its response head is
/// passed on. The limit can be changed while retries are in flight.
#[derive(Debug)]
struct Share {
    limit: AtomicU64,
    in_flight: Slots,
}

/// `max(active * share / WHOLE, min)`, packed into one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Limit {
    share: u32,
    min: u32,
    /// It comes from `max_retries` of a cluster, which gRPC ignores (gRFC A44).
    envoy_only: bool,
}

/// Leave for one retry. Dropping it ends the retry.
#[derive(Debug)]
#[must_use = "a permit counts only while it is held"]
pub struct Permit {
    counted: Option<Arc<RetryBudget>>,
    also: Option<Box<Self>>,
}

impl RetryBudget {
    /// At most `percent` (0..=100) of the active requests, and `min` in any case. Envoy's defaults are 20 and 3.
    pub fn percent(percent: f64, min: u32) -> Self {
        Self::share(Limit::percent(percent, min))
    }

    /// At most `max` retries in flight. Envoy's default is 3.
    pub fn fixed(max: u32) -> Self {
        Self::share(Limit { share: 0, min: max, envoy_only: false })
    }

    /// In each `ttl`, `ratio` (0..=1000, in hundredths) retries for each call that began, and `min_per_second` besides. Linkerd's
    /// documentation has 0.2, 10 and 10 s. What is not used is forgotten after `ttl`.
    pub fn ratio(ratio: f64, min_per_second: u32, ttl: Duration) -> Self {
        Self::new(Kind::Ratio(Ratio::new(ratio, min_per_second, ttl, Instant::now())))
    }

    /// gRFC A6: a count of `max_tokens` (1..=1000) loses one for each failure and gains `token_ratio` (in thousandths) for each success;
    /// while it is at half or below, nothing is retried.
    pub fn throttle(max_tokens: u32, token_ratio: f64) -> Self {
        Self::new(Kind::Throttle(Throttle::new(max_tokens, token_ratio)))
    }

    /// The budget of a cluster: `retry_budget`, else `max_retries`, which binds only calls of the Envoy profile.
    pub(crate) fn of(thresholds: &Thresholds) -> Self {
        Self::share(Limit::of(thresholds))
    }

    /// Tells this gauge of those in flight; others may too.
    pub(crate) fn told(self, gauge: Gauge) -> Self {
        Self { gauge: Some(gauge), ..self }
    }

    fn share(limit: Limit) -> Self {
        Self::new(Kind::Share(Share { limit: AtomicU64::new(limit.pack()), in_flight: Slots::new() }))
    }

    fn new(kind: Kind) -> Self {
        Self { kind, gauge: None }
    }

    /// Another one with these limits, which counts by itself.
    pub(crate) fn fresh(&self) -> Self {
        match &self.kind {
            Kind::Share(share) => Self::share(Limit::unpack(share.limit.load(Ordering::Relaxed))),
            Kind::Ratio(ratio) => Self::new(Kind::Ratio(ratio.fresh(Instant::now()))),
            Kind::Throttle(throttle) => Self::new(Kind::Throttle(throttle.fresh())),
        }
    }

    /// Takes over a changed configuration of a cluster; what is in flight stays counted.
    pub(crate) fn update(&self, thresholds: &Thresholds) {
        if let Kind::Share(share) = &self.kind {
            share.limit.store(Limit::of(thresholds).pack(), Ordering::Relaxed);
        }
    }

    /// Leave for one more retry, if there is any. `active` is the number of requests in flight, retries included.
    pub fn try_acquire(self: &Arc<Self>, active: u32) -> Option<Permit> {
        self.try_acquire_as(Profile::Envoy, active)
    }

    /// As [`try_acquire`](Self::try_acquire), for a call by the rules of `profile`.
    pub(crate) fn try_acquire_as(self: &Arc<Self>, profile: Profile, active: u32) -> Option<Permit> {
        let counted = match &self.kind {
            Kind::Share(share) => share.take(profile, active).then(|| self.clone()),
            Kind::Ratio(ratio) => return ratio.withdraw(Instant::now()).then(Permit::uncounted),
            Kind::Throttle(throttle) => return throttle.allows().then(Permit::uncounted),
        };
        let budget = counted?;
        if let Some(gauge) = &budget.gauge {
            gauge.increment(1.0);
        }
        Some(Permit { counted: Some(budget), also: None })
    }

    /// A call begins: what [`ratio`](Self::ratio) gives a share of.
    pub fn call_begins(&self) {
        if let Kind::Ratio(ratio) = &self.kind {
            ratio.deposit(Instant::now());
        }
    }

    /// An attempt ended, in a failure that the policy retries (or whose server asks not to), or not: what
    /// [`throttle`](Self::throttle) counts.
    pub fn attempt_ended(&self, failed: bool) {
        if let Kind::Throttle(throttle) = &self.kind {
            throttle.count(failed);
        }
    }

    /// Retries in flight; 0 of a budget that does not count them.
    pub fn in_flight(&self) -> u32 {
        match &self.kind {
            Kind::Share(share) => share.in_flight.in_use(),
            Kind::Ratio(_) | Kind::Throttle(_) => 0,
        }
    }
}

impl Share {
    /// Never overshoots the limit that follows from `active`.
    fn take(&self, profile: Profile, active: u32) -> bool {
        let limit = Limit::unpack(self.limit.load(Ordering::Relaxed));
        let max = if limit.envoy_only && profile == Profile::Grpc { u32::MAX } else { limit.max(active) };
        self.in_flight.take(max).is_some()
    }
}

impl Permit {
    fn uncounted() -> Self {
        Self { counted: None, also: None }
    }

    /// Both at once; `self` is a single one.
    pub(crate) fn and(mut self, other: Self) -> Self {
        self.also = Some(Box::new(other));
        self
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(budget) = &self.counted else { return };
        if let Kind::Share(share) = &budget.kind {
            share.in_flight.give_back();
        }
        if let Some(gauge) = &budget.gauge {
            gauge.decrement(1.0);
        }
    }
}

impl Limit {
    fn of(thresholds: &Thresholds) -> Self {
        match thresholds.retry_budget {
            Some(budget) => Self::percent(budget.percent, budget.min_concurrency),
            None => Self { share: 0, min: thresholds.max_retries, envoy_only: true },
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
