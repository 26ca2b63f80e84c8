//! What a client may send and what it may not, frame by frame (RFC 9113), and what a server makes of it.

use super::{
    frames::{
        ACK, CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PADDED, PING, PRIORITY, PUSH_PROMISE,
        RST_STREAM, SETTINGS, WINDOW_UPDATE, WITH_PRIORITY, field, frame, setting,
    },
    support::within,
};
use crate::transport::{BoxError, Control, Keepalive, LOOKS, RequestBody, Server, ServerConfig, serve_http1};
use bytes::{Bytes, BytesMut};
use h2::Reason;
use http::{Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, Full, StreamBody};
use proptest::prelude::*;
use std::{convert::Infallible, future, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
    runtime::Handle,
    task::JoinHandle,
};
use tower::Service;

/// `:method: POST`, `:scheme: http`, `:path: /`, and an authority.
fn request() -> Vec<u8> {
    [&[0x83, 0x86, 0x84][..], &field(":authority", "x.test")].concat()
}

fn head(stream: u32, flags: u8, fields: &[&[u8]]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | flags, stream, &[&request()[..], &fields.concat()].concat())
}

fn config() -> ServerConfig {
    ServerConfig {
        connection_window: 1 << 20,
        max_header_list_size: 16 << 10,
        max_concurrent_streams: 8,
        keepalive: None,
        ..ServerConfig::default()
    }
}

/// Answers with what it read, or how that failed; at `/hang`, never; at `/cookie`, with the first of the cookies.
async fn service(request: Request<RequestBody>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() == "/hang" {
        future::pending::<()>().await;
    }
    if request.uri().path() == "/cookie" {
        let cookie = request.headers()["cookie"].as_bytes();
        return Ok(Response::new(Full::new(Bytes::copy_from_slice(cookie))));
    }
    let read = match request.into_body().collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) => error.to_string().into(),
    };
    Ok(Response::new(Full::new(read)))
}

/// A client made of bytes, and the server behind it.
struct Peer {
    io: DuplexStream,
    control: Control,
    server: JoinHandle<()>,
}

impl Peer {
    async fn start(config: &ServerConfig) -> Self {
        let mut peer = Self::of(config, b"", tower::service_fn(service));
        peer.send(&frame(SETTINGS, 0, 0, &[])).await;
        peer
    }

    /// Of a server that has read some bytes already.
    fn of<S, B>(config: &ServerConfig, read: &[u8], service: S) -> Self
    where
        S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let (io, server) = tokio::io::duplex(1 << 20);
        let server = Server::new(server, BytesMut::from(read), config, service);
        let control = server.control();
        Self { io, control, server: tokio::spawn(server) }
    }

    async fn send(&mut self, bytes: &[u8]) {
        // A server that has enough closes.
        let _ = self.io.write_all(bytes).await;
    }

    /// The next frame: kind, flags, stream, payload. `None`: the server closed.
    async fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.io.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.io.read_exact(&mut payload).await.ok()?;
        Some((kind, flags, u32::from_be_bytes(stream), payload))
    }

    async fn find(&mut self, kind: u8, stream: u32) -> Option<(u8, Vec<u8>)> {
        within(async {
            loop {
                let next = self.next().await?;
                if (next.0, next.2) == (kind, stream) {
                    return Some((next.1, next.3));
                }
            }
        })
        .await
    }

    async fn reason(&mut self, kind: u8, stream: u32) -> Option<Reason> {
        let (_, payload) = self.find(kind, stream).await?;
        Some(Reason::from(u32::from_be_bytes(*payload.last_chunk().expect("four bytes"))))
    }

    /// A whole call on this stream.
    async fn call(&mut self, stream: u32) {
        self.send(&[head(stream, 0, &[]), frame(DATA, END_STREAM, stream, b"fine")].concat()).await;
        self.is_answered(stream, b"fine").await;
    }

    async fn is_answered(&mut self, stream: u32, body: &[u8]) {
        let (flags, block) = self.find(HEADERS, stream).await.expect("an answer");
        assert_eq!((flags & END_HEADERS, block.first()), (END_HEADERS, Some(&0x88)), "200");
        let (flags, data) = self.find(DATA, stream).await.expect("its body");
        assert_eq!((flags, &data[..]), (END_STREAM, body));
    }
}

