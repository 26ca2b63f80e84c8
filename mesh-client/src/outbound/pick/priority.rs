//! Priorities: which take requests, and how many.
//!
//! gRPC (A56): the first that has an available endpoint takes all. gRPC connects to every endpoint, so it has to wait, with a failover
//! timer of 10 s, until it knows whether a priority works. Here an endpoint counts as available until it is ejected or fails to
//! connect, which `connect_timeout` bounds, and a higher priority is back in use as soon as one of its endpoints is.
//!
//! Envoy: a priority takes as much as its healthy endpoints times the overprovisioning factor cover, the rest spills over to the
//! next; then degraded endpoints, in the same way; and below the panic threshold health is disregarded.

use super::{
    Candidate, Group, Recipe,
    locality::{Class, Selection},
};
use crate::outbound::route::Profile;
use std::sync::Arc;

/// What a priority takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Share {
    pub(super) priority: usize,
    pub(super) selection: Selection,
    /// Of the requests.
    pub(super) percent: u32,
}

const HEALTHY: Selection = Selection { class: Some(Class::Usable), panic: false };
const DEGRADED: Selection = Selection { class: Some(Class::Degraded), panic: false };
/// Envoy's panic: every endpoint, whatever its health.
const ANY: Selection = Selection { class: None, panic: true };
/// `overprovisioning_factor`, percent.
const OVERPROVISIONING: u32 = 140;

/// Who takes requests; empty: no endpoint takes connections.
pub(super) fn in_force<C: Candidate>(priorities: &[Vec<Arc<Group<C>>>], recipe: &Recipe) -> Vec<Share> {
    match recipe.profile {
        Profile::Grpc => first(priorities),
        Profile::Envoy => {
            let counts: Vec<Count> = priorities.iter().map(|groups| Count::of(groups, recipe)).collect();
            let settings = &recipe.settings;
            let shares = spill(&counts, settings.panic_threshold, settings.fail_on_panic);
            // A threshold of zero never disregards health; that connections fail is no matter of health.
            let unsound = settings.panic_threshold == 0.0 && counts.iter().all(|count| count.sound == 0);
            if shares.is_empty() && !settings.fail_on_panic && !unsound { first(priorities) } else { shares }
        }
    }
}

/// Who takes the retries that leave these priorities behind; empty: nobody but them is there.
pub(super) fn elsewhere<C: Candidate>(priorities: &[Vec<Arc<Group<C>>>], recipe: &Recipe, left: &[bool]) -> Vec<Share> {
    let left = |priority: usize| left.get(priority).is_some_and(|left| *left);
    let counts = priorities.iter().map(|groups| Count::of(groups, recipe)).enumerate();
    let counts: Vec<Count> = counts.map(|(i, count)| if left(i) { Count::default() } else { count }).collect();
    match recipe.profile {
        Profile::Grpc => {
            let first = counts.iter().position(|count| count.healthy > 0);
            first.map(|priority| Share { priority, selection: HEALTHY, percent: 100 }).into_iter().collect()
        }
        // Health counts: who is in panic has nothing better to offer than those that were left.
        Profile::Envoy => spill(&counts, 0.0, false),
    }
}

/// The priorities that a retry leaves behind (Envoy's `previous_priorities`): those of all attempts so far, looked at after every
/// `every` of them. When no other is left that can take requests, all begin anew. `tried` are those of the attempts, in order.
pub(crate) fn left_behind(tried: &[usize], every: usize, counts: &[Count]) -> Box<[bool]> {
    let mut left = vec![false; counts.len()];
    let mut attempted = 0;
    let mut since = 0;
    for (n, _) in tried.iter().enumerate() {
        attempted += 1;
        if every == 0 || attempted % every != 0 {
            continue;
        }
        for priority in &tried[since..=n] {
            if let Some(left) = left.get_mut(*priority) {
                *left = true;
            }
        }
        let other = left.iter().zip(counts).any(|(left, count)| !left && count.can_take());
        if !other {
            left.fill(false);
            attempted = 0;
            since = n + 1;
        }
    }
    left.into()
}

