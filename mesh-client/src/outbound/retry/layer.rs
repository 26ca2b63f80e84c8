//! Retries as a tower layer, for any client: no mesh needed.

use super::{Attempts, Decision, PerTryElapsed, Policy, Replay, ReplayBody, RetryBudget, Shared, Situation};
use crate::{
    outbound::{
        route::RequestHead,
        timeout::{Deadline, Rules, is_grpc, write_grpc_timeout},
    },
    transport::BoxError,
};
use bytes::Bytes;
use http::{Request, Response, request::Parts};
use http_body::Body;
use pin_project::{pin_project, pinned_drop};
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep};
use tower_layer::Layer;
use tower_service::Service;

/// Retries the calls of any HTTP or gRPC client by a [`Policy`].
///
/// The inner service gets a [`ReplayBody`], which shares the bytes of the caller's body. A body longer than the cap is sent
/// once and not retried. A request that the server refused unprocessed (REFUSED_STREAM, GOAWAY) is tried once more whatever
/// the policy says. All services made by one layer, or by its clones, share its budget.
///
/// ```
/// use mesh_client::retry::{RetryBudget, Condition, Policy, RetryLayer};
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// let policy = Policy::http().on(Condition::Http5xx).max_retries(2).build();
/// let layer = RetryLayer::new(policy).budget(RetryBudget::percent(20.0, 3));
/// # let client = tower::service_fn(|_: http::Request<mesh_client::retry::ReplayBody<http_body_util::Full<bytes::Bytes>>>| async {
/// #     Ok::<_, Infallible>(http::Response::new(()))
/// # });
/// let client = ServiceBuilder::new().layer(layer).service(client);
/// # fn is_service<S: tower::Service<http::Request<http_body_util::Full<bytes::Bytes>>>>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct RetryLayer {
    shared: Arc<Shared>,
}

/// A client whose calls are retried. Made by [`RetryLayer`].
#[derive(Clone, Debug)]
pub struct Retry<S> {
    inner: S,
    shared: Arc<Shared>,
}

/// One call: called, waiting for the back-off, waiting for the service to be ready again.
///
/// # Cancel safety
///
/// Dropping it ends the attempt under way, and gives back its share of the budget.
#[pin_project(PinnedDrop)]
pub struct ResponseFuture<S, B>
where
    S: Service<Request<ReplayBody<B>>>,
{
    #[pin]
    state: State<S::Future>,
    /// The service that was polled ready, not a clone of it.
    service: S,
    parts: Parts,
    replay: Replay<B>,
    attempts: Attempts,
    deadline: Option<Deadline>,
    grpc: bool,
    /// The policy holds for this request.
    applies: bool,
    shared: Arc<Shared>,
}

#[pin_project(project = StateProjection)]
enum State<F> {
    Called {
        #[pin]
        response: F,
        /// Ends the attempt.
        limit: Option<Pin<Box<Sleep>>>,
    },
    Waiting(Pin<Box<Sleep>>),
    Retrying,
}

impl RetryLayer {
    /// Retries by `policy`, without a budget.
    pub fn new(policy: Policy) -> Self {
        Self { shared: Shared::new(policy) }
    }

    /// Limits the retries in flight of all calls through this layer.
    #[must_use]
    pub fn budget(self, budget: RetryBudget) -> Self {
        Self { shared: self.shared.changed(|shared| shared.budget = Some(Arc::new(budget))) }
    }

    /// Keeps up to `bytes` of a request's body for a retry; default [`DEFAULT_REPLAY_CAP`](super::DEFAULT_REPLAY_CAP).
    #[must_use]
    pub fn replay_cap(self, bytes: usize) -> Self {
        Self { shared: self.shared.changed(|shared| shared.replay_cap = bytes) }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Retry { inner, shared: self.shared.clone() }
    }
}

