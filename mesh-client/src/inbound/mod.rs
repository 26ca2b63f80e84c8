//! The inbound side: connections are accepted, their peers verified, their requests decided about, and served.
//!
//! | step | where |
//! |---|---|
//! | accept | `accept`: limits, which filter chain (`config`), TLS or plaintext |
//! | transport | `crate::transport`: HTTP/2 of our own, HTTP/1.1 on hyper |
//! | serve | `serve`: which protocol, and how connections end (`connections`) |
//! | decide | `policy`, by `guard`, for every request |

mod accept;
mod authorize;
mod authz;
#[cfg(feature = "axum")]
mod axum;
mod builder;
mod chain_match;
mod config;
mod connection;
mod connections;
mod detect;
mod farewell;
mod file;
mod follow;
mod guard;
mod handshakes;
mod incoming;
mod jwt;
mod limits;
mod listening;
mod normalize;
mod policy;
mod refusals;
mod routes;
mod seen;
mod serve;
mod steps;
mod subject;
#[cfg(test)]
mod tests;
mod whole;
mod xfcc;

pub use accept::InboundStream;
pub use authorize::{JwtAuthentication, JwtProvider, RateLimit, Rbac, Rule};
pub(crate) use authz::Parser as AuditParser;
pub use authz::{AuditEvent, AuditLogger, AuditLoggerFactory, audit_logger};
#[cfg(feature = "axum")]
pub use axum::{Guarded, GuardedFuture, MakeGuard};
pub use builder::{BuildError, InboundBuilder};
pub(crate) use config::{Chain, Config, Security};
pub use connection::ConnectionInfo;
pub use follow::Serving;
pub(crate) use follow::{Origin, jwks_target};
pub use guard::{Guard, GuardFuture, InboundLayer, ResponseBody};
pub use incoming::Incoming;
pub(crate) use jwt::Fetched;
pub use jwt::{FetchKeys, JwtClaims};
pub use limits::Limits;
pub(crate) use policy::{Deciding, Decision, Exchange, Kept, Policy, Source, Verdict};
pub use xfcc::{ForwardedClient, ForwardedClientError};

/// What policies from code are made of, and what a control plane's are read into.
pub use mesh_xds::resource::{AuditLogging, CidrRange, ClientCertDetails, ForwardClientCert, PathTemplate};

pub use crate::transport::{RequestBody, RequestBodyError};

use crate::{error::caught, outbound::connect::TlsRenewal, task::Task};
use arc_swap::ArcSwap;
use connections::Connections;
use handshakes::Handshakes;
use listening::Listening;
use refusals::Refusals;
use std::{
    fmt, io,
    net::SocketAddr,
    sync::{Arc, OnceLock, atomic::AtomicUsize},
    time::Duration,
};
use tokio::{net::TcpListener, sync::watch};

/// A listening socket of the mesh: who may connect, what every request is asked, and who serves it.
///
/// A handle, cheap to clone; the clones share the socket. It closes when [`shutdown`](Self::shutdown) begins, when the last that takes connections
/// ([`serve`](Self::serve), [`incoming`](Self::incoming)) is dropped, or with the last handle: from then on clients are refused, and another
/// process may listen on the port, while open connections are served to their end.
#[derive(Clone)]
pub struct Inbound(Arc<Shared>);

struct Shared {
    listening: Arc<Listening>,
    local: SocketAddr,
    /// In force for connections from now on; what a request is asked is in its connection's [`Chain`].
    config: ArcSwap<Config>,
    /// Before a filter chain is found, and the most that one can allow.
    limits: ArcSwap<Limits>,
    /// What becomes of connections whose clients are not trusted any more.
    renewal: TlsRenewal,
    /// Connections that are open.
    open: Arc<AtomicUsize>,
    /// Those that are served here.
    connections: Arc<Connections>,
    /// Who is not taken.
    refusals: Refusals,
    /// Room for handshakes.
    handshakes: ArcSwap<Handshakes>,
    serving: watch::Sender<Serving>,
    on_serving: Option<follow::OnServing>,
    /// What follows the control plane, if one does.
    following: OnceLock<Task>,
}

impl Inbound {
    /// An inbound side from code.
    pub fn builder() -> InboundBuilder {
        InboundBuilder::default()
    }

