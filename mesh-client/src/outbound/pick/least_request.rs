//! Least request (gRFC A48): the least loaded of `choice_count` draws with replacement.
//!
//! When weights differ, candidates are drawn by weight and compared by load per weight. Both the idle and the loaded
//! cluster then share requests by weight, as with Envoy's `weight / (active + 1)` schedule, in constant time.

use super::{Candidate, Drawn, locality::Usable};
use std::sync::Arc;

/// Draws below this are not a choice.
const MIN_CHOICES: u32 = 2;
/// gRFC A48 clamps to this.
const MAX_CHOICES: u32 = 10;

/// `None` is never returned for a locality with members; the result is the best of the draws by judgement, then by load.
#[inline]
pub(super) fn draw<'a, C: Candidate>(
    locality: &'a Usable<C>,
    choice_count: u32,
    rng: &mut fastrand::Rng,
    judge: impl Fn(&'a Arc<C>) -> Drawn<'a, C>,
) -> Option<Drawn<'a, C>> {
    let mut best: Option<(Drawn<'a, C>, u64, u64)> = None;
    for _ in 0..choice_count.clamp(MIN_CHOICES, MAX_CHOICES) {
        let i = locality.draw_index(rng);
        let candidate = locality.member(i);
        let weight = if locality.shares.is_some() { u64::from(locality.member_weight(i)) } else { 1 };
        let load = u64::from(candidate.load());
        let drawn = judge(candidate);
        let better = best.as_ref().is_none_or(|(other, other_load, other_weight)| {
            (drawn.rank(), load * other_weight) < (other.rank(), other_load * weight)
        });
        if better {
            best = Some((drawn, load, weight));
        }
    }
    best.map(|(drawn, ..)| drawn)
}

impl<C> Drawn<'_, C> {
    /// Lower is better.
    fn rank(&self) -> u8 {
        match self {
            Drawn::Good(_) => 0,
            Drawn::Connecting(_) => 1,
            Drawn::Bad => 2,
        }
    }
}
