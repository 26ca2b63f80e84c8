//! Hedging as a tower layer, for any client: no mesh needed.

use super::{
    Attempts, Failure, Fan, Kept, Outcome, Outgoing, Permit, Policy, Pushback, RetryBudget, Shared, Situation,
    is_behind,
};
use crate::{
    outbound::{route::RequestHead, timeout::is_grpc},
    transport::BoxError,
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::{Body, Frame, SizeHint};
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep};
use tower_layer::Layer;
use tower_service::Service;

/// Sends a request once more when it has no answer after a while, and takes the first good one (gRFC A6).
///
/// An answer is good unless the [`Policy`] would retry it; such a one lets the next attempt start at once, or after the server's
/// `grpc-retry-pushback-ms`. There are at most the policy's `max_retries` attempts beside the first, each paid for from the budget. The
/// attempts that lose are dropped; one that gets no answer at all is left to those beside it, if there are any. Only requests that the
/// policy is for are sent more than once, and only while all of their body so far is kept: all attempts read one that goes on, each at
/// its own speed, and beyond the cap the one that is ahead goes on alone.
///
/// ```
/// use mesh_client::retry::{HedgeBody, HedgeLayer, Policy, RetryBudget};
/// use std::time::Duration;
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// let policy = Policy::http().max_retries(1).build();
/// let layer = HedgeLayer::new(policy, Duration::from_millis(50)).budget(RetryBudget::ratio(0.1, 1, Duration::from_secs(10)));
/// # let client = tower::service_fn(|_: http::Request<HedgeBody<http_body_util::Full<bytes::Bytes>>>| async {
/// #     Ok::<_, Infallible>(http::Response::new(()))
/// # });
/// let client = ServiceBuilder::new().layer(layer).service(client);
/// # fn is_service<S: tower::Service<http::Request<http_body_util::Full<bytes::Bytes>>>>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct HedgeLayer {
    shared: Arc<Shared>,
    delay: Duration,
}

/// A client whose calls are hedged. Made by [`HedgeLayer`].
#[derive(Clone, Debug)]
pub struct Hedge<S> {
    inner: S,
    shared: Arc<Shared>,
    delay: Duration,
}

/// The body of one attempt. Shares the bytes of the caller's.
pub struct HedgeBody<B>(Outgoing<B>);

/// One call, and all its attempts.
///
/// # Cancel safety
///
/// Dropping it drops all attempts, and gives back their shares of the budget.
pub struct HedgeFuture<S, B>
where
    S: Service<Request<HedgeBody<B>>>,
{
    /// Before it is first polled.
    begin: Option<(S, Request<B>)>,
    /// From then on, if there may be further attempts.
    again: Option<Again<S, B>>,
    legs: Vec<Leg<S, S::Future>>,
    /// Of the last attempt that ended: what the caller gets if no other one comes.
    last: Option<Result<S::Response, BoxError>>,
    /// When the next attempt starts.
    next: Option<Pin<Box<Sleep>>>,
    attempts: Attempts,
    /// The server asked for no more attempts.
    stopped: bool,
    grpc: bool,
    delay: Duration,
    shared: Arc<Shared>,
}

/// What further attempts are made of.
struct Again<S, B> {
    service: S,
    parts: Parts,
    kept: Kept<B>,
    /// Of a body that goes on.
    fan: Option<Fan<B>>,
}

/// One attempt.
struct Leg<S, F> {
    /// Waits until it is ready; the first one is.
    waiting: Option<S>,
    response: Option<Pin<Box<F>>>,
    number: u32,
    _permit: Option<Permit>,
}

impl HedgeLayer {
    /// An attempt each time there is no answer for `delay`, as long as `policy` allows retries. Without a budget.
    pub fn new(policy: Policy, delay: Duration) -> Self {
        Self { shared: Shared::new(policy), delay }
    }

    /// Limits the further attempts of all calls through this layer.
    #[must_use]
    pub fn budget(self, budget: RetryBudget) -> Self {
        Self { shared: self.shared.changed(|shared| shared.budget = Some(Arc::new(budget))), ..self }
    }

    /// Keeps up to `bytes` of a request's body; default [`DEFAULT_REPLAY_CAP`](super::DEFAULT_REPLAY_CAP).
    #[must_use]
    pub fn replay_cap(self, bytes: usize) -> Self {
        Self { shared: self.shared.changed(|shared| shared.replay_cap = bytes), ..self }
    }
}

impl<S> Layer<S> for HedgeLayer {
    type Service = Hedge<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Hedge { inner, shared: self.shared.clone(), delay: self.delay }
    }
}

impl<S, B, R> Service<Request<B>> for Hedge<S>
where
    S: Service<Request<HedgeBody<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = HedgeFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let clone = self.inner.clone();
        let service = std::mem::replace(&mut self.inner, clone);
        let shared = self.shared.clone();
        shared.begin();
        HedgeFuture {
            grpc: is_grpc(request.headers()),
            begin: Some((service, request)),
            again: None,
            legs: Vec::new(),
            last: None,
            next: None,
            attempts: Attempts::default(),
            stopped: false,
            delay: self.delay,
            shared,
        }
    }
}

/// Nothing in it is pinned in place: futures are boxed.
impl<S, B> Unpin for HedgeFuture<S, B> where S: Service<Request<HedgeBody<B>>> {}

