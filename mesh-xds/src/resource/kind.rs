//! The resource types of the config path, and a validated resource of any of them.

use super::{Cluster, ClusterLoadAssignment, Decoder, Invalid, Listener, RouteConfiguration, Secret, ServerListener};
use std::{fmt, sync::Arc};

/// A type of xDS resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// LDS.
    Listener,
    /// RDS.
    RouteConfiguration,
    /// CDS.
    Cluster,
    /// EDS.
    ClusterLoadAssignment,
    /// SDS.
    Secret,
}

/// A validated resource.
#[derive(Clone, Debug, PartialEq)]
pub enum Resource {
    /// LDS, for clients.
    Listener(Arc<Listener>),
    /// LDS, for servers.
    ServerListener(Arc<ServerListener>),
    /// RDS.
    RouteConfiguration(Arc<RouteConfiguration>),
    /// CDS.
    Cluster(Arc<Cluster>),
    /// EDS.
    ClusterLoadAssignment(Arc<ClusterLoadAssignment>),
    /// SDS.
    Secret(Arc<Secret>),
}

impl ResourceType {
    /// In the order of dependency.
    pub const ALL: [Self; 5] =
        [Self::Listener, Self::RouteConfiguration, Self::Cluster, Self::ClusterLoadAssignment, Self::Secret];

    /// `type.googleapis.com/...`
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::RouteConfiguration => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::ClusterLoadAssignment => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// The type of a type URL.
    pub fn from_type_url(url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == url)
    }

    /// `lds`, `rds`, `cds`, `eds`.
    pub fn short(self) -> &'static str {
        match self {
            Self::Listener => "lds",
            Self::RouteConfiguration => "rds",
            Self::Cluster => "cds",
            Self::ClusterLoadAssignment => "eds",
            Self::Secret => "sds",
        }
    }

    /// Whether one response holds all resources of the type, so that an absent one does not exist (LDS and CDS).
    pub(crate) fn is_full_state(self) -> bool {
        matches!(self, Self::Listener | Self::Cluster)
    }
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Listener => "Listener",
            Self::RouteConfiguration => "RouteConfiguration",
            Self::Cluster => "Cluster",
            Self::ClusterLoadAssignment => "ClusterLoadAssignment",
            Self::Secret => "Secret",
        })
    }
}

impl Resource {
    /// Decodes and validates a serialized resource.
    ///
    /// # Errors
    /// A field is missing, wrong or not supported.
    pub fn decode(kind: ResourceType, bytes: &[u8], cx: &mut Decoder<'_>) -> Result<Self, Invalid> {
        Ok(match kind {
            ResourceType::Listener => cx.listener(bytes)?,
            ResourceType::RouteConfiguration => {
                Self::RouteConfiguration(Arc::new(RouteConfiguration::decode(bytes, cx)?))
            }
            ResourceType::Cluster => Self::Cluster(Arc::new(Cluster::decode(bytes, cx)?)),
            ResourceType::ClusterLoadAssignment => {
                Self::ClusterLoadAssignment(Arc::new(ClusterLoadAssignment::decode(bytes, cx)?))
            }
            ResourceType::Secret => Self::Secret(Arc::new(Secret::decode(bytes, cx)?)),
        })
    }

    /// Its name.
    pub fn name(&self) -> &Arc<str> {
        match self {
            Self::Listener(listener) => &listener.name,
            Self::ServerListener(listener) => &listener.name,
            Self::RouteConfiguration(routes) => &routes.name,
            Self::Cluster(cluster) => &cluster.name,
            Self::ClusterLoadAssignment(endpoints) => &endpoints.name,
            Self::Secret(secret) => &secret.name,
        }
    }
}
