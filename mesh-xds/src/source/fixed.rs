//! A fixed list of endpoints.

use super::{DnsOptions, Policy, Resolvers, assembly::Assembly};
use crate::{
    graph::spread,
    resource::{
        Action, AttemptCount, Cluster, ClusterLoadAssignment, ClusterSpecifier, Discovery, DomainPattern, Forward,
        HttpConnectionManager, HttpFilter, HttpFilterConfig, Listener, MirrorCluster, Route, RouteConfiguration,
        RouteMatch, RouteSource, VirtualHost,
    },
    snapshot::{ClusterEntry, ResourceError, ResourceErrorKind, Snapshot},
    watch::TargetWatch,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, OnceLock},
};

/// A target over a fixed list of endpoints: Ready at once, and never changes; unless its policy has clusters by DNS names, which are
/// looked up first, by the system's resolver.
///
/// # Panics
/// With such clusters, outside a tokio runtime.
pub fn fixed(name: &str, endpoints: Arc<ClusterLoadAssignment>, policy: &Policy) -> TargetWatch {
    fixed_with(name, endpoints, policy, &DnsOptions::default())
}

/// The same, with another resolver for the clusters of the policy.
///
/// # Panics
/// As [`fixed`].
pub fn fixed_with(
    name: &str,
    endpoints: Arc<ClusterLoadAssignment>,
    policy: &Policy,
    options: &DnsOptions,
) -> TargetWatch {
    let template = Template::new(name, policy);
    let name = template.name.clone();
    let (assembly, mut state) = Assembly::new(template);
    assembly.own(endpoints, "fixed");
    state.mark_unchanged();
    let resolvers: OnceLock<Arc<Resolvers>> = OnceLock::new();
    let tasks =
        assembly.follow(|| resolvers.get_or_init(|| Arc::new(Resolvers::new(options.resolver.clone()))).clone());
    // The sender lives as long as the watch, which then never sees `Closed`.
    TargetWatch::new(name, state, Arc::new((assembly, tasks)))
}

/// The parts of a synthesized snapshot that do not change.
pub(super) struct Template {
    pub(super) name: Arc<str>,
    listener: Arc<Listener>,
    routes: Arc<RouteConfiguration>,
    /// Of the target's own endpoints.
    cluster: Cluster,
    /// The others.
    clusters: Vec<Arc<Cluster>>,
}

impl Template {
    pub(super) fn new(name: &str, policy: &Policy) -> Self {
        let name: Arc<str> = name.into();
        let rest = Route::new(
            "default",
            RouteMatch::default(),
            Action::Forward(Arc::new(Forward::to(ClusterSpecifier::Cluster(name.clone())))),
        );
        let routes = policy.routes.iter().cloned().chain([rest]).map(|route| completed(route, &name, policy));
        let virtual_host = VirtualHost {
            name: name.clone(),
            domains: vec![DomainPattern::Any],
            routes: routes.collect(),
            retry_policy: policy.retry.clone(),
            attempt_count: AttemptCount { in_request: true, ..AttemptCount::default() },
            edits: policy.edits.clone(),
            ..VirtualHost::default()
        };
        let routes = Arc::new(RouteConfiguration {
            name: name.clone(),
            virtual_hosts: vec![virtual_host],
            ..RouteConfiguration::default()
        });
        let router = HttpFilter { name: "router".into(), config: HttpFilterConfig::Router, disabled: false };
        let listener = Arc::new(Listener {
            name: name.clone(),
            http: HttpConnectionManager {
                routes: RouteSource::Inline(routes.clone()),
                max_stream_duration: None,
                stream_idle_timeout: None,
                tracing: None,
                http_filters: policy.filters.iter().cloned().chain([router]).collect(),
            },
        });
        let mut cluster = policy.cluster.clone().unwrap_or_else(|| Cluster::fixed(name.clone(), Arc::default()));
        cluster.name = name.clone();
        let clusters = policy.clusters.iter().cloned().map(Arc::new).collect();
        Self { name, listener, routes, cluster, clusters }
    }

