//! What the project's own benchmarks call. Not part of the public interface: may change at any time.

mod routes;

pub use routes::{RouteBench, RoutePattern};

use crate::outbound::{
    cluster::{
        Breaker, CheckTarget, ClusterDeps, Connectivity, Ended, Endpoint, Failed, InFlight, Link, LinkError,
        LiveCluster, Outcome, Pick, Report, Resource,
    },
    pick::PickInput,
};
use mesh_xds::resource::{self, Cluster, ClusterLoadAssignment, LbPolicy, OutlierDetection, RoutingPriority};
use std::{
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::{
    runtime::{Builder, Runtime},
    sync::watch,
};

/// Picks among `n` connected endpoints, as a request does: pointer load, policy, handle to the endpoint.
#[derive(Debug)]
pub struct PickBench {
    cluster: Arc<LiveCluster<Connected>>,
    now: tokio::time::Instant,
    _runtime: Runtime,
}

/// An assignment of `n` endpoints in which one changes at a time.
#[derive(Debug)]
pub struct ApplyBench {
    cluster: Arc<LiveCluster<Connected>>,
    config: Arc<Cluster>,
    assignment: Arc<ClusterLoadAssignment>,
    round: u32,
    _runtime: Runtime,
}

/// What every request counts: the breaker, the outcome for outlier detection.
#[derive(Debug)]
pub struct CountBench {
    breaker: Arc<Breaker>,
    endpoint: Arc<Endpoint<Connected>>,
    _picks: PickBench,
}

impl CountBench {
    /// # Panics
    /// If the runtime cannot be made.
    pub fn new() -> Self {
        let picks = PickBench::new(LbPolicy::RoundRobin, 3);
        let outliers = Cluster {
            outlier_detection: Some(Arc::new(OutlierDetection::default())),
            ..Cluster::fixed("bench", assignment(3))
        };
        picks.cluster.update(Arc::new(outliers), assignment(3));
        let Pick::Endpoint(endpoint) = picks.cluster.pick(&PickInput::plain(picks.now), &[], &mut fastrand::Rng::new())
        else {
            unreachable!("all are connected");
        };
        Self { breaker: picks.cluster.breaker().clone(), endpoint, _picks: picks }
    }

    /// A unit of `max_requests`, taken and given back.
    pub fn admit(&self) {
        if self.breaker.take(RoutingPriority::Default, Resource::Requests).is_ok() {
            self.breaker.give_back(RoutingPriority::Default, Resource::Requests);
        }
    }

    /// A request in flight to an endpoint, and how it ended.
    pub fn outcome(&self, failed: bool) {
        let outcome = if failed { Outcome::ServerError } else { Outcome::Success };
        InFlight::of(self.endpoint.clone()).record(outcome);
    }
}

impl Default for CountBench {
    fn default() -> Self {
        Self::new()
    }
}

/// A link that is always ready.
#[derive(Debug)]
struct Connected;

#[derive(Debug)]
struct NoConnector(watch::Sender<u64>);

const BASE: u32 = u32::from_be_bytes([10, 0, 0, 0]);
const PORT: u16 = 50051;

impl PickBench {
    /// # Panics
    /// If the runtime cannot be made.
    pub fn new(policy: LbPolicy, n: usize) -> Self {
        let runtime = runtime();
        let endpoints = assignment(n);
        let config = Arc::new(Cluster { lb_policy: policy, ..Cluster::fixed("bench", endpoints.clone()) });
        let weighted = matches!(config.lb_policy, LbPolicy::WeightedRoundRobin(_));
        let cluster = LiveCluster::new(config.clone(), endpoints, deps(&runtime));
        let this = Self { cluster, now: tokio::time::Instant::now(), _runtime: runtime };
        if weighted {
            this.report(&config, n);
        }
        this
    }

    /// Every endpoint reports a load of its own, and the picker takes the weights that follow.
    fn report(&self, config: &Cluster, n: usize) {
        for _ in 0..n {
            if let Pick::Endpoint(endpoint) =
                self.cluster.pick(&PickInput::plain(self.now), &[], &mut fastrand::Rng::new())
            {
                let load = 1 + position(endpoint.address()) % 9;
                let text = format!("TEXT application_utilization=0.{load},rps_fractional=100");
                let header = (http::HeaderName::from_static("endpoint-load-metrics"), text.parse().expect("a header"));
                let report = Report::of(&[header].into_iter().collect()).expect("a report");
                self.cluster.reported(&endpoint, &report);
            }
        }
        self.cluster.update(Arc::new(config.clone()), assignment(n));
    }

    /// Where the endpoint picked lies in memory: nothing of it is read that the pick did not read.
    pub fn pick(&self) -> usize {
        match self.cluster.pick(&PickInput::plain(self.now), &[], &mut fastrand::Rng::new()) {
            Pick::Endpoint(endpoint) => Arc::as_ptr(&endpoint).addr(),
            Pick::Fail(_) => 0,
        }
    }
}

impl ApplyBench {
    /// # Panics
    /// If the runtime cannot be made.
    pub fn new(policy: LbPolicy, n: usize) -> Self {
        let runtime = runtime();
        let assignment = assignment(n);
        let config = Arc::new(Cluster { lb_policy: policy, ..Cluster::fixed("bench", assignment.clone()) });
        let cluster = LiveCluster::new(config.clone(), assignment.clone(), deps(&runtime));
        Self { cluster, config, assignment, round: 0, _runtime: runtime }
    }

    /// The next assignment, in which one endpoint has another address. Made here so that it is not measured with [`Self::apply`].
    ///
    /// # Panics
    /// If there is no endpoint.
    pub fn next_assignment(&mut self) -> Arc<ClusterLoadAssignment> {
        self.round += 1;
        let mut next = (*self.assignment).clone();
        let endpoints = &mut next.priorities[0][0].endpoints;
        let changed = self.round as usize % endpoints.len();
        endpoints[changed].address = SocketAddr::from((Ipv4Addr::from(BASE + (1 << 20) + self.round), PORT));
        self.assignment = Arc::new(next);
        self.assignment.clone()
    }

    /// Applies it, until picks use it.
    pub fn apply(&self, next: Arc<ClusterLoadAssignment>) {
        self.cluster.update(self.config.clone(), next);
    }
}

impl Link for Connected {
    type Connector = NoConnector;
    type Kept = ();

    fn open(_: SocketAddr, _: &Arc<NoConnector>) -> Arc<Self> {
        Arc::new(Self)
    }

    fn changes(connector: &NoConnector) -> watch::Receiver<u64> {
        connector.0.subscribe()
    }

    fn connectivity(&self) -> Connectivity {
        Connectivity::Ready
    }

    fn last_error(&self) -> Option<LinkError> {
        None
    }

    fn drain(&self) {}

    fn is_used(_: &Self::Connector) -> bool {
        true
    }

    fn check<'a>(
        _: &'a Arc<Self::Connector>,
        _: &'a CheckTarget,
        (): &'a mut (),
    ) -> Pin<Box<dyn Future<Output = Result<(), Failed>> + Send + 'a>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn unhealthy(&self, _: bool) {}

    async fn reports(&self, _: SocketAddr, _: Duration, _: impl Fn(&Report) + Send + Sync) -> Ended {
        Ended::NotServed
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_time().build().expect("a runtime without I/O needs nothing of the system")
}

fn deps(runtime: &Runtime) -> ClusterDeps<Connected> {
    let connector = |_: &Cluster, _: &Arc<Breaker>| Arc::new(NoConnector(watch::Sender::new(0)));
    let profile = crate::Profile::Grpc;
    let runtime = runtime.handle().clone();
    ClusterDeps { connector: Arc::new(connector), runtime, profile, balancing: Arc::default(), weights: None }
}

fn assignment(n: usize) -> Arc<ClusterLoadAssignment> {
    let end = BASE + u32::try_from(n).unwrap_or(u32::MAX >> 8);
    let endpoints =
        (BASE..end).map(|ip| resource::Endpoint::new(SocketAddr::from((Ipv4Addr::from(ip), PORT)))).collect();
    Arc::new(ClusterLoadAssignment::of("bench", endpoints))
}

fn position(address: SocketAddr) -> usize {
    match address {
        SocketAddr::V4(address) => (u32::from(*address.ip()) - BASE) as usize,
        SocketAddr::V6(_) => usize::MAX,
    }
}
