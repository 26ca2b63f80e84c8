//! Adaptive concurrency: as many calls at once as the latency allows (Envoy's `adaptive_concurrency` filter, gradient controller).

use super::{Ended, Filter, FilterRequest, Outcome, Reply, Step, Verdict, Watch};
use crate::time::{FAR, after};
use http::StatusCode;
use mesh_xds::resource::AdaptiveConcurrencyConfig;
use std::{
    borrow::Cow,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// Samples of one window that are kept; of more, those that come later take the places of earlier ones.
const MAX_SAMPLES: usize = 8192;
/// After so many updates in a row that end at the least limit, the least latency is measured again.
const MAX_AT_LEAST: u32 = 5;

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct AdaptiveConcurrency {
    config: Arc<AdaptiveConcurrencyConfig>,
    controller: Arc<Controller>,
}

/// What the controller of one configuration knows.
#[derive(Debug)]
pub(crate) struct Controller(Mutex<Gradient>);

/// The algorithm: `now` and randomness are arguments.
#[derive(Debug)]
struct Gradient {
    limit: u32,
    outstanding: u32,
    /// Latencies of this window.
    samples: Vec<Duration>,
    /// How many there were.
    seen: usize,
    min_rtt: Duration,
    /// While the least latency is measured: the limit before, and when it began.
    measuring: Option<(u32, Instant)>,
    /// When the least latency is measured again.
    measure_at: Option<Instant>,
    update_at: Instant,
    /// Updates in a row that ended at the least limit.
    at_least: u32,
}

/// One call that counts.
struct Counted {
    config: Arc<AdaptiveConcurrencyConfig>,
    controller: Arc<Controller>,
    started: Instant,
}

impl Controller {
    pub(crate) fn new(config: &AdaptiveConcurrencyConfig, now: Instant) -> Self {
        Self(Mutex::new(Gradient::new(config, now)))
    }

    fn lock(&self) -> MutexGuard<'_, Gradient> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gradient {
    fn new(config: &AdaptiveConcurrencyConfig, now: Instant) -> Self {
        let mut gradient = Self {
            limit: config.min_concurrency,
            outstanding: 0,
            samples: Vec::new(),
            seen: 0,
            min_rtt: config.fixed_min_rtt.unwrap_or_default(),
            measuring: None,
            measure_at: None,
            update_at: after(now, config.update_interval),
            at_least: 0,
        };
        if config.fixed_min_rtt.is_none() {
            gradient.measure(config, now);
        }
        gradient
    }

    /// Whether one more call may go on.
    fn admit(&mut self, config: &AdaptiveConcurrencyConfig, now: Instant) -> bool {
        self.tick(config, now);
        let admitted = self.outstanding < self.limit;
        self.outstanding += u32::from(admitted);
        admitted
    }

    /// A call that was admitted is over; `None`: its latency says nothing. `random` is uniform in 0..1.
    fn end(&mut self, config: &AdaptiveConcurrencyConfig, started: Option<Instant>, now: Instant, random: f64) {
        self.outstanding = self.outstanding.saturating_sub(1);
        self.tick(config, now);
        let Some(started) = started else { return };
        // Of those that began before, with another limit, the latency is not the least.
        if self.measuring.is_some_and(|(_, since)| started < since) {
            return;
        }
        let sample = now.saturating_duration_since(started);
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(sample);
        } else {
            self.samples[self.seen % MAX_SAMPLES] = sample;
        }
        self.seen += 1;
        if let Some((before, _)) = self.measuring.filter(|_| self.seen >= config.min_rtt_requests as usize) {
            self.min_rtt = self.percentile(config.percentile);
            self.measuring = None;
            self.limit = before;
            self.at_least = 0;
            let interval = config.min_rtt_interval.min(FAR);
            self.measure_at = Some(after(now, interval + interval.mul_f64(config.jitter * random)));
            self.update_at = after(now, config.update_interval);
        }
    }

    /// What was due by now.
    fn tick(&mut self, config: &AdaptiveConcurrencyConfig, now: Instant) {
        if self.measuring.is_some() {
            return;
        }
        if self.measure_at.is_some_and(|at| at <= now) {
            return self.measure(config, now);
        }
        if self.update_at > now {
            return;
        }
        self.update_at = after(now, config.update_interval);
        if self.samples.is_empty() {
            return;
        }
        let sample = self.percentile(config.percentile);
        self.limit = self.next_limit(config, sample);
        self.at_least = if self.limit == config.min_concurrency_limit { self.at_least + 1 } else { 0 };
        if self.at_least >= MAX_AT_LEAST && config.fixed_min_rtt.is_none() {
            self.measure(config, now);
        }
    }

    fn measure(&mut self, config: &AdaptiveConcurrencyConfig, now: Instant) {
        self.samples.clear();
        self.seen = 0;
        self.measuring = Some((self.limit, now));
        self.measure_at = None;
        self.limit = config.min_concurrency;
    }

    /// The gradient of the least latency and that of the window, between a half and two, and room for a burst.
    fn next_limit(&self, config: &AdaptiveConcurrencyConfig, sample: Duration) -> u32 {
        let least = self.min_rtt.as_secs_f64() * (1.0 + config.buffer);
        let gradient = (least / sample.as_secs_f64().max(1e-9)).clamp(0.5, 2.0);
        let limit = f64::from(self.limit) * gradient;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "positive, and saturates")]
        let limit = (limit + limit.sqrt()) as u32;
        limit.clamp(config.min_concurrency_limit, config.max_concurrency)
    }

    /// Of this window, which ends.
    fn percentile(&mut self, percentile: f64) -> Duration {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position in a list")]
        let position = (self.samples.len() as f64 * percentile) as usize;
        let position = position.min(self.samples.len().saturating_sub(1));
        let value = self.samples.select_nth_unstable(position).1.to_owned();
        self.samples.clear();
        self.seen = 0;
        value
    }
}

