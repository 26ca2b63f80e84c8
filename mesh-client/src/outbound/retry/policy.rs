//! A retry policy, compiled from a route or built in code.

use super::{
    Hook, HookRef,
    classify::{Failure, Outcome, Pushback, Response, Signs, grpc_from_reset},
    reset,
};
use crate::outbound::route::{HeaderMatchers, Profile, RequestHead};
use http::{HeaderMap, HeaderName, Method, Uri};
use mesh_xds::resource::{
    BackOff, HeaderMatcher, HeaderMatcherKind, OmitHosts, ResetFormat, ResetHeader, RetryOn, RetryPolicy,
};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

/// gRFC A6: more attempts than this are never made, whatever the policy says.
const GRPC_MAX_RETRIES: u32 = 4;

const RATE_LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// UNAVAILABLE
const UNAVAILABLE: u32 = 14;

/// What is retried, how often and after which delay. Immutable; shared by all calls of a route.
#[derive(Clone, Debug)]
pub struct Policy {
    profile: Profile,
    on: RetryOn,
    max_retries: u32,
    per_try_timeout: Option<Duration>,
    per_try_idle_timeout: Option<Duration>,
    back_off: BackOff,
    avoid_previous_hosts: bool,
    /// What few policies have.
    rare: Option<Arc<Rare>>,
}