#[tokio::test]
async fn what_breaks_the_connection_is_answered_by_a_goaway_with_its_reason() {
    let half = frame(HEADERS, 0, 1, &request());
    let large = vec![0; 16_385];
    let open = head(1, 0, &[]);
    let cases = [
        ("data of no stream", frame(DATA, 0, 0, b"x"), Reason::PROTOCOL_ERROR),
        ("headers of no stream", frame(HEADERS, END_HEADERS, 0, &request()), Reason::PROTOCOL_ERROR),
        ("a stream with an even number", head(2, END_STREAM, &[]), Reason::PROTOCOL_ERROR),
        ("data of a stream nobody opened", frame(DATA, 0, 5, b"x"), Reason::PROTOCOL_ERROR),
        ("reset of a stream nobody opened", frame(RST_STREAM, 0, 5, &[0; 4]), Reason::PROTOCOL_ERROR),
        ("window of a stream nobody opened", frame(WINDOW_UPDATE, 0, 5, &[0, 0, 0, 1]), Reason::PROTOCOL_ERROR),
        ("a push", [&open[..], &frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2])].concat(), Reason::PROTOCOL_ERROR),
        ("push of two", frame(SETTINGS, 0, 0, &setting(2, 2)), Reason::PROTOCOL_ERROR),
        ("a frame of more than 16 KiB", [&open[..], &frame(DATA, 0, 1, &large)].concat(), Reason::FRAME_SIZE_ERROR),
        ("a frame within a header block", [&half[..], &frame(PING, 0, 0, &[0; 8])].concat(), Reason::PROTOCOL_ERROR),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, &[]), Reason::PROTOCOL_ERROR),
        ("a header of no table", frame(HEADERS, END_HEADERS, 1, &[0xff, 0x01]), Reason::COMPRESSION_ERROR),
        (
            "a block without end",
            [half.clone(), frame(CONTINUATION, 0, 1, &large[1..]).repeat(5)].concat(),
            Reason::ENHANCE_YOUR_CALM,
        ),
        ("a block of nothing", [half.clone(), frame(CONTINUATION, 0, 1, &[])].concat(), Reason::ENHANCE_YOUR_CALM),
        ("a lower number", [head(5, END_STREAM, &[]), head(3, END_STREAM, &[])].concat(), Reason::STREAM_CLOSED),
        (
            "too many resets",
            [head(1, 0, &[]), frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]).repeat(1001)].concat(),
            Reason::ENHANCE_YOUR_CALM,
        ),
        ("too many pings", frame(PING, 0, 0, &[0; 8]).repeat(2100), Reason::ENHANCE_YOUR_CALM),
        ("too many settings", frame(SETTINGS, 0, 0, &[]).repeat(2100), Reason::ENHANCE_YOUR_CALM),
        ("too many priorities", frame(PRIORITY, 0, 1, &[0; 5]).repeat(2100), Reason::ENHANCE_YOUR_CALM),
        (
            "too much empty data",
            [open.clone(), frame(DATA, 0, 1, &[]).repeat(2100)].concat(),
            Reason::ENHANCE_YOUR_CALM,
        ),
    ];
    for (what, bytes, reason) in cases {
        let mut peer = Peer::start(&config()).await;
        let (mut read, mut write) = tokio::io::split(peer.io);
        let sending = async {
            let _ = write.write_all(&bytes).await;
            write
        };
        // Read as well: answers that nobody reads would hold up the rest.
        let receiving = async {
            let mut all = Vec::new();
            let _ = read.read_to_end(&mut all).await;
            (read, all)
        };
        let (write, (read, all)) = within(async { tokio::join!(sending, receiving) }).await;
        drop((read, write));
        let goaway = all.windows(17).rev().find(|bytes| bytes[..9] == [0, 0, 8, GOAWAY, 0, 0, 0, 0, 0]);
        let goaway = goaway.unwrap_or_else(|| panic!("no GOAWAY after {what}"));
        let given = Reason::from(u32::from_be_bytes(*goaway.last_chunk().expect("four")));
        assert_eq!(given, reason, "{what}");
        within(&mut peer.server).await.expect("no panic");
    }
}

