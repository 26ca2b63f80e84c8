//! What a peer may send and what it may not, frame by frame (RFC 9113).

use super::support::{collect, lease, origin, post, within};
use crate::transport::{Connection, Kind, Protocol, TransportConfig, TransportError};
use bytes::Bytes;
use h2::Reason;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PUSH_PROMISE: u8 = 5;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;

pub(super) const END_STREAM: u8 = 1;
pub(super) const ACK: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
pub(super) const PADDED: u8 = 8;
pub(super) const WITH_PRIORITY: u8 = 0x20;

/// `:status: 200` by its index.
const OK: &[u8] = &[0x88];

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("small").to_be_bytes();
    let head = [&length[1..], &[kind, flags], &stream.to_be_bytes()].concat();
    [&head, payload].concat()
}

pub(super) fn setting(name: u16, value: u32) -> Vec<u8> {
    [&name.to_be_bytes()[..], &value.to_be_bytes()].concat()
}

/// A literal field, not to be indexed.
pub(super) fn field(name: &str, value: &str) -> Vec<u8> {
    let length = |text: &str| u8::try_from(text.len()).expect("short");
    [&[0, length(name)], name.as_bytes(), &[length(value)], value.as_bytes()].concat()
}

/// A server made of bytes.
struct Peer(DuplexStream);

