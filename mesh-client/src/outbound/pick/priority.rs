//! Priorities (gRFC A56 in spirit): the first that has an available endpoint takes all requests.
//!
//! gRPC connects to every endpoint, so it has to wait, with a failover timer of 10 s, until it knows whether a priority
//! works. Here an endpoint counts as available until it is ejected or fails to connect, which `connect_timeout` bounds, and a
//! higher priority is back in use as soon as one of its endpoints is. Envoy's gradual spill-over by overprovisioning
//! factor is not applied (gRFC A27).

use super::{Candidate, Group};
use std::sync::Arc;

/// The priority in force, and whether it is so in panic. `None`: no endpoint takes connections.
pub(super) fn in_force<C: Candidate>(priorities: &[Vec<Arc<Group<C>>>]) -> Option<(usize, bool)> {
    [false, true].into_iter().find_map(|panic| {
        let available = |groups: &Vec<Arc<Group<C>>>| groups.iter().any(|group| group.is_available(panic));
        priorities.iter().position(available).map(|priority| (priority, panic))
    })
}