/// The first that has an available endpoint; if there is none, over the ejected endpoints of the first priority that has any.
fn first<C: Candidate>(priorities: &[Vec<Arc<Group<C>>>]) -> Vec<Share> {
    let found = [false, true].into_iter().find_map(|panic| {
        let selection = Selection { panic, ..HEALTHY };
        let available = |groups: &Vec<Arc<Group<C>>>| groups.iter().any(|group| group.is_available(selection));
        priorities.iter().position(available).map(|priority| Share { priority, selection, percent: 100 })
    });
    found.into_iter().collect()
}

/// Draws one of these priorities, and the class of endpoints that is to take the request there (`None`: any, health is disregarded).
/// `None`: none is to take it.
pub(crate) fn spilled(
    counts: &[Count],
    threshold: f64,
    fail_on_panic: bool,
    rng: &mut fastrand::Rng,
) -> Option<(usize, Option<Class>)> {
    let shares = spill(counts, threshold, fail_on_panic);
    let total: u32 = shares.iter().map(|share| share.percent).sum();
    let mut left = rng.u32(..total.max(1));
    let drawn = shares.iter().find(|share| {
        let hit = left < share.percent;
        left = left.saturating_sub(share.percent);
        hit
    })?;
    Some((drawn.priority, drawn.selection.class))
}

/// The endpoints of a priority.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Count {
    total: usize,
    /// Healthy, and can be connected to.
    healthy: usize,
    degraded: usize,
    /// Healthy or degraded, whether they can be connected to or not: what panic is decided by.
    sound: usize,
    /// `overprovisioning_factor`, percent.
    factor: u32,
}

impl Count {
    pub(super) fn of<C: Candidate>(groups: &[Arc<Group<C>>], recipe: &Recipe) -> Self {
        let factor = recipe.overprovisioning_factor.unwrap_or(OVERPROVISIONING);
        let mut count = Self { factor, ..Self::default() };
        for group in groups {
            count.total += group.members().len();
            count.healthy += group.available(HEALTHY);
            count.degraded += group.available(DEGRADED);
            let sound = |(i, member): &(usize, &Arc<C>)| group.class(*i) != Class::Unusable && !member.is_ejected();
            count.sound += group.members().iter().enumerate().filter(sound).count();
        }
        count
    }

    /// Percent of requests that so many of its endpoints cover.
    fn covers(&self, endpoints: usize) -> u32 {
        if self.total == 0 {
            return 0;
        }
        u32::try_from((endpoints as u64 * u64::from(self.factor) / self.total as u64).min(100)).unwrap_or(100)
    }

    /// Percent of requests that its healthy endpoints cover.
    pub(crate) fn healthy_cover(&self) -> u32 {
        self.covers(self.healthy)
    }

    /// Whether it has an endpoint for a request.
    pub(crate) fn can_take(&self) -> bool {
        self.covers(self.healthy) + self.covers(self.degraded) > 0
    }

    fn is_in_panic(&self, threshold: f64) -> bool {
        #[allow(clippy::cast_precision_loss, reason = "counts of endpoints")]
        let sound = 100.0 * self.sound as f64 / self.total.max(1) as f64;
        sound < threshold
    }
}

