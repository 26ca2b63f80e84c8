//! Several attempts of one call at the same time: the first good response wins, the others are cut off.
//!
//! Envoy's `hedge_on_per_try_timeout` and gRFC A6's hedging. A request that still goes on when it is hedged is read by all attempts, each
//! at its own speed, as far as it is kept; beyond that the attempt that is ahead goes on alone.
//!
//! What becomes of the attempts that lose: one that was silent for the per-try timeout counts as a timeout against its endpoint, at that
//! moment and whatever it answers later (Envoy's `onSoftPerTryTimeout`); one that is cut off before counts as nothing, except that peak
//! EWMA knows now that it would have taken longer (as Linkerd's does of calls that are dropped).

use super::{
    Call,
    attempts::{Attempt, InLine, Resend, Sent, Tried, avoid, limited},
};
use crate::{
    Error,
    error::BoxError,
    outbound::{
        cluster::{Answered, Endpoint, InFlight, LiveCluster, Outcome as Verdict, Want},
        connect::Subchannel,
        narrate,
        pick::{Candidate, Standing},
        retry::{Decision, Failure, Fan, Outcome, Outgoing, Permit, Policy, Pushback, Situation, Stop, is_behind},
        timeout::{HeadTimer, Idle},
    },
    transport::{Lease, RecvBody, TransportError},
};
use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use http::{Request, Response};
use http_body::Body;
use mesh_xds::resource::Hedge;
use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::Duration,
};
use tokio::time::{Instant, Sleep};

/// An attempt that was answered or failed.
struct Leg {
    /// Counts the attempt against its endpoint; dropped unjudged when another wins.
    in_flight: Option<InFlight<Subchannel>>,
    number: u32,
    began: Instant,
    /// Its share of the budget.
    _permit: Option<Permit>,
    sent: Sent,
}

/// How long an attempt may take.
struct Limits {
    /// Until it is cut off.
    per_try: Option<Duration>,
    /// From then on it counts as a timeout, and goes on. At the very moment when the next one starts.
    soft: Option<Instant>,
    idle: Option<Arc<Idle>>,
    head: Option<HeadTimer>,
}

/// An attempt under way, at a cluster whose policy compares latencies. When it is not waited for any longer, its endpoint is known to
/// be as slow as it was so far.
struct Unanswered {
    live: Arc<LiveCluster>,
    endpoint: Option<Arc<Endpoint>>,
    began: Instant,
}

/// What happens next.
#[allow(clippy::large_enum_variant, reason = "made and taken apart on the spot")]
enum Step {
    Ended(Leg),
    Leased(Result<Lease, (Failure, Error)>),
    Due(Due),
}

/// What the timer is for.
#[derive(Clone, Copy)]
enum Due {
    /// One more attempt, beside those in flight.
    Hedge,
    /// One more attempt, decided and paid for.
    Retry,
}

/// The attempts of a hedged call, and when the next one starts.
struct Race<B> {
    legs: FuturesUnordered<BoxFuture<'static, Leg>>,
    /// Of a request that goes on.
    fan: Option<Fan<B>>,
    /// An attempt is on its way to a connection,
    starting: bool,
    /// and stands here in the line for it.
    line: InLine,
    timer: Option<(Pin<Box<Sleep>>, Due)>,
    permit: Option<Permit>,
    tried: Tried,
    /// The server said so: no more attempts.
    stopped: bool,
    /// Who waits for its connection may still wait for another's.
    moves: bool,
}

/// When what begins now is hedged; `None`: never.
fn hedge_at(began: Instant, delay: Duration) -> Option<(Pin<Box<Sleep>>, Due)> {
    let at = began.checked_add(delay)?;
    Some((Box::pin(tokio::time::sleep_until(at)), Due::Hedge))
}

impl<B> Race<B> {
    /// One more attempt begins.
    fn starts(&mut self) {
        (self.starting, self.moves) = (true, true);
    }

    /// Whether one more attempt can send the whole request.
    fn is_replayable(&self) -> bool {
        self.fan.as_ref().is_none_or(Fan::is_kept)
    }
}

