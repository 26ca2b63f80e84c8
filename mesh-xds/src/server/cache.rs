//! The versioned cache: what every session serves from.

use super::{Any, Nack, Node, PUSH_ORDER, ResourceType, StreamStatus, TypeStatus, status::Registry};
use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use envoy_types::util::pack_any;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::{broadcast, watch};

/// A set of encoded resources by type and name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResourceSet {
    types: BTreeMap<ResourceType, BTreeMap<String, Any>>,
    tailors: BTreeMap<(ResourceType, String), Tailor>,
}

/// What a resource is like for one client, where that depends on who asks: on its locality, as a rule.
#[derive(Clone)]
pub struct Tailor {
    key: Arc<str>,
    make: Make,
}

/// The resource for a node.
type Make = Arc<dyn Fn(&Node) -> Any + Send + Sync>;

/// The resources served, versioned by type. A handle: clones share the content.
///
/// Every change is atomic and reaches the open streams as one push; what did not change keeps its version and is not sent again.
#[derive(Clone, Debug)]
pub struct ResourceCache {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    view: watch::Sender<Arc<View>>,
    registry: Registry,
    next_stream: AtomicU64,
}

/// One immutable state of the cache.
#[derive(Clone, Debug)]
pub(crate) struct View {
    version: u64,
    types: BTreeMap<ResourceType, TypeView>,
}

/// All resources of one type.
#[derive(Clone, Debug, Default)]
pub(crate) struct TypeView {
    /// Cache version at which a resource of this type last changed.
    pub(crate) version: u64,
    pub(crate) resources: BTreeMap<String, Entry>,
}

/// One resource.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    /// Cache version at which it last changed.
    pub(crate) changed: u64,
    any: Arc<Any>,
    tailor: Option<Tailor>,
}

impl ResourceSet {
    /// An empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a resource under `name`, as is: the content is not looked at, so a test can serve a broken one.
    #[must_use]
    pub fn with(mut self, resource_type: ResourceType, name: impl Into<String>, resource: Any) -> Self {
        self.insert(resource_type, name, resource);
        self
    }

    /// Adds a listener under its own name.
    #[must_use]
    pub fn listener(self, listener: Listener) -> Self {
        self.with(ResourceType::Listener, listener.name.clone(), pack_any(listener))
    }

    /// Adds a route configuration under its own name.
    #[must_use]
    pub fn route(self, route: RouteConfiguration) -> Self {
        self.with(ResourceType::RouteConfiguration, route.name.clone(), pack_any(route))
    }

    /// Adds a cluster under its own name.
    #[must_use]
    pub fn cluster(self, cluster: Cluster) -> Self {
        self.with(ResourceType::Cluster, cluster.name.clone(), pack_any(cluster))
    }

    /// Adds endpoints under their cluster's name.
    #[must_use]
    pub fn endpoints(self, endpoints: ClusterLoadAssignment) -> Self {
        self.with(ResourceType::ClusterLoadAssignment, endpoints.cluster_name.clone(), pack_any(endpoints))
    }

    /// Adds a resource under `name`; returns the one it replaces.
    pub fn insert(&mut self, resource_type: ResourceType, name: impl Into<String>, resource: Any) -> Option<Any> {
        let name = name.into();
        self.tailors.remove(&(resource_type, name.clone()));
        self.types.entry(resource_type).or_default().insert(name, resource)
    }

    /// The same, made anew for each client by `tailor`; `resource` is what it is without one.
    pub fn insert_tailored(
        &mut self,
        resource_type: ResourceType,
        name: impl Into<String>,
        resource: Any,
        tailor: Tailor,
    ) -> Option<Any> {
        let name = name.into();
        let before = self.insert(resource_type, name.clone(), resource);
        self.tailors.insert((resource_type, name), tailor);
        before
    }

    /// Takes a resource out.
    pub fn remove(&mut self, resource_type: ResourceType, name: &str) -> Option<Any> {
        self.tailors.remove(&(resource_type, name.to_owned()));
        self.types.get_mut(&resource_type)?.remove(name)
    }

    /// A resource as this client is sent it.
    pub fn get_for(&self, node: &Node, resource_type: ResourceType, name: &str) -> Option<Any> {
        let any = self.get(resource_type, name)?;
        let tailor = self.tailors.get(&(resource_type, name.to_owned()));
        Some(tailor.map_or_else(|| any.clone(), |tailor| (tailor.make)(node)))
    }

    /// Adds everything of `other`; equal names are replaced.
    pub fn extend(&mut self, other: Self) {
        for (resource_type, resources) in other.types {
            for (name, resource) in resources {
                self.insert(resource_type, name, resource);
            }
        }
        self.tailors.extend(other.tailors);
    }

    /// One resource.
    pub fn get(&self, resource_type: ResourceType, name: &str) -> Option<&Any> {
        self.types.get(&resource_type)?.get(name)
    }

    /// The resources of one type, by name.
    pub fn iter(&self, resource_type: ResourceType) -> impl Iterator<Item = (&str, &Any)> {
        self.types.get(&resource_type).into_iter().flatten().map(|(name, any)| (name.as_str(), any))
    }

