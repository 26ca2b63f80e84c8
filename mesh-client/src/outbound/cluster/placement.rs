//! What an assignment says of its endpoints besides their addresses.

use crate::outbound::connect::Said;
use mesh_xds::resource::{self, EndpointHealthCheck, HealthStatus, LocalityId, MetadataValue};
use std::{collections::BTreeMap, sync::Arc};

/// What the assignment says of an endpoint besides its address.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placement {
    /// Its locality.
    pub(crate) locality: Arc<LocalityId>,
    /// 0 is the highest.
    pub(crate) priority: u32,
    /// Within its locality.
    pub(crate) weight: u32,
    /// As the control plane sees it.
    pub(crate) health: HealthStatus,
    /// How it is to be checked, where it says so.
    pub(crate) health_check: Option<Arc<EndpointHealthCheck>>,
    /// Or empty.
    pub(crate) hostname: Arc<str>,
    /// `metadata.filter_metadata`.
    pub(crate) metadata: Option<Arc<BTreeMap<String, BTreeMap<String, MetadataValue>>>>,
}

/// Placements that are made one after the other: like ones are one.
#[derive(Debug, Default)]
pub(super) struct Placements(Option<Arc<Placement>>);

impl Placements {
    /// What is said of `endpoint`, which is there.
    pub(super) fn of(
        &mut self,
        endpoint: &resource::Endpoint,
        locality: &Arc<LocalityId>,
        priority: u32,
    ) -> Arc<Placement> {
        match &self.0 {
            Some(last) if last.says(endpoint, locality, priority) => last.clone(),
            _ => self.0.insert(Arc::new(Placement::new(endpoint, locality, priority))).clone(),
        }
    }
}

impl Placement {
    fn new(endpoint: &resource::Endpoint, locality: &Arc<LocalityId>, priority: u32) -> Self {
        Self {
            locality: locality.clone(),
            priority,
            weight: endpoint.weight,
            health: endpoint.health,
            health_check: endpoint.health_check.clone(),
            hostname: endpoint.hostname.clone(),
            metadata: endpoint.metadata.clone(),
        }
    }

    /// What the way it is connected to depends on.
    pub(super) fn said(&self) -> Said<'_> {
        Said { hostname: &self.hostname, metadata: self.metadata.as_deref() }
    }

    /// Whether it is what is said here, as far as that can be seen at a glance.
    fn says(&self, endpoint: &resource::Endpoint, locality: &Arc<LocalityId>, priority: u32) -> bool {
        Arc::ptr_eq(&self.locality, locality)
            && (self.priority, self.weight, self.health) == (priority, endpoint.weight, endpoint.health)
            && Arc::ptr_eq(&self.hostname, &endpoint.hostname)
            && same(self.health_check.as_ref(), endpoint.health_check.as_ref())
            && same(self.metadata.as_ref(), endpoint.metadata.as_ref())
    }
}

fn same<T>(a: Option<&Arc<T>>, b: Option<&Arc<T>>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => Arc::ptr_eq(a, b),
        (a, b) => a.is_none() && b.is_none(),
    }
}