impl Peer {
    /// Connects a client to a peer that says `settings`.
    async fn connect(config: TransportConfig, settings: &[u8]) -> (Result<Connection, TransportError>, Self) {
        let (client, io) = tokio::io::duplex(1 << 20);
        let mut peer = Self(io);
        peer.send(&frame(SETTINGS, 0, 0, settings)).await;
        let connection = Connection::handshake(client, Protocol::Http2, &config, origin(), None).await;
        let mut preface = [0; 24];
        peer.0.read_exact(&mut preface).await.expect("preface");
        assert_eq!(&preface, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        (connection, peer)
    }

    async fn start() -> (Connection, Self) {
        let (connection, peer) = Self::connect(TransportConfig::default(), &[]).await;
        (connection.expect("handshake"), peer)
    }

    async fn send(&mut self, bytes: &[u8]) {
        // A client that has enough closes.
        let _ = self.0.write_all(bytes).await;
    }

    /// The next frame: kind, flags, stream, payload. `None`: the client closed.
    async fn next(&mut self) -> Option<(u8, u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.0.read_exact(&mut head).await.ok()?;
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        self.0.read_exact(&mut payload).await.ok()?;
        Some((kind, flags, u32::from_be_bytes(stream), payload))
    }

    /// The first frame of this kind from now on, and for this stream.
    async fn find(&mut self, kind: u8, stream: u32) -> Option<(u8, Vec<u8>)> {
        loop {
            let next = self.next().await?;
            if (next.0, next.2) == (kind, stream) {
                return Some((next.1, next.3));
            }
        }
    }

    /// The reason of a RST_STREAM or GOAWAY.
    async fn reason(&mut self, kind: u8, stream: u32) -> Option<Reason> {
        let (_, payload) = within(self.find(kind, stream)).await?;
        let last = payload.last_chunk().expect("four bytes");
        Some(Reason::from(u32::from_be_bytes(*last)))
    }
}

/// A response head and all of its body.
fn answer(stream: u32, body: &str) -> Vec<u8> {
    [frame(HEADERS, END_HEADERS, stream, OK), frame(DATA, END_STREAM, stream, body.as_bytes())].concat()
}

/// Sends `bytes` in answer to a request on stream 1.
async fn exchange(bytes: &[u8]) -> (Connection, Peer, Result<String, TransportError>) {
    let (connection, mut peer) = Peer::start().await;
    let call = tokio::spawn(call(lease(&connection)));
    within(peer.find(HEADERS, 1)).await.expect("a request");
    peer.send(bytes).await;
    (connection, peer, within(call).await.expect("no panic"))
}

async fn call(lease: crate::transport::Lease) -> Result<String, TransportError> {
    let response = lease.send(post("hello")).await?;
    let body = http_body_util::BodyExt::collect(response.into_body()).await?;
    Ok(String::from_utf8(body.to_bytes().to_vec()).expect("text"))
}

#[tokio::test]
async fn what_breaks_the_connection_is_answered_by_a_goaway_with_its_reason() {
    let large = vec![0; 16_385];
    let half = frame(HEADERS, 0, 1, OK);
    let cases = [
        ("data of no stream", frame(DATA, 0, 0, b"x"), Reason::PROTOCOL_ERROR),
        ("headers of no stream", frame(HEADERS, END_HEADERS, 0, OK), Reason::PROTOCOL_ERROR),
        ("a frame of more than 16 KiB", frame(DATA, 0, 1, &large), Reason::FRAME_SIZE_ERROR),
        ("an unknown frame of more than 16 KiB", frame(0xfa, 0, 0, &large), Reason::FRAME_SIZE_ERROR),
        ("a stream nobody opened", frame(HEADERS, END_HEADERS, 3, OK), Reason::PROTOCOL_ERROR),
        ("a stream of the server", frame(HEADERS, END_HEADERS, 2, OK), Reason::PROTOCOL_ERROR),
        ("data of a stream nobody opened", frame(DATA, 0, 5, b"x"), Reason::PROTOCOL_ERROR),
        ("reset of a stream nobody opened", frame(RST_STREAM, 0, 5, &[0; 4]), Reason::PROTOCOL_ERROR),
        ("window of a stream nobody opened", frame(WINDOW_UPDATE, 0, 5, &[0, 0, 0, 1]), Reason::PROTOCOL_ERROR),
        ("a short reset", frame(RST_STREAM, 0, 1, &[0; 3]), Reason::FRAME_SIZE_ERROR),
        ("a push", frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2]), Reason::PROTOCOL_ERROR),
        ("settings of a stream", frame(SETTINGS, 0, 1, &[]), Reason::PROTOCOL_ERROR),
        ("half a setting", frame(SETTINGS, 0, 0, &[0; 7]), Reason::FRAME_SIZE_ERROR),
        ("an ACK with settings", frame(SETTINGS, ACK, 0, &setting(3, 1)), Reason::FRAME_SIZE_ERROR),
        ("push allowed by a server", frame(SETTINGS, 0, 0, &setting(2, 1)), Reason::PROTOCOL_ERROR),
        ("windows of 2^31", frame(SETTINGS, 0, 0, &setting(4, 1 << 31)), Reason::FLOW_CONTROL_ERROR),
        ("frames of 100 bytes", frame(SETTINGS, 0, 0, &setting(5, 100)), Reason::PROTOCOL_ERROR),
        ("frames of 16 MiB", frame(SETTINGS, 0, 0, &setting(5, 1 << 24)), Reason::PROTOCOL_ERROR),
        ("a short ping", frame(PING, 0, 0, &[0; 7]), Reason::FRAME_SIZE_ERROR),
        ("ping of a stream", frame(PING, 0, 1, &[0; 8]), Reason::PROTOCOL_ERROR),
        ("a short goaway", frame(GOAWAY, 0, 0, &[0; 7]), Reason::FRAME_SIZE_ERROR),
        ("goaway of a stream", frame(GOAWAY, 0, 1, &[0; 8]), Reason::PROTOCOL_ERROR),
        ("no more window", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), Reason::PROTOCOL_ERROR),
        ("a window of 2^31", frame(WINDOW_UPDATE, 0, 0, &[0x7f, 0xff, 0xff, 0xff]), Reason::FLOW_CONTROL_ERROR),
        ("a short window update", frame(WINDOW_UPDATE, 0, 0, &[0; 3]), Reason::FRAME_SIZE_ERROR),
        ("priority of no stream", frame(PRIORITY, 0, 0, &[0; 5]), Reason::PROTOCOL_ERROR),
        ("a continuation of nothing", frame(CONTINUATION, END_HEADERS, 1, OK), Reason::PROTOCOL_ERROR),
        ("a frame within a header block", [&half[..], &frame(PING, 0, 0, &[0; 8])].concat(), Reason::PROTOCOL_ERROR),
        (
            "the block of another",
            [&half[..], &frame(CONTINUATION, END_HEADERS, 3, &[])].concat(),
            Reason::PROTOCOL_ERROR,
        ),
        ("a header of no table", frame(HEADERS, END_HEADERS, 1, &[0xff, 0x01]), Reason::COMPRESSION_ERROR),
        ("a header cut off", frame(HEADERS, END_HEADERS, 1, &[0x40, 0x05, b'a']), Reason::COMPRESSION_ERROR),
        ("more padding than frame", frame(DATA, PADDED, 1, &[5, 0, 0]), Reason::PROTOCOL_ERROR),
        ("padding of no length", frame(DATA, PADDED, 1, &[]), Reason::FRAME_SIZE_ERROR),
        ("no room for a priority", frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, &[0; 4]), Reason::FRAME_SIZE_ERROR),
        (
            "a block without end",
            [half.clone(), frame(CONTINUATION, 0, 1, &large[1..]).repeat(17)].concat(),
            Reason::ENHANCE_YOUR_CALM,
        ),
        ("a block of nothing", [half.clone(), frame(CONTINUATION, 0, 1, &[])].concat(), Reason::ENHANCE_YOUR_CALM),
    ];
    for (what, bytes, reason) in cases {
        let (connection, mut peer, result) = exchange(&bytes).await;
        let error = result.expect_err(what);
        assert_eq!(error.kind(), Kind::Protocol, "{what}: {error:?}");
        assert!(!error.is_unprocessed(), "{what}");
        assert_eq!(peer.reason(GOAWAY, 0).await, Some(reason), "{what}");
        assert_eq!(within(peer.next()).await, None, "{what}: and closes");
        within(connection.closed()).await;
    }
}

