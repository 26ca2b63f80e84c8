//! Whether outlier detection lets an endpoint be used; and the one request of an endpoint on probation.

use crate::atomic::{AtomicU8, Ordering::Relaxed};

/// Changed by the cluster's writer, and by requests to an endpoint on probation.
#[derive(Debug)]
pub(super) struct Rotation(AtomicU8);

/// What the cluster's writer says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Place {
    /// In the rotation.
    In = 0,
    /// Ejected.
    Out = 1,
    /// One request may go there, to find out whether it is well.
    Probation = 2,
}

/// That request was picked for it,
const CLAIMED: u8 = 3;
/// and is under way.
const PROBED: u8 = 4;

impl Rotation {
    pub(super) fn new() -> Self {
        Self(AtomicU8::new(Place::In as u8))
    }

    /// Whether it is ejected.
    #[inline]
    pub(super) fn is_out(&self) -> bool {
        self.0.load(Relaxed) == Place::Out as u8
    }

    /// Whether it is on probation, or the request that decides is picked or under way.
    #[inline]
    pub(super) fn is_on_probation(&self) -> bool {
        self.0.load(Relaxed) >= Place::Probation as u8
    }

    /// Whether a request may be picked for it.
    #[inline]
    pub(super) fn is_open(&self) -> bool {
        matches!(self.0.load(Relaxed), 0 | 2)
    }

    /// Whether a request that was picked for it may go there: on probation, one may.
    #[inline]
    pub(super) fn admits(&self) -> bool {
        let probation = Place::Probation as u8;
        self.0.load(Relaxed) != probation || self.0.compare_exchange(probation, CLAIMED, Relaxed, Relaxed).is_ok()
    }

    /// A request begins. True: it is the one that decides.
    #[inline]
    pub(super) fn begins(&self) -> bool {
        self.0.load(Relaxed) == CLAIMED && self.0.compare_exchange(CLAIMED, PROBED, Relaxed, Relaxed).is_ok()
    }

    /// The request that decides was given up before it told anything. True: another may find out.
    pub(super) fn given_up(&self) -> bool {
        self.0.compare_exchange(PROBED, Place::Probation as u8, Relaxed, Relaxed).is_ok()
    }

    /// Called by one thread at a time. A probe that is picked or under way goes on. True: it was not out before, and is now.
    pub(super) fn set(&self, place: Place) -> bool {
        if place == Place::Probation && self.is_on_probation() {
            return false;
        }
        self.0.swap(place as u8, Relaxed) != Place::Out as u8 && place == Place::Out
    }
}
