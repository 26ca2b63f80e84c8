//! What is wanted, received, rejected and absent; and from that one complete snapshot per target.
//!
//! A graph has one owner at a time. It does no I/O: the drivers tell it what came and ask it what is wanted.

mod build;
mod census;
mod entry;
mod leaves;
mod names;
mod target;

#[cfg(test)]
mod tests;

use crate::{
    ads::{Absence, Verdict},
    bootstrap::{Bootstrap, ServerConfig, authority_of},
    resource::{ResourceType, Secret},
    snapshot::{ResourceError, ServerSnapshot, Snapshot, State},
    status::{ClientStatus, ServerStatus},
};
use entry::Entry;
pub(crate) use leaves::spread;
pub(crate) use names::Job;
use names::{Names, Reached};
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::SystemTime,
};
pub(crate) use target::Published;
pub(crate) use target::TargetKey;
use target::Targets;
use tokio::sync::watch;

/// A resource by type and name.
pub(crate) type Key = (ResourceType, Arc<str>);

/// Everything known, and everything wanted.
#[derive(Debug)]
pub(crate) struct Graph {
    bootstrap: Arc<Bootstrap>,
    servers: Vec<Server>,
    resources: HashMap<Key, Entry>,
    names: Names,
    targets: Targets<Snapshot>,
    listeners: Targets<ServerSnapshot>,
    secrets: Targets<Secret>,
    /// Counts responses, to tell the newest version.
    sequence: u64,
}

/// One control plane in use.
#[derive(Debug)]
struct Server {
    config: ServerConfig,
    /// What is wanted from it has changed since the last [`Graph::take_changed`].
    changed: bool,
    connected: bool,
    /// Why it cannot be reached; `None` once a response came.
    failure: Option<Arc<str>>,
}

/// What a target reaches.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Reach {
    resources: BTreeSet<Key>,
    /// Its DNS clusters.
    names: Reached,
}

/// A response's place in the order of things.
#[derive(Clone, Debug)]
pub(crate) struct Stamp {
    pub(crate) version: Arc<str>,
    pub(crate) now: SystemTime,
    sequence: u64,
    server: Arc<str>,
}

impl Graph {
    pub(crate) fn new(bootstrap: Arc<Bootstrap>) -> Self {
        Self {
            bootstrap,
            servers: Vec::new(),
            resources: HashMap::new(),
            names: Names::default(),
            targets: Targets::default(),
            listeners: Targets::default(),
            secrets: Targets::default(),
            sequence: 0,
        }
    }

    /// Adds a watcher to a target. The key is of the kind whose state is `S`.
    pub(crate) fn watch<S: Published>(&mut self, key: &TargetKey) -> watch::Receiver<State<S>> {
        let (receiver, new) = S::targets(self).watch(key);
        if new {
            self.refresh(key);
        }
        receiver
    }

    /// Removes a watcher; the last one takes along what only it could reach.
    pub(crate) fn unwatch(&mut self, key: &TargetKey) {
        let unused = match key {
            TargetKey::Client { .. } => self.targets.unwatch(key),
            TargetKey::Server(_) => self.listeners.unwatch(key),
            TargetKey::Secret(_) => self.secrets.unwatch(key),
        };
        if let Some(wants) = unused {
            self.rewire(key, &wants, &Reach::default());
        }
    }

    /// The servers whose subscriptions changed since the last call, including those in use for the first time.
    pub(crate) fn take_changed(&mut self) -> Vec<usize> {
        let changed = self.servers.iter_mut().enumerate();
        changed.filter_map(|(index, server)| std::mem::take(&mut server.changed).then_some(index)).collect()
    }

    pub(crate) fn server(&self, index: usize) -> &ServerConfig {
        &self.servers[index].config
    }

