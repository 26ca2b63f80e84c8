//! Points in time that may be further away than the clock can count.

use std::time::Duration;
use tokio::time::Instant;

/// Longer than any connection, call or interval: what says more means for ever.
pub(crate) const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);

/// So long after `at`, whatever `limit` is.
#[inline]
pub(crate) fn after(at: Instant, limit: Duration) -> Instant {
    at + limit.min(FAR)
}
