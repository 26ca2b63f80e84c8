//! The immutable, complete view of one target. No route names a cluster that is not in it.

mod server;

pub use server::ServerSnapshot;

use crate::resource::{Cluster, ClusterLoadAssignment, Listener, RouteConfiguration, Secret};
use std::{collections::BTreeMap, fmt, sync::Arc};

/// Everything a client needs to serve one target, consistent in itself (gRFC A74). Unchanged parts keep their `Arc`
/// from one snapshot to the next, so a consumer sees what changed by pointer.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The LDS name.
    pub name: Arc<str>,
    /// The authority used to choose the virtual host.
    pub host: Arc<str>,
    /// `version_info` of what it was built from, for people: "lds=3 rds=3 cds=3 eds=7".
    pub version: Arc<str>,
    /// The listener.
    pub listener: Arc<Listener>,
    /// Its routes.
    pub routes: Arc<RouteConfiguration>,
    /// Index into `routes.virtual_hosts` of the host's virtual host; `None`: no virtual host matches.
    pub virtual_host: Option<usize>,
    /// Every cluster that the virtual host can send to, with those that aggregates stand for.
    pub clusters: BTreeMap<Arc<str>, ClusterEntry>,
}

/// One cluster of a snapshot.
#[derive(Clone, Debug)]
pub enum ClusterEntry {
    /// Usable: the cluster and its endpoints, those of a DNS cluster resolved (an empty assignment when EDS said it does not exist).
    Ready {
        /// The cluster.
        cluster: Arc<Cluster>,
        /// Its endpoints.
        endpoints: Arc<ClusterLoadAssignment>,
    },
    /// Stands for other clusters of the snapshot: requests go to the first that can take them.
    Aggregate {
        /// The cluster. How its leaves balance and connect is theirs; the limits of its retries count.
        cluster: Arc<Cluster>,
        /// The clusters that have endpoints, highest priority first, each once and each [`Ready`](Self::Ready).
        leaves: Arc<[Arc<str>]>,
    },
    /// Does not exist or was never valid: requests to it fail with this cause.
    Failed(Arc<ResourceError>),
}

/// What is known of a target, a server listener or a secret.
#[derive(Debug)]
pub enum State<S> {
    /// Nothing complete yet. `cause` is the last error that keeps it so (server unreachable, resource NACKed).
    Pending {
        /// Why not yet, when known.
        cause: Option<Arc<ResourceError>>,
    },
    /// Complete.
    Ready(Arc<S>),
    /// It does not exist (for a target also: its route configuration): requests fail, a layer passes on to its inner client.
    Absent(Arc<ResourceError>),
}

/// What is known of a target.
pub type TargetState = State<Snapshot>;

/// What is known of a server listener.
pub type ServerState = State<ServerSnapshot>;

/// What is known of a secret.
pub type SecretState = State<Secret>;

/// Why a resource is not usable. Displays as a sentence that names type, resource, field path, server and cause.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct ResourceError {
    /// What class of error.
    pub kind: ResourceErrorKind,
    /// The complete sentence.
    pub message: String,
}

/// Classes of [`ResourceError`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResourceErrorKind {
    /// The control plane says there is none (or did not send it in time, gRFC A57).
    DoesNotExist,
    /// Rejected by validation and there is no older good version.
    Invalid,
    /// The control plane cannot be reached.
    Unreachable,
    /// DNS gives no address for the target.
    Unresolved,
}

impl<S> Clone for State<S> {
    fn clone(&self) -> Self {
        match self {
            Self::Pending { cause } => Self::Pending { cause: cause.clone() },
            Self::Ready(snapshot) => Self::Ready(snapshot.clone()),
            Self::Absent(error) => Self::Absent(error.clone()),
        }
    }
}

impl ClusterEntry {
    /// Whether two entries are made of the same parts.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Ready { cluster: a, endpoints: x }, Self::Ready { cluster: b, endpoints: y }) => {
                Arc::ptr_eq(a, b) && Arc::ptr_eq(x, y)
            }
            (Self::Aggregate { cluster: a, leaves: x }, Self::Aggregate { cluster: b, leaves: y }) => {
                Arc::ptr_eq(a, b) && x == y
            }
            // That of an aggregate is made anew by each walk.
            (Self::Failed(a), Self::Failed(b)) => Arc::ptr_eq(a, b) || (a.kind == b.kind && a.message == b.message),
            _ => false,
        }
    }
}

impl fmt::Display for ResourceErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DoesNotExist => "resource does not exist",
            Self::Invalid => "resource rejected",
            Self::Unreachable => "control plane unreachable",
            Self::Unresolved => "name not resolved",
        })
    }
}
