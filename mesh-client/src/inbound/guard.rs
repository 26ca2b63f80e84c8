//! The policy of a connection in front of a service: the same whatever transport is below.

use super::{ConnectionInfo, Deciding, Decision, Exchange, Verdict, farewell::Busy};
use crate::{
    outbound::{filter::Reply, timeout::is_grpc},
    telemetry::trace::ScopeFuture,
};
use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONNECTION, request};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// The policy of an [`Inbound`](super::Inbound) as a layer: [`Inbound::layer`](super::Inbound::layer).
///
/// A request is asked by the policy of the connection that it came over, which is in its extensions ([`ConnectionInfo`]). One that has
/// none did not come through the mesh, and is answered with 500 (gRPC: INTERNAL).
#[derive(Clone, Debug, Default)]
pub struct InboundLayer(());

/// A service behind the policy.
#[derive(Clone, Debug)]
pub struct Guard<S> {
    inner: S,
    /// Of one connection; else the requests say of which they are.
    connection: Option<ConnectionInfo>,
}

impl<S> Guard<S> {
    /// For the requests of one connection.
    pub(super) fn of_connection(inner: S, connection: ConnectionInfo) -> Self {
        Self { inner, connection: Some(connection) }
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
        service: S,
    },
    /// The service was called.
    Calling {
        #[pin]
        future: ScopeFuture<S::Future>,
        exchange: Option<Exchange>,
    },
    Answered {
        reply: Option<(Reply, Exchange)>,
        local: Local,
    },
}

/// What an answer of our own depends on.
#[derive(Clone, Copy, Debug)]
struct Local {
    grpc: bool,
    head: bool,
}

/// The body of a response that went through a policy.
#[pin_project]
pub struct ResponseBody<B> {
    #[pin]
    content: Content<B>,
    exchange: Option<Exchange>,
    busy: Option<Busy>,
}

#[pin_project(project = ContentProjection)]
enum Content<B> {
    Service(#[pin] B),
    Local(Bytes),
}

impl Local {
    fn of(head: &request::Parts) -> Self {
        Self { grpc: is_grpc(&head.headers), head: head.method == Method::HEAD }
    }
}

impl<S> Layer<S> for InboundLayer {
    type Service = Guard<S>;

    fn layer(&self, inner: S) -> Guard<S> {
        Guard { inner, connection: None }
    }
}

impl<S, B, R> Service<Request<B>> for Guard<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone,
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
        let known = match &self.connection {
            Some(connection) => {
                connection.tell(&mut head.extensions);
                Some(connection.clone())
            }
            None => head
                .extensions
                .get::<ConnectionInfo>()
                .cloned()
                .inspect(|connection| connection.tell(&mut head.extensions)),
        };
        let Some(connection) = known else {
            tracing::error!("a request that did not come through the mesh's own connections");
            let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "not a connection of the mesh").grpc_status(13);
            return GuardFuture::answered(reply, &head);
        };
        // Where others speak on the connection, that it leaves is known here alone.
        let busy = match self.connection.is_none().then(|| connection.begin()) {
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
            Verdict::Now(Decision::Pass(exchange)) => {
                let future = ScopeFuture::of(exchange.trace(), || self.inner.call(Request::from_parts(head, body)));
                Stage::Calling { future, exchange: Some(exchange) }
            }
            Verdict::Now(Decision::Answer(reply, exchange)) => {
                Stage::Answered { reply: Some((reply, exchange)), local: Local::of(&head) }
            }
            Verdict::Later(deciding) => {
                // The one that is ready is called; the clone becomes ready for the next.
                let fresh = self.inner.clone();
                let service = std::mem::replace(&mut self.inner, fresh);
                Stage::Deciding { deciding, body: Some(body), service }
            }
        };
        GuardFuture { stage, busy }
    }
}

impl<S: Service<Request<B>>, B> GuardFuture<S, B> {
    /// Nobody is asked.
    fn answered(reply: Reply, head: &request::Parts) -> Self {
        Self { stage: Stage::Answered { reply: Some((reply, Exchange::none())), local: Local::of(head) }, busy: None }
    }
}

impl<S, B, R> Future for GuardFuture<S, B>
where
    S: Service<Request<B>, Response = Response<R>>,
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
                    let body = body.take().expect("a decision comes once");
                    match decision {
                        Decision::Pass(exchange) => {
                            let request = Request::from_parts(head, body);
                            let future = ScopeFuture::of(exchange.trace(), || service.call(request));
                            Stage::Calling { future, exchange: Some(exchange) }
                        }
                        Decision::Answer(reply, exchange) => {
                            Stage::Answered { reply: Some((reply, exchange)), local: Local::of(&head) }
                        }
                    }
                }
                StageProjection::Calling { future, exchange } => {
                    let (mut head, body) = ready!(future.poll(cx))?.into_parts();
                    let mut exchange = exchange.take();
                    if let Some(exchange) = &mut exchange {
                        exchange.response(&mut head);
                    }
                    let body = ResponseBody { content: Content::Service(body), exchange, busy: this.busy.take() };
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
                StageProjection::Answered { reply, local } => {
                    let (reply, mut exchange) = reply.take().expect("polled again after it was ready");
                    let (mut head, body) = reply.respond(local.grpc, !local.head).into_parts();
                    exchange.response(&mut head);
                    let busy = this.busy.take();
                    let body = ResponseBody { content: Content::Local(body), exchange: Some(exchange), busy };
                    return Poll::Ready(Ok(Response::from_parts(head, body)));
                }
            };
            stage.as_mut().project_replace(next);
        }
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
        let (mut frame, last) = match this.content.as_mut().project() {
            ContentProjection::Service(mut body) => {
                let frame = ready!(body.as_mut().poll_frame(cx));
                // Who sees that it is the last may not ask again.
                (frame, this.exchange.is_some() && body.is_end_stream())
            }
            ContentProjection::Local(body) => {
                let body = std::mem::take(body);
                ((!body.is_empty()).then(|| Ok(Frame::data(body))), true)
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
            Content::Local(body) => body.is_empty(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Service(body) => body.size_hint(),
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

impl<B> fmt::Debug for ResponseBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseBody").finish_non_exhaustive()
    }
}
