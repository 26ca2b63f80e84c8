//! xDS server machinery: a versioned [`ResourceCache`], a sans-IO session per ADS stream, and an [`AdsServer`] on HTTP/2.
//!
//! ```no_run
//! # async fn run() -> std::io::Result<()> {
//! use mesh_xds::server::{AdsServer, ResourceCache, ResourceSet};
//!
//! let cache = ResourceCache::new();
//! let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await?;
//! println!("serving on {}", server.addr());
//! cache.set(ResourceSet::new());
//! server.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod ads;
mod cache;
mod session;
mod status;

pub use ads::{AdsServer, ServerOptions, serve};
pub use cache::{ResourceCache, ResourceSet};
pub use envoy_types::pb::google::protobuf::Any;
pub use status::{Nack, StreamStatus, TypeStatus};

use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster, endpoint::v3::ClusterLoadAssignment, listener::v3::Listener, route::v3::RouteConfiguration,
};
use prost::Name;
use std::fmt;

/// The four resource types that the server knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceType {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoint,
    /// LDS.
    Listener,
    /// RDS.
    Route,
}

impl ResourceType {
    /// All types, in the order in which a change is pushed: make before break.
    pub const PUSH_ORDER: [Self; 4] = [Self::Cluster, Self::Endpoint, Self::Listener, Self::Route];

    /// `type.googleapis.com/envoy.config...`
    pub fn type_url(self) -> String {
        match self {
            Self::Cluster => Cluster::type_url(),
            Self::Endpoint => ClusterLoadAssignment::type_url(),
            Self::Listener => Listener::type_url(),
            Self::Route => RouteConfiguration::type_url(),
        }
    }

    /// The type of this URL, if it is one of the four.
    pub fn from_type_url(url: &str) -> Option<Self> {
        let name = url.strip_prefix("type.googleapis.com/")?;
        Self::PUSH_ORDER.into_iter().find(|t| t.type_url().strip_prefix("type.googleapis.com/") == Some(name))
    }

    /// Whether a response carries the state of the world (LDS and CDS): what is missing from it does not exist.
    pub(crate) fn is_state_of_the_world(self) -> bool {
        matches!(self, Self::Cluster | Self::Listener)
    }
}

impl fmt::Display for ResourceType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cluster => "Cluster",
            Self::Endpoint => "ClusterLoadAssignment",
            Self::Listener => "Listener",
            Self::Route => "RouteConfiguration",
        })
    }
}
