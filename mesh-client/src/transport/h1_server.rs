//! HTTP/1.1 of clients, on hyper.

use super::{BoxError, RequestBody, ServerConfig, Stream};
use bytes::{Buf, Bytes};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Uri, header};
use http_body::Body;
use http_body_util::{Either, Empty};
use hyper::{body::Incoming, server::conn::http1::Builder, service::Service as HyperService};
use hyper_util::rt::{TokioIo, TokioTimer};
use pin_project::pin_project;
use std::{
    future::{Future, poll_fn, ready},
    io,
    pin::{Pin, pin},
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
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
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + Sync + 'static,
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
    let connection = builder.serve_connection(TokioIo::new(Rewound { read, io }), Adapted(service)).with_upgrades();
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

/// A byte stream, of which some was read already.
#[pin_project]
struct Rewound<IO> {
    read: Bytes,
    #[pin]
    io: IO,
}

impl<IO: AsyncRead> AsyncRead for Rewound<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        if this.read.is_empty() {
            return this.io.poll_read(cx, buf);
        }
        let some = this.read.len().min(buf.remaining());
        buf.put_slice(&this.read[..some]);
        this.read.advance(some);
        Poll::Ready(Ok(()))
    }
}

impl<IO: AsyncWrite> AsyncWrite for Rewound<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }
}
