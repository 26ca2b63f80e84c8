//! How a cluster balances: what its policy is built from, what requests see of it, and what it learns of their answers.

use super::{Endpoint, Link, LiveCluster, Report, Unavailable, Writer, unavailable};
use crate::outbound::pick::{Balancer, Count, Ewma, OwnZone, PickInput, Picker, Recipe, Registry, Slices, Turn};
use mesh_xds::resource::{Cluster, ClusterLoadAssignment, Discovery, LbPolicy, WeightedRoundRobin};
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU8, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::time::Instant;

/// What balancing has from the mesh, whatever the cluster.
#[derive(Clone, Debug)]
pub(crate) struct Balancing {
    /// Limit of the size of rings.
    pub(crate) ring_cap: u64,
    /// The client's own: of random subsets and shuffles.
    pub(crate) seed: u64,
    /// The program's policies.
    pub(crate) registry: Registry,
    /// Where this client is, when it is known.
    pub(crate) own_zone: Option<OwnZone>,
}

/// What requests see.
pub(super) struct View<L: Link> {
    pub(super) cluster: Arc<Cluster>,
    pub(super) assignment: Arc<ClusterLoadAssignment>,
    pub(super) balancer: Balancer<Endpoint<L>>,
    /// What is said when there is nothing to pick.
    unavailable: Option<Arc<Unavailable>>,
    sessions: Arc<Sessions<L>>,
    /// For aggregates. Made when it is first asked for.
    pub(super) counts: OnceLock<Arc<[Count]>>,
    /// Without the priorities that are left behind. Made when a retry first asks.
    pub(super) elsewhere: Elsewhere<L>,
}

/// Pickers by the priorities that they do without; `None`: there are no others.
type Elsewhere<L> = Mutex<Vec<(Box<[bool]>, Option<Arc<Picker<Endpoint<L>>>>)>>;

/// The policy in force and the endpoints as it sees them. Made anew when either changes, not when an endpoint fails.
pub(super) struct Cut<L: Link> {
    recipe: Recipe,
    slices: Slices<Endpoint<L>>,
    sessions: Arc<Sessions<L>>,
}

/// Endpoints by address, for sessions that stick to one. Made when it is first asked for.
type Sessions<L> = OnceLock<HashMap<SocketAddr, Arc<Endpoint<L>>>>;

/// What a cluster's policy has to know of a request, or of its answer.
#[derive(Debug, Default)]
pub(super) struct Wants(AtomicU8);

/// One thing that a policy may want.
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(crate) enum Want {
    /// The hash of the request.
    Hash = 1,
    /// The metadata that the route asks for.
    Metadata = 2,
    /// The request's headers.
    Headers = 4,
    /// How long the answer took.
    Latency = 8,
    /// The load report in the answer.
    Report = 16,
}

/// What is learnt from an answer, or from its absence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    /// From the request to the head of the response, or to the failure.
    pub(crate) took: Duration,
    /// An error of the endpoint, or one that says that it has too much to do.
    pub(crate) failed: bool,
    /// For how long it asks to be left alone.
    pub(crate) hint: Option<Duration>,
}

/// A hint is not believed further than this (Linkerd's load biaser).
const MAX_HINT: Duration = Duration::from_secs(300);
/// Slow start is looked at so often in its window.
const STEPS: u32 = 50;

impl Default for Balancing {
    fn default() -> Self {
        Self { ring_cap: u64::MAX, seed: 0, registry: Registry::default(), own_zone: None }
    }
}

impl Wants {
    fn set(&self, recipe: &Recipe) {
        let wanted = [
            (Want::Hash, recipe.policy.uses_hash()),
            (Want::Metadata, recipe.settings.subsets.is_some()),
            (Want::Headers, matches!(recipe.policy, LbPolicy::Custom(_))),
            (Want::Latency, matches!(recipe.policy, LbPolicy::PeakEwma(_))),
            (Want::Report, weighted(&recipe.policy).is_some_and(|config| config.oob_period.is_none())),
        ];
        let bits = wanted.into_iter().filter(|(_, wanted)| *wanted).fold(0, |bits, (want, _)| bits | want as u8);
        self.0.store(bits, Relaxed);
    }
}

impl<L: Link> LiveCluster<L> {
    /// Whether the policy wants anything beyond the request's being there.
    #[inline]
    pub(crate) fn wants_any(&self) -> bool {
        self.wants.0.load(Relaxed) != 0
    }

    /// Whether the policy wants this.
    pub(crate) fn wants(&self, want: Want) -> bool {
        self.wants.0.load(Relaxed) & want as u8 != 0
    }

