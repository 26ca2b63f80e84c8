//! Which endpoint takes a request: priority, locality, policy.
//!
//! A [`Balancer`] is built when endpoints come, go, fail or recover, over the [`Group`]s of all priorities. Between
//! the change of an endpoint and the next one, picks step over it: a few draws, and at worst one look at all.

mod bounded;
mod custom;
mod flat;
mod hash;
mod layer;
mod least_request;
mod locality;
mod maglev;
mod peak_ewma;
mod pick_first;
mod priority;
mod random;
mod ring_hash;
mod round_robin;
mod shares;
mod spread;
mod stride;
mod subset;
mod subsetting;
mod weighing;
mod zone;

pub(crate) use custom::Registry;
pub use custom::{EndpointInfo, EndpointPicker, Endpoints, LbPolicyFactory, PickRequest};
pub(crate) use hash::{xxh64, xxh64_seeded};
pub use layer::{
    Balance, Change, Discover, LoadBalanceLayer, NoServices, RequestHash, ResponseBody, ResponseFuture, ServiceList,
};
pub(crate) use locality::{Class, Group};
pub(crate) use peak_ewma::{Ewma, Latency};
pub(crate) use priority::{Count, left_behind, spilled};
pub(crate) use subset::MetadataKey;

use crate::outbound::route::Profile;
use flat::Flat;
use locality::{Selection, Usable};
use mesh_xds::resource::{LbPolicy, LbSettings, LocalityId, MetadataValue, SlowStart, WeightedRoundRobin};
use shares::Shares;
use spread::Spread;
use std::{
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicU64, atomic::Ordering::Relaxed},
};
use subset::{Lookup, Pickers, Subsets};
use tokio::time::Instant;

/// What can be picked.
pub(crate) trait Candidate {
    /// Whether it may be picked now. `panic`: although it is ejected.
    fn standing(&self, panic: bool) -> Standing;

    /// Whether outlier detection holds it out.
    fn is_ejected(&self) -> bool;

    /// Requests in flight.
    fn load(&self) -> u32;

    /// Where it listens.
    fn address(&self) -> SocketAddr;

    /// What it is known by when it is hashed.
    fn hash_key(&self, use_hostname: bool) -> String;

    /// Since when it is in the cluster.
    fn joined(&self) -> Instant;

    /// What a request costs there (peak EWMA) at this tick, as a logarithm.
    fn cost(&self, ewma: &Ewma, now: u64) -> u32;

    /// The weight that its load reports give it (gRFC A58); `None`: none, too young or too old.
    fn reported_weight(&self, config: &WeightedRoundRobin, now: Instant) -> Option<f64>;

    /// Where it is.
    fn locality(&self) -> LocalityId;

    /// Its `envoy.lb` metadata.
    fn lb_metadata(&self) -> BTreeMap<String, MetadataValue>;

    /// What a policy of the program is told of it.
    fn info(&self, locality_weight: u32) -> EndpointInfo;
}

/// Whether a candidate may be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Standing {
    /// Ejected, or does not take connections.
    Unavailable,
    /// Somebody waits for its first connection: others go elsewhere if they can.
    Connecting,
    /// Connected, or not yet tried.
    Available,
}

/// What a request brings to the pick.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PickInput<'a> {
    /// By the route's hash policies; `None`: random.
    pub(crate) hash: Option<u64>,
    /// Which subset it is for.
    pub(crate) metadata: Option<&'a MetadataKey>,
    /// The endpoint that its session sticks to (gRFC A55).
    pub(crate) override_host: Option<SocketAddr>,
    /// For policies of the program's own.
    pub(crate) headers: Option<&'a http::HeaderMap>,
    /// The part of the cluster that the aggregate which it is a leaf of wants; `None`: as the cluster itself shares.
    pub(crate) part: Option<Part>,
    /// Now, or a little earlier.
    pub(crate) now: Instant,
    /// Of the whole cluster.
    pub(crate) in_flight: u32,
}

/// The endpoints of one class of one priority.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) priority: usize,
    pub(crate) class: Class,
}

