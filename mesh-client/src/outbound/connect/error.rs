//! Why an endpoint could not be connected to.

use crate::transport::TransportError;
use mesh_tls::TlsError;
use std::{error::Error, fmt, io, net::SocketAddr, sync::Arc, time::Duration};

/// A failed attempt. Names the address; the cause is the source.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    /// No TCP connection.
    #[error("connect to {address}")]
    Tcp {
        /// The endpoint.
        address: SocketAddr,
        /// As the system says.
        source: io::Error,
    },
    /// TLS could not be set up at all.
    #[error("TLS for {address} cannot be set up")]
    Settings {
        /// The endpoint.
        address: SocketAddr,
        /// The reason.
        source: Shown,
    },
    /// No TLS session; the source says which side refused which certificate, and why.
    #[error("TLS with {address}")]
    Tls {
        /// The endpoint.
        address: SocketAddr,
        /// The reason.
        source: TlsError,
    },
    /// Connected, but not to a server of the protocol.
    #[error("HTTP with {address}")]
    Http {
        /// The endpoint.
        address: SocketAddr,
        /// What happened instead.
        source: TransportError,
    },
    /// `connect_timeout` passed, over the attempt or over the wait for a handshake slot.
    #[error("connect to {address}: {stage} took longer than {limit:?}")]
    Timeout {
        /// The endpoint.
        address: SocketAddr,
        /// What was waited for.
        stage: &'static str,
        /// The cluster's connect timeout.
        limit: Duration,
    },
    /// The endpoint left the cluster.
    #[error("{address} was removed from the cluster")]
    Removed {
        /// The endpoint.
        address: SocketAddr,
    },
}

/// A shared error, as an error.
#[derive(Clone, Debug)]
pub(crate) struct Shown(pub(super) Arc<dyn Error + Send + Sync>);

impl fmt::Display for Shown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Error for Shown {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}
