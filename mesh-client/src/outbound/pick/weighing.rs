//! What an endpoint's weight is made of: what the control plane says, and slow start.

use super::Candidate;
use mesh_xds::resource::SlowStart;
use tokio::time::Instant;

/// How weights are found when a picker is built.
#[derive(Clone, Copy, Debug)]
pub(super) enum Weighing<'a> {
    /// As the control plane says.
    Said,
    /// The same, times a factor for those that are new.
    SlowStart(&'a SlowStart, Instant),
}

/// Weights are multiplied by this before a factor is applied, so that it is not rounded away; by less where the greatest would not
/// fit.
const FINE: f64 = 1000.0;

impl Weighing<'_> {
    /// `greatest`: of the weights said of all that are weighed together.
    pub(super) fn weight(self, said: u32, greatest: u32, candidate: &impl Candidate) -> u32 {
        match self {
            Self::Said => said,
            Self::SlowStart(config, now) => {
                let fine = FINE.min(f64::from(u32::MAX) / f64::from(greatest.max(1)));
                let scaled = f64::from(said) * fine * factor(config, candidate, now);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
                let weight = scaled.round() as u32;
                weight.max(1)
            }
        }
    }
}

/// Envoy `EdfLoadBalancerBase::applySlowStartFactor`: `max(min_weight, (age / window)^(1 / aggression))`, 1 past the window; the
/// age is at least 1 s.
fn factor(config: &SlowStart, candidate: &impl Candidate, now: Instant) -> f64 {
    let age = now.saturating_duration_since(candidate.joined());
    if age >= config.window {
        return 1.0;
    }
    let time = age.as_secs_f64().max(1.0) / config.window.as_secs_f64();
    time.min(1.0).powf(1.0 / config.aggression).max(config.min_weight / 100.0)
}

/// Whether the weight of the candidate still grows.
pub(super) fn is_new(config: &SlowStart, candidate: &impl Candidate, now: Instant) -> bool {
    now.saturating_duration_since(candidate.joined()) < config.window
}