#[tokio::test]
async fn rapid_resets_end_the_connection_whoever_sends_them() {
    let reset = |stream| [head(stream, END_STREAM, &[]), frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])].concat();
    floods(reset).await;
    // CVE-2025-8671: the server is made to.
    floods(|stream| [head(stream, 0, &[]), frame(WINDOW_UPDATE, 0, stream, &[0; 4])].concat()).await;
    floods(|stream| [head(stream, 0, &[&field("content-length", "1")]), frame(DATA, 0, stream, b"two")].concat()).await;
}

/// Ten thousand of these are too many.
async fn floods(bytes: impl Fn(u32) -> Vec<u8>) {
    let mut peer = Peer::start(&config()).await;
    let (mut read, mut write) = tokio::io::split(peer.io);
    let sending = async {
        for stream in (1..20_001).step_by(2) {
            if write.write_all(&bytes(stream)).await.is_err() {
                return stream;
            }
        }
        0
    };
    let receiving = async {
        let mut all = Vec::new();
        let _ = read.read_to_end(&mut all).await;
        all
    };
    let (stopped, _) = within(async { tokio::join!(sending, receiving) }).await;
    assert_ne!(stopped, 0, "ten thousand resets are too many");
    within(&mut peer.server).await.expect("no panic");
}

#[tokio::test]
async fn what_breaks_a_stream_resets_that_one_only() {
    let block = |fields: &[&[u8]]| frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields.concat());
    let [method, scheme, path] = [&[0x83][..], &[0x86], &[0x84]];
    let cases = [
        ("no method", block(&[scheme, path])),
        ("no scheme", block(&[method, path])),
        ("no path", block(&[method, scheme])),
        ("an empty path", block(&[method, scheme, &field(":path", "")])),
        ("a path without a slash", block(&[method, scheme, &field(":path", "x")])),
        ("two paths", block(&[method, scheme, path, path])),
        ("a status", block(&[method, scheme, path, &[0x88]])),
        ("a pseudo header nobody knows", block(&[method, scheme, path, &field(":x", "1")])),
        ("a pseudo header behind another", block(&[method, scheme, &field("a", "b"), path])),
        ("another host", head(1, END_STREAM, &[&field("host", "y.test")])),
        ("two hosts", head(1, END_STREAM, &[&field("host", "x.test"), &field("host", "x.test")])),
        ("a user", block(&[method, scheme, path, &field(":authority", "u@x.test")])),
        ("a user of the host", block(&[method, scheme, path, &field("host", "u@x.test")])),
        ("space before a value", head(1, END_STREAM, &[&field("a", " b")])),
        ("a tab behind a value", head(1, END_STREAM, &[&field("a", "b\t")])),
        ("capitals", head(1, END_STREAM, &[&field("A", "b")])),
        ("a line break", head(1, END_STREAM, &[&field("a", "b\nc")])),
        ("connection", head(1, END_STREAM, &[&field("connection", "close")])),
        ("te of another kind", head(1, END_STREAM, &[&field("te", "gzip")])),
        ("a length without content", head(1, END_STREAM, &[&field("content-length", "4")])),
        ("two lengths", head(1, 0, &[&field("content-length", "4"), &field("content-length", "5")])),
        ("too much data", [head(1, 0, &[&field("content-length", "2")]), frame(DATA, 0, 1, b"four")].concat()),
        (
            "too little data",
            [head(1, 0, &[&field("content-length", "9")]), frame(DATA, END_STREAM, 1, b"four")].concat(),
        ),
        ("CONNECT with a path", block(&[&field(":method", "CONNECT"), path, &field(":authority", "x")])),
        ("trailers that go on", [head(1, 0, &[]), frame(HEADERS, END_HEADERS, 1, &field("a", "b"))].concat()),
        ("a path in trailers", [head(1, 0, &[]), frame(HEADERS, END_HEADERS | END_STREAM, 1, path)].concat()),
        ("no more window", [head(1, 0, &[]), frame(WINDOW_UPDATE, 0, 1, &[0; 4])].concat()),
    ];
    for (what, bytes) in cases {
        let mut peer = Peer::start(&config()).await;
        peer.send(&bytes).await;
        assert_eq!(peer.reason(RST_STREAM, 1).await, Some(Reason::PROTOCOL_ERROR), "{what}");
        peer.call(3).await;
    }
}

