//! Filters as tower layers, for any client: no mesh needed.

use super::{
    Chain, Ended, Fault, Filter, FilterRequest, FilterResponse, Filtered, LocalRateLimit, Place, Watching, chain::Link,
    local_rate_limit::Buckets,
};
use crate::outbound::{filter::ActiveFaults, filter::descriptor::Descriptors, route::Profile, timeout::is_grpc};
use bytes::Bytes;
use http::{Method, Request, Response};
use http_body::{Body, Frame, SizeHint};
use mesh_xds::resource::{FaultConfig, LocalRateLimitConfig, TokenBucket, VirtualHostLimits};
use pin_project::pin_project;
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;
use tower_layer::Layer;
use tower_service::Service;

/// Puts a [`Filter`] before any HTTP or gRPC client. [`FilterRequest::buffer_body`] has no effect there.
///
/// ```
/// use mesh_client::filter::{Filter, FilterLayer, FilterRequest, Reply, Step, Verdict};
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// # use std::{convert::Infallible, sync::Arc};
/// # type Body = http_body_util::Full<bytes::Bytes>;
///
/// struct ReadOnly;
///
/// impl Filter for ReadOnly {
///     fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
///         Step::Now(match request.head().method {
///             http::Method::GET => Verdict::Pass,
///             _ => Verdict::Answer(Reply::new(http::StatusCode::METHOD_NOT_ALLOWED, "")),
///         })
///     }
/// }
///
/// # let client = tower::service_fn(|_: http::Request<Body>| async { Ok::<_, Infallible>(http::Response::new(Body::default())) });
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let client = ServiceBuilder::new().layer(FilterLayer::new(Arc::new(ReadOnly))).service(client);
/// let response = client.oneshot(http::Request::post("http://h/").body(Body::default()).unwrap()).await.unwrap();
/// assert_eq!(response.status(), 405);
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct FilterLayer {
    chain: Arc<Chain>,
}

/// Refuses requests above a rate with 429 (RESOURCE_EXHAUSTED for gRPC), a token bucket in one atomic. All services made by one layer
/// share it.
///
/// ```
/// use mesh_client::filter::RateLimitLayer;
/// use std::time::Duration;
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// # use std::convert::Infallible;
/// # type Body = http_body_util::Full<bytes::Bytes>;
/// # let client = tower::service_fn(|_: http::Request<Body>| async { Ok::<_, Infallible>(http::Response::new(Body::default())) });
/// # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
/// // 100 per second, and bursts of 2.
/// let layer = RateLimitLayer::new(100, Duration::from_secs(1)).burst(2);
/// let mut client = ServiceBuilder::new().layer(layer).service(client);
/// let mut statuses = Vec::new();
/// for _ in 0..3 {
///     let request = http::Request::get("http://h/").body(Body::default()).unwrap();
///     statuses.push(client.ready().await.unwrap().call(request).await.unwrap().status().as_u16());
/// }
/// assert_eq!(statuses, [200, 200, 429]);
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct RateLimitLayer {
    layer: FilterLayer,
    bucket: TokenBucket,
}

/// Delays requests, aborts them, and slows responses down (gRFC A33, Envoy's fault filter): for tests of what is around it.
///
/// ```
/// use mesh_client::filter::{FaultAbort, FaultConfig, FaultLayer, FractionalPercent};
/// use tower::{Service, ServiceBuilder, ServiceExt};
/// # use std::convert::Infallible;
/// # type Body = http_body_util::Full<bytes::Bytes>;
/// # let client = tower::service_fn(|_: http::Request<Body>| async { Ok::<_, Infallible>(http::Response::new(Body::default())) });
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let abort = Some(FaultAbort::Http { status: 503, percentage: FractionalPercent::HUNDRED });
/// let layer = FaultLayer::new(&FaultConfig { abort, ..FaultConfig::default() });
/// let client = ServiceBuilder::new().layer(layer).service(client);
/// let response = client.oneshot(http::Request::get("http://h/").body(Body::default()).unwrap()).await.unwrap();
/// assert_eq!(response.status(), 503);
/// # });
/// ```
#[derive(Clone, Debug)]
pub struct FaultLayer {
    layer: FilterLayer,
}

/// A client behind a filter. Made by [`FilterLayer`], [`RateLimitLayer`] and [`FaultLayer`].
#[derive(Clone, Debug)]
pub struct FilterService<S> {
    inner: S,
    chain: Arc<Chain>,
}

/// The response future of [`FilterService`]. Dropping it gives up the request, and what the filter keeps of it.
pub struct ResponseFuture<B, E>(Pin<Box<dyn Future<Output = Answer<B, E>> + Send>>)
where
    B: Body<Data = Bytes>;

type Answer<B, E> = Result<Response<FilterBody<B>>, E>;