    /// How many resources of one type there are.
    pub fn len(&self, resource_type: ResourceType) -> usize {
        self.types.get(&resource_type).map_or(0, BTreeMap::len)
    }

    /// Whether there is no resource of any type.
    pub fn is_empty(&self) -> bool {
        self.types.values().all(BTreeMap::is_empty)
    }
}

impl Tailor {
    /// `key` stands for what the function does: one with an equal key makes the same of the same node. A client is sent the resource
    /// again when either the key or the resource itself changes.
    pub fn new(key: impl Into<Arc<str>>, make: impl Fn(&Node) -> Any + Send + Sync + 'static) -> Self {
        Self { key: key.into(), make: Arc::new(make) }
    }
}

impl PartialEq for Tailor {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl fmt::Debug for Tailor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Tailor").field(&self.key).finish()
    }
}

impl Entry {
    /// As this client is sent it.
    pub(crate) fn for_node(&self, node: &Node) -> Any {
        match &self.tailor {
            None => (*self.any).clone(),
            Some(tailor) => (tailor.make)(node),
        }
    }

    /// As it is whoever asks.
    pub(crate) fn any(&self) -> &Any {
        &self.any
    }
}

impl Default for ResourceCache {
    fn default() -> Self {
        Self::new()
    }
}

impl ResourceCache {
    /// An empty cache, version 0.
    pub fn new() -> Self {
        let view = watch::Sender::new(Arc::new(View::empty()));
        Self { shared: Arc::new(Shared { view, registry: Registry::new(), next_stream: AtomicU64::new(1) }) }
    }

    /// Replaces all resources at once. Returns the cache's version, which grows by one if anything changed.
    pub fn set(&self, resources: ResourceSet) -> u64 {
        self.change(|next| {
            let ResourceSet { mut types, mut tailors } = resources;
            for resource_type in PUSH_ORDER {
                next.replace(resource_type, types.remove(&resource_type).unwrap_or_default(), &mut tailors);
            }
        })
    }

    /// Adds or replaces one resource. Returns the cache's version.
    pub fn update(&self, resource_type: ResourceType, name: impl Into<String>, resource: Any) -> u64 {
        self.change(|next| next.put(resource_type, name.into(), resource, None))
    }

    /// Removes one resource. Returns the cache's version.
    pub fn remove(&self, resource_type: ResourceType, name: &str) -> u64 {
        self.change(|next| next.take(resource_type, name))
    }

    /// The version of the whole: counts changes, 0 when nothing was ever set.
    pub fn version(&self) -> u64 {
        self.shared.view.borrow().version
    }

    /// The version at which a resource of this type last changed: the `version_info` of its responses.
    pub fn type_version(&self, resource_type: ResourceType) -> u64 {
        self.shared.view.borrow().of(resource_type).version
    }

    /// A copy of what is served now.
    pub fn resources(&self) -> ResourceSet {
        let view = self.view();
        let mut set = ResourceSet::new();
        for (&resource_type, of_type) in &view.types {
            for (name, entry) in &of_type.resources {
                let any = (*entry.any).clone();
                match &entry.tailor {
                    None => set.insert(resource_type, name.clone(), any),
                    Some(tailor) => set.insert_tailored(resource_type, name.clone(), any, tailor.clone()),
                };
            }
        }
        set
    }

    /// Refusals from now on, of every stream. A receiver that lags more than 256 behind misses the oldest.
    pub fn nacks(&self) -> broadcast::Receiver<Nack> {
        self.shared.registry.nacks()
    }

    /// The last refusals (at most 64), oldest first.
    pub fn recent_nacks(&self) -> Vec<Nack> {
        self.shared.registry.recent_nacks()
    }

    /// The open streams by a number that is unique in this cache; the receiver is notified when one comes, goes, is sent
    /// something or answers.
    pub fn streams(&self) -> watch::Receiver<BTreeMap<u64, StreamStatus>> {
        self.shared.registry.streams()
    }

    /// Waits until at least one stream is open, and each has accepted or refused all that `version` of the cache holds
    /// for what it has subscribed to so far.
    ///
    /// # Cancel safety
    /// Dropping the future has no effect.
    pub async fn settled(&self, version: u64) {
        let mut streams = self.streams();
        let done = |streams: &BTreeMap<u64, StreamStatus>| {
            let view = self.view();
            let up_to_date = |(&t, status): (&ResourceType, &TypeStatus)| {
                !status.outstanding && status.seen >= view.of(t).version.min(version)
            };
            !streams.is_empty() && streams.values().flat_map(|s| &s.types).all(up_to_date)
        };
        // The sender lives as long as `self`: the channel cannot close.
        let _ = streams.wait_for(|streams| done(streams)).await;
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.shared.view.borrow().clone()
    }

    pub(crate) fn watch(&self) -> watch::Receiver<Arc<View>> {
        self.shared.view.subscribe()
    }

    pub(crate) fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    pub(crate) fn next_stream(&self) -> u64 {
        self.shared.next_stream.fetch_add(1, Ordering::Relaxed)
    }