    /// Its endpoints are the addresses of one name (LOGICAL_DNS).
    pub(crate) fn is_logical(&self) -> bool {
        matches!(&self.view.load().cluster.discovery, Discovery::Dns(dns) if dns.logical)
    }

    /// Its configuration in force.
    pub(crate) fn config(&self) -> Arc<Cluster> {
        self.view.load().cluster.clone()
    }

    /// The header that requests are hashed by instead of the route's policies (gRFC A76).
    pub(crate) fn hash_header(&self) -> Option<http::HeaderName> {
        self.view.load().cluster.lb_policy.request_hash_header().cloned()
    }

    /// An answer came, or did not.
    pub(crate) fn learn(&self, endpoint: &Endpoint<L>, answered: Answered) {
        if let LbPolicy::PeakEwma(config) = innermost(&self.view.load().cluster.lb_policy) {
            let ewma = Ewma::new(config, self.begun);
            let took = match answered {
                Answered { failed: false, took, .. } => took,
                Answered { took, hint, .. } => took.max(ewma.penalty).max(hint.unwrap_or_default().min(MAX_HINT)),
            };
            endpoint.latency().observe(took, &ewma, Instant::now());
        }
    }

    /// An answer was not waited for any longer than this (as in Linkerd, where a call that is dropped counts as slow as it was so far).
    pub(crate) fn gave_up(&self, endpoint: &Endpoint<L>, after: Duration) {
        if let LbPolicy::PeakEwma(config) = innermost(&self.view.load().cluster.lb_policy) {
            endpoint.latency().at_least(after, &Ewma::new(config, self.begun), Instant::now());
        }
    }

    /// A response said how its endpoint is (gRFC A58).
    pub(crate) fn reported(&self, endpoint: &Endpoint<L>, report: &Report) {
        if let Some(config) = weighted(innermost(&self.view.load().cluster.lb_policy)) {
            endpoint.report(report, config);
        }
    }

    /// Looks at the policy and the endpoints anew: after every change of either.
    pub(super) fn cut(&self, writer: &mut Writer<L>) {
        let Balancing { ring_cap, seed, registry, own_zone } = Balancing::clone(&self.deps.balancing);
        let mut recipe = Recipe {
            settings: writer.cluster.lb.clone(),
            overprovisioning_factor: writer.set.assignment().overprovisioning_factor,
            profile: self.deps.profile,
            ring_cap,
            seed,
            registry,
            own_zone,
            ..Recipe::of(writer.cluster.lb_policy.clone(), self.begun)
        };
        let slices = Slices::new(writer.set.priorities(), &mut recipe);
        self.wants.set(&recipe);
        writer.cut = Cut { recipe, slices, sessions: Arc::default() };
        if writer.cut.ages_in(Instant::now()).is_some() {
            // The watcher looks at the clock.
            self.stale.notify_one();
        }
    }

    /// Builds what requests see from what is there now.
    pub(super) fn publish(&self, writer: &Writer<L>) {
        let before = self.view.load();
        let Cut { recipe, slices, sessions } = &writer.cut;
        let balancer = Balancer::new(slices, recipe, &self.turn, Some(&before.balancer), Instant::now());
        let unavailable = balancer.all().is_none().then(|| Arc::new(unavailable(&self.name, &writer.set)));
        if let (Some(numbers), Some(config)) = (&self.deps.weights, weighted(&recipe.policy)) {
            let now = Instant::now();
            numbers.updated(writer.set.in_service().map(|endpoint| endpoint.weighed(config, now)));
        }
        self.drops.store(!writer.set.assignment().drops.is_empty(), Relaxed);
        let (cluster, assignment) = (writer.cluster.clone(), writer.set.assignment().clone());
        let (sessions, counts, elsewhere) = (sessions.clone(), OnceLock::new(), Mutex::default());
        let view = View { cluster, assignment, balancer, unavailable, sessions, counts, elsewhere };
        self.view.store(Arc::new(view));
        let reports = |policy| weighted(policy).filter(|config| config.oob_period.is_some());
        let now = reports(&recipe.policy);
        if now.is_some() || reports(innermost(&before.cluster.lb_policy)).is_some() {
            for endpoint in writer.set.all() {
                endpoint.follow(now, &self.deps.runtime);
            }
        }
    }

    /// Looks at the endpoints again. How many there are, and when to look again although nothing happens.
    pub(super) fn rebuild(&self) -> (usize, Option<Duration>) {
        let writer = self.writer();
        self.publish(&writer);
        (writer.set.usable_len(), writer.cut.ages_in(Instant::now()))
    }

