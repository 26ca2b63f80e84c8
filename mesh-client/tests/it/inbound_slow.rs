//! Clients of a server that do not go on: with the body of their request, or with reading the answer.

use crate::support::{
    ANY, GUARD,
    inbound::{Running, Seen, Serving},
    until,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, request};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    Inbound,
    access_log::{AccessLog, ResponseFlags},
    inbound::{Limits, RequestBody, RequestBodyError},
};
use std::{convert::Infallible, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;

const SHORT: Duration = Duration::from_millis(200);
const PIECE: usize = 64 << 10;
const PIECES: usize = 1 << 10;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

type Body = StreamBody<ReceiverStream<Result<Frame<Bytes>, Infallible>>>;
type Feed = mpsc::Sender<Result<Frame<Bytes>, Infallible>>;

/// A server that is impatient, and reads all of a request before it answers: with that, or with many pieces at `/large`.
struct Impatient {
    serving: Serving,
    seen: Arc<Seen>,
    logs: mpsc::UnboundedReceiver<AccessLog>,
}

impl Impatient {
    async fn start() -> Self {
        let limits = Limits::default().stream_idle_timeout(Some(SHORT)).keepalive(None);
        let (log, logs) = mpsc::unbounded_channel();
        let hook = move |entry: &AccessLog| _ = log.send(entry.clone());
        let inbound = Inbound::builder().limits(limits).access_log(hook).bind(ANY).await.unwrap();
        let seen = Arc::<Seen>::default();
        let served = seen.clone();
        let service = tower::service_fn(move |request: Request<RequestBody>| {
            let running = Running::of(&served);
            async move {
                let large = request.uri().path() == "/large";
                let read = request.into_body().collect().await?.to_bytes();
                drop(running);
                let pieces = if large { vec![Bytes::from_static(&[b'x'; PIECE]); PIECES] } else { vec![read] };
                let pieces = pieces.into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(piece)));
                Ok::<_, RequestBodyError>(Response::new(StreamBody::new(futures::stream::iter(pieces))))
            }
        });
        Self { serving: Serving::of(inbound, service), seen, logs }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.serving.addr).await.unwrap()
    }

    /// Of the next request that ends.
    async fn logged(&mut self) -> (u16, Option<u32>, String) {
        let AccessLog { status, grpc_status, flags, .. } =
            timeout(GUARD, self.logs.recv()).await.expect("it is logged").unwrap();
        assert_eq!(flags, ResponseFlags::STREAM_IDLE_TIMEOUT, "alone");
        (status, grpc_status, flags.to_string())
    }

    async fn is_gone(&self) {
        until("the handler is gone", async || self.seen.running() == 0).await;
    }
}

fn fed(head: request::Builder) -> (Feed, Request<Body>) {
    let (feed, fed) = mpsc::channel(1);
    feed.try_send(Ok(Frame::data(Bytes::from_static(b"some")))).unwrap();
    (feed, head.body(StreamBody::new(ReceiverStream::new(fed))).unwrap())
}

#[tokio::test]
async fn a_body_that_does_not_come_is_answered_with_408() {
    let mut server = Impatient::start().await;
    let io = TokioIo::new(server.connect().await);
    let (mut client, connection) =
        hyper::client::conn::http2::Builder::new(TokioExecutor::new()).handshake(io).await.unwrap();
    tokio::spawn(connection);
    let (_feed, request) = fed(Request::post("http://x.test/"));
    let answer = timeout(GUARD, client.send_request(request)).await.expect("it is answered").unwrap();
    assert_eq!(answer.status(), StatusCode::REQUEST_TIMEOUT);
    assert_eq!(server.logged().await, (408, None, "SI".to_owned()));
    server.is_gone().await;

    // Others of that connection, and callers of gRPC.
    let (feed, request) = fed(Request::post("http://x.test/"));
    drop(feed);
    assert_eq!(timeout(GUARD, client.send_request(request)).await.unwrap().unwrap().status(), StatusCode::OK);
    timeout(GUARD, server.logs.recv()).await.unwrap().unwrap();
    let (_feed, request) = fed(Request::post("http://x.test/").header("content-type", "application/grpc"));
    let answer = timeout(GUARD, client.send_request(request)).await.expect("it is answered").unwrap();
    assert_eq!((answer.status(), answer.headers()["grpc-status"].as_bytes()), (StatusCode::OK, &b"4"[..]));
    assert_eq!(server.logged().await, (200, Some(4), "SI".to_owned()));
    server.is_gone().await;

    let mut socket = server.connect().await;
    socket.write_all(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nsome").await.unwrap();
    let mut answer = Vec::new();
    timeout(GUARD, socket.read_to_end(&mut answer)).await.expect("the connection ends").unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(server.logged().await, (408, None, "SI".to_owned()));
    server.is_gone().await;
}

#[tokio::test]
async fn an_answer_that_nobody_reads_is_given_up() {
    const RST_STREAM: u8 = 3;
    let mut server = Impatient::start().await;
    let mut socket = server.connect().await;
    let head = b"\0\0\x0a\x01\x05\0\0\0\x01\x83\x86\x44\x06/large";
    socket.write_all(&[PREFACE, head].concat()).await.unwrap();
    let reset = async {
        let mut head = [0; 9];
        loop {
            socket.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            socket.read_exact(&mut payload).await.unwrap();
            if head[3] == RST_STREAM {
                return payload;
            }
        }
    };
    assert_eq!(timeout(GUARD, reset).await.expect("its window stays closed"), [0, 0, 0, 8], "CANCEL");
    assert_eq!(server.logged().await, (200, None, "SI".to_owned()));

    // Over HTTP/1.1 the connection ends.
    let mut socket = server.connect().await;
    socket.write_all(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    assert_eq!(server.logged().await, (200, None, "SI".to_owned()));
    let mut left = Vec::new();
    // Cut, or at its end.
    let _ = timeout(GUARD, socket.read_to_end(&mut left)).await.expect("it has ended");
    assert!(left.len() < PIECES * PIECE);
}
