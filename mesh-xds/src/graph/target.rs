//! What is watched, each kind with its own state: client targets, server listeners, secrets.

use super::{Graph, Reach, build::Outcome};
use crate::{
    resource::Secret,
    snapshot::{ResourceError, ServerSnapshot, Snapshot, State},
};
use std::{collections::BTreeMap, sync::Arc};
use tokio::sync::watch;

/// What is watched.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum TargetKey {
    /// The target of a client.
    Client {
        /// LDS name.
        name: Arc<str>,
        /// Picks the virtual host.
        host: Arc<str>,
    },
    /// The listener of a server, by LDS name.
    Server(Arc<str>),
    /// A secret by its name.
    Secret(Arc<str>),
}

/// A kind of thing that is watched.
pub(crate) trait Published: Sized {
    /// Those that are watched.
    fn targets(graph: &mut Graph) -> &mut Targets<Self>;

    /// What one reaches now, and what that comes to.
    fn build(graph: &Graph, key: &TargetKey, last: Option<&Arc<Self>>) -> (Reach, Outcome<Self>);
}

/// Everything that is watched, of one kind.
#[derive(Debug)]
pub(crate) struct Targets<S>(BTreeMap<TargetKey, Target<S>>);

#[derive(Debug)]
struct Target<S> {
    sender: watch::Sender<State<S>>,
    watchers: usize,
    /// The last complete snapshot, while it is in force.
    last: Option<Arc<S>>,
    wants: Reach,
}

impl Published for Snapshot {
    fn targets(graph: &mut Graph) -> &mut Targets<Self> {
        &mut graph.targets
    }

    fn build(graph: &Graph, key: &TargetKey, last: Option<&Arc<Self>>) -> (Reach, Outcome<Self>) {
        match key {
            TargetKey::Client { name, host } => graph.build(name, host, last),
            TargetKey::Server(_) | TargetKey::Secret(_) => (Reach::default(), Outcome::Unchanged),
        }
    }
}

impl Published for ServerSnapshot {
    fn targets(graph: &mut Graph) -> &mut Targets<Self> {
        &mut graph.listeners
    }

    fn build(graph: &Graph, key: &TargetKey, last: Option<&Arc<Self>>) -> (Reach, Outcome<Self>) {
        match key {
            TargetKey::Server(name) => graph.build_server(name, last),
            TargetKey::Client { .. } | TargetKey::Secret(_) => (Reach::default(), Outcome::Unchanged),
        }
    }
}

impl Published for Secret {
    fn targets(graph: &mut Graph) -> &mut Targets<Self> {
        &mut graph.secrets
    }

    fn build(graph: &Graph, key: &TargetKey, last: Option<&Arc<Self>>) -> (Reach, Outcome<Self>) {
        match key {
            TargetKey::Secret(name) => graph.build_secret(name, last),
            TargetKey::Client { .. } | TargetKey::Server(_) => (Reach::default(), Outcome::Unchanged),
        }
    }
}

impl<S> Default for Targets<S> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<S> Targets<S> {
    /// Adds a watcher; and whether it is the first.
    pub(super) fn watch(&mut self, key: &TargetKey) -> (watch::Receiver<State<S>>, bool) {
        if let Some(target) = self.0.get_mut(key) {
            target.watchers += 1;
            return (target.sender.subscribe(), false);
        }
        let (sender, receiver) = watch::channel(State::Pending { cause: None });
        self.0.insert(key.clone(), Target { sender, watchers: 1, last: None, wants: Reach::default() });
        (receiver, true)
    }

    /// Removes a watcher; what the last one wanted.
    pub(super) fn unwatch(&mut self, key: &TargetKey) -> Option<Reach> {
        let target = self.0.get_mut(key)?;
        target.watchers -= 1;
        if target.watchers > 0 {
            return None;
        }
        self.0.remove(key).map(|target| target.wants)
    }

    /// What it wanted until now, and the snapshot in force.
    pub(super) fn last(&self, key: &TargetKey) -> Option<(Reach, Option<Arc<S>>)> {
        self.0.get(key).map(|target| (target.wants.clone(), target.last.clone()))
    }

    pub(super) fn publish(&mut self, key: &TargetKey, wants: Reach, outcome: Outcome<S>) {
        let Some(target) = self.0.get_mut(key) else { return };
        target.wants = wants;
        match outcome {
            Outcome::Unchanged => {}
            Outcome::Ready(snapshot) => {
                target.last = Some(snapshot.clone());
                target.sender.send_replace(State::Ready(snapshot));
            }
            Outcome::Absent(error) => {
                target.last = None;
                target.sender.send_if_modified(|state| match state {
                    State::Absent(old) if old.message == error.message => false,
                    _ => {
                        *state = State::Absent(error);
                        true
                    }
                });
            }
            Outcome::Pending(cause) => {
                target.last = None;
                target.sender.send_if_modified(|state| {
                    let text = |cause: &Option<Arc<ResourceError>>| cause.as_ref().map(|cause| cause.message.clone());
                    let same = matches!(state, State::Pending { cause: old } if text(old) == text(&cause));
                    if !same {
                        *state = State::Pending { cause };
                    }
                    !same
                });
            }
        }
    }
}
