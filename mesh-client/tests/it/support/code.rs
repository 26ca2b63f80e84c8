//! A mesh without a control plane: the greeter's host is served from code.

use super::TARGET;
use mesh_client::{Mesh, MeshBuilder, MeshChannel, Profile, policy::Policy};
use std::net::SocketAddr;

/// A mesh, and a channel that keeps its clusters alive.
pub(crate) struct Local {
    pub(crate) mesh: Mesh,
    pub(crate) channel: MeshChannel,
}

/// The greeter's target in a mesh that code says all about.
pub(crate) fn host_target() -> String {
    TARGET.replace("xds:", "host:")
}

/// The target for these addresses.
pub(crate) fn fixed(addresses: &[SocketAddr]) -> String {
    let addresses: Vec<_> = addresses.iter().map(ToString::to_string).collect();
    format!("ipv4:{}", addresses.join(","))
}

impl Local {
    /// Requests for the greeter's host go to these addresses.
    pub(crate) async fn new(addresses: &[SocketAddr], policy: Policy) -> Self {
        Self::with(&fixed(addresses), policy, |mesh| mesh).await
    }

    /// Requests for the greeter's host go to this target; both ways have the same rules, gRPC's unless `change` says otherwise, so that
    /// they share clusters.
    pub(crate) async fn with(target: &str, policy: Policy, change: impl FnOnce(MeshBuilder) -> MeshBuilder) -> Self {
        let host = &TARGET["xds:///".len()..];
        let builder = Mesh::builder().profile(Profile::Grpc).host(host, target, policy).unwrap();
        let mesh = change(builder).build().await.unwrap();
        let channel = mesh.channel(&host_target()).unwrap();
        channel.ready(super::GUARD).await.unwrap();
        Self { mesh, channel }
    }

    /// Everything that calls took came back.
    pub(crate) async fn until_idle(&self) {
        super::until("all is given back", async || self.channel.load().is_idle()).await;
    }
}
