//! How the endpoints of one cluster are connected to.

use super::{Backoff, ConnectError, error::Shown};
use crate::{
    outbound::cluster::Breaker,
    transport::{Connection, Events, Origin, Protocol, Stream, TransportConfig},
};
use http::uri::Authority;
use mesh_tls::{ClientTls, PeerIdentity};
use std::{error::Error, fmt, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::{Semaphore, watch},
    time::{Instant, timeout, timeout_at},
};

/// What the connections of one cluster have in common.
#[derive(Clone, Debug)]
pub(crate) struct ConnectorSettings {
    /// Spoken where TLS negotiates nothing else by ALPN.
    pub(crate) protocol: Protocol,
    /// For TCP, TLS and the peer's SETTINGS together. Before TLS an attempt may wait as long again for its turn.
    pub(crate) connect_timeout: Duration,
    /// A connection without a stream for this long (up to a quarter longer) is closed. Zero: never.
    pub(crate) idle_timeout: Duration,
    /// Connections per endpoint: HTTP/2 grows up to it when streams run out (gRFC A105: cap 10); HTTP/1.1 needs one per
    /// request in flight.
    pub(crate) max_connections_per_host: u32,
    /// After failed attempts.
    pub(crate) backoff: Backoff,
    /// How long connections with replaced certificates may take new streams while the new ones are made.
    pub(crate) renewal_bound: Duration,
    /// Of each connection.
    pub(crate) transport: TransportConfig,
    /// TLS or not.
    pub(crate) security: Security,
}

/// How the connections of one cluster are secured.
#[derive(Clone, Debug)]
pub(crate) enum Security {
    /// TCP.
    Plaintext,
    /// TLS, with new connections when the certificates change.
    Tls(ClientTls),
    /// TLS that cannot be set up: no connection is made, and never one in plaintext.
    Broken(Arc<dyn Error + Send + Sync>),
}

/// Makes connections; shared by the subchannels of one cluster.
pub(crate) struct Connector {
    pub(super) settings: ConnectorSettings,
    /// TLS and HTTP handshakes at the same time, in the whole process.
    handshakes: Arc<Semaphore>,
    /// Counts connections (`max_connections`).
    pub(super) breaker: Option<Arc<Breaker>>,
    pub(super) changes: watch::Sender<u64>,
    pub(super) runtime: Handle,
}

/// A new connection, and what it was made with.
pub(super) struct Opened {
    pub(super) connection: Connection,
    /// Of the TLS material; 0 for plaintext.
    pub(super) generation: u64,
}

impl Default for ConnectorSettings {
    fn default() -> Self {
        Self {
            protocol: Protocol::Http2,
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(3600),
            max_connections_per_host: 1,
            backoff: Backoff::default(),
            renewal_bound: Duration::from_secs(10),
            transport: TransportConfig::default(),
            security: Security::Plaintext,
        }
    }
}

impl Connector {
    pub(crate) fn new(
        settings: ConnectorSettings,
        handshakes: Arc<Semaphore>,
        breaker: Option<Arc<Breaker>>,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self { settings, handshakes, breaker, changes: watch::Sender::new(0), runtime })
    }

    /// Changes after the state of one of its subchannels did.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    pub(super) fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// TCP, TLS, HTTP, within the connect timeout. The wait for a handshake slot is not the endpoint's fault and has a
    /// bound of its own, as long again.
    pub(super) async fn open(&self, address: SocketAddr, events: Arc<dyn Events>) -> Result<Opened, ConnectError> {
        let limit = self.settings.connect_timeout;
        let timed_out = |stage| ConnectError::Timeout { address, stage, limit };
        if let Security::Broken(cause) = &self.settings.security {
            return Err(ConnectError::Settings { address, source: Shown(Arc::clone(cause)) });
        }
        let begun = Instant::now();
        let tcp = timeout_at(begun + limit, TcpStream::connect(address));
        let tcp = tcp.await.map_err(|_| timed_out("TCP"))?.map_err(|source| ConnectError::Tcp { address, source })?;
        // Without it small writes wait for the peer's ACK; a failure costs only that.
        let _ = tcp.set_nodelay(true);
        let spent = begun.elapsed();
        // Never closed; and if it were, nothing would bound the handshakes, which still work.
        let slot = timeout(limit, self.handshakes.acquire()).await;
        let _slot = slot.map_err(|_| timed_out("the wait for a handshake slot"))?.ok();
        let deadline = Instant::now() + limit.saturating_sub(spent);
        let Security::Tls(tls) = &self.settings.security else {
            let connection = timeout_at(deadline, self.speak(tcp, self.settings.protocol, address, None, events));
            let connection = connection.await.map_err(|_| timed_out("the HTTP handshake"))??;
            return Ok(Opened { connection, generation: 0 });
        };
        let session = timeout_at(deadline, tls.connect(tcp, None));
        let session = session.await.map_err(|_| timed_out("the TLS handshake"))?;
        let (stream, peer) = session.map_err(|source| ConnectError::Tls { address, source })?;
        let generation = stream.generation();
        let protocol = match stream.alpn() {
            Some(b"h2") => Protocol::Http2,
            Some(b"http/1.1") => Protocol::Http1,
            _ => self.settings.protocol,
        };
        let connection = timeout_at(deadline, self.speak(stream, protocol, address, Some(peer), events));
        let connection = connection.await.map_err(|_| timed_out("the HTTP handshake"))??;
        Ok(Opened { connection, generation })
    }

    async fn speak(
        &self,
        io: impl Stream,
        protocol: Protocol,
        address: SocketAddr,
        peer: Option<PeerIdentity>,
        events: Arc<dyn Events>,
    ) -> Result<Connection, ConnectError> {
        let authority =
            Authority::from_maybe_shared(address.to_string()).expect("a socket address is a valid authority");
        let origin = Origin { authority, tls: peer.is_some(), peer };
        Connection::handshake(io, protocol, &self.settings.transport, origin, Some(events))
            .await
            .map_err(|source| ConnectError::Http { address, source })
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connector").field("settings", &self.settings).finish_non_exhaustive()
    }
}
