//! What is known of a connection.

use super::{Chain, Limits, chain_match::Facts, farewell::Farewell, seen::Seen};
use http::request;
use mesh_tls::{PeerIdentity, Presented};
use mesh_xds::resource::TransportProtocol;
use std::{fmt, net::SocketAddr, sync::Arc};

/// The connection that a request came over: in the extensions of every request, cheap to clone.
///
/// The identity of a verified peer is there under its own type as well, [`PeerIdentity`].
#[derive(Clone)]
pub struct ConnectionInfo(Arc<Inner>);

struct Inner {
    /// What its chain is chosen by, now and whenever the configuration changes.
    facts: Facts,
    /// Whether those have all that the client offered to speak.
    offers_known: bool,
    tls: Option<Tls>,
    chain: Arc<Chain>,
    limits: Arc<Limits>,
    /// How often connections had been made anew when it was accepted.
    epoch: u64,
    seen: Seen,
    farewell: Farewell,
}

/// What TLS says of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tls {
    pub(crate) peer: Option<PeerIdentity>,
    pub(crate) sni: Option<Box<str>>,
    pub(crate) alpn: Option<Box<[u8]>>,
    /// Its certificates, to be looked at again when others are trusted.
    pub(crate) presented: Presented,
}

impl ConnectionInfo {
    /// One that `chain` took for these facts; what TLS says besides is added to them.
    pub(super) fn new(mut facts: Facts, offers_known: bool, tls: Option<Tls>, chain: Arc<Chain>, epoch: u64) -> Self {
        let spoken = &mut facts.spoken;
        spoken.transport.get_or_insert(match tls {
            Some(_) => TransportProtocol::Tls,
            None => TransportProtocol::RawBuffer,
        });
        if let (None, Some(Tls { sni: Some(sni), .. })) = (&spoken.server_name, &tls) {
            spoken.server_name = Some(sni.to_ascii_lowercase());
        }
        let limits = chain.limits.load_full();
        let (seen, farewell) = (Seen::default(), Farewell::default());
        Self(Arc::new(Inner { facts, offers_known, tls, chain, limits, epoch, seen, farewell }))
    }

    /// Who the client is, by its verified certificate; `None` without TLS, or without a certificate.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.0.tls.as_ref()?.peer.as_ref()
    }

    /// The client's end of the connection. What stands between us and it (a load balancer) is not looked through.
    pub fn remote_addr(&self) -> SocketAddr {
        self.0.facts.remote
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.facts.local
    }

    /// Whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        self.0.tls.is_some()
    }

    /// The server name that the client sent.
    pub fn sni(&self) -> Option<&str> {
        self.0.tls.as_ref()?.sni.as_deref()
    }

    /// The negotiated ALPN protocol.
    pub fn alpn(&self) -> Option<&[u8]> {
        self.0.tls.as_ref()?.alpn.as_deref()
    }

    /// Puts itself and the client's identity into the extensions of a request, and what tonic's own requests say of the addresses.
    pub(super) fn tell(&self, head: &mut request::Parts) {
        let extensions = &mut head.extensions;
        extensions.insert(self.clone());
        match self.peer() {
            Some(peer) => _ = extensions.insert(peer.clone()),
            // Whatever is there is not of this connection.
            None => _ = extensions.remove::<PeerIdentity>(),
        }
        #[cfg(feature = "tonic-server")]
        if crate::outbound::timeout::is_grpc(&head.headers) {
            let (local_addr, remote_addr) = (Some(self.local_addr()), Some(self.remote_addr()));
            extensions.insert(tonic::transport::server::TcpConnectInfo { local_addr, remote_addr });
        }
    }

    pub(super) fn seen(&self) -> &Seen {
        &self.0.seen
    }

    pub(super) fn facts(&self) -> &Facts {
        &self.0.facts
    }

    pub(super) fn offers_known(&self) -> bool {
        self.0.offers_known
    }

    /// Of its chain, when it began.
    pub(super) fn limits(&self) -> &Arc<Limits> {
        &self.0.limits
    }

    pub(super) fn epoch(&self) -> u64 {
        self.0.epoch
    }

    /// Whether its client would be let in by whom its chain trusts now.
    pub(super) fn is_trusted(&self) -> bool {
        let (Some(tls), Some(acceptor)) = (&self.0.tls, self.chain().acceptor()) else { return true };
        acceptor.admits(&tls.presented)
    }

    /// How far its end has come, where others speak its protocol.
    pub(super) fn farewell(&self) -> &Farewell {
        &self.0.farewell
    }

    /// The filter chain that took it.
    pub(crate) fn chain(&self) -> &Arc<Chain> {
        &self.0.chain
    }
}

impl fmt::Debug for ConnectionInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionInfo")
            .field("remote", &self.remote_addr())
            .field("local", &self.local_addr())
            .field("tls", &self.0.tls)
            .finish_non_exhaustive()
    }
}
