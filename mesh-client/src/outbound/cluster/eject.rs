//! Outlier detection at work: what the request path reports and the task that sweeps, applied to the endpoints of a cluster.

use super::{
    Cause, Endpoint, Link, LiveCluster, Writer,
    outlier::{Event, Host, Rules, Verdict, consecutive, release_due, sweep},
};
use crate::{task::Task, time::after};
use mesh_xds::resource::OutlierDetection;
use std::{
    future::Future,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};

/// The task that sweeps. Stops when this is dropped.
pub(super) struct Sweeper {
    _task: Task,
    /// Something was ejected or the configuration changed: look at the clock again.
    wake: Arc<Notify>,
}

/// Metric handles, made once.
pub(super) struct Metrics {
    enforced: [metrics::Counter; Cause::ALL.len()],
    spared: [metrics::Counter; Cause::ALL.len()],
    /// As many as may be were ejected already.
    overflow: [metrics::Counter; Cause::ALL.len()],
    ejected: metrics::Gauge,
}

/// A sweep is never more frequent than this.
const MIN_INTERVAL: Duration = Duration::from_millis(1);

impl<L: Link> LiveCluster<L> {
    /// Brings thresholds and task in line with the configuration. Without outlier detection nobody stays ejected.
    pub(super) fn set_outlier_detection(&self, writer: &mut Writer<L>) {
        let config = writer.cluster.outlier_detection.clone();
        self.thresholds.set(config.as_deref());
        match (config, &writer.sweeper) {
            (Some(_), Some(sweeper)) => sweeper.wake.notify_one(),
            (Some(_), None) => {
                writer.set.all().for_each(|endpoint| endpoint.watch());
                writer.sweeper = Some(Sweeper::start(&self.deps.runtime, self.me.clone()));
            }
            (None, _) => {
                writer.sweeper = None;
                for endpoint in writer.set.all() {
                    endpoint.set_ejection(Default::default());
                }
                self.count_ejected(writer);
            }
        }
    }

    /// An endpoint has completed a row of failures.
    pub(super) fn offended(&self, endpoint: &Endpoint<L>, cause: Cause) {
        let mut writer = self.writer();
        let Some(config) = writer.cluster.outlier_detection.clone() else { return };
        if endpoint.is_retired() {
            return;
        }
        let mut ejection = endpoint.ejection();
        let share = (writer.ejected, writer.set.in_service().count());
        let rules = Rules { config: &config, profile: self.deps.profile };
        let verdict = consecutive(cause, &mut ejection, share, rules, Instant::now(), &mut fastrand::Rng::new());
        if verdict != Verdict::Already {
            self.note(endpoint, cause, verdict, writer.ejected + usize::from(verdict == Verdict::Ejected));
        }
        if verdict == Verdict::Ejected {
            endpoint.set_ejection(ejection);
            self.count_ejected(&mut writer);
            if let Some(sweeper) = &writer.sweeper {
                sweeper.wake.notify_one();
            }
            self.stale.notify_one();
        }
    }

    /// The picker is to be built again.
    pub(super) fn outdated(&self) {
        self.stale.notify_one();
    }

    /// The request to an endpoint on probation has ended.
    #[cold]
    pub(super) fn probed(&self, endpoint: &Endpoint<L>, well: bool) {
        let mut writer = self.writer();
        let mut ejection = endpoint.ejection();
        let Some(config) = writer.cluster.outlier_detection.clone() else { return };
        if !ejection.is_on_probation() || endpoint.is_retired() {
            return;
        }
        if well {
            ejection.acquit();
        } else {
            let (rules, rng) = (Rules { config: &config, profile: self.deps.profile }, &mut fastrand::Rng::new());
            let verdict = consecutive(Cause::FailureAccrual, &mut ejection, (0, 1), rules, Instant::now(), rng);
            self.note(endpoint, Cause::FailureAccrual, verdict, writer.ejected + 1);
        }
        endpoint.set_ejection(ejection);
        if well {
            self.welcome(endpoint);
        }
        self.count_ejected(&mut writer);
        if let Some(sweeper) = &writer.sweeper {
            sweeper.wake.notify_one();
        }
        self.stale.notify_one();
    }

    /// The end of an interval.
    fn sweep(&self, now: Instant, rng: &mut fastrand::Rng) {
        let mut writer = self.writer();
        let Some(config) = writer.cluster.outlier_detection.clone() else { return };
        let endpoints: Vec<_> = writer.set.in_service().cloned().collect();
        let host = |endpoint: &Arc<Endpoint<L>>| {
            let [tally, local] = endpoint.take_tallies();
            Host { ejection: endpoint.ejection(), tally, local }
        };
        let mut hosts: Vec<Host> = endpoints.iter().map(host).collect();
        let events = sweep(&mut hosts, Rules { config: &config, profile: self.deps.profile }, now, rng);
        for (endpoint, host) in endpoints.iter().zip(&hosts) {
            endpoint.set_ejection(host.ejection);
        }
        let mut ejected = writer.ejected;
        for event in &events {
            match *event {
                Event::Detected(i, cause, verdict) => {
                    ejected += usize::from(verdict == Verdict::Ejected);
                    self.note(&endpoints[i], cause, verdict, ejected);
                }
                Event::Returned(i) => self.welcome(&endpoints[i]),
            }
        }
        self.count_ejected(&mut writer);
        if !events.is_empty() {
            self.publish(&writer);
        }
    }

