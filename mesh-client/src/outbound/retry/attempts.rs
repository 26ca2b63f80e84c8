//! The attempts of one call: after each, what comes next.

use super::{Outcome, Permit, Policy, Pushback, classify::Failure};
use crate::outbound::route::Profile;
use http::{HeaderMap, HeaderName, HeaderValue};
use std::{fmt, time::Duration};
use tokio::time::Instant;

const PREVIOUS_ATTEMPTS: HeaderName = HeaderName::from_static("grpc-previous-rpc-attempts");
const ATTEMPT_COUNT: HeaderName = HeaderName::from_static("x-envoy-attempt-count");
const TIMEOUT_RETRY: HeaderName = HeaderName::from_static("x-envoy-is-timeout-retry");

/// A call that never leaves the client is tried again at once, but not for ever: connections that die this often between
/// pick and send are an outage.
const MAX_NEVER_SENT: u32 = 8;

/// Counts the attempts of one call and decides after each. Lives on the stack, allocates nothing. Dropping it gives back
/// the share of the retry budget that the call holds.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    retries: u32,
    transparent: u32,
    /// Delays since the last pushback: it restarts the exponential sequence (gRFC A6).
    delays: u32,
    refused: bool,
    permit: Option<Permit>,
}

/// What is known when an attempt ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Situation {
    /// The request's body can be sent again.
    pub(crate) replayable: bool,
    /// The present.
    pub(crate) now: Instant,
    /// When the call ends.
    pub(crate) deadline: Option<Instant>,
    /// What the application's own hook says of the outcome, if anything.
    pub(crate) asked: Option<bool>,
}

/// What to do after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Give the caller this outcome.
    Return(Stop),
    /// Try again at once: the server did not process the request. Not counted as a retry (gRFC A6, transparent retries).
    RetryNow,
    /// Try again after this delay.
    RetryAfter(Duration),
}

/// Why a call is not tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// A success, or a failure that the policy does not retry.
    NotRetriable,
    /// There is no retry policy.
    NoPolicy,
    /// The body is longer than what is kept for a replay.
    NotReplayable,
    /// As many attempts as allowed were made.
    Exhausted,
    /// The application's own hook forbids it.
    Hook,
    /// The server forbids it.
    Pushback,
    /// The next attempt would start after the deadline.
    Deadline,
    /// Too many retries are in flight to this cluster.
    Budget,
}

impl Attempts {
    /// Decides after an attempt that ended with `outcome`.
    ///
    /// `budget` is asked last, only when all else allows a retry: `None` refuses, `Some(None)` means that there is no
    /// budget; a permit is kept until the next decision, or until `self` is dropped. `rng(bound)` is uniform in
    /// `0..bound`.
    pub(crate) fn next(
        &mut self,
        policy: Option<&Policy>,
        outcome: &Outcome,
        situation: Situation,
        budget: impl FnOnce() -> Option<Option<Permit>>,
        rng: &mut impl FnMut(u32) -> u32,
    ) -> Decision {
        let held = self.permit.take();
        let unprocessed = match outcome {
            Outcome::Failure(Failure::NeverSent) => self.transparent < MAX_NEVER_SENT,
            Outcome::Failure(Failure::Refused) => !self.refused,
            _ => false,
        };
        if unprocessed {
            if !situation.replayable {
                return Decision::Return(Stop::NotReplayable);
            }
            if situation.deadline.is_some_and(|deadline| deadline <= situation.now) {
                return Decision::Return(Stop::Deadline);
            }
            self.refused |= matches!(outcome, Outcome::Failure(Failure::Refused));
            self.transparent += 1;
            // What is sent anew is still the retry that it was.
            self.permit = held;
            return Decision::RetryNow;
        }
        drop(held);
        let Some(policy) = policy else { return Decision::Return(Stop::NoPolicy) };
        match self.delay(policy, outcome, situation, rng) {
            Err(stop) => Decision::Return(stop),
            Ok((delay, delays)) => match budget() {
                None => Decision::Return(Stop::Budget),
                Some(permit) => {
                    self.permit = permit;
                    self.retries += 1;
                    self.delays = delays;
                    Decision::RetryAfter(delay)
                }
            },
        }
    }