impl Call {
    /// Whether the call may have several attempts at the same time.
    pub(super) fn hedges<B>(&self, resend: &Resend<B>) -> bool
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        self.hedge_delay().is_some() && resend.is_replayable()
    }

    /// After what time without an answer another attempt starts.
    fn hedge_delay(&self) -> Option<Duration> {
        match self.chosen.forward().hedge.filter(|_| !self.copy)? {
            Hedge::After(delay) => Some(delay),
            Hedge::PerTryTimeout => self.policy()?.per_try_timeout(),
        }
    }

    /// Attempts until one is final, the next starting before the last has ended.
    pub(super) async fn hedged<B>(
        &mut self,
        policy: &Policy,
        resend: &Resend<B>,
        mut first: Request<Outgoing<B>>,
    ) -> Result<Response<RecvBody>, Error>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let delay = self.hedge_delay().unwrap_or(Duration::MAX);
        let on_timeout = matches!(self.chosen.forward().hedge, Some(Hedge::PerTryTimeout));
        // An attempt that is hedged on its timeout goes on beyond it.
        let per_try = policy.per_try_timeout().filter(|_| !on_timeout);
        let mut race = Race {
            legs: FuturesUnordered::new(),
            fan: first.body_mut().fan(),
            starting: true,
            line: InLine::default(),
            timer: None,
            moves: true,
            permit: None,
            tried: Tried::new(),
            stopped: false,
        };
        let mut request = Some(first);
        self.begins();
        loop {
            match self.step(policy, &mut race).await {
                Step::Leased(Ok(lease)) => {
                    race.starting = false;
                    self.say_picked(&lease);
                    let number = self.attempts.number();
                    let fan = race.fan.as_ref().map(|fan| (fan, number));
                    let mut request = request.take().unwrap_or_else(|| resend.again(fan));
                    self.dress(&mut request, per_try, false);
                    self.tell_attempt(&lease, request.headers_mut());
                    let in_flight = self.in_flight.take();
                    race.tried.extend(in_flight.as_ref().map(|in_flight| in_flight.endpoint().clone()));
                    let (permit, began) = (race.permit.take(), Instant::now());
                    let due = began.checked_add(delay);
                    let (request, head) = self.timed(request);
                    let limits = Limits { per_try, soft: due.filter(|_| on_timeout), idle: self.idle.clone(), head };
                    let unanswered = Unanswered::of(&self.leaf().live, in_flight.as_ref(), began);
                    let answer = answered(lease.send(request), limits, in_flight, unanswered);
                    race.legs.push(Box::pin(async move {
                        let (sent, in_flight) = answer.await;
                        Leg { in_flight, number, began, _permit: permit, sent }
                    }));
                    race.timer = hedge_at(began, delay).filter(|_| !race.stopped);
                }
                Step::Leased(Err((failure, error))) => {
                    race.starting = false;
                    race.permit = None;
                    let number = self.attempts.number();
                    let attempt = Attempt::Failed(failure, error);
                    if let Some(last) = self.attempt_ended(policy, resend, &mut race, attempt, number) {
                        return last.result();
                    }
                    // The next attempt picks anew.
                    self.in_flight = None;
                }
                Step::Ended(Leg { in_flight, number, began, sent, .. }) => {
                    self.attempt_began(began);
                    self.in_flight = in_flight;
                    self.endpoint = self.in_flight.as_ref().map(|in_flight| in_flight.endpoint().address());
                    let behind = matches!(&sent, Ok(Err(error)) if is_behind(error));
                    if behind && (race.starting || !race.legs.is_empty()) {
                        // The request is longer than what is kept, and another attempt goes on with it.
                        self.in_flight = None;
                        continue;
                    }
                    let mut attempt = self.sent(sent);
                    self.look_once(&mut attempt).await;
                    if let Some(last) = self.attempt_ended(policy, resend, &mut race, attempt, number) {
                        if let Some(fan) = &race.fan {
                            fan.settle(number);
                        }
                        return last.result();
                    }
                    self.in_flight = None;
                }
                Step::Due(Due::Retry) => race.starts(),
                Step::Due(Due::Hedge) if race.starting => self.go_elsewhere(&mut race),
                Step::Due(Due::Hedge) => self.hedge(policy, &mut race),
            }
        }
    }

    /// Waits for an attempt to end, to find its connection, or to be due.
    async fn step<B>(&mut self, policy: &Policy, race: &mut Race<B>) -> Step {
        let Race { legs, starting, line, timer, moves, tried, stopped, .. } = race;
        let delay = self.hedge_delay().filter(|_| !*stopped);
        let avoid = avoid(Some(policy), tried);
        poll_fn(|cx| {
            if let Poll::Ready(Some(leg)) = legs.poll_next_unpin(cx) {
                return Poll::Ready(Step::Ended(leg));
            }
            if *starting && let Poll::Ready(leased) = self.poll_lease(line, &avoid, cx) {
                return Poll::Ready(Step::Leased(leased));
            }
            // It has to wait, and is hedged too.
            if *starting && *moves && timer.is_none() {
                *timer = delay.and_then(|delay| hedge_at(Instant::now(), delay));
            }
            let Some((sleep, due)) = timer else { return Poll::Pending };
            let due = *due;
            std::task::ready!(sleep.as_mut().poll(cx));
            *timer = None;
            Poll::Ready(Step::Due(due))
        })
        .await
    }

    /// The attempt that waits for a connection waits for that of another endpoint, if there is one. Nothing was sent, so this is not another
    /// attempt; the connection goes on being made. Who waits for a stream of a connection that there is keeps its place in the line.
    fn go_elsewhere<B>(&mut self, race: &mut Race<B>) {
        let connecting = |endpoint: &Arc<Endpoint>| endpoint.standing(false) != Standing::Available;
        let waited = race.line.endpoint().filter(connecting);
        let new = waited.filter(|waited| !race.tried.iter().any(|tried| Arc::ptr_eq(tried, waited)));
        race.moves = new.is_some();
        let Some(waited) = new else { return };
        if let Some(explain) = &self.chosen.explain {
            let text = format!(
                "attempt {} has no connection to {} yet, and picks anew",
                self.attempts.number(),
                waited.address()
            );
            explain.add("hedge", text);
        }
        race.tried.extend([waited]);
        race.line.leave();
        self.connecting = false;
    }

    /// Starts one more attempt, if the policy, the budget and the request allow one.
    fn hedge<B>(&mut self, policy: &Policy, race: &mut Race<B>) {
        if race.stopped {
            return;
        }
        let deadline = self.chosen.deadline.map(|deadline| deadline.at);
        let situation = Situation { replayable: race.is_replayable(), now: Instant::now(), deadline, asked: None };
        let routing = &self.chosen.routing;
        let upstream = &routing.upstreams()[self.upstream];
        let budget = || routing.retry_permit(self.upstream, self.priority).map(Some);
        let said = match self.attempts.hedge(policy, situation, budget) {
            Ok(permit) => {
                upstream.metrics.retries.increment(1);
                race.permit = permit;
                race.starts();
                format!("attempt {} starts beside those in flight", self.attempts.number())
            }
            Err(stop) => format!("no further attempt: {stop}"),
        };
        if let Some(explain) = &self.chosen.explain {
            explain.add("hedge", said);
        }
    }

    /// Judges an attempt that ended; gives it back if the caller is to have it.
    fn attempt_ended<B>(
        &mut self,
        policy: &Policy,
        resend: &Resend<B>,
        race: &mut Race<B>,
        attempt: Attempt,
        number: u32,
    ) -> Option<Attempt>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        let outcome = self.judge(&attempt);
        self.count(Some(policy), &outcome);
        let told = |call: &Self, attempt: &Attempt| call.tell_ended(number, attempt, &outcome);
        let mut situation = self.situation(Some(policy), resend, &attempt, &outcome, number);
        situation.replayable &= race.is_replayable();
        let unprocessed = matches!(outcome, Outcome::Failure(Failure::NeverSent | Failure::Refused));
        let pushback = match &outcome {
            Outcome::Response(response) => response.pushback,
            Outcome::Failure(_) => Pushback::None,
        };
        race.stopped |= pushback == Pushback::Stop;
        let retriable = situation.asked.unwrap_or_else(|| policy.retries(&outcome)) || unprocessed;
        let others = race.starting || !race.legs.is_empty();
        // A failure that is not retried says nothing about the attempts beside it, unless it is of our own side.
        let failed = matches!(outcome, Outcome::Failure(failure) if failure != Failure::Local);
        if (retriable || failed) && others {
            if let Some(explain) = &self.chosen.explain {
                let text = format!("{number}: {}; left to the attempts beside it", attempt.ended());
                explain.add("attempt", text);
            }
            // gRFC A6: the next one need not wait any longer, unless the server says for how long.
            let delayed = matches!(self.chosen.forward().hedge, Some(Hedge::After(_)));
            match pushback {
                Pushback::Stop => race.timer = None,
                Pushback::After(delay) => race.timer = Some((Box::pin(tokio::time::sleep(delay)), Due::Hedge)),
                Pushback::None if retriable && delayed && !race.starting => self.hedge(policy, race),
                Pushback::None => {}
            }
            told(self, &attempt);
            return None;
        }
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        let routing = &self.chosen.routing;
        let upstream = &routing.upstreams()[self.upstream];
        let budget = || routing.retry_permit(self.upstream, self.priority).map(Some);
        let decision = match race.stopped {
            // By this answer, or by one before.
            true if retriable => Decision::Return(Stop::Pushback),
            _ => self.attempts.next(Some(policy), &outcome, situation, budget, &mut rng),
        };
        if let Some(explain) = &self.chosen.explain {
            narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
        }
        match decision {
            Decision::Return(stop) => {
                self.stopped(stop);
                self.tell_winner(number);
                return Some(attempt);
            }
            Decision::RetryNow => race.starts(),
            Decision::RetryAfter(delay) => {
                upstream.metrics.retries.increment(1);
                race.timer = Some((Box::pin(tokio::time::sleep(delay)), Due::Retry));
            }
        }
        told(self, &attempt);
        self.in_flight = None;
        None
    }
}

