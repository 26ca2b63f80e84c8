//! What the request path counts for outlier detection: one atomic write per success, a few per failure.

use super::Cause;
use crate::outbound::cluster::Outcome;
use mesh_xds::resource::OutlierDetection;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed};

/// How many requests ended well and badly in one interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Tally {
    pub(crate) successes: u32,
    pub(crate) failures: u32,
}

/// The counters of one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// Failures in the upper half, successes in the lower, so that both are taken at one moment.
    interval: AtomicU64,
    consecutive_5xx: AtomicU32,
    consecutive_gateway_failure: AtomicU32,
    consecutive_local_origin_failure: AtomicU32,
    accrued: AtomicU32,
    /// As `interval`: whether there was an answer. Written only where that is counted apart.
    local_interval: AtomicU64,
}

/// When the request path has to speak up; shared by the endpoints of a cluster.
#[derive(Debug, Default)]
pub(crate) struct Thresholds {
    mode: AtomicU8,
    /// 0: off, as the following.
    consecutive_5xx: AtomicU32,
    consecutive_gateway_failure: AtomicU32,
    consecutive_local_origin_failure: AtomicU32,
    accrued: AtomicU32,
}

const FAILURE: u64 = 1 << 32;

/// Nothing is counted.
const OFF: u8 = 0;
/// A failure to get an answer is a gateway failure.
const JOINT: u8 = 1;
/// It is counted apart.
const SPLIT: u8 = 2;

impl Counters {
    /// Counts one request, and names the rows of failures that it completes: one failure can complete several. A complete
    /// row starts anew.
    pub(crate) fn record(&self, outcome: Outcome, thresholds: &Thresholds) -> [Option<Cause>; 3] {
        let mode = thresholds.mode.load(Relaxed);
        if mode == OFF {
            return [None; 3];
        }
        if mode == SPLIT {
            let local = outcome == Outcome::LocalOrigin;
            self.local_interval.fetch_add(if local { FAILURE } else { 1 }, Relaxed);
            if local {
                let row =
                    completes(&self.consecutive_local_origin_failure, &thresholds.consecutive_local_origin_failure);
                let accrued = completes(&self.accrued, &thresholds.accrued);
                return [
                    row.then_some(Cause::ConsecutiveLocalOriginFailure),
                    None,
                    accrued.then_some(Cause::FailureAccrual),
                ];
            }
            clear(&self.consecutive_local_origin_failure);
        }
        self.interval.fetch_add(if outcome.is_failure() { FAILURE } else { 1 }, Relaxed);
        if !outcome.is_failure() {
            self.forgive();
            return [None; 3];
        }
        let any = completes(&self.consecutive_5xx, &thresholds.consecutive_5xx);
        let gateway = if outcome == Outcome::ServerError {
            clear(&self.consecutive_gateway_failure);
            false
        } else {
            completes(&self.consecutive_gateway_failure, &thresholds.consecutive_gateway_failure)
        };
        let accrued = completes(&self.accrued, &thresholds.accrued);
        [
            any.then_some(Cause::Consecutive5xx),
            gateway.then_some(Cause::ConsecutiveGatewayFailure),
            accrued.then_some(Cause::FailureAccrual),
        ]
    }

    /// Takes what was counted since the last time: what was answered, and whether there was an answer.
    pub(crate) fn take(&self) -> [Tally; 2] {
        [&self.interval, &self.local_interval].map(|counter| {
            let packed = counter.swap(0, Relaxed);
            let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).expect("masked to 32 bits");
            Tally { successes: half(packed), failures: half(packed >> 32) }
        })
    }

    /// Forgets rows of failures: an endpoint that comes back starts clean.
    pub(crate) fn forgive(&self) {
        clear(&self.consecutive_5xx);
        clear(&self.consecutive_gateway_failure);
        clear(&self.consecutive_local_origin_failure);
        clear(&self.accrued);
    }
}

impl Thresholds {
    /// Takes the configuration of the moment; `None`: off.
    pub(crate) fn set(&self, config: Option<&OutlierDetection>) {
        let mode = config.map_or(OFF, |config| if config.split_local_origin { SPLIT } else { JOINT });
        self.mode.store(mode, Relaxed);
        let set = |counter: &AtomicU32, of: fn(&OutlierDetection) -> Option<u32>| {
            counter.store(config.and_then(of).unwrap_or(0), Relaxed);
        };
        set(&self.consecutive_5xx, |config| config.consecutive_5xx);
        set(&self.consecutive_gateway_failure, |config| config.consecutive_gateway_failure);
        set(&self.consecutive_local_origin_failure, |config| config.consecutive_local_origin_failure);
        set(&self.accrued, |config| config.failure_accrual.map(|accrual| accrual.max_failures.max(1)));
    }
}

/// Writes only when there is something to clear, so that successes do not fight over the cache line.
fn clear(counter: &AtomicU32) {
    if counter.load(Relaxed) != 0 {
        counter.store(0, Relaxed);
    }
}

fn completes(counter: &AtomicU32, threshold: &AtomicU32) -> bool {
    let row = counter.fetch_add(1, Relaxed).saturating_add(1);
    let threshold = threshold.load(Relaxed);
    let complete = threshold != 0 && row >= threshold;
    if complete {
        counter.store(0, Relaxed);
    }
    complete
}