    /// The delay before the next attempt, and the length of the exponential sequence after it.
    fn delay(
        &self,
        policy: &Policy,
        outcome: &Outcome,
        situation: Situation,
        rng: &mut impl FnMut(u32) -> u32,
    ) -> Result<(Duration, u32), Stop> {
        match situation.asked {
            Some(false) => return Err(Stop::Hook),
            None if !policy.retries(outcome) => return Err(Stop::NotRetriable),
            _ => {}
        }
        let pushback = match outcome {
            Outcome::Response(response) => response.pushback,
            Outcome::Failure(_) => Pushback::None,
        };
        if pushback == Pushback::Stop {
            return Err(Stop::Pushback);
        }
        if self.retries >= policy.max_retries() {
            return Err(Stop::Exhausted);
        }
        if !situation.replayable {
            return Err(Stop::NotReplayable);
        }
        let reset = match outcome {
            Outcome::Response(response) => response.signs.reset,
            Outcome::Failure(_) => None,
        };
        let (delay, delays) = match (pushback, reset) {
            (Pushback::After(delay), _) => (delay, 0),
            // Envoy's `JitteredLowerBoundBackOffStrategy`: no sooner, and up to half as much later.
            (_, Some(reset)) => (reset + jitter(reset / 2, rng), self.delays),
            _ => (policy.delay(self.delays, rng), self.delays + 1),
        };
        match situation.deadline {
            Some(deadline) if deadline.saturating_duration_since(situation.now) <= delay => Err(Stop::Deadline),
            _ => Ok((delay, delays)),
        }
    }

    /// A further request beside those in flight, which may still be answered: counts and is paid for as a retry.
    ///
    /// # Errors
    /// There is none to be sent.
    pub(crate) fn hedge(
        &mut self,
        policy: &Policy,
        situation: Situation,
        budget: impl FnOnce() -> Option<Option<Permit>>,
    ) -> Result<Option<Permit>, Stop> {
        if self.retries >= policy.max_retries() {
            return Err(Stop::Exhausted);
        }
        if !situation.replayable {
            return Err(Stop::NotReplayable);
        }
        if situation.deadline.is_some_and(|deadline| deadline <= situation.now) {
            return Err(Stop::Deadline);
        }
        let permit = budget().ok_or(Stop::Budget)?;
        self.retries += 1;
        Ok(permit)
    }

    /// The attempt now under way (or last made), from 1, transparent ones included.
    pub(crate) fn number(&self) -> u32 {
        1 + self.retries + self.transparent
    }

    /// Retries and hedges, and transparent retries.
    pub(crate) fn counts(&self) -> (u32, u32) {
        (self.retries, self.transparent)
    }

    /// The last attempt's response is passed on: a retry counts against the budget no longer.
    pub(crate) fn settle(&mut self) {
        self.permit = None;
    }

    /// Tells the server that this attempt is a retry: `grpc-previous-rpc-attempts` (gRFC A6) or `x-envoy-attempt-count`.
    /// Transparent retries do not count. The first attempt leaves the headers as they are.
    pub(crate) fn write_header(&self, headers: &mut HeaderMap, profile: Profile) {
        match (self.retries, profile) {
            (0, _) => {}
            (n, Profile::Grpc) => drop(headers.insert(PREVIOUS_ATTEMPTS, count(n))),
            (_, Profile::Envoy) => self.write_count(headers),
        }
    }

    /// The attempts made, transparent ones not counted: Envoy's `x-envoy-attempt-count`.
    pub(crate) fn write_count(&self, headers: &mut HeaderMap) {
        headers.insert(ATTEMPT_COUNT, count(self.retries + 1));
    }

    /// The attempt before had no answer within its own limit: Envoy's `x-envoy-is-timeout-retry`.
    pub(crate) fn write_timeout_retry(headers: &mut HeaderMap) {
        headers.insert(TIMEOUT_RETRY, HeaderValue::from_static("true"));
    }
}

/// Uniform in `0..=most`, in whole microseconds.
fn jitter(most: Duration, rng: &mut impl FnMut(u32) -> u32) -> Duration {
    let micros = u32::try_from(most.as_micros()).unwrap_or(u32::MAX);
    Duration::from_micros(rng(micros.saturating_add(1)).into())
}

/// Small numbers without an allocation.
fn count(n: u32) -> HeaderValue {
    match n {
        1 => HeaderValue::from_static("1"),
        2 => HeaderValue::from_static("2"),
        3 => HeaderValue::from_static("3"),
        4 => HeaderValue::from_static("4"),
        5 => HeaderValue::from_static("5"),
        n => HeaderValue::from(n),
    }
}

impl fmt::Display for Stop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotRetriable => "the outcome is not one the policy retries",
            Self::NoPolicy => "there is no retry policy",
            Self::NotReplayable => "the request body is too long to be sent again",
            Self::Exhausted => "all attempts are used up",
            Self::Hook => "the application's retry hook says no",
            Self::Pushback => "the server asked not to retry",
            Self::Deadline => "the next attempt would start after the deadline",
            Self::Budget => "the cluster's retry budget is used up",
        })
    }
}

#[cfg(test)]
mod tests;
