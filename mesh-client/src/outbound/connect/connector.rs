//! How the endpoints of one cluster are connected to.

use super::{
    Backoff, ConnectError, Foresight, Numbers,
    dial::{DialRef, Socket},
    error::Shown,
    socket::TcpOptions,
    variants::{Said, Sockets, Variants},
};
use crate::{
    outbound::cluster::Breaker,
    time::after,
    transport::{Connection, Events, Keepalive, Origin, Protocol, Stream, TransportConfig},
};
use http::uri::Authority;
use mesh_tls::{ClientTls, PeerIdentity};
use mesh_xds::resource::Cluster;
use std::{
    error::Error,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    runtime::Handle,
    sync::{Semaphore, SemaphorePermit, watch},
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
    /// A connection this old takes no new streams; `None`: any age.
    pub(crate) max_duration: Option<Duration>,
    /// Up to this share of `max_duration` longer, drawn for each connection.
    pub(crate) max_duration_jitter: f64,
    /// What is still open so long after its endpoint was removed is cut.
    pub(crate) drain_timeout: Duration,
    /// Connections are made for so many times the streams in flight; 1: when they are needed.
    pub(crate) preconnect_ratio: f64,
    /// The same of all endpoints together.
    pub(crate) predictive_preconnect_ratio: f64,
    /// An endpoint that is found unhealthy loses its connections at once.
    pub(crate) close_on_health_failure: bool,
    /// Connections per endpoint: HTTP/2 grows up to it when streams run out (gRFC A105: cap 10); HTTP/1.1 needs one per
    /// request in flight.
    pub(crate) max_connections_per_host: u32,
    /// After failed attempts.
    pub(crate) backoff: Backoff,
    /// What becomes of connections whose certificates were replaced.
    pub(crate) renewal: TlsRenewal,
    /// Of each connection.
    pub(crate) transport: TransportConfig,
    /// Of its socket.
    pub(crate) tcp: TcpOptions,
    /// TLS or not.
    pub(crate) security: Security,
    /// Sent as SNI instead of what the TLS configuration says.
    pub(crate) server_name: Option<Arc<str>>,
    /// In place of TCP sockets.
    pub(crate) dial: Option<DialRef>,
    /// What is counted of them.
    pub(crate) numbers: Numbers,
}

/// What becomes of open connections when certificates or roots change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsRenewal {
    /// A connection with the new ones takes over; the old one is drained without failing a call. When no new one can be made
    /// within this time, the old one takes no new requests either: what we no longer trust ends within the bound.
    Within(Duration),
    /// They stay, until they end for another reason, such as `max_connection_duration`.
    KeepUntilMaxAge,
}

impl Default for TlsRenewal {
    fn default() -> Self {
        Self::Within(Duration::from_secs(10))
    }
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
    /// Of other endpoints of the cluster; `None`: all are alike.
    variants: Option<Box<Variants>>,
    /// TLS and HTTP handshakes at the same time, in the whole process.
    handshakes: Arc<Semaphore>,
    /// And with the endpoints of this cluster, so that it leaves some to the others.
    own_handshakes: Arc<Semaphore>,
    /// Counts connections (`max_connections`).
    pub(super) breaker: Option<Arc<Breaker>>,
    pub(super) changes: watch::Sender<u64>,
    /// A request has needed a connection.
    pub(super) used: Arc<AtomicBool>,
    /// Where connections are to be foreseen.
    pub(super) foresight: Option<Foresight>,
    pub(super) runtime: Handle,
}

/// TLS and HTTP handshakes of one cluster at the same time.
pub(crate) const CLUSTER_HANDSHAKES: usize = 64;
/// gRFC A105.
const HTTP2_CONNECTIONS_PER_HOST: u32 = 10;
/// How long the streams of a removed endpoint may go on, unless the mesh says otherwise. Envoy drains listeners so long.
pub(crate) const DRAIN_TIMEOUT: Duration = Duration::from_secs(600);

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
            max_duration: None,
            max_duration_jitter: 0.0,
            drain_timeout: DRAIN_TIMEOUT,
            preconnect_ratio: 1.0,
            predictive_preconnect_ratio: 1.0,
            close_on_health_failure: false,
            max_connections_per_host: 1,
            backoff: Backoff::default(),
            renewal: TlsRenewal::default(),
            transport: TransportConfig::default(),
            tcp: TcpOptions::default(),
            security: Security::Plaintext,
            server_name: None,
            dial: None,
            numbers: Numbers::default(),
        }
    }
}

