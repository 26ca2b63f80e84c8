//! The connections of one endpoint.

use crate::transport::{Lease, Protocol, TransportConfig};
use std::{io, net::SocketAddr, sync::Arc, time::Duration};

/// How the endpoints of one cluster are connected to.
#[derive(Debug)]
pub(crate) struct Connector {
    pub(crate) protocol: Protocol,
    pub(crate) connect_timeout: Duration,
    /// Zero: never.
    pub(crate) idle_timeout: Duration,
    /// HTTP/2: connections per endpoint when streams run out (gRFC A105). HTTP/1.1: the cluster's `max_connections`.
    pub(crate) max_connections_per_host: u32,
    pub(crate) transport: TransportConfig,
}

/// State of an endpoint's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Connectivity {
    /// Never used, or every connection was lost: the next use connects.
    Idle,
    Connecting,
    Ready,
    /// The last attempt failed; the next one comes by itself after a backoff.
    TransientFailure,
}

/// Why an endpoint could not be connected to.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error("connect to {address}")]
    Tcp { address: SocketAddr, source: io::Error },
    #[error("connect to {address}: no connection after {timeout:?}")]
    Timeout { address: SocketAddr, timeout: Duration },
    #[error("connect to {address}: endpoint was removed")]
    Removed { address: SocketAddr },
}

/// One endpoint's connections. Connects on first use.
#[derive(Debug)]
pub(crate) struct Subchannel {
    address: SocketAddr,
    connector: Arc<Connector>,
}

impl Connector {
    /// Changes whenever the state of one of its subchannels does.
    pub(crate) fn subscribe(&self) -> tokio::sync::watch::Receiver<u64> {
        unimplemented!()
    }
}

impl Subchannel {
    pub(crate) fn new(address: SocketAddr, connector: Arc<Connector>) -> Arc<Self> {
        Arc::new(Self { address, connector })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// One atomic load.
    pub(crate) fn state(&self) -> Connectivity {
        let _ = &self.connector;
        unimplemented!()
    }

    /// A stream on a usable connection, if one has capacity now. No lock.
    pub(crate) fn ready(&self) -> Option<Lease> {
        unimplemented!()
    }

    /// A stream: at once, or after connecting, or after one became free. The caller bounds the time.
    ///
    /// # Errors
    ///
    /// The cause, when the attempt fails or the endpoint is in backoff.
    ///
    /// # Cancel safety
    ///
    /// A dropped future takes nothing with it; an attempt it started goes on.
    pub(crate) async fn acquire(&self) -> Result<Lease, Arc<ConnectError>> {
        unimplemented!()
    }

    /// Starts to connect unless connected, connecting or in backoff.
    pub(crate) fn connect(&self) {}

    /// Why the last attempt failed; `None` once one succeeded.
    pub(crate) fn last_error(&self) -> Option<Arc<ConnectError>> {
        unimplemented!()
    }

    /// The endpoint was removed: no new stream; connections close when their last stream ends.
    pub(crate) fn drain(&self) {}
}
