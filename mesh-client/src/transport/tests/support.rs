//! Servers and bodies for the tests.

use crate::transport::{BoxError, Connection, Events, Lease, Origin, Protocol, RecvBody, TransportConfig};
use bytes::Bytes;
use http::{Request, Response, uri::Authority};
use http_body::{Body, Frame};
use http_body_util::BodyExt;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::DuplexStream,
    sync::{Notify, mpsc},
};

pub(super) type ServerConnection = h2::server::Connection<DuplexStream, Bytes>;

pub(super) fn origin() -> Origin {
    Origin { authority: Authority::from_static("endpoint.test"), tls: false, peer: None }
}

/// A client connection and the raw server side of it.
pub(super) async fn pair(config: TransportConfig, server: &h2::server::Builder) -> (Connection, ServerConnection) {
    pair_with(config, server, None).await
}

pub(super) async fn pair_with(
    config: TransportConfig,
    server: &h2::server::Builder,
    events: Option<Arc<dyn Events>>,
) -> (Connection, ServerConnection) {
    let (client, io) = tokio::io::duplex(1 << 20);
    let accept = server.handshake::<_, Bytes>(io);
    let connect = Connection::handshake(client, Protocol::Http2, &config, origin(), events);
    let (connection, server) = tokio::join!(connect, async {
        let mut server = accept.await.expect("server handshake");
        // SETTINGS leave with the first poll.
        let polled = std::future::poll_fn(|cx| Poll::Ready(server.poll_closed(cx).is_ready())).await;
        assert!(!polled, "closed during the handshake");
        server
    });
    (connection.expect("client handshake"), server)
}

/// Serves every stream of `server` by `handler`, until the connection ends.
pub(super) fn serve<F, R>(mut server: ServerConnection, handler: F)
where
    F: Fn(Request<h2::RecvStream>, h2::server::SendResponse<Bytes>) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        while let Some(Ok((request, respond))) = server.accept().await {
            tokio::spawn(handler(request, respond));
        }
    });
}

/// Reads the whole request, then answers with the same bytes and trailers.
pub(super) async fn echo(request: Request<h2::RecvStream>, mut respond: h2::server::SendResponse<Bytes>) {
    let (data, trailers) = read(request.into_body()).await;
    let mut send = respond.send_response(Response::new(()), false).expect("open");
    write(&mut send, data, trailers.is_none()).await;
    if let Some(trailers) = trailers {
        send.send_trailers(trailers).expect("trailers");
    }
}

pub(super) async fn read(mut body: h2::RecvStream) -> (Bytes, Option<http::HeaderMap>) {
    let mut data = Vec::new();
    while let Some(chunk) = body.data().await {
        let Ok(chunk) = chunk else { break };
        body.flow_control().release_capacity(chunk.len()).expect("release");
        data.extend_from_slice(&chunk);
    }
    (data.into(), body.trailers().await.ok().flatten())
}

/// Sends `data` as the window allows.
pub(super) async fn write(send: &mut h2::SendStream<Bytes>, mut data: Bytes, end: bool) {
    while !data.is_empty() {
        send.reserve_capacity(data.len());
        let Some(Ok(room)) = std::future::poll_fn(|cx| send.poll_capacity(cx)).await else { return };
        let chunk = data.split_to(room.min(data.len()));
        let last = data.is_empty();
        if send.send_data(chunk, end && last).is_err() {
            return;
        }
    }
}

pub(super) fn lease(connection: &Connection) -> Lease {
    connection.lease().expect("capacity")
}

pub(super) fn post(body: impl Into<Bytes>) -> Request<http_body_util::Full<Bytes>> {
    Request::post("http://x.test/echo").body(http_body_util::Full::new(body.into())).expect("request")
}

pub(super) async fn collect(response: Response<RecvBody>) -> (Bytes, Option<http::HeaderMap>) {
    let collected = response.into_body().collect().await.expect("body");
    let trailers = collected.trailers().cloned();
    (collected.to_bytes(), trailers)
}

/// Waits until no stream is counted.
pub(super) async fn idle(connection: &Connection) {
    within(async {
        while connection.in_flight() != 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// A generous bound: nothing here may hang.
pub(super) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("hangs")
}

/// A request body fed by the test.
pub(super) struct Feed {
    frames: mpsc::Receiver<Result<Frame<Bytes>, BoxError>>,
    /// Frames taken so far.
    pub(super) taken: Arc<AtomicUsize>,
}

pub(super) type Feeder = mpsc::Sender<Result<Frame<Bytes>, BoxError>>;

pub(super) fn feed(depth: usize) -> (Feeder, Feed) {
    let (sender, frames) = mpsc::channel(depth);
    (sender, Feed { frames, taken: Arc::default() })
}

impl Body for Feed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = self.frames.poll_recv(cx);
        if frame.is_ready() {
            self.taken.fetch_add(1, Ordering::SeqCst);
        }
        frame
    }
}

/// Counts what the owner is told.
#[derive(Default)]
pub(super) struct Heard {
    pub(super) capacity: AtomicUsize,
    pub(super) raised: AtomicUsize,
    pub(super) unusable: AtomicUsize,
    pub(super) any: Notify,
}

impl Events for Heard {
    fn capacity(&self) {
        self.capacity.fetch_add(1, Ordering::SeqCst);
        self.any.notify_one();
    }

    fn raised(&self) {
        self.raised.fetch_add(1, Ordering::SeqCst);
        self.any.notify_one();
    }

    fn unusable(&self) {
        self.unusable.fetch_add(1, Ordering::SeqCst);
        self.any.notify_one();
    }
}
