//! One cluster, live: its endpoints, who of them is picked, what may be in flight, and who is held out.
//!
//! The configuration arrives as [`mesh_xds::resource`] values and is compared with what is in force; connections, load and ejections
//! survive every change that does not concern them. A request costs one pointer load for the pick, and an atomic add
//! each for the breaker, the load and the outcome.

mod again;
mod aggregate;
mod balancing;
mod breaker;
mod eject;
mod endpoint;
mod failfast;
mod health;
mod in_flight;
mod layer;
mod link;
mod load;
mod orca;
pub(crate) mod outlier;
mod placement;
mod rotation;
mod set;
mod status;
mod watcher;

pub(crate) use again::Avoid;
pub(crate) use aggregate::{Rules as AggregateRules, choose as choose_leaf, leave_behind};
pub(crate) use balancing::{Answered, Balancing, Want};
pub use breaker::Overloaded;
pub(crate) use breaker::{Breaker, Permit, Resource};
pub(crate) use endpoint::Endpoint;
pub(crate) use health::{CheckTarget, Failed};
pub(crate) use in_flight::{InFlight, Outcome};
pub use layer::{CircuitBreaker, CircuitBreakerLayer, Limits, ResponseBody, ResponseFuture};
pub(crate) use link::{Connectivity, ConnectorFactory, Link, LinkError};
pub use load::ChannelLoad;
pub(crate) use orca::{Ended, Report, WeightNumbers};
pub(crate) use outlier::Cause;
pub(crate) use placement::Placement;

use crate::{
    outbound::{
        connect::Subchannel,
        pick::{Candidate, PickInput, Turn},
        retry::RetryBudget,
        route::Profile,
    },
    task::Task,
};
use arc_swap::ArcSwap;
use balancing::{Cut, View, Wants};
use eject::{Metrics, Sweeper};
use endpoint::Common;
use mesh_xds::resource::{Cluster, ClusterLoadAssignment, DropOverload, RoutingPriority};
use outlier::Thresholds;
use set::EndpointSet;
use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};
use tokio::{sync::Notify, time::Instant};

/// What a cluster needs from its surroundings.
pub(crate) struct ClusterDeps<L: Link = Subchannel> {
    /// Makes what its links share.
    pub(crate) connector: ConnectorFactory<L>,
    /// Runs its tasks.
    pub(crate) runtime: tokio::runtime::Handle,
    /// Whose rules hold for what concerns no single request: outlier detection, priorities, panic.
    pub(crate) profile: Profile,
    /// What balancing has from the mesh.
    pub(crate) balancing: Arc<Balancing>,
    /// What is counted of the weights that endpoints report.
    pub(crate) weights: Option<WeightNumbers>,
}

/// One cluster. Dropping it stops its task and drains its connections.
pub(crate) struct LiveCluster<L: Link = Subchannel> {
    name: Arc<str>,
    me: Weak<Self>,
    /// Read by every request.
    view: ArcSwap<View<L>>,
    /// Held by whoever changes anything; never by a request that goes well.
    writer: Mutex<Writer<L>>,
    breaker: Arc<Breaker>,
    thresholds: Arc<Thresholds>,
    turn: Arc<Turn>,
    begun: Instant,
    deps: ClusterDeps<L>,
    /// By priority.
    budgets: [Arc<RetryBudget>; 2],
    /// A rebuild is due.
    stale: Arc<Notify>,
    metrics: Metrics,
    /// The assignment has a `drop_overload`.
    drops: AtomicBool,
    /// Calls that would have to wait for a connection fail at once.
    stalled: AtomicBool,
    wants: Wants,
}

struct Writer<L: Link> {
    cluster: Arc<Cluster>,
    connector: Arc<L::Connector>,
    set: EndpointSet<L>,
    cut: Cut<L>,
    ejected: usize,
    /// What the control plane says; the set may have more, for their health.
    wanted: Arc<ClusterLoadAssignment>,
    checks: health::Sessions<L>,
    watcher: Task,
    /// While outlier detection is on.
    sweeper: Option<Sweeper>,
}

