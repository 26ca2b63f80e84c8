//! The policy of a connection in front of a service: the same whatever transport is below.

use super::{
    ConnectionInfo, Deciding, Decision, Exchange, Verdict,
    farewell::Busy,
    refusals::Refusals,
    whole::{self, Reading},
};
use crate::{
    BoxError,
    outbound::{
        filter::{Buffered, Filtered, Reply},
        timeout::is_grpc,
    },
    telemetry::{access_log::ResponseFlags as Flag, trace::ScopeFuture},
    transport::is_told_overdue,
};
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Method, Request, Response, StatusCode, header::CONNECTION, request};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep, sleep_until};
use tower_layer::Layer;
use tower_service::Service;

/// The policy of an [`Inbound`](super::Inbound) as a layer: [`Inbound::layer`](super::Inbound::layer).
///
/// A request is asked by the policy of the connection that it came over, which is in its extensions ([`ConnectionInfo`]). One that has
/// none did not come through the mesh, and is answered with 500 (gRPC: INTERNAL).
#[derive(Clone, Debug, Default)]
pub struct InboundLayer(Whose);

impl InboundLayer {
    pub(super) fn of_connection(connection: ConnectionInfo) -> Self {
        Self(Whose::Connection(connection))
    }
}

/// Whose requests come.
#[derive(Clone, Debug)]
enum Whose {
    Connection(ConnectionInfo),
    /// They say it themselves; some may not.
    Any(Arc<Refusals>),
}

impl Default for Whose {
    fn default() -> Self {
        Self::Any(Arc::default())
    }
}

/// A service behind the policy.
#[derive(Clone, Debug)]
pub struct Guard<S> {
    inner: S,
    whose: Whose,
    /// Somebody else's server speaks on it.
    foreign: bool,
}

impl<S> Guard<S> {
    /// For the requests of one connection.
    pub(super) fn of_connection(inner: S, connection: ConnectionInfo) -> Self {
        Self { inner, whose: Whose::Connection(connection), foreign: false }
    }
}

/// The future of [`Guard`].
#[pin_project]
pub struct GuardFuture<S, B>
where
    S: Service<Request<B>>,
{
    #[pin]
    stage: Stage<S, B>,
    /// Goes on with the answer's body.
    busy: Option<Busy>,
    timer: Timer,
}

/// Waits for a deadline, once something else is waited for.
#[derive(Default)]
struct Timer(Option<Pin<Box<Sleep>>>);

impl Timer {
    /// Ready when it is over; never without one.
    fn poll(&mut self, deadline: Option<Instant>, cx: &mut Context<'_>) -> Poll<()> {
        let Some(deadline) = deadline else { return Poll::Pending };
        self.0.get_or_insert_with(|| Box::pin(sleep_until(deadline))).as_mut().poll(cx)
    }
}

#[pin_project(project = StageProjection, project_replace = StageReplace)]
enum Stage<S, B>
where
    S: Service<Request<B>>,
{
    /// The policy decides.
    Deciding {
        deciding: Deciding,
        body: Option<B>,
        service: Option<S>,
    },
    /// The request goes on when its body was read.
    Buffering {
        reading: Reading<B>,
        head: Option<request::Parts>,
        exchange: Option<Exchange>,
        service: S,
    },
    /// The service was called.
    Calling {
        #[pin]
        future: ScopeFuture<S::Future>,
        exchange: Option<Exchange>,
    },
    Answered(Option<(Response<Bytes>, Exchange)>),
}

/// The body of a response that went through a policy.
#[pin_project]
pub struct ResponseBody<B: Body> {
    #[pin]
    content: Content<B>,
    exchange: Option<Exchange>,
    busy: Option<Busy>,
    timer: Timer,
}