    /// All names of a type wanted from a server. What nobody uses is forgotten now and not before: the control plane sends again
    /// only what it saw unsubscribed, so what is dropped and wanted again between two calls must still be known.
    pub(crate) fn wanted(&mut self, server: usize, kind: ResourceType) -> BTreeSet<Arc<str>> {
        let asked = |of: ResourceType, entry: &Entry| of == kind && entry.server == Some(server);
        self.resources.retain(|(of, _), entry| !asked(*of, entry) || !entry.users.is_empty());
        let of_kind = self.resources.iter().filter(|((of, _), entry)| asked(*of, entry));
        of_kind.map(|((_, name), _)| name.clone()).collect()
    }

    /// A resource that is wanted, or was until just now.
    pub(crate) fn entry(&self, kind: ResourceType, name: &str) -> Option<(&Arc<str>, &Entry)> {
        let ((_, name), entry) = self.resources.get_key_value(&(kind, Arc::from(name)))?;
        Some((name, entry))
    }

    /// Applies the verdicts of one response.
    pub(crate) fn apply(
        &mut self,
        server: usize,
        kind: ResourceType,
        version: &Arc<str>,
        verdicts: Vec<(Arc<str>, Verdict)>,
        now: SystemTime,
    ) {
        self.sequence += 1;
        let config = &self.servers[server].config;
        let drop_accepted = config.features.fail_on_data_errors;
        let stamp = Stamp { version: version.clone(), now, sequence: self.sequence, server: config.uri.clone() };
        let mut touched = BTreeSet::new();
        for (name, verdict) in verdicts {
            let Some(entry) = self.resources.get_mut(&(kind, name.clone())) else { continue };
            let changed = match verdict {
                Verdict::Heartbeat => false,
                Verdict::Accepted(accepted) => entry.accept(kind, &name, accepted, &stamp),
                Verdict::Rejected(details) => entry.reject(kind, &name, &details, &stamp, drop_accepted),
            };
            entry.count(kind, &name);
            if changed {
                touched.extend(entry.users.iter().cloned());
            }
        }
        self.refresh_all(&touched);
    }

    /// The control plane has no such resource.
    pub(crate) fn absent(&mut self, kind: ResourceType, name: &Arc<str>, absence: Absence) {
        let Some(entry) = self.resources.get_mut(&(kind, name.clone())) else { return };
        let uri = entry.server.map(|server| self.servers[server].config.uri.clone());
        entry.absent(kind, name, absence, uri.as_deref().unwrap_or_default());
        entry.count(kind, name);
        let touched = entry.users.clone();
        self.refresh_all(&touched);
    }

    /// The control plane left a cluster out of its answers, which counts where nothing is in force yet (see `build`).
    pub(crate) fn missing(&mut self, name: &Arc<str>) {
        let Some(entry) = self.resources.get_mut(&(ResourceType::Cluster, name.clone())) else { return };
        let uri = entry.server.map(|server| self.servers[server].config.uri.clone());
        entry.missing(name, uri.as_deref().unwrap_or_default());
        let touched = entry.users.clone();
        self.refresh_all(&touched);
    }

    /// The DNS names that are to be looked up from now on.
    pub(crate) fn take_jobs(&mut self) -> Vec<Job> {
        self.names.take_jobs()
    }

    /// What came of a lookup of one name of a DNS cluster. False: the job is over.
    pub(crate) fn answered(
        &mut self,
        cluster: &Arc<str>,
        generation: u64,
        place: usize,
        answer: Result<Vec<IpAddr>, ResourceError>,
    ) -> bool {
        let Some(touched) = self.names.answered(cluster, generation, place, answer) else { return false };
        self.refresh_all(&touched);
        true
    }

    /// The connection was made, or lost.
    pub(crate) fn connected(&mut self, server: usize, connected: bool) {
        self.servers[server].connected = connected;
    }

    /// The control plane cannot be reached (and why), or can be again.
    pub(crate) fn reachable(&mut self, server: usize, failure: Option<Arc<str>>) {
        self.servers[server].failure = failure;
        let waiting = self.resources.values().filter(|entry| entry.server == Some(server) && entry.is_waiting());
        let touched = waiting.flat_map(|entry| entry.users.iter().cloned()).collect();
        self.refresh_all(&touched);
    }

