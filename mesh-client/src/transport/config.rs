//! Settings of one connection.

use http::uri::Authority;
use mesh_tls::PeerIdentity;
use std::time::Duration;

/// The protocol spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protocol {
    /// HTTP/1.1: one request at a time.
    Http1,
    /// HTTP/2 with prior knowledge or by ALPN.
    Http2,
}

/// PINGs that notice a silent peer (gRFC A8). HTTP/2 only. Set with [`MeshBuilder::keepalive`](crate::MeshBuilder::keepalive).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keepalive {
    /// A PING is sent once the peer was silent for this long (up to half as long again). Default 30 s; less than one
    /// second counts as one second.
    pub interval: Duration,
    /// Between further PINGs while nothing but their answers arrives. gRPC servers count PINGs closer than five minutes
    /// as strikes until they send something themselves, and go away at the third. Default 301 s.
    pub repeat: Duration,
    /// The connection is closed if nothing at all arrives for this long after a PING. Default 10 s.
    pub timeout: Duration,
    /// Every interval is up to this much longer, drawn anew each time. Default zero.
    pub jitter: Duration,
    /// Also while no stream is open. Servers may answer that with GOAWAY (`too_many_pings`). Default off.
    pub while_idle: bool,
}

/// Settings of the connections of one cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TransportConfig {
    /// Bytes the peer may send on one stream before we read them.
    pub(crate) stream_window: u32,
    /// Bytes the peer may send on the connection before we read them.
    pub(crate) connection_window: u32,
    /// Bytes of one header block that are accepted.
    pub(crate) max_header_list_size: u32,
    /// `None`: no PINGs.
    pub(crate) keepalive: Option<Keepalive>,
    /// Requests one connection serves before it is drained; `None`: any number.
    pub(crate) max_requests: Option<u32>,
    /// Streams we open at once, beside the peer's own limit; `None`: that alone.
    pub(crate) max_concurrent_streams: Option<u32>,
}

/// Settings of the connections that a server takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerConfig {
    /// Bytes the client may send on one stream before we read them.
    pub(crate) stream_window: u32,
    /// Bytes the client may send on the connection before we read them.
    pub(crate) connection_window: u32,
    /// Bytes of one header block that are accepted.
    pub(crate) max_header_list_size: u32,
    /// Bytes of the headers of all requests in progress.
    pub(crate) max_header_bytes: u32,
    /// Headers of one request.
    pub(crate) max_headers: u32,
    /// How long a client may take to hear that we are going away, before its further requests are refused.
    pub(crate) notice: Duration,
    /// Requests in progress at the same time.
    pub(crate) max_concurrent_streams: u32,
    /// How long the head of a request may take, over HTTP/1.1.
    pub(crate) header_timeout: Duration,
    /// How long a client may owe something of a request; `None`: for ever.
    pub(crate) stream_idle: Option<Duration>,
    /// `None`: no PINGs.
    pub(crate) keepalive: Option<Keepalive>,
}

/// What a connection leads to, where the request does not say.
#[derive(Clone, Debug)]
pub(crate) struct Origin {
    /// `:authority` of requests that have neither an authority nor a `host`.
    pub(crate) authority: Authority,
    /// True: `:scheme` is `https`.
    pub(crate) tls: bool,
    /// Who answered, by TLS.
    pub(crate) peer: Option<PeerIdentity>,
}

impl Default for Keepalive {
    fn default() -> Self {
        Self {
            interval: Duration::from_secs(30),
            repeat: Duration::from_secs(301),
            timeout: Duration::from_secs(10),
            jitter: Duration::ZERO,
            while_idle: false,
        }
    }
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            stream_window: 1 << 20,
            connection_window: 4 << 20,
            max_header_list_size: 64 << 10,
            max_header_bytes: 4 << 20,
            max_headers: 100,
            notice: Duration::from_secs(1),
            max_concurrent_streams: 1024,
            header_timeout: Duration::from_secs(30),
            stream_idle: Some(Duration::from_secs(300)),
            keepalive: Some(Keepalive::default()),
        }
    }
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            stream_window: 2 << 20,
            connection_window: 5 << 20,
            max_header_list_size: 64 << 10,
            keepalive: Some(Keepalive::default()),
            max_requests: None,
            max_concurrent_streams: None,
        }
    }
}
