//! What a policy asks of a request before it picks, and what it is told of the answer. Only for clusters whose policy asks.

use super::{Call, Chosen};
use crate::outbound::{
    cluster::{Answered, Outcome as Verdict, Report, Resource, Want},
    pick::{Part, PickInput},
    retry::{Outcome, Pushback, Response},
    route::{RequestHead, hash_of_header},
};
use http::{HeaderMap, HeaderValue, header, request::Parts};
use std::{net::SocketAddr, time::Duration};
use tokio::time::Instant;

/// What picks go by besides the call itself. Boxed: few clusters ask for any of it.
#[derive(Debug, Default)]
pub(super) struct Steering {
    /// Drawn once: every attempt of the call has the same.
    hash: Option<u64>,
    headers: Option<HeaderMap>,
    /// The part of the leaf that the aggregate wants.
    pub(super) part: Option<Part>,
    /// The endpoint that the call's session sticks to (gRFC A55).
    pub(super) override_host: Option<SocketAddr>,
    /// Cookies that were made for the hash: for the response.
    cookies: Vec<HeaderValue>,
    /// When the attempt began; `None` when nobody wants to know, or it was judged.
    sent: Option<Instant>,
}

impl Steering {
    /// What its policy hashed of the request.
    pub(super) fn hash(&self) -> Option<u64> {
        self.hash
    }

    /// What the policies of the clusters that may take the call want of this request.
    pub(super) fn of(chosen: &Chosen, clusters: &[usize], head: &Parts) -> Option<Box<Self>> {
        let upstreams = chosen.routing.upstreams();
        if !clusters.iter().any(|i| upstreams[*i].live.wants_any()) {
            return None;
        }
        let wanted = |want| clusters.iter().map(|i| &upstreams[*i].live).find(|live| live.wants(want));
        let mut steering = Self::default();
        if let Some(live) = wanted(Want::Hash) {
            let facts = &chosen.routing.facts;
            let request = RequestHead::of(head);
            match (live.hash_header(), &chosen.forward().hasher) {
                (Some(name), _) => steering.hash = hash_of_header(&request, &name, facts.profile),
                (None, Some(hasher)) => {
                    let hashed = hasher.hash(&request, facts.channel_id, || fastrand::u64(..));
                    (steering.hash, steering.cookies) = (hashed.hash, hashed.cookies);
                }
                (None, None) => {}
            }
        }
        if wanted(Want::Headers).is_some() {
            steering.headers = Some(head.headers.clone());
        }
        if wanted(Want::Latency).is_some() {
            steering.sent = Some(chosen.started);
        }
        Some(Box::new(steering))
    }
}

impl Call {
    /// The caller has a session with this endpoint.
    pub(super) fn stick_to(&mut self, address: SocketAddr) {
        self.steering.get_or_insert_default().override_host = Some(address);
    }

    /// What the next pick goes by.
    #[inline]
    pub(super) fn pick_input(&self) -> PickInput<'_> {
        match &self.steering {
            None => PickInput::plain(self.chosen.started),
            Some(steering) => PickInput {
                hash: steering.hash,
                metadata: self.chosen.choice().metadata.as_deref(),
                override_host: steering.override_host,
                headers: steering.headers.as_ref(),
                part: steering.part,
                now: Instant::now(),
                in_flight: self.leaf().live.breaker().total(Resource::Requests),
            },
        }
    }

    /// An attempt begins.
    #[inline]
    pub(super) fn begin_attempt(&mut self) {
        if self.steering.is_some() {
            self.attempt_began(Instant::now());
        }
    }

    /// The attempt that is judged next began at this moment.
    pub(super) fn attempt_began(&mut self, at: Instant) {
        if let Some(steering) = &mut self.steering {
            let leaf = &self.chosen.routing.upstreams()[self.leaf];
            steering.sent = leaf.live.wants(Want::Latency).then_some(at);
        }
    }

    /// An attempt ended, or its response began: the policy is told how long it took.
    #[inline]
    pub(super) fn learn(&mut self, answer: Option<&HeaderMap>, outcome: &Outcome) {
        if let Some(headers) = answer {
            self.take_report(headers);
        }
        let Some(sent) = self.steering.as_mut().and_then(|steering| steering.sent.take()) else { return };
        let (failed, hint) = match (answer, outcome) {
            (Some(headers), Outcome::Response(response)) => (is_failure(response), hint(response, headers)),
            _ => (true, None),
        };
        if let Some(in_flight) = &self.in_flight {
            let answered = Answered { took: sent.elapsed(), failed, hint };
            self.leaf().live.learn(in_flight.endpoint(), answered);
        }
    }

    /// What the head or the trailers of a response say of the endpoint's load.
    #[inline]
    pub(super) fn take_report(&self, headers: &HeaderMap) {
        if self.steering.is_some()
            && self.leaf().live.wants(Want::Report)
            && let Some(in_flight) = &self.in_flight
            && let Some(report) = Report::of(headers)
        {
            self.leaf().live.reported(in_flight.endpoint(), &report);
        }
    }

    /// A response ended in an error after it began well.
    pub(super) fn learn_late(&self, verdict: Verdict) {
        if self.steering.is_none() || !verdict.is_failure() || !self.leaf().live.wants(Want::Latency) {
            return;
        }
        if let Some(in_flight) = &self.in_flight {
            let answered = Answered { took: Duration::ZERO, failed: true, hint: None };
            self.leaf().live.learn(in_flight.endpoint(), answered);
        }
    }

    /// The cookies that were made for the hash.
    pub(super) fn set_cookies(&mut self, headers: &mut HeaderMap) {
        let Some(steering) = &mut self.steering else { return };
        for cookie in steering.cookies.drain(..) {
            headers.append(header::SET_COOKIE, cookie);
        }
    }
}

/// Says that the endpoint is broken, or has too much to do: 5xx, 429, RESOURCE_EXHAUSTED and the gRPC statuses like them.
fn is_failure(response: &Response) -> bool {
    match response.grpc {
        Some(8) => true,
        Some(code) => Verdict::of_grpc_status(code).is_failure(),
        None => response.status == 429 || response.status >= 500,
    }
}

/// For how long the endpoint asks to be left alone: `grpc-retry-pushback-ms`, or `retry-after` in seconds.
fn hint(response: &Response, headers: &HeaderMap) -> Option<Duration> {
    match response.pushback {
        Pushback::After(delay) => Some(delay),
        Pushback::None | Pushback::Stop => {
            let seconds = headers.get(header::RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
            Some(Duration::from_secs(seconds))
        }
    }
}
