//! Deadlines as a tower layer, for any client: no mesh needed.

use super::{Deadline, Elapsed, HeadersTimeoutLayer, Rules, is_grpc, write_grpc_timeout};
use crate::transport::BoxError;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::{Instant, Sleep};
use tower_layer::Layer;
use tower_service::Service;

/// Ends calls that take too long: from the call to the end of the response's body.
///
/// A gRPC caller's own `grpc-timeout` counts when it is shorter, and the server is told what holds. The error is
/// [`Elapsed`], of the call or of the response's body.
///
/// ```
/// use mesh_client::timeout::TimeoutLayer;
/// use std::time::Duration;
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// # let client = tower::service_fn(|_: http::Request<()>| async { Ok::<_, Infallible>(http::Response::new(())) });
/// let client = ServiceBuilder::new().layer(TimeoutLayer::new(Duration::from_secs(2))).service(client);
/// # fn is_service<S: tower::Service<http::Request<()>>>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct TimeoutLayer {
    rules: Rules,
}

/// A client whose calls are limited in time. Made by [`TimeoutLayer`].
#[derive(Clone, Debug)]
pub struct Timeout<S> {
    inner: S,
    rules: Rules,
}

/// One call. Dropping it drops the call.
#[pin_project]
#[derive(Debug)]
pub struct ResponseFuture<F> {
    #[pin]
    inner: F,
    timer: Option<Timer>,
}

/// A response body that ends with [`Elapsed`] when the call's deadline passes before its end.
#[pin_project]
#[derive(Debug)]
pub struct ResponseBody<B> {
    #[pin]
    inner: B,
    timer: Option<Timer>,
}

#[derive(Debug)]
struct Timer {
    deadline: Deadline,
    sleep: Pin<Box<Sleep>>,
}

impl TimeoutLayer {
    /// Calls may take `limit`; zero ends them at once.
    pub fn new(limit: Duration) -> Self {
        Self { rules: Rules::fixed(limit) }
    }

    /// Responses have to begin within `limit` from when the request was sent in full; neither is limited otherwise.
    pub fn headers(limit: Duration) -> HeadersTimeoutLayer {
        HeadersTimeoutLayer::new(limit)
    }
}

impl<S> Layer<S> for TimeoutLayer {
    type Service = Timeout<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Timeout { inner, rules: self.rules.clone() }
    }
}

impl<S, B, R> Service<Request<B>> for Timeout<S>
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

    fn call(&mut self, mut request: Request<B>) -> Self::Future {
        let now = Instant::now();
        let deadline = self.rules.deadline(now, request.headers());
        if is_grpc(request.headers()) {
            write_grpc_timeout(request.headers_mut(), deadline.as_ref(), None, now);
        }
        let timer = deadline.map(|deadline| Timer { deadline, sleep: Box::pin(tokio::time::sleep_until(deadline.at)) });
        ResponseFuture { inner: self.inner.call(request), timer }
    }
}

impl<F, R, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
    E: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<R>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(result) = this.inner.poll(cx) {
            let timer = this.timer.take();
            return Poll::Ready(match result {
                Ok(response) => Ok(response.map(|inner| ResponseBody { inner, timer })),
                Err(error) => Err(error.into()),
            });
        }
        Timer::poll(this.timer, cx).map(Err)
    }
}

impl<B> Body for ResponseBody<B>
where
    B: Body,
    B::Error: Into<BoxError>,
{
    type Data = B::Data;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = self.project();
        // The timer first: a peer that always has something to send does not outlive the deadline.
        if let Poll::Ready(error) = Timer::poll(this.timer, cx) {
            return Poll::Ready(Some(Err(error)));
        }
        this.inner.poll_frame(cx).map(|frame| frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Timer {
    /// Ready with the error when the time is over.
    fn poll(timer: &mut Option<Self>, cx: &mut Context<'_>) -> Poll<BoxError> {
        match timer {
            Some(timer) => timer.sleep.as_mut().poll(cx).map(|()| Elapsed::new(&timer.deadline).into()),
            None => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests;
