//! The echo server all clients are measured against: gRPC shaped, straight on `h2`, one task per request.

use std::collections::HashMap;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll, ready};

use anyhow::Result;
use bytes::Bytes;
use futures::future::poll_fn;
use h2::server::SendResponse;
use h2::{RecvStream, SendStream};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use pin_project::pin_project;
use tokio::net::{TcpListener, TcpStream};

static GRPC_STATUS: LazyLock<HeaderName> = LazyLock::new(|| HeaderName::from_static("grpc-status"));

/// The header in which the server names the port that answered.
pub const BACKEND_HEADER: &str = "x-backend";

/// `MESSAGESxSIZE`: what the server is to send in place of an echo.
pub const DOWN_HEADER: &str = "x-down";
/// The server is to send nothing back.
pub const UP_HEADER: &str = "x-up";

/// A backend: one listening socket, and how many connections it has accepted.
#[derive(Debug, Clone)]
pub struct Backend {
    /// Where it listens, on loopback.
    pub address: SocketAddr,
    accepted: Arc<AtomicU64>,
}

impl Backend {
    /// Connections accepted since the start.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }
}

/// Starts `count` backends on free ports of 127.0.0.1; they serve until the runtime ends.
///
/// # Errors
/// When a socket cannot be opened.
pub async fn start(count: usize) -> Result<Vec<Backend>> {
    let mut backends = Vec::with_capacity(count);
    for _ in 0..count {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let backend = Backend { address: listener.local_addr()?, accepted: Arc::default() };
        backends.push(backend.clone());
        tokio::spawn(accept(listener, backend));
    }
    Ok(backends)
}

/// Connections accepted by each backend, by port.
#[must_use]
pub fn accepted_by_port(backends: &[Backend]) -> HashMap<u16, u64> {
    backends.iter().map(|backend| (backend.address.port(), backend.accepted())).collect()
}

async fn accept(listener: TcpListener, backend: Backend) {
    let name = HeaderValue::from(backend.address.port());
    while let Ok((socket, _)) = listener.accept().await {
        backend.accepted.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(connection(socket, name.clone()));
    }
}

async fn connection(socket: TcpStream, name: HeaderValue) -> Result<(), h2::Error> {
    // Without it, Nagle's algorithm would be what is measured.
    let _ = socket.set_nodelay(true);
    let mut connection = h2::server::Builder::new()
        .initial_window_size(2 << 20)
        .initial_connection_window_size(8 << 20)
        .max_concurrent_streams(4096)
        .handshake::<_, Bytes>(socket)
        .await?;
    let serve = poll_fn(move |cx| {
        while let Some(accepted) = ready!(connection.poll_accept(cx)) {
            match accepted {
                Ok((request, respond)) => drop(tokio::spawn(echo(request, respond, name.clone()))),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    });
    Yielding { inner: serve, second: false }.await
}

async fn echo(
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    name: HeaderValue,
) -> Result<(), h2::Error> {
    let down = request.headers().get(DOWN_HEADER).and_then(|value| {
        let (messages, size) = value.to_str().ok()?.split_once('x')?;
        Some((messages.parse().ok()?, size.parse().ok()?))
    });
    if let Some((messages, size)) = down {
        return send(request.into_body(), respond, name, messages, size).await;
    }
    let echoes = !request.headers().contains_key(UP_HEADER);
    let mut body = request.into_body();
    let mut response = Response::new(());
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert(BACKEND_HEADER, name);
    // The answer starts once there is something to echo, so that its headers and data leave in one write.
    let mut stream: Option<SendStream<Bytes>> = None;
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        if !echoes {
            continue;
        }
        let stream = match &mut stream {
            Some(stream) => stream,
            None => stream.insert(respond.send_response(std::mem::take(&mut response), false)?),
        };
        stream.send_data(chunk, false)?;
    }
    let mut stream = match stream {
        Some(stream) => stream,
        None => respond.send_response(response, false)?,
    };
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS.clone(), HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

/// So many frames of so many bytes, as fast as the client takes them.
async fn send(
    mut body: RecvStream,
    mut respond: SendResponse<Bytes>,
    name: HeaderValue,
    messages: usize,
    size: usize,
) -> Result<(), h2::Error> {
    while let Some(chunk) = body.data().await {
        body.flow_control().release_capacity(chunk?.len())?;
    }
    let mut response = Response::new(());
    response.headers_mut().insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response.headers_mut().insert(BACKEND_HEADER, name);
    let mut stream = respond.send_response(response, false)?;
    let message = Bytes::from(vec![0; size]);
    for _ in 0..messages {
        let mut rest = message.clone();
        while !rest.is_empty() {
            stream.reserve_capacity(rest.len());
            if stream.capacity() == 0 {
                match poll_fn(|cx| stream.poll_capacity(cx)).await {
                    Some(granted) => drop(granted?),
                    None => return Ok(()),
                }
            }
            let part = rest.split_to(stream.capacity().min(rest.len()));
            stream.send_data(part, false)?;
        }
    }
    let mut trailers = HeaderMap::with_capacity(1);
    trailers.insert(GRPC_STATUS.clone(), HeaderValue::from_static("0"));
    stream.send_trailers(trailers)
}

/// Polls the connection one scheduler turn after it is woken: what the handlers queue meanwhile leaves in one write.
#[pin_project]
struct Yielding<F> {
    #[pin]
    inner: F,
    second: bool,
}

impl<F: Future> Future for Yielding<F> {
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        if !std::mem::replace(this.second, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        *this.second = false;
        this.inner.poll(cx)
    }
}