#[tokio::test]
async fn what_a_client_may_send_is_taken() {
    let data = frame(DATA, END_STREAM, 1, b"fine");
    let start = head(1, 0, &[]);
    let cases = [
        ("kinds nobody knows", [frame(0xfa, 0xff, 1, b"?"), start.clone(), data.clone()].concat()),
        ("push allowed", [frame(SETTINGS, 0, 0, &setting(2, 1)), start.clone(), data.clone()].concat()),
        ("priorities", [frame(PRIORITY, 0, 1, &[0; 5]), start.clone(), data.clone()].concat()),
        ("the same host", [head(1, 0, &[&field("host", "x.test")]), data.clone()].concat()),
        (
            "padding and a priority",
            [
                frame(
                    HEADERS,
                    END_HEADERS | PADDED | WITH_PRIORITY,
                    1,
                    &[&[2, 0, 0, 0, 0, 1][..], &request(), &[0, 0]].concat(),
                ),
                frame(DATA, END_STREAM | PADDED, 1, b"\x03fine\0\0\0"),
            ]
            .concat(),
        ),
        (
            "headers in pieces",
            [
                frame(HEADERS, 0, 1, &request()),
                frame(CONTINUATION, 0, 1, &field("a", "b")),
                frame(CONTINUATION, END_HEADERS, 1, &[]),
                data.clone(),
            ]
            .concat(),
        ),
        (
            "empty data",
            [&start[..], &frame(DATA, 0, 1, &[]), &frame(DATA, 0, 1, b"fine"), &frame(DATA, END_STREAM, 1, &[])]
                .concat(),
        ),
        (
            "trailers",
            [&start[..], &frame(DATA, 0, 1, b"fine"), &frame(HEADERS, END_HEADERS | END_STREAM, 1, &field("a", "b"))]
                .concat(),
        ),
        ("the right length", [head(1, 0, &[&field("content-length", "4")]), data.clone()].concat()),
        ("a window behind the end", [&start[..], &data, &frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 9])].concat()),
        ("a reset behind the end", [&start[..], &data, &frame(PING, 0, 0, &[0; 8])].concat()),
        ("a goaway of no error", [&start[..], &data, &frame(GOAWAY, 0, 0, &[0; 8])].concat()),
    ];
    for (what, bytes) in cases {
        for piece in [bytes.len(), 1] {
            let mut peer = Peer::start(&config()).await;
            for piece in bytes.chunks(piece) {
                peer.send(piece).await;
                tokio::task::yield_now().await;
            }
            peer.is_answered(1, b"fine").await;
            peer.call(3).await;
            assert!(!peer.server.is_finished(), "{what}");
        }
    }
}

#[tokio::test]
async fn a_client_that_asks_before_it_sends_is_told_to_go_on() {
    let mut peer = Peer::start(&config()).await;
    peer.send(&head(1, 0, &[&field("expect", "100-continue")])).await;
    let (flags, block) = peer.find(HEADERS, 1).await.expect("an interim answer");
    assert_eq!(flags, END_HEADERS);
    assert!(block.ends_with(b"100"), "{block:?}");
    peer.send(&frame(DATA, END_STREAM, 1, b"fine")).await;
    peer.is_answered(1, b"fine").await;
}

