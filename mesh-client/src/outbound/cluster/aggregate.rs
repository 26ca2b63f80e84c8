//! Which cluster of an aggregate takes the next attempt (gRFC A37, A75; Envoy's aggregate clusters): their priorities, one cluster's
//! after the other's, are the priorities of the aggregate. How a cluster balances and connects is its own.

use super::{Link, LiveCluster};
use crate::outbound::{
    pick::{Count, Part, spilled},
    route::Profile,
};
use smallvec::SmallVec;

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
/// endpoints cover, what is left spills over to the next.
pub(crate) fn choose<'a, L: Link>(
    leaves: impl Iterator<Item = (usize, &'a LiveCluster<L>)> + Clone,
    rules: Rules,
    rng: &mut fastrand::Rng,
) -> Option<(usize, Option<Part>)> {
    let first = leaves.clone().next()?;
    if rules.profile == Profile::Envoy && !covers_all(&first.1.counts()) && leaves.clone().nth(1).is_some() {
        let mut places: SmallVec<[(usize, usize); 8]> = SmallVec::new();
        let mut counts: SmallVec<[Count; 8]> = SmallVec::new();
        for (leaf, live) in leaves.clone() {
            let own = live.counts();
            places.extend((0..own.len()).map(|priority| (leaf, priority)));
            counts.extend(own.iter().copied());
        }
        if let Some((place, class)) = spilled(&counts, rules.panic_threshold, rules.fail_on_panic, rng) {
            let (leaf, priority) = places[place];
            return Some((leaf, class.map(|class| Part { priority, class })));
        }
    }
    let ranked = |wanted: Reach| leaves.clone().find(|(_, live)| live.reach() == wanted);
    let (leaf, _) = ranked(Reach::Well).or_else(|| ranked(Reach::Panic)).unwrap_or(first);
    Some((leaf, None))
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
    fn counts(&self) -> Box<[Count]> {
        let view = self.view.load();
        view.counts.get_or_init(|| self.writer().cut.counts()).clone()
    }
}