impl ConnectorSettings {
    /// Those of `cluster`, spoken to in `protocol`; `keepalive` is what the mesh was built with.
    pub(crate) fn of(
        cluster: &Cluster,
        protocol: Protocol,
        security: Security,
        keepalive: Option<Keepalive>,
        drain_timeout: Duration,
    ) -> Self {
        let options = &cluster.connections;
        let defaults = TransportConfig::default();
        let keepalive = match options.http2_keepalive {
            None => keepalive,
            // Envoy sends a PING each interval, streams or not.
            Some(own) => Some(Keepalive {
                interval: own.interval,
                repeat: own.interval,
                timeout: own.timeout,
                jitter: own.interval.mul_f64(own.jitter / 100.0),
                while_idle: true,
            }),
        };
        Self {
            protocol,
            connect_timeout: cluster.connect_timeout,
            idle_timeout: cluster.idle_timeout,
            max_duration: options.max_duration,
            max_duration_jitter: options.max_duration_jitter / 100.0,
            drain_timeout,
            preconnect_ratio: options.preconnect_ratio,
            predictive_preconnect_ratio: options.predictive_preconnect_ratio,
            close_on_health_failure: options.close_on_health_failure,
            max_connections_per_host: match protocol {
                // One per request in flight: where nothing is said only the breaker limits them, all endpoints together.
                Protocol::Http1 => cluster.circuit_breakers.max_connections_per_host.unwrap_or(u32::MAX),
                Protocol::Http2 => {
                    cluster.circuit_breakers.max_connections_per_host.unwrap_or(1).min(HTTP2_CONNECTIONS_PER_HOST)
                }
            },
            transport: TransportConfig {
                max_requests: cluster.max_requests_per_connection,
                max_concurrent_streams: options.max_concurrent_streams,
                stream_window: options.stream_window.unwrap_or(defaults.stream_window),
                connection_window: options.connection_window.unwrap_or(defaults.connection_window),
                keepalive,
                ..defaults
            },
            tcp: TcpOptions {
                keepalive: options.tcp_keepalive,
                // gRFC A18: what PINGs notice, the system notices too when it has data to send.
                user_timeout: keepalive.filter(|_| protocol == Protocol::Http2).map(|keepalive| keepalive.timeout),
            },
            security,
            ..Self::default()
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
        let ratio = settings.predictive_preconnect_ratio;
        let foresight = (ratio > 1.0).then(|| Foresight { ratio, due: Arc::default() });
        Arc::new(Self {
            settings,
            handshakes,
            variants: None,
            own_handshakes: Arc::new(Semaphore::new(CLUSTER_HANDSHAKES)),
            breaker,
            changes: watch::Sender::new(0),
            foresight,
            used: Arc::default(),
            runtime,
        })
    }

    /// The same for a cluster some of whose endpoints may be connected to in other ways.
    pub(crate) fn with_variants(
        settings: ConnectorSettings,
        sockets: Sockets,
        handshakes: Arc<Semaphore>,
        breaker: Option<Arc<Breaker>>,
        runtime: Handle,
    ) -> Arc<Self> {
        let mut connector = Self::new(settings, handshakes, breaker, runtime);
        if sockets.tell_apart() {
            let made = Arc::get_mut(&mut connector).expect("nobody else has it yet");
            made.variants = Some(Box::new(Variants::new(sockets)));
        }
        connector
    }

    /// The one for an endpoint of which this is said.
    pub(crate) fn variant(self: &Arc<Self>, said: Said<'_>) -> Arc<Self> {
        match &self.variants {
            None => self.clone(),
            Some(variants) => variants.of(said, |security, server_name| {
                Arc::new(Self {
                    settings: ConnectorSettings { security, server_name, ..self.settings.clone() },
                    variants: None,
                    handshakes: self.handshakes.clone(),
                    own_handshakes: self.own_handshakes.clone(),
                    breaker: self.breaker.clone(),
                    changes: self.changes.clone(),
                    foresight: self.foresight.clone(),
                    used: self.used.clone(),
                    runtime: self.runtime.clone(),
                })
            }),
        }
    }

    /// Whether endpoints of which this and that is said are connected to in different ways.
    pub(crate) fn differ(&self, before: Said<'_>, now: Said<'_>) -> bool {
        self.variants.as_ref().is_some_and(|variants| variants.differ(before, now))
    }

    /// Changes after the state of one of its subchannels, or of its variants' did.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What a cluster of it foresees; `None`: nothing.
    pub(crate) fn foresight(&self) -> Option<Foresight> {
        self.foresight.clone()
    }

    /// Whether a request has needed a connection.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Relaxed)
    }

