//! Aggregate clusters, spread out into the clusters that have endpoints (gRFC A37).

use super::entry::error;
use crate::{
    resource::Discovery,
    snapshot::{ClusterEntry, ResourceError, ResourceErrorKind},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

/// gRFC A37: the clusters of an aggregate are one deeper than itself; none may be as deep as this.
const MAX_DEPTH: usize = 16;

/// The entries of a snapshot, while its aggregates are not spread out.
type Entries = BTreeMap<Arc<str>, ClusterEntry>;

/// The leaves of an aggregate, by their first place.
#[derive(Default)]
struct Leaves {
    found: Vec<Arc<str>>,
    /// Aggregates whose leaves are found.
    done: BTreeSet<Arc<str>>,
    /// From the root.
    path: Vec<Arc<str>>,
    /// The first that cannot be used.
    problem: Option<Arc<ResourceError>>,
}

/// Gives every aggregate its leaves. What cannot be used is left out; an aggregate of which nothing is left, that contains itself, or
/// that is nested too deep cannot be used itself.
pub(crate) fn spread(clusters: &mut Entries) {
    let is_aggregate = |entry: &ClusterEntry| matches!(entry, ClusterEntry::Aggregate { .. });
    let names: Vec<_> =
        clusters.iter().filter(|(_, entry)| is_aggregate(entry)).map(|(name, _)| name.clone()).collect();
    let spread: Vec<_> = names.into_iter().map(|name| (Leaves::of(&name, clusters), name)).collect();
    for (found, name) in spread {
        match (found, clusters.get_mut(&name)) {
            (Ok(found), Some(ClusterEntry::Aggregate { leaves, .. })) => *leaves = found.into(),
            (Ok(_), _) => {}
            (Err(problem), _) => {
                clusters.insert(name, ClusterEntry::Failed(problem));
            }
        }
    }
}

impl Leaves {
    fn of(name: &Arc<str>, clusters: &Entries) -> Result<Vec<Arc<str>>, Arc<ResourceError>> {
        let mut leaves = Self::default();
        if let Err(reason) = leaves.collect(name, clusters) {
            return Err(error(ResourceErrorKind::Invalid, format!("Cluster \"{name}\": {reason}")));
        }
        if leaves.found.is_empty() {
            let cause = leaves.problem.map(|problem| problem.message.clone()).unwrap_or_default();
            let message = format!("Cluster \"{name}\": none of its clusters can be used: {cause}");
            return Err(error(ResourceErrorKind::DoesNotExist, message));
        }
        Ok(leaves.found)
    }

    fn collect(&mut self, name: &Arc<str>, clusters: &Entries) -> Result<(), String> {
        if let Some(start) = self.path.iter().position(|above| above == name) {
            let round = self.path[start..].iter().chain([name]).map(AsRef::as_ref).collect::<Vec<_>>();
            return Err(format!("it contains itself: {}", round.join(" -> ")));
        }
        if self.path.len() >= MAX_DEPTH {
            let path = self.path.join(" -> ");
            return Err(format!("\"{name}\" is nested too deep, {MAX_DEPTH} is the limit: {path}"));
        }
        match clusters.get(name) {
            Some(ClusterEntry::Aggregate { cluster, .. }) => {
                let Discovery::Aggregate(children) = &cluster.discovery else { return Ok(()) };
                if self.done.contains(name) {
                    return Ok(());
                }
                self.path.push(name.clone());
                for child in &**children {
                    self.collect(child, clusters)?;
                }
                self.path.pop();
                self.done.insert(name.clone());
            }
            Some(ClusterEntry::Ready { .. }) if !self.found.contains(name) => self.found.push(name.clone()),
            Some(ClusterEntry::Failed(problem)) => {
                self.problem.get_or_insert_with(|| problem.clone());
            }
            Some(ClusterEntry::Ready { .. }) | None => {}
        }
        Ok(())
    }
}
