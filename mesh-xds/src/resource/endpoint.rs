//! EDS: `envoy.config.endpoint.v3.ClusterLoadAssignment`.

use super::{EndpointHealthCheck, FractionalPercent};
use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

/// Validated endpoints of one cluster: priorities without gaps, each address once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClusterLoadAssignment {
    /// Resource name.
    pub name: Arc<str>,
    /// Index is the priority, 0 first. Localities of weight 0 are left out.
    pub priorities: Vec<Vec<Locality>>,
    /// `policy.drop_overloads`, sequentially independent.
    pub drops: Vec<DropOverload>,
    /// `policy.overprovisioning_factor` in percent; default 140. Without meaning in the gRPC profile (gRFC A27).
    pub overprovisioning_factor: Option<u32>,
}

/// One locality of one priority.
#[derive(Clone, Debug, PartialEq)]
pub struct Locality {
    /// Region, zone, sub-zone.
    pub id: Arc<LocalityId>,
    /// Greater than zero.
    pub weight: u32,
    /// Every endpoint, whatever its health.
    pub endpoints: Vec<Endpoint>,
}

/// `envoy.config.core.v3.Locality`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LocalityId {
    /// Region.
    pub region: String,
    /// Zone.
    pub zone: String,
    /// Sub-zone.
    pub sub_zone: String,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Greater than zero.
    pub weight: u32,
    /// As the control plane sees it.
    pub health: HealthStatus,
    /// `hostname`, or empty.
    pub hostname: Arc<str>,
    /// `metadata.filter_metadata`, when there is any: namespace -> key -> value.
    pub metadata: Option<Arc<BTreeMap<String, BTreeMap<String, MetadataValue>>>>,
    /// `health_check_config`, when it says anything.
    pub health_check: Option<Arc<EndpointHealthCheck>>,
}

/// A metadata value, flattened from `google.protobuf.Value`; lists and structs are left out.
#[derive(Clone, Debug, PartialEq)]
pub enum MetadataValue {
    /// A string.
    String(String),
    /// A number.
    Number(f64),
    /// A boolean.
    Bool(bool),
}

/// `envoy.config.core.v3.HealthStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HealthStatus {
    /// Used.
    #[default]
    Unknown,
    /// Used.
    Healthy,
    /// Not used.
    Unhealthy,
    /// Not used for new requests.
    Draining,
    /// Not used.
    Timeout,
    /// Used when there are not enough others; never in the gRPC profile.
    Degraded,
}

/// One drop category.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DropOverload {
    /// For load reports.
    pub category: Arc<str>,
    /// Share dropped.
    pub percentage: FractionalPercent,
}

impl HealthStatus {
    /// Only HEALTHY and UNKNOWN endpoints are used (gRFC A27).
    pub fn is_usable(self) -> bool {
        matches!(self, Self::Unknown | Self::Healthy)
    }
}

impl Endpoint {
    /// An endpoint of weight 1 and unknown health.
    pub fn new(address: SocketAddr) -> Self {
        Self {
            address,
            weight: 1,
            health: HealthStatus::Unknown,
            hostname: "".into(),
            metadata: None,
            health_check: None,
        }
    }
}

impl ClusterLoadAssignment {
    /// One priority with one locality of these endpoints.
    pub fn of(name: impl Into<Arc<str>>, endpoints: Vec<Endpoint>) -> Self {
        let locality = Locality { id: Arc::default(), weight: 1, endpoints };
        Self { name: name.into(), priorities: vec![vec![locality]], ..Self::default() }
    }
}
