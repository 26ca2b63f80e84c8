//! Round robin: in turn, by weight.

use super::{locality::Usable, shares::index};
use std::sync::Arc;

/// The next one. Without weights each comes once a round; with weights each prefix of the sequence keeps close to them.
#[inline]
pub(super) fn draw<C>(locality: &Usable<C>) -> &Arc<C> {
    let turn = locality.next_turn();
    locality.member(match &locality.shares {
        None => index(turn % locality.len() as u64),
        Some(shares) => shares.at(turn),
    })
}