#[tokio::test]
async fn what_breaks_a_stream_resets_that_one_only() {
    let head = |block: &[&[u8]], flags| frame(HEADERS, END_HEADERS | flags, 1, &block.concat());
    let ok = head(&[OK], 0);
    let long: Vec<u8> = (0..600).flat_map(|_| field("x-long", &"v".repeat(120))).collect();
    let long: Vec<Vec<u8>> = long.chunks(16_000).map(<[u8]>::to_vec).collect();
    let mut blocks = frame(HEADERS, 0, 1, OK);
    for (at, piece) in long.iter().enumerate() {
        blocks.extend(frame(CONTINUATION, if at + 1 == long.len() { END_HEADERS } else { 0 }, 1, piece));
    }
    let cases = [
        ("no status", head(&[&field("a", "b")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("two", head(&[OK, OK], END_STREAM), Reason::PROTOCOL_ERROR),
        ("status behind a header", head(&[&field("a", "b"), OK], END_STREAM), Reason::PROTOCOL_ERROR),
        ("a status that is none", head(&[&field(":status", "ok")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("a path in a response", head(&[OK, &field(":path", "/")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("capitals", head(&[OK, &field("A", "b")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("a line break", head(&[OK, &field("a", "b\nc")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("connection", head(&[OK, &field("connection", "close")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("transfer-encoding", head(&[OK, &field("transfer-encoding", "chunked")], 0), Reason::PROTOCOL_ERROR),
        ("a length of letters", head(&[OK, &field("content-length", "x")], 0), Reason::PROTOCOL_ERROR),
        (
            "too little data",
            [head(&[OK, &field("content-length", "9")], 0), frame(DATA, END_STREAM, 1, b"four")].concat(),
            Reason::PROTOCOL_ERROR,
        ),
        (
            "too much data",
            [head(&[OK, &field("content-length", "2")], 0), frame(DATA, 0, 1, b"four")].concat(),
            Reason::PROTOCOL_ERROR,
        ),
        ("an interim end", head(&[&field(":status", "100")], END_STREAM), Reason::PROTOCOL_ERROR),
        ("another protocol", head(&[&field(":status", "101")], 0), Reason::PROTOCOL_ERROR),
        ("data without a head", frame(DATA, 0, 1, b"x"), Reason::PROTOCOL_ERROR),
        ("trailers that go on", [ok.clone(), head(&[&field("a", "b")], 0)].concat(), Reason::PROTOCOL_ERROR),
        ("a second head", [ok.clone(), head(&[OK], END_STREAM)].concat(), Reason::PROTOCOL_ERROR),
        ("no more window", frame(WINDOW_UPDATE, 0, 1, &[0; 4]), Reason::PROTOCOL_ERROR),
        ("a window of 2^31", frame(WINDOW_UPDATE, 0, 1, &[0x7f, 0xff, 0xff, 0xff]), Reason::FLOW_CONTROL_ERROR),
        ("headers of more than 64 KiB", blocks, Reason::PROTOCOL_ERROR),
    ];
    for (what, bytes, reason) in cases {
        let (connection, mut peer, result) = exchange(&bytes).await;
        let error = result.expect_err(what);
        assert_eq!(error.kind(), Kind::Protocol, "{what}: {error:?}");
        assert_eq!(error.reset_reason(), Some(reason), "{what}");
        assert_eq!(peer.reason(RST_STREAM, 1).await, Some(reason), "{what}");
        let next = tokio::spawn(call(lease(&connection)));
        within(peer.find(HEADERS, 3)).await.expect("the connection goes on");
        peer.send(&answer(3, "fine")).await;
        assert_eq!(within(next).await.expect("no panic").expect("response"), "fine", "{what}");
        assert_eq!(connection.in_flight(), 0, "{what}");
    }
}

#[tokio::test]
async fn what_a_peer_may_send_is_taken() {
    let interim = |status| frame(HEADERS, END_HEADERS, 1, &field(":status", status));
    let ok = frame(HEADERS, END_HEADERS, 1, OK);
    let end = frame(DATA, END_STREAM, 1, b"fine");
    let whole = answer(1, "fine");
    let cases = [
        ("kinds and flags nobody knows", [frame(0xfa, 0xff, 1, b"?"), frame(0xfb, 0, 0, b"?"), whole.clone()].concat()),
        ("settings nobody knows", [frame(SETTINGS, 0, 0, &setting(0xfa, 7)), whole.clone()].concat()),
        ("priorities", [frame(PRIORITY, 0, 1, &[0; 5]), frame(PRIORITY, 0, 7, &[0; 5]), whole.clone()].concat()),
        ("interim responses", [interim("100"), interim("103"), whole.clone()].concat()),
        (
            "padding",
            [
                frame(HEADERS, END_HEADERS | PADDED, 1, &[2, 0x88, 0, 0]),
                frame(DATA, END_STREAM | PADDED, 1, b"\x03fine\0\0\0"),
            ]
            .concat(),
        ),
        (
            "a priority with headers",
            [frame(HEADERS, END_HEADERS | WITH_PRIORITY, 1, &[0, 0, 0, 0, 1, 0x88]), end.clone()].concat(),
        ),
        (
            "headers in pieces",
            [
                frame(HEADERS, 0, 1, OK),
                frame(CONTINUATION, 0, 1, &field("a", "b")),
                frame(CONTINUATION, END_HEADERS, 1, &[]),
                end.clone(),
            ]
            .concat(),
        ),
        (
            "empty data",
            [&ok[..], &frame(DATA, 0, 1, &[]), &frame(DATA, 0, 1, b"fine"), &frame(DATA, END_STREAM, 1, &[])].concat(),
        ),
        ("only padding", [&ok[..], &frame(DATA, PADDED, 1, &[3, 0, 0, 0]), &end].concat()),
        (
            "trailers",
            [&ok[..], &frame(DATA, 0, 1, b"fine"), &frame(HEADERS, END_HEADERS | END_STREAM, 1, &field("a", "b"))]
                .concat(),
        ),
        ("a window behind the end", [&whole[..], &frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 9])].concat()),
        ("a reset behind the end", [&whole[..], &frame(RST_STREAM, 0, 1, &[0; 4])].concat()),
        ("a smaller table", [frame(SETTINGS, 0, 0, &setting(1, 0)), whole.clone()].concat()),
        (
            "the right length",
            [frame(HEADERS, END_HEADERS, 1, &[OK, &field("content-length", "4")].concat()), end].concat(),
        ),
    ];
    for (what, bytes) in cases {
        // In one piece, and byte by byte.
        let (connection, mut peer, result) = exchange(&bytes).await;
        assert_eq!(result.expect(what), "fine", "{what}");
        let next = tokio::spawn(call(lease(&connection)));
        within(peer.find(HEADERS, 3)).await.expect("the connection goes on");
        for byte in answer(3, "again") {
            peer.send(&[byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(within(next).await.expect("no panic").expect("response"), "again", "{what}");
    }
}

#[tokio::test]
async fn settings_and_pings_are_answered() {
    let (_connection, mut peer) = Peer::start().await;
    assert_eq!(within(peer.find(SETTINGS, 0)).await.map(|(flags, _)| flags), Some(0), "ours");
    assert_eq!(within(peer.find(SETTINGS, 0)).await, Some((ACK, vec![])));
    peer.send(&frame(PING, 0, 0, b"12345678")).await;
    assert_eq!(within(peer.find(PING, 0)).await, Some((ACK, b"12345678".to_vec())));
}

#[tokio::test]
async fn a_peer_that_begins_with_anything_else_is_none() {
    for bytes in
        [frame(PING, 0, 0, &[0; 8]), frame(SETTINGS, ACK, 0, &[]), b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec()]
    {
        let (client, mut io) = tokio::io::duplex(1 << 16);
        io.write_all(&bytes).await.expect("room");
        let config = TransportConfig::default();
        let handshake = Connection::handshake(client, Protocol::Http2, &config, origin(), None);
        assert_eq!(within(handshake).await.expect_err("no HTTP/2").kind(), Kind::Protocol);
    }
}

#[tokio::test]
async fn data_beyond_the_windows_is_refused() {
    let config = TransportConfig { stream_window: 20_000, connection_window: 65_535, ..Default::default() };
    // On a stream.
    let (connection, mut peer) = Peer::connect(config.clone(), &[]).await;
    let connection = connection.expect("handshake");
    let open = tokio::spawn(lease(&connection).send(post("hello")));
    within(peer.find(HEADERS, 1)).await.expect("a request");
    peer.send(&[frame(HEADERS, END_HEADERS, 1, OK), frame(DATA, 0, 1, &[0; 16_000])].concat()).await;
    let mut response = within(open).await.expect("no panic").expect("response");
    peer.send(&frame(DATA, 0, 1, &[0; 4_001])).await;
    assert_eq!(peer.reason(RST_STREAM, 1).await, Some(Reason::FLOW_CONTROL_ERROR));
    let error =
        within(http_body_util::BodyExt::frame(response.body_mut())).await.expect("an error").expect_err("reset");
    assert_eq!(error.kind(), Kind::Protocol);

    // On the connection, over several streams that nobody reads.
    let (connection, mut peer) = Peer::connect(config, &[]).await;
    let connection = connection.expect("handshake");
    let mut unread = Vec::new();
    for stream in [1, 3, 5, 7] {
        let open = tokio::spawn(lease(&connection).send(post("hello")));
        within(peer.find(HEADERS, stream)).await.expect("a request");
        peer.send(&[frame(HEADERS, END_HEADERS, stream, OK), frame(DATA, 0, stream, &[0; 16_384])].concat()).await;
        unread.push(within(open).await);
    }
    assert_eq!(
        peer.reason(GOAWAY, 0).await,
        Some(Reason::FLOW_CONTROL_ERROR),
        "four times 16,384 is one byte too many"
    );
}

#[tokio::test]
async fn a_window_that_shrinks_below_zero_holds_the_body_until_it_is_open_again() {
    let (connection, mut peer) = Peer::connect(TransportConfig::default(), &setting(4, 10)).await;
    let connection = connection.expect("handshake");
    let call = tokio::spawn(lease(&connection).send(post(Bytes::from(vec![b'x'; 25]))));
    let (_, first) = within(peer.find(DATA, 1)).await.expect("data");
    assert_eq!(first.len(), 10);
    // -8, then 2, then 12, then whatever is needed.
    peer.send(&frame(SETTINGS, 0, 0, &setting(4, 2))).await;
    peer.send(&frame(PING, 0, 0, &[1; 8])).await;
    while let Some((kind, ..)) = within(peer.next()).await
        && kind != PING
    {
        assert_ne!(kind, DATA, "the window is below zero");
    }
    peer.send(&frame(WINDOW_UPDATE, 0, 1, &[0, 0, 0, 10])).await;
    assert_eq!(within(peer.find(DATA, 1)).await.expect("data").1.len(), 2);
    peer.send(&frame(SETTINGS, 0, 0, &setting(4, 12))).await;
    assert_eq!(within(peer.find(DATA, 1)).await.expect("data").1.len(), 10);
    peer.send(&frame(WINDOW_UPDATE, 0, 1, &[0, 0, 1, 0])).await;
    assert_eq!(within(peer.find(DATA, 1)).await, Some((END_STREAM, vec![b'x'; 3])));
    peer.send(&answer(1, "fine")).await;
    assert_eq!(within(collect(within(call).await.expect("no panic").expect("response"))).await.0, "fine");
}

#[tokio::test]
async fn a_head_of_more_than_one_frame_goes_in_pieces_that_follow_each_other() {
    let (connection, mut peer) = Peer::start().await;
    let request = http::Request::get("http://x.test/").header("x-long", "v".repeat(40_000));
    let request = request.body(http_body_util::Empty::<Bytes>::new()).expect("request");
    let call = tokio::spawn(lease(&connection).send(request));
    let (flags, first) = within(peer.find(HEADERS, 1)).await.expect("a request");
    assert_eq!((flags, first.len()), (END_STREAM, 16_384));
    let second = within(peer.next()).await.expect("more");
    assert_eq!((second.0, second.1, second.3.len()), (CONTINUATION, 0, 16_384));
    let third = within(peer.next()).await.expect("more");
    assert_eq!((third.0, third.1), (CONTINUATION, END_HEADERS));
    peer.send(&answer(1, "fine")).await;
    assert_eq!(within(collect(within(call).await.expect("no panic").expect("response"))).await.0, "fine");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever arrives, calls end, nothing panics, and what was reserved comes back.
    #[test]
    fn noise_ends_calls_and_nothing_else(
        frames in prop::collection::vec(
            (0..11u8, any::<u8>(), prop_oneof![Just(0u32), Just(1), Just(3), Just(5)], prop::collection::vec(any::<u8>(), 0..40)),
            0..12,
        ),
        cut in any::<prop::sample::Index>(),
    ) {
        let bytes: Vec<u8> = frames.iter().flat_map(|(kind, flags, stream, payload)| frame(*kind, *flags, *stream, payload)).collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (connection, mut peer) = Peer::start().await;
            let calls: Vec<_> = (0..2).map(|_| tokio::spawn(call(lease(&connection)))).collect();
            within(peer.find(HEADERS, 3)).await.expect("requests");
            peer.send(&bytes[..cut.index(bytes.len() + 1)]).await;
            drop(peer);
            for call in calls {
                // Some noise is a response.
                let _ = within(call).await.expect("no panic");
            }
            within(connection.closed()).await;
            assert_eq!(connection.in_flight(), 0);
        });
    }
}
