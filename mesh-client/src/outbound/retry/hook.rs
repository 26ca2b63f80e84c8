//! The application's own say in what is retried.

use http::{HeaderMap, StatusCode};
use std::{error::Error as StdError, fmt, sync::Arc};

/// Says of an attempt's outcome whether it is to be retried, before the conditions of the policy do.
///
/// What it cannot change: how often (the policy's `max_retries`), how soon (back-off, pushback), the budget, and what can never be
/// retried: a body that is not kept, local limits, a deadline that passed. Where a route has no policy, nothing is asked.
pub trait Hook: Send + Sync + 'static {
    /// Looks at one outcome. Called on the path of the request: must not block.
    fn decide(&self, outcome: &HookOutcome<'_>) -> HookVerdict;
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct HookOutcome<'a> {
    /// The attempt, from 1.
    pub attempt: u32,
    /// The head of the response, where one came.
    pub response: Option<(StatusCode, &'a HeaderMap)>,
    /// The final gRPC status, where the head of the response (or trailers right behind it) has it.
    pub grpc: Option<tonic::Code>,
    /// What failed, where no response came.
    pub error: Option<&'a (dyn StdError + 'static)>,
}

/// What a [`Hook`] says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HookVerdict {
    /// The policy's conditions decide.
    #[default]
    Default,
    /// Retry, within the policy's limits.
    Retry,
    /// Give it to the caller.
    Return,
}

/// A shared hook.
#[derive(Clone)]
pub(crate) struct HookRef(pub(crate) Arc<dyn Hook>);

impl HookRef {
    pub(crate) fn ask(&self, outcome: &HookOutcome<'_>) -> Option<bool> {
        match self.0.decide(outcome) {
            HookVerdict::Default => None,
            HookVerdict::Retry => Some(true),
            HookVerdict::Return => Some(false),
        }
    }
}

impl<F> Hook for F
where
    F: Fn(&HookOutcome<'_>) -> HookVerdict + Send + Sync + 'static,
{
    fn decide(&self, outcome: &HookOutcome<'_>) -> HookVerdict {
        self(outcome)
    }
}

impl fmt::Debug for HookRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}