impl<S, B, R> HedgeFuture<S, B>
where
    S: Service<Request<HedgeBody<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// Sends the first attempt.
    fn begin(&mut self, mut service: S, request: Request<B>, cx: &mut Context<'_>) -> Result<(), BoxError> {
        let (parts, body) = request.into_parts();
        let (kept, mut first) = Kept::new(body, self.shared.replay_cap, cx)?;
        let applies = self.shared.policy.applies(&RequestHead::new(&parts.method, &parts.uri, &parts.headers));
        if applies && kept.is_replayable() {
            let (service, parts, fan) = (service.clone(), parts.clone(), first.fan());
            self.again = Some(Again { service, parts, kept, fan });
        }
        let response = service.call(Request::from_parts(parts, HedgeBody(first)));
        self.legs.push(Leg { waiting: None, response: Some(Box::pin(response)), number: 1, _permit: None });
        self.wait(self.delay);
        Ok(())
    }

    fn wait(&mut self, delay: Duration) {
        let more = self.again.is_some() && !self.stopped;
        self.next = more.then(|| Box::pin(tokio::time::sleep(delay)));
    }

    /// Starts one more attempt, if policy and budget allow one.
    fn hedge(&mut self) {
        self.next = None;
        let Some(Again { service, fan, .. }) = self.again.as_ref().filter(|_| !self.stopped) else { return };
        let replayable = fan.as_ref().is_none_or(Fan::is_kept);
        let situation = Situation { replayable, now: Instant::now(), deadline: None, asked: None };
        if let Ok(permit) = self.attempts.hedge(&self.shared.policy, situation, || self.shared.permit()) {
            let (waiting, number) = (Some(service.clone()), self.attempts.number());
            self.legs.push(Leg { waiting, response: None, number, _permit: permit });
            self.wait(self.delay);
        }
    }

    /// The first attempt that has something to say, and what.
    fn poll_legs(&mut self, cx: &mut Context<'_>) -> Option<(u32, Result<Response<R>, BoxError>)> {
        let mut ended = None;
        for (place, leg) in self.legs.iter_mut().enumerate() {
            if let Some(service) = &mut leg.waiting {
                match service.poll_ready(cx) {
                    Poll::Pending => continue,
                    Poll::Ready(Err(error)) => {
                        ended = Some((place, Err(error.into())));
                        break;
                    }
                    Poll::Ready(Ok(())) => {}
                }
                let Some(Again { parts, kept, fan, .. }) = &self.again else { continue };
                let body = fan.as_ref().map_or_else(|| kept.again(), |fan| Outgoing::Fan(fan.body(leg.number)));
                let mut parts = parts.clone();
                self.attempts.write_header(&mut parts.headers, self.shared.policy.profile());
                leg.response = Some(Box::pin(service.call(Request::from_parts(parts, HedgeBody(body)))));
                leg.waiting = None;
            }
            if let Some(response) = &mut leg.response
                && let Poll::Ready(result) = response.as_mut().poll(cx)
            {
                ended = Some((place, result.map_err(Into::into)));
                break;
            }
        }
        ended.map(|(place, result)| (self.legs.remove(place).number, result))
    }

    /// An attempt ended: whether the caller gets its result, or others are awaited.
    fn ended(&mut self, number: u32, result: &Result<Response<R>, BoxError>) -> bool {
        if !self.legs.is_empty() && result.as_ref().is_err_and(|error| is_behind(&**error)) {
            return false;
        }
        let policy = &self.shared.policy;
        let (outcome, asked) = self.shared.judge(result, self.grpc, number);
        if !asked.unwrap_or_else(|| policy.retries(&outcome)) {
            // A failure that is not retried says nothing about the attempts beside it, unless it is of our own side.
            let failed = matches!(outcome, Outcome::Failure(failure) if failure != Failure::Local);
            return !failed || self.legs.is_empty();
        }
        let pushback = match &outcome {
            Outcome::Response(response) => response.pushback,
            Outcome::Failure(_) => Pushback::None,
        };
        match pushback {
            Pushback::None => self.hedge(),
            // Nobody waits for an attempt that cannot come.
            Pushback::After(_) if self.attempts.number() > policy.max_retries() => self.next = None,
            Pushback::After(delay) => self.wait(delay),
            Pushback::Stop => {
                self.next = None;
                self.stopped = true;
            }
        }
        self.legs.is_empty() && self.next.is_none()
    }
}

impl<S, B, R> Future for HedgeFuture<S, B>
where
    S: Service<Request<HedgeBody<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<R>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.get_mut();
        if let Some((service, request)) = this.begin.take()
            && let Err(error) = this.begin(service, request, cx)
        {
            return Poll::Ready(Err(error));
        }
        loop {
            if let Some((number, result)) = this.poll_legs(cx) {
                if this.ended(number, &result) {
                    if let Some(Again { fan: Some(fan), .. }) = &this.again {
                        fan.settle(number);
                    }
                    return Poll::Ready(result);
                }
                this.last = Some(result);
                continue;
            }
            let Some(next) = &mut this.next else {
                // The next attempt was waited for, and then refused.
                let last = this.last.take_if(|_| this.legs.is_empty());
                return last.map_or(Poll::Pending, Poll::Ready);
            };
            std::task::ready!(next.as_mut().poll(cx));
            this.hedge();
        }
    }
}

impl<S, B> Drop for HedgeFuture<S, B>
where
    S: Service<Request<HedgeBody<B>>>,
{
    fn drop(&mut self) {
        self.shared.end();
    }
}

impl<B> Body for HedgeBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.0).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

impl<B> fmt::Debug for HedgeBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeBody").finish_non_exhaustive()
    }
}

impl<S, B> fmt::Debug for HedgeFuture<S, B>
where
    S: Service<Request<HedgeBody<B>>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HedgeFuture").field("attempts", &self.attempts).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
