//! Why a request on one connection failed, and whether the peer can have seen it.

use super::BoxError;
use std::{error::Error as StdError, fmt, io};

/// A failure of one request, or of its response body, on one connection.
///
/// One pointer wide. The first cause is in [`source`](StdError::source).
pub struct TransportError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: Kind,
    unprocessed: bool,
    before_headers: bool,
    source: Option<BoxError>,
}

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The connection was closed, by either side, without a reason.
    Closed,
    /// The peer is going away and will not process this stream (RFC 9113 section 6.8).
    GoAway,
    /// The peer refused the stream before any processing (RFC 9113 section 8.7).
    RefusedStream,
    /// The stream was reset.
    Reset(h2::Reason),
    /// Reading or writing the connection failed.
    Io,
    /// The peer did not answer a keepalive PING in time.
    KeepaliveTimeout,
    /// The endpoint was removed, and the stream was still open when the time to drain was over.
    DrainTimeout,
    /// The endpoint was found unhealthy, and its connections are to be closed then.
    Unhealthy,
    /// The body of the request failed; its error is the source.
    RequestBody,
    /// The request cannot be sent over this protocol.
    InvalidRequest,
    /// The peer broke the protocol.
    Protocol,
    /// The connection was busy, draining or gone before the request was written.
    NotSent,
}

impl TransportError {
    pub(crate) fn new(kind: Kind) -> Self {
        let unprocessed = matches!(kind, Kind::GoAway | Kind::RefusedStream | Kind::NotSent);
        Self(Box::new(Inner { kind, unprocessed, before_headers: true, source: None }))
    }

    pub(crate) fn with_source(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Marks that no byte of the request left this process.
    pub(crate) fn unprocessed(mut self) -> Self {
        self.0.unprocessed = true;
        self
    }

    /// Marks that response headers had arrived, so the peer did process the request.
    pub(crate) fn after_headers(mut self) -> Self {
        self.0.before_headers = false;
        self.0.unprocessed = false;
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// True if the peer surely did not process the request: it never left, was refused (REFUSED_STREAM), or is above the
    /// last stream of a GOAWAY. A transparent retry is then safe for every method (gRFC A6, RFC 9113 section 8.7).
    pub fn is_unprocessed(&self) -> bool {
        self.0.unprocessed
    }

    /// True if the failure came before the response headers.
    pub fn is_before_headers(&self) -> bool {
        self.0.before_headers
    }

    /// Why the stream was reset, by either side, if it was.
    pub(crate) fn reset_reason(&self) -> Option<h2::Reason> {
        match self.0.kind {
            Kind::Reset(reason) => Some(reason),
            Kind::RefusedStream => Some(h2::Reason::REFUSED_STREAM),
            Kind::Protocol => super::h2::reset_reason(self.0.source.as_deref()?),
            _ => None,
        }
    }

    /// True if the stream or the connection was cut: closed, reset, refused, gone away or silent.
    pub fn is_connection(&self) -> bool {
        matches!(
            self.0.kind,
            Kind::Closed
                | Kind::GoAway
                | Kind::Io
                | Kind::KeepaliveTimeout
                | Kind::DrainTimeout
                | Kind::Unhealthy
                | Kind::NotSent
        )
    }
}

impl From<io::Error> for TransportError {
    fn from(error: io::Error) -> Self {
        Self::new(Kind::Io).with_source(error)
    }
}

impl StdError for TransportError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}

impl fmt::Debug for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TransportError")
            .field("kind", &self.0.kind)
            .field("unprocessed", &self.0.unprocessed)
            .field("source", &self.0.source)
            .finish()
    }
}

impl fmt::Display for TransportError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.kind {
            Kind::Closed => f.write_str("connection closed"),
            Kind::GoAway => f.write_str("peer is going away"),
            Kind::RefusedStream => f.write_str("peer refused the stream"),
            Kind::Reset(reason) => write!(f, "stream reset: {reason}"),
            Kind::Io => f.write_str("connection failed"),
            Kind::KeepaliveTimeout => f.write_str("peer did not answer a keepalive PING"),
            Kind::DrainTimeout => f.write_str("endpoint was removed, and its time to drain is over"),
            Kind::Unhealthy => f.write_str("connection was closed because its endpoint is unhealthy"),
            Kind::RequestBody => f.write_str("request body failed"),
            Kind::InvalidRequest => f.write_str("request cannot be sent"),
            Kind::Protocol => f.write_str("peer broke the protocol"),
            Kind::NotSent => f.write_str("connection was closed before the request was sent"),
        }
    }
}
