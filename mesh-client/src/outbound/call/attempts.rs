//! The attempts of a call: pick an endpoint, get a stream on a connection to it, send, judge, and again.

use super::{Call, finish::grpc_status, head::SavedHead};
use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        cluster::{Endpoint, InFlight, Outcome as Verdict, Permit, Pick, Resource, Unavailable},
        connect::Subchannel,
        narrate,
        retry::{Decision, Failure, Kept, Outcome, Outgoing, Policy, Situation},
        route::Profile,
        timeout::{Idle, StoodStill, write_grpc_timeout},
    },
    telemetry::metrics::Flag,
    transport::{self, Lease, RecvBody, TransportError},
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use smallvec::SmallVec;
use std::{
    future::poll_fn,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Instant;

/// Connection attempts of one call that fail before anything is sent; each makes its endpoint unavailable, so this bounds only races.
const MAX_CONNECT_FAILURES: u32 = 32;

/// What an attempt ended in.
pub(super) enum Attempt {
    Response(Response<RecvBody>),
    Failed(Failure, Error),
}

/// What is kept of a request for further attempts.
pub(super) struct Resend<B> {
    head: SavedHead,
    body: Kept<B>,
}

impl<B> Resend<B> {
    pub(super) fn new(head: SavedHead, body: Kept<B>) -> Self {
        Self { head, body }
    }
}

impl<B> Resend<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// Keeps a request, and gives it back for the first attempt. At most `cap` bytes of the body are kept. Polls the body for the
    /// caller's task, which goes on polling the attempt's.
    ///
    /// # Errors
    /// The body's own.
    pub(super) fn begin(
        head: Parts,
        body: B,
        cap: usize,
        cx: &mut Context<'_>,
    ) -> Result<(Self, Request<Outgoing<B>>), BoxError> {
        let (kept, body) = Kept::new(body, cap, cx)?;
        Ok((Self { head: SavedHead::of(&head), body: kept }, Request::from_parts(head, body)))
    }

    fn again(&self) -> Request<Outgoing<B>> {
        self.head.restore(self.body.again())
    }
}

