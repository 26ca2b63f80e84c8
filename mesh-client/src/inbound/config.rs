//! The configuration of a listening socket: filter chains, one of which takes each connection.

use super::{
    ConnectionInfo, Limits, Policy,
    chain_match::{Facts, Need, choose},
    connections::Connections,
};
use crate::task::Task;
use arc_swap::{ArcSwap, ArcSwapOption};
use mesh_tls::Acceptor;
use mesh_xds::resource::FilterChainMatch;
use std::{
    fmt,
    sync::{Arc, OnceLock},
    time::Duration,
};

/// What is in force for connections that are accepted from now on.
///
/// A chain that is secured as before stays the very same (the same `Arc`). Those who are connected are chosen a chain for again: whose
/// choice is another one than the one that took them have to leave.
///
/// Without any chain nothing is served: connections are closed as soon as they are accepted.
#[derive(Debug, Default)]
pub(crate) struct Config {
    /// With the connections that each takes.
    pub(crate) chains: Vec<(FilterChainMatch, Arc<Chain>)>,
    /// For connections that match none of them.
    pub(crate) default: Option<Arc<Chain>>,
    /// How long a client may take to say what its chain is chosen by; `None`: as long as a handshake.
    pub(crate) detection_timeout: Option<Duration>,
}

/// One filter chain: how its connections are secured, and what their requests are asked.
pub(crate) struct Chain {
    pub(crate) name: Arc<str>,
    pub(crate) security: Security,
    /// Of connections that begin.
    pub(crate) limits: ArcSwap<Limits>,
    /// Asked for each request anew, so that a change holds for the connections that are open. `None`: everything is let in.
    pub(crate) policy: ArcSwapOption<Policy>,
    /// Looks at its connections again when others are trusted.
    trust: OnceLock<Task>,
}

/// How the connections of a chain are secured.
#[derive(Clone, Debug)]
pub(crate) enum Security {
    Plaintext,
    Tls(Acceptor),
    /// Not at all, for this reason: they are closed.
    Refused(Arc<str>),
}

impl Config {
    /// One chain for all connections.
    pub(crate) fn single(chain: Arc<Chain>) -> Self {
        Self { default: Some(chain), ..Self::default() }
    }

    /// All chains.
    pub(super) fn all(&self) -> impl Iterator<Item = &Arc<Chain>> {
        self.chains.iter().map(|(_, chain)| chain).chain(&self.default)
    }

    fn matchers(&self) -> impl Iterator<Item = &FilterChainMatch> {
        self.chains.iter().map(|(matcher, _)| matcher)
    }

    /// What has to be known of a connection.
    pub(crate) fn need(&self) -> Need {
        Need::of(self.matchers())
    }

    /// The chain that takes a connection; `None`: it is closed.
    pub(crate) fn choose(&self, facts: &Facts) -> Option<&Arc<Chain>> {
        if self.chains.is_empty() {
            return self.default.as_ref();
        }
        let matchers: Vec<_> = self.matchers().collect();
        choose(&matchers, facts).map(|index| &self.chains[index].1).or(self.default.as_ref())
    }

    /// Whether a connection may stay: its chain is there, and is the one that takes it.
    pub(crate) fn keeps(&self, info: &ConnectionInfo) -> bool {
        // What a client offered to speak may not have been looked at: it has to say it again.
        let unknown = !info.offers_known() && self.matchers().any(|m| !m.application_protocols.is_empty());
        !unknown && self.choose(info.facts()).is_some_and(|chain| Arc::ptr_eq(chain, info.chain()))
    }
}

impl Chain {
    pub(crate) fn new(
        name: impl Into<Arc<str>>,
        security: Security,
        limits: Arc<Limits>,
        policy: Option<Arc<Policy>>,
    ) -> Self {
        Self {
            name: name.into(),
            security,
            limits: ArcSwap::new(limits),
            policy: ArcSwapOption::new(policy),
            trust: OnceLock::new(),
        }
    }

    /// From now on, whenever certificates or roots change, connections of clients that would not be let in any more leave, and are cut at the bound.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub(super) fn follow_trust(self: &Arc<Self>, connections: &Arc<Connections>, bound: Duration) {
        let Some(acceptor) = self.acceptor() else { return };
        self.trust.get_or_init(|| {
            let mut generations = acceptor.generations();
            let (chain, connections) = (Arc::downgrade(self), Arc::downgrade(connections));
            Task::spawn(async move {
                loop {
                    generations.changed().await;
                    let (Some(chain), Some(connections)) = (chain.upgrade(), connections.upgrade()) else { return };
                    let gone = connections.drain(bound, |info| !Arc::ptr_eq(info.chain(), &chain) || info.is_trusted());
                    if gone > 0 {
                        tracing::info!(
                            chain = &*chain.name,
                            connections = gone,
                            "connections whose clients are not trusted any more are drained"
                        );
                    }
                }
            })
        });
    }

    /// `None`: plaintext.
    pub(crate) fn acceptor(&self) -> Option<&Acceptor> {
        match &self.security {
            Security::Tls(acceptor) => Some(acceptor),
            Security::Plaintext | Security::Refused(_) => None,
        }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("name", &self.name).field("security", &self.security).finish_non_exhaustive()
    }
}
