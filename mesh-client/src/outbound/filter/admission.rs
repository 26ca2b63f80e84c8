//! Admission control: calls are refused by chance while too few succeed (Envoy's `admission_control` filter).

use super::{Ended, Filter, FilterRequest, Outcome, Reply, Step, Verdict, Watch};
use http::StatusCode;
use mesh_xds::resource::AdmissionControlConfig;
use std::{
    borrow::Cow,
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct AdmissionControl {
    config: Arc<AdmissionControlConfig>,
    window: Arc<Window>,
}

/// What calls came to, in the time that is looked at. What outlives a change of others.
#[derive(Debug)]
pub(crate) struct Window(Mutex<Counts>);

#[derive(Debug)]
struct Counts {
    origin: Instant,
    /// Second since `origin`, calls, and those that succeeded; the newest last.
    seconds: VecDeque<(u64, u64, u64)>,
    calls: u64,
    succeeded: u64,
}

/// One call that is counted at its end.
struct Counted {
    config: Arc<AdmissionControlConfig>,
    window: Arc<Window>,
}

impl Window {
    pub(crate) fn new(now: Instant) -> Self {
        Self(Mutex::new(Counts { origin: now, seconds: VecDeque::new(), calls: 0, succeeded: 0 }))
    }

    /// Calls and successes of the last `length`.
    fn counts(&self, length: Duration, now: Instant) -> (u64, u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.forget(length, now);
        (counts.calls, counts.succeeded)
    }

    fn record(&self, succeeded: bool, length: Duration, now: Instant) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.forget(length, now);
        let second = (now - counts.origin).as_secs();
        let second = counts.seconds.back().map_or(second, |(last, ..)| second.max(*last));
        if counts.seconds.back().is_none_or(|(last, ..)| *last != second) {
            counts.seconds.push_back((second, 0, 0));
        }
        let good = u64::from(succeeded);
        if let Some((_, calls, successes)) = counts.seconds.back_mut() {
            (*calls, *successes) = (*calls + 1, *successes + good);
        }
        (counts.calls, counts.succeeded) = (counts.calls + 1, counts.succeeded + good);
    }
}

impl Counts {
    fn forget(&mut self, length: Duration, now: Instant) {
        let second = (now - self.origin).as_secs();
        while let Some(&(at, calls, succeeded)) = self.seconds.front() {
            // Another thread may have looked at the clock later, and counted before.
            if second.saturating_sub(at) < length.as_secs() {
                break;
            }
            self.seconds.pop_front();
            (self.calls, self.succeeded) = (self.calls - calls, self.succeeded - succeeded);
        }
    }
}

/// The probability that a call is refused: Envoy's formula, 0..=1.
fn rejection(config: &AdmissionControlConfig, calls: u64, succeeded: u64) -> f64 {
    let (calls, succeeded) = (calls as f64, succeeded as f64);
    if calls / config.sampling_window.as_secs_f64() < f64::from(config.rps_threshold) {
        return 0.0;
    }
    let share = (calls - succeeded / config.sr_threshold) / (calls + 1.0);
    share.max(0.0).powf(1.0 / config.aggression).min(config.max_rejection_probability)
}

/// Whether a call succeeded by the criteria.
fn succeeded(config: &AdmissionControlConfig, outcome: &Outcome) -> bool {
    match (outcome.ended, outcome.grpc_status) {
        // Of what is not gRPC the head says it, read to the end or not (Envoy).
        (Ended::Cancelled, status) if outcome.status == 0 || status.is_some() => false,
        (_, Some(code)) => config.grpc_success & (1u32.checked_shl(code).unwrap_or(0)) != 0,
        (_, None) => config.http_success.iter().any(|statuses| statuses.contains(&outcome.status)),
    }
}

impl AdmissionControl {
    pub(super) fn new(config: Arc<AdmissionControlConfig>, window: Arc<Window>) -> Self {
        Self { config, window }
    }
}

