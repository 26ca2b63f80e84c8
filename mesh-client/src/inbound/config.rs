//! The configuration of a listening socket: filter chains, one of which takes each connection.

use super::{
    Policy,
    chain_match::{Facts, Need, choose},
};
use arc_swap::ArcSwapOption;
use mesh_tls::Acceptor;
use mesh_xds::resource::FilterChainMatch;
use std::{fmt, sync::Arc, time::Duration};

/// What is in force for connections that are accepted from now on.
///
/// A change of the configuration keeps the chains that stay as they are (the very same `Arc`), so that their connections go on; the
/// connections of chains that are not in the new one are drained.
///
/// Without any chain nothing is served: connections are closed as soon as they are accepted.
#[derive(Debug, Default)]
pub(crate) struct Config {
    pub(crate) chains: Vec<Arc<Chain>>,
    /// For connections that match none of them.
    pub(crate) default: Option<Arc<Chain>>,
    /// How long a client may take to say what its chain is chosen by; `None`: as long as a handshake.
    pub(crate) detection_timeout: Option<Duration>,
}

/// One filter chain: how its connections are secured, and what their requests are asked.
pub(crate) struct Chain {
    pub(crate) name: Arc<str>,
    /// Which connections.
    pub(crate) matcher: FilterChainMatch,
    /// `None`: plaintext.
    pub(crate) tls: Option<Acceptor>,
    /// Asked for each request anew, so that a change holds for the connections that are open. `None`: everything is let in.
    pub(crate) policy: ArcSwapOption<Policy>,
}

impl Config {
    /// One chain for all connections.
    pub(crate) fn single(chain: Chain) -> Self {
        Self { default: Some(Arc::new(chain)), ..Self::default() }
    }

    /// Whether this is one of its chains.
    pub(crate) fn has(&self, chain: &Arc<Chain>) -> bool {
        self.chains.iter().chain(&self.default).any(|own| Arc::ptr_eq(own, chain))
    }

    /// What has to be known of a connection.
    pub(crate) fn need(&self) -> Need {
        Need::of(self.chains.iter().map(|chain| &chain.matcher))
    }

    /// The chain that takes a connection; `None`: it is closed.
    pub(crate) fn choose(&self, facts: &Facts) -> Option<&Arc<Chain>> {
        if self.chains.is_empty() {
            return self.default.as_ref();
        }
        let matchers: Vec<_> = self.chains.iter().map(|chain| &chain.matcher).collect();
        choose(&matchers, facts).map(|index| &self.chains[index]).or(self.default.as_ref())
    }
}

impl Chain {
    pub(crate) fn new(name: impl Into<Arc<str>>, tls: Option<Acceptor>, policy: Option<Arc<Policy>>) -> Self {
        let matcher = FilterChainMatch::default();
        Self { name: name.into(), matcher, tls, policy: ArcSwapOption::new(policy) }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("name", &self.name).field("tls", &self.tls.is_some()).finish_non_exhaustive()
    }
}
