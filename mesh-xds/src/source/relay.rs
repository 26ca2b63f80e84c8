//! One cluster of another target: what filters call services through.

use super::{Policy, fixed::Template};
use crate::{
    snapshot::{ClusterEntry, TargetState},
    watch::TargetWatch,
};
use std::{collections::BTreeMap, fmt, sync::Arc};
use tokio::sync::watch;

/// Keeps a target that sends everything to one cluster up to date.
pub struct Relay {
    template: Template,
    sender: watch::Sender<TargetState>,
}

/// A target that sends everything to the cluster `name`, and what keeps it up to date. It has no timeout and no retries.
pub fn relay(name: &str, entry: ClusterEntry) -> (Relay, TargetWatch) {
    let template = Template::new(name, &Policy { timeout: Some(std::time::Duration::ZERO), ..Policy::default() });
    let (sender, state) = watch::channel(TargetState::Ready(Arc::new(template.with(entry, "relay"))));
    let watch = TargetWatch::new(template.name.clone(), state, Arc::new(()));
    (Relay { template, sender }, watch)
}

impl Relay {
    /// The cluster is so from now on.
    pub fn set(&self, entry: ClusterEntry) {
        let snapshot = Arc::new(self.template.with(entry, "relay"));
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
    a.values().zip(b.values()).all(|(a, b)| match (a, b) {
        (ClusterEntry::Ready { cluster: a, endpoints: x }, ClusterEntry::Ready { cluster: b, endpoints: y }) => {
            Arc::ptr_eq(a, b) && Arc::ptr_eq(x, y)
        }
        (ClusterEntry::Failed(a), ClusterEntry::Failed(b)) => Arc::ptr_eq(a, b),
        _ => false,
    })
}

impl fmt::Debug for Relay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Relay").field("name", &self.template.name).finish_non_exhaustive()
    }
}