    /// The clusters of the policy.
    pub(super) fn clusters(&self) -> &[Arc<Cluster>] {
        &self.clusters
    }

    /// The target's own cluster, with these endpoints.
    pub(super) fn own(&self, endpoints: Arc<ClusterLoadAssignment>) -> ClusterEntry {
        let cluster = Cluster { discovery: Discovery::Static(endpoints.clone()), ..self.cluster.clone() };
        ClusterEntry::Ready { cluster: Arc::new(cluster), endpoints }
    }

    /// Complete: `found` has the endpoints of DNS clusters.
    pub(super) fn snapshot(
        &self,
        own: ClusterEntry,
        found: impl Fn(&Arc<str>) -> Option<Result<Arc<ClusterLoadAssignment>, Arc<ResourceError>>>,
        version: &str,
    ) -> Snapshot {
        let failed = |kind, message| ClusterEntry::Failed(Arc::new(ResourceError { kind, message }));
        let mut clusters = BTreeMap::new();
        for cluster in &self.clusters {
            let name = &cluster.name;
            let entry = match &cluster.discovery {
                Discovery::Static(endpoints) => {
                    ClusterEntry::Ready { cluster: cluster.clone(), endpoints: endpoints.clone() }
                }
                Discovery::Dns(_) => match found(name) {
                    Some(Ok(endpoints)) => ClusterEntry::Ready { cluster: cluster.clone(), endpoints },
                    Some(Err(problem)) => ClusterEntry::Failed(problem),
                    None => failed(ResourceErrorKind::Unresolved, format!("Cluster \"{name}\": not looked up yet")),
                },
                Discovery::Aggregate(children) => {
                    ClusterEntry::Aggregate { cluster: cluster.clone(), leaves: children.clone() }
                }
                Discovery::Eds { .. } => {
                    let message = format!("Cluster \"{name}\": its endpoints come from a control plane, there is none");
                    failed(ResourceErrorKind::Invalid, message)
                }
            };
            clusters.insert(name.clone(), entry);
        }
        clusters.insert(self.name.clone(), own);
        let wanted = self.routes.virtual_hosts[0].cluster_names();
        for name in wanted.into_iter().chain(self.listener.http.service_clusters().cloned()) {
            clusters.entry(name.clone()).or_insert_with(|| {
                let message = format!("Cluster \"{name}\": a route names it, and the policy does not have it");
                failed(ResourceErrorKind::DoesNotExist, message)
            });
        }
        spread(&mut clusters);
        self.with(clusters, version)
    }

    /// With these clusters.
    pub(super) fn with(&self, clusters: BTreeMap<Arc<str>, ClusterEntry>, version: &str) -> Snapshot {
        Snapshot {
            name: self.name.clone(),
            host: self.name.clone(),
            version: version.into(),
            listener: self.listener.clone(),
            routes: self.routes.clone(),
            virtual_host: Some(0),
            clusters,
        }
    }
}

/// A route with what the policy says of all, and with the target's own cluster under its name.
fn completed(mut route: Route, target: &Arc<str>, policy: &Policy) -> Route {
    let Action::Forward(forward) = &mut route.action else { return route };
    let forward = Arc::make_mut(forward);
    forward.timeout = forward.timeout.or(policy.timeout);
    forward.hedge = forward.hedge.or(policy.hedge);
    if forward.hash_policies.is_empty() {
        forward.hash_policies = policy.hash.clone().into();
    }
    let resolve = |name: &mut Arc<str>| {
        if **name == *Policy::TARGET {
            *name = target.clone();
        }
    };
    match &mut forward.cluster {
        ClusterSpecifier::Cluster(name) => resolve(name),
        ClusterSpecifier::Weighted(parts) => {
            parts.iter_mut().filter(|part| part.header.is_none()).for_each(|part| resolve(&mut part.name));
        }
        ClusterSpecifier::Header(_) => {}
    }
    let mirrors = forward.mirrors.iter().cloned().map(|mut mirror| {
        if let MirrorCluster::Name(name) = &mut mirror.cluster {
            resolve(name);
        }
        mirror
    });
    forward.mirrors = mirrors.collect();
    route
}
