//! A fixed list of endpoints.

use super::Policy;
use crate::{
    resource::{
        Action, AttemptCount, Cluster, ClusterLoadAssignment, ClusterSpecifier, Discovery, DomainPattern, Forward,
        HttpConnectionManager, HttpFilter, HttpFilterConfig, Listener, Route, RouteConfiguration, RouteMatch,
        RouteSource, VirtualHost,
    },
    snapshot::{ClusterEntry, Snapshot, TargetState},
    watch::TargetWatch,
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// A target over a fixed list of endpoints: Ready at once, and never changes.
pub fn fixed(name: &str, endpoints: Arc<ClusterLoadAssignment>, policy: &Policy) -> TargetWatch {
    let template = Template::new(name, policy);
    let (sender, state) = watch::channel(TargetState::Ready(Arc::new(template.snapshot(endpoints, "fixed"))));
    // The sender lives as long as the watch, which then never sees `Closed`.
    TargetWatch::new(template.name, state, Arc::new(sender))
}

/// The parts of a synthesized snapshot that do not change.
pub(super) struct Template {
    pub(super) name: Arc<str>,
    listener: Arc<Listener>,
    routes: Arc<RouteConfiguration>,
    cluster: Cluster,
}

impl Template {
    pub(super) fn new(name: &str, policy: &Policy) -> Self {
        let name: Arc<str> = name.into();
        let forward = Forward {
            timeout: policy.timeout,
            retry_policy: policy.retry.clone(),
            hash_policies: policy.hash.clone().into(),
            hedge: policy.hedge,
            ..Forward::to(ClusterSpecifier::Cluster(name.clone()))
        };
        let route = Route::new("default", RouteMatch::default(), Action::Forward(Arc::new(forward)));
        let virtual_host = VirtualHost {
            name: name.clone(),
            domains: vec![DomainPattern::Any],
            routes: vec![route],
            attempt_count: AttemptCount { in_request: true, ..AttemptCount::default() },
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
        Self { name, listener, routes, cluster }
    }

    pub(super) fn snapshot(&self, endpoints: Arc<ClusterLoadAssignment>, version: &str) -> Snapshot {
        let cluster = Cluster { discovery: Discovery::Static(endpoints.clone()), ..self.cluster.clone() };
        let entry = ClusterEntry::Ready { cluster: Arc::new(cluster), endpoints };
        self.with(BTreeMap::from([(self.name.clone(), entry)]), version)
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