    /// Between two sweeps: those whose time is over.
    fn release(&self, now: Instant) {
        let mut writer = self.writer();
        let Some(config) = writer.cluster.outlier_detection.clone() else { return };
        let ejected: Vec<_> = writer.set.in_service().filter(|e| e.is_ejected()).cloned().collect();
        let mut ejections: Vec<_> = ejected.iter().map(|e| e.ejection()).collect();
        let mut released = Vec::new();
        release_due(ejections.iter_mut(), &config, now, |i| released.push(i));
        for i in released {
            ejected[i].set_ejection(ejections[i]);
            self.welcome(&ejected[i]);
        }
        self.count_ejected(&mut writer);
        self.publish(&writer);
    }

    /// The sweep interval and the earliest end of an ejection; `None` when outlier detection is off.
    fn outlier_times(&self) -> Option<(Duration, Option<Instant>)> {
        let writer = self.writer();
        let config: &OutlierDetection = writer.cluster.outlier_detection.as_deref()?;
        let ends = writer.set.in_service().filter(|e| e.is_ejected()).filter_map(|e| e.ejection().until(config));
        Some((config.interval.max(MIN_INTERVAL), ends.min()))
    }

    pub(super) fn count_ejected(&self, writer: &mut Writer<L>) {
        writer.ejected = writer.set.in_service().filter(|e| e.is_ejected()).count();
        #[allow(clippy::cast_precision_loss, reason = "a count of endpoints")]
        self.metrics.ejected.set(writer.ejected as f64);
    }

    fn note(&self, endpoint: &Endpoint<L>, cause: Cause, verdict: Verdict, ejected: usize) {
        let (cluster, address) = (&*self.name, endpoint.address());
        match verdict {
            Verdict::Ejected => {
                self.metrics.enforced[cause as usize].increment(1);
                tracing::info!(cluster, %address, %cause, ejected, "endpoint ejected");
            }
            Verdict::Spared | Verdict::TooMany => {
                let kept = if verdict == Verdict::TooMany { &self.metrics.overflow } else { &self.metrics.spared };
                kept[cause as usize].increment(1);
                tracing::debug!(cluster, %address, %cause, ?verdict, "outlier not ejected");
            }
            Verdict::Already => {}
        }
    }

    pub(super) fn welcome(&self, endpoint: &Endpoint<L>) {
        endpoint.forgive();
        let (cluster, address) = (&*self.name, endpoint.address());
        if endpoint.ejection().is_on_probation() {
            tracing::debug!(cluster, %address, "ejected endpoint is probed");
        } else {
            tracing::info!(cluster, %address, "ejected endpoint returned");
        }
    }
}

impl Sweeper {
    fn start<L: Link>(runtime: &tokio::runtime::Handle, cluster: Weak<LiveCluster<L>>) -> Self {
        let wake = Arc::new(Notify::new());
        Self { _task: Task::on(runtime, run(cluster, wake.clone())), wake }
    }
}

fn run<L: Link>(cluster: Weak<LiveCluster<L>>, wake: Arc<Notify>) -> impl Future<Output = ()> + Send {
    let mut swept = Instant::now();
    async move {
        while let Some((interval, end)) = cluster.upgrade().and_then(|c| c.outlier_times()) {
            let sweep_at = after(swept, interval);
            let at = end.map_or(sweep_at, |end| end.min(sweep_at));
            tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = wake.notified() => continue,
            }
            let Some(cluster) = cluster.upgrade() else { return };
            let now = Instant::now();
            if now >= sweep_at {
                swept = now;
                cluster.sweep(now, &mut fastrand::Rng::new());
            } else {
                cluster.release(now);
            }
        }
    }
}

impl Metrics {
    pub(super) fn new(cluster: &Arc<str>) -> Self {
        let counters = |enforced: &'static str| {
            Cause::ALL.map(|cause| {
                metrics::counter!("mesh_outlier_detections_total",
                    "cluster" => cluster.to_string(), "cause" => cause.as_str(), "enforced" => enforced)
            })
        };
        Self {
            enforced: counters("true"),
            spared: counters("false"),
            overflow: counters("overflow"),
            ejected: metrics::gauge!("mesh_outlier_ejected_endpoints", "cluster" => cluster.to_string()),
        }
    }
}
