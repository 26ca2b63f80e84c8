//! The inbound side: connections are accepted, their peers verified, their requests decided about, and served.
//!
//! | step | where |
//! |---|---|
//! | accept | [`accept`]: limits, which filter chain ([`config`]), TLS or plaintext |
//! | transport | `crate::transport`: HTTP/2 of our own, HTTP/1.1 on hyper |
//! | serve | [`serve`]: which protocol, and how connections end ([`connections`]) |
//! | decide | [`policy`], by [`guard`], for every request |

mod accept;
mod authorize;
mod authz;
mod builder;
mod config;
mod connection;
mod connections;
mod guard;
mod incoming;
mod jwt;
mod limits;
mod policy;
mod routes;
mod seen;
mod serve;
mod steps;
mod subject;
#[cfg(test)]
mod tests;
mod xfcc;

pub use accept::InboundStream;
pub use authorize::{JwtProvider, RateLimit, Rbac, Rule};
pub(crate) use authz::Parser as AuditParser;
pub use authz::{AuditEvent, AuditLogger, AuditLoggerFactory, audit_logger};
pub use builder::{BuildError, InboundBuilder};
pub(crate) use config::{Chain, Config};
pub use connection::ConnectionInfo;
pub use guard::{Guard, GuardFuture, InboundLayer, ResponseBody};
pub use incoming::Incoming;
pub use jwt::{FetchKeys, JwtClaims};
pub use limits::Limits;
pub(crate) use policy::{Deciding, Decision, Exchange, Kept, Policy, Source, Verdict};
pub use xfcc::{ForwardedClient, ForwardedClientError};

/// What policies from code are made of, and what a control plane's are read into.
pub use mesh_xds::resource::{AuditLogging, CidrRange, ClientCertDetails, ForwardClientCert, PathTemplate};

pub use crate::transport::{RequestBody, RequestBodyError};

use arc_swap::ArcSwap;
use connections::Connections;
use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, atomic::AtomicUsize},
};
use tokio::{net::TcpListener, sync::Semaphore};

/// A listening socket of the mesh: who may connect, what every request is asked, and who serves it.
///
/// A handle, cheap to clone; the clones share the socket. It is closed when the last of them is dropped.
#[derive(Clone)]
pub struct Inbound(Arc<Shared>);

struct Shared {
    listener: TcpListener,
    local: SocketAddr,
    /// In force for connections from now on; what a request is asked is in its connection's [`Chain`].
    config: ArcSwap<Config>,
    limits: Limits,
    /// Connections that are open.
    open: Arc<AtomicUsize>,
    /// Those that are served here.
    connections: Connections,
    /// Room for handshakes.
    handshakes: Arc<Semaphore>,
}

impl Inbound {
    /// An inbound side from code.
    pub fn builder() -> InboundBuilder {
        InboundBuilder::default()
    }

    fn new(listener: TcpListener, config: Config, limits: Limits) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let handshakes = Arc::new(Semaphore::new(limits.max_handshakes.clamp(1, Semaphore::MAX_PERMITS)));
        let config = ArcSwap::from_pointee(config);
        let (open, connections) = (Arc::default(), Connections::new());
        Ok(Self(Arc::new(Shared { listener, local, config, limits, open, connections, handshakes })))
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local
    }

    /// Its connections, for tonic's own server; with [`layer`](Self::layer) around the services.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn incoming(&self) -> Incoming {
        Incoming::new(self.clone())
    }

    /// The policy of this inbound side as a layer, for tonic's own server over the connections of [`incoming`](Self::incoming).
    pub fn layer(&self) -> InboundLayer {
        InboundLayer::default()
    }
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbound").field("local", &self.0.local).finish_non_exhaustive()
    }
}

/// For the fuzzers.
pub(crate) mod fuzz {
    use super::jwt::{KeySet, Token};

    /// Whether a token is signed by one of these keys.
    pub(crate) fn verify(keys: &[u8], token: &str) -> bool {
        let keys = KeySet::parse(keys);
        let token = Token::parse(token);
        let (Ok(keys), Ok(token)) = (keys, token) else { return false };
        keys.verify(&token, &mesh_tls::default_provider()).is_ok()
    }
}
