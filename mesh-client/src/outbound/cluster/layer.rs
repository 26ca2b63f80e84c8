//! The circuit breaker as a tower layer, for any client: no mesh needed.

use super::{Breaker, Overloaded, Permit, Resource};
use crate::transport::BoxError;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use mesh_xds::resource::{CircuitBreakers, RoutingPriority, Thresholds};
use pin_project::pin_project;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// How much may be in flight at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Requests, from the call to the end of the response's body (gRFC A32). Default 1024.
    pub max_requests: u32,
}

/// Refuses at once what exceeds a limit, with [`Overloaded`], and does not queue.
///
/// All services made by one layer, or by its clones, count together: one layer stands for one upstream. A request counts
/// until its response's body ended or was dropped, or until it failed or was dropped itself.
///
/// ```
/// use mesh_client::circuit_breaker::{CircuitBreakerLayer, Limits};
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// # let client = tower::service_fn(|_: http::Request<()>| async { Ok::<_, Infallible>(http::Response::new(())) });
/// let client = ServiceBuilder::new().layer(CircuitBreakerLayer::new(Limits::max_requests(100))).service(client);
/// # fn is_service<S: tower::Service<http::Request<()>>>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct CircuitBreakerLayer {
    breaker: Arc<Breaker>,
}

/// A client with a limit on what is in flight. Made by [`CircuitBreakerLayer`].
#[derive(Clone, Debug)]
pub struct CircuitBreaker<S> {
    inner: S,
    breaker: Arc<Breaker>,
}

/// One call, or its refusal. Dropping it drops the call and stops counting it.
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    state: State<F>,
}

#[pin_project(project = StateProjection)]
#[derive(Debug)]
enum State<F> {
    Called {
        #[pin]
        inner: F,
        permit: Option<Permit>,
    },
    Refused(Overloaded),
}

/// A response body that counts as in flight until its end.
#[pin_project]
#[derive(Debug)]
pub struct ResponseBody<B> {
    #[pin]
    inner: B,
    permit: Option<Permit>,
}

impl Limits {
    /// At most `max` requests in flight.
    pub fn max_requests(max: u32) -> Self {
        Self { max_requests: max }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::max_requests(Thresholds::default().max_requests)
    }
}

impl CircuitBreakerLayer {
    /// A breaker with these limits, and nothing in flight.
    pub fn new(limits: Limits) -> Self {
        let default = Thresholds { max_requests: limits.max_requests, ..Thresholds::default() };
        let limits = CircuitBreakers { default, ..CircuitBreakers::default() };
        Self { breaker: Breaker::new(&Arc::from(""), &limits) }
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u32 {
        self.breaker.in_use(RoutingPriority::Default, Resource::Requests)
    }
}

impl<S> Layer<S> for CircuitBreakerLayer {
    type Service = CircuitBreaker<S>;

    fn layer(&self, inner: S) -> Self::Service {
        CircuitBreaker { inner, breaker: self.breaker.clone() }
    }
}

impl<S, B, R> Service<Request<B>> for CircuitBreaker<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Error: Into<BoxError>,
{
    type Response = Response<ResponseBody<R>>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    /// The permit is taken here, not in `poll_ready`: a reservation would be copied or held idle by clones.
    fn call(&mut self, request: Request<B>) -> Self::Future {
        ResponseFuture {
            state: match self.breaker.acquire(RoutingPriority::Default, Resource::Requests) {
                Ok(permit) => State::Called { inner: self.inner.call(request), permit: Some(permit) },
                Err(overloaded) => State::Refused(overloaded),
            },
        }
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<R>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProjection::Refused(overloaded) => Poll::Ready(Err((*overloaded).into())),
            StateProjection::Called { inner, permit } => {
                let result = ready!(inner.poll(cx)).map_err(Into::into);
                let permit = permit.take();
                Poll::Ready(result.map(|response| response.map(|inner| ResponseBody { inner, permit })))
            }
        }
    }
}

impl<B: Body> Body for ResponseBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        let frame = ready!(this.inner.poll_frame(cx));
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            *this.permit = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests;
