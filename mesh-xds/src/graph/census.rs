//! How many resources there are of each kind and state: `grpc.xds_client.resources` (gRFC A78).

use crate::{bootstrap::authority_of, resource::ResourceType};
use metrics::{Gauge, gauge};
use std::fmt;

/// One resource, counted by its state as long as this lives.
#[derive(Default)]
pub(super) struct Counted(Option<(&'static str, Gauge)>);

impl Counted {
    /// It is in this state now.
    pub(super) fn is(&mut self, kind: ResourceType, name: &str, state: &'static str) {
        if self.0.as_ref().is_some_and(|(before, _)| *before == state) {
            return;
        }
        let gauge = gauge!(
            "grpc.xds_client.resources",
            "grpc.xds.authority" => authority_of(name).unwrap_or("#old").to_owned(),
            "grpc.xds.cache_state" => state,
            "grpc.xds.resource_type" => kind.type_url()
        );
        gauge.increment(1.0);
        self.leave();
        self.0 = Some((state, gauge));
    }

    fn leave(&mut self) {
        if let Some((_, gauge)) = self.0.take() {
            gauge.decrement(1.0);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.leave();
    }
}

impl fmt::Debug for Counted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_ref().map_or("-", |(state, _)| state))
    }
}
