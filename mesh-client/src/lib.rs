//! Placeholder.

#[doc(hidden)]
pub mod bench_api;
mod outbound;
mod telemetry;
mod transport;

pub use outbound::route::Profile;
pub use telemetry::trace;

/// Retries, for any client: [`RetryLayer`](retry::RetryLayer).
pub mod retry {
    pub use crate::outbound::retry::{
        Budget, Condition, DEFAULT_REPLAY_CAP, PerTryElapsed, Permit, Policy, PolicyBuilder, ReplayBody, ReplayError,
        ResponseFuture, Retry, RetryLayer,
    };
}

/// Deadlines, for any client: [`TimeoutLayer`](timeout::TimeoutLayer).
pub mod timeout {
    pub use crate::outbound::timeout::{Elapsed, ResponseBody, ResponseFuture, Timeout, TimeoutLayer};
}
