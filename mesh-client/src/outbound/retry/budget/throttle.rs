//! gRPC's throttle (gRFC A6, `retryThrottling`).

use crate::atomic::{AtomicU32, Ordering::Relaxed};

/// A token, in the unit of the count.
const TOKEN: u32 = 1000;

#[derive(Debug)]
pub(super) struct Throttle {
    /// In thousandths of a token.
    count: AtomicU32,
    max: u32,
    /// What a success gives.
    gain: u32,
}

impl Throttle {
    pub(super) fn new(max_tokens: u32, token_ratio: f64) -> Self {
        let max = max_tokens.clamp(1, 1000) * TOKEN;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped; what is no number is 0")]
        let gain = (token_ratio.clamp(0.0, 1000.0) * f64::from(TOKEN)) as u32;
        Self { count: AtomicU32::new(max), max, gain }
    }

    pub(super) fn fresh(&self) -> Self {
        Self { count: AtomicU32::new(self.max), max: self.max, gain: self.gain }
    }

    pub(super) fn allows(&self) -> bool {
        self.count.load(Relaxed) > self.max / 2
    }

    pub(super) fn count(&self, failed: bool) {
        let next = |count: u32| {
            Some(if failed { count.saturating_sub(TOKEN) } else { count.saturating_add(self.gain).min(self.max) })
        };
        // It always changes.
        let _ = self.count.fetch_update(Relaxed, Relaxed, next);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn at_half_the_tokens_nothing_is_retried_any_more() {
        let throttle = Throttle::new(10, 0.5);
        for failures in 0..5 {
            assert!(throttle.allows(), "after {failures} failures");
            throttle.count(true);
        }
        assert!(!throttle.allows(), "five of ten are half");
        throttle.count(false);
        assert!(throttle.allows(), "5.5 of 10");
        assert!(throttle.fresh().allows());
    }

    #[test]
    fn threads_lose_no_count() {
        let throttle = Throttle::new(1000, 0.001);
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let throttle = &throttle;
                scope.spawn(move || (0..100).for_each(|_| throttle.count(thread % 2 == 0)));
            }
        });
        // 400 failures; 400 successes give 0.4 of a token, as far as the count was below its maximum.
        let left = throttle.count.load(Relaxed);
        assert!((600_000..=600_400).contains(&left), "{left}");
    }

    proptest! {
        #[test]
        fn is_the_count_of_the_document(max in 1..20u32, thousandths in 0..3_000u32, failures in proptest::collection::vec(any::<bool>(), 0..100)) {
            let throttle = Throttle::new(max, f64::from(thousandths) / 1000.0);
            let mut model = i64::from(max) * 1000;
            for failed in failures {
                throttle.count(failed);
                let next = if failed { model - 1000 } else { model + i64::from(throttle.gain) };
                model = next.clamp(0, i64::from(max) * 1000);
                prop_assert_eq!(throttle.allows(), model * 2 > i64::from(max) * 1000);
            }
        }
    }
}
