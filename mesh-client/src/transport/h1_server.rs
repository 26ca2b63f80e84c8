//! HTTP/1.1 of clients, on hyper.

use super::{BoxError, RequestBody, ServerConfig, Stream};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body::Body;
use http_body_util::{Either, Empty};
use hyper::{body::Incoming, server::conn::http1::Builder, service::Service as HyperService};
use hyper_util::rt::{TokioIo, TokioTimer};
use mesh_tls::Rewind;
use std::{
    future::{Future, poll_fn, ready},
    pin::{Pin, pin},
    task::Poll,
};
use tower_service::Service;

/// The smallest buffer that hyper takes.
const MIN_BUFFER: usize = 8 << 10;
/// Headers that hyper takes unless something else is said.
const HYPERS_HEADERS: usize = 100;

/// Serves a connection on which `read` arrived already, until it ends; once `leave` is ready, until the request in progress is answered.
pub(crate) async fn serve_http1<S, B>(
    io: impl Stream,
    read: Bytes,
    config: &ServerConfig,
    service: S,
    leave: impl Future<Output = ()>,
) where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let most = usize::try_from(config.max_header_list_size).unwrap_or(usize::MAX);
    let mut builder = Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(config.header_timeout).max_buf_size(most.max(MIN_BUFFER));
    let headers = usize::try_from(config.max_headers).unwrap_or(usize::MAX);
    if headers != HYPERS_HEADERS {
        // Hyper allocates for what is said here.
        builder.max_headers(headers);
    }
    let connection = builder.serve_connection(TokioIo::new(Rewind::with(read, io)), Adapted(service)).with_upgrades();
    let (mut connection, mut leave) = (pin!(connection), pin!(leave));
    let mut leaving = false;
    let result = poll_fn(|cx| {
        // What was read already is a request: it is answered, whoever wants to leave.
        if let Poll::Ready(result) = connection.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        if !leaving && leave.as_mut().poll(cx).is_ready() {
            leaving = true;
            connection.as_mut().graceful_shutdown();
            return connection.as_mut().poll(cx);
        }
        Poll::Pending
    });
    if let Err(error) = result.await {
        tracing::debug!(%error, "connection ended");
    }
}

/// A tower service as one of hyper's.
struct Adapted<S>(S);

impl<S, B> HyperService<Request<Incoming>> for Adapted<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<Answer<B>>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Answer<B>>, BoxError>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        if let Err(what) = names_one_host(request.uri(), request.headers()) {
            tracing::debug!(what, "a request that is none");
            return Box::pin(ready(Ok(refused())));
        }
        let mut service = self.0.clone();
        Box::pin(async move {
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
            let response = service.call(request.map(RequestBody::h1)).await.map_err(Into::into)?;
            Ok(response.map(Either::Right))
        })
    }
}

/// The service's answer, or ours.
type Answer<B> = Either<Empty<Bytes>, B>;

fn refused<B>() -> Response<Answer<B>> {
    let mut response = Response::new(Either::Left(Empty::new()));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// Who decides by one name of a request and who serves by the other must not differ.
fn names_one_host(uri: &Uri, headers: &HeaderMap) -> Result<(), &'static str> {
    let mut hosts = headers.get_all(header::HOST).iter().map(HeaderValue::as_bytes);
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err("two hosts");
    }
    let authority = uri.authority().map(|authority| authority.as_str().as_bytes());
    if host.into_iter().chain(authority).any(|name| name.contains(&b'@')) {
        return Err("a host with a user");
    }
    match (host, authority) {
        (Some(host), Some(authority)) if host != authority => Err("an authority and another host"),
        _ => Ok(()),
    }
}
