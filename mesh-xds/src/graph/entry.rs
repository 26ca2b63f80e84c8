//! One wanted resource: the version in force, the last rejection, and what its absence means.

use super::{Stamp, TargetKey, census::Counted};
use crate::{
    ads::{Absence, Accepted},
    lint::Note,
    resource::{ClusterLoadAssignment, ResourceType},
    snapshot::{ResourceError, ResourceErrorKind},
    status::{ClientResourceStatus, ErrorState, ResourceStatus},
};
use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
    time::SystemTime,
};

/// A wanted resource.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// Where it is asked for; `None` when there is no server for its authority.
    pub(super) server: Option<usize>,
    /// The targets that reach it.
    pub(super) users: BTreeSet<TargetKey>,
    /// The version in force.
    pub(super) accepted: Option<Arc<Accepted>>,
    pub(super) version: Arc<str>,
    /// Which response brought it.
    pub(super) sequence: u64,
    updated: Option<SystemTime>,
    rejection: Option<ErrorState>,
    /// Why it is not usable, when there is no version in force. Stays the same `Arc` while it does.
    pub(super) problem: Option<Arc<ResourceError>>,
    absence: Option<Absence>,
    /// Neither came nor timed out, but answers came without it.
    pub(super) missing: Option<Arc<ResourceError>>,
    /// Stands in for endpoints that do not exist.
    pub(super) empty: Option<Arc<ClusterLoadAssignment>>,
    logged: HashSet<Note>,
    counted: Counted,
}

impl Entry {
    pub(super) fn wanted(server: usize) -> Self {
        Self { server: Some(server), ..Self::default() }
    }

    pub(super) fn unusable(kind: ResourceType, name: &str, reason: &str) -> Self {
        let problem = error(ResourceErrorKind::Invalid, format!("{kind} \"{name}\": {reason}"));
        Self { problem: Some(problem), ..Self::default() }
    }

    /// Counts it by its state, by gRFC A78's words.
    pub(super) fn count(&mut self, kind: ResourceType, name: &str) {
        let state = match (&self.rejection, &self.accepted, self.absence) {
            (Some(_), Some(_), _) => "nacked_but_cached",
            (Some(_), None, _) => "nacked",
            (None, Some(_), _) => "acked",
            (None, None, Some(Absence::Removed | Absence::TimedOut)) => "does_not_exist",
            (None, None, Some(Absence::Transient)) => "timeout",
            (None, None, None) => "requested",
        };
        self.counted.is(kind, name, state);
    }

    /// The version in force.
    pub(crate) fn accepted(&self) -> Option<&Arc<Accepted>> {
        self.accepted.as_ref()
    }

    /// Neither a version nor a verdict.
    pub(super) fn is_waiting(&self) -> bool {
        self.accepted.is_none() && self.problem.is_none()
    }

    /// Returns whether what is in force changed.
    pub(super) fn accept(&mut self, kind: ResourceType, name: &str, accepted: Arc<Accepted>, stamp: &Stamp) -> bool {
        self.rejection = None;
        self.absence = None;
        self.missing = None;
        self.problem = None;
        self.empty = None;
        self.version = stamp.version.clone();
        self.sequence = stamp.sequence;
        self.updated = Some(stamp.now);
        if self.accepted.as_ref().is_some_and(|old| Arc::ptr_eq(old, &accepted)) {
            return false;
        }
        self.logged.retain(|note| accepted.notes.contains(note));
        for note in accepted.notes.iter() {
            if self.logged.insert(note.clone()) {
                tracing::warn!(resource = name, %kind, path = note.path, "xDS field without effect: {}", note.reason);
            }
        }
        self.accepted = Some(accepted);
        true
    }

    /// Returns whether what is in force changed: a rejected version leaves the accepted one alone (gRFC A46), unless the
    /// server asks for the opposite (`fail_on_data_errors`, gRFC A88).
    pub(super) fn reject(
        &mut self,
        kind: ResourceType,
        name: &str,
        details: &Arc<str>,
        stamp: &Stamp,
        drop_accepted: bool,
    ) -> bool {
        let Stamp { version, server, now, .. } = stamp;
        tracing::warn!(resource = name, %kind, version = &**version, server = &**server, "xDS resource rejected: {details}");
        self.rejection = Some(ErrorState { details: details.clone(), version: version.clone(), last_attempt: *now });
        let class = match self.accepted {
            Some(_) if !drop_accepted => return false,
            // Data errors count as if the resource had been deleted.
            Some(_) => ResourceErrorKind::DoesNotExist,
            None => ResourceErrorKind::Invalid,
        };
        self.accepted = None;
        self.absence = None;
        self.empty = None;
        let message = format!("{kind} \"{name}\" version \"{version}\" from {server}: {details}");
        self.problem = Some(error(class, message));
        true
    }

    /// A cluster is not in the answers so far.
    pub(super) fn missing(&mut self, name: &str, server: &str) {
        if self.is_waiting() {
            let kind = ResourceType::Cluster;
            let message = format!("{kind} \"{name}\": the control plane has none ({server})");
            self.missing.get_or_insert_with(|| error(ResourceErrorKind::DoesNotExist, message));
        }
    }

    pub(super) fn absent(&mut self, kind: ResourceType, name: &Arc<str>, absence: Absence, server: &str) {
        let (class, reason) = match absence {
            Absence::Removed => (ResourceErrorKind::DoesNotExist, "the control plane has none"),
            Absence::TimedOut => (ResourceErrorKind::DoesNotExist, "the control plane did not send it in time"),
            Absence::Transient => (ResourceErrorKind::Unreachable, "the control plane did not send it in time"),
        };
        tracing::warn!(resource = &**name, %kind, server, "xDS resource absent: {reason}");
        self.accepted = None;
        self.version = Arc::default();
        self.rejection = None;
        self.absence = Some(absence);
        self.problem = Some(error(class, format!("{kind} \"{name}\": {reason} ({server})")));
        let gone = kind == ResourceType::ClusterLoadAssignment && absence != Absence::Transient;
        self.empty =
            gone.then(|| Arc::new(ClusterLoadAssignment { name: name.clone(), ..ClusterLoadAssignment::default() }));
    }

    pub(super) fn status(&self, kind: ResourceType, name: &Arc<str>, server: Arc<str>) -> ResourceStatus {
        let client_status = if self.rejection.is_some() {
            ClientResourceStatus::Nacked
        } else if self.accepted.is_some() {
            ClientResourceStatus::Acked
        } else {
            match self.absence {
                Some(Absence::Removed | Absence::TimedOut) => ClientResourceStatus::DoesNotExist,
                Some(Absence::Transient) => ClientResourceStatus::Timeout,
                None => ClientResourceStatus::Requested,
            }
        };
        ResourceStatus {
            type_url: kind.type_url(),
            name: name.clone(),
            server,
            version: self.version.clone(),
            last_updated: self.updated,
            client_status,
            error_state: self.rejection.clone(),
            notes: self.accepted.as_ref().map(|accepted| accepted.notes.clone()).unwrap_or_default(),
        }
    }
}

pub(super) fn error(kind: ResourceErrorKind, message: String) -> Arc<ResourceError> {
    Arc::new(ResourceError { kind, message })
}
