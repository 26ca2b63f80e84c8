//! One request at one endpoint: counted until it ends, and how it ended.

use super::{Endpoint, Link};
use crate::outbound::connect::Subchannel;
use std::{fmt, sync::Arc};

/// How a request ended, as outlier detection counts it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Anything but the following; a 4xx too.
    Success,
    /// A 5xx that is not a gateway failure, or the gRPC status that stands for one.
    ServerError,
    /// 502, 503, 504, UNAVAILABLE or DEADLINE_EXCEEDED, from the endpoint.
    GatewayFailure,
    /// No answer: connection refused or reset, timeout. Counts as a gateway failure (Envoy, unless
    /// `split_external_local_origin_errors`).
    LocalOrigin,
}

/// Counts one request against its endpoint until dropped.
#[must_use = "dropping it ends the request"]
pub(crate) struct InFlight<L: Link = Subchannel> {
    endpoint: Arc<Endpoint<L>>,
    recorded: bool,
    /// It is the one request of an endpoint on probation.
    probe: bool,
}

impl Outcome {
    /// Of an HTTP response's status code.
    pub(crate) fn of_http(status: http::StatusCode) -> Self {
        match status.as_u16() {
            502..=504 => Self::GatewayFailure,
            500..=599 => Self::ServerError,
            _ => Self::Success,
        }
    }

    /// Of a gRPC status code, by the HTTP status that Envoy puts for it: UNKNOWN, INTERNAL and DATA_LOSS 500,
    /// UNIMPLEMENTED 501, UNAVAILABLE 503, DEADLINE_EXCEEDED 504. (gRFC A50 counts every status but OK as a failure,
    /// so that callers who ask for what does not exist eject healthy endpoints.)
    pub(crate) fn of_grpc(code: tonic::Code) -> Self {
        use tonic::Code;
        match code {
            Code::Unavailable | Code::DeadlineExceeded => Self::GatewayFailure,
            Code::Unknown | Code::Internal | Code::DataLoss | Code::Unimplemented => Self::ServerError,
            _ => Self::Success,
        }
    }

    /// Of a `grpc-status` as it was read.
    pub(crate) fn of_grpc_status(status: u32) -> Self {
        Self::of_grpc(tonic::Code::from_i32(i32::try_from(status).unwrap_or(2)))
    }

    /// Whether it counts as a failure.
    pub(crate) fn is_failure(self) -> bool {
        self != Self::Success
    }
}

impl<L: Link> InFlight<L> {
    /// Starts a request to `endpoint`.
    pub(crate) fn of(endpoint: Arc<Endpoint<L>>) -> Self {
        let probe = endpoint.begin();
        Self { endpoint, recorded: false, probe }
    }

    /// The endpoint.
    pub(crate) fn endpoint(&self) -> &Arc<Endpoint<L>> {
        &self.endpoint
    }

    /// Tells outlier detection how the request ended; only the first call counts. A request that is dropped without
    /// this (cancelled by its caller) is not counted.
    pub(crate) fn record(&mut self, outcome: Outcome) {
        if !std::mem::replace(&mut self.recorded, true) {
            self.endpoint.record(outcome, self.probe);
        }
    }
}

impl<L: Link> Drop for InFlight<L> {
    fn drop(&mut self) {
        // What it told has decided; a probe that is under way now is another.
        self.endpoint.end(self.probe && !self.recorded);
    }
}

impl<L: Link> fmt::Debug for InFlight<L> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InFlight")
            .field("endpoint", &self.endpoint.address())
            .field("recorded", &self.recorded)
            .finish()
    }
}