/// What became of a pick.
#[derive(Debug)]
pub(crate) enum Pick<L: Link = Subchannel> {
    /// Send it there. The endpoint may not be connected yet.
    Endpoint(Arc<Endpoint<L>>),
    /// Nothing to send it to (gRPC: UNAVAILABLE).
    Fail(Arc<Unavailable>),
}

/// Why no endpoint can be picked. Displays as a sentence; the connection error is its source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unavailable {
    /// The assignment is empty.
    #[error("cluster {cluster} has no endpoints")]
    NoEndpoints {
        /// Its name.
        cluster: Arc<str>,
    },
    /// The control plane marks all as not to be used.
    #[error("cluster {cluster}: none of its {total} endpoints is healthy")]
    NoneHealthy {
        /// Its name.
        cluster: Arc<str>,
        /// How many there are.
        total: usize,
    },
    /// None that the route lets be used.
    #[error("cluster {cluster}: no endpoint that can be picked has the metadata that the route asks for: {wanted}")]
    NoSubset {
        /// Its name.
        cluster: Arc<str>,
        /// Keys and values.
        wanted: String,
    },
    /// None takes connections.
    #[error("cluster {cluster}: none of its {total} endpoints can be reached; {address} is one of them")]
    Unreachable {
        /// Its name.
        cluster: Arc<str>,
        /// How many there are.
        total: usize,
        /// Whose error it is.
        address: SocketAddr,
        /// Its last error.
        #[source]
        cause: Option<LinkError>,
    },
}

impl<L: Link> LiveCluster<L> {
    /// Brings a cluster to life. Connects to nothing.
    pub(crate) fn new(cluster: Arc<Cluster>, endpoints: Arc<ClusterLoadAssignment>, deps: ClusterDeps<L>) -> Arc<Self> {
        let breaker = Breaker::new(&cluster.name, &cluster.circuit_breakers);
        let connector = (deps.connector)(&cluster, &breaker);
        let stale = Arc::new(Notify::new());
        let begun = Instant::now();
        let retries = metrics::gauge!("mesh_retries_active", "cluster" => cluster.name.to_string());
        let live = Arc::new_cyclic(|me| Self {
            name: cluster.name.clone(),
            me: me.clone(),
            view: ArcSwap::from_pointee(View::empty(cluster.clone())),
            metrics: Metrics::new(&cluster.name),
            writer: Mutex::new(Writer {
                cluster: cluster.clone(),
                set: EndpointSet::empty(),
                cut: Cut::empty(begun),
                ejected: 0,
                wanted: Arc::default(),
                checks: health::Sessions::default(),
                watcher: watcher::watch::<L>(&deps.runtime, me.clone(), &connector, &stale),
                sweeper: None,
                connector,
            }),
            budgets: RoutingPriority::ALL
                .map(|p| Arc::new(RetryBudget::of(cluster.circuit_breakers.at(p)).told(retries.clone()))),
            breaker,
            thresholds: Arc::default(),
            turn: Arc::new(Turn::anywhere()),
            begun,
            deps,
            stale,
            drops: AtomicBool::new(false),
            stalled: AtomicBool::new(false),
            wants: Wants::default(),
        });
        let mut writer = live.writer();
        live.set_outlier_detection(&mut writer);
        live.set_endpoints(&mut writer, endpoints);
        live.set_health_checks(&mut writer);
        live.cut(&mut writer);
        live.publish(&writer);
        drop(writer);
        live
    }

