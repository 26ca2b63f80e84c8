//! An HTTP/2 server whose streams and connections a test handles by hand.

use bytes::Bytes;
use h2::{
    RecvStream, SendStream,
    server::{Connection, SendResponse, handshake},
};
use http::{HeaderMap, HeaderValue, Request, Response};
use std::{net::SocketAddr, sync::Arc};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Serves until dropped.
pub(crate) struct H2Server {
    addr: SocketAddr,
    _task: JoinSet<()>,
}

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
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let mut task = JoinSet::new();
        let handle = Arc::new(handle);
        task.spawn(async move {
            let mut connections = JoinSet::new();
            let mut number = 0;
            while let Ok((tcp, _)) = listener.accept().await {
                connections.spawn(serve(tcp, number, handle.clone()));
                number += 1;
            }
        });
        Self { addr, _task: task }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }
}

async fn serve(tcp: TcpStream, connection: usize, handle: Arc<impl Fn(Served) -> Then>) {
    let Ok(mut h2): Result<Connection<TcpStream, Bytes>, _> = handshake(tcp).await else { return };
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

impl Served {
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
