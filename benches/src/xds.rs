//! The control plane of a measurement: the workspace's own xDS server, with the resources of [`crate::resource`].

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use mesh_xds::server::{AdsServer, Any, ResourceCache, ResourceType};
use tokio::time::timeout;

use crate::resource;

/// A running control plane.
#[derive(Debug)]
pub struct ControlPlane {
    server: AdsServer,
    cache: ResourceCache,
}

impl ControlPlane {
    /// Starts one on a free port of 127.0.0.1, with endpoints by priority.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub async fn start(priorities: &[&[SocketAddr]]) -> Result<Self> {
        let cache = ResourceCache::new();
        cache.set(resource::all(priorities));
        let server = AdsServer::bind("127.0.0.1:0", cache.clone()).await?;
        Ok(Self { server, cache })
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.server.addr()
    }

    /// Replaces the endpoints, whose encoded form comes from [`encode`]; returns the version they have.
    pub fn set_endpoints(&self, assignment: Any) -> u64 {
        self.cache.update(ResourceType::ClusterLoadAssignment, resource::CLUSTER, assignment);
        self.cache.type_version(ResourceType::ClusterLoadAssignment)
    }

    /// Waits until a client has accepted `version` of the endpoints.
    ///
    /// # Errors
    /// When a client rejected something, or none accepted within ten seconds.
    pub async fn acked(&self, version: u64) -> Result<()> {
        let mut streams = self.cache.streams();
        let accepted = streams.wait_for(|streams| {
            streams.values().any(|stream| {
                stream.types.get(&ResourceType::ClusterLoadAssignment).is_some_and(|status| status.acked >= version)
            })
        });
        timeout(Duration::from_secs(10), accepted).await.context("no client accepted the endpoints")??;
        if let Some(nack) = self.cache.recent_nacks().first() {
            bail!("a client rejected a {}: {}", nack.resource_type, nack.detail);
        }
        Ok(())
    }

    /// Ends it, and its streams.
    pub async fn stop(self) {
        self.server.shutdown().await;
    }
}

/// The endpoints as control planes send them, by priority.
#[must_use]
pub fn encode(priorities: &[&[SocketAddr]]) -> Any {
    resource::any(&resource::assignment(priorities))
}

/// A gRPC bootstrap for the control plane at `address`. `scheme` goes before the address: tonic-xds wants `http://`,
/// others nothing.
#[must_use]
pub fn bootstrap(address: SocketAddr, scheme: &str) -> String {
    serde_json::json!({
        "xds_servers": [{
            "server_uri": format!("{scheme}{address}"),
            "channel_creds": [{"type": "insecure"}],
            "server_features": ["xds_v3"],
        }],
        "node": {"id": "bench", "cluster": "bench", "locality": {"region": "bench", "zone": "z0"}},
    })
    .to_string()
}
