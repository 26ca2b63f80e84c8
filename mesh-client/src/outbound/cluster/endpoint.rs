//! One endpoint, live: its link, its load, and where it stands.

mod findings;

use super::{Link, LinkError, LiveCluster, Placement, link::Connectivity, outlier::Thresholds, rotation::Rotation};
use crate::outbound::{
    connect::{Demand, Subchannel},
    pick::{Candidate, EndpointInfo, Ewma, Latency, Standing},
};
use arc_swap::ArcSwap;
use findings::Findings;
use mesh_xds::resource::{HealthStatus, LocalityId, MetadataValue, WeightedRoundRobin};
use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{
            AtomicBool, AtomicU32,
            Ordering::{Relaxed, SeqCst},
            fence,
        },
    },
};
use tokio::time::Instant;

/// One endpoint of a cluster. Lives as long as its address is in the assignment (or a request holds it), through
/// changes of everything else that is said of it.
///
/// Small, for there may be ten thousand that nobody calls: what only some endpoints need is made when they need it.
#[repr(C)]
pub(crate) struct Endpoint<L: Link = Subchannel> {
    // First what a pick and a request touch, next to the reference count: one cache line.
    in_flight: AtomicU32,
    rotation: Rotation,
    retired: AtomicBool,
    /// It does not pass its health checks.
    failing: AtomicBool,
    latency: Latency,
    /// Absent until a request comes.
    link: OnceLock<Arc<L>>,
    /// Absent until something is to be found out, which is from the start with outlier detection.
    findings: OnceLock<Box<Findings>>,
    placement: ArcSwap<Placement>,
    common: Arc<Common<L>>,
    address: SocketAddr,
    joined: Instant,
}

/// What the endpoints of a cluster share, until its transport changes.
pub(super) struct Common<L: Link> {
    pub(super) cluster: Weak<LiveCluster<L>>,
    /// When the cluster began.
    pub(super) begun: Instant,
    pub(super) connector: Arc<L::Connector>,
    pub(super) thresholds: Arc<Thresholds>,
}

/// The filter whose metadata balancing looks at (Envoy).
const LB_FILTER: &str = "envoy.lb";

