//! Whom a server refuses: all are counted, and the log has a line now and then, for anybody who reaches the port can be refused.

use metrics::counter;
use std::{
    fmt::Display,
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};
use tokio::time::Instant;

/// Between two lines of the log.
const PAUSE: Duration = Duration::from_secs(5);

/// What one listening socket, or one policy, refuses.
#[derive(Debug)]
pub(crate) struct Refusals {
    begin: Instant,
    /// When the log may have the next, in milliseconds.
    next: AtomicU64,
    /// Those that it did not have.
    untold: AtomicU64,
}

impl Default for Refusals {
    fn default() -> Self {
        Self { begin: Instant::now(), next: AtomicU64::new(0), untold: AtomicU64::new(0) }
    }
}

impl Refusals {
    /// A connection is not taken.
    pub(super) fn connection(&self, reason: &'static str, remote: SocketAddr, error: &dyn Display) {
        counter!("mesh_inbound_connections_refused_total", "reason" => reason).increment(1);
        match self.turn(Instant::now()) {
            Some(untold) => tracing::warn!(%remote, reason, %error, untold, "a connection was refused"),
            None => tracing::debug!(%remote, reason, %error, "a connection was refused"),
        }
    }

    /// A request is not served, for something that its policy has not decided.
    pub(super) fn request(&self, reason: &'static str, error: &dyn Display) {
        crate::transport::count_refused(reason);
        match self.turn(Instant::now()) {
            Some(untold) => tracing::warn!(target: "mesh::inbound", reason, %error, untold, "a request was refused"),
            None => tracing::debug!(target: "mesh::inbound", reason, %error, "a request was refused"),
        }
    }

    /// Whether the log has this one, and how many it had not before.
    fn turn(&self, now: Instant) -> Option<u64> {
        let millis = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let (next, now) = (self.next.load(Relaxed), millis(now.saturating_duration_since(self.begin)));
        let later = now.saturating_add(millis(PAUSE));
        if now >= next && self.next.compare_exchange(next, later, Relaxed, Relaxed).is_ok() {
            return Some(self.untold.swap(0, Relaxed));
        }
        self.untold.fetch_add(1, Relaxed);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_has_one_now_and_then_and_how_many_it_had_not() {
        let refusals = Refusals::default();
        let at = |millis| refusals.turn(refusals.begin + Duration::from_millis(millis));
        assert_eq!([0, 0, 4999, 5000, 5001, 20_000].map(at), [Some(0), None, None, Some(2), None, Some(1)]);
    }
}
