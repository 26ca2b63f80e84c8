//! HTTP/1.1 of clients, on hyper.

use super::{
    BoxError, RequestBody, ServerConfig, Stream, count_refused,
    h1_dues::{Dues, Watched},
    overdue,
};
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
    sync::Arc,
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
    let dues = Arc::<Dues>::default();
    let io = TokioIo::new(Rewind::with(read, Watched::new(io, Arc::clone(&dues))));
    let service = Adapted { service, dues: Arc::clone(&dues) };
    let mut connection = pin!(Some(builder.serve_connection(io, service).with_upgrades()));
    let (mut leave, mut overdue) = (pin!(leave), pin!(dues.overdue(config.stream_idle)));
    let mut leaving = false;
    let result = poll_fn(|cx| {
        let Some(mut open) = connection.as_mut().as_pin_mut() else { return Poll::Ready(Ok(())) };
        // What was read already is a request: it is answered, whoever wants to leave.
        if let Poll::Ready(result) = open.as_mut().poll(cx) {
            return Poll::Ready(result);
        }
        if !leaving && leave.as_mut().poll(cx).is_ready() {
            leaving = true;
            open.as_mut().graceful_shutdown();
            return open.poll(cx);
        }
        if overdue.as_mut().poll(cx).is_ready() {
            tracing::debug!("a client does not go on with its request");
            overdue::tell(|| connection.set(None));
            return Poll::Ready(Ok(()));
        }
        Poll::Pending
    });
    if let Err(error) = result.await {
        tracing::debug!(%error, "connection ended");
    }
}

/// A tower service as one of hyper's.
struct Adapted<S> {
    service: S,
    dues: Arc<Dues>,
}

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
            count_refused("malformed");
            return Box::pin(ready(Ok(refused(StatusCode::BAD_REQUEST))));
        }
        let (mut service, dues) = (self.service.clone(), Arc::clone(&self.dues));
        Box::pin(async move {
            dues.answers(false);
            poll_fn(|cx| service.poll_ready(cx)).await.map_err(Into::into)?;
            let mut served = pin!(service.call(request.map(|body| RequestBody::h1(body, &dues))));
            let answer = poll_fn(|cx| {
                let mut answer = served.as_mut().poll(cx).map(Some);
                if answer.is_pending() && dues.is_late(cx) {
                    // Whoever decides about requests answers.
                    let told = overdue::tell(|| served.as_mut().poll(cx));
                    answer = Poll::Ready(if let Poll::Ready(told) = told { Some(told) } else { None });
                }
                answer
            });
            let answer = answer.await.transpose().map_err(Into::into)?;
            let answer =
                answer.map_or_else(|| refused(StatusCode::REQUEST_TIMEOUT), |answer| answer.map(Either::Right));
            dues.answers(true);
            Ok(answer)
        })
    }
}

/// The service's answer, or ours.
type Answer<B> = Either<Empty<Bytes>, B>;

fn refused<B>(status: StatusCode) -> Response<Answer<B>> {
    let mut response = Response::new(Either::Left(Empty::new()));
    *response.status_mut() = status;
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
