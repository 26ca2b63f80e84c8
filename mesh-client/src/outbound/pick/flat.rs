//! Policies that know all endpoints of a priority by their place in one list: hashing, pick first, and the program's own.

use super::{
    Candidate, Group, PickInput, Recipe, Standing, best,
    bounded::Bound,
    custom::{Custom, Endpoints},
    locality::Selection,
    maglev::Table,
    pick_first::First,
    ring_hash::Ring,
};
use mesh_xds::resource::{ConsistentHashing, LbPolicy};
use std::{fmt, sync::Arc};

/// Built when the endpoints change, not when one of them fails: it is carried over from picker to picker.
pub(super) struct Flat<C> {
    groups: Box<[Arc<Group<C>>]>,
    selection: Selection,
    policy: LbPolicy,
    members: Box<[Arc<C>]>,
    by: By,
}

enum By {
    Ring(Ring, Option<Bound>),
    Maglev(Table, Option<Bound>),
    First(First),
    Custom(Custom),
}

/// Steps from the place of a hash before a look at all.
const STEPS: usize = 4096;

impl<C: Candidate> Flat<C> {
    /// `None`: the policy is not one of these. Whoever cannot be picked now is in it, too.
    pub(super) fn new(
        groups: &[Arc<Group<C>>],
        selection: Selection,
        recipe: &Recipe,
        previous: Option<&Arc<Self>>,
    ) -> Option<Arc<Self>> {
        let policy = recipe.policy.clone();
        if let Some(previous) = previous.filter(|previous| previous.is(groups, selection, &policy)) {
            return Some(previous.clone());
        }
        let chosen: Vec<(&Arc<Group<C>>, usize)> = groups
            .iter()
            .flat_map(|group| (0..group.members().len()).map(move |i| (group, i)))
            .filter(|(group, i)| group.selects(*i, selection))
            .collect();
        let mut members: Box<[Arc<C>]> = chosen.iter().map(|(group, i)| group.members()[*i].clone()).collect();
        // gRFC A42: an endpoint's weight times its locality's.
        let mut weights: Vec<u64> = chosen
            .iter()
            .map(|(group, i)| u64::from(group.weight()) * u64::from(group.member_weight(*i)).max(1))
            .collect();
        let bound = |hashing: &ConsistentHashing, weights: &[u64]| {
            hashing.balance_factor.map(|factor| Bound::new(factor, weights))
        };
        let by = match &policy {
            LbPolicy::RingHash(config) => {
                let ring = Ring::new(&keys(&members, &config.hashing), &weights, config, recipe.ring_cap);
                By::Ring(ring, bound(&config.hashing, &weights))
            }
            LbPolicy::Maglev(config) => {
                let table = Table::new(&keys(&members, &config.hashing), &weights, config.table_size);
                By::Maglev(table, bound(&config.hashing, &weights))
            }
            LbPolicy::PickFirst { shuffle } => {
                let addresses: Vec<_> = members.iter().map(|member| member.address()).collect();
                let order = First::order(&addresses, &weights, shuffle.then_some(recipe.seed));
                members = order.iter().map(|i| members[*i].clone()).collect();
                weights.clear();
                let kept = previous
                    .and_then(|previous| previous.current())
                    .and_then(|current| members.iter().position(|member| Arc::ptr_eq(member, current)));
                By::First(First::new(kept))
            }
            LbPolicy::Custom(config) => {
                let infos = chosen.iter().map(|(group, i)| group.members()[*i].info(group.weight())).collect();
                By::Custom(recipe.registry.build(config, infos)?)
            }
            _ => return None,
        };
        Some(Arc::new(Self { groups: groups.into(), selection, policy, members, by }))
    }

    fn is(&self, groups: &[Arc<Group<C>>], selection: Selection, policy: &LbPolicy) -> bool {
        self.selection.class == selection.class
            && self.groups.len() == groups.len()
            && self.groups.iter().zip(groups).all(|(a, b)| Arc::ptr_eq(a, b))
            && self.policy == *policy
    }

    /// The endpoint that pick first stays with.
    fn current(&self) -> Option<&Arc<C>> {
        match &self.by {
            By::First(first) => first.current().and_then(|i| self.members.get(i)),
            _ => None,
        }
    }