impl Call {
    /// Attempts until one is final: what follows one that `ended`, or from the first `request`.
    pub(super) async fn attempts<B>(
        &mut self,
        resend: &Resend<B>,
        mut ended: Option<(Attempt, Outcome)>,
        mut request: Option<Request<Outgoing<B>>>,
    ) -> Result<Response<RecvBody>, Error>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let policy = self.policy().cloned();
        let (policy, deadline) = (policy.as_deref(), self.chosen.deadline);
        let (grpc, profile) = (self.chosen.grpc, self.chosen.routing.facts.profile);
        let priority = self.priority;
        let per_try = policy.and_then(Policy::per_try_timeout);
        let avoid_tried = policy.is_none_or(Policy::avoid_previous_hosts);
        let mut tried: SmallVec<[Arc<Endpoint<Subchannel>>; 2]> = SmallVec::new();
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        loop {
            let (attempt, outcome) = match ended.take() {
                Some(ended) => ended,
                None => {
                    let attempt = match self.lease(&tried).await {
                        Err((failure, error)) => Attempt::Failed(failure, error),
                        Ok(lease) => {
                            if let Some(explain) = &self.chosen.explain {
                                explain.add("peer", narrate::peer(lease.peer()));
                            }
                            let mut request = request.take().unwrap_or_else(|| resend.again());
                            self.attempts.write_header(request.headers_mut(), profile);
                            if grpc && (deadline.is_some() || per_try.is_some()) {
                                write_grpc_timeout(request.headers_mut(), deadline.as_ref(), per_try, Instant::now());
                            }
                            self.name_endpoint(&mut request);
                            self.begin_attempt();
                            let sent = limited(per_try, self.idle.clone(), lease.send(request)).await;
                            match sent {
                                Ok(Ok(response)) => Attempt::Response(response),
                                Ok(Err(error)) => self.broken(error),
                                Err(Over::PerTry(limit)) => self.elapsed(limit),
                                Err(Over::Idle(still)) => {
                                    self.flag = Flag::Timeout;
                                    Attempt::Failed(Failure::PerTryTimeout, self.stood_still(still))
                                }
                            }
                        }
                    };
                    let outcome = self.judge(&attempt);
                    (attempt, outcome)
                }
            };
            let situation = Situation {
                replayable: resend.body.is_replayable(),
                now: Instant::now(),
                deadline: deadline.map(|d| d.at),
            };
            let upstream = &self.chosen.routing.upstreams()[self.upstream];
            let budget = || upstream.retry_permit(profile, priority).map(Some);
            let number = self.attempts.number();
            let decision = self.attempts.next(policy, &outcome, situation, budget, &mut rng);
            if let Some(explain) = &self.chosen.explain {
                narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
            }
            let delay = match decision {
                Decision::Return(_) => {
                    return match attempt {
                        Attempt::Response(response) => Ok(response),
                        Attempt::Failed(_, error) => Err(error),
                    };
                }
                Decision::RetryNow => None,
                Decision::RetryAfter(delay) => Some(delay),
            };
            self.upstream().metrics.retries.increment(1);
            if let Some(in_flight) = self.in_flight.take().filter(|_| avoid_tried) {
                // One that was let go of (it is draining, or the stream never left) may be picked again.
                tried.push(in_flight.endpoint().clone());
            }
            drop(attempt);
            if let Some(delay) = delay {
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// `auto_host_rewrite`: the request's authority is the name of the endpoint picked.
    fn name_endpoint<B>(&self, request: &mut Request<B>) {
        let Some(edits) = self.edited.as_ref().and(self.chosen.choice().edits.as_ref()) else { return };
        let grpc = self.chosen.routing.facts.profile == Profile::Grpc;
        let Some(in_flight) = self.in_flight.as_ref().filter(|_| edits.auto_host) else { return };
        // gRFC A81: what the application said stands.
        if !(grpc && self.chosen.own_authority) {
            let mut uri = std::mem::take(request.uri_mut());
            edits.to_endpoint(&mut uri, request.headers_mut(), &in_flight.endpoint().placement().hostname);
            *request.uri_mut() = uri;
        }
    }

    /// Picks an endpoint; a stream on a connection to it, if it has one. Without it, [`lease`](Self::lease) goes on with the endpoint.
    pub(super) fn lease_at_once(&mut self) -> Option<Lease> {
        let Pick::Endpoint(endpoint) = self.upstream().live.pick(&self.pick_input(), &[], &mut fastrand::Rng::new())
        else {
            return None;
        };
        self.endpoint = Some(endpoint.address());
        self.in_flight.insert(InFlight::of(endpoint)).endpoint().link().ready()
    }

    /// A stream on a connection to a picked endpoint. An endpoint that cannot be connected to is left for the next one: nothing was
    /// sent, so this is no retry.
    async fn lease(&mut self, tried: &[Arc<Endpoint<Subchannel>>]) -> Result<Lease, (Failure, Error)> {
        let mut random = fastrand::Rng::new();
        let mut failures = 0;
        let (mut pending, mut patience) = (None, None);
        // An error from here on must not name the endpoint of the attempt before.
        self.endpoint = None;
        loop {
            let picked = match self.in_flight.take() {
                Some(picked) => picked,
                None => match self.upstream().live.pick(&self.pick_input(), tried, &mut random) {
                    Pick::Endpoint(endpoint) => InFlight::of(endpoint),
                    Pick::Fail(cause) => {
                        // An endpoint that refuses connections may take the next one: that is a failure to connect.
                        let (failure, flag) = match &*cause {
                            Unavailable::Unreachable { .. } => (Failure::Connect, Flag::ConnectionFailure),
                            _ => (Failure::NoEndpoint, Flag::NoHealthyUpstream),
                        };
                        self.flag = flag;
                        let message = "no endpoint can be used".into();
                        return Err((failure, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))));
                    }
                },
            };
            let in_flight = self.in_flight.insert(picked);
            self.endpoint = Some(in_flight.endpoint().address());
            if let Some(lease) = in_flight.endpoint().link().ready() {
                return Ok(lease);
            }
            let endpoint = in_flight.endpoint().clone();
            self.wait_in_line(&mut pending)?;
            self.connecting = true;
            let acquired = match self.patience(&mut patience)? {
                None => endpoint.link().acquire(self.priority).await,
                Some((at, limit)) => match tokio::time::timeout_at(at, endpoint.link().acquire(self.priority)).await {
                    Ok(acquired) => acquired,
                    Err(_) => return Err(self.out_of_patience(limit)),
                },
            };
            self.connecting = false;
            let cause = match acquired {
                Ok(lease) => return Ok(lease),
                Err(cause) => cause,
            };
            if let Some(mut failed) = self.in_flight.take() {
                failed.record(Verdict::LocalOrigin);
            }
            if let Some(explain) = &self.chosen.explain {
                explain.add("connect", format!("{} failed: {}", endpoint.address(), narrate::chain(&cause)));
            }
            failures += 1;
            if failures >= MAX_CONNECT_FAILURES {
                self.flag = Flag::ConnectionFailure;
                return Err((
                    Failure::Connect,
                    self.error(Kind::NoEndpoint, "no connection".into(), Some(Box::new(cause))),
                ));
            }
        }
    }