impl<S, B, R> Service<Request<B>> for Retry<S>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>> + Clone,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Response = Response<R>;
    type Error = BoxError;
    type Future = ResponseFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let clone = self.inner.clone();
        let mut service = std::mem::replace(&mut self.inner, clone);
        let shared = self.shared.clone();
        shared.begin();
        let (parts, body) = request.into_parts();
        let grpc = is_grpc(&parts.headers);
        let deadline = Rules::default().deadline(Instant::now(), &parts.headers).filter(|_| grpc);
        let attempts = Attempts::default();
        let (replay, body) = Replay::new(body, shared.replay_cap);
        let request = attempt(&parts, body, &attempts, &shared.policy, deadline.as_ref(), grpc);
        let state = State::call(&mut service, request, &shared.policy);
        let applies = shared.policy.applies(&RequestHead::new(&parts.method, &parts.uri, &parts.headers));
        ResponseFuture { state, service, parts, replay, attempts, deadline, grpc, applies, shared }
    }
}

/// The request of one attempt.
fn attempt<B>(
    parts: &Parts,
    body: B,
    attempts: &Attempts,
    policy: &Policy,
    deadline: Option<&Deadline>,
    grpc: bool,
) -> Request<B> {
    let mut parts = parts.clone();
    attempts.write_header(&mut parts.headers, policy.profile());
    if grpc {
        write_grpc_timeout(&mut parts.headers, deadline, policy.per_try_timeout(), Instant::now());
    }
    Request::from_parts(parts, body)
}

impl<F> State<F> {
    fn call<S, B>(service: &mut S, request: Request<B>, policy: &Policy) -> Self
    where
        S: Service<Request<B>, Future = F>,
    {
        let limit = policy.per_try_timeout().map(|limit| Box::pin(tokio::time::sleep(limit)));
        Self::Called { response: service.call(request), limit }
    }
}

impl<S, B, R> Future for ResponseFuture<S, B>
where
    S: Service<Request<ReplayBody<B>>, Response = Response<R>>,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<R>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let policy = &*this.shared.policy;
        loop {
            let next = match this.state.as_mut().project() {
                StateProjection::Called { response, limit } => {
                    let result = match response.poll(cx) {
                        Poll::Ready(result) => result.map_err(Into::into),
                        Poll::Pending => {
                            let Some(limit) = limit else { return Poll::Pending };
                            ready!(limit.as_mut().poll(cx));
                            Err(PerTryElapsed::new(
                                policy.per_try_timeout().unwrap_or_default(),
                                this.attempts.number(),
                            )
                            .into())
                        }
                    };
                    let (outcome, asked) = this.shared.judge(&result, *this.grpc, this.attempts.number());
                    let situation = Situation {
                        replayable: this.replay.is_replayable(),
                        now: Instant::now(),
                        deadline: this.deadline.map(|deadline| deadline.at),
                        asked,
                    };
                    let mut rng = |bound| fastrand::u32(..bound);
                    let policy = if *this.applies { Some(policy) } else { None };
                    match this.attempts.next(policy, &outcome, situation, || this.shared.permit(), &mut rng) {
                        Decision::Return(_) => return Poll::Ready(result),
                        Decision::RetryNow => State::Retrying,
                        Decision::RetryAfter(delay) => State::Waiting(Box::pin(tokio::time::sleep(delay))),
                    }
                }
                StateProjection::Waiting(delay) => {
                    ready!(delay.as_mut().poll(cx));
                    State::Retrying
                }
                StateProjection::Retrying => {
                    ready!(this.service.poll_ready(cx)).map_err(Into::into)?;
                    let body = this.replay.again();
                    let request = attempt(this.parts, body, this.attempts, policy, this.deadline.as_ref(), *this.grpc);
                    State::call(this.service, request, policy)
                }
            };
            this.state.set(next);
        }
    }
}

#[pinned_drop]
impl<S, B> PinnedDrop for ResponseFuture<S, B>
where
    S: Service<Request<ReplayBody<B>>>,
{
    fn drop(self: Pin<&mut Self>) {
        self.shared.end();
    }
}

impl<S, B> fmt::Debug for ResponseFuture<S, B>
where
    S: Service<Request<ReplayBody<B>>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").field("attempts", &self.attempts).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
