//! From what is known to one complete snapshot: reachability LDS -> RDS -> virtual host -> CDS -> EDS or DNS (gRFC A74).

use super::{Graph, Reach, entry::error, leaves};
use crate::{
    resource::{
        Cluster, ClusterLoadAssignment, Discovery, Listener, Resource, ResourceType, RouteConfiguration, RouteSource,
        Secret, ServerListener,
    },
    snapshot::{ClusterEntry, ResourceError, ResourceErrorKind, ServerSnapshot, Snapshot},
};
use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    fmt::Write as _,
    sync::Arc,
};

/// What a walk came to.
#[derive(Debug)]
pub(crate) enum Outcome<S> {
    /// The published state stays: nothing changed, or what is new is not complete yet.
    Unchanged,
    /// A complete snapshot that differs from the last one.
    Ready(Arc<S>),
    /// The listener or its routes do not exist.
    Absent(Arc<ResourceError>),
    /// Not complete, and there is nothing to keep.
    Pending(Option<Arc<ResourceError>>),
}

/// Where a wanted resource stands.
enum Found<'a> {
    Good(&'a Resource),
    /// Not usable; for endpoints perhaps with what stands in for them.
    Bad(&'a Arc<ResourceError>, Option<&'a Arc<ClusterLoadAssignment>>),
    Waiting(Option<Arc<ResourceError>>),
}

/// A walk is not complete, perhaps for this reason.
struct Incomplete(Option<Arc<ResourceError>>);

impl<S> Outcome<S> {
    /// Not complete, for no known reason.
    pub(super) fn is_unexplained(&self) -> bool {
        matches!(self, Self::Pending(None))
    }
}

impl Graph {
    /// What a client's target reaches now, and what that comes to.
    pub(super) fn build(
        &self,
        name: &Arc<str>,
        host: &Arc<str>,
        last: Option<&Arc<Snapshot>>,
    ) -> (Reach, Outcome<Snapshot>) {
        let key = (name, host);
        let mut wants = Reach::default();
        let newest = self.roots(key, &mut wants).and_then(|(listener, routes)| {
            self.complete(key, listener, routes, last, &mut wants).map_err(|Incomplete(cause)| Outcome::Pending(cause))
        });
        let outcome = match (newest, last) {
            (Ok(snapshot), Some(last)) if same(&snapshot, last) => Outcome::Unchanged,
            (Ok(snapshot), _) => Outcome::Ready(Arc::new(snapshot)),
            (Err(Outcome::Pending(_)), Some(last)) => {
                // What is in force stays, and stays fresh, until what is new is complete.
                match self.complete(key, &last.listener, &last.routes, Some(last), &mut wants) {
                    Ok(snapshot) if !same(&snapshot, last) => Outcome::Ready(Arc::new(snapshot)),
                    _ => Outcome::Unchanged,
                }
            }
            (Err(outcome), _) => outcome,
        };
        (wants, outcome)
    }

    /// A server's listener and the routes of all its chains.
    pub(super) fn build_server(
        &self,
        name: &Arc<str>,
        last: Option<&Arc<ServerSnapshot>>,
    ) -> (Reach, Outcome<ServerSnapshot>) {
        let mut wants = Reach::default();
        let newest = match self.find(ResourceType::Listener, name, &mut wants) {
            Found::Good(Resource::ServerListener(listener)) => {
                self.with_routes(name, listener, &mut wants).map_err(|Incomplete(cause)| Outcome::Pending(cause))
            }
            Found::Good(_) => {
                let reason = format!("Listener \"{name}\" is for clients: a server needs an address");
                Err(Outcome::Pending(Some(error(ResourceErrorKind::Invalid, reason))))
            }
            other => Err(unusable(other)),
        };
        let outcome = match (newest, last) {
            (Ok(snapshot), Some(last)) if snapshot.is_same(last) => Outcome::Unchanged,
            (Ok(snapshot), _) => Outcome::Ready(Arc::new(snapshot)),
            (Err(Outcome::Pending(_)), Some(last)) => match self.with_routes(name, &last.listener, &mut wants) {
                Ok(snapshot) if !snapshot.is_same(last) => Outcome::Ready(Arc::new(snapshot)),
                _ => Outcome::Unchanged,
            },
            (Err(outcome), _) => outcome,
        };
        (wants, outcome)
    }