/// How a cluster's pickers are built.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// The policy; never [`LbPolicy::RandomSubsetting`], which is applied before.
    pub(crate) policy: LbPolicy,
    /// What surrounds it.
    pub(crate) settings: LbSettings,
    /// Whose rules hold for priorities and panic.
    pub(crate) profile: Profile,
    /// Of the assignment.
    pub(crate) overprovisioning_factor: Option<u32>,
    /// Limit of the size of rings.
    pub(crate) ring_cap: u64,
    /// The client's own: of subsets and shuffles.
    pub(crate) seed: u64,
    /// When the cluster began: latencies are told from then on.
    pub(crate) begun: Instant,
    /// The program's policies.
    pub(crate) registry: Registry,
    /// Where this client is, when it is known.
    pub(crate) own_zone: Option<OwnZone>,
}

/// Where this client is, for zone-aware routing.
#[derive(Clone, Debug)]
pub(crate) struct OwnZone {
    pub(crate) locality: LocalityId,
    /// Its share of all clients of a service, 0..=1.
    pub(crate) share: f64,
}

/// The endpoints of a cluster as its policy sees them: after subsetting, parted into subsets. Made when the endpoints change.
pub(crate) struct Slices<C> {
    priorities: Vec<Vec<Arc<Group<C>>>>,
    subsets: Option<Subsets<C>>,
}

/// All choices of a cluster.
pub(crate) struct Balancer<C> {
    all: Option<Picker<C>>,
    subsets: Option<Box<Pickers<C>>>,
}

/// A choice among the endpoints of the priorities in force.
pub(crate) struct Picker<C> {
    levels: Box<[Level<C>]>,
    /// Of the levels; `None` when there is one, or they are alike.
    shares: Option<Shares>,
}

/// The endpoints of one priority.
struct Level<C> {
    priority: usize,
    /// `None`: any.
    class: Option<Class>,
    panic: bool,
    choice: Choice<C>,
}

enum Choice<C> {
    Spread(Spread<C>),
    Flat(Arc<Flat<C>>),
}

/// Whose turn it is; kept from one picker to the next. On a cache line of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Turn(AtomicU64);

impl Recipe {
    /// Of a policy, with every default. `begun`: when the cluster began.
    pub(crate) fn of(policy: LbPolicy, begun: Instant) -> Self {
        Self {
            policy,
            settings: LbSettings::default(),
            profile: Profile::Grpc,
            overprovisioning_factor: None,
            ring_cap: u64::MAX,
            seed: 0,
            begun,
            registry: Registry::default(),
            own_zone: None,
        }
    }
}

impl<C: Candidate> Slices<C> {
    /// Of the groups of each priority, highest first. Takes [`LbPolicy::RandomSubsetting`] out of the recipe.
    pub(crate) fn new(priorities: &[Vec<Arc<Group<C>>>], recipe: &mut Recipe) -> Self {
        let mut priorities = priorities.to_vec();
        while let LbPolicy::RandomSubsetting { subset_size, child } = recipe.policy.clone() {
            priorities = subsetting::part(&priorities, subset_size, recipe.seed);
            recipe.policy = LbPolicy::clone(&child);
        }
        let subsets = recipe.settings.subsets.as_ref().map(|config| Subsets::new(config, &priorities));
        Self { priorities, subsets }
    }

    /// How many endpoints of each priority can be picked now.
    pub(crate) fn counts(&self, recipe: &Recipe) -> Arc<[Count]> {
        self.priorities.iter().map(|groups| Count::of(groups, recipe)).collect()
    }

    /// Whether an endpoint is in slow start: pickers then change as time goes by.
    pub(crate) fn has_new(&self, config: &SlowStart, now: Instant) -> bool {
        self.priorities.iter().flatten().flat_map(|group| group.members()).any(|m| weighing::is_new(config, &**m, now))
    }
}

impl<C> Default for Slices<C> {
    fn default() -> Self {
        Self { priorities: Vec::new(), subsets: None }
    }
}

impl<C> Default for Balancer<C> {
    fn default() -> Self {
        Self { all: None, subsets: None }
    }
}

