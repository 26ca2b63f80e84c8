//! Why a stream or a connection failed.

use super::{Fate, Kind, Shared, TransportError};
use h2::Reason;
use std::{error::Error, fmt, io, sync::Arc};

/// A failure of a stream, or of the connection and with it of all its streams.
#[derive(Clone, Debug)]
pub(in crate::transport) enum Fault {
    /// We closed the connection.
    Closed,
    /// The peer closed the connection.
    Eof,
    Io(Arc<io::Error>),
    /// The peer went away before it took the stream.
    GoAway(Reason, Arc<str>),
    /// The peer reset the stream.
    Reset(Reason),
    /// The peer broke the protocol on the stream, and we reset it.
    Malformed(Reason, &'static str),
    /// The peer broke the protocol on the connection.
    Broken(Reason, &'static str),
    /// We reset the stream.
    Cancelled,
    /// The peer does not read what waits for it.
    Full,
}

impl Fault {
    /// In the words of the transport. What we closed the connection for, if we did, is the reason of its end.
    pub(in crate::transport) fn into_error(self, shared: Option<&Shared>) -> TransportError {
        let cause = shared.and_then(|shared| shared.cause.get()).copied();
        let kind = match &self {
            Self::Closed | Self::Eof => cause.unwrap_or(Kind::Closed),
            Self::Io(_) => cause.unwrap_or(Kind::Io),
            Self::GoAway(..) => cause.unwrap_or(Kind::GoAway),
            Self::Full => Kind::NotSent,
            Self::Reset(Reason::REFUSED_STREAM) => Kind::RefusedStream,
            Self::Reset(reason) => Kind::Reset(*reason),
            Self::Malformed(..) | Self::Broken(..) | Self::Cancelled => Kind::Protocol,
        };
        TransportError::new(kind).with_source(self)
    }

    /// What it says of a connection's end.
    pub(super) fn fate(&self) -> Fate {
        match self {
            Self::Io(error) => Fate::of(error),
            Self::GoAway(reason, _) => Fate::GoAway(*reason),
            _ => Fate::Unknown,
        }
    }
}

/// Why we reset a stream, if `error` says that we did.
pub(in crate::transport) fn reset_reason(error: &(dyn Error + 'static)) -> Option<Reason> {
    match error.downcast_ref()? {
        Fault::Malformed(reason, _) => Some(*reason),
        Fault::Cancelled => Some(Reason::CANCEL),
        _ => None,
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("closed by us"),
            Self::Eof => f.write_str("closed by the peer"),
            Self::Io(error) => error.fmt(f),
            Self::GoAway(reason, debug) if debug.is_empty() => write!(f, "GOAWAY: {reason}"),
            Self::GoAway(reason, debug) => write!(f, "GOAWAY: {reason} ({debug})"),
            Self::Reset(reason) => write!(f, "RST_STREAM: {reason}"),
            Self::Malformed(reason, what) | Self::Broken(reason, what) => write!(f, "{what}: {reason}"),
            Self::Cancelled => f.write_str("reset by us"),
            Self::Full => f.write_str("the peer reads nothing"),
        }
    }
}

impl Error for Fault {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Io(error) => Some(error),
            _ => None,
        }
    }
}
