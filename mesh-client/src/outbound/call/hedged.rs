//! Several attempts of one call at the same time: the first good response wins, the others are cut off.
//!
//! Envoy's `hedge_on_per_try_timeout` and gRFC A6's hedging. Only a request that is complete when it begins is hedged (a unary call is):
//! one body cannot be read by two attempts at different speeds without keeping all of it.

use super::{
    Call,
    attempts::{Attempt, Resend, Tried, avoid},
};
use crate::{
    Error,
    error::BoxError,
    outbound::{
        cluster::InFlight,
        connect::Subchannel,
        narrate,
        retry::{Decision, Failure, Outcome, Outgoing, Permit, Policy, Pushback, Situation},
    },
    transport::{RecvBody, TransportError},
};
use bytes::Bytes;
use futures::{StreamExt, future::BoxFuture, stream::FuturesUnordered};
use http::{Request, Response};
use http_body::Body;
use mesh_xds::resource::Hedge;
use std::{
    future::poll_fn,
    pin::{Pin, pin},
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
    sent: Result<Response<RecvBody>, TransportError>,
}

/// What happens next.
#[allow(clippy::large_enum_variant, reason = "made and taken apart on the spot")]
enum Step {
    Ended(Leg),
    Leased(Result<crate::transport::Lease, (Failure, Error)>),
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
struct Race {
    legs: FuturesUnordered<BoxFuture<'static, Leg>>,
    /// An attempt is on its way to a connection.
    starting: bool,
    timer: Option<(Pin<Box<Sleep>>, Due)>,
    permit: Option<Permit>,
    tried: Tried,
    /// The server said so: no more attempts.
    stopped: bool,
}

impl Call {
    /// Whether the call may have several attempts at the same time.
    pub(super) fn hedges<B>(&self, resend: &Resend<B>) -> bool
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        self.hedge_delay().is_some() && resend.is_whole()
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
        first: Request<Outgoing<B>>,
    ) -> Result<Response<RecvBody>, Error>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let delay = self.hedge_delay().unwrap_or(Duration::MAX);
        let mut request = Some(first);
        let mut race = Race {
            legs: FuturesUnordered::new(),
            starting: true,
            timer: None,
            permit: None,
            tried: Tried::new(),
            stopped: false,
        };
        self.begins();
        loop {
            match self.step(policy, &mut race).await {
                Step::Leased(Ok(lease)) => {
                    race.starting = false;
                    self.say_picked(&lease);
                    let mut request = request.take().unwrap_or_else(|| resend.again());
                    self.dress(&mut request, None, false);
                    self.tell_attempt(&lease, request.headers_mut());
                    let in_flight = self.in_flight.take();
                    race.tried.extend(in_flight.as_ref().map(|in_flight| in_flight.endpoint().clone()));
                    let (number, permit, sending) = (self.attempts.number(), race.permit.take(), lease.send(request));
                    let began = Instant::now();
                    race.legs.push(Box::pin(async move {
                        let sent = sending.await;
                        Leg { in_flight, number, began, _permit: permit, sent }
                    }));
                    race.timer = (!race.stopped).then(|| (Box::pin(tokio::time::sleep(delay)), Due::Hedge));
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
                    // The endpoint that the next attempt waits for, meanwhile.
                    let waiting = std::mem::replace(&mut self.in_flight, in_flight);
                    self.endpoint = self.in_flight.as_ref().map(|in_flight| in_flight.endpoint().address());
                    let mut attempt = match sent {
                        Ok(response) => Attempt::Response(response),
                        Err(error) => self.broken(error),
                    };
                    self.look_once(&mut attempt).await;
                    if let Some(last) = self.attempt_ended(policy, resend, &mut race, attempt, number) {
                        return last.result();
                    }
                    self.in_flight = waiting;
                }
                Step::Due(Due::Retry) => race.starting = true,
                Step::Due(Due::Hedge) => self.hedge(policy, resend, &mut race),
            }
        }
    }

    /// Waits for an attempt to end, to find its connection, or to be due.
    async fn step(&mut self, policy: &Policy, race: &mut Race) -> Step {
        let Race { legs, starting, timer, tried, .. } = race;
        let avoid = avoid(Some(policy), tried);
        let mut lease = pin!(starting.then(|| self.lease(&avoid)));
        poll_fn(|cx| {
            if let Poll::Ready(Some(leg)) = legs.poll_next_unpin(cx) {
                return Poll::Ready(Step::Ended(leg));
            }
            if let Some(lease) = lease.as_mut().as_pin_mut() {
                return lease.poll(cx).map(Step::Leased);
            }
            let Some((sleep, due)) = timer else { return Poll::Pending };
            let due = *due;
            std::task::ready!(sleep.as_mut().poll(cx));
            *timer = None;
            Poll::Ready(Step::Due(due))
        })
        .await
    }

    /// Starts one more attempt, if the policy, the budget and the request allow one.
    fn hedge<B>(&mut self, policy: &Policy, resend: &Resend<B>, race: &mut Race)
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        if race.stopped {
            return;
        }
        let deadline = self.chosen.deadline.map(|deadline| deadline.at);
        let situation = Situation { replayable: resend.is_whole(), now: Instant::now(), deadline, asked: None };
        let routing = &self.chosen.routing;
        let upstream = &routing.upstreams()[self.upstream];
        let budget = || routing.retry_permit(self.upstream, self.priority).map(Some);
        let said = match self.attempts.hedge(policy, situation, budget) {
            Ok(permit) => {
                upstream.metrics.retries.increment(1);
                race.permit = permit;
                race.starting = true;
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
        race: &mut Race,
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
        let situation = self.situation(Some(policy), resend, &attempt, &outcome, number);
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
                Pushback::None if retriable && delayed && !race.starting => self.hedge(policy, resend, race),
                Pushback::None => {}
            }
            told(self, &attempt);
            return None;
        }
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        let routing = &self.chosen.routing;
        let upstream = &routing.upstreams()[self.upstream];
        let budget = || {
            let leave = !race.stopped;
            leave.then(|| routing.retry_permit(self.upstream, self.priority)).flatten().map(Some)
        };
        let decision = self.attempts.next(Some(policy), &outcome, situation, budget, &mut rng);
        if let Some(explain) = &self.chosen.explain {
            narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
        }
        match decision {
            Decision::Return(stop) => {
                self.stopped(stop);
                self.tell_winner(number);
                return Some(attempt);
            }
            Decision::RetryNow => race.starting = true,
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
