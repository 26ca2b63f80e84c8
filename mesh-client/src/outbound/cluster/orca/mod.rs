//! What endpoints say of their load (ORCA): with their responses (gRFC A58), or in a stream of its own (gRFC A51).

mod numbers;
mod report;
mod stream;

pub(crate) use numbers::{Weighed, WeightNumbers};
pub(crate) use report::Report;
pub(crate) use stream::{Ended, follow};

use mesh_xds::resource::WeightedRoundRobin;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{task::AbortHandle, time::Instant};

/// The weight that an endpoint's reports give it (gRFC A58). Lock free: written by reports, read when pickers are built.
#[derive(Debug)]
pub(super) struct Reported {
    /// As the bits of an `f64`; 0: none.
    weight: AtomicU64,
    /// When the last one came, and the first of an unbroken row: nanoseconds since `born`, plus 1; 0: never.
    last: AtomicU64,
    since: AtomicU64,
    born: Instant,
}

/// The task that follows the reports of an endpoint. Stops when this is dropped.
#[derive(Debug, Default)]
pub(super) struct Follower(Mutex<Option<Following>>);

#[derive(Debug)]
struct Following {
    task: AbortHandle,
    config: Arc<WeightedRoundRobin>,
}

impl Reported {
    pub(super) fn new(now: Instant) -> Self {
        let never = || AtomicU64::new(0);
        Self { weight: never(), last: never(), since: never(), born: now }
    }

    /// A report came. One that gives no weight is as none.
    pub(super) fn take(&self, report: &Report, config: &WeightedRoundRobin, now: Instant) {
        let Some(weight) = report.weight(config) else { return };
        let at = self.at(now);
        let last = self.last.swap(at, Relaxed);
        if last == 0 || Duration::from_nanos(at.saturating_sub(last)) >= config.expiration {
            self.since.store(at, Relaxed);
        }
        self.weight.store(weight.to_bits(), Relaxed);
    }

    /// `None`: there is none, it is too old, or the endpoint reports for too short a time.
    pub(super) fn weight(&self, config: &WeightedRoundRobin, now: Instant) -> Option<f64> {
        let (at, last) = (self.at(now), self.last.load(Relaxed));
        let age = |then: u64| Duration::from_nanos(at.saturating_sub(then));
        if last == 0 || age(last) >= config.expiration || age(self.since.load(Relaxed)) < config.blackout {
            return None;
        }
        Some(f64::from_bits(self.weight.load(Relaxed)))
    }

    /// The same, and why there is none.
    pub(super) fn weighed(&self, config: &WeightedRoundRobin, now: Instant) -> Weighed {
        if let Some(weight) = self.weight(config, now) {
            return Weighed::Usable(weight);
        }
        let (at, last) = (self.at(now), self.last.load(Relaxed));
        let old = last != 0 && Duration::from_nanos(at.saturating_sub(last)) >= config.expiration;
        if old { Weighed::Stale } else { Weighed::NotYet }
    }

    fn at(&self, now: Instant) -> u64 {
        let age = now.saturating_duration_since(self.born).as_nanos();
        u64::try_from(age).unwrap_or(u64::MAX).saturating_add(1)
    }
}

impl Follower {
    /// Follows by this configuration from now on, if it has a period; `start` is called when there is no task that does.
    pub(super) fn set(
        &self,
        config: Option<&Arc<WeightedRoundRobin>>,
        start: impl FnOnce(&Arc<WeightedRoundRobin>, Duration) -> Option<AbortHandle>,
    ) {
        let wanted = config.and_then(|config| Some((config, config.oob_period?)));
        let mut following = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same =
            |f: &Following| wanted.is_some_and(|(config, _)| Arc::ptr_eq(&f.config, config) || f.config == *config);
        if following.as_ref().is_some_and(|f| same(f) && !f.task.is_finished()) {
            return;
        }
        if let Some(old) = following.take() {
            old.task.abort();
        }
        *following = wanted.and_then(|(config, period)| {
            let task = start(config, period)?;
            Some(Following { task, config: config.clone() })
        });
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.set(None, |_, _| None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(utilization: f64) -> Report {
        Report { application_utilization: utilization, rps_fractional: 100.0, ..Report::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn a_weight_counts_after_the_blackout_until_it_expires() {
        let config = WeightedRoundRobin::default();
        let start = Instant::now();
        let reported = Reported::new(start);
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(reported.weight(&config, at(0)), None);
        reported.take(&report(0.5), &config, at(1));
        assert_eq!(reported.weight(&config, at(10)), None, "the blackout is not over");
        assert_eq!(reported.weight(&config, at(11)), Some(200.0));
        reported.take(&report(0.25), &config, at(12));
        assert_eq!(reported.weight(&config, at(12)), Some(400.0));
        reported.take(&report(0.0), &config, at(100));
        assert_eq!(reported.weight(&config, at(191)), Some(400.0), "a report without utilization is none");
        assert_eq!(reported.weight(&config, at(192)), None, "expired");
        reported.take(&report(0.5), &config, at(300));
        assert_eq!(reported.weight(&config, at(301)), None, "the blackout begins again");
        assert_eq!(reported.weight(&config, at(310)), Some(200.0));
    }

    #[tokio::test]
    async fn reports_are_followed_anew_when_the_configuration_changes() {
        let (follower, starts) = (Follower::default(), std::cell::Cell::new(0));
        let set = |config: &WeightedRoundRobin| {
            follower.set(Some(&Arc::new(config.clone())), |_, _| {
                starts.set(starts.get() + 1);
                Some(tokio::spawn(std::future::pending::<()>()).abort_handle())
            });
            starts.get()
        };
        let mut config = WeightedRoundRobin { oob_period: Some(Duration::from_secs(10)), ..Default::default() };
        assert_eq!((set(&config), set(&config)), (1, 1));
        config.error_penalty = 3.0;
        assert_eq!((set(&config), set(&config)), (2, 2));
        config.utilization_metrics = vec!["named_metrics.queue".into()];
        assert_eq!((set(&config), set(&config)), (3, 3));
        config.oob_period = None;
        assert_eq!(set(&config), 3);
        config.oob_period = Some(Duration::from_secs(10));
        assert_eq!(set(&config), 4, "it had ended");
    }
}
