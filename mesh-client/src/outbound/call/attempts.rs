//! The attempts of a call: pick an endpoint, get a stream on a connection to it, send, judge, and again.

use super::{Call, finish::broken, head::SavedHead};
use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        cluster::{Avoid, Endpoint, InFlight, Outcome as Verdict, Permit, Pick, Resource, Unavailable},
        connect::{ConnectError, Subchannel},
        narrate,
        retry::{Attempts, Decision, Failure, Fan, Kept, Outcome, Outgoing, Policy, Situation, Stop, grpc_status},
        route::Profile,
        timeout::{HeadTimer, Idle, StoodStill, write_grpc_timeout},
    },
    telemetry::{access_log::ResponseFlags as Flag, trace},
    transport::{self, Lease, RecvBody, TransportError},
};
use bytes::Bytes;
use futures::future::BoxFuture;
use http::{HeaderMap, Request, Response, StatusCode, request::Parts};
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

    /// All of the request so far is kept.
    pub(super) fn is_replayable(&self) -> bool {
        self.body.is_replayable()
    }

    /// The request of the next attempt; `fan`: several go on at the same time, and this is the attempt's number.
    pub(super) fn again(&self, fan: Option<(&Fan<B>, u32)>) -> Request<Outgoing<B>> {
        self.head.restore(match fan {
            None => self.body.again(),
            Some((fan, attempt)) => Outgoing::Fan(fan.body(attempt)),
        })
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
        let configured = self.policy().cloned();
        let per_try = configured.as_deref().and_then(Policy::per_try_timeout);
        let policy = configured
            .as_deref()
            .filter(|policy| policy.is_for_all() || resend.head.matches(|head| policy.applies(head)));
        if let (Some(policy), Some(first)) = (policy, request.take_if(|_| self.hedges(resend))) {
            return self.hedged(policy, resend, first).await;
        }
        if request.is_some() {
            self.begins();
        }
        let mut tried: Tried = SmallVec::new();
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        let mut after_timeout = false;
        loop {
            let (attempt, outcome) = match ended.take() {
                Some(ended) => ended,
                None => {
                    let mut attempt = match self.lease(&avoid(policy, &tried)).await {
                        Err((failure, error)) => Attempt::Failed(failure, error),
                        Ok(lease) => {
                            self.say_picked(&lease);
                            let mut request = request.take().unwrap_or_else(|| resend.again(None));
                            self.dress(&mut request, per_try, after_timeout);
                            self.begin_attempt();
                            self.tell_attempt(&lease, request.headers_mut());
                            if let Some(idle) = &self.idle {
                                idle.moved(Instant::now());
                            }
                            let (request, head) = self.timed(request);
                            let sent = limited(per_try, self.idle.clone(), head, lease.send(request)).await;
                            self.sent(sent)
                        }
                    };
                    self.look_once(&mut attempt).await;
                    let outcome = self.judge(&attempt);
                    (attempt, outcome)
                }
            };
            self.count(policy, &outcome);
            let number = self.attempts.number();
            let situation = self.situation(policy, resend, &attempt, &outcome, number);
            let routing = &self.chosen.routing;
            let budget = || routing.retry_permit(self.upstream, self.priority).map(Some);
            let decision = self.attempts.next(policy, &outcome, situation, budget, &mut rng);
            if let Some(explain) = &self.chosen.explain {
                narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
            }
            let delay = match decision {
                Decision::Return(stop) => {
                    self.stopped(stop);
                    return attempt.result();
                }
                Decision::RetryNow => None,
                Decision::RetryAfter(delay) => Some(delay),
            };
            self.tell_ended(number, &attempt, &outcome);
            after_timeout = outcome == Outcome::Failure(Failure::PerTryTimeout);
            self.upstream().metrics.retries.increment(1);
            if let Some(in_flight) = self.in_flight.take() {
                // One that was let go of (it is draining, or the stream never left) may be picked again.
                tried.push(in_flight.endpoint().clone());
            }
            drop(attempt);
            if let Some(delay) = delay {
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// No further attempt follows.
    pub(super) fn stopped(&mut self, stop: Stop) {
        match stop {
            // Envoy does not retry without an endpoint.
            Stop::Exhausted if self.flag.contains(Flag::NO_HEALTHY_UPSTREAM) => {}
            Stop::Exhausted => {
                self.flag |= Flag::UPSTREAM_RETRY_LIMIT_EXCEEDED;
                self.upstream().metrics.exhausted.increment(1);
            }
            Stop::Budget => {
                self.flag |= Flag::UPSTREAM_OVERFLOW;
                self.upstream().metrics.overflow.increment(1);
            }
            _ => {}
        }
    }

    /// The first attempt begins: what a budget gives a share of.
    pub(super) fn begins(&self) {
        if let Some(budget) = &self.upstream().budget {
            budget.call_begins();
        }
    }

    /// Tells the mesh's own budget how an attempt ended.
    pub(super) fn count(&self, policy: Option<&Policy>, outcome: &Outcome) {
        if let (Some(budget), Some(policy)) = (&self.upstream().budget, policy) {
            budget.attempt_ended(policy.blames(outcome));
        }
    }

    /// What is known when an attempt ended.
    pub(super) fn situation<B>(
        &self,
        policy: Option<&Policy>,
        resend: &Resend<B>,
        attempt: &Attempt,
        outcome: &Outcome,
        number: u32,
    ) -> Situation
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let hook = policy.and_then(Policy::hook).or(self.chosen.routing.facts.settings.retry_hook.as_ref());
        let asked = hook.and_then(|hook| match attempt {
            Attempt::Response(response) => {
                outcome.ask(hook, number, Some((response.status(), response.headers())), None)
            }
            Attempt::Failed(_, error) => outcome.ask(hook, number, None, Some(error)),
        });
        Situation {
            replayable: resend.body.is_replayable(),
            now: Instant::now(),
            deadline: self.chosen.deadline.map(|deadline| deadline.at),
            asked,
        }
    }

    /// With the timer for the head of the response, where the mesh has one.
    pub(super) fn timed<B>(&self, request: Request<Outgoing<B>>) -> (Request<Outgoing<B>>, Option<HeadTimer>)
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let Some(limit) = self.chosen.routing.facts.settings.response_headers else { return (request, None) };
        let (head, body) = request.into_parts();
        let (body, timer) = body.timed(limit);
        (Request::from_parts(head, body), Some(timer))
    }

    /// The headers that every attempt has of its own.
    pub(super) fn dress<B>(&self, request: &mut Request<B>, per_try: Option<Duration>, after_timeout: bool) {
        let headers = request.headers_mut();
        let count = self.chosen.forward().attempt_count;
        if self.chosen.routing.facts.profile == Profile::Grpc {
            self.attempts.write_header(headers, Profile::Grpc);
        } else if count.in_request {
            self.attempts.write_count(headers);
        }
        if self.attempts.number() > 1 && self.chosen.routing.facts.settings.propagation.has_child_spans() {
            trace::respan(headers);
        }
        if after_timeout && count.after_timeout {
            Attempts::write_timeout_retry(headers);
        }
        let deadline = self.chosen.deadline.as_ref();
        if self.chosen.grpc && (deadline.is_some() || per_try.is_some()) {
            write_grpc_timeout(headers, deadline, per_try, Instant::now());
        }
        self.name_endpoint(request);
    }

    /// Looks for trailers in the response of an attempt, if it has one.
    pub(super) async fn look_once(&self, attempt: &mut Attempt) {
        let Attempt::Response(response) = attempt else { return };
        poll_fn(|cx| {
            self.look_for_trailers(response, cx);
            Poll::Ready(())
        })
        .await;
    }

    /// A gRPC response may end right behind its head: then its status counts as if it were in the head, and nothing was committed.
    pub(super) fn look_for_trailers(&self, response: &mut Response<RecvBody>, cx: &mut Context<'_>) {
        if self.chosen.grpc
            && self.policy().is_some_and(|policy| policy.reads_grpc_status())
            && response.status() == StatusCode::OK
            && grpc_status(response.headers()).is_none()
        {
            response.body_mut().look_for_trailers(cx);
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
            let placement = in_flight.endpoint().placement();
            let hostname = match in_flight.endpoint().address().port() {
                // gRFC A81: that of a LOGICAL_DNS cluster has its port.
                port if grpc && self.leaf().live.is_logical() => &*format!("{}:{port}", placement.hostname),
                _ => &*placement.hostname,
            };
            edits.to_endpoint(&mut uri, request.headers_mut(), hostname);
            *request.uri_mut() = uri;
        }
    }

    /// Picks an endpoint; a stream on a connection to it, if it has one. Without it, [`lease`](Self::lease) goes on with the endpoint.
    pub(super) fn lease_at_once(&mut self) -> Option<Lease> {
        let Pick::Endpoint(endpoint) = self.leaf().live.pick(&self.pick_input(), &[], &mut fastrand::Rng::new()) else {
            return None;
        };
        self.endpoint = Some(endpoint.address());
        self.in_flight.insert(InFlight::of(endpoint)).endpoint().link().ready()
    }

    /// A stream on a connection to a picked endpoint. An endpoint that cannot be connected to is left for the next one: nothing was
    /// sent, so this is no retry.
    pub(super) async fn lease(&mut self, avoid: &Avoid<'_, Subchannel>) -> Result<Lease, (Failure, Error)> {
        let mut line = InLine { picked: self.in_flight.take(), ..InLine::default() };
        // An error from here on must not name the endpoint of the attempt before.
        self.endpoint = None;
        poll_fn(|cx| self.poll_lease(&mut line, avoid, cx)).await
    }

    /// The same for one who does other things meanwhile. `line` keeps the place of who waits; it is as new at the end.
    pub(super) fn poll_lease(
        &mut self,
        line: &mut InLine,
        avoid: &Avoid<'_, Subchannel>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Lease, (Failure, Error)>> {
        let leased = std::task::ready!(self.poll_line(line, avoid, cx));
        self.connecting = false;
        self.in_flight = std::mem::take(line).picked;
        Poll::Ready(leased)
    }

    fn poll_line(
        &mut self,
        line: &mut InLine,
        avoid: &Avoid<'_, Subchannel>,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Lease, (Failure, Error)>> {
        loop {
            if let Some(acquiring) = &mut line.acquiring {
                let acquired = std::task::ready!(acquiring.as_mut().poll(cx));
                line.acquiring = None;
                self.connecting = false;
                match acquired {
                    Ok(Ok(lease)) => return Poll::Ready(Ok(lease)),
                    Ok(Err(cause)) => self.not_connected(line, cause)?,
                    Err(limit) => return Poll::Ready(Err(self.out_of_patience(limit))),
                }
            }
            let picked = match line.picked.take() {
                Some(picked) => picked,
                None => InFlight::of(self.pick_or_fail(avoid)?),
            };
            let endpoint = line.picked.insert(picked).endpoint().clone();
            self.endpoint = Some(endpoint.address());
            if let Some(lease) = endpoint.link().ready() {
                return Poll::Ready(Ok(lease));
            }
            self.wait_in_line(&mut line.pending)?;
            let (until, priority) = (self.patience(&mut line.patience)?, self.priority);
            self.connecting = true;
            if let Some(watch) = &self.chosen.watch {
                watch.delayed();
            }
            if let Some(explain) = &self.chosen.explain {
                let limit = until.map_or_else(String::new, |(_, limit)| format!(", at most {limit:?}"));
                explain.add("wait", format!("for a connection to {} or a stream of one{limit}", endpoint.address()));
            }
            line.acquiring = Some(Box::pin(async move {
                let acquired = endpoint.link().acquire(priority);
                match until {
                    None => Ok(acquired.await),
                    Some((at, limit)) => tokio::time::timeout_at(at, acquired).await.map_err(|_| limit),
                }
            }));
        }
    }

    fn pick_or_fail(&mut self, avoid: &Avoid<'_, Subchannel>) -> Result<Arc<Endpoint>, (Failure, Error)> {
        match self.pick_again(avoid, &mut fastrand::Rng::new())? {
            Pick::Endpoint(endpoint) => Ok(endpoint),
            Pick::Fail(cause) => {
                // An endpoint that refuses connections may take the next one: that is a failure to connect.
                let (failure, flag) = match &*cause {
                    Unavailable::Unreachable { .. } => (Failure::Connect, Flag::UPSTREAM_CONNECTION_FAILURE),
                    _ => (Failure::NoEndpoint, Flag::NO_HEALTHY_UPSTREAM),
                };
                self.flag = flag;
                let message = "no endpoint can be used".into();
                Err((failure, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))))
            }
        }
    }

    /// The endpoint picked cannot be connected to: another one, unless that happened too often.
    fn not_connected(&mut self, line: &mut InLine, cause: Arc<ConnectError>) -> Result<(), (Failure, Error)> {
        if let Some(mut failed) = line.picked.take() {
            failed.record(Verdict::LocalOrigin);
            if let Some(explain) = &self.chosen.explain {
                let text = format!("{} failed: {}", failed.endpoint().address(), narrate::chain(&cause));
                explain.add("connect", text);
            }
        }
        line.failures += 1;
        if line.failures < MAX_CONNECT_FAILURES {
            return Ok(());
        }
        self.flag = Flag::UPSTREAM_CONNECTION_FAILURE;
        Err((Failure::Connect, self.error(Kind::NoEndpoint, "no connection".into(), Some(Box::new(cause)))))
    }

    /// Until when the call may wait for a connection, from when it first had to; and the limit (failfast).
    fn patience(&mut self, patience: &mut Option<Instant>) -> Result<Option<(Instant, Duration)>, (Failure, Error)> {
        let Some(limit) = self.chosen.routing.facts.settings.failfast else { return Ok(None) };
        if patience.is_none()
            && let Some(cause) = self.leaf().live.fails_fast()
        {
            self.flag = Flag::NO_HEALTHY_UPSTREAM;
            let message = "no endpoint is ready, and calls before waited in vain (failfast)".into();
            return Err((Failure::NoEndpoint, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))));
        }
        let now = Instant::now();
        let begun = *patience.get_or_insert(now);
        Ok(begun.checked_add(limit).map(|at| (at, limit)))
    }

    /// It has waited so long.
    fn out_of_patience(&mut self, limit: Duration) -> (Failure, Error) {
        let cause = self.leaf().live.stalled();
        self.flag = Flag::NO_HEALTHY_UPSTREAM;
        let message = format!("no endpoint was ready within {limit:?} (failfast)");
        (Failure::NoEndpoint, self.error(Kind::NoEndpoint, message, Some(Box::new(cause))))
    }

    /// Counts the call as waiting for a connection (Envoy's `max_pending_requests`), once.
    fn wait_in_line(&mut self, pending: &mut Option<(usize, Permit)>) -> Result<(), (Failure, Error)> {
        if pending.as_ref().is_none_or(|(leaf, _)| *leaf != self.leaf) {
            let permit =
                self.leaf().live.breaker().acquire(self.priority, Resource::PendingRequests).map_err(|over| {
                    self.flag = Flag::UPSTREAM_OVERFLOW;
                    (
                        Failure::Overloaded,
                        self.error(Kind::Overloaded, "the circuit breaker is open".into(), Some(Box::new(over))),
                    )
                })?;
            *pending = Some((self.leaf, permit));
        }
        Ok(())
    }

    /// What an attempt ended in.
    pub(super) fn sent(&mut self, sent: Sent) -> Attempt {
        match sent {
            Ok(Ok(response)) => Attempt::Response(response),
            Ok(Err(error)) => self.broken(error),
            Err(Over::PerTry(limit)) => self.elapsed(limit),
            Err(Over::Head(limit)) => {
                let message = format!(
                    "the response had no headers {limit:?} after the request was sent (response_headers_timeout)"
                );
                self.flag = Flag::UPSTREAM_REQUEST_TIMEOUT;
                Attempt::Failed(Failure::PerTryTimeout, self.error(Kind::Timeout, message, None))
            }
            Err(Over::Idle(still)) => {
                self.flag = Flag::STREAM_IDLE_TIMEOUT;
                Attempt::Failed(Failure::PerTryTimeout, self.stood_still(still))
            }
        }
    }

    /// An attempt failed in the transport.
    pub(super) fn broken(&mut self, error: TransportError) -> Attempt {
        let failure = Failure::of_transport(&error);
        self.flag = broken(&error);
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
        self.flag = Flag::UPSTREAM_REQUEST_TIMEOUT;
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
        let headers = final_headers(response);
        let outcome = Outcome::of_response(response.status(), headers, grpc);
        let outcome = match self.policy() {
            Some(policy) => outcome.read_by(policy, headers),
            None => outcome,
        };
        self.learn(Some(headers), &outcome);
        if let (Outcome::Response(head), Some(in_flight)) = (&outcome, &mut self.in_flight) {
            match head.grpc {
                Some(code) => in_flight.record(Verdict::of_grpc_status(code)),
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

/// Where a call stands in the line for a connection.
#[derive(Default)]
pub(super) struct InLine {
    /// Whose connection it waits for.
    picked: Option<InFlight>,
    acquiring: Option<BoxFuture<'static, Acquired>>,
    /// Among the waiting ones of this leaf.
    pending: Option<(usize, Permit)>,
    /// Since when it waits.
    patience: Option<Instant>,
    /// Attempts to connect that failed.
    failures: u32,
}

impl InLine {
    /// Whose connection it waits for.
    pub(super) fn endpoint(&self) -> Option<Arc<Endpoint>> {
        self.picked.as_ref().map(|picked| picked.endpoint().clone())
    }

    /// Waits for no endpoint's any more, and goes on waiting.
    pub(super) fn leave(&mut self) {
        (self.picked, self.acquiring) = (None, None);
    }
}

/// A stream, or why there is no connection; or it waited so long.
type Acquired = Result<Result<Lease, Arc<ConnectError>>, Duration>;

/// How what was sent was answered, if it was in time.
pub(super) type Sent = Result<Result<Response<RecvBody>, TransportError>, Over>;

/// What ended an attempt before it was answered.
pub(super) enum Over {
    PerTry(Duration),
    /// Of the wait for the head of the response.
    Head(Duration),
    Idle(StoodStill),
}

/// `attempt`, which begins now, within its own limits.
pub(super) async fn limited<T>(
    per_try: Option<Duration>,
    idle: Option<Arc<Idle>>,
    mut head: Option<HeadTimer>,
    attempt: impl Future<Output = T>,
) -> Result<T, Over> {
    let idle = idle.as_deref();
    let mut standing = idle.and_then(|idle| idle.of_attempt(Instant::now()));
    let mut attempt = pin!(attempt);
    let answered = poll_fn(|cx| {
        if let Poll::Ready(sent) = attempt.as_mut().poll(cx) {
            return Poll::Ready(Ok(sent));
        }
        if let Some(Poll::Ready(limit)) = head.as_mut().map(|head| head.poll(cx)) {
            return Poll::Ready(Err(Over::Head(limit)));
        }
        match (&mut standing, idle) {
            (Some(timer), Some(idle)) => timer.poll(idle, cx).map(|still| Err(Over::Idle(still))),
            _ => Poll::Pending,
        }
    });
    match per_try {
        None => answered.await,
        Some(limit) => tokio::time::timeout(limit, answered).await.unwrap_or(Err(Over::PerTry(limit))),
    }
}

/// The endpoints of the attempts so far.
pub(super) type Tried = SmallVec<[Arc<Endpoint<Subchannel>>; 2]>;

/// What the next attempt stays away from.
pub(super) fn avoid<'a>(policy: Option<&'a Policy>, tried: &'a Tried) -> Avoid<'a, Subchannel> {
    Avoid {
        tried,
        previous_hosts: policy.is_none_or(Policy::avoid_previous_hosts),
        // The first attempt goes anywhere.
        omit: policy.filter(|_| !tried.is_empty()).map_or(&[], Policy::omit_hosts),
        leave_priorities: policy.map_or(0, Policy::leave_priorities),
    }
}

/// The headers of a response, or the trailers if those are all that comes.
fn final_headers(response: &Response<RecvBody>) -> &HeaderMap {
    response.body().early_trailers().unwrap_or(response.headers())
}

impl Attempt {
    pub(super) fn result(self) -> Result<Response<RecvBody>, Error> {
        match self {
            Self::Response(response) => Ok(response),
            Self::Failed(_, error) => Err(error),
        }
    }

    /// In words.
    pub(super) fn ended(&self) -> String {
        match self {
            Self::Response(response) => match grpc_status(final_headers(response)) {
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