    /// Takes a new configuration. Unchanged `Arc`s cost nothing; endpoints live on by address. A change of the transport
    /// (TLS, protocol, timeouts) drains all connections and starts new ones when they are next needed.
    pub(crate) fn update(&self, cluster: Arc<Cluster>, endpoints: Arc<ClusterLoadAssignment>) {
        let mut writer = self.writer();
        let same_cluster = Arc::ptr_eq(&writer.cluster, &cluster);
        let same_endpoints = Arc::ptr_eq(&writer.wanted, &endpoints);
        if same_cluster && same_endpoints {
            return;
        }
        if !same_cluster {
            self.breaker.set_limits(&cluster.circuit_breakers);
            for (priority, budget) in RoutingPriority::ALL.into_iter().zip(&self.budgets) {
                budget.update(cluster.circuit_breakers.at(priority));
            }
            let before = std::mem::replace(&mut writer.cluster, cluster);
            self.set_outlier_detection(&mut writer);
            if !same_transport(&before, &writer.cluster) {
                self.reconnect(&mut writer);
            }
        }
        // What was kept for its health may have to go.
        if !same_endpoints || (!same_cluster && !Arc::ptr_eq(&writer.wanted, writer.set.assignment())) {
            self.set_endpoints(&mut writer, endpoints);
        }
        self.set_health_checks(&mut writer);
        self.cut(&mut writer);
        self.publish(&writer);
    }

    /// Limits the retries of requests of this priority.
    pub(crate) fn budget(&self, priority: RoutingPriority) -> &Arc<RetryBudget> {
        &self.budgets[priority as usize]
    }

    /// The breaker.
    pub(crate) fn breaker(&self) -> &Arc<Breaker> {
        &self.breaker
    }

    /// Counts a request until [`end_request`](Self::end_request), which is to be at the end of its response stream.
    ///
    /// # Errors
    /// [`Overloaded`] when `max_requests` are in flight (gRFC A32). Not to be retried.
    pub(crate) fn begin_request(&self, priority: RoutingPriority) -> Result<(), Overloaded> {
        self.breaker.take(priority, Resource::Requests)
    }

    /// Ends what [`begin_request`](Self::begin_request) began.
    pub(crate) fn end_request(&self, priority: RoutingPriority) {
        self.breaker.give_back(priority, Resource::Requests);
    }

    /// The shares of requests that are dropped.
    pub(crate) fn drops(&self) -> Vec<DropOverload> {
        self.view.load().assignment.drops.clone()
    }

    /// Whether the assignment's `drop_overload` drops this request, and for which category: each in turn takes its share of
    /// what the ones before left. Asked once per request, before the circuit breaker (gRFC A32); not retried.
    pub(crate) fn drop_overload(&self, rng: &mut fastrand::Rng) -> Option<Arc<str>> {
        if !self.drops.load(Relaxed) {
            return None;
        }
        let view = self.view.load();
        let dropped = view.assignment.drops.iter().find(|d| d.percentage.admits(rng.u32(0..1_000_000)));
        dropped.map(|overload| overload.category.clone())
    }

    /// Chooses an endpoint, another than those in `exclude` when there is one.
    #[inline]
    pub(crate) fn pick(&self, input: &PickInput<'_>, exclude: &[Arc<Endpoint<L>>], rng: &mut fastrand::Rng) -> Pick<L> {
        match self.pick_now(input, exclude, rng) {
            Ok(Some(endpoint)) if endpoint.admits() => Pick::Endpoint(endpoint),
            // Somebody else's request was quicker to be the one that an endpoint on probation takes: it is not picked again.
            Ok(Some(_)) => self.pick(input, exclude, rng),
            Ok(None) => self.pick_anew(input, exclude, rng),
            Err(cause) => Pick::Fail(cause),
        }
    }

    /// All that the last picker knew has become unavailable before the next one was built.
    #[cold]
    fn pick_anew(&self, input: &PickInput<'_>, exclude: &[Arc<Endpoint<L>>], rng: &mut fastrand::Rng) -> Pick<L> {
        self.rebuild();
        match self.pick_now(input, exclude, rng) {
            Ok(Some(endpoint)) if endpoint.admits() => Pick::Endpoint(endpoint),
            Ok(_) => Pick::Fail(Arc::new(unavailable(&self.name, &self.writer().set))),
            Err(cause) => Pick::Fail(cause),
        }
    }

