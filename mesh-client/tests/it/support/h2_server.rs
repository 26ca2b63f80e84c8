//! An HTTP/2 server whose streams and connections a test handles by hand.

use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{HeaderMap, HeaderValue, Request, Response};
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Serves until dropped.
pub(crate) struct H2Server {
    addr: SocketAddr,
    counts: Arc<Counts>,
    _task: JoinSet<()>,
}

/// Of connections.
#[derive(Default)]
struct Counts {
    accepted: AtomicUsize,
    open: AtomicUsize,
}

/// Counts a connection as open until dropped.
struct Open(Arc<Counts>);

/// One request.
pub(crate) struct Served {
    /// Of the server, from 0.
    pub(crate) connection: usize,
    /// On its connection, from 0.
    pub(crate) number: usize,
    pub(crate) request: Request<RecvStream>,
    pub(crate) respond: SendResponse<Bytes>,
}

/// What becomes of the connection after a request was handled.
pub(crate) enum Then {
    GoOn,
    /// GOAWAY; requests that are there are finished.
    GoAway,
    /// The connection stays open; nothing is read from it any more, and no PING answered.
    Freeze,
    /// The connection is cut.
    Cut,
}

impl H2Server {
    /// Hands each request to `handle`.
    pub(crate) async fn start(handle: impl Fn(Served) -> Then + Send + Sync + 'static) -> Self {
        Self::with(Builder::new(), handle).await
    }

    /// The same, of connections that allow so many streams at once.
    pub(crate) async fn limited(streams: u32, handle: impl Fn(Served) -> Then + Send + Sync + 'static) -> Self {
        let mut settings = Builder::new();
        settings.max_concurrent_streams(streams);
        Self::with(settings, handle).await
    }

    /// Keeps every request until it is let go; connections allow so many streams at once.
    pub(crate) async fn holding(streams: u32) -> (Self, Arc<Mutex<Vec<Served>>>) {
        let held = Arc::<Mutex<Vec<Served>>>::default();
        let keep = held.clone();
        let server = Self::limited(streams, move |served| {
            keep.lock().unwrap().push(served);
            Then::GoOn
        });
        (server.await, held)
    }

    async fn with(settings: Builder, handle: impl Fn(Served) -> Then + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        let handle = Arc::new(handle);
        let counts = Arc::<Counts>::default();
        let count = Arc::clone(&counts);
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let number = count.accepted.fetch_add(1, SeqCst);
                count.open.fetch_add(1, SeqCst);
                let (settings, handle, open) = (settings.clone(), handle.clone(), Open(count.clone()));
                connections.spawn(async move {
                    let _open = open;
                    serve(tcp, settings, number, handle).await;
                });
            }
        });
        Self { addr, counts, _task: task }
    }

    /// Connections accepted so far.
    pub(crate) fn accepted(&self) -> usize {
        self.counts.accepted.load(SeqCst)
    }

    /// Connections open now.
    pub(crate) fn open(&self) -> usize {
        self.counts.open.load(SeqCst)
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

async fn serve(tcp: TcpStream, settings: Builder, connection: usize, handle: Arc<impl Fn(Served) -> Then>) {
    let Ok(mut h2): Result<Connection<TcpStream, Bytes>, _> = settings.handshake(tcp).await else { return };
    let mut number = 0;
    while let Some(Ok((request, respond))) = h2.accept().await {
        match handle(Served { connection, number, request, respond }) {
            Then::GoOn => {}
            Then::GoAway => h2.graceful_shutdown(),
            Then::Freeze => std::future::pending().await,
            Then::Cut => return,
        }
        number += 1;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, SeqCst);
    }
}

impl Served {
    /// A response without a body.
    pub(crate) fn status(mut self, status: u16) {
        let head = Response::builder().status(status).body(()).unwrap();
        self.respond.send_response(head, true).unwrap();
    }

    /// A gRPC response of trailers only, with these beside the status.
    pub(crate) fn fail(mut self, code: i32, trailers: &[(&'static str, &'static str)]) {
        let mut head = Response::builder().header("content-type", "application/grpc").header("grpc-status", code);
        for (name, value) in trailers {
            head = head.header(*name, *value);
        }
        self.respond.send_response(head.body(()).unwrap(), true).unwrap();
    }

    /// The head of a gRPC response and one empty message; the stream goes on.
    pub(crate) fn begin(&mut self) -> SendStream<Bytes> {
        let head = Response::builder().header("content-type", "application/grpc").body(()).unwrap();
        let mut body = self.respond.send_response(head, false).unwrap();
        body.send_data(Bytes::from_static(&[0; 5]), false).unwrap();
        body
    }

    /// A gRPC response with one empty message.
    pub(crate) fn ok(mut self) {
        let mut body = self.begin();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("0"));
        body.send_trailers(trailers).unwrap();
    }
}
