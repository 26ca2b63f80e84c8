//! The endpoints of a locality, and those of them that a picker uses.

use super::{Candidate, Shares, Standing, Turn, shares::index, weighing::Weighing};
use std::{fmt, sync::Arc};

/// The endpoints of one locality of one priority, shared by successive pickers.
pub(crate) struct Group<C> {
    members: Box<[Arc<C>]>,
    weights: Box<[u32]>,
    /// `None`: all are [`Class::Usable`].
    classes: Option<Box<[Class]>>,
    weight: u32,
    turn: Turn,
}

/// What the control plane says of an endpoint's health.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// Takes requests.
    Usable,
    /// Takes requests when there are not enough others (Envoy).
    Degraded,
    /// Takes none, unless health is disregarded, or by a session that sticks to it.
    Unusable,
}

/// Which endpoints of a group a picker takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// Of this class; `None`: of any.
    pub(super) class: Option<Class>,
    /// Although they are ejected.
    pub(super) panic: bool,
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
    /// `weights` are those of `members`; `weight` is the locality's. `turn` is that of the group that this one replaces.
    pub(crate) fn new(members: Vec<Arc<C>>, weights: Vec<u32>, classes: Vec<Class>, weight: u32, turn: Turn) -> Self {
        debug_assert_eq!(members.len(), weights.len(), "one weight for each member");
        debug_assert_eq!(members.len(), classes.len(), "one class for each member");
        let classes = classes.iter().any(|class| *class != Class::Usable).then(|| classes.into());
        Self { members: members.into(), weights: weights.into(), classes, weight, turn }
    }

    /// The same group with other members.
    pub(crate) fn map(&self, replace: impl FnMut(&Arc<C>) -> Arc<C>) -> Self {
        Self { members: self.members.iter().map(replace).collect(), ..self.alike() }
    }

    /// The same group with some of its members, by their places.
    pub(super) fn part(&self, kept: &[usize]) -> Self {
        Self {
            members: kept.iter().map(|i| self.members[*i].clone()).collect(),
            weights: kept.iter().map(|i| self.weights[*i]).collect(),
            classes: self.classes.as_ref().map(|classes| kept.iter().map(|i| classes[*i]).collect()),
            ..self.alike()
        }
    }

    fn alike(&self) -> Self {
        Self {
            members: Box::default(),
            weights: self.weights.clone(),
            classes: self.classes.clone(),
            weight: self.weight,
            turn: self.turn.same(),
        }
    }

    /// Whose turn it is, for the group that replaces this one.
    pub(crate) fn turn(&self) -> Turn {
        self.turn.same()
    }

    /// All members, in the order of the assignment.
    pub(crate) fn members(&self) -> &[Arc<C>] {
        &self.members
    }

    /// The locality's weight.
    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    /// A member's weight within the locality.
    pub(super) fn member_weight(&self, i: usize) -> u32 {
        self.weights[i]
    }

    /// What the control plane says of a member.
    pub(super) fn class(&self, i: usize) -> Class {
        self.classes.as_ref().map_or(Class::Usable, |classes| classes[i])
    }

    /// Members that the control plane lets be used.
    pub(crate) fn usable(&self) -> impl Iterator<Item = &Arc<C>> {
        self.members.iter().enumerate().filter(|(i, _)| self.class(*i) == Class::Usable).map(|(_, member)| member)
    }

    /// Members that the control plane lets be used, if only when there are not enough others.
    pub(crate) fn in_service(&self) -> impl Iterator<Item = &Arc<C>> {
        self.members.iter().enumerate().filter(|(i, _)| self.class(*i) != Class::Unusable).map(|(_, member)| member)
    }

    /// Whether a picker takes a member, now or once it can be reached.
    pub(super) fn selects(&self, i: usize, selection: Selection) -> bool {
        selection.class.is_none_or(|class| class == self.class(i))
    }
}

impl<C: Candidate> Group<C> {
    fn can_pick(&self, i: usize, selection: Selection) -> bool {
        self.selects(i, selection) && self.members[i].standing(selection.panic) > Standing::Unavailable
    }

    /// Whether any member can be picked.
    pub(super) fn is_available(&self, selection: Selection) -> bool {
        (0..self.members.len()).any(|i| self.can_pick(i, selection))
    }

    /// How many members can be picked.
    pub(super) fn available(&self, selection: Selection) -> usize {
        (0..self.members.len()).filter(|i| self.can_pick(*i, selection)).count()
    }
}

impl<C: Candidate> Usable<C> {
    /// `None`: no member can be picked.
    pub(super) fn new(group: &Arc<Group<C>>, selection: Selection, weighing: Weighing<'_>) -> Option<Self> {
        let all = group.members.len();
        let chosen: Vec<u32> =
            (0..all).filter(|i| group.can_pick(*i, selection)).filter_map(|i| u32::try_from(i).ok()).collect();
        if chosen.is_empty() {
            return None;
        }
        let len = chosen.len();
        let chosen = if len == all { None } else { Some(chosen.into()) };
        let mut usable = Self { group: group.clone(), chosen, shares: None, len };
        usable.shares = match (&usable.chosen, weighing) {
            (None, Weighing::Said) => Shares::new(&group.weights),
            _ => {
                let greatest = (0..len).map(|i| usable.member_weight(i)).max().unwrap_or(0);
                let weight = |i| weighing.weight(usable.member_weight(i), greatest, &**usable.member(i));
                let weights: Vec<u32> = (0..len).map(weight).collect();
                Shares::new(&weights)
            }
        };
        Some(usable)
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

    /// Two such draws, for little more than the price of one where weights are alike.
    #[inline]
    pub(super) fn draw_two(&self, rng: &mut fastrand::Rng) -> (usize, usize) {
        match &self.shares {
            None => two_of(self.len(), rng),
            Some(shares) => (shares.draw(rng), shares.draw(rng)),
        }
    }

    fn position(&self, i: usize) -> usize {
        self.chosen.as_ref().map_or(i, |chosen| chosen[i] as usize)
    }
}

/// Two places among `n`, from the halves of one random word: as even as 2^32 can be parted by `n`.
#[inline]
fn two_of(n: usize, rng: &mut fastrand::Rng) -> (usize, usize) {
    let word = rng.u64(..);
    let part = |half: u64| index((half * n as u64) >> 32);
    (part(word >> 32), part(word & u64::from(u32::MAX)))
}

impl<C> fmt::Debug for Group<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Group")
            .field("members", &self.members.len())
            .field("weight", &self.weight)
            .finish_non_exhaustive()
    }
}