    pub(super) fn selection(&self) -> Selection {
        self.selection
    }

    pub(super) fn len(&self) -> usize {
        self.members.len()
    }

    /// Picks one, not among `excluded` when there is another.
    pub(super) fn pick(
        &self,
        input: &PickInput<'_>,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&Arc<C>> {
        let random = input.hash.is_none();
        let hash = input.hash.unwrap_or_else(|| rng.u64(..));
        let chosen = match &self.by {
            By::First(first) => {
                let usable = |i: usize| self.members[i].standing(panic) > Standing::Unavailable;
                return first.pick(self.members.len(), usable).map(|i| &self.members[i]);
            }
            By::Custom(custom) => custom
                .pick(&input.request(hash), &Standings { members: &self.members, panic })
                .filter(|i| *i < self.members.len() && self.standing(*i, panic, excluded) > Standing::Unavailable),
            By::Ring(ring, bound) => self
                .first_usable(ring.from(hash).take(STEPS.max(ring.len() / 8)), random, panic, excluded)
                .map(|i| self.within(bound.as_ref(), i, hash, input, panic, excluded)),
            By::Maglev(table, bound) => self
                .first_usable(table.tries(hash).take(STEPS), random, panic, excluded)
                .map(|i| self.within(bound.as_ref(), i, hash, input, panic, excluded)),
        };
        match chosen {
            Some(i) => Some(&self.members[i]),
            None => self.look_at_all(hash, panic, excluded),
        }
    }

    fn standing(&self, i: usize, panic: bool, excluded: &impl Fn(&Arc<C>) -> bool) -> Standing {
        if excluded(&self.members[i]) { Standing::Unavailable } else { self.members[i].standing(panic) }
    }

    /// gRFC A61: the first that has not failed, whether it is connected or not. A random hash takes one that is not in the middle of
    /// connecting, when there is one near (gRFC A76).
    fn first_usable(
        &self,
        order: impl Iterator<Item = usize>,
        random: bool,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
    ) -> Option<usize> {
        let mut connecting = None;
        for i in order {
            match self.standing(i, panic, excluded) {
                Standing::Available => return Some(i),
                Standing::Connecting if !random => return Some(i),
                Standing::Connecting => {
                    connecting.get_or_insert(i);
                }
                Standing::Unavailable => {}
            }
        }
        connecting
    }

    fn within(
        &self,
        bound: Option<&Bound>,
        i: usize,
        hash: u64,
        input: &PickInput<'_>,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
    ) -> usize {
        let Some(bound) = bound else { return i };
        let usable = |i: usize| self.standing(i, panic, excluded) > Standing::Unavailable;
        let load = |i: usize| usable(i).then(|| self.members[i].load());
        bound.choose(i, hash, input.in_flight, load)
    }

    /// From a place that the hash gives on: available, else connecting, else excluded.
    fn look_at_all(&self, hash: u64, panic: bool, excluded: &impl Fn(&Arc<C>) -> bool) -> Option<&Arc<C>> {
        let n = self.members.len();
        let start = super::shares::index(hash % (n.max(1) as u64));
        best(self.members[start..].iter().chain(&self.members[..start]), panic, excluded)
    }
}

/// What endpoints are hashed by: `envoy.lb` `hash_key` (gRFC A76), the hostname, or the address.
fn keys<C: Candidate>(members: &[Arc<C>], hashing: &ConsistentHashing) -> Vec<String> {
    members.iter().map(|member| member.hash_key(hashing.use_hostname)).collect()
}

/// What a policy of the program sees of the endpoints.
struct Standings<'a, C> {
    members: &'a [Arc<C>],
    panic: bool,
}

impl<C: Candidate> Endpoints for Standings<'_, C> {
    fn len(&self) -> usize {
        self.members.len()
    }

    fn is_available(&self, i: usize) -> bool {
        self.members.get(i).is_some_and(|member| member.standing(self.panic) > Standing::Unavailable)
    }

    fn in_flight(&self, i: usize) -> u32 {
        self.members.get(i).map_or(0, |member| member.load())
    }
}

impl<C> fmt::Debug for Flat<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Flat")
            .field("policy", &self.policy)
            .field("members", &self.members.len())
            .finish_non_exhaustive()
    }
}
