//! What the request path counts for outlier detection: one atomic write per success, a few per failure.

use super::{
    Cause,
    tally::{Interval, Row, Tally},
};
use crate::outbound::cluster::Outcome;
use mesh_xds::resource::OutlierDetection;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering::Relaxed};

/// The counters of one endpoint.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    interval: Interval,
    consecutive_5xx: Row,
    consecutive_gateway_failure: Row,
    consecutive_local_origin_failure: Row,
    accrued: Row,
    /// As `interval`: whether there was an answer. Written only where that is counted apart.
    local_interval: Interval,
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
            self.local_interval.count(local);
            if local {
                let row = self
                    .consecutive_local_origin_failure
                    .completes(thresholds.consecutive_local_origin_failure.load(Relaxed));
                let accrued = self.accrued.completes(thresholds.accrued.load(Relaxed));
                return [
                    row.then_some(Cause::ConsecutiveLocalOriginFailure),
                    None,
                    accrued.then_some(Cause::FailureAccrual),
                ];
            }
            self.consecutive_local_origin_failure.clear();
        }
        self.interval.count(outcome.is_failure());
        if !outcome.is_failure() {
            self.forgive();
            return [None; 3];
        }
        let any = self.consecutive_5xx.completes(thresholds.consecutive_5xx.load(Relaxed));
        let gateway = if outcome == Outcome::ServerError {
            self.consecutive_gateway_failure.clear();
            false
        } else {
            self.consecutive_gateway_failure.completes(thresholds.consecutive_gateway_failure.load(Relaxed))
        };
        let accrued = self.accrued.completes(thresholds.accrued.load(Relaxed));
        [
            any.then_some(Cause::Consecutive5xx),
            gateway.then_some(Cause::ConsecutiveGatewayFailure),
            accrued.then_some(Cause::FailureAccrual),
        ]
    }

    /// Takes what was counted since the last time: what was answered, and whether there was an answer.
    pub(crate) fn take(&self) -> [Tally; 2] {
        [self.interval.take(), self.local_interval.take()]
    }

    /// Forgets rows of failures: an endpoint that comes back starts clean.
    pub(crate) fn forgive(&self) {
        self.consecutive_5xx.clear();
        self.consecutive_gateway_failure.clear();
        self.consecutive_local_origin_failure.clear();
        self.accrued.clear();
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
