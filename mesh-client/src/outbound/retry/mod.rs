//! Retries: what is retried, when, how often, and with which body.

mod attempts;
mod budget;
mod classify;
mod fan;
mod hedge;
mod hook;
mod layer;
mod outgoing;
mod policy;
mod replay;
mod reset;
mod shared;

pub(crate) use attempts::{Attempts, Decision, Situation, Stop};
pub use budget::{Permit, RetryBudget};
pub(crate) use classify::{
    Failure, Outcome, Pushback, Response, grpc_from_http, grpc_from_reset, grpc_status, http_from_grpc,
};
pub(crate) use fan::{Fan, FanBody, is_behind};
pub use hedge::{Hedge, HedgeBody, HedgeFuture, HedgeLayer};
pub(crate) use hook::HookRef;
pub use hook::{Hook, HookOutcome, HookVerdict};
pub use layer::{ResponseFuture, Retry, RetryLayer};
pub(crate) use outgoing::{Kept, Outgoing};
pub use policy::{Condition, Policy, PolicyBuilder};
pub(crate) use replay::Replay;
pub use replay::{DEFAULT_REPLAY_CAP, ReplayBody, ReplayError};
use shared::Shared;

use std::time::Duration;

/// An attempt took longer than its policy's `per_try_timeout`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("attempt {attempt} had no response within its limit of {limit:?} (per_try_timeout)")]
pub struct PerTryElapsed {
    limit: Duration,
    attempt: u32,
}

impl PerTryElapsed {
    pub(crate) fn new(limit: Duration, attempt: u32) -> Self {
        Self { limit, attempt }
    }

    /// How long the attempt was allowed to take.
    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Which attempt it was, from 1.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
}