    fn with_routes(
        &self,
        name: &Arc<str>,
        listener: &Arc<ServerListener>,
        wants: &mut Reach,
    ) -> Result<ServerSnapshot, Incomplete> {
        let mut routes = BTreeMap::new();
        let mut incomplete = None;
        for chain in listener.chains() {
            let RouteSource::Rds(name) = &chain.http.routes else { continue };
            let found = match self.find(ResourceType::RouteConfiguration, name, wants) {
                Found::Good(Resource::RouteConfiguration(config)) => Ok(config.clone()),
                Found::Bad(problem, _) => Err(problem.clone()),
                Found::Good(_) => continue,
                Found::Waiting(cause) => {
                    incomplete = Some(Incomplete(cause));
                    continue;
                }
            };
            routes.insert(name.clone(), found);
        }
        match incomplete {
            Some(reason) => Err(reason),
            None => Ok(ServerSnapshot {
                name: name.clone(),
                version: self.version(wants).into(),
                listener: listener.clone(),
                routes,
            }),
        }
    }

    /// A secret by itself.
    pub(super) fn build_secret(&self, name: &Arc<str>, last: Option<&Arc<Secret>>) -> (Reach, Outcome<Secret>) {
        let mut wants = Reach::default();
        let outcome = match self.find(ResourceType::Secret, name, &mut wants) {
            Found::Good(Resource::Secret(secret)) if last.is_some_and(|last| Arc::ptr_eq(last, secret)) => {
                Outcome::Unchanged
            }
            Found::Good(Resource::Secret(secret)) => Outcome::Ready(secret.clone()),
            other => unusable(other),
        };
        (wants, outcome)
    }

    /// Listener and routes of a target.
    fn roots(
        &self,
        (name, _): (&Arc<str>, &Arc<str>),
        wants: &mut Reach,
    ) -> Result<(&Arc<Listener>, &Arc<RouteConfiguration>), Outcome<Snapshot>> {
        let listener = match self.find(ResourceType::Listener, name, wants) {
            Found::Good(Resource::Listener(listener)) => listener,
            Found::Good(Resource::ServerListener(_)) => {
                let reason = format!("Listener \"{name}\" is for servers: a client needs an api_listener");
                return Err(Outcome::Pending(Some(error(ResourceErrorKind::Invalid, reason))));
            }
            other => return Err(unusable(other)),
        };
        match &listener.http.routes {
            RouteSource::Inline(routes) => Ok((listener, routes)),
            RouteSource::Rds(name) => match self.find(ResourceType::RouteConfiguration, name, wants) {
                Found::Good(Resource::RouteConfiguration(routes)) => Ok((listener, routes)),
                other => Err(unusable(other)),
            },
        }
    }

    /// Every cluster the virtual host of the target can send to, or the first reason why not.
    fn complete(
        &self,
        (name, host): (&Arc<str>, &Arc<str>),
        listener: &Arc<Listener>,
        routes: &Arc<RouteConfiguration>,
        last: Option<&Arc<Snapshot>>,
        wants: &mut Reach,
    ) -> Result<Snapshot, Incomplete> {
        let virtual_host = routes.virtual_host_for(host);
        let mut names = virtual_host.map(|index| routes.virtual_hosts[index].cluster_names()).unwrap_or_default();
        names.extend(listener.http.service_clusters().cloned());
        let mut clusters = BTreeMap::new();
        let mut incomplete: Option<Incomplete> = None;
        let mut names: VecDeque<Arc<str>> = names.into_iter().collect();
        let mut walked = BTreeSet::new();
        while let Some(cluster) = names.pop_front() {
            if !walked.insert(cluster.clone()) {
                continue;
            }
            // Nothing good is given up for a cluster that may only be late: then its timer decides.
            let expendable =
                last.is_none_or(|last| matches!(last.clusters.get(&cluster), Some(ClusterEntry::Failed(_))));
            match self.cluster(&cluster, expendable, wants) {
                Ok(entry) => {
                    if let ClusterEntry::Aggregate { leaves, .. } = &entry {
                        names.extend(leaves.iter().cloned());
                    }
                    clusters.insert(cluster, entry);
                }
                // The walk goes on: everything reachable is subscribed at once.
                Err(Incomplete(cause)) => match &mut incomplete {
                    Some(Incomplete(known)) => *known = known.take().or(cause),
                    None => incomplete = Some(Incomplete(cause)),
                },
            }
        }
        leaves::spread(&mut clusters);
        match incomplete {
            Some(reason) => Err(reason),
            None => Ok(Snapshot {
                name: name.clone(),
                host: host.clone(),
                version: self.version(wants).into(),
                listener: listener.clone(),
                routes: routes.clone(),
                virtual_host,
                clusters,
            }),
        }
    }

