//! What is found out about an endpoint: by outlier detection, health checks, and its own reports.

use super::Endpoint;
use crate::outbound::cluster::{
    Link, Outcome,
    health::Health,
    link::Connectivity,
    orca::{Ended, Follower, Report, Reported, Weighed},
    outlier::{Counters, Ejection, Tally},
    rotation::Place,
};
use mesh_xds::resource::WeightedRoundRobin;
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak, atomic::Ordering::Relaxed},
    time::Duration,
};
use tokio::{runtime::Handle, time::Instant};

/// What outlier detection, health checks and load reports found out about an endpoint.
pub(super) struct Findings {
    counters: Counters,
    ejection: Mutex<Ejection>,
    /// And why the last check failed, if it did.
    health: Mutex<(Health, Option<Arc<str>>)>,
    pub(super) reported: Reported,
    pub(super) follower: Follower,
}

/// Before reports that broke off are asked for again.
const REPORTS_PAUSE: Duration = Duration::from_secs(1);

impl<L: Link> Endpoint<L> {
    /// Outlier detection looks at it from now on.
    pub(crate) fn watch(&self) {
        self.findings();
    }

    fn findings(&self) -> &Findings {
        self.findings.get_or_init(Box::default)
    }

    /// What was counted since the last time.
    pub(crate) fn take_tallies(&self) -> [Tally; 2] {
        self.findings.get().map_or_else(Default::default, |found| found.counters.take())
    }

    /// Forgets rows of failures.
    pub(crate) fn forgive(&self) {
        if let Some(found) = self.findings.get() {
            found.counters.forgive();
        }
    }

    /// The ejection record. Written under the cluster's writer lock only.
    pub(crate) fn ejection(&self) -> Ejection {
        self.findings.get().map_or_else(Ejection::default, |found| *locked(&found.ejection))
    }

    pub(crate) fn set_ejection(&self, ejection: Ejection) {
        if ejection != Ejection::default() || self.findings.get().is_some() {
            *locked(&self.findings().ejection) = ejection;
        }
        let place = match ejection {
            _ if ejection.is_ejected() => Place::Out,
            _ if ejection.is_on_probation() => Place::Probation,
            _ => Place::In,
        };
        if self.rotation.set(place) {
            self.unhealthy(false);
        }
    }

    /// What its health checks say. Written under the cluster's writer lock only.
    pub(crate) fn health(&self) -> Health {
        self.findings.get().map_or_else(Health::unknown, |found| locked(&found.health).0)
    }

    /// Why its last health check failed, if it did.
    pub(crate) fn ailment(&self) -> Option<Arc<str>> {
        locked(&self.findings.get()?.health).1.clone()
    }

    /// `ailment`: why the last check failed, if it did.
    pub(crate) fn set_health(&self, health: Health, ailment: Option<Arc<str>>) {
        if health != Health::unknown() || self.findings.get().is_some() {
            *locked(&self.findings().health) = (health, ailment);
        }
        if !self.failing.swap(health.is_failing(), Relaxed) && health.is_failing() {
            self.unhealthy(true);
        }
    }

    /// It said how it is.
    pub(crate) fn report(&self, report: &Report, config: &WeightedRoundRobin) {
        self.findings().reported.take(report, config, Instant::now());
    }

    /// The weight that its reports give it.
    pub(crate) fn weighed(&self, config: &WeightedRoundRobin, now: Instant) -> Weighed {
        self.findings.get().map_or(Weighed::NotYet, |found| found.reported.weighed(config, now))
    }

    /// Follows its reports while it is connected, by this configuration; `None`: no longer.
    pub(crate) fn follow(self: &Arc<Self>, config: Option<&Arc<WeightedRoundRobin>>, runtime: &Handle) {
        if config.is_none() && self.findings.get().is_none() {
            return;
        }
        self.findings().follower.set(config, |config, period| {
            let ready = self.connectivity() == Connectivity::Ready;
            ready.then(|| runtime.spawn(follow(Arc::downgrade(self), config.clone(), period)).abort_handle())
        });
    }

    /// A request ended so. `probe`: it was the one that an endpoint on probation takes.
    #[inline]
    pub(crate) fn record(&self, outcome: Outcome, probe: bool) {
        // Outlier detection is off.
        let Some(found) = self.findings.get() else { return };
        let causes = found.counters.record(outcome, &self.common.thresholds);
        if self.is_on_probation() {
            // What was sent before, or in a panic, decides nothing.
            if probe && let Some(cluster) = self.common.cluster.upgrade() {
                cluster.probed(self, !outcome.is_failure());
            }
            return;
        }
        for cause in causes.into_iter().flatten() {
            if let Some(cluster) = self.common.cluster.upgrade() {
                cluster.offended(self, cause);
            }
        }
    }
}

/// Ends when the connection does: with the next one it is begun again.
async fn follow<L: Link>(endpoint: Weak<Endpoint<L>>, config: Arc<WeightedRoundRobin>, period: Duration) {
    while let Some(live) = endpoint.upgrade() {
        let (link, address) = (live.link().clone(), live.address);
        drop(live);
        let take = |report: &Report| {
            if let Some(endpoint) = endpoint.upgrade() {
                endpoint.report(report, &config);
            }
        };
        match link.reports(address, period, take).await {
            Ended::NotConnected => return,
            Ended::NotServed => {
                tracing::debug!(%address, "the endpoint does not stream load reports");
                return std::future::pending().await;
            }
            Ended::Broken => tokio::time::sleep(REPORTS_PAUSE).await,
        }
    }
}

impl Default for Findings {
    fn default() -> Self {
        Self {
            counters: Counters::default(),
            ejection: Mutex::default(),
            health: Mutex::new((Health::unknown(), None)),
            reported: Reported::new(Instant::now()),
            follower: Follower::default(),
        }
    }
}

fn locked<T>(value: &Mutex<T>) -> MutexGuard<'_, T> {
    value.lock().unwrap_or_else(PoisonError::into_inner)
}
