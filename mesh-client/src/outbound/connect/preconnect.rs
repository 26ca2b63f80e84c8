//! When a connection is made before a request needs it (Envoy's `per_upstream_preconnect_ratio` and `predictive_preconnect_ratio`).

use std::{iter::Sum, sync::Arc};
use tokio::sync::Notify;

/// Streams and room for them, at one endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Demand {
    /// Streams that wait for a connection.
    pub(crate) waiting: usize,
    /// Streams in flight.
    pub(crate) active: usize,
    /// Further streams that the connections can take, those being made included.
    pub(crate) room: usize,
}

/// What a cluster foresees.
#[derive(Clone, Debug)]
pub(crate) struct Foresight {
    /// Of the streams of all its endpoints.
    pub(crate) ratio: f64,
    /// A stream was taken.
    pub(crate) due: Arc<Notify>,
}

/// At most so many connections are begun for one request, as in Envoy.
pub(crate) const AT_ONCE: usize = 3;

impl Demand {
    /// Whether `ratio` times the streams need one more connection (Envoy's `ConnPoolImplBase::shouldConnect`).
    pub(crate) fn exceeds(self, ratio: f64) -> bool {
        #[allow(clippy::cast_precision_loss, reason = "counts of streams")]
        let [waiting, active, room] = [self.waiting, self.active, self.room].map(|count| count as f64);
        (waiting + active) * ratio > room + active
    }
}

impl Sum for Demand {
    fn sum<I: Iterator<Item = Self>>(demands: I) -> Self {
        demands.fold(Self::default(), |sum, demand| Self {
            waiting: sum.waiting + demand.waiting,
            active: sum.active + demand.active,
            room: sum.room + demand.room,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_are_made_for_the_ratio_of_the_streams() {
        let exceeds = |waiting, active, room, ratio| Demand { waiting, active, room }.exceeds(ratio);
        assert!(!exceeds(0, 0, 0, 3.0), "nothing is made without a request");
        assert!(!exceeds(0, 4, 0, 1.0) && !exceeds(1, 4, 1, 1.0));
        assert!(exceeds(1, 4, 0, 1.0), "one waits and there is no room");
        assert!(exceeds(0, 1, 0, 2.0) && !exceeds(0, 1, 1, 2.0));
        assert!(exceeds(0, 100, 49, 1.5) && !exceeds(0, 100, 50, 1.5));
    }
}
