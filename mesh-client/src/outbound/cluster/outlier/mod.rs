//! Outlier detection (gRFC A50, Envoy's `outlier_detection`): which endpoints are ejected, for how long, and why.
//!
//! [`sweep`], [`consecutive`] and [`Ejection`] are the pure algorithm: the time and the draws are arguments. [`Counters`] is what the
//! request path writes. The cluster owns both and the task that sweeps.

mod algorithm;
mod counters;
mod tally;

pub(crate) use algorithm::{Event, Host, Rules, Verdict, consecutive, release_due, sweep};
pub(crate) use counters::{Counters, Thresholds};
pub(crate) use tally::Tally;

use mesh_xds::resource::OutlierDetection;
use std::{fmt, time::Duration};
use tokio::time::Instant;

/// Why an endpoint is ejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// `consecutive_5xx` failures of any kind.
    Consecutive5xx,
    /// `consecutive_gateway_failure` failures to reach a working server.
    ConsecutiveGatewayFailure,
    /// `consecutive_local_origin_failure` failures to get an answer, where they are counted apart.
    ConsecutiveLocalOriginFailure,
    /// Succeeds less often than the others do.
    SuccessRate,
    /// Fails more often than is allowed.
    FailurePercentage,
    /// Answers less often than the others do, where that is counted apart.
    LocalOriginSuccessRate,
    /// Gives no answer more often than is allowed, where that is counted apart.
    LocalOriginFailurePercentage,
    /// Linkerd's failure accrual: comes back by a probe.
    FailureAccrual,
}

/// What is remembered of one endpoint from one decision to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ejection {
    out: Option<Out>,
    /// How many times as long as the base the ejection lasts; one more each time, one less each clean interval.
    multiplier: u32,
    /// Pauses of failure accrual in a row.
    pauses: u32,
    /// Came back within the running interval, which is therefore not a clean one.
    returned: bool,
    /// A pause is over: one request decides what follows.
    probation: bool,
}

/// An ejection in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Out {
    since: Instant,
    cause: Cause,
    /// It lasts so much longer.
    jitter: Duration,
}

impl Ejection {
    pub(crate) fn is_ejected(&self) -> bool {
        self.out.is_some()
    }

    /// Whether one request is to decide if it comes back.
    pub(crate) fn is_on_probation(&self) -> bool {
        self.out.is_none() && self.probation
    }

    /// Why it is ejected.
    pub(crate) fn cause(&self) -> Option<Cause> {
        self.out.map(|out| out.cause)
    }

    /// When the ejection is over: after `base * multiplier`, but at most `max(base, max)` (gRFC A50), and the jitter.
    pub(crate) fn until(&self, config: &OutlierDetection) -> Option<Instant> {
        let out = self.out?;
        let length = match (out.cause, config.failure_accrual) {
            (Cause::FailureAccrual, None) => Duration::ZERO,
            (Cause::FailureAccrual, Some(accrual)) => {
                let doubled = 2_u32.saturating_pow(self.pauses.saturating_sub(1));
                accrual.min_pause.saturating_mul(doubled).min(accrual.max_pause.max(accrual.min_pause))
            }
            _ => {
                let longest = config.base_ejection_time.max(config.max_ejection_time);
                config.base_ejection_time.saturating_mul(self.multiplier).min(longest)
            }
        };
        out.since.checked_add(length.saturating_add(out.jitter))
    }

    /// `draw` is in `0..1`.
    fn eject(&mut self, cause: Cause, config: &OutlierDetection, now: Instant, draw: f64) {
        self.out = Some(Out { since: now, cause, jitter: Duration::ZERO });
        self.probation = false;
        if cause == Cause::FailureAccrual {
            self.pauses = self.pauses.saturating_add(1);
        } else {
            self.multiplier = self.multiplier.saturating_add(1);
        }
        let longest = match (cause, config.failure_accrual) {
            (Cause::FailureAccrual, Some(accrual)) => {
                let pause = self.until(config).map_or(Duration::ZERO, |until| until - now);
                pause.mul_f64(if accrual.jitter.is_finite() { accrual.jitter.clamp(0.0, 1.0) } else { 0.0 })
            }
            _ => config.max_ejection_time_jitter,
        };
        self.out = Some(Out { since: now, cause, jitter: longest.mul_f64(draw) });
    }

    /// Its time is over, or an active health check says that it is well.
    pub(crate) fn release(&mut self) {
        self.probation = self.cause() == Some(Cause::FailureAccrual);
        self.out = None;
        self.returned = true;
    }

    /// A probe has succeeded.
    pub(crate) fn acquit(&mut self) {
        self.probation = false;
        self.pauses = 0;
    }

    /// An interval has ended.
    fn decay(&mut self) {
        if self.out.is_none() && !std::mem::take(&mut self.returned) {
            self.multiplier = self.multiplier.saturating_sub(1);
        }
    }
}

impl Cause {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Self; 8] = [
        Self::Consecutive5xx,
        Self::ConsecutiveGatewayFailure,
        Self::ConsecutiveLocalOriginFailure,
        Self::SuccessRate,
        Self::FailurePercentage,
        Self::LocalOriginSuccessRate,
        Self::LocalOriginFailurePercentage,
        Self::FailureAccrual,
    ];

    /// As Envoy's statistics name it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive_5xx",
            Self::ConsecutiveGatewayFailure => "consecutive_gateway_failure",
            Self::ConsecutiveLocalOriginFailure => "consecutive_local_origin_failure",
            Self::SuccessRate => "success_rate",
            Self::FailurePercentage => "failure_percentage",
            Self::LocalOriginSuccessRate => "local_origin_success_rate",
            Self::LocalOriginFailurePercentage => "local_origin_failure_percentage",
            Self::FailureAccrual => "failure_accrual",
        }
    }

    fn enforcing(self, config: &OutlierDetection) -> u32 {
        match self {
            Self::Consecutive5xx => config.enforcing_consecutive_5xx,
            Self::ConsecutiveGatewayFailure => config.enforcing_consecutive_gateway_failure,
            Self::ConsecutiveLocalOriginFailure => config.enforcing_consecutive_local_origin_failure,
            Self::SuccessRate => config.enforcing_success_rate,
            Self::FailurePercentage => config.enforcing_failure_percentage,
            Self::LocalOriginSuccessRate => config.enforcing_local_origin_success_rate,
            Self::LocalOriginFailurePercentage => config.enforcing_failure_percentage_local_origin,
            Self::FailureAccrual => 100,
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests;
