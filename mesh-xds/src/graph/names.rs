//! The names of DNS clusters: who uses them, and what they are resolved to. Looking them up is left to others.

use super::{TargetKey, entry::error};
use crate::{
    resource::{ClusterLoadAssignment, DnsDiscovery},
    snapshot::{ResourceError, ResourceErrorKind},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};
use tokio::sync::watch;

/// The DNS clusters that a target reaches, by name.
pub(super) type Reached = BTreeMap<Arc<str>, Arc<DnsDiscovery>>;

/// The DNS clusters in use.
#[derive(Debug, Default)]
pub(super) struct Names {
    clusters: HashMap<Arc<str>, Resolving>,
    /// Not yet taken.
    jobs: Vec<Job>,
    generation: u64,
    /// Counts changes.
    changes: u64,
}

/// Names that are to be looked up again and again, until `stop` is closed.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) cluster: Arc<str>,
    pub(crate) discovery: Arc<DnsDiscovery>,
    pub(crate) generation: u64,
    pub(crate) stop: watch::Receiver<()>,
}

/// One cluster.
#[derive(Debug)]
struct Resolving {
    discovery: Arc<DnsDiscovery>,
    users: BTreeSet<TargetKey>,
    generation: u64,
    /// Of each name.
    answers: Vec<Answer>,
    /// Once each name was answered: of those that have addresses.
    found: Option<Result<Arc<ClusterLoadAssignment>, Arc<ResourceError>>>,
    /// The last change.
    changed: u64,
    /// The job ends with it.
    _stop: watch::Sender<()>,
}

#[derive(Debug)]
enum Answer {
    Awaited,
    /// The last good ones.
    Addresses(Vec<IpAddr>),
    /// There never were any.
    Failed(ResourceError),
}

impl Names {
    /// The endpoints of a cluster, or why there are none; `None`: not known yet.
    pub(super) fn endpoints(
        &self,
        cluster: &Arc<str>,
        discovery: &Arc<DnsDiscovery>,
    ) -> Option<&Result<Arc<ClusterLoadAssignment>, Arc<ResourceError>>> {
        let resolving = self.clusters.get(cluster).filter(|resolving| resolving.discovery == *discovery)?;
        resolving.found.as_ref()
    }

    /// A target uses these clusters now, and no others.
    pub(super) fn set_users(&mut self, target: &TargetKey, old: &Reached, new: &Reached) {
        for (cluster, discovery) in new {
            let known = self.clusters.get(cluster).is_some_and(|resolving| resolving.discovery == *discovery);
            if !known {
                let users = self.clusters.remove(cluster).map(|before| before.users).unwrap_or_default();
                self.start(cluster, discovery, users);
            }
            if let Some(resolving) = self.clusters.get_mut(cluster) {
                resolving.users.insert(target.clone());
            }
        }
        for cluster in old.keys().filter(|cluster| !new.contains_key(*cluster)) {
            if let Some(resolving) = self.clusters.get_mut(cluster) {
                resolving.users.remove(target);
            }
        }
        self.clusters.retain(|_, resolving| !resolving.users.is_empty());
    }

    fn start(&mut self, cluster: &Arc<str>, discovery: &Arc<DnsDiscovery>, users: BTreeSet<TargetKey>) {
        self.generation += 1;
        let (stop, stopped) = watch::channel(());
        let literal = |name: &Arc<str>| name.parse().map_or(Answer::Awaited, |ip| Answer::Addresses(vec![ip]));
        let mut resolving = Resolving {
            discovery: discovery.clone(),
            users,
            generation: self.generation,
            answers: discovery.names.iter().map(literal).collect(),
            found: None,
            changed: 0,
            _stop: stop,
        };
        self.changes += 1;
        resolving.settle(self.changes);
        self.clusters.insert(cluster.clone(), resolving);
        self.jobs.push(Job {
            cluster: cluster.clone(),
            discovery: discovery.clone(),
            generation: self.generation,
            stop: stopped,
        });
    }

    /// The jobs that came up since the last call.
    pub(super) fn take_jobs(&mut self) -> Vec<Job> {
        std::mem::take(&mut self.jobs)
    }

    /// What came of a lookup of the name at this place. The targets that use it, if that changes anything; `None`: nobody wants to
    /// know any more.
    pub(super) fn answered(
        &mut self,
        cluster: &Arc<str>,
        generation: u64,
        place: usize,
        answer: Result<Vec<IpAddr>, ResourceError>,
    ) -> Option<BTreeSet<TargetKey>> {
        let resolving = self.clusters.get_mut(cluster).filter(|resolving| resolving.generation == generation)?;
        let known = resolving.answers.get_mut(place)?;
        let changed = match (answer, &known) {
            // The order says nothing: servers turn it round.
            (Ok(addresses), Answer::Addresses(old)) if alike(&addresses, old) => false,
            (Ok(addresses), _) => {
                *known = Answer::Addresses(addresses);
                true
            }
            // The last good addresses stay in force.
            (Err(_), Answer::Addresses(_)) => false,
            (Err(error), Answer::Failed(old)) if error.message == old.message => false,
            (Err(error), _) => {
                *known = Answer::Failed(error);
                true
            }
        };
        if changed {
            self.changes += 1;
            resolving.settle(self.changes);
        }
        Some(if changed { resolving.users.clone() } else { BTreeSet::new() })
    }

    /// The last change among these clusters, for people.
    pub(super) fn version<'a>(&self, clusters: impl Iterator<Item = &'a Arc<str>>) -> Option<u64> {
        clusters.filter_map(|cluster| self.clusters.get(cluster)).map(|resolving| resolving.changed).max()
    }
}

impl Resolving {
    fn settle(&mut self, change: u64) {
        if self.answers.iter().any(|answer| matches!(answer, Answer::Awaited)) {
            return;
        }
        self.changed = change;
        let mut problem = None;
        let addresses: Vec<Vec<IpAddr>> = (self.answers.iter())
            .map(|answer| match answer {
                Answer::Addresses(addresses) => addresses.clone(),
                Answer::Failed(error) => {
                    problem.get_or_insert(error);
                    Vec::new()
                }
                Answer::Awaited => Vec::new(),
            })
            .collect();
        self.found = Some(if addresses.iter().any(|addresses| !addresses.is_empty()) {
            Ok(Arc::new(self.discovery.endpoints(&addresses)))
        } else {
            let message = problem.map_or("its names have no address", |error| error.message.as_str());
            Err(error(ResourceErrorKind::Unresolved, message.to_owned()))
        });
    }
}

fn alike(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.iter().collect::<BTreeSet<_>>() == b.iter().collect::<BTreeSet<_>>()
}
