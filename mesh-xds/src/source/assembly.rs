//! A target without a control plane, kept complete: its own endpoints, and the clusters of its policy, some of them by DNS names.

use super::{Lookup, fixed::Template, refresh};
use crate::{
    resource::{ClusterLoadAssignment, Discovery, DnsDiscovery},
    snapshot::{ClusterEntry, ResourceError, ResourceErrorKind, TargetState},
};
use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{sync::watch, task::AbortHandle};

/// Puts a target's parts together whenever one of them changes.
pub(super) struct Assembly {
    template: Template,
    sender: watch::Sender<TargetState>,
    parts: Mutex<Parts>,
}

/// What is known.
#[derive(Default)]
struct Parts {
    /// The target's own cluster; `None`: its endpoints are not known yet.
    own: Option<ClusterEntry>,
    /// By the names of DNS clusters.
    dns: BTreeMap<Arc<str>, Names>,
    /// Of own endpoints and DNS clusters, for people.
    version: String,
    changes: u64,
}

/// One DNS cluster.
struct Names {
    discovery: Arc<DnsDiscovery>,
    /// Of each name.
    answers: Vec<Option<Result<Vec<IpAddr>, ResourceError>>>,
    /// Once each name was answered.
    found: Option<Result<Arc<ClusterLoadAssignment>, Arc<ResourceError>>>,
}

/// Tasks that end with the target.
#[derive(Default)]
pub(super) struct Tasks(pub(super) Vec<AbortHandle>);

impl Drop for Tasks {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

impl Assembly {
    /// The target, and where its states can be watched.
    pub(super) fn new(template: Template) -> (Arc<Self>, watch::Receiver<TargetState>) {
        let (sender, state) = watch::channel(TargetState::Pending { cause: None });
        let mut parts = Parts::default();
        for cluster in template.clusters() {
            if let Discovery::Dns(discovery) = &cluster.discovery {
                let answers = discovery.names.iter().map(|name| name.parse().ok().map(|ip| Ok(vec![ip])));
                let mut names = Names { discovery: discovery.clone(), answers: answers.collect(), found: None };
                names.settle();
                parts.dns.insert(cluster.name.clone(), names);
            }
        }
        (Arc::new(Self { template, sender, parts: Mutex::new(parts) }), state)
    }

    /// Looks up the names of the clusters, from now on. Nothing is spawned where there is none.
    ///
    /// # Panics
    /// With a name, outside a tokio runtime.
    pub(super) fn follow(self: &Arc<Self>, lookup: impl Fn() -> Arc<dyn Lookup>) -> Tasks {
        let mut tasks = Tasks::default();
        let wanted: Vec<_> = {
            let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            let open = |(name, names): (&Arc<str>, &Names)| {
                let open: Vec<_> = (0..names.answers.len()).filter(|place| names.answers[*place].is_none()).collect();
                (name.clone(), names.discovery.clone(), open)
            };
            parts.dns.iter().map(open).collect()
        };
        for (cluster, discovery, open) in wanted {
            for place in open {
                let (lookup, discovery) = (lookup(), discovery.clone());
                let (assembly, cluster) = (Arc::downgrade(self), cluster.clone());
                let task = tokio::spawn(async move {
                    let name = discovery.names[place].clone();
                    let tell = |found| assembly.upgrade().map(|a| a.answered(&cluster, place, found)).is_some();
                    refresh(&name, discovery.family, discovery.refresh, &*lookup, tell).await;
                });
                tasks.0.push(task.abort_handle());
            }
        }
        tasks
    }

    /// The target's own endpoints are these now.
    pub(super) fn own(&self, endpoints: Arc<ClusterLoadAssignment>, version: impl Into<String>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.own = Some(self.template.own(endpoints));
        parts.version = version.into();
        self.publish(&parts);
    }

    /// Why the target's own endpoints are not known. What was published stays in force.
    pub(super) fn unknown(&self, error: ResourceError) {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if parts.own.is_none() {
            self.sender.send_replace(TargetState::Pending { cause: Some(Arc::new(error)) });
        }
    }

    fn answered(&self, cluster: &Arc<str>, place: usize, answer: Result<Vec<IpAddr>, ResourceError>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(names) = parts.dns.get_mut(cluster) else { return };
        let known = &mut names.answers[place];
        let changed = match (&answer, &*known) {
            (Ok(new), Some(Ok(old))) => !alike(new, old),
            // The last good addresses stay in force.
            (Err(_), Some(Ok(_))) => false,
            (Err(new), Some(Err(old))) => new.message != old.message,
            _ => true,
        };
        if changed {
            *known = Some(answer);
            names.settle();
            parts.changes += 1;
            self.publish(&parts);
        }
    }

    /// Only what is complete.
    fn publish(&self, parts: &Parts) {
        let Some(own) = &parts.own else { return };
        if parts.dns.values().any(|names| names.found.is_none()) {
            return;
        }
        let found = |name: &Arc<str>| parts.dns.get(name).and_then(|names| names.found.clone());
        let version = match parts.changes {
            0 => parts.version.clone(),
            changes => format!("{} clusters={changes}", parts.version),
        };
        let snapshot = self.template.snapshot(own.clone(), found, &version);
        self.sender.send_replace(TargetState::Ready(Arc::new(snapshot)));
    }
}

impl Names {
    fn settle(&mut self) {
        if self.answers.iter().any(Option::is_none) {
            return;
        }
        let addresses: Vec<_> = (self.answers.iter())
            .map(|answer| match answer {
                Some(Ok(addresses)) => addresses.clone(),
                _ => Vec::new(),
            })
            .collect();
        self.found = Some(if addresses.iter().any(|addresses| !addresses.is_empty()) {
            Ok(Arc::new(self.discovery.endpoints(&addresses)))
        } else {
            let problem = self.answers.iter().flatten().find_map(|answer| answer.as_ref().err().cloned());
            Err(Arc::new(problem.unwrap_or_else(|| ResourceError {
                kind: ResourceErrorKind::Unresolved,
                message: "its names have no address".into(),
            })))
        });
    }
}

/// The order says nothing: servers turn it round.
fn alike(a: &[IpAddr], b: &[IpAddr]) -> bool {
    a.len() == b.len() && a.iter().all(|ip| b.contains(ip))
}