#[tokio::test]
async fn large_headers_are_answered_with_431_and_the_tables_stay_the_same() {
    let mut peer = Peer::start(&config()).await;
    let long: Vec<u8> = (0..150).flat_map(|_| field("x-long", &"v".repeat(120))).collect();
    // The last field enters the table.
    let last = [&[0x40, 1][..], b"t", &[1], b"1"].concat();
    let block = [&request()[..], &long, &last].concat();
    let (first, rest) = block.split_at(16_000);
    peer.send(&[frame(HEADERS, END_STREAM, 1, first), frame(CONTINUATION, END_HEADERS, 1, rest)].concat()).await;
    let (flags, block) = peer.find(HEADERS, 1).await.expect("an answer");
    assert_eq!(flags, END_HEADERS | END_STREAM);
    assert!(block.ends_with(b"431"), "{block:?}");
    // 62: the first entry of the dynamic table.
    peer.send(&[head(3, 0, &[&[0x80 | 62]]), frame(DATA, END_STREAM, 3, b"fine")].concat()).await;
    peer.is_answered(3, b"fine").await;
}

#[tokio::test]
async fn streams_above_the_limit_are_refused_however_many_were_reset() {
    let mut peer = Peer::start(&config()).await;
    let hang = |stream| {
        let fields = [&[0x83, 0x86][..], &field(":path", "/hang")].concat();
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &fields)
    };
    for stream in (1..17).step_by(2) {
        peer.send(&hang(stream)).await;
    }
    peer.send(&hang(17)).await;
    assert_eq!(peer.reason(RST_STREAM, 17).await, Some(Reason::REFUSED_STREAM));
    assert_eq!(peer.control.serving(), 8);
    peer.send(&frame(RST_STREAM, 0, 1, &[0, 0, 0, 8])).await;
    within(async {
        while peer.control.serving() == 8 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    peer.call(19).await;
}

#[tokio::test(start_paused = true)]
async fn a_goodbye_comes_in_two_steps_and_ends_with_the_last_answer() {
    let mut peer = Peer::start(&config()).await;
    peer.send(&head(1, 0, &[])).await;
    peer.find(SETTINGS, 0).await.expect("ours");
    peer.control.leave();
    let (_, first) = peer.find(GOAWAY, 0).await.expect("a first goodbye");
    assert_eq!(&first[..4], [0x7f, 0xff, 0xff, 0xff], "all streams that are on their way");
    let (_, ping) = peer.find(PING, 0).await.expect("a ping");
    // It crossed the goodbye.
    peer.call(3).await;
    peer.send(&frame(PING, ACK, 0, &ping)).await;
    let (_, second) = peer.find(GOAWAY, 0).await.expect("a second");
    assert_eq!(second, [0, 0, 0, 3, 0, 0, 0, 0]);
    // Too late: it is not answered, nor does it end the others.
    peer.send(&[head(5, 0, &[]), frame(DATA, 0, 5, b"late")].concat()).await;
    peer.send(&frame(HEADERS, END_HEADERS | END_STREAM, 5, &field("a", "b"))).await;
    peer.send(&frame(DATA, END_STREAM, 1, b"fine")).await;
    peer.is_answered(1, b"fine").await;
    assert_eq!(within(peer.next()).await, None, "and closes");
    assert!(!peer.server.is_finished(), "it reads what is still on its way");
    peer.send(&frame(PING, 0, 0, &[0; 8])).await;
    drop(peer.io);
    within(peer.server).await.expect("no panic");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_close_after_the_goodbye_is_not_waited_for_long() {
    let mut peer = Peer::start(&config()).await;
    peer.control.leave();
    within(&mut peer.server).await.expect("no panic");
}

#[tokio::test]
async fn nothing_of_a_connection_is_left_behind_its_end() {
    let keepalive = Some(Keepalive::default());
    let mut peer = Peer::start(&ServerConfig { keepalive, ..config() }).await;
    peer.call(1).await;
    let Peer { io, server, .. } = peer;
    drop(io);
    within(server).await.expect("no panic");
    within(async {
        while Handle::current().metrics().num_alive_tasks() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn what_came_with_the_preface_is_answered_without_a_further_byte() {
    let read = [frame(SETTINGS, 0, 0, &[]), head(1, 0, &[]), frame(DATA, END_STREAM, 1, b"fine")].concat();
    let mut peer = Peer::of(&config(), &read, tower::service_fn(service));
    peer.is_answered(1, b"fine").await;
}

#[tokio::test]
async fn several_cookies_are_one() {
    let mut peer = Peer::start(&config()).await;
    let cookies = ["a=1", "b=2", "c=3"].map(|cookie| field("cookie", cookie)).concat();
    let block = [&[0x83, 0x86][..], &field(":path", "/cookie"), &cookies].concat();
    peer.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)).await;
    peer.is_answered(1, b"a=1; b=2; c=3").await;
}

#[tokio::test]
async fn an_answer_that_fails_is_an_error_of_the_server() {
    let service = tower::service_fn(|_: Request<RequestBody>| {
        let some = Ok(Frame::data(Bytes::from_static(b"some")));
        let frames = futures::stream::iter([some, Err(std::io::Error::other("broken"))]);
        future::ready(Ok::<_, Infallible>(Response::new(StreamBody::new(frames))))
    });
    let mut peer = Peer::of(&config(), &frame(SETTINGS, 0, 0, &[]), service);
    peer.send(&head(1, END_STREAM, &[])).await;
    assert_eq!(peer.reason(RST_STREAM, 1).await, Some(Reason::INTERNAL_ERROR));
}

/// What HTTP/1.1 answers to a request that was read when it was to leave.
async fn http1(head: &'static str) -> String {
    let (mut io, server) = tokio::io::duplex(1 << 16);
    let (config, service) = (config(), tower::service_fn(service));
    let served = serve_http1(server, Bytes::from(format!("{head}\r\n\r\n")), &config, service, future::ready(()));
    let mut answer = String::new();
    let (_, read) = within(async { tokio::join!(served, io.read_to_string(&mut answer)) }).await;
    read.expect("text");
    answer
}

#[tokio::test]
async fn a_request_of_http1_that_was_read_is_answered_before_the_goodbye() {
    let answer = http1("GET / HTTP/1.1\r\nhost: x.test").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}

#[tokio::test]
async fn a_request_of_http1_has_one_host() {
    let answer = http1("GET http://x.test/ HTTP/1.1\r\nhost: x.test").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    for head in [
        "GET / HTTP/1.1\r\nhost: x.test\r\nhost: y.test",
        "GET / HTTP/1.1\r\nhost: u@x.test",
        "GET http://x.test/ HTTP/1.1\r\nhost: y.test",
        "GET http://u@x.test/ HTTP/1.1\r\nhost: u@x.test",
    ] {
        let answer = http1(head).await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{head}: {answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_silent_client_with_a_request_is_given_up() {
    let keepalive =
        Keepalive { interval: Duration::from_secs(10), timeout: Duration::from_secs(5), ..Keepalive::default() };
    let mut peer = Peer::start(&ServerConfig { keepalive: Some(keepalive), ..config() }).await;
    peer.send(&head(1, 0, &[])).await;
    peer.find(PING, 0).await.expect("a ping");
    assert_eq!(within(peer.find(PING, 0)).await, None, "closed without an answer");
    within(&mut peer.server).await.expect("no panic");
}

#[tokio::test]
async fn a_client_that_does_not_read_its_answers_is_not_served_without_end() {
    let mut peer = Peer::start(&config()).await;
    let mut stream = 1;
    let held_up = async {
        loop {
            let some: Vec<u8> = (0..64).flat_map(|i| head(stream + 2 * i, END_STREAM, &[])).collect();
            // It waits with what it does not take; or has had enough.
            if !matches!(tokio::time::timeout(Duration::from_secs(1), peer.io.write_all(&some)).await, Ok(Ok(()))) {
                return;
            }
            stream += 128;
            tokio::task::yield_now().await;
        }
    };
    within(held_up).await;
}

#[tokio::test]
async fn windows_hold_back_answers_and_are_given_back_for_requests() {
    let mut peer = Peer::start(&config()).await;
    // Three bytes for each new stream.
    peer.send(&frame(SETTINGS, 0, 0, &setting(4, 3))).await;
    peer.send(&[head(1, 0, &[]), frame(DATA, END_STREAM, 1, b"fine")].concat()).await;
    assert_eq!(peer.find(DATA, 1).await, Some((0, b"fin".to_vec())));
    peer.send(&frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 1])).await;
    assert_eq!(peer.find(DATA, 1).await, Some((END_STREAM, b"e".to_vec())));
    peer.send(&head(3, 0, &[])).await;
    for _ in 0..40 {
        peer.send(&frame(DATA, 0, 3, &[7; 16_000])).await;
    }
    let (_, more) = peer.find(WINDOW_UPDATE, 3).await.expect("it reads");
    assert!(u32::from_be_bytes(*more.first_chunk().expect("four")) >= 1 << 19);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn no_frames_make_it_panic_or_hang(
        frames in prop::collection::vec((0u8..11, any::<u8>(), 0u32..8, prop::collection::vec(any::<u8>(), 0..40)), 0..40),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("runtime");
        runtime.block_on(async {
            let mut peer = Peer::start(&config()).await;
            for (kind, flags, stream, payload) in frames {
                let valid = [head(stream | 1, flags & END_STREAM, &[]), frame(kind, flags, stream, &payload)].concat();
                peer.send(&valid).await;
            }
            let Peer { io, server, .. } = peer;
            drop(io);
            within(server).await.expect("no panic");
        });
    }
}

#[tokio::test]
async fn headers_of_all_requests_together_are_bounded() {
    let config = ServerConfig { max_header_bytes: 32 << 10, max_concurrent_streams: 1000, ..config() };
    let mut peer = Peer::start(&config).await;
    // 9730 bytes, as HTTP/2 counts them.
    let fields = field("x-large", &"x".repeat(100)).repeat(70);
    let large = |stream: u32| head(stream, 0, &[&fields]);
    // Whether they come one by one or together.
    peer.send(&large(1)).await;
    peer.call(3).await;
    peer.send(&[large(5), large(7), large(9), large(11)].concat()).await;
    for stream in [9, 11] {
        assert_eq!(peer.reason(RST_STREAM, stream).await, Some(Reason::REFUSED_STREAM));
    }
    // Small ones have room, and the large ones are served.
    peer.call(13).await;
    for stream in [1, 5, 7] {
        peer.send(&frame(DATA, END_STREAM, stream, b"fine")).await;
        peer.is_answered(stream, b"fine").await;
    }
    peer.send(&[large(15), large(17), large(19)].concat()).await;
    for stream in [15, 17, 19] {
        peer.send(&frame(DATA, END_STREAM, stream, b"fine")).await;
        peer.is_answered(stream, b"fine").await;
    }
    let trailers = frame(HEADERS, END_HEADERS | END_STREAM, 21, &fields);
    peer.send(&[head(21, 0, &[]), trailers].concat()).await;
    assert_eq!(peer.reason(RST_STREAM, 21).await, Some(Reason::PROTOCOL_ERROR), "trailers are small");
}

#[tokio::test]
async fn a_window_that_opens_by_bytes_holds_nobody_up_for_ever() {
    const STREAMS: u32 = 40;
    const SIZE: usize = 10 << 10;
    let config = ServerConfig { max_concurrent_streams: 1000, ..config() };
    let body = |_| async { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![0; SIZE])))) };
    let mut peer = Peer::of(&config, b"", tower::service_fn(body));
    let requests: Vec<_> = (0..STREAMS).flat_map(|n| head(2 * n + 1, END_STREAM, &[])).collect();
    peer.send(&[frame(SETTINGS, 0, 0, &[]), requests].concat()).await;
    let more = |bytes: u32| frame(WINDOW_UPDATE, 0, 0, &bytes.to_be_bytes());
    for _ in 0..100 {
        peer.send(&more(1)).await;
    }
    for step in [1000, 10_000, 100_000, 1_000_000] {
        peer.send(&more(step)).await;
    }
    let (mut received, mut ended) = (0, 0);
    within(async {
        while ended < STREAMS {
            let (kind, flags, _, payload) = peer.next().await.expect("the connection lives");
            if kind == DATA {
                received += payload.len();
                ended += u32::from(flags & END_STREAM != 0);
            }
        }
    })
    .await;
    assert_eq!(received, SIZE * usize::try_from(STREAMS).unwrap());
}

