//! One endpoint, live: its link, its load, and what outlier detection knows of it.

use super::{
    Link, LinkError, LiveCluster,
    health::Health,
    link::Connectivity,
    orca::{Ended, Follower, Report, Reported, Weighed},
    outlier::{Counters, Ejection, Thresholds},
    rotation::{Place, Rotation},
};
use crate::outbound::{
    connect::Subchannel,
    pick::{Candidate, EndpointInfo, Latency, Standing},
};
use arc_swap::ArcSwap;
use mesh_xds::resource::{EndpointHealthCheck, HealthStatus, LocalityId, MetadataValue, PeakEwma, WeightedRoundRobin};
use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{runtime::Handle, time::Instant};

/// One endpoint of a cluster. Lives as long as its address is in the assignment (or a request holds it), through
/// changes of everything else that is said of it.
#[repr(C)]
pub(crate) struct Endpoint<L: Link = Subchannel> {
    // First what a pick and a request touch, next to the reference count: one cache line.
    link: Arc<L>,
    in_flight: AtomicU32,
    rotation: Rotation,
    retired: AtomicBool,
    /// It does not pass its health checks.
    failing: AtomicBool,
    counters: Counters,
    address: SocketAddr,
    placement: ArcSwap<Placement>,
    thresholds: Arc<Thresholds>,
    ejection: Mutex<Ejection>,
    /// And why the last check failed, if it did.
    health: Mutex<(Health, Option<Arc<str>>)>,
    cluster: Weak<LiveCluster<L>>,
    joined: Instant,
    latency: Latency,
    reported: Reported,
    follower: Follower,
}

/// Before reports that broke off are asked for again.
const REPORTS_PAUSE: Duration = Duration::from_secs(1);
/// The filter whose metadata balancing looks at (Envoy).
const LB_FILTER: &str = "envoy.lb";

/// What the assignment says of an endpoint besides its address.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placement {
    /// Its locality.
    pub(crate) locality: Arc<LocalityId>,
    /// 0 is the highest.
    pub(crate) priority: u32,
    /// Within its locality.
    pub(crate) weight: u32,
    /// As the control plane sees it.
    pub(crate) health: HealthStatus,
    /// How it is to be checked, where it says so.
    pub(crate) health_check: Option<Arc<EndpointHealthCheck>>,
    /// Or empty.
    pub(crate) hostname: Arc<str>,
    /// `metadata.filter_metadata`.
    pub(crate) metadata: Option<Arc<BTreeMap<String, BTreeMap<String, MetadataValue>>>>,
}

/// How a request ended, as outlier detection counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Anything but the following; a 4xx too.
    Success,
    /// A 5xx that is not a gateway failure, or the gRPC status that stands for one.
    ServerError,
    /// 502, 503, 504, UNAVAILABLE or DEADLINE_EXCEEDED, from the endpoint.
    GatewayFailure,
    /// No answer: connection refused or reset, timeout. Counts as a gateway failure (Envoy, unless
    /// `split_external_local_origin_errors`).
    LocalOrigin,
}

/// Counts one request against its endpoint until dropped.
#[must_use = "dropping it ends the request"]
pub(crate) struct InFlight<L: Link = Subchannel> {
    endpoint: Arc<Endpoint<L>>,
    recorded: bool,
    /// It is the one request of an endpoint on probation.
    probe: bool,
}

