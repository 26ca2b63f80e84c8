//! A snapshot, compiled: what requests read.

use crate::outbound::{
    route::{Profile, RouteTable, Scope},
    upstream::{Upstream, Upstreams},
};
use mesh_xds::{
    Snapshot,
    snapshot::{ClusterEntry, ResourceError},
};
use std::{collections::BTreeMap, sync::Arc};

/// Everything a request to one target reads, behind one pointer.
///
/// Aligned, so that the count of handles is not on a cache line that every request reads.
#[repr(align(128))]
pub(crate) struct Routing {
    pub(crate) snapshot: Arc<Snapshot>,
    /// `None`: no virtual host answers for the target's host.
    pub(crate) table: Option<Arc<RouteTable<UpstreamRef>>>,
    /// Keeps every cluster of the snapshot alive, used or not, so that a route change finds its connections.
    clusters: BTreeMap<Arc<str>, UpstreamRef>,
}

/// A cluster as a route sees it.
#[derive(Clone, Debug)]
pub(crate) enum UpstreamRef {
    /// Serving.
    Live(Arc<Upstream>),
    /// Requests fail with this cause.
    Failed(Arc<ResourceError>),
}

impl Routing {
    /// Compiles `snapshot`. Clusters are carried over by name with their connections; the route table is kept when only
    /// endpoints changed.
    pub(crate) fn compile(
        snapshot: Arc<Snapshot>,
        old: Option<&Self>,
        upstreams: &Upstreams,
        profile: Profile,
    ) -> Self {
        let mut same = old.is_some_and(|old| {
            Arc::ptr_eq(&old.snapshot.listener, &snapshot.listener)
                && Arc::ptr_eq(&old.snapshot.routes, &snapshot.routes)
                && old.snapshot.virtual_host == snapshot.virtual_host
                && old.clusters.len() == snapshot.clusters.len()
        });
        let mut clusters = BTreeMap::new();
        for (name, entry) in &snapshot.clusters {
            let upstream = match entry {
                ClusterEntry::Ready { cluster, endpoints } => {
                    UpstreamRef::Live(upstreams.apply(cluster, endpoints, profile))
                }
                ClusterEntry::Failed(cause) => UpstreamRef::Failed(cause.clone()),
            };
            same &= matches!(
                (&upstream, old.and_then(|o| o.clusters.get(name))),
                (UpstreamRef::Live(new), Some(UpstreamRef::Live(old))) if Arc::ptr_eq(new, old)
            );
            clusters.insert(name.clone(), upstream);
        }
        let table = match (same, old) {
            (true, Some(old)) => old.table.clone(),
            _ => snapshot.virtual_host.and_then(|i| snapshot.routes.virtual_hosts.get(i)).map(|vhost| {
                let http = &snapshot.listener.http;
                let scope = Scope {
                    filters: &http.http_filters,
                    profile,
                    max_stream_duration: http.max_stream_duration,
                    active_faults: &upstreams.active_faults,
                };
                Arc::new(RouteTable::compile(vhost, scope, &mut |name| {
                    clusters.get(name).cloned().unwrap_or_else(|| UpstreamRef::missing(name))
                }))
            }),
        };
        Self { snapshot, table, clusters }
    }
}

impl Routing {
    /// The clusters that serve.
    pub(crate) fn upstreams(&self) -> impl Iterator<Item = &Arc<Upstream>> {
        self.clusters.values().filter_map(|cluster| match cluster {
            UpstreamRef::Live(upstream) => Some(upstream),
            UpstreamRef::Failed(_) => None,
        })
    }
}

impl UpstreamRef {
    fn missing(name: &str) -> Self {
        Self::Failed(Arc::new(ResourceError {
            kind: mesh_xds::snapshot::ResourceErrorKind::DoesNotExist,
            message: format!("the route names cluster `{name}`, which is not in the configuration"),
        }))
    }
}