    pub(super) fn changed(&self) {
        self.changes.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// TCP, TLS, HTTP, within the connect timeout. The wait for a handshake slot is not the endpoint's fault and has a
    /// bound of its own, as long again.
    pub(super) async fn open(&self, address: SocketAddr, events: Arc<dyn Events>) -> Result<Opened, ConnectError> {
        self.open_as(address, self.settings.protocol, events).await
    }

    /// The same, to speak this protocol unless TLS negotiates another.
    pub(super) async fn open_as(
        &self,
        address: SocketAddr,
        protocol: Protocol,
        events: Arc<dyn Events>,
    ) -> Result<Opened, ConnectError> {
        let limit = self.settings.connect_timeout;
        let timed_out = |stage| ConnectError::Timeout { address, stage, limit };
        let begun = Instant::now();
        let tcp = timeout_at(after(begun, limit), self.tcp(address));
        let tcp = tcp.await.map_err(|_| timed_out("TCP"))??;
        let spent = begun.elapsed();
        let _slots = timeout(limit, self.slots()).await.map_err(|_| timed_out("the wait for a handshake slot"))?;
        let deadline = after(Instant::now(), limit.saturating_sub(spent));
        let Security::Tls(tls) = &self.settings.security else {
            let connection = timeout_at(deadline, self.speak(tcp, protocol, address, None, events));
            let connection = connection.await.map_err(|_| timed_out("the HTTP handshake"))??;
            return Ok(Opened { connection, generation: 0 });
        };
        // What never comes is the handshake's error.
        let _ = timeout_at(deadline, tls.ready()).await;
        let session = timeout_at(deadline, tls.connect(tcp, self.settings.server_name.as_deref()));
        let session = session.await.map_err(|_| timed_out("the TLS handshake"))?;
        let (stream, peer) = session.map_err(|source| ConnectError::Tls { address, source })?;
        let generation = stream.generation();
        let protocol = match stream.alpn() {
            Some(b"h2" | b"istio-h2") => Protocol::Http2,
            Some(b"http/1.1" | b"istio-http/1.1") => Protocol::Http1,
            _ => protocol,
        };
        let connection = timeout_at(deadline, self.speak(stream, protocol, address, Some(peer), events));
        let connection = connection.await.map_err(|_| timed_out("the HTTP handshake"))??;
        Ok(Opened { connection, generation })
    }

    pub(super) async fn tcp(&self, address: SocketAddr) -> Result<Socket, ConnectError> {
        if let Security::Broken(cause) = &self.settings.security {
            return Err(ConnectError::Settings { address, source: Shown(Arc::clone(cause)) });
        }
        let failed = |source| ConnectError::Tcp { address, source };
        if let Some(DialRef(dial)) = &self.settings.dial {
            return dial.endpoint(address).await.map(Socket::Dialed).map_err(failed);
        }
        let tcp = TcpStream::connect(address).await.map_err(failed)?;
        self.settings.tcp.apply(&tcp);
        Ok(Socket::Tcp(tcp))
    }

    /// A turn among the handshakes of the cluster, then of the process.
    async fn slots(&self) -> [Option<SemaphorePermit<'_>>; 2] {
        // Never closed; and if one were, nothing would bound the handshakes, which still work.
        [self.own_handshakes.acquire().await.ok(), self.handshakes.acquire().await.ok()]
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