impl<L: Link> Endpoint<L> {
    pub(crate) fn new(
        address: SocketAddr,
        link: Arc<L>,
        placement: Placement,
        thresholds: Arc<Thresholds>,
        cluster: Weak<LiveCluster<L>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            address,
            link,
            placement: ArcSwap::from_pointee(placement),
            rotation: Rotation::new(),
            in_flight: AtomicU32::new(0),
            counters: Counters::default(),
            thresholds,
            ejection: Mutex::default(),
            health: Mutex::new((Health::unknown(), None)),
            failing: AtomicBool::new(false),
            retired: AtomicBool::new(false),
            cluster,
            joined: Instant::now(),
            latency: Latency::new(Instant::now()),
            reported: Reported::new(Instant::now()),
            follower: Follower::default(),
        })
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its connection.
    pub(crate) fn link(&self) -> &Arc<L> {
        &self.link
    }

    /// Whether it is one of this cluster's.
    pub(super) fn is_of(&self, cluster: &LiveCluster<L>) -> bool {
        std::ptr::eq(self.cluster.as_ptr(), cluster)
    }

    /// What the assignment says of it now.
    pub(crate) fn placement(&self) -> Arc<Placement> {
        self.placement.load_full()
    }

    pub(super) fn set_placement(&self, placement: Placement) {
        let failed = matches!(placement.health, HealthStatus::Unhealthy | HealthStatus::Timeout);
        let before = self.placement.swap(Arc::new(placement));
        if failed && !matches!(before.health, HealthStatus::Unhealthy | HealthStatus::Timeout) {
            self.link.unhealthy(true);
        }
    }

    /// Whether outlier detection holds it out of the rotation.
    pub(crate) fn is_ejected(&self) -> bool {
        self.rotation.is_out()
    }

    /// Whether a request that was picked for it may go there: an endpoint on probation takes one.
    #[inline]
    pub(super) fn admits(&self) -> bool {
        self.rotation.admits()
    }

    /// Whether it is on probation, or the request that decides is under way.
    pub(crate) fn is_on_probation(&self) -> bool {
        self.rotation.is_on_probation()
    }

    /// Requests started and not yet ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.in_flight.load(Relaxed)
    }

    /// Why it last failed to connect, if it did.
    pub(crate) fn last_error(&self) -> Option<LinkError> {
        self.link.last_error()
    }

    /// As [`InFlight::of`].
    #[cfg(test)]
    pub(crate) fn start(self: &Arc<Self>) -> InFlight<L> {
        InFlight::of(self.clone())
    }

    /// The weight that its reports give it.
    pub(super) fn weighed(&self, config: &WeightedRoundRobin, now: Instant) -> Weighed {
        self.reported.weighed(config, now)
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The ejection record. Written under the cluster's writer lock only.
    pub(super) fn ejection(&self) -> Ejection {
        *self.ejection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_ejection(&self, ejection: Ejection) {
        *self.ejection.lock().unwrap_or_else(PoisonError::into_inner) = ejection;
        let place = match ejection {
            _ if ejection.is_ejected() => Place::Out,
            _ if ejection.is_on_probation() => Place::Probation,
            _ => Place::In,
        };
        if self.rotation.set(place) {
            self.link.unhealthy(false);
        }
    }

    /// What its health checks say. Written under the cluster's writer lock only.
    pub(super) fn health(&self) -> Health {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).0
    }

    /// Why its last health check failed, if it did.
    pub(super) fn ailment(&self) -> Option<Arc<str>> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }

    /// `ailment`: why the last check failed, if it did.
    pub(super) fn set_health(&self, health: Health, ailment: Option<Arc<str>>) {
        *self.health.lock().unwrap_or_else(PoisonError::into_inner) = (health, ailment);
        if !self.failing.swap(health.is_failing(), Relaxed) && health.is_failing() {
            self.link.unhealthy(true);
        }
    }

    /// Whether its health checks hold it out of the rotation.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Relaxed)
    }

    /// Takes it out of the cluster: what still runs ends, nothing new starts.
    pub(super) fn retire(&self) {
        self.retired.store(true, Relaxed);
        self.follower.set(None, |_, _| None);
        self.link.drain();
    }

    /// Whether it has left the cluster.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Relaxed)
    }

    /// How long its answers take.
    pub(super) fn latency(&self) -> &Latency {
        &self.latency
    }

    /// It said how it is.
    pub(super) fn report(&self, report: &Report, config: &WeightedRoundRobin) {
        self.reported.take(report, config, Instant::now());
    }

    /// Follows its reports while it is connected, by this configuration; `None`: no longer.
    pub(super) fn follow(self: &Arc<Self>, config: Option<&Arc<WeightedRoundRobin>>, runtime: &Handle) {
        self.follower.set(config, |config, period| {
            let ready = self.link.connectivity() == Connectivity::Ready;
            ready.then(|| runtime.spawn(follow(Arc::downgrade(self), config.clone(), period)).abort_handle())
        });
    }

    /// Whether a session that sticks to it goes on there.
    pub(super) fn can_keep_session(&self) -> bool {
        !self.is_retired() && self.standing(false) > Standing::Unavailable
    }

    fn record(&self, outcome: Outcome, probe: bool) {
        let causes = self.counters.record(outcome, &self.thresholds);
        if self.is_on_probation() {
            // What was sent before, or in a panic, decides nothing.
            if probe && let Some(cluster) = self.cluster.upgrade() {
                cluster.probed(self, !outcome.is_failure());
            }
            return;
        }
        for cause in causes.into_iter().flatten() {
            if let Some(cluster) = self.cluster.upgrade() {
                cluster.offended(self, cause);
            }
        }
    }
}

impl<L: Link> Candidate for Endpoint<L> {
    fn standing(&self, panic: bool) -> Standing {
        match self.link.connectivity() {
            Connectivity::TransientFailure => Standing::Unavailable,
            _ if !panic && (self.is_failing() || !self.rotation.is_open()) => Standing::Unavailable,
            Connectivity::Connecting => Standing::Connecting,
            Connectivity::Idle | Connectivity::Ready => Standing::Available,
        }
    }

