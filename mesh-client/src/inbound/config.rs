//! The configuration of a listening socket: filter chains, one of which takes each connection.

use super::Policy;
use arc_swap::ArcSwapOption;
use mesh_tls::Acceptor;
use std::{fmt, net::SocketAddr, sync::Arc};

/// What is in force for connections that are accepted from now on.
///
/// A change of the configuration keeps the chains that stay as they are (the very same `Arc`), so that their connections go on; the
/// connections of chains that are not in the new one are drained.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) chains: Vec<Arc<Chain>>,
}

/// One filter chain: how its connections are secured, and what their requests are asked.
pub(crate) struct Chain {
    pub(crate) name: Arc<str>,
    /// `None`: plaintext.
    pub(crate) tls: Option<Acceptor>,
    /// Asked for each request anew, so that a change holds for the connections that are open. `None`: everything is let in.
    pub(crate) policy: ArcSwapOption<Policy>,
}

/// What a chain is chosen by.
#[derive(Clone, Debug)]
#[expect(dead_code, reason = "until chains are chosen")]
pub(crate) struct Facts {
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
}

impl Config {
    /// One chain for all connections.
    pub(crate) fn single(chain: Chain) -> Self {
        Self { chains: vec![Arc::new(chain)] }
    }

    /// The chain that takes a connection; `None`: it is closed.
    pub(crate) fn choose(&self, _facts: &Facts) -> Option<&Arc<Chain>> {
        self.chains.first()
    }
}

impl Chain {
    pub(crate) fn new(name: impl Into<Arc<str>>, tls: Option<Acceptor>, policy: Option<Arc<Policy>>) -> Self {
        Self { name: name.into(), tls, policy: ArcSwapOption::new(policy) }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("name", &self.name).field("tls", &self.tls.is_some()).finish_non_exhaustive()
    }
}
