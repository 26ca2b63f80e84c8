//! The common road, without a detour: the first attempt goes to an endpoint that is connected, and its response is passed on.
//!
//! Written out as a state machine: an `async fn` would hold every stage of the request side by side, three times the size, and
//! could not hand its memory on to the response body.

use super::{
    Answer, Call, Held,
    attempts::{Attempt, Resend},
    finish::Finished,
    general,
    head::{self, SavedHead, SavedHeaders},
};
use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        retry::{Kept, Outcome, Outgoing, Policy},
        timeout::write_grpc_timeout,
    },
    telemetry::access_log::ResponseFlags as Flag,
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
#[allow(clippy::large_enum_variant, reason = "boxing it would cost an allocation per call")]
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
    request: SyncWrapper<Requested<B>>,
}

/// The request, before and while it is on its way. Everything has a place of its own and is moved as little as can be: copies of a
/// state machine with its stages in one place cost more than all the decisions of a call.
struct Requested<B> {
    /// Without headers and extensions once the request was sent.
    head: Parts,
    /// The headers, once they were sent.
    headers: SavedHeaders,
    body: Content<B>,
    /// `None` until the request is sent, and after the attempt ended otherwise than with a response.
    sending: Option<Sending<Outgoing<B>>>,
    limit: Option<Limit>,
    /// How the attempt ended, if what follows is for the general road. Boxed: rare, and every call holds room for it.
    ended: Option<Box<(Attempt, Outcome)>>,
}

enum Content<B> {
    /// Nothing was read of it.
    Unread(B),
    /// Read, and sent.
    Kept(Kept<B>),
    Gone,
}

/// What ends the wait for a response.
struct Limit {
    sleep: Pin<Box<Sleep>>,
    /// The attempt's own limit, if that is the nearer one.
    per_try: Option<Duration>,
}

impl<B> First<B> {
    pub(super) fn new(call: Call, head: Parts, body: B) -> Self {
        let request = Requested {
            head,
            headers: SavedHeaders::new(),
            body: Content::Unread(body),
            sending: None,
            limit: None,
            ended: None,
        };
        Self { call, request: SyncWrapper::new(request) }
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
        let Requested { head, headers, body, sending, .. } = self.request.get_mut();
        let Content::Unread(unread) = std::mem::replace(body, Content::Gone) else {
            unreachable!("sent once, and not polled again once it is ready")
        };
        let chosen = &self.call.chosen;
        let (kept, outgoing) = match Kept::new(unread, chosen.routing.facts.settings.max_replay_bytes, cx) {
            Ok(begun) => begun,
            Err(error) => {
                let error = self.call.error(Kind::RequestBody, "the request was not sent whole".into(), Some(error));
                self.call.flag = Flag::LOCAL_RESET;
                self.call.finish(Finished::Cut);
                return Err(error);
            }
        };
        *body = Content::Kept(kept);
        head::save(&head.headers, headers);
        let per_try = chosen.forward().retry.as_deref().and_then(Policy::per_try_timeout);
        if chosen.grpc && (chosen.deadline.is_some() || per_try.is_some()) {
            write_grpc_timeout(&mut head.headers, chosen.deadline.as_ref(), per_try, Instant::now());
        }
        self.call.tell_attempt(&lease, &mut head.headers);
        *sending = Some(lease.open(head::take(head), outgoing, cx));
        Ok(true)
    }

    fn answered(&mut self, mut response: Response<RecvBody>) -> Next {
        let outcome = self.call.judge_response(&response);
        let policy = self.call.chosen.forward().retry.as_deref();
        if policy.is_some_and(|policy| policy.retries(&outcome)) {
            return self.go_on_with(Attempt::Response(response), outcome);
        }
        // The response may last: what was kept for a retry need not.
        let request = self.request.get_mut();
        request.body = Content::Gone;
        request.headers.clear();
        request.limit = None;
        self.call.answered(&mut response);
        Next::Response(response)
    }

    fn failed(&mut self, attempt: Attempt) -> Next {
        let outcome = self.call.judge(&attempt);
        self.go_on_with(attempt, outcome)
    }

    fn go_on_with(&mut self, attempt: Attempt, outcome: Outcome) -> Next {
        let request = self.request.get_mut();
        request.sending = None;
        request.ended = Some(Box::new((attempt, outcome)));
        Next::GoOn
    }
}

impl<B> Direct for First<B>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Next> {
        if self.request.get_mut().sending.is_none() {
            match self.send(cx) {
                Ok(true) => {}
                Ok(false) => return Poll::Ready(Next::GoOn),
                Err(error) => return Poll::Ready(Next::Failed(error)),
            }
        }
        let Requested { sending: Some(sending), limit, .. } = self.request.get_mut() else {
            unreachable!("it was sent above")
        };
        match Pin::new(sending).poll(cx) {
            Poll::Ready(Ok(mut response)) => {
                self.call.look_for_trailers(&mut response, cx);
                return Poll::Ready(self.answered(response));
            }
            Poll::Ready(Err(error)) => {
                let attempt = self.call.broken(error);
                return Poll::Ready(self.failed(attempt));
            }
            Poll::Pending => {}
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
                self.failed(attempt)
            }
        })
    }

    fn go_on(self: Box<Self>) -> Answer {
        let Self { call, request } = *self;
        let Requested { head, headers, body, ended, .. } = request.into_inner();
        match body {
            Content::Unread(body) => Box::pin(general::begin(call, head, body)),
            Content::Kept(body) => {
                let resend = Resend::new(SavedHead::new(head, headers), body);
                Box::pin(general::resume(call, resend, ended.map(|ended| *ended), None))
            }
            Content::Gone => unreachable!("called after `Next::GoOn` only"),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The system's allocator serves what is below a kilobyte, its own header included, from its quick lists.
    #[test]
    fn a_call_stays_below_a_kilobyte() {
        let size = size_of::<First<http_body_util::Full<Bytes>>>();
        assert!(size <= 1000, "{size} bytes, of which {} the call", size_of::<Call>());
    }
}
