//! One name, looked up: the resolvers, and the clock of a DNS cluster's name.

use super::unresolved;
use crate::{
    ads::Backoff,
    resource::{DnsRefresh, LookupFamily},
    snapshot::ResourceError,
};
use futures::future::BoxFuture;
use hickory_resolver::{
    Resolver, TokioResolver,
    config::{LookupIpStrategy, ResolverConfig},
    net::{NetError, runtime::TokioRuntimeProvider},
};
use std::{net::IpAddr, sync::OnceLock, time::Duration};
use tokio::time::sleep;

/// The addresses of a name and how long they are good.
pub(crate) type Answer = Result<(Vec<IpAddr>, Duration), ResourceError>;

/// Where addresses come from.
pub(crate) trait Lookup: Send + Sync {
    /// Looks a name up once.
    fn lookup(&self, host: String, family: LookupFamily) -> BoxFuture<'_, Answer>;
}

/// The resolvers of one client, one for each [`LookupFamily`], made when first used.
pub(crate) struct Resolvers {
    config: Option<ResolverConfig>,
    by_family: [OnceLock<Result<TokioResolver, String>>; LookupFamily::ALL.len()],
}

impl Resolvers {
    /// `None`: the system's configuration. The hosts file is read either way.
    pub(crate) fn new(config: Option<ResolverConfig>) -> Self {
        Self { config, by_family: Default::default() }
    }

    /// The resolver of a family.
    ///
    /// # Errors
    /// It cannot be made.
    pub(super) fn of(&self, family: LookupFamily) -> Result<&TokioResolver, &str> {
        let made = self.by_family[family as usize]
            .get_or_init(|| resolver(self.config.as_ref(), family).map_err(|error| error.to_string()));
        made.as_ref().map_err(String::as_str)
    }
}

fn resolver(config: Option<&ResolverConfig>, family: LookupFamily) -> Result<TokioResolver, NetError> {
    let mut builder = match config {
        Some(config) => Resolver::builder_with_config(config.clone(), TokioRuntimeProvider::default()),
        None => Resolver::builder_tokio().unwrap_or_else(|error| {
            tracing::warn!("no system DNS configuration, only the hosts file is used: {error}");
            let none = ResolverConfig::from_parts(None, Vec::new(), Vec::new());
            Resolver::builder_with_config(none, TokioRuntimeProvider::default())
        }),
    };
    let options = builder.options_mut();
    options.ip_strategy = match family {
        LookupFamily::Auto => LookupIpStrategy::Ipv6thenIpv4,
        LookupFamily::V4Only => LookupIpStrategy::Ipv4Only,
        LookupFamily::V6Only => LookupIpStrategy::Ipv6Only,
        LookupFamily::V4Preferred => LookupIpStrategy::Ipv4thenIpv6,
        LookupFamily::All => LookupIpStrategy::Ipv4AndIpv6,
    };
    // The refresh follows the TTL itself; a cache would only age the answers.
    options.cache_size = 0;
    builder.build()
}

impl Lookup for Resolvers {
    fn lookup(&self, host: String, family: LookupFamily) -> BoxFuture<'_, Answer> {
        Box::pin(async move {
            let resolver = self.of(family).map_err(|error| unresolved(format!("no DNS resolver: {error}")))?;
            let answer = resolver
                .lookup_ip(host.as_str())
                .await
                .map_err(|error| unresolved(format!("DNS lookup of \"{host}\" failed: {error}")))?;
            let ttl = answer.as_lookup().answers().iter().map(|record| record.ttl).min().unwrap_or_default();
            let addresses: Vec<IpAddr> = answer.iter().collect();
            if addresses.is_empty() {
                return Err(unresolved(format!("DNS lookup of \"{host}\" gave no address")));
            }
            Ok((addresses, Duration::from_secs(u64::from(ttl))))
        })
    }
}

/// Looks a name up again and again, as a DNS cluster says, until `tell` does not want to know any more.
pub(crate) async fn refresh(
    host: &str,
    family: LookupFamily,
    refresh: DnsRefresh,
    lookup: &dyn Lookup,
    mut tell: impl FnMut(Result<Vec<IpAddr>, ResourceError>) -> bool,
) {
    let mut rng = fastrand::Rng::new();
    let mut backoff = Backoff::new(refresh.failure.0, refresh.failure.1);
    // Said once, however often it is looked up.
    let mut said = None;
    loop {
        let (found, pause) = match lookup.lookup(host.to_owned(), family).await {
            Ok((addresses, ttl)) => {
                backoff.reset();
                said = None;
                (Ok(addresses), refresh.after(ttl) + refresh.jitter.mul_f64(rng.f64()))
            }
            Err(error) => {
                if said.as_ref() != Some(&error.message) {
                    tracing::warn!("{}", error.message);
                    said = Some(error.message.clone());
                }
                (Err(error), backoff.next(&mut rng))
            }
        };
        if !tell(found) {
            return;
        }
        sleep(pause).await;
    }
}

impl DnsRefresh {
    /// How long an answer is good.
    fn after(&self, ttl: Duration) -> Duration {
        if self.respect_ttl && !ttl.is_zero() { ttl.max(self.min_ttl) } else { self.every }
    }
}
