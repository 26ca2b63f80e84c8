//! The connections of one endpoint: made on first use, kept, grown, replaced and closed.

mod backoff;
mod connector;
mod dial;
mod error;
mod numbers;
mod preconnect;
mod probe;
mod socket;
mod subchannel;
mod supervisor;
mod variants;

pub(crate) use backoff::Backoff;
pub use connector::TlsRenewal;
pub(crate) use connector::{Connector, ConnectorSettings, DRAIN_TIMEOUT, Security};
pub use dial::Dial;
pub(crate) use dial::DialRef;
pub(crate) use error::ConnectError;
pub(crate) use numbers::Numbers;
pub(crate) use preconnect::{AT_ONCE, Demand, Foresight};
pub(crate) use probe::Kept;
pub(crate) use socket::TcpOptions;
pub(crate) use subchannel::Subchannel;
pub(crate) use variants::{Said, Socket, Sockets};

/// State of an endpoint's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Connectivity {
    /// Never used, or every connection was lost: the next use connects.
    Idle,
    /// The first attempt, or the first after a connection was lost, is under way.
    Connecting,
    /// At least one connection is usable; it may be at its stream limit.
    Ready,
    /// The last attempt failed. Stays through the attempts that follow by themselves, until one succeeds (gRFC A62).
    TransientFailure,
}

#[cfg(test)]
mod tests;
