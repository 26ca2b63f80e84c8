//! Peak EWMA (Linkerd): the cheaper of two draws, by latency times requests in flight.
//!
//! Latency is that to the head of the response, remembered as an average that decays with time and jumps up at once to a higher
//! value, so that an endpoint that becomes slow is left at its first slow answer.

use super::{Candidate, locality::Usable, shares::index};
use mesh_xds::resource::PeakEwma;
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// The latency of one endpoint: the logarithm of the average (24 bits), and when it was updated, in [`TICK`]s since its cluster
/// began (40 bits). One word, next to the count of requests, so that a comparison reads one cache line of each endpoint; and a
/// logarithm, because then it takes no exponential.
///
/// Lock free: of two updates at the same time one may be lost.
#[derive(Debug, Default)]
pub(crate) struct Latency(AtomicU64);

/// What costs are reckoned with: the policy's constants, and the clock of the latencies.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ewma {
    /// What a failure counts as, at least.
    pub(crate) penalty: Duration,
    begun: Instant,
    /// The logarithm for an endpoint that has not answered yet.
    default: u32,
    /// What a logarithm loses in a tick, in parts of 2^32.
    fading: u64,
    /// Ticks in which any logarithm has lost all.
    faded: u64,
}

/// A tick is so many nanoseconds, as a power of two: 16 us. 40 bits of them are 208 days.
const TICK: u32 = 14;
/// Of a logarithm to the base of two of nanoseconds. 0 stands for: none yet.
const LOG_BITS: u32 = 24;
const LOG: u64 = (1 << LOG_BITS) - 1;
/// How much of it is behind the point: a step is 3 millionths of the latency.
const FRACTION: u32 = 18;
const ONE: u32 = 1 << FRACTION;
/// Behind the point of what a logarithm loses.
const FADING_BITS: u32 = 32;

/// Logarithms of 1 to 2, in 64 steps.
const LOGS: [u32; 64] = {
    let mut logs = [0; 64];
    let mut i = 0;
    while i < 64 {
        logs[i] = log_of_fraction(64 + i as u64);
        i += 1;
    }
    logs
};

/// The logarithm of `n / 64`, for 64 to 127: digit by digit, a square each.
const fn log_of_fraction(n: u64) -> u32 {
    let (mut x, mut log, mut digit) = (n << 24, 0, ONE);
    while digit > 1 {
        digit >>= 1;
        x = (x * x) >> 30;
        if x >= 2 << 30 {
            x >>= 1;
            log += digit;
        }
    }
    log
}

/// The logarithm of a count: exact to a step up to 128, then to one percent.
#[inline]
fn log_of_count(n: u32) -> u32 {
    let n = n.max(1);
    let whole = n.ilog2();
    let fraction = (u64::from(n) << 6 >> whole) & 63;
    whole * ONE + LOGS[index(fraction)]
}

impl Ewma {
    /// Latencies are told from when their cluster began.
    pub(crate) fn new(config: &PeakEwma, begun: Instant) -> Self {
        let ticks = nanoseconds(config.decay).max(1.0) / f64::from(1_u32 << TICK);
        let fading = std::f64::consts::LOG2_E * f64::from(ONE) / ticks * f64::from(u32::MAX);
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
        let fading = (fading as u64).clamp(1, LOG << FADING_BITS);
        let faded = (LOG << FADING_BITS).div_ceil(fading);
        Self { penalty: config.penalty, begun, default: log(nanoseconds(config.default_rtt)), fading, faded }
    }

    /// Now, as [`Latency::cost`] is told it.
    pub(crate) fn ticks(&self, now: Instant) -> u64 {
        ticks(self.begun, now)
    }

    /// What a logarithm loses between two ticks.
    #[inline]
    fn lost(&self, updated: u64, now: u64) -> u32 {
        // At most twice 2^24, in parts of 2^32.
        let lost = (now.saturating_sub(updated).min(self.faded) * self.fading) >> FADING_BITS;
        u32::try_from(lost).expect("below 2^25")
    }
}

impl Latency {
    /// Of an endpoint that comes `now` to a cluster that `begun` then.
    pub(crate) fn new(begun: Instant, now: Instant) -> Self {
        Self(AtomicU64::new(ticks(begun, now) << LOG_BITS))
    }

    /// An answer took `rtt`.
    pub(crate) fn observe(&self, rtt: Duration, ewma: &Ewma, now: Instant) {
        let (at, new) = (ewma.ticks(now), nanoseconds(rtt));
        let average = match self.known() {
            (Some(known), updated) if log(new) < known => {
                let kept = power(ewma.lost(updated, at)).recip();
                power(known) * kept + new * (1.0 - kept)
            }
            _ => new,
        };
        self.set(log(average), at);
    }

    /// An answer would have taken longer than `rtt`.
    pub(crate) fn at_least(&self, rtt: Duration, ewma: &Ewma, now: Instant) {
        let (at, least) = (ewma.ticks(now), log(nanoseconds(rtt)));
        if least > self.now(ewma, at) {
            self.set(least, at);
        }
    }

