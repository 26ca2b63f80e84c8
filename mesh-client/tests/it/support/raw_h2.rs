//! HTTP/2 by frames: a server that writes them by hand, and may write any; what a client is told.

use std::{
    future::Future,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const CONTINUATION: u8 = 9;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;
pub(crate) const MAX_CONCURRENT_STREAMS: u16 = 3;
pub(crate) const INITIAL_WINDOW_SIZE: u16 = 4;

/// Serves until dropped.
pub(crate) struct RawH2 {
    addr: SocketAddr,
    accepted: Arc<AtomicUsize>,
    _task: JoinSet<()>,
}

/// One connection, as its server sees it.
pub(crate) struct Peer {
    tcp: TcpStream,
}

impl RawH2 {
    /// Plays `script` with each connection, to its end or its error.
    pub(crate) async fn start<F>(script: impl Fn(Peer) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<()>> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let accepted = Arc::<AtomicUsize>::default();
        let count = accepted.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                count.fetch_add(1, SeqCst);
                let script = script(Peer { tcp });
                connections.spawn(async move {
                    // A client that closes ends the script.
                    let _ = script.await;
                });
            }
        });
        Self { addr, accepted, _task: task }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Connections so far.
    pub(crate) fn accepted(&self) -> usize {
        self.accepted.load(SeqCst)
    }
}

impl Peer {
    /// Reads the preface and sends these SETTINGS.
    pub(crate) async fn greet(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        self.tcp.read_exact(&mut [0; 24]).await?;
        self.settings(settings).await
    }

    pub(crate) async fn settings(&mut self, settings: &[(u16, u32)]) -> io::Result<()> {
        let payload: Vec<u8> =
            settings.iter().flat_map(|(id, value)| [&id.to_be_bytes()[..], &value.to_be_bytes()].concat()).collect();
        self.frame(SETTINGS, 0, 0, &payload).await
    }

    /// The next request's stream. Says ACK to SETTINGS and PINGs meanwhile.
    pub(crate) async fn request(&mut self) -> io::Result<u32> {
        loop {
            let mut head = [0; 9];
            self.tcp.read_exact(&mut head).await?;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let mut payload = vec![0; length as usize];
            self.tcp.read_exact(&mut payload).await?;
            match (head[3], head[4]) {
                (HEADERS, _) => return Ok(stream),
                (SETTINGS, flags) if flags & ACK == 0 => self.frame(SETTINGS, ACK, 0, &[]).await?,
                (PING, flags) if flags & ACK == 0 => self.frame(PING, ACK, 0, &payload).await?,
                _ => {}
            }
        }
    }

    /// Reads the head of an HTTP/1.1 request without a body.
    pub(crate) async fn http1_request(&mut self) -> io::Result<()> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(self.tcp.read_u8().await?);
        }
        Ok(())
    }

    pub(crate) async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        self.write(&frame(kind, flags, stream, payload)).await
    }

    /// Any bytes.
    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.tcp.write_all(bytes).await
    }

    /// Reads until the client closes.
    pub(crate) async fn silence(&mut self) -> io::Result<()> {
        while self.tcp.read(&mut [0; 4096]).await? > 0 {}
        Ok(())
    }
}

/// One frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let head = [length[1], length[2], length[3], kind, flags];
    [&head[..], &stream.to_be_bytes(), payload].concat()
}

/// The kinds of the frames up to the end of the connection.
pub(crate) async fn frames(socket: &mut TcpStream) -> Vec<u8> {
    let mut kinds = Vec::new();
    tokio::time::timeout(super::GUARD, async {
        let mut head = [0; 9];
        while socket.read_exact(&mut head).await.is_ok() {
            kinds.push(head[3]);
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            socket.read_exact(&mut payload).await.unwrap();
        }
    })
    .await
    .expect("the connection ends");
    kinds
}

/// A header field, literally: `:status` is sent as any other.
pub(crate) fn field(name: &str, value: &str) -> Vec<u8> {
    let mut text = vec![0];
    for part in [name, value] {
        // HPACK integers with a prefix of seven bits (RFC 7541 section 5.1).
        let mut length = part.len();
        if length < 127 {
            text.push(u8::try_from(length).unwrap());
        } else {
            text.push(127);
            length -= 127;
            while length >= 128 {
                text.push(u8::try_from(length % 128).unwrap() | 128);
                length /= 128;
            }
            text.push(u8::try_from(length).unwrap());
        }
        text.extend_from_slice(part.as_bytes());
    }
    text
}

/// The head of a gRPC response.
pub(crate) fn grpc_head() -> Vec<u8> {
    [field(":status", "200"), field("content-type", "application/grpc")].concat()
}
