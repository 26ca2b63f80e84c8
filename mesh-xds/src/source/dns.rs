//! DNS: the addresses of one name, refreshed by TTL, the last good ones kept.

mod lookup;

pub(crate) use lookup::{Lookup, Resolvers, refresh};

use super::{
    Policy, ResolverConfig,
    assembly::Assembly,
    fixed::{Template, fixed_with},
};
use crate::{
    ads::Backoff,
    bootstrap::split_host_port,
    resource::{ClusterLoadAssignment, Endpoint, LookupFamily},
    snapshot::{ResourceError, ResourceErrorKind},
    watch::TargetWatch,
};
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::time::sleep;

/// First delay after a failed lookup.
const RETRY: Duration = Duration::from_secs(1);

/// How `dns:///` targets are resolved, and by whom the names of DNS clusters are, which say themselves how often.
#[derive(Clone, Debug)]
pub struct DnsOptions {
    /// `None`: the system's configuration (`/etc/resolv.conf`). The hosts file is read either way.
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

/// A target called `name` over the addresses of `target`, `host:port`. An IP literal is Ready at once; a name is Pending until the first answer,
/// with the cause while lookups fail. The task that resolves stops when the watch is dropped.
///
/// # Errors
/// `target` is not `host:port`.
///
/// # Panics
/// With a name, outside a tokio runtime.
pub fn dns(name: &str, target: &str, policy: &Policy, options: &DnsOptions) -> Result<TargetWatch, DnsTargetError> {
    let (host, port) = parse(target).map_err(|reason| DnsTargetError { target: target.to_owned(), reason })?;
    if let Ok(ip) = host.parse::<IpAddr>() {
        let endpoints = ClusterLoadAssignment::of(name, vec![Endpoint::new(SocketAddr::new(ip, port))]);
        return Ok(fixed_with(name, Arc::new(endpoints), policy, options));
    }
    let resolvers = Resolvers::new(options.resolver.clone());
    resolvers
        .of(LookupFamily::All)
        .map_err(|error| DnsTargetError { target: target.to_owned(), reason: format!("no DNS resolver: {error}") })?;
    Ok(follow(Template::new(name, policy), host.to_owned(), port, options, Arc::new(resolvers)))
}

fn parse(target: &str) -> Result<(&str, u16), String> {
    let (host, port) = split_host_port(target).ok_or("is not host:port")?;
    let port = port.ok_or("has no port")?;
    let port = port.parse().map_err(|_| format!("\"{port}\" is not a port"))?;
    if host.is_empty() || host.contains(['/', ' ', '@', '?', '#']) {
        return Err(format!("\"{host}\" is not a host name"));
    }
    Ok((host, port))
}

fn follow(template: Template, host: String, port: u16, options: &DnsOptions, lookup: Arc<dyn Lookup>) -> TargetWatch {
    let name = template.name.clone();
    let own = name.clone();
    let (assembly, state) = Assembly::new(template);
    let mut tasks = assembly.follow(|| lookup.clone());
    let followed = Arc::downgrade(&assembly);
    let refresh = (options.min_refresh, options.max_refresh.max(options.min_refresh));
    let task = tokio::spawn(async move {
        let mut rng = fastrand::Rng::new();
        let mut backoff = Backoff::new(RETRY.max(refresh.0), refresh.1);
        let mut known = None;
        let mut version: u64 = 0;
        loop {
            let pause = match lookup.lookup(host.clone(), LookupFamily::All).await {
                Ok((addresses, ttl)) => {
                    backoff.reset();
                    let addresses: BTreeSet<SocketAddr> =
                        addresses.into_iter().map(|ip| SocketAddr::new(ip, port)).collect();
                    if known.as_ref() != Some(&addresses) {
                        version += 1;
                        let endpoints = addresses.iter().copied().map(Endpoint::new).collect();
                        let endpoints = Arc::new(ClusterLoadAssignment::of(own.clone(), endpoints));
                        let Some(assembly) = followed.upgrade() else { return };
                        assembly.own(endpoints, format!("dns={version}"));
                        known = Some(addresses);
                    }
                    jittered(ttl.clamp(refresh.0, refresh.1), &mut rng)
                }
                Err(error) => {
                    // The last good addresses stay in force.
                    let stay = if known.is_some() { "; the last addresses stay in force" } else { "" };
                    tracing::warn!("{}{stay}", error.message);
                    let Some(assembly) = followed.upgrade() else { return };
                    assembly.unknown(error);
                    backoff.next(&mut rng)
                }
            };
            sleep(pause).await;
        }
    });
    tasks.0.push(task.abort_handle());
    TargetWatch::new(name, state, Arc::new((assembly, tasks)))
}

fn unresolved(message: String) -> ResourceError {
    ResourceError { kind: ResourceErrorKind::Unresolved, message }
}

/// Up to a tenth longer, so that many clients do not ask at once.
fn jittered(pause: Duration, rng: &mut fastrand::Rng) -> Duration {
    pause.mul_f64(rng.f64().mul_add(0.1, 1.0))
}

#[cfg(test)]
mod tests;
