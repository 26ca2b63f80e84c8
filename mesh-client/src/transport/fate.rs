//! How a connection ended.

use std::io;

/// Why a connection ended that nobody here drained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// The peer said goodbye.
    GoAway(h2::Reason),
    /// It served as many requests as it may.
    Requests,
    /// The peer did not answer a PING.
    Silent,
    /// We cut it.
    Cut,
    /// The system says so.
    Reset,
    TimedOut,
    Aborted,
    /// Another error of the socket.
    Socket,
    /// The peer closed it, or nobody knows.
    Unknown,
}

impl Fate {
    pub(super) fn of(error: &h2::Error) -> Self {
        match (error.get_io(), error.reason()) {
            (Some(io), _) => match io.kind() {
                io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset,
                io::ErrorKind::TimedOut => Self::TimedOut,
                io::ErrorKind::ConnectionAborted => Self::Aborted,
                _ => Self::Socket,
            },
            (None, Some(reason)) if error.is_go_away() && error.is_remote() => Self::GoAway(reason),
            _ => Self::Unknown,
        }
    }
}