    /// # Panics
    /// Outside of a tokio runtime.
    fn new(
        listener: TcpListener,
        config: Config,
        limits: Arc<Limits>,
        renewal: TlsRenewal,
        on_serving: Option<follow::OnServing>,
    ) -> io::Result<Self> {
        let local = listener.local_addr()?;
        let handshakes = ArcSwap::from_pointee(Handshakes::new(&limits));
        let config = ArcSwap::from_pointee(config);
        let (open, connections) = (Arc::default(), Arc::new(Connections::new()));
        let serving = watch::Sender::new(Serving::Serving { version: "code".into(), problems: Arc::default() });
        let (listening, following) = (Arc::new(Listening::new(listener)), OnceLock::new());
        let shared = Shared {
            listening,
            local,
            config,
            limits: ArcSwap::new(limits),
            renewal,
            open,
            connections,
            refusals: Refusals::default(),
            handshakes,
            serving,
            on_serving,
            following,
        };
        shared.follow_trust(&shared.config.load());
        Ok(Self(Arc::new(shared)))
    }

    /// Whether it takes connections now. One from code always does.
    pub fn serving(&self) -> Serving {
        self.0.serving.borrow().clone()
    }

    /// Waits until it takes connections: until the control plane has said how.
    ///
    /// # Cancel safety
    /// Cancel safe.
    pub async fn ready(&self) {
        // Fails when the sender is gone, and it is in `self`.
        let _ = self.0.serving.subscribe().wait_for(Serving::is_serving).await;
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

impl Shared {
    /// In force for connections from now on. Those that are open and that another chain would take now, or none, are told to go away; what is
    /// still in flight when [`Limits::drain_timeout`] is over is cut.
    fn apply(&self, config: Config) {
        let config = Arc::new(config);
        self.config.store(config.clone());
        self.follow_trust(&config);
        let gone = self.connections.drain(Duration::MAX, |info| config.keeps(info));
        if gone > 0 {
            tracing::info!(address = %self.local, connections = gone, "connections that their filter chain does not take any more are drained");
        }
    }

    /// In force for connections that are accepted from now on. Handshakes that are under way count among those before.
    fn limit(&self, limits: Arc<Limits>) {
        if !self.handshakes.load().are_of(&limits) {
            self.handshakes.store(Arc::new(Handshakes::new(&limits)));
        }
        self.limits.store(limits);
    }

    /// Looks at the clients of these chains again whenever others are trusted.
    fn follow_trust(&self, config: &Config) {
        if let TlsRenewal::Within(bound) = self.renewal {
            config.all().for_each(|chain| chain.follow_trust(&self.connections, bound));
        }
    }

    /// Says whether connections are taken, where that is news.
    fn serves(&self, now: Serving) {
        let news = self.serving.send_if_modified(|last| {
            let news = *last != now;
            last.clone_from(&now);
            news
        });
        if !news {
            return;
        }
        match &now {
            Serving::Serving { version, problems } => {
                tracing::info!(address = %self.local, version = &**version, problems = problems.len(), "the inbound side serves");
            }
            Serving::NotServing { reason } => {
                tracing::warn!(address = %self.local, "the inbound side does not serve: {reason}");
            }
        }
        if let Some(tell) = &self.on_serving
            && let Err(panic) = caught(|| tell(&now))
        {
            tracing::error!(address = %self.local, panic, "the callback of the inbound side panicked");
        }
    }
}

impl fmt::Debug for Inbound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbound").field("local", &self.0.local).finish_non_exhaustive()
    }
}

/// For the fuzzers.
pub(crate) mod fuzz {
    use super::{
        chain_match::{Need, Spoken},
        detect,
        jwt::{KeySet, Token},
    };
    use mesh_xds::resource::TransportProtocol;

    /// Whether a token is signed by one of these keys.
    pub(crate) fn verify(keys: &[u8], token: &str) -> bool {
        let keys = KeySet::parse(keys);
        let token = Token::parse(token);
        let (Ok(keys), Ok(token)) = (keys, token) else { return false };
        keys.verify(&token, &mesh_tls::default_provider()).is_ok()
    }

    /// What a connection that begins with these bytes is taken for: whether it is TLS, the server name, and the protocols. `None`: more
    /// has to be seen.
    pub(crate) fn sniff(bytes: &[u8], hello: bool) -> Option<(bool, Option<String>, Vec<String>)> {
        let Spoken { transport, server_name, protocols } =
            detect::read(bytes, if hello { Need::Hello } else { Need::Transport })?;
        Some((transport == Some(TransportProtocol::Tls), server_name, protocols))
    }
}
