//! The deadline of a call: the caller's `grpc-timeout` and the route's limits, whichever ends first.

mod grpc_timeout;
mod headers;
mod idle;
mod layer;
mod rules;
mod sent;

pub(crate) use grpc_timeout::{encode_grpc_timeout, parse_grpc_timeout};
pub use headers::{HeadersFuture, HeadersTimeout, HeadersTimeoutLayer};
pub(crate) use idle::{Idle, IdleTimer, StoodStill};
pub use layer::{ResponseBody, ResponseFuture, Timeout, TimeoutLayer};
pub(crate) use rules::{Deadline, Rules, Source, is_grpc, write_grpc_timeout};
pub(crate) use sent::HeadTimer;
pub use sent::RequestBody;

use std::time::Duration;

/// A call took longer than it was allowed to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("deadline of {limit:?} exceeded ({origin})")]
pub struct Elapsed {
    limit: Duration,
    origin: Source,
}

impl Elapsed {
    pub(crate) fn new(deadline: &Deadline) -> Self {
        Self { limit: deadline.limit, origin: deadline.source }
    }

    /// How long the call was allowed to take.
    pub fn limit(&self) -> Duration {
        self.limit
    }
}
