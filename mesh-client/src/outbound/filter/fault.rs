//! Fault injection (gRFC A33, `envoy.extensions.filters.http.fault.v3.HTTPFault`): delay first, then abort; and response bodies that come slowly (Envoy).

use super::{Filter, FilterRequest, Reply, Step, Verdict, Watch};
use crate::{
    outbound::{
        retry::{grpc_from_http, http_from_grpc},
        route::{HeaderMatchers, Profile, RequestHead},
    },
    telemetry::access_log::ResponseFlags as Flag,
};
use http::{HeaderMap, HeaderName, StatusCode};
use mesh_xds::resource::{Denominator, FaultAbort, FaultConfig, FaultDelay, FaultRateLimit, FractionalPercent};
use std::{
    borrow::Cow,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::time::Instant;

const DELAY: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request");
const DELAY_PERCENTAGE: HeaderName = HeaderName::from_static("x-envoy-fault-delay-request-percentage");
const ABORT_HTTP: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request");
const ABORT_GRPC: HeaderName = HeaderName::from_static("x-envoy-fault-abort-grpc-request");
const THROUGHPUT: HeaderName = HeaderName::from_static("x-envoy-fault-throughput-response");
const THROUGHPUT_PERCENTAGE: HeaderName = HeaderName::from_static("x-envoy-fault-throughput-response-percentage");
const ABORT_PERCENTAGE: HeaderName = HeaderName::from_static("x-envoy-fault-abort-request-percentage");

/// A compiled fault filter.
#[derive(Debug)]
pub(crate) struct Fault {
    delay: Option<FaultDelay>,
    abort: Option<FaultAbort>,
    rate: Option<FaultRateLimit>,
    headers: HeaderMatchers,
    max_active: Option<u32>,
    active: ActiveFaults,
}

/// The number of faults in progress, shared by every fault filter of a mesh (gRFC A33: `max_active_faults` looks at all).
#[derive(Clone, Debug, Default)]
pub(crate) struct ActiveFaults(Arc<AtomicU32>);

/// What is done to one request. The delay counts against the call's deadline.
#[derive(Debug, Default)]
pub(crate) struct FaultPlan {
    /// Wait this long first.
    pub(crate) delay: Option<Duration>,
    /// Then answer this instead of calling.
    pub(crate) abort: Option<FaultAbortStatus>,
    /// Or let the body of the response through at this rate, in bytes per second.
    pub(crate) rate: Option<u64>,
    /// Held until the fault is over; `None` when nothing is injected.
    pub(crate) guard: Option<ActiveFault>,
}

/// One fault in progress; dropping it ends the fault.
#[derive(Debug)]
pub(crate) struct ActiveFault(ActiveFaults);

/// The injected answer, for either kind of caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FaultAbortStatus {
    /// HTTP status, 200..=599.
    pub(crate) http: u16,
    /// gRPC status code, 0..=16; 0 is an immediate end without a message.
    pub(crate) grpc: u32,
}

impl FaultAbortStatus {
    /// The `grpc-message` or body of the answer.
    const MESSAGE: &'static str = "Fault injected";

    /// A call to gRPC maps 200 to UNKNOWN: an answer without `grpc-status`.
    fn http(status: u16) -> Option<Self> {
        (200..600).contains(&status).then(|| Self { http: status, grpc: grpc_from_http(status) })
    }

    fn reply(self) -> Reply {
        let status = StatusCode::from_u16(self.http).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        Reply::new(status, Self::MESSAGE).grpc_status(self.grpc).flag(Flag::FAULT_INJECTED)
    }

    fn grpc(code: u32) -> Self {
        let grpc = if code > 16 { 2 } else { code };
        Self { http: http_from_grpc(grpc), grpc }
    }
}

impl ActiveFaults {
    /// Never exceeds `max`, however many try at once.
    fn begin(&self, max: Option<u32>) -> Option<ActiveFault> {
        let max = max.unwrap_or(u32::MAX);
        let begun = self.0.fetch_update(Ordering::AcqRel, Ordering::Relaxed, |n| (n < max).then(|| n + 1));
        begun.ok().map(|_| ActiveFault(self.clone()))
    }
}

impl Drop for ActiveFault {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Fault {
    pub(crate) fn compile(config: &FaultConfig, profile: Profile, active: ActiveFaults) -> Self {
        Self {
            delay: config.delay.clone(),
            abort: config.abort.clone(),
            rate: config.response_rate_limit.clone(),
            headers: HeaderMatchers::compile(&config.headers, profile),
            max_active: config.max_active_faults,
            active,
        }
    }

