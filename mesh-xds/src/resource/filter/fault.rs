//! Fault injection.

use crate::resource::{Denominator, FractionalPercent, HeaderMatcher};
use std::time::Duration;

/// Fault injection (gRFC A33). Delay first, then abort; independent draws.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FaultConfig {
    /// Added latency.
    pub delay: Option<FaultDelay>,
    /// The answer given instead of a call.
    pub abort: Option<FaultAbort>,
    /// How fast the body of a response comes.
    pub response_rate_limit: Option<FaultRateLimit>,
    /// Only requests that match all of these are touched.
    pub headers: Vec<HeaderMatcher>,
    /// At most this many at once in the process; `None` is unlimited, 0 is none.
    pub max_active_faults: Option<u32>,
}

/// `FaultDelay`.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultDelay {
    /// Fixed; `None` when taken from `x-envoy-fault-delay-request` (ms).
    pub fixed: Option<Duration>,
    /// Share of requests delayed.
    pub percentage: FractionalPercent,
    /// What a share in `x-envoy-fault-delay-request-percentage` counts in.
    pub denominator: Denominator,
}

/// `FaultAbort`.
#[derive(Clone, Debug, PartialEq)]
pub enum FaultAbort {
    /// Answer with this HTTP status (200..600).
    Http {
        /// The status.
        status: u16,
        /// Share of requests aborted.
        percentage: FractionalPercent,
    },
    /// Answer with this gRPC status.
    Grpc {
        /// The code.
        code: u32,
        /// Share of requests aborted.
        percentage: FractionalPercent,
    },
    /// Taken from the `x-envoy-fault-abort-*` request headers.
    Header {
        /// Upper bound of the share.
        percentage: FractionalPercent,
        /// What a share in `x-envoy-fault-abort-request-percentage` counts in.
        denominator: Denominator,
    },
}

/// `FaultRateLimit`: Envoy's; gRFC A33 has none.
#[derive(Clone, Debug, PartialEq)]
pub struct FaultRateLimit {
    /// KiB per second, at least 1; `None` when taken from `x-envoy-fault-throughput-response`.
    pub kbps: Option<u64>,
    /// Share of responses limited.
    pub percentage: FractionalPercent,
    /// What a share in `x-envoy-fault-throughput-response-percentage` counts in.
    pub denominator: Denominator,
}

impl FaultConfig {
    /// Nothing is ever injected.
    pub fn is_inert(&self) -> bool {
        self.delay.is_none() && self.abort.is_none() && self.response_rate_limit.is_none()
    }
}