impl<L: Link> Endpoint<L> {
    /// `watched`: outlier detection is on.
    pub(super) fn new(
        address: SocketAddr,
        placement: Arc<Placement>,
        common: Arc<Common<L>>,
        watched: bool,
        now: Instant,
    ) -> Arc<Self> {
        let endpoint = Self {
            in_flight: AtomicU32::new(0),
            rotation: Rotation::new(),
            retired: AtomicBool::new(false),
            failing: AtomicBool::new(false),
            latency: Latency::new(common.begun, now),
            link: OnceLock::new(),
            findings: OnceLock::new(),
            placement: ArcSwap::new(placement),
            common,
            address,
            joined: now,
        };
        if watched {
            endpoint.watch();
        }
        Arc::new(endpoint)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Its connection, which is made an idle one by the first who asks.
    #[inline]
    pub(crate) fn link(&self) -> &Arc<L> {
        match self.link.get() {
            Some(link) => link,
            None => self.open(),
        }
    }

    #[cold]
    fn open(&self) -> &Arc<L> {
        let link = self.link.get_or_init(|| {
            let connector = L::variant(&self.common.connector, self.placement.load().said());
            L::open(self.address, &connector)
        });
        // Either this sees that the endpoint has left, or who retires it sees the link.
        fence(SeqCst);
        if self.is_retired() {
            link.drain();
        }
        link
    }

    /// Its connection, if anybody has asked for it.
    pub(super) fn opened(&self) -> Option<&Arc<L>> {
        self.link.get()
    }

    /// The state of its connection.
    #[inline]
    pub(super) fn connectivity(&self) -> Connectivity {
        self.opened().map_or(Connectivity::Idle, |link| link.connectivity())
    }

    /// Whether it is one of this cluster's.
    pub(super) fn is_of(&self, cluster: &LiveCluster<L>) -> bool {
        std::ptr::eq(self.common.cluster.as_ptr(), cluster)
    }

    /// What is asked of its connections, and what they have room for.
    pub(super) fn demand(&self) -> Demand {
        self.opened().map_or_else(Demand::default, |link| link.demand())
    }

    /// What the assignment says of it now.
    pub(crate) fn placement(&self) -> Arc<Placement> {
        self.placement.load_full()
    }

    pub(super) fn set_placement(&self, placement: Arc<Placement>) {
        let failed = |health| matches!(health, HealthStatus::Unhealthy | HealthStatus::Timeout);
        let fails = failed(placement.health);
        let before = self.placement.swap(placement);
        if fails && !failed(before.health) {
            self.unhealthy(true);
        }
    }

    /// It was found to be so: what it is connected by closes, as the cluster says.
    fn unhealthy(&self, drain: bool) {
        if let Some(link) = self.opened() {
            link.unhealthy(drain);
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
        self.opened()?.last_error()
    }

    /// As [`InFlight::of`](super::InFlight::of).
    #[cfg(test)]
    pub(crate) fn start(self: &Arc<Self>) -> super::InFlight<L> {
        super::InFlight::of(self.clone())
    }

    /// Counts a request. True: it is the one that an endpoint on probation takes.
    #[inline]
    pub(super) fn begin(&self) -> bool {
        self.in_flight.fetch_add(1, Relaxed);
        self.rotation.begins()
    }

    /// Ends what [`begin`](Self::begin) began and said.
    #[inline]
    pub(super) fn end(&self, probe: bool) {
        self.in_flight.fetch_sub(1, Relaxed);
        if probe {
            self.give_probe_up();
        }
    }

    /// If it was given up before it told anything, another may find out.
    #[cold]
    fn give_probe_up(&self) {
        if self.rotation.given_up()
            && let Some(cluster) = self.common.cluster.upgrade()
        {
            // A picker that was built meanwhile is without it.
            cluster.outdated();
        }
    }

    /// Whether its health checks hold it out of the rotation.
    pub(super) fn is_failing(&self) -> bool {
        self.failing.load(Relaxed)
    }

    /// Takes it out of the cluster: what still runs ends, nothing new starts.
    pub(super) fn retire(&self) {
        self.retired.store(true, Relaxed);
        if let Some(found) = self.findings.get() {
            found.follower.set(None, |_, _| None);
        }
        fence(SeqCst);
        if let Some(link) = self.opened() {
            link.drain();
        }
    }

    /// Whether it has left the cluster.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Relaxed)
    }

    /// How long its answers take.
    pub(super) fn latency(&self) -> &Latency {
        &self.latency
    }

    /// Whether a session that sticks to it goes on there.
    pub(super) fn can_keep_session(&self) -> bool {
        !self.is_retired() && self.standing(false) > Standing::Unavailable
    }
}

impl<L: Link> Candidate for Endpoint<L> {
    #[inline]
    fn standing(&self, panic: bool) -> Standing {
        match self.connectivity() {
            Connectivity::TransientFailure => Standing::Unavailable,
            _ if !panic && (self.is_failing() || !self.rotation.is_open()) => Standing::Unavailable,
            Connectivity::Connecting => Standing::Connecting,
            Connectivity::Idle | Connectivity::Ready => Standing::Available,
        }
    }

    fn is_ejected(&self) -> bool {
        Self::is_ejected(self) || self.is_failing()
    }

    #[inline]
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

    #[inline]
    fn cost(&self, ewma: &Ewma, now: u64) -> u32 {
        self.latency.cost(self.in_flight(), ewma, now)
    }

    fn reported_weight(&self, config: &WeightedRoundRobin, now: Instant) -> Option<f64> {
        self.findings.get()?.reported.weight(config, now)
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

impl<L: Link> fmt::Debug for Endpoint<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Endpoint")
            .field("address", &self.address)
            .field("link", &self.opened())
            .field("ejected", &self.is_ejected())
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// Ten thousand of them that nobody calls are to fit into little memory.
    #[test]
    fn an_endpoint_that_nobody_calls_is_small() {
        let (size, findings) = (size_of::<Endpoint>(), size_of::<Findings>());
        assert!(size <= 128, "{size} bytes, without {findings} that it may find out");
    }

    #[test]
    fn what_a_pick_and_a_request_read_is_one_cache_line() {
        let counts = 2 * size_of::<usize>();
        assert_eq!(counts + offset_of!(Endpoint, placement), 64);
    }
}
