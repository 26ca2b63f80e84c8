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

pub use crate::resource::ResourceType;
pub use ads::{AdsServer, ServerOptions, serve, serve_connection, serve_connection_with};
pub use cache::{ResourceCache, ResourceSet, Tailor};
pub use envoy_types::pb::{envoy::config::core::v3::Node, google::protobuf::Any};
pub use status::{Nack, StreamStatus, TypeStatus};

/// All types, in the order in which a change is pushed: make before break.
pub(crate) const PUSH_ORDER: [ResourceType; 5] = [
    ResourceType::Secret,
    ResourceType::Cluster,
    ResourceType::ClusterLoadAssignment,
    ResourceType::Listener,
    ResourceType::RouteConfiguration,
];
