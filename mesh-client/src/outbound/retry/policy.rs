//! A retry policy, compiled from a route or built in code.

use super::classify::{Failure, Outcome, Response, grpc_from_reset};
use crate::outbound::route::Profile;
use mesh_xds::resource::{BackOff, RetryOn, RetryPolicy};
use std::time::Duration;

/// gRFC A6: more attempts than this are never made, whatever the policy says.
const GRPC_MAX_RETRIES: u32 = 4;

/// UNAVAILABLE
const UNAVAILABLE: u32 = 14;

/// What is retried, how often and after which delay. Immutable; shared by all calls of a route.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    profile: Profile,
    on: RetryOn,
    max_retries: u32,
    per_try_timeout: Option<Duration>,
    per_try_idle_timeout: Option<Duration>,
    back_off: BackOff,
    avoid_previous_hosts: bool,
}

/// A reason to retry. The names in parentheses are those of Envoy's `retry_on`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Condition {
    /// The call ended with this gRPC status before any message (`cancelled`, `deadline-exceeded`, `internal`,
    /// `resource-exhausted`, `unavailable`; here any code but OK is legal).
    Grpc(tonic::Code),
    /// Any 5xx, or no answer at all (`5xx`).
    Http5xx,
    /// 502, 503, 504, or no answer at all (`gateway-error`).
    GatewayError,
    /// No answer at all: reset, disconnect, timeout of the attempt (`reset`).
    Reset,
    /// No answer, and nothing of the request was sent (`reset-before-request`).
    ResetBeforeRequest,
    /// The connection could not be made (`connect-failure`).
    ConnectFailure,
    /// The server refused the stream unprocessed (`refused-stream`). Once per call this is retried without a policy, too.
    RefusedStream,
    /// 409 (`retriable-4xx`).
    Retriable4xx,
    /// This HTTP status (`retriable-status-codes`).
    Status(http::StatusCode),
}

/// Builds a [`Policy`] in code.
#[derive(Clone, Debug)]
pub struct PolicyBuilder {
    policy: Policy,
    defaults: bool,
}

impl Policy {
    /// A policy for gRPC calls by gRPC's rules (gRFC A6): unless told otherwise UNAVAILABLE is retried once, after about
    /// 25 ms, doubling up to 250 ms, ±20 %.
    pub fn grpc() -> PolicyBuilder {
        PolicyBuilder::new(Profile::Grpc, RetryOn { grpc_codes: 1 << UNAVAILABLE, ..RetryOn::default() })
    }

    /// A policy for HTTP calls by Envoy's rules. Unless told otherwise it retries once on what Istio retries by default:
    /// connect failures, refused streams, 503, and the gRPC statuses UNAVAILABLE and CANCELLED; after a delay drawn from
    /// 0..25 ms, doubling up to 0..250 ms.
    pub fn http() -> PolicyBuilder {
        let on = RetryOn {
            grpc_codes: 1 << UNAVAILABLE | 1 << 1,
            connect_failure: true,
            refused_stream: true,
            statuses: vec![503],
            ..RetryOn::default()
        };
        PolicyBuilder::new(Profile::Envoy, on)
    }

    /// Compiles a route's policy; `None` when none of its conditions is known to the profile (gRFC A44).
    pub(crate) fn compile(policy: &RetryPolicy, profile: Profile) -> Option<Self> {
        let grpc = profile == Profile::Grpc;
        let on =
            if grpc { RetryOn { grpc_codes: policy.on.grpc_codes, ..RetryOn::default() } } else { policy.on.clone() };
        (on != RetryOn::default() && policy.num_retries > 0).then(|| Self {
            profile,
            on,
            max_retries: if grpc { policy.num_retries.min(GRPC_MAX_RETRIES) } else { policy.num_retries },
            per_try_timeout: policy.per_try_timeout.filter(|d| !grpc && !d.is_zero()),
            per_try_idle_timeout: policy.per_try_idle_timeout.filter(|d| !grpc && !d.is_zero()),
            back_off: policy.back_off,
            avoid_previous_hosts: policy.avoid_previous_hosts,
        })
    }

    /// Whose rules hold.
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// Retries after the first attempt.
    pub fn max_retries(&self) -> u32 {
        self.max_retries
    }

    /// Limit of each attempt.
    pub fn per_try_timeout(&self) -> Option<Duration> {
        self.per_try_timeout
    }

    /// How long an attempt may stand still: nothing is sent, nothing comes.
    pub(crate) fn per_try_idle_timeout(&self) -> Option<Duration> {
        self.per_try_idle_timeout
    }

    /// Whether an attempt should go to a host that did not fail this call yet, while there is one.
    pub fn avoid_previous_hosts(&self) -> bool {
        self.avoid_previous_hosts
    }

    /// Whether `outcome` is one to retry. Sources: gRFC A6 and A44; Envoy `RetryStateImpl::wouldRetryFromHeaders` and
    /// `wouldRetryFromReset`.
    pub(crate) fn retries(&self, outcome: &Outcome) -> bool {
        match (outcome, self.profile) {
            (Outcome::Response(response), Profile::Grpc) => response.grpc.is_some_and(|code| self.on.grpc(code)),
            (Outcome::Response(response), Profile::Envoy) => self.retries_response(response),
            (Outcome::Failure(failure), Profile::Grpc) => failure_code(failure).is_some_and(|code| self.on.grpc(code)),
            (Outcome::Failure(failure), Profile::Envoy) => self.retries_failure(failure),
        }
    }

