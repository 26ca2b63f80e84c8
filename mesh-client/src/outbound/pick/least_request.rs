//! Least request (gRFC A48): the least loaded of `choice_count` draws with replacement.
//!
//! When weights differ, candidates are drawn by weight and compared by load per weight. Both the idle and the loaded
//! cluster then share requests by weight, as with Envoy's `weight / (active + 1)` schedule, in constant time. A look at all of them, or
//! another `active_request_bias`, is taken where it is said.

use super::{Candidate, locality::Usable, shares::index};
use std::sync::Arc;

/// Draws below this are not a choice.
const MIN_CHOICES: u32 = 2;
/// gRFC A48 clamps to this.
const MAX_CHOICES: u32 = 10;

/// The first of the least loaded.
#[inline]
pub(super) fn draw<'a, C: Candidate>(
    locality: &'a Usable<C>,
    choice_count: u32,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    if locality.shares.is_none() {
        return draw_evenly(locality, choice_count.clamp(MIN_CHOICES, MAX_CHOICES), rng);
    }
    let mut best = sample(locality, rng);
    for _ in 1..choice_count.clamp(MIN_CHOICES, MAX_CHOICES) {
        let other = sample(locality, rng);
        if other.load * best.weight < best.load * other.weight {
            best = other;
        }
    }
    best.candidate
}

/// The same among like weights. Without a branch on a load, so that the processor fetches all of them at once.
#[inline]
fn draw_evenly<'a, C: Candidate>(locality: &'a Usable<C>, choices: u32, rng: &mut fastrand::Rng) -> &'a Arc<C> {
    // By load, then by the order in which they were drawn: 28 bits, 4 bits, and the place.
    const MAX_LOAD: u32 = (1 << 28) - 1;
    let mut best = u64::MAX;
    let mut take = |i: usize, turn: u32| {
        let load = locality.member(i).load().min(MAX_LOAD);
        best = best.min(u64::from(load << 4 | turn) << 32 | i as u64);
    };
    for turn in (0..choices).step_by(2) {
        let (one, other) = locality.draw_two(rng);
        take(one, turn);
        if turn + 1 < choices {
            take(other, turn + 1);
        }
    }
    locality.member(index(best & u64::from(u32::MAX)))
}

/// What is said beyond the number of draws.
#[derive(Clone, Copy)]
pub(super) struct Rules {
    pub(super) choice_count: u32,
    pub(super) bias: Option<f64>,
    pub(super) full_scan: bool,
}

/// Up to this many endpoints a biased draw looks at all of them.
const FEW: usize = 32;
/// Of more, it looks at so many draws by weight.
const SAMPLES: usize = 16;

/// As Envoy does where more is said: endpoints of one weight by draws or by a look at all of those that are `fit`, others by
/// `weight / (in flight + 1)^bias`, which Envoy keeps a schedule of.
pub(super) fn draw_by<'a, C: Candidate>(
    locality: &'a Usable<C>,
    rules: Rules,
    fit: impl Fn(&Arc<C>) -> bool,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    match (&locality.shares, rules) {
        (None, Rules { full_scan: true, .. }) => scan(locality, fit, rng),
        (Some(_), Rules { bias: Some(bias), .. }) => biased(locality, bias, fit, rng),
        (_, Rules { choice_count, .. }) => draw(locality, choice_count, rng),
    }
}

/// The least loaded of all that are `fit`; of several, any alike.
fn scan<'a, C: Candidate>(
    locality: &'a Usable<C>,
    fit: impl Fn(&Arc<C>) -> bool,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    let mut best = ((true, u32::MAX), locality.member(0));
    let mut ties: usize = 0;
    for candidate in (0..locality.len()).map(|i| locality.member(i)) {
        let rank = (!fit(candidate), candidate.load());
        if rank > best.0 {
            continue;
        }
        ties = if rank == best.0 { ties + 1 } else { 1 };
        if rng.usize(..ties) == 0 {
            best = (rank, candidate);
        }
        best.0 = rank;
    }
    best.1
}

/// Exact among few; among many, of a sample that was drawn by weight.
fn biased<'a, C: Candidate>(
    locality: &'a Usable<C>,
    bias: f64,
    fit: impl Fn(&Arc<C>) -> bool,
    rng: &mut fastrand::Rng,
) -> &'a Arc<C> {
    let rate = |candidate: &Arc<C>| if fit(candidate) { (f64::from(candidate.load()) + 1.0).powf(-bias) } else { 0.0 };
    let few = locality.len() <= FEW;
    let mut total = 0.0;
    let mut chosen = None;
    for n in 0..if few { locality.len() } else { SAMPLES } {
        let i = if few { n } else { locality.draw_index(rng) };
        let candidate = locality.member(i);
        let weight = if few { f64::from(locality.member_weight(i)) } else { 1.0 };
        let part = weight * rate(candidate);
        total += part;
        // Each takes the place of those before it with the probability of its part.
        if part > 0.0 && rng.f64() * total < part {
            chosen = Some(candidate);
        }
    }
    chosen.unwrap_or_else(|| locality.member(locality.draw_index(rng)))
}

struct Sample<'a, C> {
    candidate: &'a Arc<C>,
    load: u64,
    weight: u64,
}

#[inline]
fn sample<'a, C: Candidate>(locality: &'a Usable<C>, rng: &mut fastrand::Rng) -> Sample<'a, C> {
    let i = locality.draw_index(rng);
    let candidate = locality.member(i);
    let weight = if locality.shares.is_some() { u64::from(locality.member_weight(i)) } else { 1 };
    Sample { candidate, load: u64::from(candidate.load()), weight }
}
