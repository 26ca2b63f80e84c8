//! Trace propagation as tower layers: one around a client, one around a server.

use super::{CURRENT, Propagation, TraceContext};
use http::Request;
use pin_project::pin_project;
use std::{
    pin::Pin,
    task::{Context, Poll},
};
use tokio::task::futures::TaskLocalFuture;
use tower_layer::Layer;
use tower_service::Service;

/// Gives the requests of a client their trace headers. A mesh does so by itself.
///
/// ```
/// use mesh_client::trace::{ScopeLayer, TracePropagationLayer};
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// // around the client
/// # let client = tower::service_fn(|_: http::Request<()>| async { Ok::<_, Infallible>(http::Response::new(())) });
/// let client = ServiceBuilder::new().layer(TracePropagationLayer::new()).service(client);
///
/// // around the server whose handlers use it
/// # let handler = client.clone();
/// let server = ServiceBuilder::new().layer(ScopeLayer::new()).service(handler);
/// # fn is_service<S: tower::Service<http::Request<()>>>(_: S) {}
/// # is_service(server);
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct TracePropagationLayer {
    propagation: Propagation,
}

/// A client whose requests carry the trace context. Made by [`TracePropagationLayer`].
#[derive(Clone, Copy, Debug)]
pub struct TracePropagation<S> {
    inner: S,
    propagation: Propagation,
}

/// Runs a server's handlers in the [`scope`](super::scope) of the trace context that came with the request, and puts it
/// into the request's extensions, for those who spawn tasks.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct ScopeLayer;

/// A server whose handlers continue the caller's trace. Made by [`ScopeLayer`].
#[derive(Clone, Copy, Debug)]
pub struct ScopeService<S> {
    inner: S,
}

/// One handled request, in its scope. Dropping it drops the handler.
#[pin_project(project = ScopeProjection)]
#[derive(Debug)]
pub enum ScopeFuture<F> {
    /// The request carried a context.
    Scoped(#[pin] TaskLocalFuture<TraceContext, F>),
    /// It carried none.
    Plain(#[pin] F),
}

impl<F: Future> ScopeFuture<F> {
    /// Calls a handler in the scope of this context.
    pub(crate) fn of(context: Option<TraceContext>, call: impl FnOnce() -> F) -> Self {
        match context {
            Some(context) => {
                let future = CURRENT.sync_scope(context.clone(), call);
                Self::Scoped(CURRENT.scope(context, future))
            }
            None => Self::Plain(call()),
        }
    }
}

impl TracePropagationLayer {
    /// Propagates and starts traces, see [`Propagation::default`].
    pub fn new() -> Self {
        Self::default()
    }

    /// With other settings.
    #[must_use]
    pub fn with(propagation: Propagation) -> Self {
        Self { propagation }
    }
}

impl<S> Layer<S> for TracePropagationLayer {
    type Service = TracePropagation<S>;

    fn layer(&self, inner: S) -> Self::Service {
        TracePropagation { inner, propagation: self.propagation }
    }
}

impl<S, B> Service<Request<B>> for TracePropagation<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (mut parts, body) = request.into_parts();
        self.propagation.apply(&mut parts.headers, &parts.extensions, None);
        self.inner.call(Request::from_parts(parts, body))
    }
}

impl ScopeLayer {
    /// The layer.
    pub fn new() -> Self {
        Self
    }
}

impl<S> Layer<S> for ScopeLayer {
    type Service = ScopeService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ScopeService { inner }
    }
}

impl<S, B> Service<Request<B>> for ScopeService<S>
where
    S: Service<Request<B>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ScopeFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        match TraceContext::received(request.headers()) {
            Some(context) => {
                request.extensions_mut().insert(context.clone());
                ScopeFuture::of(Some(context), || self.inner.call(request))
            }
            None => ScopeFuture::of(None, || self.inner.call(request)),
        }
    }
}

impl<F: Future> Future for ScopeFuture<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project() {
            ScopeProjection::Scoped(future) => future.poll(cx),
            ScopeProjection::Plain(future) => future.poll(cx),
        }
    }
}
