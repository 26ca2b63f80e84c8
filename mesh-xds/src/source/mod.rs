//! Sources without a control plane: a fixed list and DNS. Each ends in the same snapshot as xDS does.

mod assembly;
mod check;
mod dns;
mod fixed;
mod relay;
pub mod route;

pub use check::PolicyError;
pub use dns::{DnsOptions, DnsTargetError, dns};
pub(crate) use dns::{Lookup, Resolvers, refresh};
pub use fixed::{fixed, fixed_with};
pub use hickory_resolver::config::ResolverConfig;
pub use relay::{Relay, relay};

use crate::resource::{Cluster, HashPolicy, HeaderEdits, Hedge, HttpFilter, RetryPolicy, Route};
use std::{sync::Arc, time::Duration};

/// The policy of a target that has no control plane. See [`route`] for a comfortable way to write its routes.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What the cluster of the target's own endpoints is like: everything but name and discovery is taken. `None`: every default.
    pub cluster: Option<Cluster>,
    /// Further clusters, by their names: with endpoints of their own ([`Cluster::fixed`]), by DNS names ([`Cluster::dns`]) or aggregates.
    pub clusters: Vec<Cluster>,
    /// Asked in order; a request that matches none of them goes to the target's own endpoints. They send requests to `clusters` and to
    /// [`TARGET`](Self::TARGET); requests to any other cluster fail.
    pub routes: Vec<Route>,
    /// Header edits of all routes.
    pub edits: HeaderEdits,
    /// Of routes that have none of their own.
    pub retry: Option<Arc<RetryPolicy>>,
    /// When requests are sent once more while they wait for an answer, of routes that do not say; limited by `retry`.
    pub hedge: Option<Hedge>,
    /// Timeout of routes that have none of their own; `None` when unset, zero disables.
    pub timeout: Option<Duration>,
    /// Filters of its requests, in order; the router comes by itself.
    pub filters: Vec<HttpFilter>,
    /// What a cluster whose policy hashes requests takes for their hash, of routes that do not say.
    pub hash: Vec<HashPolicy>,
}

impl Policy {
    /// What routes call the cluster of the target's own endpoints.
    pub const TARGET: &'static str = "";

    /// With one more route, behind those before.
    #[must_use]
    pub fn with_route(mut self, route: impl Into<Route>) -> Self {
        self.routes.push(route.into());
        self
    }

    /// With one more cluster.
    #[must_use]
    pub fn with_cluster(mut self, cluster: Cluster) -> Self {
        self.clusters.push(cluster);
        self
    }

    /// What the cluster of the target's own endpoints is like.
    #[must_use]
    pub fn with_target(mut self, cluster: Cluster) -> Self {
        self.cluster = Some(cluster);
        self
    }

    /// What is tried again, on routes that do not say.
    #[must_use]
    pub fn with_retry(mut self, retry: impl Into<Arc<RetryPolicy>>) -> Self {
        self.retry = Some(retry.into());
        self
    }

    /// Limit of calls on routes that do not say; zero is none.
    #[must_use]
    pub fn with_timeout(mut self, limit: Duration) -> Self {
        self.timeout = Some(limit);
        self
    }

    /// With one more filter, behind those before.
    #[must_use]
    pub fn with_filter(mut self, filter: HttpFilter) -> Self {
        self.filters.push(filter);
        self
    }
}