    pub(crate) fn status(&self) -> ClientStatus {
        let servers = self.servers.iter().map(|server| ServerStatus {
            uri: server.config.uri.clone(),
            connected: server.connected,
            last_error: server.failure.clone(),
        });
        let mut resources: Vec<_> = self
            .resources
            .iter()
            .filter(|(_, entry)| !entry.users.is_empty())
            .map(|((kind, name), entry)| {
                let server = entry.server.map(|server| self.servers[server].config.uri.clone()).unwrap_or_default();
                entry.status(*kind, name, server)
            })
            .collect();
        resources.sort_by(|a, b| (a.type_url, &a.name).cmp(&(b.type_url, &b.name)));
        ClientStatus { node_id: self.bootstrap.node.id.clone(), servers: servers.collect(), resources }
    }

    fn refresh_all(&mut self, keys: &BTreeSet<TargetKey>) {
        for key in keys {
            self.refresh(key);
        }
    }

    /// Walks a target again, subscribes to what it reaches, and publishes if something changed.
    fn refresh(&mut self, key: &TargetKey) {
        match key {
            TargetKey::Client { .. } => self.refresh_of::<Snapshot>(key),
            TargetKey::Server(_) => self.refresh_of::<ServerSnapshot>(key),
            TargetKey::Secret(_) => self.refresh_of::<Secret>(key),
        }
    }

    fn refresh_of<S: Published>(&mut self, key: &TargetKey) {
        let Some((old, last)) = S::targets(self).last(key) else { return };
        let (wants, mut outcome) = S::build(self, key, last.as_ref());
        if wants != old {
            self.rewire(key, &old, &wants);
            if outcome.is_unexplained() || wants.names != old.names {
                // What was not even known before may have a server that is known to be down, or need no lookup.
                outcome = S::build(self, key, last.as_ref()).1;
            }
        }
        S::targets(self).publish(key, wants, outcome);
    }

    /// Moves a target from the resources it used to those it uses now. What nobody uses any more stays until [`Self::wanted`].
    fn rewire(&mut self, target: &TargetKey, old: &Reach, new: &Reach) {
        self.names.set_users(target, &old.names, &new.names);
        let (old, new) = (&old.resources, &new.resources);
        for key in new.difference(old) {
            if !self.resources.contains_key(key) {
                let entry = self.new_entry(key);
                self.resources.insert(key.clone(), entry);
            }
            if let Some(entry) = self.resources.get_mut(key) {
                entry.users.insert(target.clone());
            }
        }
        for key in old.difference(new) {
            let Some(entry) = self.resources.get_mut(key) else { continue };
            entry.users.remove(target);
            if entry.users.is_empty() {
                match entry.server {
                    Some(server) => self.servers[server].changed = true,
                    None => drop(self.resources.remove(key)),
                }
            }
        }
    }

    fn new_entry(&mut self, (kind, name): &Key) -> Entry {
        // The first server; the others are for fallback (gRFC A71).
        let config = self.bootstrap.servers_of(authority_of(name)).map(|servers| servers.first().cloned());
        let mut entry = match config {
            Ok(Some(config)) => {
                let index = self.server_index(config);
                self.servers[index].changed = true;
                Entry::wanted(index)
            }
            Ok(None) => Entry::unusable(*kind, name, "the bootstrap has no server for it"),
            Err(error) => Entry::unusable(*kind, name, &error.to_string()),
        };
        entry.count(*kind, name);
        entry
    }

    fn server_index(&mut self, config: ServerConfig) -> usize {
        if let Some(index) = self.servers.iter().position(|server| server.config == config) {
            return index;
        }
        self.servers.push(Server { config, changed: true, connected: false, failure: None });
        self.servers.len() - 1
    }
}
