//! Which cluster of an aggregate takes the next attempt (gRFC A37, A75; Envoy's aggregate clusters): their priorities, one cluster's
//! after the other's, are the priorities of the aggregate. How a cluster balances and connects is its own.

use super::{Avoid, Endpoint, Link, LiveCluster};
use crate::outbound::{
    pick::{Count, Part, left_behind, spilled},
    route::Profile,
};
use smallvec::SmallVec;
use std::sync::Arc;

/// How an aggregate shares requests among its leaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rules {
    pub(crate) profile: Profile,
    /// Of the aggregate, percent.
    pub(crate) panic_threshold: f64,
    pub(crate) fail_on_panic: bool,
}

/// Who of a cluster's endpoints can be picked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reach {
    /// Some.
    Well,
    /// Only ejected ones.
    Panic,
    Nobody,
}

/// The leaf that takes the next attempt, and the part of it where the aggregate decides that; `None`: there are no leaves. One of which
/// nothing can be picked is chosen only if there is no other.
///
/// gRPC: the first with an endpoint to pick; one that has but ejected ones comes after all others. Envoy: each as much as its healthy
/// endpoints cover, what is left spills over to the next. The priorities that are `left` behind, by leaf, take no part.
pub(crate) fn choose<'a, L: Link>(
    leaves: impl Iterator<Item = (usize, &'a LiveCluster<L>)> + Clone,
    rules: Rules,
    left: &[(usize, usize)],
    rng: &mut fastrand::Rng,
) -> Option<(usize, Option<Part>)> {
    let first = leaves.clone().next()?;
    let whole = left.is_empty() && covers_all(&first.1.counts());
    if rules.profile == Profile::Envoy && !whole && leaves.clone().nth(1).is_some() {
        let mut places: SmallVec<[(usize, usize); 8]> = SmallVec::new();
        let mut counts: SmallVec<[Count; 8]> = SmallVec::new();
        for (leaf, live) in leaves.clone() {
            let own = live.counts();
            places.extend((0..own.len()).map(|priority| (leaf, priority)));
            let part = |(i, count): (usize, &Count)| if left.contains(&(leaf, i)) { Count::default() } else { *count };
            counts.extend(own.iter().enumerate().map(part));
        }
        if let Some((place, class)) = spilled(&counts, rules.panic_threshold, rules.fail_on_panic, rng) {
            let (leaf, priority) = places[place];
            return Some((leaf, class.map(|class| Part { priority, class })));
        }
    }
    let other = |(leaf, live): &(usize, &LiveCluster<L>)| {
        let counts = live.counts();
        left.is_empty() || (0..counts.len()).any(|i| counts[i].can_take() && !left.contains(&(*leaf, i)))
    };
    let ranked = |wanted: Reach| leaves.clone().find(|leaf| leaf.1.reach() == wanted && other(leaf));
    let (leaf, _) = ranked(Reach::Well).or_else(|| ranked(Reach::Panic)).unwrap_or(first);
    Some((leaf, None))
}

/// The priorities of leaves that a retry leaves behind, as [`left_behind`] says of one cluster.
pub(crate) fn leave_behind<'a, L: Link>(
    leaves: impl Iterator<Item = (usize, &'a LiveCluster<L>)> + Clone,
    avoid: &Avoid<'_, L>,
) -> SmallVec<[(usize, usize); 4]> {
    let mut places: SmallVec<[(usize, usize); 8]> = SmallVec::new();
    let mut counts: SmallVec<[Count; 8]> = SmallVec::new();
    for (leaf, live) in leaves.clone() {
        let own = live.counts();
        places.extend((0..own.len()).map(|priority| (leaf, priority)));
        counts.extend(own.iter().copied());
    }
    let place = |endpoint: &Arc<Endpoint<L>>| {
        let (leaf, _) = leaves.clone().find(|(_, live)| endpoint.is_of(live))?;
        places.iter().position(|place| *place == (leaf, endpoint.placement().priority as usize))
    };
    let tried: SmallVec<[usize; 4]> = avoid.tried.iter().filter_map(place).collect();
    let left = left_behind(&tried, avoid.leave_priorities as usize, &counts);
    places.into_iter().zip(&left).filter(|(_, left)| **left).map(|(place, _)| place).collect()
}

/// Nothing is left for another.
fn covers_all(counts: &[Count]) -> bool {
    counts.iter().map(Count::healthy_cover).sum::<u32>() >= 100
}

impl<L: Link> LiveCluster<L> {
    fn reach(&self) -> Reach {
        match self.view.load().balancer.all() {
            None => Reach::Nobody,
            Some(picker) if picker.is_panic() => Reach::Panic,
            Some(_) => Reach::Well,
        }
    }

    /// How many endpoints of each priority can be picked.
    pub(super) fn counts(&self) -> Arc<[Count]> {
        let view = self.view.load();
        view.counts.get_or_init(|| self.writer().cut.counts()).clone()
    }
}