impl<C: Candidate> Balancer<C> {
    /// Who can be picked now. What need not be built again is taken from `previous`.
    pub(crate) fn new(
        slices: &Slices<C>,
        recipe: &Recipe,
        turn: &Arc<Turn>,
        previous: Option<&Self>,
        now: Instant,
    ) -> Self {
        let (before, subsets) = previous.map_or((None, None), |p| (p.all.as_ref(), p.subsets.as_deref()));
        Self {
            all: Picker::new(recipe, &slices.priorities, turn, before, now),
            subsets: slices.subsets.as_ref().map(|s| Box::new(s.pickers(recipe, turn, subsets, now))),
        }
    }

    /// The picker of all endpoints; `None`: no endpoint takes connections.
    pub(crate) fn all(&self) -> Option<&Picker<C>> {
        self.all.as_ref()
    }

    /// The picker for a request; `None`: no endpoint takes connections, or its subset has none.
    #[inline]
    pub(crate) fn picker(&self, input: &PickInput<'_>) -> Option<&Picker<C>> {
        match &self.subsets {
            None => self.all.as_ref(),
            Some(subsets) => match subsets.lookup(input.metadata) {
                Lookup::Found(picker) => Some(picker),
                Lookup::Any => self.all.as_ref(),
                Lookup::Nowhere => None,
            },
        }
    }
}

impl<C: Candidate> Picker<C> {
    /// A picker over the priorities in force, localities without an endpoint to pick left out. `None`: none at all.
    pub(crate) fn new(
        recipe: &Recipe,
        priorities: &[Vec<Arc<Group<C>>>],
        turn: &Arc<Turn>,
        previous: Option<&Self>,
        now: Instant,
    ) -> Option<Self> {
        Self::of(priority::in_force(priorities, recipe), recipe, priorities, turn, previous, now)
    }

    /// The same without the priorities that are `left` behind; of those, a `None` too.
    pub(crate) fn elsewhere(
        recipe: &Recipe,
        slices: &Slices<C>,
        left: &[bool],
        turn: &Arc<Turn>,
        now: Instant,
    ) -> Option<Self> {
        let shares = priority::elsewhere(&slices.priorities, recipe, left);
        Self::of(shares, recipe, &slices.priorities, turn, None, now)
    }

    fn of(
        shares: Vec<priority::Share>,
        recipe: &Recipe,
        priorities: &[Vec<Arc<Group<C>>>],
        turn: &Arc<Turn>,
        previous: Option<&Self>,
        now: Instant,
    ) -> Option<Self> {
        let mut levels = Vec::new();
        let mut percents = Vec::new();
        for share in shares {
            let before = previous.and_then(|previous| previous.flat(share.priority, share.selection));
            let groups = &priorities[share.priority];
            if !groups.iter().any(|group| group.is_available(share.selection)) {
                // It may have its share for the number of its endpoints alone.
                continue;
            }
            let choice = match Flat::new(groups, share.selection, recipe, before) {
                Some(flat) => Some(Choice::Flat(flat)),
                None => Spread::new(groups, share.selection, recipe, turn, now).map(Choice::Spread),
            };
            if let Some(choice) = choice {
                let Selection { class, panic } = share.selection;
                levels.push(Level { priority: share.priority, class, panic, choice });
                percents.push(share.percent);
            }
        }
        (!levels.is_empty()).then(|| Self { levels: levels.into(), shares: Shares::new(&percents) })
    }