/// What few policies have.
#[derive(Clone, Debug)]
struct Rare {
    omit_hosts: Vec<OmitHosts>,
    leave_priorities: u32,
    /// Any one of them.
    headers: Vec<HeaderMatchers>,
    /// Any one of them; empty is all requests.
    request_headers: Vec<HeaderMatchers>,
    reset_headers: Vec<ResetHeader>,
    max_reset: Duration,
    hook: Option<HookRef>,
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
    /// The response says that a rate limit refused the request (`envoy-ratelimited`): it is not retried otherwise.
    RateLimited,
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
        let rare = Rare::compile(policy, profile).map(Arc::new);
        let by_header = rare.as_ref().is_some_and(|rare| !rare.headers.is_empty());
        ((on != RetryOn::default() || by_header) && policy.num_retries > 0).then(|| Self {
            profile,
            on,
            rare,
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

    /// Hosts that retries stay away from while there are others.
    pub(crate) fn omit_hosts(&self) -> &[OmitHosts] {
        self.rare.as_ref().map_or(&[], |rare| &rare.omit_hosts)
    }

    /// Attempts after which the priorities of their hosts are left; 0 is never.
    pub(crate) fn leave_priorities(&self) -> u32 {
        self.rare.as_ref().map_or(0, |rare| rare.leave_priorities)
    }

    /// What the application says itself.
    pub(crate) fn hook(&self) -> Option<&HookRef> {
        self.rare.as_ref()?.hook.as_ref()
    }

    /// Failures of every request are retried.
    pub(crate) fn is_for_all(&self) -> bool {
        self.rare.as_ref().is_none_or(|rare| rare.request_headers.is_empty())
    }

    /// Whether failures of this request are retried at all (`retriable_request_headers`).
    pub(crate) fn applies(&self, head: &RequestHead<'_>) -> bool {
        let asked = self.rare.as_ref().map_or(&[][..], |rare| &rare.request_headers);
        asked.is_empty() || asked.iter().any(|matcher| matcher.matches(head))
    }

    /// Looks in a response for what only some policies ask for. Costs a comparison unless there is something to look for.
    pub(crate) fn read(&self, response: &mut Response, headers: &HeaderMap) {
        let failed = response.status >= 400 || response.grpc.is_some_and(|code| code != 0);
        let by_header = self.rare.as_ref().is_some_and(|rare| !rare.headers.is_empty());
        if self.profile == Profile::Envoy && (failed || by_header) {
            self.read_signs(response, headers);
        }
    }

    #[cold]
    fn read_signs(&self, response: &mut Response, headers: &HeaderMap) {
        response.signs = Signs { rate_limited: headers.contains_key(RATE_LIMITED), ..Signs::default() };
        if let Some(rare) = &self.rare {
            let uri = Uri::default();
            let head = RequestHead::new(&Method::GET, &uri, headers);
            response.signs.by_header = rare.headers.iter().any(|matcher| matcher.matches(&head));
            response.signs.reset = reset::interval(&rare.reset_headers, rare.max_reset, headers, SystemTime::now());
        }
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

    /// Whether gRPC's throttle counts `outcome` as a failure (gRFC A6).
    pub(crate) fn blames(&self, outcome: &Outcome) -> bool {
        let stopped = matches!(outcome, Outcome::Response(Response { pushback: Pushback::Stop, .. }));
        stopped || self.retries(outcome)
    }

    /// Whether it looks at the statuses of gRPC calls.
    pub(crate) fn reads_grpc_status(&self) -> bool {
        self.on.grpc_codes != 0
    }

    fn retries_response(&self, response: &Response) -> bool {
        let on = &self.on;
        let status = response.status;
        if response.signs.rate_limited {
            return on.rate_limited;
        }
        response.signs.by_header
            || (on.http_5xx && (500..600).contains(&status))
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

impl Rare {
    /// `None`: it has nothing of it. gRPC knows of conditions only (gRFC A44); hosts and priorities are for the balancer, which is the
    /// same for both.
    fn compile(policy: &RetryPolicy, profile: Profile) -> Option<Self> {
        let envoy = profile == Profile::Envoy;
        let each = |matchers: &[HeaderMatcher]| -> Vec<_> {
            let matchers = matchers.iter().filter(|_| envoy);
            matchers.map(|matcher| HeaderMatchers::compile(std::slice::from_ref(matcher), profile)).collect()
        };
        let rare = Self {
            omit_hosts: policy.omit_hosts.clone(),
            leave_priorities: policy.leave_priorities,
            headers: each(&policy.retriable_headers),
            request_headers: each(&policy.retriable_request_headers),
            reset_headers: if envoy { policy.reset_headers.clone() } else { Vec::new() },
            max_reset: policy.max_reset,
            hook: None,
        };
        let nothing = rare.omit_hosts.is_empty()
            && rare.leave_priorities == 0
            && rare.headers.is_empty()
            && rare.request_headers.is_empty()
            && rare.reset_headers.is_empty();
        (!nothing).then_some(rare)
    }
}

impl Default for Rare {
    fn default() -> Self {
        Self {
            omit_hosts: Vec::new(),
            leave_priorities: 0,
            headers: Vec::new(),
            request_headers: Vec::new(),
            reset_headers: Vec::new(),
            max_reset: RetryPolicy::default().max_reset,
            hook: None,
        }
    }
}

/// The header is there.
fn present(name: &HeaderName, profile: Profile) -> HeaderMatchers {
    let kind = HeaderMatcherKind::Present(true);
    let matcher = HeaderMatcher { name: name.as_str().to_owned(), kind, invert: false, treat_missing_as_empty: false };
    HeaderMatchers::compile(&[matcher], profile)
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
            rare: None,
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
            Condition::RateLimited => on.rate_limited = true,
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

    /// Retries responses that have this header. Envoy's rules only (`retriable-headers`).
    #[must_use]
    pub fn on_header(mut self, name: &HeaderName) -> Self {
        if std::mem::take(&mut self.defaults) {
            self.policy.on = RetryOn::default();
        }
        let profile = self.policy.profile;
        self.rare().headers.push(present(name, profile));
        self
    }

    /// Retries only requests that have this header, or another one given so (`retriable_request_headers`).
    #[must_use]
    pub fn only_with_header(mut self, name: &HeaderName) -> Self {
        let profile = self.policy.profile;
        self.rare().request_headers.push(present(name, profile));
        self
    }

    /// A response header that says when to come back, instead of the back-off: `retry-after` in seconds, or `x-ratelimit-reset` as
    /// a Unix time. Several are tried in order. Envoy's rules only (`rate_limited_retry_back_off`).
    #[must_use]
    pub fn reset_header(mut self, name: HeaderName, format: ResetFormat) -> Self {
        self.rare().reset_headers.push(ResetHeader { name, format });
        self
    }

    /// The longest time that a [`reset_header`](Self::reset_header) may ask for; one that asks for more is passed over. Default 300 s.
    #[must_use]
    pub fn max_reset(mut self, max: Duration) -> Self {
        self.rare().max_reset = max;
        self
    }

    /// Asks the application about every outcome before the conditions do.
    #[must_use]
    pub fn hook(mut self, hook: impl Hook) -> Self {
        self.rare().hook = Some(HookRef(Arc::new(hook)));
        self
    }

    fn rare(&mut self) -> &mut Rare {
        Arc::make_mut(self.policy.rare.get_or_insert_with(Arc::default))
    }

    /// The policy.
    pub fn build(self) -> Policy {
        self.policy
    }
}

#[cfg(test)]
mod tests;