/// Waits for the answer of one attempt, which begins now.
async fn answered(
    answer: impl Future<Output = Result<Response<RecvBody>, TransportError>>,
    limits: Limits,
    mut in_flight: Option<InFlight>,
    unanswered: Option<Unanswered>,
) -> (Sent, Option<InFlight>) {
    let mut answer = pin!(limited(limits.per_try, limits.idle, limits.head, answer));
    let in_time = match limits.soft {
        None => Ok(answer.as_mut().await),
        Some(limit) => tokio::time::timeout_at(limit, answer.as_mut()).await,
    };
    let sent = match in_time {
        Ok(sent) => sent,
        Err(_) => {
            if let Some(in_flight) = &mut in_flight {
                in_flight.record(Verdict::LocalOrigin);
            }
            if let Some(unanswered) = &unanswered {
                unanswered.timed_out();
            }
            answer.await
        }
    };
    if let Some(unanswered) = unanswered {
        unanswered.answered();
    }
    (sent, in_flight)
}

impl Unanswered {
    /// `None` where latencies do not matter.
    fn of(live: &Arc<LiveCluster>, in_flight: Option<&InFlight>, began: Instant) -> Option<Self> {
        let endpoint = in_flight.filter(|_| live.wants(Want::Latency))?.endpoint().clone();
        Some(Self { live: live.clone(), endpoint: Some(endpoint), began })
    }

    /// It counts as a failure from now on.
    fn timed_out(&self) {
        if let Some(endpoint) = &self.endpoint {
            self.live.learn(endpoint, Answered { took: self.began.elapsed(), failed: true, hint: None });
        }
    }

    fn answered(mut self) {
        self.endpoint = None;
    }
}

impl Drop for Unanswered {
    fn drop(&mut self) {
        if let Some(endpoint) = self.endpoint.take() {
            self.live.gave_up(&endpoint, self.began.elapsed());
        }
    }
}