impl AdaptiveConcurrency {
    pub(super) fn new(config: Arc<AdaptiveConcurrencyConfig>, controller: Arc<Controller>) -> Self {
        Self { config, controller }
    }
}

impl Filter for AdaptiveConcurrency {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        let now = Instant::now();
        let (admitted, limit) = {
            let mut gradient = self.controller.lock();
            (gradient.admit(&self.config, now), gradient.limit)
        };
        if !admitted {
            request.explain("concurrency", || format!("the limit of {limit} calls at once is reached"));
            let status = StatusCode::from_u16(self.config.status).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
            return Step::Now(Verdict::Answer(Reply::new(status, "reached concurrency limit").grpc_status(14)));
        }
        let (config, controller) = (self.config.clone(), self.controller.clone());
        Step::Now(Verdict::Watch(Box::new(Counted { config, controller, started: now })))
    }

    fn describe(&self) -> Cow<'_, str> {
        let gradient = self.controller.lock();
        format!("adaptive concurrency: {} of {} calls at once", gradient.outstanding, gradient.limit).into()
    }
}

impl Watch for Counted {
    fn end(&mut self, outcome: &Outcome) {
        // A call that failed or took too long says most about a peer that is overloaded.
        let started = (!matches!(outcome.ended, Ended::Cancelled | Ended::Answered)).then_some(self.started);
        self.controller.lock().end(&self.config, started, Instant::now(), fastrand::f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AdaptiveConcurrencyConfig {
        AdaptiveConcurrencyConfig {
            update_interval: Duration::from_millis(100),
            min_rtt_interval: Duration::from_secs(60),
            min_rtt_requests: 5,
            ..AdaptiveConcurrencyConfig::default()
        }
    }

    /// Runs windows of calls at the limit with this latency.
    fn windows(gradient: &mut Gradient, now: &mut Instant, latency: u64, count: u32) {
        for _ in 0..count {
            let admitted = (0..5000).take_while(|_| gradient.admit(&config(), *now)).count();
            assert_eq!(admitted, gradient.limit as usize);
            let started = *now;
            *now += Duration::from_millis(latency);
            for _ in 0..admitted {
                gradient.end(&config(), Some(started), *now, 0.0);
            }
            *now += Duration::from_millis(100);
        }
    }

    #[test]
    fn the_limit_grows_while_calls_are_fast_and_falls_when_they_are_slow() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(&config(), now);
        assert_eq!((gradient.limit, gradient.measuring.is_some()), (3, true));
        windows(&mut gradient, &mut now, 10, 2);
        assert_eq!((gradient.measuring, gradient.min_rtt), (None, Duration::from_millis(10)));
        windows(&mut gradient, &mut now, 10, 20);
        let fast = gradient.limit;
        assert!(fast > 100, "{fast}");
        windows(&mut gradient, &mut now, 100, 4);
        assert!(gradient.limit < fast / 2, "{} of {fast}", gradient.limit);
        assert!(gradient.limit >= 3 && gradient.outstanding == 0);
        // After the interval the least latency is measured again, with few calls.
        now += Duration::from_secs(60);
        assert!(gradient.admit(&config(), now));
        assert_eq!((gradient.limit, gradient.measuring.is_some()), (3, true));
    }

    #[test]
    fn the_limit_never_passes_its_bounds() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(&config(), now);
        windows(&mut gradient, &mut now, 1, 100);
        assert_eq!(gradient.limit, 1000);
    }
}
