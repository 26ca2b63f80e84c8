//! The wait for response headers as a tower layer, for any client: no mesh needed.

use super::{
    Elapsed, Source,
    sent::{HeadTimer, RequestBody},
};
use crate::error::BoxError;
use http::Request;
use http_body::Body;
use pin_project::pin_project;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tower_layer::Layer;
use tower_service::Service;

/// Ends calls whose response does not begin in time: from when the request was sent in full to the head of the response. What is sent
/// slowly, and a response that goes on, are not limited. Made by [`TimeoutLayer::headers`](super::TimeoutLayer::headers).
///
/// The error is [`Elapsed`]. The inner client gets the request with a body that tells when it was read to its end.
///
/// ```
/// use mesh_client::timeout::TimeoutLayer;
/// use std::time::Duration;
/// use tower::ServiceBuilder;
/// # use std::convert::Infallible;
///
/// # let client = tower::service_fn(|_: http::Request<_>| async { Ok::<_, Infallible>(http::Response::new(())) });
/// let client = ServiceBuilder::new().layer(TimeoutLayer::headers(Duration::from_secs(2))).service(client);
/// # fn is_service<S: tower::Service<http::Request<String>>>(_: S) {}
/// # is_service(client);
/// ```
#[derive(Clone, Debug)]
pub struct HeadersTimeoutLayer {
    limit: Duration,
}

/// A client whose responses have to begin in time. Made by [`HeadersTimeoutLayer`].
#[derive(Clone, Debug)]
pub struct HeadersTimeout<S> {
    inner: S,
    limit: Duration,
}

/// One call. Dropping it drops the call.
#[pin_project]
#[derive(Debug)]
pub struct HeadersFuture<F> {
    #[pin]
    inner: F,
    timer: HeadTimer,
}

impl HeadersTimeoutLayer {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit }
    }
}

impl<S> Layer<S> for HeadersTimeoutLayer {
    type Service = HeadersTimeout<S>;

    fn layer(&self, inner: S) -> Self::Service {
        HeadersTimeout { inner, limit: self.limit }
    }
}

impl<S, B> Service<Request<B>> for HeadersTimeout<S>
where
    S: Service<Request<RequestBody<B>>>,
    S::Error: Into<BoxError>,
    B: Body,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = HeadersFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let (head, body) = request.into_parts();
        let (body, timer) = RequestBody::new(body, self.limit);
        HeadersFuture { inner: self.inner.call(Request::from_parts(head, body)), timer }
    }
}

impl<F, R, E> Future for HeadersFuture<F>
where
    F: Future<Output = Result<R, E>>,
    E: Into<BoxError>,
{
    type Output = Result<R, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(result) = this.inner.poll(cx) {
            return Poll::Ready(result.map_err(Into::into));
        }
        this.timer.poll(cx).map(|limit| Err(Elapsed { limit, origin: Source::Headers }.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::timeout::TimeoutLayer;
    use bytes::Bytes;
    use http::Response;
    use http_body_util::{BodyExt, Full};
    use tokio::time::Instant;
    use tower::{ServiceExt, service_fn};

    #[tokio::test(start_paused = true)]
    async fn a_slow_upload_is_not_limited_and_a_late_answer_is() {
        let seconds = Duration::from_secs;
        for (upload, answer, ends) in [(30, 1, None), (30, 5, Some(32)), (0, 1, None), (0, 5, Some(2))] {
            let server = service_fn(move |request: Request<RequestBody<Full<Bytes>>>| async move {
                tokio::time::sleep(seconds(upload)).await;
                request.into_body().collect().await.unwrap();
                tokio::time::sleep(seconds(answer)).await;
                Ok::<_, BoxError>(Response::new(()))
            });
            let client = TimeoutLayer::headers(seconds(2)).layer(server);
            let began = Instant::now();
            let answered = client.oneshot(Request::new(Full::from("body"))).await;
            match (ends, answered) {
                (None, Ok(_)) => {}
                (Some(at), Err(error)) => {
                    assert_eq!(began.elapsed().as_secs(), at);
                    assert_eq!(error.downcast::<Elapsed>().unwrap().limit(), seconds(2));
                }
                other => panic!("{upload} {answer}: {other:?}"),
            }
        }
    }
}
