//! Least request (gRFC A48): the least loaded of `choice_count` draws with replacement.
//!
//! When weights differ, candidates are drawn by weight and compared by load per weight. Both the idle and the loaded
//! cluster then share requests by weight, as with Envoy's `weight / (active + 1)` schedule, in constant time.

use super::{Candidate, locality::Usable};
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
    let mut best = sample(locality, rng);
    for _ in 1..choice_count.clamp(MIN_CHOICES, MAX_CHOICES) {
        let other = sample(locality, rng);
        if other.load * best.weight < best.load * other.weight {
            best = other;
        }
    }
    best.candidate
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
