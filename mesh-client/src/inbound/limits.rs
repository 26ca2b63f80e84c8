//! What clients may cost.

use crate::{Keepalive, outbound::connect::TcpOptions, transport::ServerConfig};
use mesh_xds::resource::{ServerConnections, TcpKeepalive};
use std::time::Duration;

/// What clients may cost a server, whoever they are. The defaults suit a service of a mesh.
///
/// Where the control plane says something of a filter chain, the lower of both holds for connections that begin from then on; its
/// `stream_idle_timeout` of zero is none at all, as Istio wants it.
///
/// Clients of a mesh choose their endpoints themselves and follow changes, so connections need not be made anew for the sake of balance: they have no
/// age by default. They do end after an hour without a request, as with Envoy, because of a client that vanished without a word nothing
/// else is heard while nothing is in flight.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Connections that are open at the same time; further ones are closed when they are accepted. Default 100,000.
    pub max_connections: usize,
    /// TLS handshakes under way at the same time, counted from a client's first byte; further ones wait for their turn, within
    /// [`handshake_timeout`](Self::handshake_timeout). Default 1024.
    pub max_handshakes: usize,
    /// Those of them from one IPv4 address, or one IPv6 /64: further ones wait for each other alone, so that a client that begins many and ends none
    /// does not keep others out. Default 256: more than one slow client is needed to take all.
    pub max_handshakes_per_address: usize,
    /// From the accepted connection to the first bytes of its protocol, TLS handshake included. Default 10 s.
    pub handshake_timeout: Duration,
    /// Requests of one HTTP/2 connection that are served at the same time; further ones are refused (REFUSED_STREAM), which lets
    /// the client try again elsewhere. Default 1024.
    pub max_concurrent_streams: u32,
    /// Bytes of the headers of one request, as HTTP/2 counts them (RFC 9113 section 6.5.2); more are answered with 431. Default
    /// 64 KiB.
    pub max_header_bytes: u32,
    /// Bytes of the headers of all requests of one HTTP/2 connection that are served at the same time, counted alike; further ones are refused
    /// (REFUSED_STREAM). At least [`max_header_bytes`](Self::max_header_bytes). Default 4 MiB.
    pub max_connection_header_bytes: u32,
    /// Headers of one request; more are answered with 431. Default 100, as with Envoy.
    pub max_headers: u32,
    /// From the first byte of a request's head to its end; over HTTP/1.1 also between two requests of a connection. Over HTTP/2 also to the
    /// first SETTINGS, and from the first byte of any frame to its end. What takes longer is cut, at the latest after twice this. Default 30 s.
    pub header_timeout: Duration,
    /// A request whose client owes something for so long is ended: bytes of the body that its handler waits for (but not once a gRPC stream was
    /// answered, which may be quiet), or reading the answer. One that was not answered gets 408 (gRPC: DEADLINE_EXCEEDED), others are reset, and over HTTP/1.1
    /// the connection ends; at the latest after a quarter more, or a [`header_timeout`](Self::header_timeout) if that is more. What a handler is slow with
    /// is not limited by it, other than with Envoy. Of connections that are served by [`Inbound::serve`](super::Inbound::serve). Default 5 min.
    pub stream_idle_timeout: Option<Duration>,
    /// A connection on which nothing was in flight for so long is told to go away. Over HTTP/1.1 also a
    /// [`header_timeout`](Self::header_timeout), if it is shorter. Default one hour.
    pub idle_timeout: Option<Duration>,
    /// A connection that is so old is told to go away, up to a tenth earlier or later; what is in flight goes on for
    /// [`drain_timeout`](Self::drain_timeout) (gRFC A9). Default none.
    pub max_connection_age: Option<Duration>,
    /// PINGs that find out whether a client that has requests in flight is still there; `None`: none. Default: [`Keepalive::default`].
    pub keepalive: Option<Keepalive>,
    /// TCP asks a client that was silent for so long whether it is still there, and the connection of one that does not answer for as long again ends,
    /// whatever is spoken on it; whole seconds. `None`: as the system does. Default 60 s.
    pub tcp_keepalive: Option<Duration>,
    /// A connection whose client has not acknowledged for so long what was sent to it, or had no room for it, ends (`TCP_USER_TIMEOUT`; on Linux). `None`:
    /// as the system does, which may be a quarter of an hour. Default two minutes.
    pub tcp_user_timeout: Option<Duration>,
    /// How long what is in flight may go on when a connection has to go; then it is cut. Default 30 s.
    pub drain_timeout: Duration,
    /// How long a client that has to go may take to hear so before its further requests are refused: between the first GOAWAY and the last, unless it
    /// answers the PING between them earlier. Default 1 s.
    pub drain_notice: Duration,
    /// Bytes that a client may send on one stream before they are read; less than 65,535 is taken for that, which clients may send before
    /// they know of it (RFC 9113 section 6.9.2). Default 1 MiB.
    pub stream_window: u32,
    /// Bytes that a client may send on one connection before they are read. Default 4 MiB.
    pub connection_window: u32,
}

