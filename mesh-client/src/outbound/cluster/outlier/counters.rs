//! What the request path counts for outlier detection: one atomic write per success, a few per failure.

use super::Cause;
use crate::outbound::cluster::Outcome;
use mesh_xds::resource::OutlierDetection;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};

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
}

/// When the request path has to speak up; shared by the endpoints of a cluster.
#[derive(Debug, Default)]
pub(crate) struct Thresholds {
    enabled: AtomicBool,
    /// 0: off.
    consecutive_5xx: AtomicU32,
    /// 0: off.
    consecutive_gateway_failure: AtomicU32,
}

const FAILURE: u64 = 1 << 32;

impl Counters {
    /// Counts one request, and names the rows of failures that it completes: one failure can complete both. A complete
    /// row starts anew.
    pub(crate) fn record(&self, outcome: Outcome, thresholds: &Thresholds) -> [Option<Cause>; 2] {
        if !thresholds.enabled.load(Relaxed) {
            return [None; 2];
        }
        self.interval.fetch_add(if outcome.is_failure() { FAILURE } else { 1 }, Relaxed);
        if !outcome.is_failure() {
            self.forgive();
            return [None; 2];
        }
        let any = completes(&self.consecutive_5xx, &thresholds.consecutive_5xx);
        let gateway = if outcome == Outcome::ServerError {
            clear(&self.consecutive_gateway_failure);
            false
        } else {
            completes(&self.consecutive_gateway_failure, &thresholds.consecutive_gateway_failure)
        };
        [any.then_some(Cause::Consecutive5xx), gateway.then_some(Cause::ConsecutiveGatewayFailure)]
    }

    /// Takes what was counted since the last time.
    pub(crate) fn take(&self) -> Tally {
        let packed = self.interval.swap(0, Relaxed);
        let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).expect("masked to 32 bits");
        Tally { successes: half(packed), failures: half(packed >> 32) }
    }

    /// Forgets rows of failures: an endpoint that comes back starts clean.
    pub(crate) fn forgive(&self) {
        clear(&self.consecutive_5xx);
        clear(&self.consecutive_gateway_failure);
    }
}

impl Thresholds {
    /// Takes the configuration of the moment; `None`: off.
    pub(crate) fn set(&self, config: Option<&OutlierDetection>) {
        self.enabled.store(config.is_some(), Relaxed);
        self.consecutive_5xx.store(config.and_then(|c| c.consecutive_5xx).unwrap_or(0), Relaxed);
        let gateway = config.and_then(|c| c.consecutive_gateway_failure).unwrap_or(0);
        self.consecutive_gateway_failure.store(gateway, Relaxed);
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
