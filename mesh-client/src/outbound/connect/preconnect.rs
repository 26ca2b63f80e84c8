//! When a connection is made before a request needs it (Envoy's `per_upstream_preconnect_ratio`).

/// Streams and room for them, at one endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Demand {
    /// Streams that wait for a connection.
    pub(super) waiting: usize,
    /// Streams in flight.
    pub(super) active: usize,
    /// Further streams that the connections can take, those being made included.
    pub(super) room: usize,
}

/// At most so many connections are begun for one request, as in Envoy.
pub(super) const AT_ONCE: usize = 3;

impl Demand {
    /// Whether `ratio` times the streams need one more connection (Envoy's `ConnPoolImplBase::shouldConnect`).
    pub(super) fn exceeds(self, ratio: f64) -> bool {
        #[allow(clippy::cast_precision_loss, reason = "counts of streams")]
        let [waiting, active, room] = [self.waiting, self.active, self.room].map(|count| count as f64);
        (waiting + active) * ratio > room + active
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
