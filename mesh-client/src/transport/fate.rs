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
    pub(super) fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Reset,
            io::ErrorKind::TimedOut => Self::TimedOut,
            io::ErrorKind::ConnectionAborted => Self::Aborted,
            _ => Self::Socket,
        }
    }
}