    /// One cluster with its endpoints. An `expendable` one that is missing has failed.
    fn cluster(&self, name: &Arc<str>, expendable: bool, wants: &mut Reach) -> Result<ClusterEntry, Incomplete> {
        let cluster = match self.find(ResourceType::Cluster, name, wants) {
            Found::Good(Resource::Cluster(cluster)) => cluster,
            Found::Good(_) => return Err(Incomplete(None)),
            Found::Bad(problem, _) => return Ok(ClusterEntry::Failed(problem.clone())),
            Found::Waiting(cause) => {
                let missing =
                    self.resources.get(&(ResourceType::Cluster, name.clone())).and_then(|e| e.missing.clone());
                return missing.filter(|_| expendable).map(ClusterEntry::Failed).ok_or(Incomplete(cause));
            }
        };
        let ready = |cluster: &Arc<Cluster>, endpoints: &Arc<ClusterLoadAssignment>| ClusterEntry::Ready {
            cluster: cluster.clone(),
            endpoints: endpoints.clone(),
        };
        match &cluster.discovery {
            Discovery::Static(endpoints) => Ok(ready(cluster, endpoints)),
            Discovery::Dns(discovery) => {
                wants.names.insert(name.clone(), discovery.clone());
                match self.names.endpoints(name, discovery) {
                    Some(Ok(endpoints)) => Ok(ready(cluster, endpoints)),
                    Some(Err(problem)) => Ok(ClusterEntry::Failed(problem.clone())),
                    None => Err(Incomplete(None)),
                }
            }
            Discovery::Aggregate(children) => {
                Ok(ClusterEntry::Aggregate { cluster: cluster.clone(), leaves: children.clone() })
            }
            Discovery::Eds { service_name } => {
                match self.find(ResourceType::ClusterLoadAssignment, service_name, wants) {
                    Found::Good(Resource::ClusterLoadAssignment(endpoints)) => Ok(ready(cluster, endpoints)),
                    Found::Good(_) => Err(Incomplete(None)),
                    Found::Bad(_, Some(empty)) => Ok(ready(cluster, empty)),
                    Found::Bad(problem, None) => Ok(ClusterEntry::Failed(problem.clone())),
                    Found::Waiting(cause) => Err(Incomplete(cause)),
                }
            }
        }
    }

    fn find(&self, kind: ResourceType, name: &Arc<str>, wants: &mut Reach) -> Found<'_> {
        let key = (kind, name.clone());
        let entry = self.resources.get(&key);
        wants.resources.insert(key);
        let Some(entry) = entry else { return Found::Waiting(None) };
        match (&entry.accepted, &entry.problem) {
            (Some(accepted), _) => Found::Good(&accepted.resource),
            (None, Some(problem)) => Found::Bad(problem, entry.empty.as_ref()),
            (None, None) => Found::Waiting(entry.server.and_then(|server| self.unreachable(server, kind, name))),
        }
    }

    fn unreachable(&self, server: usize, kind: ResourceType, name: &str) -> Option<Arc<ResourceError>> {
        let server = &self.servers[server];
        let failure = server.failure.as_ref()?;
        let node = &self.bootstrap.node.id;
        Some(error(
            ResourceErrorKind::Unreachable,
            format!("{} (node \"{node}\"): {failure}; waiting for {kind} \"{name}\"", server.config.uri),
        ))
    }

    /// "lds=3 rds=3 cds=3 eds=7 dns=2": the newest version of each type among what is used.
    fn version(&self, wants: &Reach) -> String {
        let mut out = String::new();
        for kind in ResourceType::ALL {
            let used = wants.resources.iter().filter(|(of, _)| *of == kind).filter_map(|key| self.resources.get(key));
            let newest = used.filter(|entry| entry.accepted.is_some()).max_by_key(|entry| entry.sequence);
            if let Some(newest) = newest {
                let space = if out.is_empty() { "" } else { " " };
                // Writing to a String cannot fail.
                let _ = write!(out, "{space}{}={}", kind.short(), newest.version);
            }
        }
        if let Some(change) = self.names.version(wants.names.keys()) {
            let _ = write!(out, " dns={change}");
        }
        out
    }
}

fn unusable<S>(found: Found<'_>) -> Outcome<S> {
    match found {
        Found::Bad(problem, _) if problem.kind == ResourceErrorKind::DoesNotExist => Outcome::Absent(problem.clone()),
        Found::Bad(problem, _) => Outcome::Pending(Some(problem.clone())),
        Found::Waiting(cause) => Outcome::Pending(cause),
        Found::Good(_) => Outcome::Pending(None),
    }
}

/// Whether two snapshots of one target are made of the same parts.
fn same(a: &Snapshot, b: &Snapshot) -> bool {
    Arc::ptr_eq(&a.listener, &b.listener)
        && Arc::ptr_eq(&a.routes, &b.routes)
        && a.virtual_host == b.virtual_host
        && a.clusters.len() == b.clusters.len()
        && a.clusters
            .iter()
            .zip(&b.clusters)
            .all(|((name, entry), (other_name, other))| name == other_name && entry.is_same(other))
}
