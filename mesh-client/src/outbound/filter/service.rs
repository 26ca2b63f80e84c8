//! Services that filters call: a channel to one cluster of the configuration.

use crate::{
    channel::{Core, MeshChannel},
    outbound::{
        resolve::{Facts, Resolver, Target},
        route::Profile,
        upstream::Upstreams,
    },
    telemetry::metrics::{Unserved, service_of},
};
use mesh_xds::{
    Snapshot,
    source::{Relay, relay},
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

/// A service that filters call, over the mesh's own connections to its cluster.
#[derive(Debug)]
pub(crate) struct Service {
    pub(super) channel: MeshChannel,
    relay: Relay,
}

/// The services that filters of a mesh call, as long as one does.
#[derive(Debug, Default)]
pub(crate) struct Services(Mutex<HashMap<Key, Weak<Service>>>);

/// Whose cluster, the cluster and the authority.
type Key = (Arc<str>, Arc<str>, Option<String>);

/// What a service is made of.
#[derive(Clone, Copy)]
pub(crate) struct Surroundings<'a> {
    pub(crate) upstreams: &'a Arc<Upstreams>,
    pub(crate) snapshot: &'a Snapshot,
    /// Of the target.
    pub(crate) facts: &'a Facts,
}

impl Services {
    /// A channel to this cluster. `None`: the configuration has no such cluster.
    pub(crate) fn channel(&self, cluster: &Arc<str>, around: Surroundings<'_>) -> Option<MeshChannel> {
        Some(self.get(cluster, None, around)?.channel.clone())
    }

    /// The service of this cluster. `None`: the configuration has no such cluster.
    pub(super) fn get(
        &self,
        cluster: &Arc<str>,
        authority: Option<&String>,
        around: Surroundings<'_>,
    ) -> Option<Arc<Service>> {
        let Surroundings { facts: Facts { scope, settings, .. }, upstreams, snapshot } = around;
        let key = (scope.clone(), cluster.clone(), authority.cloned());
        if let Some(service) = self.lock().get(&key).and_then(Weak::upgrade) {
            return Some(service);
        }
        // Not locked: the first configuration of the service's own target comes to `update`.
        let (relay, watch) = relay(cluster, snapshot)?;
        let facts = Arc::new(Facts {
            label: format!("cluster {cluster}").into(),
            scope: scope.clone(),
            authority: authority.map_or(service_of(cluster), String::as_str).parse().ok(),
            profile: Profile::Grpc,
            channel_id: fastrand::u64(..),
            calls: None,
            unserved: Unserved::new(settings.source.clone()),
            settings: settings.clone(),
        });
        let resolver = Resolver::spawn(watch, upstreams.clone(), facts.clone(), upstreams.runtime());
        let target = Target::Fixed(Vec::new());
        let core = Arc::new(Core { facts, resolver, server: "the control plane".into(), target });
        let service = Arc::new(Service { channel: MeshChannel { core }, relay });
        let mut services = self.lock();
        services.retain(|_, service| service.strong_count() > 0);
        services.insert(key, Arc::downgrade(&service));
        Some(service)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Weak<Service>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the services of this scope what became of their clusters.
    pub(crate) fn update(&self, snapshot: &Snapshot, scope: &Arc<str>) {
        let services: Vec<_> = {
            let services = self.lock();
            let own = services.iter().filter(|((whose, ..), _)| whose == scope);
            own.filter_map(|(_, service)| service.upgrade()).collect()
        };
        for service in services {
            service.relay.update(snapshot);
        }
    }
}

impl fmt::Debug for Surroundings<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Surroundings").finish_non_exhaustive()
    }
}