    /// The endpoint that a session sticks to, while it may (gRFC A55): its health status is one that is allowed, and it can be
    /// connected to.
    #[cold]
    fn session(&self, view: &View<L>, address: SocketAddr) -> Option<Arc<Endpoint<L>>> {
        let by_address = view.sessions.get_or_init(|| {
            let writer = self.writer();
            writer.set.all().map(|endpoint| (endpoint.address(), endpoint.clone())).collect()
        });
        let endpoint = by_address.get(&address)?;
        let allowed = view.cluster.lb.override_host_statuses.contains(endpoint.placement().health);
        (allowed && endpoint.can_keep_session()).then(|| endpoint.clone())
    }

    /// Whether a session that sticks to this endpoint goes on.
    pub(crate) fn keeps_session(&self, address: SocketAddr) -> bool {
        self.session(&self.view.load(), address).is_some()
    }

    /// Below how many percent of healthy endpoints health is disregarded, and whether requests fail instead.
    pub(crate) fn panic_rules(&self) -> (f64, bool) {
        let settings = &self.view.load().cluster.lb;
        (settings.panic_threshold, settings.fail_on_panic)
    }

    /// `Ok(None)`: the picker is out of date.
    #[inline]
    pub(super) fn pick_now(
        &self,
        input: &PickInput<'_>,
        exclude: &[Arc<Endpoint<L>>],
        rng: &mut fastrand::Rng,
    ) -> Result<Option<Arc<Endpoint<L>>>, Arc<Unavailable>> {
        let view = self.view.load();
        if let Some(address) = input.override_host
            && let Some(endpoint) = self.session(&view, address)
        {
            return Ok(Some(endpoint));
        }
        if let Some(cause) = &view.unavailable {
            return Err(cause.clone());
        }
        let Some(picker) = view.balancer.picker(input) else {
            let wanted = input.metadata.map_or_else(|| "none".to_owned(), ToString::to_string);
            return Err(Arc::new(Unavailable::NoSubset { cluster: self.name.clone(), wanted }));
        };
        let tried = |endpoint: &Arc<Endpoint<L>>| exclude.iter().any(|other| Arc::ptr_eq(other, endpoint));
        Ok(picker.pick(input, tried, rng).cloned())
    }
}

impl<L: Link> View<L> {
    /// Before there are endpoints.
    pub(super) fn empty(cluster: Arc<Cluster>) -> Self {
        let unavailable = Some(Arc::new(Unavailable::NoEndpoints { cluster: cluster.name.clone() }));
        let (balancer, sessions) = (Balancer::default(), Arc::default());
        let (counts, elsewhere) = (OnceLock::new(), Mutex::default());
        Self { cluster, assignment: Arc::default(), balancer, unavailable, sessions, counts, elsewhere }
    }
}

impl<L: Link> Cut<L> {
    /// Before there are endpoints.
    pub(super) fn empty(begun: Instant) -> Self {
        let recipe = Recipe::of(LbPolicy::RoundRobin, begun);
        Self { recipe, slices: Slices::default(), sessions: Arc::default() }
    }

    /// How many endpoints of each priority can be picked now.
    pub(super) fn counts(&self) -> Arc<[Count]> {
        self.slices.counts(&self.recipe)
    }

    /// The picker without the priorities that are left behind.
    pub(super) fn picker_without(&self, left: &[bool], turn: &Arc<Turn>) -> Option<Picker<Endpoint<L>>> {
        Picker::elsewhere(&self.recipe, &self.slices, left, turn, Instant::now())
    }

    /// When pickers are to be built again because time has gone by.
    fn ages_in(&self, now: Instant) -> Option<Duration> {
        if let Some(config) = weighted(&self.recipe.policy) {
            return Some(config.update);
        }
        let slow = self.recipe.settings.slow_start.filter(|config| self.slices.has_new(config, now))?;
        Some((slow.window / STEPS).clamp(Duration::from_millis(10), Duration::from_secs(1)))
    }
}

/// The policy that picks.
fn innermost(mut policy: &LbPolicy) -> &LbPolicy {
    while let LbPolicy::RandomSubsetting { child, .. } = policy {
        policy = child;
    }
    policy
}

fn weighted(policy: &LbPolicy) -> Option<&Arc<WeightedRoundRobin>> {
    match policy {
        LbPolicy::WeightedRoundRobin(config) => Some(config),
        _ => None,
    }
}
