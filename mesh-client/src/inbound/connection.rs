//! What is known of a connection.

use super::{Chain, seen::Seen};
use mesh_tls::PeerIdentity;
use std::{fmt, net::SocketAddr, sync::Arc};

/// The connection that a request came over: in the extensions of every request, cheap to clone.
///
/// The identity of a verified peer is there under its own type as well, [`PeerIdentity`].
#[derive(Clone)]
pub struct ConnectionInfo(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) tls: Option<Tls>,
    pub(crate) chain: Arc<Chain>,
    pub(crate) seen: Seen,
}

/// What TLS says of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tls {
    pub(crate) peer: Option<PeerIdentity>,
    pub(crate) sni: Option<Box<str>>,
    pub(crate) alpn: Option<Box<[u8]>>,
}

impl ConnectionInfo {
    pub(crate) fn new(inner: Inner) -> Self {
        Self(Arc::new(inner))
    }

    /// Who the client is, by its verified certificate; `None` without TLS, or without a certificate.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.0.tls.as_ref()?.peer.as_ref()
    }

    /// The client's end of the connection. What stands between us and it (a load balancer) is not looked through.
    pub fn remote_addr(&self) -> SocketAddr {
        self.0.remote
    }

    /// Our end of the connection.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local
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

    /// Puts itself and the client's identity into the extensions of a request.
    pub(super) fn tell(&self, extensions: &mut http::Extensions) {
        extensions.insert(self.clone());
        match self.peer() {
            Some(peer) => _ = extensions.insert(peer.clone()),
            // Whatever is there is not of this connection.
            None => _ = extensions.remove::<PeerIdentity>(),
        }
    }

    pub(super) fn seen(&self) -> &Seen {
        &self.0.seen
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