    fn retries_response(&self, response: &Response) -> bool {
        let on = &self.on;
        let status = response.status;
        (on.http_5xx && (500..600).contains(&status))
            || (on.gateway_error && (502..=504).contains(&status))
            || (on.retriable_4xx && status == 409)
            || on.statuses.contains(&status)
            || response.grpc.is_some_and(|code| on.grpc(code))
    }

    /// `5xx` and `gateway-error` include "does not respond at all" in Envoy's documentation and code.
    fn retries_failure(&self, failure: &Failure) -> bool {
        let on = &self.on;
        let silent = on.reset || on.http_5xx || on.gateway_error;
        match failure {
            Failure::Connect => silent || on.connect_failure || on.reset_before_request,
            Failure::NeverSent => silent || on.reset_before_request,
            Failure::Refused => silent || on.refused_stream,
            Failure::Reset(_) | Failure::PerTryTimeout => silent,
            Failure::NoEndpoint | Failure::Overloaded | Failure::Deadline | Failure::Local => false,
        }
    }

    /// The delay before retry `n` (0 is the first). gRFC A6: `min(base * 2^n, max)` times 0.8..=1.2; Envoy's
    /// `JitteredExponentialBackOffStrategy`: uniform in `0..min(base * 2^n, max)`, in whole milliseconds there, finer here.
    pub(crate) fn delay(&self, n: u32, rng: &mut impl FnMut(u32) -> u32) -> Duration {
        let BackOff { base, max } = self.back_off;
        let interval = base.saturating_mul(1u32.checked_shl(n).unwrap_or(u32::MAX)).min(max);
        match self.profile {
            Profile::Grpc => {
                let share = 800_000 + rng(400_001);
                interval.saturating_mul(share) / 1_000_000
            }
            Profile::Envoy => {
                let micros = u32::try_from(interval.as_micros()).unwrap_or(u32::MAX);
                Duration::from_micros(u64::from(if micros == 0 { 0 } else { rng(micros) }))
            }
        }
    }
}

/// The status gRPC gives a call that failed so; `None` is never retried by policy.
fn failure_code(failure: &Failure) -> Option<u32> {
    match failure {
        Failure::Connect | Failure::NeverSent | Failure::Refused | Failure::NoEndpoint => Some(UNAVAILABLE),
        Failure::Reset(reason) => Some(grpc_from_reset(*reason)),
        Failure::PerTryTimeout => Some(4),
        Failure::Overloaded | Failure::Deadline | Failure::Local => None,
    }
}

impl PolicyBuilder {
    fn new(profile: Profile, on: RetryOn) -> Self {
        let policy = Policy {
            profile,
            on,
            max_retries: 1,
            per_try_timeout: None,
            per_try_idle_timeout: None,
            back_off: BackOff::default(),
            avoid_previous_hosts: true,
        };
        Self { policy, defaults: true }
    }

    /// Retries on `condition`. The first call replaces the default conditions, the next ones add.
    #[must_use]
    pub fn on(mut self, condition: Condition) -> Self {
        if std::mem::take(&mut self.defaults) {
            self.policy.on = RetryOn::default();
        }
        let on = &mut self.policy.on;
        match condition {
            Condition::Grpc(tonic::Code::Ok) => {}
            Condition::Grpc(code) => on.grpc_codes |= 1 << code as u32,
            Condition::Http5xx => on.http_5xx = true,
            Condition::GatewayError => on.gateway_error = true,
            Condition::Reset => on.reset = true,
            Condition::ResetBeforeRequest => on.reset_before_request = true,
            Condition::ConnectFailure => on.connect_failure = true,
            Condition::RefusedStream => on.refused_stream = true,
            Condition::Retriable4xx => on.retriable_4xx = true,
            Condition::Status(status) => on.statuses.push(status.as_u16()),
        }
        self
    }

    /// Retries after the first attempt; default 1. gRPC policies are capped at 4 (gRFC A6: five attempts).
    #[must_use]
    pub fn max_retries(mut self, retries: u32) -> Self {
        self.policy.max_retries = match self.policy.profile {
            Profile::Grpc => retries.min(GRPC_MAX_RETRIES),
            Profile::Envoy => retries,
        };
        self
    }

    /// Limits each attempt; an attempt that takes longer is given up as [`Condition::Reset`], or as DEADLINE_EXCEEDED.
    #[must_use]
    pub fn per_try_timeout(mut self, timeout: Duration) -> Self {
        self.policy.per_try_timeout = Some(timeout);
        self
    }

    /// First and longest delay. `base` is at least 1 ms, `max` at least `base` (as in Envoy).
    #[must_use]
    pub fn back_off(mut self, base: Duration, max: Duration) -> Self {
        let base = base.max(Duration::from_millis(1));
        self.policy.back_off = BackOff { base, max: max.max(base) };
        self
    }

    /// Whether a retry avoids the hosts that failed this call; default true. Only a mesh knows hosts.
    #[must_use]
    pub fn avoid_previous_hosts(mut self, avoid: bool) -> Self {
        self.policy.avoid_previous_hosts = avoid;
        self
    }

    /// The policy.
    pub fn build(self) -> Policy {
        self.policy
    }
}

#[cfg(test)]
mod tests;