    fn change(&self, edit: impl FnOnce(&mut View)) -> u64 {
        let mut version = 0;
        self.shared.view.send_if_modified(|view| {
            let mut next = View { version: view.version + 1, types: view.types.clone() };
            edit(&mut next);
            let changed = next.types.values().any(|t| t.version == next.version);
            if changed {
                *view = Arc::new(next);
            }
            version = view.version;
            changed
        });
        version
    }
}

impl View {
    fn empty() -> Self {
        Self { version: 0, types: PUSH_ORDER.map(|t| (t, TypeView::default())).into() }
    }

    pub(crate) fn of(&self, resource_type: ResourceType) -> &TypeView {
        self.types.get(&resource_type).expect("a view holds every type")
    }

    fn replace(
        &mut self,
        resource_type: ResourceType,
        resources: BTreeMap<String, Any>,
        tailors: &mut BTreeMap<(ResourceType, String), Tailor>,
    ) {
        let held = self.of(resource_type).resources.keys();
        let gone: Vec<String> = held.filter(|name| !resources.contains_key(*name)).cloned().collect();
        for name in gone {
            self.take(resource_type, &name);
        }
        for (name, resource) in resources {
            let tailor = tailors.remove(&(resource_type, name.clone()));
            self.put(resource_type, name, resource, tailor);
        }
    }

    fn put(&mut self, resource_type: ResourceType, name: String, resource: Any, tailor: Option<Tailor>) {
        let of_type = self.types.entry(resource_type).or_default();
        if of_type.resources.get(&name).is_some_and(|e| *e.any == resource && e.tailor == tailor) {
            return;
        }
        of_type.version = self.version;
        of_type.resources.insert(name, Entry { changed: self.version, any: Arc::new(resource), tailor });
    }

    fn take(&mut self, resource_type: ResourceType, name: &str) {
        let Some(of_type) = self.types.get_mut(&resource_type) else { return };
        if of_type.resources.remove(name).is_some() {
            of_type.version = self.version;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(content: &str) -> Any {
        Any { type_url: String::new(), value: content.as_bytes().to_vec() }
    }

    #[test]
    fn only_the_types_that_changed_get_a_new_version() {
        let cache = ResourceCache::new();
        let set = ResourceSet::new().with(ResourceType::Cluster, "c", any("1")).with(
            ResourceType::ClusterLoadAssignment,
            "c",
            any("1"),
        );
        assert_eq!(cache.set(set.clone()), 1);
        assert_eq!(cache.set(set.clone()), 1, "an equal set is no change");
        assert_eq!(cache.set(set.with(ResourceType::ClusterLoadAssignment, "c", any("2"))), 2);
        assert_eq!(cache.type_version(ResourceType::Cluster), 1);
        assert_eq!(cache.type_version(ResourceType::ClusterLoadAssignment), 2);
        assert_eq!(cache.type_version(ResourceType::RouteConfiguration), 0);
    }

    #[test]
    fn single_resources_are_updated_and_removed() {
        let cache = ResourceCache::new();
        assert_eq!(cache.update(ResourceType::RouteConfiguration, "r", any("1")), 1);
        assert_eq!(cache.update(ResourceType::RouteConfiguration, "r", any("1")), 1);
        assert_eq!(cache.remove(ResourceType::RouteConfiguration, "other"), 1);
        assert_eq!(cache.remove(ResourceType::RouteConfiguration, "r"), 2);
        assert!(cache.resources().is_empty());
    }

    #[test]
    fn what_is_tailored_changes_with_its_tailor() {
        let cache = ResourceCache::new();
        let tailored = |key: &str| {
            let mut set = ResourceSet::new();
            let said = key.to_owned();
            let tailor = Tailor::new(key, move |node| any(&format!("{said} for {}", node.id)));
            set.insert_tailored(ResourceType::Cluster, "c", any("base"), tailor);
            set
        };
        assert_eq!(cache.set(tailored("a")), 1);
        assert_eq!(cache.set(tailored("a")), 1, "the same tailor is no change");
        assert_eq!(cache.set(tailored("b")), 2);
        let node = Node { id: "n".into(), ..Node::default() };
        let set = cache.resources();
        assert_eq!(set.get(ResourceType::Cluster, "c"), Some(&any("base")));
        assert_eq!(set.get_for(&node, ResourceType::Cluster, "c"), Some(any("b for n")));
        assert_eq!(cache.set(set), 2);
        assert_eq!(cache.update(ResourceType::Cluster, "c", any("base")), 3);
    }

    #[test]
    fn removing_is_a_change_of_its_type_only() {
        let cache = ResourceCache::new();
        let set = ResourceSet::new().with(ResourceType::Cluster, "c", any("1"));
        cache.set(set.clone().with(ResourceType::Listener, "l", any("1")));
        assert_eq!(cache.set(set), 2);
        assert_eq!(cache.type_version(ResourceType::Listener), 2);
        assert_eq!(cache.type_version(ResourceType::Cluster), 1);
    }
}