impl Filter for AdmissionControl {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        let (calls, successes) = self.window.counts(self.config.sampling_window, Instant::now());
        let probability = rejection(&self.config, calls, successes);
        if probability > 0.0 && fastrand::f64() < probability {
            request.explain("admission", || {
                format!("refused with probability {probability:.2}: {successes} of {calls} calls succeeded")
            });
            return Step::Now(Verdict::Answer(Reply::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "denied by admission control",
            )));
        }
        let counted = Counted { config: self.config.clone(), window: self.window.clone() };
        Step::Now(Verdict::Watch(Box::new(counted)))
    }

    fn describe(&self) -> Cow<'_, str> {
        let (calls, successes) = self.window.counts(self.config.sampling_window, Instant::now());
        let refused = rejection(&self.config, calls, successes);
        format!("admission control: {successes} of {calls} calls succeeded, {refused:.2} are refused").into()
    }
}

impl Watch for Counted {
    fn end(&mut self, outcome: &Outcome) {
        let good = succeeded(&self.config, outcome);
        self.window.record(good, self.config.sampling_window, Instant::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> AdmissionControlConfig {
        AdmissionControlConfig {
            max_rejection_probability: 1.0,
            sr_threshold: 0.5,
            ..AdmissionControlConfig::default()
        }
    }

    #[test]
    fn the_probability_is_envoys() {
        assert_eq!(rejection(&config(), 0, 0), 0.0);
        assert_eq!(rejection(&config(), 100, 50), 0.0, "as many as the threshold asks for");
        assert!((rejection(&config(), 99, 0) - 0.99).abs() < 1e-9);
        assert!((rejection(&config(), 99, 25) - 0.49).abs() < 1e-9);
        let steep = AdmissionControlConfig { aggression: 2.0, ..config() };
        assert!((rejection(&steep, 99, 25) - 0.7).abs() < 1e-9);
        let capped = AdmissionControlConfig { max_rejection_probability: 0.8, ..config() };
        assert_eq!(rejection(&capped, 99, 0), 0.8);
        let busy = AdmissionControlConfig { rps_threshold: 4, ..config() };
        assert_eq!((rejection(&busy, 119, 0), rejection(&busy, 120, 0) > 0.9), (0.0, true), "30 s of 4 per second");
    }

    #[test]
    fn a_response_that_is_not_read_to_its_end_counts_by_its_head() {
        let outcome = |status, grpc_status, ended| Outcome { status, grpc_status, ended, took: Duration::ZERO };
        assert!(succeeded(&config(), &outcome(200, None, Ended::Cancelled)));
        assert!(!succeeded(&config(), &outcome(503, None, Ended::Cancelled)));
        assert!(!succeeded(&config(), &outcome(0, None, Ended::Cancelled)), "nobody waited for a head");
        assert!(!succeeded(&config(), &outcome(200, Some(1), Ended::Cancelled)), "gRPC says it in its trailers");
    }

    #[test]
    fn calls_are_forgotten_after_the_window() {
        let start = Instant::now();
        let window = Window::new(start);
        let (at, length) = (|secs| start + Duration::from_secs(secs), Duration::from_secs(10));
        window.record(true, length, at(0));
        window.record(false, length, at(4));
        assert_eq!(window.counts(length, at(9)), (2, 1));
        assert_eq!(window.counts(length, at(10)), (1, 0));
        assert_eq!(window.counts(length, at(14)), (0, 0));
    }

    #[test]
    fn threads_may_count_in_another_order_than_they_looked_at_the_clock() {
        let start = Instant::now();
        let window = Window::new(start);
        let (at, length) = (|secs| start + Duration::from_secs(secs), Duration::from_secs(10));
        window.record(true, length, at(1));
        window.record(false, length, at(0));
        assert_eq!(window.counts(length, at(0)), (2, 1));
        assert_eq!(window.counts(length, at(11)), (0, 0));
    }
}