/// A server that ends what does not go on for a minute, and is looked after.
async fn impatient() -> Peer {
    const MINUTE: Duration = Duration::from_secs(60);
    let mut peer = Peer::start(&ServerConfig { stream_idle: Some(MINUTE), ..config() }).await;
    let control = peer.control.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(MINUTE / LOOKS).await;
            control.look();
        }
    });
    peer.find(SETTINGS, 0).await.expect("its own");
    peer
}

#[tokio::test(start_paused = true)]
async fn a_body_that_goes_on_is_waited_for_and_one_that_stops_is_not() {
    let mut peer = impatient().await;
    peer.send(&head(1, 0, &[])).await;
    for _ in 0..10 {
        tokio::time::sleep(Duration::from_secs(40)).await;
        peer.send(&frame(DATA, 0, 1, b"x")).await;
    }
    peer.send(&frame(DATA, END_STREAM, 1, b"")).await;
    peer.is_answered(1, b"xxxxxxxxxx").await;
    // Who has nothing to wait for may take its time; frames without data are no progress.
    let hang = [&[0x83, 0x86][..], &field(":path", "/hang"), &field(":authority", "x.test")].concat();
    peer.send(&frame(HEADERS, END_HEADERS, 3, &hang)).await;
    peer.send(&head(5, 0, &[])).await;
    let begun = tokio::time::Instant::now();
    for _ in 0..8 {
        tokio::time::sleep(Duration::from_secs(10)).await;
        peer.send(&frame(DATA, 0, 5, b"")).await;
    }
    assert_eq!(peer.reason(RST_STREAM, 5).await, Some(Reason::CANCEL), "nobody answers in its handler's place");
    let took = begun.elapsed().as_secs();
    assert!((60..=100).contains(&took), "{took}");
    assert_eq!(peer.control.serving(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_answer_is_waited_for_while_its_client_reads() {
    let (io, server) = tokio::io::duplex(1 << 20);
    let limit = Duration::from_secs(60);
    let service = tower::service_fn(async |_: Request<RequestBody>| {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(vec![0; 65_535 + 10]))))
    });
    let server = Server::new(server, BytesMut::new(), &ServerConfig { stream_idle: Some(limit), ..config() }, service);
    let control = server.control();
    let mut peer = Peer { io, control: control.clone(), server: tokio::spawn(server) };
    let look = async || {
        tokio::time::sleep(limit / LOOKS).await;
        control.look();
    };
    peer.send(&[frame(SETTINGS, 0, 0, &[]), head(1, END_STREAM, &[])].concat()).await;
    // A byte each 45 seconds is progress, if little.
    for _ in 0..8 {
        for _ in 0..3 {
            look().await;
        }
        let one = 1_u32.to_be_bytes();
        peer.send(&[frame(WINDOW_UPDATE, 0, 0, &one), frame(WINDOW_UPDATE, 0, 1, &one)].concat()).await;
    }
    assert_eq!(control.serving(), 1);
    for _ in 0..=LOOKS {
        look().await;
    }
    assert_eq!(peer.reason(RST_STREAM, 1).await, Some(Reason::CANCEL));
    assert_eq!(control.serving(), 0);
}
