//! The reconnect delay: exponential by 1.6, 20 % jitter (gRPC connection backoff).

use std::time::Duration;

/// Grows with each failure, starts again after a success.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    base: Duration,
    max: Duration,
    current: Duration,
}

impl Backoff {
    pub(crate) fn new(base: Duration, max: Duration) -> Self {
        let max = max.max(base);
        Self { base, max, current: base }
    }

    pub(crate) fn reset(&mut self) {
        self.current = self.base;
    }

    /// The delay before the next attempt.
    pub(crate) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let delay = self.current.mul_f64(rng.f64().mul_add(0.4, 0.8));
        self.current = self.current.mul_f64(1.6).min(self.max);
        delay
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_the_limit_with_jitter_and_starts_again() {
        let mut rng = fastrand::Rng::with_seed(7);
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(120));
        let mut expected = 1.0_f64;
        for _ in 0..20 {
            let delay = backoff.next(&mut rng).as_secs_f64();
            assert!((0.8 * expected..=1.2 * expected).contains(&delay), "{delay} is not within 20 % of {expected}");
            expected = (expected * 1.6).min(120.0);
        }
        assert!((expected - 120.0).abs() < f64::EPSILON);
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_millis(1200));
    }
}