    fn is_ejected(&self) -> bool {
        Self::is_ejected(self) || self.is_failing()
    }

    fn load(&self) -> u32 {
        self.in_flight()
    }

    fn address(&self) -> SocketAddr {
        self.address
    }

    fn hash_key(&self, use_hostname: bool) -> String {
        let placement = self.placement.load();
        let metadata = placement.metadata.as_ref().and_then(|metadata| metadata.get(LB_FILTER));
        match metadata.and_then(|values| values.get("hash_key")) {
            Some(MetadataValue::String(key)) if !key.is_empty() => key.clone(),
            _ if use_hostname && !placement.hostname.is_empty() => placement.hostname.to_string(),
            _ => self.address.to_string(),
        }
    }

    fn joined(&self) -> Instant {
        self.joined
    }

    fn cost(&self, config: &PeakEwma, now: Instant) -> f64 {
        self.latency.cost(self.in_flight(), config, now)
    }

    fn reported_weight(&self, config: &WeightedRoundRobin, now: Instant) -> Option<f64> {
        self.reported.weight(config, now)
    }

    fn locality(&self) -> LocalityId {
        LocalityId::clone(&self.placement.load().locality)
    }

    fn lb_metadata(&self) -> BTreeMap<String, MetadataValue> {
        let placement = self.placement.load();
        placement.metadata.as_ref().and_then(|metadata| metadata.get(LB_FILTER)).cloned().unwrap_or_default()
    }

    fn info(&self, locality_weight: u32) -> EndpointInfo {
        let placement = self.placement.load();
        EndpointInfo {
            address: self.address,
            hostname: placement.hostname.clone(),
            weight: placement.weight,
            locality: placement.locality.clone(),
            locality_weight,
            metadata: placement.metadata.clone(),
        }
    }
}

/// Ends when the connection does: with the next one it is begun again.
async fn follow<L: Link>(endpoint: Weak<Endpoint<L>>, config: Arc<WeightedRoundRobin>, period: Duration) {
    while let Some(live) = endpoint.upgrade() {
        let (link, address) = (live.link.clone(), live.address);
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

impl Outcome {
    /// Of an HTTP response's status code.
    pub(crate) fn of_http(status: http::StatusCode) -> Self {
        match status.as_u16() {
            502..=504 => Self::GatewayFailure,
            500..=599 => Self::ServerError,
            _ => Self::Success,
        }
    }

    /// Of a gRPC status code, by the HTTP status that Envoy puts for it: UNKNOWN, INTERNAL and DATA_LOSS 500,
    /// UNIMPLEMENTED 501, UNAVAILABLE 503, DEADLINE_EXCEEDED 504. (gRFC A50 counts every status but OK as a failure,
    /// so that callers who ask for what does not exist eject healthy endpoints.)
    pub(crate) fn of_grpc(code: tonic::Code) -> Self {
        use tonic::Code;
        match code {
            Code::Unavailable | Code::DeadlineExceeded => Self::GatewayFailure,
            Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => Self::ServerError,
            _ => Self::Success,
        }
    }

    /// Whether it counts as a failure.
    pub(crate) fn is_failure(self) -> bool {
        self != Self::Success
    }
}

impl<L: Link> InFlight<L> {
    /// Starts a request to `endpoint`.
    pub(crate) fn of(endpoint: Arc<Endpoint<L>>) -> Self {
        endpoint.in_flight.fetch_add(1, Relaxed);
        let probe = endpoint.rotation.begins();
        Self { endpoint, recorded: false, probe }
    }

    /// The endpoint.
    pub(crate) fn endpoint(&self) -> &Arc<Endpoint<L>> {
        &self.endpoint
    }

    /// Tells outlier detection how the request ended; only the first call counts. A request that is dropped without
    /// this (cancelled by its caller) is not counted.
    pub(crate) fn record(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.recorded, true) {
            self.endpoint.record(outcome, self.probe);
        }
    }
}

impl<L: Link> Drop for InFlight<L> {
    fn drop(&mut self) {
        self.endpoint.in_flight.fetch_sub(1, Relaxed);
        // What it told has decided; a probe that is under way now is another.
        if self.probe
            && !self.recorded
            && self.endpoint.rotation.given_up()
            && let Some(cluster) = self.endpoint.cluster.upgrade()
        {
            // A picker that was built meanwhile is without it.
            cluster.outdated();
        }
    }
}

impl<L: Link> fmt::Debug for Endpoint<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("address", &self.address)
            .field("link", &self.link)
            .field("ejected", &self.is_ejected())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

impl<L: Link> fmt::Debug for InFlight<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight").field("endpoint", &self.endpoint.address).field("recorded", &self.recorded).finish()
    }
}