/// Envoy `LoadBalancerBase::recalculatePerPriorityState` and `recalculatePerPriorityPanic`.
fn spill(counts: &[Count], threshold: f64, fail_on_panic: bool) -> Vec<Share> {
    let healthy: Vec<u32> = counts.iter().map(|c| c.covers(c.healthy)).collect();
    let degraded: Vec<u32> = counts.iter().map(|c| c.covers(c.degraded)).collect();
    let total = healthy.iter().chain(&degraded).sum::<u32>().min(100);
    let panics = |count: &Count| total < 100 && count.is_in_panic(threshold);
    if total == 0 || counts.iter().all(panics) {
        if fail_on_panic || threshold == 0.0 {
            return Vec::new();
        }
        // By the number of endpoints.
        let all = counts.iter().map(|c| c.total).sum::<usize>().max(1);
        return (counts.iter().enumerate())
            .filter(|(_, count)| count.total > 0)
            .map(|(priority, count)| {
                let percent = u32::try_from((count.total * 100).div_ceil(all)).unwrap_or(100);
                Share { priority, selection: ANY, percent }
            })
            .collect();
    }
    let mut left = 100;
    let mut shares = Vec::new();
    for (cover, selection) in [(&healthy, HEALTHY), (&degraded, DEGRADED)] {
        for (priority, cover) in cover.iter().enumerate() {
            let percent = (cover * 100 / total).min(left);
            left -= percent;
            if percent == 0 {
                continue;
            }
            let selection = if panics(&counts[priority]) { ANY } else { selection };
            shares.push(Share { priority, selection, percent });
        }
    }
    if let Some(share) = shares.first_mut() {
        // What rounding left over.
        share.percent += left;
    }
    shares.retain(|share| !(fail_on_panic && share.selection == ANY));
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(total: usize, healthy: usize, degraded: usize) -> Count {
        Count { total, healthy, degraded, sound: healthy + degraded, factor: 140 }
    }

    fn loads(counts: &[Count]) -> Vec<(usize, Selection, u32)> {
        spill(counts, 50.0, false).into_iter().map(|s| (s.priority, s.selection, s.percent)).collect()
    }

    /// The table of Envoy's documentation, "Priority levels".
    #[test]
    fn what_a_priority_does_not_cover_spills_over() {
        let two = |p0, p1| loads(&[count(100, p0, 0), count(100, p1, 0)]);
        assert_eq!(two(100, 100), [(0, HEALTHY, 100)]);
        assert_eq!(two(72, 100), [(0, HEALTHY, 100)]);
        assert_eq!(two(71, 100), [(0, HEALTHY, 99), (1, HEALTHY, 1)]);
        assert_eq!(two(50, 100), [(0, HEALTHY, 70), (1, HEALTHY, 30)]);
        assert_eq!(two(25, 100), [(0, HEALTHY, 35), (1, HEALTHY, 65)]);
        assert_eq!(two(0, 100), [(1, HEALTHY, 100)]);
        // 25 % and 25 %: both are in panic, all endpoints take their part.
        assert_eq!(two(25, 25), [(0, ANY, 50), (1, ANY, 50)]);
        assert_eq!(two(0, 0), [(0, ANY, 50), (1, ANY, 50)]);
    }

    #[test]
    fn degraded_endpoints_take_what_healthy_ones_do_not_cover() {
        assert_eq!(loads(&[count(100, 100, 0)]), [(0, HEALTHY, 100)]);
        assert_eq!(loads(&[count(100, 50, 50)]), [(0, HEALTHY, 70), (0, DEGRADED, 30)]);
        assert_eq!(loads(&[count(100, 0, 100)]), [(0, DEGRADED, 100)]);
        // A lower priority's healthy ones come before degraded ones.
        assert_eq!(loads(&[count(100, 50, 50), count(100, 100, 0)]), [(0, HEALTHY, 70), (1, HEALTHY, 30)]);
    }

    #[test]
    fn retries_leave_the_priorities_of_the_attempts_behind() {
        let [up, down] = [count(10, 10, 0), count(10, 0, 0)];
        let left = |tried: &[usize], every, counts: &[Count]| left_behind(tried, every, counts).into_vec();
        assert_eq!(left(&[0], 1, &[up, up, up]), [true, false, false]);
        assert_eq!(left(&[0, 1], 1, &[up, up, up]), [true, true, false]);
        // All were tried: anew, and the next attempt counts again.
        assert_eq!(left(&[0, 1, 2], 1, &[up, up, up]), [false; 3]);
        assert_eq!(left(&[0, 1, 2, 0], 1, &[up, up, up]), [true, false, false]);
        // One that cannot take any is no other.
        assert_eq!(left(&[0], 1, &[up, down]), [false; 2]);
        // Looked at after every second attempt.
        assert_eq!(left(&[0], 2, &[up, up]), [false; 2]);
        assert_eq!(left(&[0, 0], 2, &[up, up]), [true, false]);
        assert_eq!(left(&[0, 0, 1], 2, &[up, up]), [true, false]);
        assert_eq!(left(&[0, 0, 1, 1], 2, &[up, up]), [false; 2]);
    }

    #[test]
    fn panic_can_fail_requests_or_be_off() {
        let counts = [count(10, 2, 0)];
        assert_eq!(spill(&counts, 50.0, true), []);
        assert_eq!(spill(&counts, 0.0, false), [Share { priority: 0, selection: HEALTHY, percent: 100 }]);
        assert_eq!(spill(&counts, 50.0, false), [Share { priority: 0, selection: ANY, percent: 100 }]);
    }
}