    /// What a request costs: the logarithm of the latency now times the requests in flight with this one.
    #[inline]
    pub(crate) fn cost(&self, in_flight: u32, ewma: &Ewma, now: u64) -> u32 {
        self.now(ewma, now) + log_of_count(in_flight.saturating_add(1))
    }

    /// An endpoint that has not been asked for a while, or never, is worth another look: its latency decays to nothing.
    #[inline]
    fn now(&self, ewma: &Ewma, now: u64) -> u32 {
        let (known, updated) = self.known();
        known.unwrap_or(ewma.default).saturating_sub(ewma.lost(updated, now))
    }

    /// The average, and when it was updated.
    #[inline]
    fn known(&self) -> (Option<u32>, u64) {
        let word = self.0.load(Relaxed);
        let log = u32::try_from(word & LOG).expect("masked to 24 bits");
        ((log != 0).then_some(log), word >> LOG_BITS)
    }

    fn set(&self, log: u32, at: u64) {
        self.0.store(at << LOG_BITS | u64::from(log), Relaxed);
    }
}

fn ticks(begun: Instant, now: Instant) -> u64 {
    let age = now.saturating_duration_since(begun).as_nanos() >> TICK;
    u64::try_from(age).unwrap_or(u64::MAX) & (u64::MAX >> LOG_BITS)
}

/// 1 to 2^24 - 1.
fn log(nanoseconds: f64) -> u32 {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a float cast saturates")]
    let log = (nanoseconds.max(1.0).log2() * f64::from(ONE)) as u32;
    log.clamp(1, (1 << LOG_BITS) - 1)
}

/// The inverse of [`log`].
fn power(log: u32) -> f64 {
    (f64::from(log) / f64::from(ONE)).exp2()
}

fn nanoseconds(time: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "nanoseconds of a latency")]
    let nanoseconds = time.as_nanos() as f64;
    nanoseconds
}

/// The cheaper of two different ones, drawn by weight.
#[inline]
pub(super) fn draw<'a, C: Candidate>(
    locality: &'a Usable<C>,
    ewma: &Ewma,
    now: Instant,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    let now = ewma.ticks(now);
    let (first, mut second) = locality.draw_two(rng);
    if second == first && locality.len() > 1 {
        second = (first + 1 + rng.usize(..locality.len() - 1)) % locality.len();
    }
    let (a, b) = (locality.member(first), locality.member(second));
    let (cost, other) = (a.cost(ewma, now), b.cost(ewma, now));
    if other < cost { b } else { a }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[tokio::test(start_paused = true)]
    async fn latency_jumps_up_and_decays() {
        let begun = Instant::now();
        let start = begun + Duration::from_secs(3600);
        let config = PeakEwma { decay: Duration::from_secs(10), ..PeakEwma::default() };
        let ewma = Ewma::new(&config, begun);
        let latency = Latency::new(begun, start);
        let cost = |in_flight, at| power(latency.cost(in_flight, &ewma, ewma.ticks(at)));
        let near = |got: f64, wanted: f64| (got / wanted - 1.0).abs() < 3e-5;
        assert!(near(cost(0, start), 30e6), "the default before the first answer");
        assert!(cost(0, start + MS(40_000)) < 1e6, "and less of it as time goes by");
        latency.observe(MS(5), &ewma, start);
        assert!(near(cost(0, start), 5e6));
        assert!(near(cost(3, start), 20e6), "requests in flight count");
        latency.observe(MS(100), &ewma, start);
        assert!(near(cost(0, start), 100e6), "a slow answer counts at once");
        let later = start + Duration::from_secs(10);
        let left = cost(0, later) / 100e6;
        assert!(near(left, (-1f64).exp()), "{left} is left after the decay time");
        latency.observe(MS(1), &ewma, later);
        let now = cost(0, later) / 1e6;
        let expected = 100.0 * (-1f64).exp() + 1.0 * (1.0 - (-1f64).exp());
        assert!(near(now, expected), "{now} ms, not {expected}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_that_never_came_counts_only_as_what_it_took_at_least() {
        let start = Instant::now();
        let ewma = Ewma::new(&PeakEwma::default(), start);
        let latency = Latency::new(start, start);
        latency.observe(MS(50), &ewma, start);
        let before = latency.cost(0, &ewma, 0);
        latency.at_least(MS(40), &ewma, start);
        assert_eq!(latency.cost(0, &ewma, 0), before, "it may have taken as long as the others");
        latency.at_least(MS(80), &ewma, start);
        assert!((power(latency.cost(0, &ewma, 0)) / 80e6 - 1.0).abs() < 3e-5);
    }

    #[test]
    fn logarithms_of_counts_are_those_of_the_library() {
        for n in (1..=128).chain([1000, 65_535, u32::MAX]) {
            let near = if n <= 128 { 2.0 } else { 0.012 * f64::from(ONE) * std::f64::consts::LOG2_E };
            let (got, wanted) = (f64::from(log_of_count(n)), f64::from(n).log2() * f64::from(ONE));
            assert!((got - wanted).abs() <= near + 20.0, "{n}: {got}, not {wanted}");
        }
    }
}