    /// Picks one, not among `excluded` when there is another. `None`: all have become unavailable since the picker was built.
    #[inline]
    pub(crate) fn pick(
        &self,
        input: &PickInput<'_>,
        excluded: impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&Arc<C>> {
        let level = match (&*self.levels, &self.shares) {
            ([only], _) => only,
            (several, shares) => match (input.part.and_then(|part| self.level(part)), shares) {
                (Some(wanted), _) => wanted,
                (None, None) => &several[rng.usize(..several.len())],
                (None, Some(shares)) => &several[shares.draw(rng)],
            },
        };
        match &level.choice {
            Choice::Spread(spread) => spread.pick(input, level.panic, &excluded, rng),
            Choice::Flat(flat) => flat.pick(input, level.panic, &excluded, rng),
        }
    }

    fn level(&self, part: Part) -> Option<&Level<C>> {
        self.levels.iter().find(|level| level.priority == part.priority && level.class.is_none_or(|c| c == part.class))
    }

    fn flat(&self, priority: usize, selection: Selection) -> Option<&Arc<Flat<C>>> {
        self.levels.iter().filter(|level| level.priority == priority).find_map(|level| match &level.choice {
            Choice::Flat(flat) if flat.selection().class == selection.class => Some(flat),
            _ => None,
        })
    }

    /// The highest priority in force.
    pub(crate) fn priority(&self) -> usize {
        self.levels.iter().map(|level| level.priority).min().unwrap_or(0)
    }

    /// Whether ejected endpoints are picked, because too few others are left.
    pub(crate) fn is_panic(&self) -> bool {
        self.levels.iter().any(|level| level.panic)
    }

    fn size(&self) -> usize {
        let size = |level: &Level<C>| match &level.choice {
            Choice::Spread(spread) => spread.len(),
            Choice::Flat(flat) => flat.len(),
        };
        self.levels.iter().map(size).sum()
    }
}

impl<'a> PickInput<'a> {
    /// Of a request that asks for nothing in particular.
    pub(crate) fn plain(now: Instant) -> Self {
        Self { hash: None, metadata: None, override_host: None, headers: None, part: None, now, in_flight: 0 }
    }

    fn request(&self, hash: u64) -> PickRequest<'a> {
        PickRequest { hash, headers: self.headers }
    }
}

/// The best of all: available, else connecting, else excluded; of equals the first.
fn best<'a, C: Candidate>(
    all: impl Iterator<Item = &'a Arc<C>>,
    panic: bool,
    excluded: &impl Fn(&Arc<C>) -> bool,
) -> Option<&'a Arc<C>> {
    let mut best: Option<((bool, Standing), &Arc<C>)> = None;
    for candidate in all {
        let rank = (!excluded(candidate), candidate.standing(panic));
        if rank == (true, Standing::Available) {
            return Some(candidate);
        }
        if rank.1 > Standing::Unavailable && best.as_ref().is_none_or(|(other, _)| rank > *other) {
            best = Some((rank, candidate));
        }
    }
    best.map(|(_, candidate)| candidate)
}

/// A candidate, judged.
enum Drawn<'a, C> {
    Good(&'a Arc<C>),
    Connecting(&'a Arc<C>),
    Bad,
}

impl<'a, C> Drawn<'a, C> {
    #[inline]
    fn judge(candidate: &'a Arc<C>, panic: bool, excluded: &impl Fn(&Arc<C>) -> bool) -> Self
    where
        C: Candidate,
    {
        match candidate.standing(panic) {
            Standing::Unavailable => Self::Bad,
            _ if excluded(candidate) => Self::Bad,
            Standing::Connecting => Self::Connecting(candidate),
            Standing::Available => Self::Good(candidate),
        }
    }

    fn connecting(&self) -> Option<&'a Arc<C>> {
        match self {
            Self::Connecting(candidate) => Some(candidate),
            Self::Good(_) | Self::Bad => None,
        }
    }
}

impl Turn {
    /// Starts anywhere, so that processes that start together do not go the same way round together.
    pub(crate) fn anywhere() -> Self {
        Self(AtomicU64::new(fastrand::u32(..).into()))
    }

    fn next(&self) -> u64 {
        self.0.fetch_add(1, Relaxed)
    }

    fn same(&self) -> Self {
        Self(AtomicU64::new(self.0.load(Relaxed)))
    }
}

impl<C> fmt::Debug for Slices<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slices").field("priorities", &self.priorities).finish_non_exhaustive()
    }
}

impl<C: Candidate> fmt::Debug for Picker<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Picker")
            .field("priority", &self.priority())
            .field("panic", &self.is_panic())
            .field("size", &self.size())
            .finish_non_exhaustive()
    }
}

impl<C: Candidate> fmt::Debug for Balancer<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Balancer").field(&self.all).finish()
    }
}

#[cfg(test)]
mod tests;
