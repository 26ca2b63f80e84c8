//! Peak EWMA (Linkerd): the cheaper of two draws, by latency times requests in flight.
//!
//! Latency is that to the head of the response, remembered as an average that decays with time and jumps up at once to a higher
//! value, so that an endpoint that becomes slow is left at its first slow answer.

use super::{Candidate, locality::Usable};
use mesh_xds::resource::PeakEwma;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// The latency of one endpoint. Lock free: of two updates at the same time one may be lost.
#[derive(Debug)]
pub(crate) struct Latency {
    /// The average in nanoseconds, as the bits of an `f64`; 0: none yet.
    average: AtomicU64,
    /// When it was updated, in nanoseconds since `born`.
    updated: AtomicU64,
    born: Instant,
}

impl Latency {
    pub(crate) fn new(now: Instant) -> Self {
        Self { average: AtomicU64::new(0), updated: AtomicU64::new(0), born: now }
    }

    /// An answer took `rtt`.
    pub(crate) fn observe(&self, rtt: Duration, config: &PeakEwma, now: Instant) {
        #[allow(clippy::cast_precision_loss, reason = "nanoseconds of a latency")]
        let rtt = rtt.as_nanos() as f64;
        let known = f64::from_bits(self.average.load(Relaxed));
        let average = if known == 0.0 || rtt >= known {
            rtt
        } else {
            let kept = self.decay(config, now);
            known * kept + rtt * (1.0 - kept)
        };
        self.average.store(average.max(1.0).to_bits(), Relaxed);
        let age = now.saturating_duration_since(self.born).as_nanos();
        self.updated.store(u64::try_from(age).unwrap_or(u64::MAX), Relaxed);
    }

    /// What a request costs: the latency now times the requests in flight with this one.
    pub(crate) fn cost(&self, in_flight: u32, config: &PeakEwma, now: Instant) -> f64 {
        let known = f64::from_bits(self.average.load(Relaxed));
        #[allow(clippy::cast_precision_loss, reason = "nanoseconds of a latency")]
        let default = config.default_rtt.as_nanos() as f64;
        // An endpoint that has not been asked for a while, or never, is worth another look: its latency decays to nothing.
        let latency = if known == 0.0 { default } else { known } * self.decay(config, now);
        latency.max(1.0) * (f64::from(in_flight) + 1.0)
    }

    /// How much of the average is left, 0..=1.
    fn decay(&self, config: &PeakEwma, now: Instant) -> f64 {
        let age = now.saturating_duration_since(self.born).as_nanos();
        let age = u64::try_from(age).unwrap_or(u64::MAX).saturating_sub(self.updated.load(Relaxed));
        #[allow(clippy::cast_precision_loss, reason = "nanoseconds since the last answer")]
        let (age, decay) = (age as f64, config.decay.as_nanos() as f64);
        (-age / decay).exp()
    }
}

/// The cheaper of two different ones, drawn by weight.
#[inline]
pub(super) fn draw<'a, C: Candidate>(
    locality: &'a Usable<C>,
    config: &PeakEwma,
    now: Instant,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    let first = locality.draw_index(rng);
    let mut second = locality.draw_index(rng);
    if second == first && locality.len() > 1 {
        second = (first + 1 + rng.usize(..locality.len() - 1)) % locality.len();
    }
    let (a, b) = (locality.member(first), locality.member(second));
    if b.cost(config, now) < a.cost(config, now) { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[tokio::test(start_paused = true)]
    async fn latency_jumps_up_and_decays() {
        let config = PeakEwma { decay: Duration::from_secs(10), ..PeakEwma::default() };
        let start = Instant::now();
        let latency = Latency::new(start);
        assert_eq!(latency.cost(0, &config, start), 30e6, "the default before the first answer");
        assert!(latency.cost(0, &config, start + MS(40_000)) < 1e6, "and less of it as time goes by");
        latency.observe(MS(5), &config, start);
        assert_eq!(latency.cost(0, &config, start), 5e6);
        assert_eq!(latency.cost(3, &config, start), 20e6, "requests in flight count");
        latency.observe(MS(100), &config, start);
        assert_eq!(latency.cost(0, &config, start), 100e6, "a slow answer counts at once");
        let later = start + Duration::from_secs(10);
        let left = latency.cost(0, &config, later) / 100e6;
        assert!((left - (-1f64).exp()).abs() < 1e-6, "{left} is left after the decay time");
        latency.observe(MS(1), &config, later);
        let now = latency.cost(0, &config, later) / 1e6;
        let expected = 100.0 * (-1f64).exp() + 1.0 * (1.0 - (-1f64).exp());
        assert!((now - expected).abs() < 1e-6, "{now} ms, not {expected}");
    }
}
