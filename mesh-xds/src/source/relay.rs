//! One cluster of another target: what filters call services through.

use super::{Policy, fixed::Template};
use crate::{
    snapshot::{ClusterEntry, Snapshot, TargetState},
    watch::TargetWatch,
};
use std::{collections::BTreeMap, fmt, sync::Arc};
use tokio::sync::watch;

/// Keeps a target that sends everything to one cluster up to date.
pub struct Relay {
    template: Template,
    sender: watch::Sender<TargetState>,
}

/// A target that sends everything to the cluster `name` of another target's snapshot, and what keeps it up to date. It has no timeout
/// and no retries. `None`: the snapshot has no such cluster.
pub fn relay(name: &str, of: &Snapshot) -> Option<(Relay, TargetWatch)> {
    let template = Template::new(name, &Policy { timeout: Some(std::time::Duration::ZERO), ..Policy::default() });
    let clusters = clusters(name, of)?;
    let (sender, state) = watch::channel(TargetState::Ready(Arc::new(template.with(clusters, "relay"))));
    let watch = TargetWatch::new(template.name.clone(), state, Arc::new(()));
    Some((Relay { template, sender }, watch))
}

/// A cluster, with those that it stands for.
fn clusters(name: &str, of: &Snapshot) -> Option<BTreeMap<Arc<str>, ClusterEntry>> {
    let (name, entry) = of.clusters.get_key_value(name)?;
    let leaves = match entry {
        ClusterEntry::Aggregate { leaves, .. } => leaves.clone(),
        ClusterEntry::Ready { .. } | ClusterEntry::Failed(_) => Arc::default(),
    };
    let leaves = leaves.iter().filter_map(|leaf| of.clusters.get_key_value(leaf));
    Some(leaves.chain([(name, entry)]).map(|(name, entry)| (name.clone(), entry.clone())).collect())
}

impl Relay {
    /// The cluster is as in this snapshot from now on; as it was, if the snapshot does not have it.
    pub fn update(&self, of: &Snapshot) {
        let Some(clusters) = clusters(&self.template.name, of) else { return };
        let snapshot = Arc::new(self.template.with(clusters, "relay"));
        self.sender.send_if_modified(|state| {
            if let TargetState::Ready(last) = state
                && same(&last.clusters, &snapshot.clusters)
            {
                return false;
            }
            *state = TargetState::Ready(snapshot);
            true
        });
    }
}

/// Made of the same parts.
fn same(a: &BTreeMap<Arc<str>, ClusterEntry>, b: &BTreeMap<Arc<str>, ClusterEntry>) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|((name, a), (other, b))| name == other && a.is_same(b))
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("name", &self.template.name).finish_non_exhaustive()
    }
}