    fn set_endpoints(&self, writer: &mut Writer<L>, assignment: Arc<ClusterLoadAssignment>) {
        let effective = self.with_proven(writer, &assignment);
        writer.wanted = assignment;
        let (make, joined) = (self.maker(writer), Instant::now());
        let make = |address, placement| make(address, placement, joined);
        let connector = writer.connector.clone();
        let (set, removed) = writer.set.next(effective, make, |before, now| L::differ(&connector, before, now));
        writer.set = set;
        for endpoint in &removed {
            endpoint.retire();
        }
        self.count_ejected(writer);
    }

    /// New links for all endpoints; the old ones end with their requests.
    fn reconnect(&self, writer: &mut Writer<L>) {
        writer.connector = (self.deps.connector)(&writer.cluster, &self.breaker);
        writer.watcher = watcher::watch::<L>(&self.deps.runtime, self.me.clone(), &writer.connector, &self.stale);
        let make = self.maker(writer);
        let next = writer.set.replaced(|old| {
            // New in its transport, not in the cluster.
            let new = make(old.address(), old.placement(), old.joined());
            new.set_ejection(old.ejection());
            new.set_health(old.health(), None);
            new
        });
        for endpoint in std::mem::replace(&mut writer.set, next).all() {
            endpoint.retire();
        }
    }

    /// Makes endpoints of the transport and the outlier detection in force.
    fn maker(&self, writer: &Writer<L>) -> impl Fn(SocketAddr, Arc<Placement>, Instant) -> Arc<Endpoint<L>> + use<L> {
        let common = Arc::new(Common {
            cluster: self.me.clone(),
            begun: self.begun,
            connector: writer.connector.clone(),
            thresholds: self.thresholds.clone(),
        });
        let watched = writer.cluster.outlier_detection.is_some();
        move |address, placement, joined| Endpoint::new(address, placement, common.clone(), watched, joined)
    }

    fn writer(&self) -> MutexGuard<'_, Writer<L>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<L: Link> Drop for LiveCluster<L> {
    fn drop(&mut self) {
        let writer = self.writer.get_mut().unwrap_or_else(PoisonError::into_inner);
        for endpoint in writer.set.all() {
            endpoint.retire();
        }
    }
}

fn same_transport(a: &Cluster, b: &Cluster) -> bool {
    a.transport_socket == b.transport_socket
        && a.transport_socket_matches == b.transport_socket_matches
        && a.connect_timeout == b.connect_timeout
        && a.http_protocol == b.http_protocol
        && a.idle_timeout == b.idle_timeout
        && a.max_requests_per_connection == b.max_requests_per_connection
        && a.connections == b.connections
        && a.circuit_breakers.max_connections_per_host == b.circuit_breakers.max_connections_per_host
}

fn unavailable<L: Link>(cluster: &Arc<str>, set: &EndpointSet<L>) -> Unavailable {
    let cluster = cluster.clone();
    let total = set.all().count();
    let failed = set.usable().find_map(|e| e.last_error().map(|cause| (e.address(), Some(cause))));
    match failed.or_else(|| set.usable().next().map(|e| (e.address(), None))) {
        Some((address, cause)) => Unavailable::Unreachable { cluster, total: set.usable_len(), address, cause },
        None if total == 0 => Unavailable::NoEndpoints { cluster },
        None => Unavailable::NoneHealthy { cluster, total },
    }
}

impl<L: Link> fmt::Debug for LiveCluster<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveCluster").field("name", &self.name).field("view", &self.view.load()).finish_non_exhaustive()
    }
}

impl<L: Link> fmt::Debug for View<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("View").field("balancer", &self.balancer).finish_non_exhaustive()
    }
}

impl<L: Link> fmt::Debug for ClusterDeps<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClusterDeps")
    }
}

impl<L: Link> Clone for ClusterDeps<L> {
    fn clone(&self) -> Self {
        let Self { connector, runtime, profile, balancing, weights } = self;
        let (connector, runtime, balancing) = (connector.clone(), runtime.clone(), balancing.clone());
        Self { connector, runtime, profile: *profile, balancing, weights: weights.clone() }
    }
}

#[cfg(test)]
mod tests;