#[pin_project(project = ContentProjection)]
enum Content<B: Body> {
    Service(#[pin] B),
    /// Of the service too.
    Watched(Pin<Box<Filtered<B>>>),
    Local(Bytes),
}

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");

/// What callers are told then.
const LATE: &str = "the time for the request is over";

/// The connection that a request says it came on: as our transport and tonic's hand it on, or as axum does.
fn of_connection(extensions: &http::Extensions) -> Option<ConnectionInfo> {
    let known = extensions.get::<ConnectionInfo>();
    #[cfg(feature = "axum")]
    let known = known.or_else(|| {
        let info = extensions.get::<::axum::extract::ConnectInfo<ConnectionInfo>>()?;
        Some(&info.0)
    });
    known.cloned()
}

/// The answer for a request with this head.
fn respond(reply: Reply, head: &request::Parts) -> Response<Bytes> {
    reply.respond(is_grpc(&head.headers), head.method != Method::HEAD)
}

impl<S> Layer<S> for InboundLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, whose: self.0.clone(), foreign: true }
    }
}

impl<S, B, R> Service<Request<B>> for Guard<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
    B: Send + 'static,
    R: Body<Data = Bytes>,
{
    type Response = Response<ResponseBody<R>>;
    type Error = S::Error;
    type Future = GuardFuture<S, B>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> GuardFuture<S, B> {
        let (mut head, body) = request.into_parts();
        let known = match &self.whose {
            Whose::Connection(connection) => Ok(connection.clone()),
            Whose::Any(refusals) => of_connection(&head.extensions).ok_or(refusals),
        };
        let connection = known.map_err(|refusals| {
            refusals.request("foreign", &"it did not come through the mesh's own connections");
        });
        let Ok(connection) = connection else {
            let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "not a connection of the mesh").grpc_status(13);
            return GuardFuture::answered(reply, &head);
        };
        connection.tell(&mut head);
        // Where others speak on the connection, that it leaves is known here alone.
        let busy = match self.foreign.then(|| connection.begin()) {
            Some(None) => {
                let reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, "the connection is going away");
                return GuardFuture::answered(reply.header(CONNECTION, HeaderValue::from_static("close")), &head);
            }
            busy => busy.flatten(),
        };
        let verdict = match &*connection.chain().policy.load() {
            None => Verdict::Now(Decision::Pass(Exchange::none())),
            Some(policy) => policy.admit(&connection, &mut head),
        };
        let stage = match verdict {
            Verdict::Now(Decision::Pass(exchange)) if exchange.buffer().is_none() => {
                let future = ScopeFuture::of(exchange.trace(), || self.inner.call(Request::from_parts(head, body)));
                Stage::Calling { future, exchange: Some(exchange) }
            }
            Verdict::Now(decision) => Stage::decided(decision, head, body, || {
                let fresh = self.inner.clone();
                std::mem::replace(&mut self.inner, fresh)
            }),
            Verdict::Later(deciding) => {
                // The one that is ready is called; the clone becomes ready for the next.
                let fresh = self.inner.clone();
                let service = std::mem::replace(&mut self.inner, fresh);
                Stage::Deciding { deciding, body: Some(body), service: Some(service) }
            }
        };
        GuardFuture { stage, busy, timer: Timer::default() }
    }
}

impl<S: Service<Request<B>>, B> GuardFuture<S, B> {
    /// Nobody is asked.
    fn answered(reply: Reply, head: &request::Parts) -> Self {
        let stage = Stage::Answered(Some((respond(reply, head), Exchange::none())));
        Self { stage, busy: None, timer: Timer::default() }
    }
}