    /// Decides for one request. Delay and abort are drawn independently; `rng(bound)` is uniform in `0..bound`.
    pub(crate) fn decide(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> FaultPlan {
        if !self.headers.matches(head) {
            return FaultPlan::default();
        }
        let mut admits = |share: FractionalPercent| share.admits(rng(FractionalPercent::HUNDRED.0));
        let delay = self.delay.as_ref().and_then(|delay| {
            let (time, share) = match delay.fixed {
                Some(time) => (time, delay.percentage),
                None => {
                    let time = Duration::from_millis(number(head.headers, &DELAY)?);
                    (time, capped(head.headers, &DELAY_PERCENTAGE, delay.percentage, delay.denominator))
                }
            };
            admits(share).then_some(time)
        });
        let abort = self.abort.as_ref().and_then(|abort| {
            let (status, share) = match *abort {
                FaultAbort::Http { status, percentage } => (FaultAbortStatus::http(status)?, percentage),
                FaultAbort::Grpc { code, percentage } => (FaultAbortStatus::grpc(code), percentage),
                FaultAbort::Header { percentage, denominator } => {
                    (requested(head.headers)?, capped(head.headers, &ABORT_PERCENTAGE, percentage, denominator))
                }
            };
            admits(share).then_some(status)
        });
        let rate = self.rate.as_ref().filter(|_| abort.is_none()).and_then(|limit| {
            let (kbps, share) = match limit.kbps {
                Some(kbps) => (kbps, limit.percentage),
                None => {
                    let kbps = number(head.headers, &THROUGHPUT).filter(|kbps| *kbps > 0)?;
                    (kbps, capped(head.headers, &THROUGHPUT_PERCENTAGE, limit.percentage, limit.denominator))
                }
            };
            admits(share).then(|| kbps.saturating_mul(1024))
        });
        if delay.is_none() && abort.is_none() && rate.is_none() {
            return FaultPlan::default();
        }
        match self.active.begin(self.max_active) {
            Some(guard) => FaultPlan { delay, abort, rate, guard: Some(guard) },
            None => FaultPlan::default(),
        }
    }
}

impl Filter for Fault {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        let plan = {
            let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
            let head = request.head();
            self.decide(&RequestHead::new(&head.method, &head.uri, &head.headers), &mut rng)
        };
        let Some(delay) = plan.delay else { return Step::Now(plan.verdict(request)) };
        request.explain("fault", || format!("delayed by {delay:?}"));
        request.waits_for(format!("an injected delay of {delay:?}"));
        request.found.flags |= Flag::DELAY_INJECTED;
        Step::Later(Box::pin(async move {
            tokio::time::sleep(delay).await;
            plan.verdict(request)
        }))
    }

    fn describe(&self) -> Cow<'_, str> {
        let parts =
            [(self.delay.is_some(), "delay"), (self.abort.is_some(), "abort"), (self.rate.is_some(), "rate limit")];
        let parts = parts.into_iter().filter_map(|(set, name)| set.then_some(name));
        Cow::Owned(format!("fault ({})", parts.collect::<Vec<_>>().join(", ")))
    }
}

impl FaultPlan {
    /// What comes after the delay.
    fn verdict(self, request: &FilterRequest<'_>) -> Verdict {
        if let Some(abort) = self.abort {
            request.explain("fault", || format!("aborted with gRPC status {} / HTTP {}", abort.grpc, abort.http));
            return Verdict::Answer(abort.reply());
        }
        match (self.rate, self.guard) {
            (Some(rate), Some(guard)) => {
                request.explain("fault", || format!("the response is limited to {rate} bytes per second"));
                Verdict::Watch(Box::new(Slow { rate: rate.max(1), free: None, _guard: guard }))
            }
            _ => Verdict::Pass,
        }
    }
}

/// A response that comes slowly.
struct Slow {
    /// Bytes per second.
    rate: u64,
    /// When what went on is paid for.
    free: Option<Instant>,
    _guard: ActiveFault,
}

/// Envoy hands out what a rate allows this often.
const TICK: Duration = Duration::from_millis(63);

impl Watch for Slow {
    /// A share of the rate at each tick, and nothing for the time before the first byte.
    fn throttle(&mut self, waiting: usize, now: Instant) -> Result<usize, Instant> {
        let free = *self.free.get_or_insert(now);
        if free > now {
            return Err(free);
        }
        let share = u128::from(self.rate) * TICK.as_nanos() / 1_000_000_000;
        let length = usize::try_from(share).unwrap_or(usize::MAX).clamp(1, waiting.max(1));
        let nanos = length as u128 * 1_000_000_000 / u128::from(self.rate);
        self.free = Some(now + Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
        Ok(length)
    }
}

/// The abort that the request's headers ask for; the HTTP status takes precedence when it is legal.
fn requested(headers: &HeaderMap) -> Option<FaultAbortStatus> {
    let http = || FaultAbortStatus::http(u16::try_from(number(headers, &ABORT_HTTP)?).ok()?);
    let grpc = || Some(FaultAbortStatus::grpc(u32::try_from(number(headers, &ABORT_GRPC)?).ok()?));
    http().or_else(grpc)
}

/// A header gives the numerator of a share, in what the configured one counts in, and never more than that (Envoy, gRFC A33).
fn capped(
    headers: &HeaderMap,
    name: &HeaderName,
    configured: FractionalPercent,
    denominator: Denominator,
) -> FractionalPercent {
    match number(headers, name) {
        Some(asked) => denominator.share(u32::try_from(asked).unwrap_or(u32::MAX)).min(configured),
        None => configured,
    }
}

/// An unparseable header is ignored.
fn number(headers: &HeaderMap, name: &HeaderName) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

#[cfg(test)]
mod tests;
