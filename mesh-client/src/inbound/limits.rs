//! What clients may cost.

use crate::Keepalive;
use std::time::Duration;

/// What clients may cost a server, whoever they are. The defaults suit a service of a mesh.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections that are open at the same time; further ones are closed when they are accepted. Default 100,000.
    pub max_connections: usize,
    /// TLS handshakes under way at the same time, counted from a client's first byte; further ones wait for their turn, within
    /// [`handshake_timeout`](Self::handshake_timeout). Default 1024.
    pub max_handshakes: usize,
    /// From the accepted connection to the first bytes of its protocol, TLS handshake included. Default 10 s.
    pub handshake_timeout: Duration,
    /// Requests of one HTTP/2 connection that are served at the same time; further ones are refused (REFUSED_STREAM), which lets
    /// the client try again elsewhere. Default 1024.
    pub max_concurrent_streams: u32,
    /// Bytes of the headers of one request, as HTTP/2 counts them (RFC 9113 section 6.5.2); more are answered with 431. Default
    /// 64 KiB.
    pub max_header_bytes: u32,
    /// From the first byte of a request's head to its end; over HTTP/1.1 also between two requests of a connection. Over HTTP/2 also to the
    /// first SETTINGS, and from the first byte of any frame to its end. What takes longer is cut, at the latest after twice this. Default 30 s.
    pub header_timeout: Duration,
    /// A connection on which nothing was in flight for so long is told to go away. Over HTTP/1.1 also a
    /// [`header_timeout`](Self::header_timeout), if it is shorter. Default none.
    pub idle_timeout: Option<Duration>,
    /// A connection that is so old is told to go away, up to a tenth earlier or later; what is in flight goes on for
    /// [`drain_timeout`](Self::drain_timeout) (gRFC A9). Default none.
    pub max_connection_age: Option<Duration>,
    /// PINGs that find out whether a client that has requests in flight is still there; `None`: none. Default: [`Keepalive::default`].
    pub keepalive: Option<Keepalive>,
    /// How long what is in flight may go on when a connection has to go; then it is cut. Default 30 s.
    pub drain_timeout: Duration,
    /// Bytes that a client may send on one stream before they are read; less than 65,535 is taken for that, which clients may send before
    /// they know of it (RFC 9113 section 6.9.2). Default 1 MiB.
    pub stream_window: u32,
    /// Bytes that a client may send on one connection before they are read. Default 4 MiB.
    pub connection_window: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 100_000,
            max_handshakes: 1024,
            handshake_timeout: Duration::from_secs(10),
            max_concurrent_streams: 1024,
            max_header_bytes: 64 << 10,
            header_timeout: Duration::from_secs(30),
            idle_timeout: None,
            max_connection_age: None,
            keepalive: Some(Keepalive::default()),
            drain_timeout: Duration::from_secs(30),
            stream_window: 1 << 20,
            connection_window: 4 << 20,
        }
    }
}
