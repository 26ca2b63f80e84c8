//! The common road, without a detour: the first attempt goes to an endpoint that is connected, and its response is passed on.
//!
//! Written out as a state machine: an `async fn` would hold every stage of the request side by side, three times the size, and
//! could not hand its memory on to the response body.

use super::{
    Answer, Call, Held,
    attempts::{Attempt, Resend},
    finish::Finished,
    general,
};
use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        retry::{Outcome, Outgoing, Policy},
        timeout::write_grpc_timeout,
    },
    transport::{RecvBody, Sending},
};
use bytes::Bytes;
use http::{Response, request::Parts};
use http_body::Body;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use sync_wrapper::SyncWrapper;
use tokio::time::{Instant, Sleep};

/// The first attempt of a call, whatever the type of its body.
pub(crate) trait Direct: Held {
    /// Not to be called again once it is ready.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next>;

    /// The rest of the call, after [`Next::GoOn`].
    fn go_on(self: Box<Self>) -> Answer;
}

/// What follows.
pub(crate) enum Next {
    /// The caller gets this response, and the call goes on in its body.
    Response(Response<RecvBody>),
    /// The caller gets this error.
    Failed(Error),
    /// There is no connection, or the attempt ended in what may be retried.
    GoOn,
}

pub(super) struct First<B> {
    call: Call,
    /// Only ever reached through `&mut`: a response can be shared whatever its request was.
    stage: SyncWrapper<Stage<B>>,
}

#[allow(
    clippy::large_enum_variant,
    reason = "the large one is what a call is: boxing it would cost an allocation per call"
)]
enum Stage<B> {
    /// Nothing was done.
    Start {
        head: Parts,
        body: B,
    },
    /// The request is on its way.
    Sent {
        resend: Resend<B>,
        sending: Sending<Outgoing<B>>,
        limit: Option<Limit>,
    },
    /// The attempt ended; what follows is for the general road. Boxed: rare, and every call holds room for it.
    Ended {
        resend: Resend<B>,
        ended: Box<(Attempt, Outcome)>,
    },
    Done,
}

/// What ends the wait for a response.
struct Limit {
    sleep: Pin<Box<Sleep>>,
    /// The attempt's own limit, if that is the nearer one.
    per_try: Option<Duration>,
}

impl<B> First<B> {
    pub(super) fn new(call: Call, head: Parts, body: B) -> Self {
        Self { call, stage: SyncWrapper::new(Stage::Start { head, body }) }
    }
}

impl<B> First<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    /// Sends the request. False: the endpoint picked is not connected, or there is none.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<bool, Error> {
        let Some(lease) = self.call.lease_at_once() else { return Ok(false) };
        let stage = self.stage.get_mut();
        let Stage::Start { head, body } = std::mem::replace(stage, Stage::Done) else {
            unreachable!("called in this stage only")
        };
        let chosen = &self.call.chosen;
        let (resend, mut request) = match Resend::begin(head, body, chosen.routing.facts.settings.max_replay_bytes, cx)
        {
            Ok(begun) => begun,
            Err(error) => {
                let error = self.call.error(Kind::RequestBody, "the request was not sent whole".into(), Some(error));
                self.call.finish(Finished::Cut);
                return Err(error);
            }
        };
        let per_try = chosen.forward().retry.as_deref().and_then(Policy::per_try_timeout);
        if chosen.grpc && (chosen.deadline.is_some() || per_try.is_some()) {
            write_grpc_timeout(request.headers_mut(), chosen.deadline.as_ref(), per_try, Instant::now());
        }
        *stage = Stage::Sent { resend, sending: lease.send(request), limit: None };
        Ok(true)
    }

    fn ended(&mut self, attempt: Attempt) -> Next {
        let outcome = self.call.judge(&attempt);
        let stage = self.stage.get_mut();
        let Stage::Sent { resend, .. } = std::mem::replace(stage, Stage::Done) else {
            unreachable!("called in this stage only")
        };
        let policy = self.call.chosen.forward().retry.as_deref();
        match attempt {
            Attempt::Response(mut response) if policy.is_none_or(|policy| !policy.retries(&outcome)) => {
                self.call.answered(&mut response);
                Next::Response(response)
            }
            attempt => {
                *stage = Stage::Ended { resend, ended: Box::new((attempt, outcome)) };
                Next::GoOn
            }
        }
    }
}

impl<B> Direct for First<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if matches!(self.stage.get_mut(), Stage::Start { .. }) {
            match self.send(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(Next::GoOn),
                Err(error) => return Poll::Ready(Next::Failed(error)),
            }
        }
        let Stage::Sent { sending, limit, .. } = self.stage.get_mut() else {
            unreachable!("not polled again once it is ready")
        };
        if let Poll::Ready(sent) = Pin::new(sending).poll(cx) {
            let attempt = self.call.sent(sent);
            return Poll::Ready(self.ended(attempt));
        }
        if limit.is_none() {
            *limit = Limit::of(&self.call);
        }
        let Some(limit) = limit else { return Poll::Pending };
        if limit.sleep.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        Poll::Ready(match (limit.per_try, &self.call.chosen.deadline) {
            (None, Some(deadline)) => {
                let error = self.call.timed_out(deadline);
                self.call.finish(Finished::TimedOut);
                Next::Failed(error)
            }
            (per_try, _) => {
                let attempt = self.call.elapsed(per_try.unwrap_or_default());
                self.ended(attempt)
            }
        })
    }

    fn go_on(self: Box<Self>) -> Answer {
        let Self { call, stage } = *self;
        match stage.into_inner() {
            Stage::Start { head, body } => Box::pin(general::begin(call, head, body)),
            Stage::Ended { resend, ended } => Box::pin(general::resume(call, resend, Some(*ended), None)),
            Stage::Sent { .. } | Stage::Done => unreachable!("called after `Next::GoOn` only"),
        }
    }
}

impl Limit {
    /// The nearer of the call's deadline and the attempt's limit, from now.
    fn of(call: &Call) -> Option<Self> {
        let per_try = call.chosen.forward().retry.as_deref().and_then(Policy::per_try_timeout);
        let own = per_try.and_then(|limit| Some((Instant::now().checked_add(limit)?, per_try)));
        let whole = call.chosen.deadline.as_ref().map(|deadline| (deadline.at, None));
        let (at, per_try) = own.into_iter().chain(whole).min_by_key(|(at, _)| *at)?;
        Some(Self { sleep: Box::pin(tokio::time::sleep_until(at)), per_try })
    }
}

impl<B: Send> Held for First<B> {
    fn call(&self) -> &Call {
        &self.call
    }

    fn call_mut(&mut self) -> &mut Call {
        &mut self.call
    }
}
