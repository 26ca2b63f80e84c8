//! Outlier detection (gRFC A50, Envoy's `outlier_detection`): which endpoints are ejected, for how long, and why.
//!
//! [`sweep`], [`consecutive`] and [`Ejection`] are the pure algorithm: the time and the draws are arguments. [`Counters`] is what the
//! request path writes. The cluster owns both and the task that sweeps.

mod algorithm;
mod counters;

pub(crate) use algorithm::{Event, Host, Verdict, consecutive, release_due, sweep};
pub(crate) use counters::{Counters, Tally, Thresholds};

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
    /// Succeeds less often than the others do.
    SuccessRate,
    /// Fails more often than is allowed.
    FailurePercentage,
}

/// What is remembered of one endpoint from one decision to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ejection {
    since: Option<Instant>,
    /// How many times as long as the base the ejection lasts; one more each time, one less each clean interval.
    multiplier: u32,
    /// Came back within the running interval, which is therefore not a clean one.
    returned: bool,
}

impl Ejection {
    pub(crate) fn is_ejected(&self) -> bool {
        self.since.is_some()
    }

    /// When the ejection is over: after `base * multiplier`, but at most `max(base, max)` (gRFC A50).
    pub(crate) fn until(&self, config: &OutlierDetection) -> Option<Instant> {
        let longest = config.base_ejection_time.max(config.max_ejection_time);
        self.since.map(|since| since + self.length(config).min(longest))
    }

    fn length(&self, config: &OutlierDetection) -> Duration {
        config.base_ejection_time.checked_mul(self.multiplier).unwrap_or(Duration::MAX)
    }

    fn eject(&mut self, now: Instant) {
        self.since = Some(now);
        self.multiplier = self.multiplier.saturating_add(1);
    }

    fn release(&mut self) {
        self.since = None;
        self.returned = true;
    }

    /// An interval has ended.
    fn decay(&mut self) {
        if self.since.is_none() && !std::mem::take(&mut self.returned) {
            self.multiplier = self.multiplier.saturating_sub(1);
        }
    }
}

impl Cause {
    /// All of them, in the order of their discriminants.
    pub(crate) const ALL: [Self; 4] =
        [Self::Consecutive5xx, Self::ConsecutiveGatewayFailure, Self::SuccessRate, Self::FailurePercentage];

    /// As Envoy's statistics name it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::Consecutive5xx => "consecutive_5xx",
            Self::ConsecutiveGatewayFailure => "consecutive_gateway_failure",
            Self::SuccessRate => "success_rate",
            Self::FailurePercentage => "failure_percentage",
        }
    }

    fn enforcing(self, config: &OutlierDetection) -> u32 {
        match self {
            Self::Consecutive5xx => config.enforcing_consecutive_5xx,
            Self::ConsecutiveGatewayFailure => config.enforcing_consecutive_gateway_failure,
            Self::SuccessRate => config.enforcing_success_rate,
            Self::FailurePercentage => config.enforcing_failure_percentage,
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