    /// Until when the call may wait for a connection, from when it first had to; and the limit (failfast).
    fn patience(&mut self, patience: &mut Option<Instant>) -> Result<Option<(Instant, Duration)>, (Failure, Error)> {
        let Some(limit) = self.chosen.routing.facts.settings.failfast else { return Ok(None) };
        if patience.is_none()
            && let Some(cause) = self.upstream().live.fails_fast()
        {
            self.flag = Flag::NoHealthyUpstream;
            let message = "no endpoint is ready, and calls before waited in vain (failfast)".into();
            return Err((Failure::NoEndpoint, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))));
        }
        let now = Instant::now();
        let begun = *patience.get_or_insert(now);
        Ok(begun.checked_add(limit).map(|at| (at, limit)))
    }

    /// It has waited so long.
    fn out_of_patience(&mut self, limit: Duration) -> (Failure, Error) {
        let cause = self.upstream().live.stalled();
        self.flag = Flag::NoHealthyUpstream;
        let message = format!("no endpoint was ready within {limit:?} (failfast)");
        (Failure::NoEndpoint, self.error(Kind::NoEndpoint, message, Some(Box::new(cause))))
    }

    /// Counts the call as waiting for a connection (Envoy's `max_pending_requests`), once.
    fn wait_in_line(&mut self, pending: &mut Option<Permit>) -> Result<(), (Failure, Error)> {
        if pending.is_none() {
            let permit =
                self.upstream().live.breaker().acquire(self.priority, Resource::PendingRequests).map_err(|over| {
                    self.flag = Flag::Overflow;
                    (
                        Failure::Overloaded,
                        self.error(Kind::Overloaded, "the circuit breaker is open".into(), Some(Box::new(over))),
                    )
                })?;
            *pending = Some(permit);
        }
        Ok(())
    }

    /// An attempt failed in the transport.
    pub(super) fn broken(&mut self, error: TransportError) -> Attempt {
        let failure = Failure::of_transport(&error);
        self.flag = Flag::ConnectionTermination;
        let (kind, message) = match error.kind() {
            transport::Kind::RequestBody => (Kind::RequestBody, "the request was not sent whole"),
            transport::Kind::InvalidRequest => (Kind::InvalidRequest, "the request cannot be sent"),
            _ => (Kind::Transport, "the request failed"),
        };
        Attempt::Failed(failure, self.error(kind, message.into(), Some(Box::new(error))))
    }

    /// An attempt took longer than its own limit.
    pub(super) fn elapsed(&mut self, limit: Duration) -> Attempt {
        let message = format!("the attempt had no response within its limit of {limit:?} (per_try_timeout)");
        self.flag = Flag::Timeout;
        Attempt::Failed(Failure::PerTryTimeout, self.error(Kind::Timeout, message, None))
    }

    /// Reads what an attempt ended in, and tells outlier detection how one that has no more to come ended.
    pub(super) fn judge(&mut self, attempt: &Attempt) -> Outcome {
        match attempt {
            Attempt::Response(response) => self.judge_response(response),
            Attempt::Failed(failure, error) => {
                let outcome = Outcome::Failure(*failure);
                self.learn(None, &outcome);
                self.judge_failure(*failure, error);
                outcome
            }
        }
    }

    /// A response that goes on is judged at its end.
    pub(super) fn judge_response(&mut self, response: &Response<RecvBody>) -> Outcome {
        let grpc = self.chosen.grpc;
        let outcome = Outcome::of_response(response.status(), response.headers(), grpc);
        self.learn(Some(response.headers()), &outcome);
        if let (Outcome::Response(head), Some(in_flight)) = (&outcome, &mut self.in_flight) {
            match head.grpc {
                Some(code) => {
                    in_flight.record(Verdict::of_grpc(tonic::Code::from_i32(i32::try_from(code).unwrap_or(2))))
                }
                None if grpc => {}
                None => in_flight.record(Verdict::of_http(response.status())),
            }
        }
        outcome
    }

    /// A failure that says nothing about the endpoint is not counted, and lets go of it.
    fn judge_failure(&mut self, failure: Failure, error: &Error) {
        let against = match failure {
            Failure::Connect | Failure::Reset(_) | Failure::PerTryTimeout | Failure::Deadline => true,
            // A graceful GOAWAY says nothing against the endpoint, a refused stream does.
            Failure::Refused => is_refused(error),
            _ => false,
        };
        match &mut self.in_flight {
            Some(in_flight) if against => in_flight.record(Verdict::LocalOrigin),
            in_flight => *in_flight = None,
        }
    }
}