/// The body of a response behind a filter: the client's, or the filter's own answer.
#[pin_project]
pub struct FilterBody<B: Body<Data = Bytes>>(#[pin] Kind<B>);

#[pin_project(project = KindProjection)]
enum Kind<B: Body<Data = Bytes>> {
    Local(Bytes),
    Inner(#[pin] B),
    Watched(#[pin] Filtered<B>),
}

impl FilterLayer {
    /// A layer with this filter; all services it makes share it.
    pub fn new(filter: Arc<dyn Filter>) -> Self {
        Self { chain: Arc::new(Chain { links: [Link { name: "filter".into(), filter }].into() }) }
    }
}

impl RateLimitLayer {
    /// `tokens` requests in each `interval`, at least 50 ms; bursts of as many.
    pub fn new(tokens: u32, interval: Duration) -> Self {
        let tokens = tokens.max(1);
        let fill_interval = interval.max(Duration::from_millis(50));
        Self::of(TokenBucket { max_tokens: tokens, tokens_per_fill: tokens, fill_interval })
    }

    /// Bursts of at most `tokens` requests. The bucket is full again.
    #[must_use]
    pub fn burst(self, tokens: u32) -> Self {
        Self::of(TokenBucket { max_tokens: tokens.max(1), ..self.bucket })
    }

    fn of(bucket: TokenBucket) -> Self {
        let config = LocalRateLimitConfig {
            virtual_host: VirtualHostLimits::Ignore,
            retry_after: true,
            resource_exhausted: true,
            max_dynamic: 1,
            ..LocalRateLimitConfig::of(bucket)
        };
        let buckets = Arc::new(Buckets::new(&config, Instant::now()));
        let filter = LocalRateLimit::new(Arc::new(config), buckets, Descriptors::none());
        Self { layer: FilterLayer::new(Arc::new(filter)), bucket }
    }
}

impl FaultLayer {
    /// A layer that injects these faults. Header matchers see every header.
    pub fn new(config: &FaultConfig) -> Self {
        let fault = Fault::compile(config, Profile::Envoy, ActiveFaults::default());
        Self { layer: FilterLayer::new(Arc::new(fault)) }
    }
}

impl<S> Layer<S> for FilterLayer {
    type Service = FilterService<S>;

    fn layer(&self, inner: S) -> FilterService<S> {
        FilterService { inner, chain: self.chain.clone() }
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = FilterService<S>;

    fn layer(&self, inner: S) -> FilterService<S> {
        self.layer.layer(inner)
    }
}

impl<S> Layer<S> for FaultLayer {
    type Service = FilterService<S>;

    fn layer(&self, inner: S) -> FilterService<S> {
        self.layer.layer(inner)
    }
}

impl<S, B, R> Service<Request<B>> for FilterService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    B: Send + 'static,
    R: Body<Data = Bytes> + 'static,
{
    type Response = Response<FilterBody<R>>;
    type Error = S::Error;
    type Future = ResponseFuture<R, S::Error>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        // The service that was polled ready goes into the future; a clone that was not takes its place.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        ResponseFuture(Box::pin(call(self.chain.clone(), inner, request)))
    }
}

async fn call<S, B, R>(
    chain: Arc<Chain>,
    mut inner: S,
    request: Request<B>,
) -> Result<Response<FilterBody<R>>, S::Error>
where
    S: Service<Request<B>, Response = Response<R>>,
    R: Body<Data = Bytes>,
{
    let (mut head, body) = request.into_parts();
    let grpc = is_grpc(&head.headers);
    let mut watching = Watching::new(Instant::now());
    let reply = {
        let place = Place { grpc, explain: head.extensions.get().cloned(), ..Place::default() };
        chain.request(&mut FilterRequest::new(&mut head, place), &mut watching).await
    };
    if let Some(reply) = reply {
        return Ok(reply.respond(grpc, head.method != Method::HEAD).map(|body| FilterBody(Kind::Local(body))));
    }
    let (mut head, body) = match inner.call(Request::from_parts(head, body)).await {
        Ok(response) => response.into_parts(),
        Err(error) => {
            watching.ended(Ended::Failed);
            return Err(error);
        }
    };
    if watching.is_empty() {
        return Ok(Response::from_parts(head, FilterBody(Kind::Inner(body))));
    }
    watching.response(&mut FilterResponse { head: &mut head, endpoint: None, cluster: "", local: false });
    let body = Filtered::new(body, watching, None, |_| None);
    Ok(Response::from_parts(head, FilterBody(Kind::Watched(body))))
}

impl<B: Body<Data = Bytes>, E> Future for ResponseFuture<B, E> {
    type Output = Result<Response<FilterBody<B>>, E>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<B> Body for FilterBody<B>
where
    B: Body<Data = Bytes>,
{
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project().0.project() {
            KindProjection::Local(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            KindProjection::Inner(body) => body.poll_frame(cx),
            KindProjection::Watched(body) => Poll::Ready(ready!(body.poll_frame(cx))),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Local(bytes) => bytes.is_empty(),
            Kind::Inner(body) => body.is_end_stream(),
            Kind::Watched(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Local(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Kind::Inner(body) => body.size_hint(),
            Kind::Watched(body) => body.size_hint(),
        }
    }
}

impl<B: Body<Data = Bytes>, E> fmt::Debug for ResponseFuture<B, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl<B: Body<Data = Bytes>> fmt::Debug for FilterBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilterBody").finish_non_exhaustive()
    }
}