impl<S, B> Stage<S, B>
where
    S: Service<Request<B>>,
    B: Send + 'static,
{
    /// `service` is ready.
    fn decided(decision: Decision, head: request::Parts, body: B, service: impl FnOnce() -> S) -> Self {
        match decision {
            Decision::Pass(exchange) => match exchange.buffer() {
                None => Self::called(&mut service(), head, body, exchange),
                Some(limit) => match whole::read(body, &head.headers, limit) {
                    Ok(reading) => {
                        let (head, exchange) = (Some(head), Some(exchange));
                        Self::Buffering { reading, head, exchange, service: service() }
                    }
                    Err(_) if Buffered::announced(&head.headers) > limit => Self::too_large(&head, exchange),
                    Err(body) => Self::called(&mut service(), head, body, exchange),
                },
            },
            Decision::Answer(reply, exchange) => Self::Answered(Some((respond(reply, &head), exchange))),
            Decision::Respond(response, exchange) => Self::Answered(Some((response, exchange))),
        }
    }

    fn called(service: &mut S, head: request::Parts, body: B, exchange: Exchange) -> Self {
        let future = ScopeFuture::of(exchange.trace(), || service.call(Request::from_parts(head, body)));
        Self::Calling { future, exchange: Some(exchange) }
    }

    fn too_large(head: &request::Parts, mut exchange: Exchange) -> Self {
        let reply = Buffered::too_large();
        exchange.refused(&reply);
        Self::Answered(Some((respond(reply, head), exchange)))
    }

    /// The client does not send what its request waits for (RFC 9110 section 15.5.9).
    fn overdue(exchange: &mut Option<Exchange>) -> Self {
        let reply = Reply::new(StatusCode::REQUEST_TIMEOUT, "the request does not go on");
        let reply = reply.grpc_status(4).flag(Flag::STREAM_IDLE_TIMEOUT).details("stream_idle_timeout");
        Self::given_up(reply, exchange)
    }

    /// Its time is over.
    fn late(exchange: &mut Option<Exchange>) -> Self {
        let flag = exchange.as_mut().map_or(Flag::NONE, Exchange::is_late);
        Self::given_up(Reply::new(StatusCode::GATEWAY_TIMEOUT, LATE).grpc_status(4).flag(flag), exchange)
    }

    /// The request is answered here after all.
    fn given_up(reply: Reply, exchange: &mut Option<Exchange>) -> Self {
        let mut exchange = exchange.take().unwrap_or_else(Exchange::none);
        exchange.refused(&reply);
        Self::Answered(Some((reply.respond(exchange.is_grpc(), true), exchange)))
    }

    /// A body that broke off is nobody's.
    fn broken(error: &BoxError, head: &request::Parts, mut exchange: Exchange) -> Self {
        tracing::debug!(%error, "a request that did not come whole");
        let reply = Reply::new(StatusCode::BAD_REQUEST, "the request did not come whole").grpc_status(13);
        exchange.refused(&reply);
        Self::Answered(Some((respond(reply, head), exchange)))
    }
}

