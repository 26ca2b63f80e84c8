//! Random: an independent draw by weight for each request.

use super::locality::Usable;
use std::sync::Arc;

#[inline]
pub(super) fn draw<'a, C>(locality: &'a Usable<C>, rng: &mut fastrand::Rng) -> &'a Arc<C> {
    locality.member(locality.draw_index(rng))
}
