//! One connection to one endpoint, HTTP/2 or HTTP/1.1, with the request in the caller's own future.

mod body;
mod error;

pub use body::RecvBody;
pub use error::{Kind, TransportError};

use bytes::Bytes;
use http::{Request, Response};
use std::time::Duration;

/// Any error, boxed.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The protocol spoken on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

/// PINGs that notice a silent peer (gRFC A8). HTTP/2 only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keepalive {
    /// A PING is sent after this long without a byte from the peer.
    pub(crate) interval: Duration,
    /// The connection is closed if nothing arrives for this long after a PING.
    pub(crate) timeout: Duration,
    /// Also while no stream is open.
    pub(crate) while_idle: bool,
}

/// Settings of one connection.
#[derive(Clone, Debug)]
pub(crate) struct TransportConfig {
    /// Bytes the peer may send on one stream before we read them.
    pub(crate) stream_window: u32,
    /// Bytes the peer may send on the connection before we read them.
    pub(crate) connection_window: u32,
    /// Bytes of one header block that are accepted.
    pub(crate) max_header_list_size: u32,
    pub(crate) keepalive: Option<Keepalive>,
    /// The connection takes no more than this many requests.
    pub(crate) max_requests: Option<u32>,
}

impl Default for TransportConfig {
    fn default() -> Self {
        Self {
            stream_window: 2 << 20,
            connection_window: 5 << 20,
            max_header_list_size: 64 << 10,
            keepalive: None,
            max_requests: None,
        }
    }
}

/// A handle of one connection, cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Connection;

/// One stream reserved on one connection; dropping it, or the future or body that came from it, gives it back.
#[derive(Debug)]
pub(crate) struct Lease;

impl Connection {
    /// Open: no GOAWAY, not draining.
    pub(crate) fn is_usable(&self) -> bool {
        unimplemented!()
    }

    /// Usable, and fewer streams in flight than the peer allows now (HTTP/1.1: idle).
    pub(crate) fn has_capacity(&self) -> bool {
        unimplemented!()
    }

    /// Streams in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        unimplemented!()
    }

    /// Takes no new stream; closes when the last one ends.
    pub(crate) fn drain(&self) {}

    /// Reserves a stream, if there is capacity.
    pub(crate) fn lease(&self) -> Option<Lease> {
        unimplemented!()
    }
}

impl Lease {
    /// Sends `request` and waits for the response headers. Allocates nothing for a unary call beyond what h2 does.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future resets the stream (HTTP/1.1: closes the connection) and gives the lease back.
    pub(crate) async fn send<B>(self, request: Request<B>) -> Result<Response<RecvBody>, TransportError>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        drop(request);
        unimplemented!()
    }
}
