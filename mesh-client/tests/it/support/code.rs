//! A mesh without a control plane: the greeter's host is served from code.

use super::TARGET;
use mesh_client::{Mesh, MeshChannel, Profile, policy::Policy};
use std::net::SocketAddr;

/// A mesh and a channel that keeps its clusters alive.
pub(crate) struct Code {
    pub(crate) mesh: Mesh,
    _channel: MeshChannel,
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

impl Code {
    /// Requests for the greeter's host go to this target.
    pub(crate) async fn of(target: &str, policy: Policy, profile: Profile) -> Self {
        let host = &TARGET["xds:///".len()..];
        let builder = Mesh::builder().profile(profile).host(host, target, policy).unwrap();
        let mesh = builder.build().await.unwrap();
        let channel = mesh.channel(&host_target()).unwrap();
        channel.ready(super::GUARD).await.unwrap();
        Self { mesh, _channel: channel }
    }
}
