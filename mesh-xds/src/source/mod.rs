//! Sources without a control plane: a fixed list and DNS. Each ends in the same snapshot as xDS does.

mod dns;
mod fixed;
mod relay;

pub use dns::{DnsOptions, DnsTargetError, dns};
pub(crate) use dns::{Resolvers, refresh};
pub use fixed::fixed;
pub use hickory_resolver::config::ResolverConfig;
pub use relay::{Relay, relay};

use crate::resource::{Cluster, HashPolicy, Hedge, HttpFilter, RetryPolicy};
use std::{sync::Arc, time::Duration};

/// The policy of a target that has no control plane.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    /// What its cluster is like: everything but name and discovery is taken. `None`: every default.
    pub cluster: Option<Cluster>,
    /// Retry policy of its route.
    pub retry: Option<Arc<RetryPolicy>>,
    /// When its requests are sent once more while they wait for an answer; limited by `retry`.
    pub hedge: Option<Hedge>,
    /// Timeout of its route; `None` when unset, zero disables.
    pub timeout: Option<Duration>,
    /// Filters of its requests, in order; the router comes by itself.
    pub filters: Vec<HttpFilter>,
    /// What a cluster whose policy hashes requests takes for their hash.
    pub hash: Vec<HashPolicy>,
}