/// What ended an attempt before it was answered.
enum Over {
    PerTry(Duration),
    Idle(StoodStill),
}

/// `attempt` within its own limits.
async fn limited<T>(
    per_try: Option<Duration>,
    idle: Option<Arc<Idle>>,
    attempt: impl Future<Output = T>,
) -> Result<T, Over> {
    let idle = idle.as_deref();
    if let Some(idle) = idle {
        idle.moved(Instant::now());
    }
    let mut standing = idle.and_then(Idle::of_attempt);
    let mut attempt = pin!(attempt);
    let answered = poll_fn(|cx| match (attempt.as_mut().poll(cx), &mut standing, idle) {
        (Poll::Ready(sent), _, _) => Poll::Ready(Ok(sent)),
        (Poll::Pending, Some(timer), Some(idle)) => timer.poll(idle, cx).map(|still| Err(Over::Idle(still))),
        _ => Poll::Pending,
    });
    match per_try {
        None => answered.await,
        Some(limit) => tokio::time::timeout(limit, answered).await.unwrap_or(Err(Over::PerTry(limit))),
    }
}

impl Attempt {
    /// In words.
    fn ended(&self) -> String {
        match self {
            Self::Response(response) => match grpc_status(response.headers()) {
                Some(code) => format!("HTTP {}, grpc-status {code}", response.status().as_u16()),
                None => format!("HTTP {}", response.status().as_u16()),
            },
            Self::Failed(_, error) => error.reason(),
        }
    }
}

fn is_refused(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(transport) = error.downcast_ref::<TransportError>() {
            return transport.kind() == transport::Kind::RefusedStream;
        }
        next = error.source();
    }
    false
}