impl Default for Limits {
    fn default() -> Self {
        let transport = ServerConfig::default();
        Self {
            max_connections: 100_000,
            max_handshakes: 1024,
            max_handshakes_per_address: 256,
            handshake_timeout: Duration::from_secs(10),
            max_concurrent_streams: transport.max_concurrent_streams,
            max_header_bytes: transport.max_header_list_size,
            max_connection_header_bytes: transport.max_header_bytes,
            max_headers: transport.max_headers,
            header_timeout: transport.header_timeout,
            stream_idle_timeout: transport.stream_idle,
            idle_timeout: Some(Duration::from_secs(3600)),
            max_connection_age: None,
            keepalive: transport.keepalive,
            tcp_keepalive: Some(Duration::from_secs(60)),
            tcp_user_timeout: Some(Duration::from_secs(120)),
            drain_timeout: Duration::from_secs(30),
            drain_notice: transport.notice,
            stream_window: transport.stream_window,
            connection_window: transport.connection_window,
        }
    }
}

macro_rules! setters {
    ($($name:ident: $kind:ty),* $(,)?) => {
        /// The same with another value of one field.
        impl Limits {
            $(
                #[doc = concat!("Sets [`", stringify!($name), "`](Self#structfield.", stringify!($name), ").")]
                #[must_use]
                pub fn $name(mut self, value: $kind) -> Self {
                    self.$name = value;
                    self
                }
            )*
        }
    };
}

setters! {
    max_connections: usize,
    max_handshakes: usize,
    max_handshakes_per_address: usize,
    handshake_timeout: Duration,
    max_concurrent_streams: u32,
    max_header_bytes: u32,
    max_connection_header_bytes: u32,
    max_headers: u32,
    header_timeout: Duration,
    stream_idle_timeout: Option<Duration>,
    idle_timeout: Option<Duration>,
    max_connection_age: Option<Duration>,
    keepalive: Option<Keepalive>,
    tcp_keepalive: Option<Duration>,
    tcp_user_timeout: Option<Duration>,
    drain_timeout: Duration,
    drain_notice: Duration,
    stream_window: u32,
    connection_window: u32,
}

/// Probes of TCP, within the time that a client may take to answer.
const PROBES: u32 = 4;

impl Limits {
    /// Of the sockets of clients.
    pub(super) fn tcp_options(&self) -> TcpOptions {
        let keepalive = self.tcp_keepalive.map(|time| {
            let second = Duration::from_secs(1);
            let interval = (time / PROBES).max(second);
            TcpKeepalive { probes: Some(PROBES), time: Some(time.max(second)), interval: Some(interval) }
        });
        TcpOptions { keepalive, user_timeout: self.tcp_user_timeout }
    }

    /// [`stream_idle_timeout`](Self::stream_idle_timeout); zero is none.
    pub(super) fn stream_idle(&self) -> Option<Duration> {
        self.stream_idle_timeout.filter(|limit| !limit.is_zero())
    }

    /// Of the connections of a filter chain.
    pub(super) fn within(&self, said: &ServerConnections, stream_idle: Option<Duration>) -> Self {
        fn lower<T: Ord>(own: T, said: Option<T>) -> T {
            match said {
                Some(said) => own.min(said),
                None => own,
            }
        }
        // Zero is no limit.
        let limit = |said: Option<Duration>| said.filter(|limit| !limit.is_zero());
        let either = |own: Option<Duration>, said: Option<Duration>| own.into_iter().chain(limit(said)).min();
        Self {
            max_concurrent_streams: lower(self.max_concurrent_streams, said.max_concurrent_streams),
            max_header_bytes: lower(
                self.max_header_bytes,
                said.max_request_headers_kb.map(|kb| kb.saturating_mul(1024)),
            ),
            max_headers: lower(self.max_headers, said.max_headers_count),
            header_timeout: lower(self.header_timeout, limit(said.request_headers_timeout)),
            stream_idle_timeout: match stream_idle {
                Some(Duration::ZERO) => None,
                said => either(self.stream_idle_timeout, said),
            },
            idle_timeout: either(self.idle_timeout, said.idle_timeout),
            max_connection_age: either(self.max_connection_age, said.max_connection_duration),
            drain_notice: said.drain_timeout.unwrap_or(self.drain_notice).min(self.drain_timeout),
            ..self.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lower_limit_holds_and_zero_is_none() {
        let own = Limits { max_connection_age: Some(Duration::from_secs(9)), ..Limits::default() };
        assert_eq!(own.within(&ServerConnections::default(), None), own);
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let said = ServerConnections {
            max_concurrent_streams: Some(7),
            max_request_headers_kb: Some(3),
            max_headers_count: Some(20),
            idle_timeout: seconds(5),
            max_connection_duration: seconds(6),
            request_headers_timeout: seconds(4),
            drain_timeout: seconds(2),
            ..ServerConnections::default()
        };
        let lower = own.within(&said, seconds(7));
        assert_eq!(lower.stream_idle_timeout, seconds(7));
        assert_eq!((lower.max_concurrent_streams, lower.max_header_bytes, lower.max_headers), (7, 3 << 10, 20));
        assert_eq!((lower.idle_timeout, lower.max_connection_age), (seconds(5), seconds(6)));
        assert_eq!((Some(lower.header_timeout), Some(lower.drain_notice)), (seconds(4), seconds(2)));
        let said = ServerConnections {
            max_concurrent_streams: Some(1 << 20),
            max_request_headers_kb: Some(u32::MAX),
            idle_timeout: seconds(0),
            max_connection_duration: seconds(10),
            request_headers_timeout: seconds(0),
            ..ServerConnections::default()
        };
        assert_eq!(own.within(&said, seconds(301)), own);
        assert_eq!(own.within(&said, seconds(0)), own.stream_idle_timeout(None), "zero is none");
    }
}
