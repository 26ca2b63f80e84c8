//! Keys that verify JWT SVIDs, by trust domain.

use super::shelf::Task;
use crate::{SourceError, TrustDomain};
use arc_swap::ArcSwapOption;
use serde_json::{Map, Value, json};
use std::{fmt, sync::Arc};
use tokio::sync::watch;

/// The JWT bundles of trust domains: the keys by which JWT SVIDs are verified, each for its own trust domain alone.
///
/// Filled by [`WorkloadApiSource::jwt_bundles`](crate::WorkloadApiSource), or by [`replace`](Self::replace). A server verifies tokens by them with
/// `JwtProvider::spiffe` of `mesh-client`. Cheap to clone; clones share what they hold.
#[derive(Clone)]
pub struct JwtBundles {
    held: Arc<Held>,
    /// What fills it, for as long as a clone is there.
    _task: Option<Arc<Task>>,
}

/// What is held, without what fills it.
pub(crate) struct Held {
    name: String,
    newest: ArcSwapOption<Newest>,
    generation: watch::Sender<u64>,
    last_error: ArcSwapOption<String>,
    errors: metrics::Counter,
}

struct Newest {
    map: Arc<str>,
    domains: Vec<TrustDomain>,
}

impl JwtBundles {
    /// Without any yet: no token is verified. `name` is that of messages and metrics.
    pub fn new(name: impl Into<String>) -> Self {
        Self { held: Arc::new(Held::new(name.into())), _task: None }
    }

    /// Filled by what `fill` starts.
    #[cfg(feature = "grpc")]
    pub(crate) fn followed(name: String, fill: impl FnOnce(Arc<Held>) -> Task) -> Self {
        let held = Arc::new(Held::new(name));
        Self { _task: Some(Arc::new(fill(held.clone()))), held }
    }

    /// Replaces all bundles: a JSON Web Key Set for each trust domain.
    ///
    /// # Errors
    /// One of them is not a JSON object with a list `keys`. The last good ones stay.
    pub fn replace<'a>(&self, bundles: impl IntoIterator<Item = (TrustDomain, &'a [u8])>) -> Result<(), SourceError> {
        self.held.replace(bundles).map_err(|reason| {
            let error = SourceError::new(self.held.name.clone(), reason);
            self.held.failed(&error);
            error
        })
    }

    /// All bundles, as a SPIFFE bundle map in JSON: `{"trust_domains": {"td": {"keys": [...]}}}`. `None`: there are none yet.
    pub fn bundle_map(&self) -> Option<Arc<str>> {
        self.held.newest.load().as_ref().map(|newest| newest.map.clone())
    }

    /// The trust domains whose tokens can be verified.
    pub fn trust_domains(&self) -> Vec<TrustDomain> {
        self.held.newest.load().as_ref().map(|newest| newest.domains.clone()).unwrap_or_default()
    }

    /// Follows the generation, which grows by one with every change; 0: there are none yet.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.held.generation.subscribe()
    }

    /// Why there is nothing newer, or nothing at all.
    pub fn last_error(&self) -> Option<String> {
        self.held.last_error.load().as_deref().cloned()
    }
}

impl Held {
    fn new(name: String) -> Self {
        Self {
            newest: ArcSwapOption::empty(),
            generation: watch::Sender::new(0),
            last_error: ArcSwapOption::empty(),
            errors: metrics::counter!("mesh_tls_reload_errors_total", "source" => name.clone()),
            name,
        }
    }

    /// Announces nothing when they are the same.
    pub(crate) fn replace<'a>(&self, bundles: impl IntoIterator<Item = (TrustDomain, &'a [u8])>) -> Result<(), String> {
        let (mut map, mut domains) = (Map::new(), Vec::new());
        for (domain, set) in bundles {
            let of = |reason: String| format!("the JWT bundle of {domain}: {reason}");
            let mut set: Value = serde_json::from_slice(set).map_err(|e| of(e.to_string()))?;
            match set.get_mut("keys") {
                Some(Value::Array(_)) => {}
                // So SPIRE writes that there are none.
                Some(keys @ Value::Null) => *keys = json!([]),
                _ => return Err(of("it has no list \"keys\"".into())),
            }
            map.insert(domain.to_string(), set);
            domains.push(domain);
        }
        domains.sort_unstable();
        let map = json!({ "trust_domains": map }).to_string();
        self.last_error.store(None);
        if self.newest.load().as_ref().is_none_or(|newest| *newest.map != *map) {
            tracing::info!(source = %self.name, ?domains, "new keys of JWT SVIDs");
            self.newest.store(Some(Arc::new(Newest { map: map.into(), domains })));
            self.generation.send_modify(|generation| *generation += 1);
        }
        Ok(())
    }

    pub(crate) fn failed(&self, error: &SourceError) {
        self.errors.increment(1);
        tracing::warn!(%error, "no new keys of JWT SVIDs; the last good ones stay in use");
        self.last_error.store(Some(Arc::new(error.to_string())));
    }

    #[cfg(feature = "grpc")]
    pub(crate) fn fail(&self, reason: String) {
        self.failed(&SourceError::new(self.name.clone(), reason));
    }
}

impl fmt::Debug for JwtBundles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("JwtBundles");
        out.field("name", &self.held.name).field("trust_domains", &self.trust_domains()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_or_the_same_changes_nothing() {
        let bundles = JwtBundles::new("test");
        let (a, b): (TrustDomain, TrustDomain) = ("a.example".parse().unwrap(), "b.example".parse().unwrap());
        assert_eq!((bundles.bundle_map(), *bundles.changed().borrow()), (None, 0));
        let good: &[u8] = br#"{"keys": []}"#;
        bundles.replace([(b.clone(), good), (a.clone(), good)]).unwrap();
        assert_eq!(bundles.trust_domains(), [a.clone(), b.clone()]);
        for wrong in [&b"{"[..], b"[]", br#"{"keys": 1}"#] {
            let error = bundles.replace([(a.clone(), good), (b.clone(), wrong)]).unwrap_err().to_string();
            assert!(error.contains("JWT bundle of b.example"), "{error}");
            assert_eq!(bundles.last_error(), Some(error));
        }
        bundles.replace([(a.clone(), good), (b, good)]).unwrap();
        assert_eq!((*bundles.changed().borrow(), bundles.last_error()), (1, None));
        bundles.replace([(a, good)]).unwrap();
        assert_eq!(*bundles.changed().borrow(), 2);
        assert!(bundles.bundle_map().unwrap().contains(r#""a.example":{"keys":[]}"#));
        bundles.replace([("a.example".parse().unwrap(), &br#"{"keys": null}"#[..])]).unwrap();
        assert_eq!(*bundles.changed().borrow(), 2, "it is the same");
    }
}
