//! What is in flight to the clusters of a channel.

use super::{LiveCluster, Resource};
use mesh_xds::resource::RoutingPriority;
use std::ops::AddAssign;

/// What a channel has in use at one moment, over all clusters of its configuration. Everything but `connections` is zero when no
/// call and no response body is alive.
///
/// Clusters are shared by the channels of one mesh (gRFC A32): what other channels have in flight to the same clusters is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChannelLoad {
    /// Calls, from the routing decision to the end of the response body: what `max_requests` limits.
    pub requests: u32,
    /// Calls that wait for a connection: what `max_pending_requests` limits.
    pub pending: u32,
    /// Retries in flight: what the retry budget limits.
    pub retries: u32,
    /// Attempts counted at their endpoint: what least-request balancing compares.
    pub attempts: u32,
    /// Streams open on connections that take new ones.
    pub streams: u32,
    /// Connections open or being opened: what `max_connections` limits.
    pub connections: u32,
}

impl ChannelLoad {
    /// Whether no call is in flight. Connections may be open.
    pub fn is_idle(&self) -> bool {
        *self == Self { connections: self.connections, ..Self::default() }
    }
}

impl AddAssign for ChannelLoad {
    fn add_assign(&mut self, other: Self) {
        self.requests += other.requests;
        self.pending += other.pending;
        self.retries += other.retries;
        self.attempts += other.attempts;
        self.streams += other.streams;
        self.connections += other.connections;
    }
}

impl LiveCluster {
    /// What is in use now. Costs a pass over all endpoints.
    pub(crate) fn load(&self) -> ChannelLoad {
        let mut load = ChannelLoad {
            requests: self.breaker.total(Resource::Requests),
            pending: self.breaker.total(Resource::PendingRequests),
            connections: self.breaker.total(Resource::Connections),
            retries: RoutingPriority::ALL.map(|priority| self.budget(priority).in_flight()).iter().sum(),
            ..ChannelLoad::default()
        };
        for endpoint in self.writer().set.all() {
            load.attempts += endpoint.in_flight();
            load.streams += endpoint.opened().map_or(0, |link| link.in_flight());
        }
        load
    }
}