impl<S, B, R> Future for GuardFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
    B: Send + 'static,
    R: Body<Data = Bytes>,
{
    type Output = Result<Response<ResponseBody<R>>, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let mut stage = this.stage;
        loop {
            let next = match stage.as_mut().project() {
                StageProjection::Deciding { deciding, body, service } => {
                    let (head, decision) = ready!(deciding.as_mut().poll(cx));
                    let (body, service) = body.take().zip(service.take()).expect("a decision comes once");
                    Stage::decided(decision, head, body, || service)
                }
                StageProjection::Buffering { exchange, .. } | StageProjection::Calling { exchange, .. }
                    if is_told_overdue() =>
                {
                    Stage::overdue(exchange)
                }
                StageProjection::Buffering { reading, head, exchange, service } => {
                    let Poll::Ready(read) = reading.as_mut().poll(cx) else {
                        ready!(this.timer.poll(exchange.as_ref().and_then(Exchange::deadline), cx));
                        let next = Stage::late(exchange);
                        stage.as_mut().project_replace(next);
                        continue;
                    };
                    let (head, exchange) = head.take().zip(exchange.take()).expect("a body is read once");
                    match read {
                        Ok(Some(body)) => Stage::called(service, head, body, exchange),
                        Ok(None) => Stage::too_large(&head, exchange),
                        Err(error) => Stage::broken(&error, &head, exchange),
                    }
                }
                StageProjection::Calling { future, exchange } => {
                    let Poll::Ready(response) = future.poll(cx) else {
                        ready!(this.timer.poll(exchange.as_ref().and_then(Exchange::deadline), cx));
                        let next = Stage::late(exchange);
                        stage.as_mut().project_replace(next);
                        continue;
                    };
                    let (mut head, body) = response?.into_parts();
                    let mut exchange = exchange.take();
                    let watching = exchange.as_mut().and_then(|exchange| {
                        exchange.response(&mut head);
                        exchange.watching()
                    });
                    let content = match watching {
                        None => Content::Service(body),
                        Some(watching) => Content::Watched(Box::pin(Filtered::new(body, watching, None, |_| None))),
                    };
                    let (busy, timer) = (this.busy.take(), std::mem::take(this.timer));
                    let body = ResponseBody { content, exchange, busy, timer }.begun();
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
                StageProjection::Answered(answer) => {
                    let (response, mut exchange) = answer.take().expect("polled again after it was ready");
                    let (mut head, body) = response.into_parts();
                    exchange.response(&mut head);
                    let busy = this.busy.take();
                    let (exchange, timer) = (Some(exchange), Timer::default());
                    let body = ResponseBody { content: Content::Local(body), exchange, busy, timer }.begun();
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
            };
            stage.as_mut().project_replace(next);
        }
    }
}

impl<B: Body<Data = Bytes>> ResponseBody<B> {
    /// One that has nothing is not asked for it: the answer is complete with its head.
    fn begun(mut self) -> Self {
        if self.is_end_stream()
            && let Some(mut exchange) = self.exchange.take()
        {
            exchange.complete();
        }
        self
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body<Data = Bytes>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        let polled = match this.content.as_mut().project() {
            // Who sees that it is the last may not ask again.
            ContentProjection::Service(mut body) => {
                let frame = body.as_mut().poll_frame(cx);
                frame.map(|frame| (frame, this.exchange.is_some() && body.is_end_stream()))
            }
            ContentProjection::Watched(body) => {
                let frame = body.as_mut().poll_frame(cx);
                frame.map(|frame| (frame, body.is_end_stream()))
            }
            ContentProjection::Local(body) => {
                let body = std::mem::take(body);
                Poll::Ready(((!body.is_empty()).then(|| Ok(Frame::data(body))), true))
            }
        };
        let (mut frame, last) = match polled {
            Poll::Ready(polled) => polled,
            Poll::Pending => {
                let grpc = this.exchange.as_mut().filter(|exchange| exchange.is_grpc());
                let Some(exchange) = grpc else { return Poll::Pending };
                ready!(this.timer.poll(exchange.deadline(), cx));
                exchange.is_late();
                this.content.set(Content::Local(Bytes::new()));
                let status = [(GRPC_STATUS, HeaderValue::from(4)), (GRPC_MESSAGE, HeaderValue::from_static(LATE))];
                (Some(Ok(Frame::trailers(status.into_iter().collect()))), true)
            }
        };
        let complete = match (this.exchange.as_mut(), &mut frame) {
            (Some(exchange), Some(Ok(frame))) => {
                exchange.frame(frame);
                last || frame.is_trailers()
            }
            (Some(_), None) => true,
            _ => false,
        };
        if complete && let Some(mut exchange) = this.exchange.take() {
            exchange.complete();
            *this.busy = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Service(body) => body.is_end_stream(),
            Content::Watched(body) => body.is_end_stream(),
            Content::Local(body) => body.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Service(body) => body.size_hint(),
            Content::Watched(body) => body.size_hint(),
            Content::Local(body) => SizeHint::with_exact(body.len() as u64),
        }
    }
}

impl<S, B> fmt::Debug for GuardFuture<S, B>
where
    S: Service<Request<B>>,
{
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardFuture").finish_non_exhaustive()
    }
}

impl<B: Body> fmt::Debug for ResponseBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}
