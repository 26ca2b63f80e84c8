//! Localities: each takes its weight's share of the requests while it has an available endpoint (gRPC's
//! `wrr_locality`), shared out among its endpoints.

use super::{Candidate, Shares, Standing, Turn, shares::index};
use mesh_xds::resource::LbPolicy;
use std::{fmt, sync::Arc};

/// The endpoints of one locality of one priority, shared by successive pickers.
pub(crate) struct Group<C> {
    members: Box<[Arc<C>]>,
    weights: Box<[u32]>,
    weight: u32,
    turn: Turn,
}

/// A group as a picker uses it.
pub(super) struct Usable<C> {
    group: Arc<Group<C>>,
    /// Members that can be picked; `None`: all.
    chosen: Option<Box<[u32]>>,
    /// Of those; `None` when their weights are alike.
    pub(super) shares: Option<Shares>,
    len: usize,
}

impl<C> Group<C> {
    /// `weights` are those of `members`, 0 for one that the control plane says is not to be used; `weight` is the locality's.
    /// `turn` is that of the group that this one replaces.
    pub(crate) fn new(members: Vec<Arc<C>>, weights: Vec<u32>, weight: u32, turn: Turn) -> Self {
        debug_assert_eq!(members.len(), weights.len(), "one weight for each member");
        Self { members: members.into(), weights: weights.into(), weight, turn }
    }

    /// The same group with other members.
    pub(crate) fn map(&self, replace: impl FnMut(&Arc<C>) -> Arc<C>) -> Self {
        let members = self.members.iter().map(replace).collect();
        Self { members, weights: self.weights.clone(), weight: self.weight, turn: self.turn.same() }
    }

    /// Whose turn it is, for the group that replaces this one.
    pub(crate) fn turn(&self) -> Turn {
        self.turn.same()
    }

    /// All members, in the order of the assignment.
    pub(crate) fn members(&self) -> &[Arc<C>] {
        &self.members
    }

    /// Members that the control plane lets be used.
    pub(crate) fn usable(&self) -> impl Iterator<Item = &Arc<C>> {
        self.members.iter().zip(&self.weights).filter(|(_, weight)| **weight > 0).map(|(member, _)| member)
    }
}

impl<C: Candidate> Group<C> {
    fn can_pick(&self, i: usize, panic: bool) -> bool {
        self.weights[i] > 0 && self.members[i].standing(panic) > Standing::Unavailable
    }

    /// Whether any member can be picked.
    pub(super) fn is_available(&self, panic: bool) -> bool {
        (0..self.members.len()).any(|i| self.can_pick(i, panic))
    }
}

impl<C: Candidate> Usable<C> {
    /// `None`: no member can be picked.
    pub(super) fn new(group: &Arc<Group<C>>, panic: bool) -> Option<Self> {
        let all = group.members.len();
        let chosen: Vec<u32> =
            (0..all).filter(|i| group.can_pick(*i, panic)).filter_map(|i| u32::try_from(i).ok()).collect();
        if chosen.is_empty() {
            return None;
        }
        let len = chosen.len();
        let (shares, chosen) = if len == all {
            (Shares::new(&group.weights), None)
        } else {
            let weights: Vec<u32> = chosen.iter().map(|i| group.weights[*i as usize]).collect();
            (Shares::new(&weights), Some(chosen.into()))
        };
        Some(Self { group: group.clone(), chosen, shares, len })
    }
}

impl<C> Usable<C> {
    /// The locality's.
    pub(super) fn weight(&self) -> u32 {
        self.group.weight
    }

    /// At least 1.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn member(&self, i: usize) -> &Arc<C> {
        &self.group.members[self.position(i)]
    }

    pub(super) fn member_weight(&self, i: usize) -> u32 {
        self.group.weights[self.position(i)]
    }

    pub(super) fn next_turn(&self) -> u64 {
        self.group.turn.next()
    }

    /// A draw by weight, independent of all others.
    #[inline]
    pub(super) fn draw_index(&self, rng: &mut fastrand::Rng) -> usize {
        match &self.shares {
            None => rng.usize(..self.len()),
            Some(shares) => shares.draw(rng),
        }
    }

    fn position(&self, i: usize) -> usize {
        self.chosen.as_ref().map_or(i, |chosen| chosen[i] as usize)
    }
}

/// Which of `n` localities is next: in turn under round robin, else at random.
pub(super) fn choose(
    policy: LbPolicy,
    n: usize,
    shares: Option<&Shares>,
    turn: &Turn,
    rng: &mut fastrand::Rng,
) -> usize {
    match (policy, shares) {
        (LbPolicy::RoundRobin, Some(shares)) => shares.at(turn.next()),
        (LbPolicy::RoundRobin, None) => index(turn.next() % n as u64),
        (LbPolicy::Random | LbPolicy::LeastRequest { .. }, Some(shares)) => shares.draw(rng),
        (LbPolicy::Random | LbPolicy::LeastRequest { .. }, None) => rng.usize(..n),
    }
}

impl<C> fmt::Debug for Group<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("members", &self.members.len())
            .field("weight", &self.weight)
            .finish_non_exhaustive()
    }
}
