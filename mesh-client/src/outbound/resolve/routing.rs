//! A snapshot, compiled: what requests read.

use crate::outbound::{
    call::Settings,
    cluster::Resource,
    filter::Surroundings,
    retry::Permit,
    route::{Profile, RouteTable, Scope},
    upstream::{Upstream, Upstreams},
};
use crate::telemetry::metrics::{Unserved, grpc::Calls};
use http::uri::Authority;
use mesh_xds::{
    Snapshot,
    resource::RoutingPriority,
    snapshot::{ClusterEntry, ResourceError},
};
use std::{collections::BTreeMap, sync::Arc};

/// Everything a request to one target reads, behind one pointer.
///
/// Aligned, so that the count of handles is not on a cache line that every request reads.
#[repr(align(128))]
pub(crate) struct Routing {
    pub(crate) facts: Arc<Facts>,
    pub(crate) snapshot: Arc<Snapshot>,
    /// `None`: no virtual host answers for the target's host.
    pub(crate) table: Option<Arc<RouteTable<UpstreamRef>>>,
    /// Every cluster of the snapshot, by name.
    clusters: BTreeMap<Arc<str>, UpstreamRef>,
    /// Those that serve. Keeps them alive, used or not, so that a route change finds their connections. Requests reach them from
    /// here: a handle of its own would cost each a count that all cores write.
    upstreams: Box<[Arc<Upstream>]>,
    /// The positions of aggregates and of their leaves, highest priority first.
    aggregates: Box<[(usize, Box<[usize]>)]>,
}

/// What holds for a target whatever its configuration.
#[derive(Debug)]
pub(crate) struct Facts {
    /// The target as text, for errors.
    pub(crate) label: Arc<str>,
    /// Whose the names of its clusters are: targets of one scope share them. Empty: the control plane's.
    pub(crate) scope: Arc<str>,
    /// Of requests that carry none.
    pub(crate) authority: Option<Authority>,
    /// Whose rules hold.
    pub(crate) profile: Profile,
    /// The channel's own hash (gRFC A42).
    pub(crate) channel_id: u64,
    /// What the mesh was built with.
    pub(crate) settings: Arc<Settings>,
    /// gRPC's instruments of its calls, where they are on.
    pub(crate) calls: Option<Calls>,
    /// Of requests that come to no cluster.
    pub(crate) unserved: Unserved,
}

/// A cluster as a route sees it.
#[derive(Clone, Debug)]
pub(crate) enum UpstreamRef {
    /// Serving: the one at this position of [`Routing::upstreams`].
    Live(usize),
    /// Requests fail with this cause.
    Failed(Arc<ResourceError>),
}

impl Routing {
    /// Compiles `snapshot`. Clusters are carried over by name with their connections; the route table is kept when only
    /// endpoints changed.
    pub(crate) fn compile(
        snapshot: Arc<Snapshot>,
        old: Option<&Self>,
        upstreams: &Arc<Upstreams>,
        facts: &Arc<Facts>,
    ) -> Self {
        let profile = facts.profile;
        upstreams.filters.services.update(&snapshot, &facts.scope);
        let mut same = old.is_some_and(|old| {
            Arc::ptr_eq(&old.snapshot.listener, &snapshot.listener)
                && Arc::ptr_eq(&old.snapshot.routes, &snapshot.routes)
                && old.snapshot.virtual_host == snapshot.virtual_host
                && old.clusters.len() == snapshot.clusters.len()
        });
        let mut clusters = BTreeMap::new();
        let mut serving = Vec::new();
        let mut aggregates = Vec::new();
        for (name, entry) in &snapshot.clusters {
            let upstream = match entry {
                ClusterEntry::Ready { cluster, endpoints } => {
                    serving.push(upstreams.apply(cluster, endpoints, facts));
                    UpstreamRef::Live(serving.len() - 1)
                }
                ClusterEntry::Aggregate { cluster, leaves } => {
                    serving.push(upstreams.apply(cluster, &Arc::default(), facts));
                    aggregates.push((serving.len() - 1, leaves));
                    UpstreamRef::Live(serving.len() - 1)
                }
                ClusterEntry::Failed(cause) => UpstreamRef::Failed(cause.clone()),
            };
            same &= matches!(
                (&upstream, old.and_then(|o| o.clusters.get(name))),
                (UpstreamRef::Live(new), Some(UpstreamRef::Live(old))) if new == old
            );
            clusters.insert(name.clone(), upstream);
        }
        let table = match (same, old) {
            (true, Some(old)) => old.table.clone(),
            _ => snapshot.virtual_host.and_then(|i| snapshot.routes.virtual_hosts.get(i)).map(|vhost| {
                let http = &snapshot.listener.http;
                let scope = Scope {
                    routes: &snapshot.routes,
                    listener: &snapshot.listener.name,
                    around: Some(Surroundings { upstreams, snapshot: &snapshot, facts }),
                    filters: &http.http_filters,
                    profile,
                    max_stream_duration: http.max_stream_duration,
                    stream_idle_timeout: http.stream_idle_timeout,
                    general: facts.settings.needs_general_road(),
                    shared: &upstreams.filters,
                };
                Arc::new(RouteTable::compile(vhost, scope, &mut |name| {
                    clusters.get(name).cloned().unwrap_or_else(|| UpstreamRef::missing(name))
                }))
            }),
        };
        let place = |leaf: &Arc<str>| match clusters.get(leaf) {
            Some(UpstreamRef::Live(place)) => Some(*place),
            _ => None,
        };
        let aggregates = aggregates.into_iter().map(|(own, leaves)| (own, leaves.iter().filter_map(place).collect()));
        let aggregates = aggregates.collect();
        Self { facts: facts.clone(), table, aggregates, clusters, upstreams: serving.into(), snapshot }
    }

    /// The positions of the leaves of the aggregate at this position, highest priority first; empty: it is none.
    #[inline]
    pub(crate) fn leaves(&self, upstream: usize) -> &[usize] {
        // Few have any.
        if self.aggregates.is_empty() {
            return &[];
        }
        self.aggregates.iter().find(|(own, _)| *own == upstream).map_or(&[], |(_, leaves)| leaves)
    }

    /// A share of the retry budget of the cluster at this position, if there is one left. Requests to any leaf of an aggregate count
    /// as its own.
    pub(crate) fn retry_permit(&self, upstream: usize, priority: RoutingPriority) -> Option<Permit> {
        let in_use = |place: &usize| self.upstreams[*place].live.breaker().in_use(priority, Resource::Requests);
        let active = match self.leaves(upstream) {
            [] => in_use(&upstream),
            leaves => leaves.iter().map(in_use).fold(0, u32::saturating_add),
        };
        self.upstreams[upstream].retry_permit(self.facts.profile, priority, active)
    }

    /// The clusters that serve.
    pub(crate) fn upstreams(&self) -> &[Arc<Upstream>] {
        &self.upstreams
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
