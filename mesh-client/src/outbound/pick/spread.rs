//! Policies that choose a locality by weight, then an endpoint in it: round robin, random, least request, peak EWMA, weighted round robin.

use super::{
    Candidate, Drawn, Group, PickInput, Recipe, Shares, Standing, Turn, best, least_request,
    locality::{Selection, Usable},
    peak_ewma::{self, Ewma},
    random, round_robin,
    shares::index,
    stride::{self, Stride},
    weighing::Weighing,
    zone,
};
use crate::outbound::route::Profile;
use mesh_xds::resource::{LbPolicy, LocalityLb};
use std::sync::Arc;
use tokio::time::Instant;

/// The localities of one priority that have an endpoint to pick.
pub(super) struct Spread<C> {
    policy: Policy,
    localities: Box<[Usable<C>]>,
    /// Of the localities; `None` when their weights are alike.
    shares: Option<Shares>,
    /// Parallel to the localities; empty but for weighted round robin.
    strides: Box<[Option<Stride>]>,
    turn: Arc<Turn>,
    size: usize,
}

#[derive(Clone, Copy)]
enum Policy {
    RoundRobin,
    Random,
    LeastRequest(u32),
    LeastRequestBy(least_request::Rules),
    PeakEwma(Ewma),
    Weighted,
}

/// Draws before a look at all. An available endpoint is missed with a chance of (share of unavailable)^8, and the next
/// picker leaves those out.
const DRAWS: usize = 8;
/// Up to this many endpoints a look at all of them costs no more than the draws did.
const SMALL: usize = 32;

impl<C: Candidate> Spread<C> {
    /// `None`: no endpoint can be picked.
    pub(super) fn new(
        groups: &[Arc<Group<C>>],
        selection: Selection,
        recipe: &Recipe,
        turn: &Arc<Turn>,
        now: Instant,
    ) -> Option<Self> {
        let weighing = recipe.settings.slow_start.as_ref().map_or(Weighing::Said, |c| Weighing::SlowStart(c, now));
        let localities: Box<[_]> = groups.iter().filter_map(|group| Usable::new(group, selection, weighing)).collect();
        if localities.is_empty() {
            return None;
        }
        let policy = match &recipe.policy {
            LbPolicy::RoundRobin => Policy::RoundRobin,
            LbPolicy::LeastRequest { choice_count, bias: None, full_scan: false } => {
                Policy::LeastRequest(*choice_count)
            }
            LbPolicy::LeastRequest { choice_count, bias, full_scan } => Policy::LeastRequestBy(least_request::Rules {
                choice_count: *choice_count,
                bias: *bias,
                full_scan: *full_scan,
            }),
            LbPolicy::PeakEwma(config) => Policy::PeakEwma(Ewma::new(config, recipe.begun)),
            LbPolicy::WeightedRoundRobin(_) => Policy::Weighted,
            // What is not here is in `flat`; a policy that nobody registered never comes so far.
            _ => Policy::Random,
        };
        let strides = match &recipe.policy {
            LbPolicy::WeightedRoundRobin(config) => localities.iter().map(|l| Stride::of(l, config, now)).collect(),
            _ => Box::default(),
        };
        let weights = match (recipe.settings.localities, recipe.profile) {
            (LocalityLb::ZoneAware { enabled, min_cluster_size }, Profile::Envoy) => {
                zone::weights(&localities, enabled, min_cluster_size, recipe.own_zone.as_ref())
            }
            _ => localities.iter().map(Usable::weight).collect(),
        };
        let size = localities.iter().map(Usable::len).sum();
        Some(Self { policy, localities, shares: Shares::new(&weights), strides, turn: turn.clone(), size })
    }

    /// Picks one, not among `excluded` when there is another. `None`: all have become unavailable since the picker was built.
    #[inline]
    pub(super) fn pick(
        &self,
        input: &PickInput<'_>,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&Arc<C>> {
        let first = self.draw(input, panic, excluded, rng);
        if let Drawn::Good(candidate) = first {
            return Some(candidate);
        }
        self.pick_further(first, input, panic, excluded, rng)
    }

    #[cold]
    fn pick_further<'a>(
        &'a self,
        first: Drawn<'a, C>,
        input: &PickInput<'_>,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&'a Arc<C>> {
        // Any of those that were drawn, alike: always the first would be every eighth endpoint, where they are drawn in turn.
        let mut second_best = first.connecting();
        let mut seen = usize::from(second_best.is_some());
        for _ in 1..DRAWS {
            match self.draw(input, panic, excluded, rng) {
                Drawn::Good(candidate) => return Some(candidate),
                drawn => {
                    if let Some(candidate) = drawn.connecting() {
                        seen += 1;
                        if rng.usize(..seen) == 0 {
                            second_best = Some(candidate);
                        }
                    }
                }
            }
        }
        match second_best {
            Some(candidate) if self.size > SMALL => Some(candidate),
            _ => self.look_at_all(panic, excluded, rng),
        }
    }

    /// Endpoints that can be picked.
    pub(super) fn len(&self) -> usize {
        self.size
    }

    #[inline]
    fn draw(
        &self,
        input: &PickInput<'_>,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Drawn<'_, C> {
        let at = if self.localities.len() == 1 { 0 } else { self.choose(rng) };
        let locality = &self.localities[at];
        let candidate = match self.policy {
            Policy::RoundRobin => round_robin::draw(locality),
            Policy::Random => random::draw(locality, rng),
            Policy::LeastRequest(choice_count) => least_request::draw(locality, choice_count, rng),
            Policy::LeastRequestBy(rules) => {
                let fit = |candidate: &Arc<C>| candidate.standing(panic) == Standing::Available && !excluded(candidate);
                least_request::draw_by(locality, rules, fit, rng)
            }
            Policy::PeakEwma(ewma) => peak_ewma::draw(locality, &ewma, input.now, rng),
            Policy::Weighted => match &self.strides[at] {
                Some(stride) => stride::draw(locality, stride),
                None => round_robin::draw(locality),
            },
        };
        Drawn::judge(candidate, panic, excluded)
    }

    /// Which locality is next: in turn under round robin, else at random.
    fn choose(&self, rng: &mut fastrand::Rng) -> usize {
        let n = self.localities.len();
        match (self.policy, &self.shares) {
            (Policy::RoundRobin | Policy::Weighted, Some(shares)) => shares.at(self.turn.next()),
            (Policy::RoundRobin | Policy::Weighted, None) => index(self.turn.next() % n as u64),
            (_, Some(shares)) => shares.draw(rng),
            (_, None) => rng.usize(..n),
        }
    }

    /// The best of all, from a random place on: available, else connecting, else excluded.
    fn look_at_all(
        &self,
        panic: bool,
        excluded: &impl Fn(&Arc<C>) -> bool,
        rng: &mut fastrand::Rng,
    ) -> Option<&Arc<C>> {
        let start = rng.usize(..self.localities.len());
        let all = self.localities[start..].iter().chain(&self.localities[..start]).flat_map(|locality| {
            let start = rng.usize(..locality.len());
            (start..locality.len()).chain(0..start).map(|i| locality.member(i))
        });
        best(all, panic, excluded)
    }
}
