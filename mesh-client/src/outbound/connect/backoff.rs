//! How long to wait after a failed attempt (gRPC connection backoff protocol).

use std::time::Duration;

/// Exponential backoff: factor 1.6, jitter ±20 %.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Backoff {
    /// After the first failure.
    pub(crate) base: Duration,
    /// Never longer, jitter aside.
    pub(crate) max: Duration,
}

const FACTOR: f64 = 1.6;
const JITTER: f64 = 0.2;

impl Backoff {
    /// The wait after `failures` failures in a row (1, 2, ...). `random` is in `0..1`.
    pub(crate) fn delay(&self, failures: u32, random: f64) -> Duration {
        let exponent = i32::try_from(failures.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds = (self.base.as_secs_f64() * FACTOR.powi(exponent)).min(self.max.as_secs_f64());
        Duration::from_secs_f64(seconds * (1.0 - JITTER + 2.0 * JITTER * random))
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: Duration::from_secs(1), max: Duration::from_secs(120) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_by_1_6_to_the_maximum() {
        let backoff = Backoff::default();
        let seconds = |failures| backoff.delay(failures, 0.5).as_secs_f64();
        assert!((seconds(1) - 1.0).abs() < 1e-9);
        assert!((seconds(2) - 1.6).abs() < 1e-9);
        assert!((seconds(3) - 2.56).abs() < 1e-9);
        assert!((seconds(50) - 120.0).abs() < 1e-9);
        assert!((seconds(u32::MAX) - 120.0).abs() < 1e-9);
    }

    #[test]
    fn jitter_is_a_fifth_either_way() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay(1, 0.0), Duration::from_millis(800));
        assert_eq!(backoff.delay(1, 1.0), Duration::from_millis(1200));
    }
}
