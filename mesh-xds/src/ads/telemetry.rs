//! Metrics of one control plane connection (gRFC A78). Handles are made once.

use crate::resource::ResourceType;
use metrics::{Counter, Gauge, counter, gauge};

/// The handles.
pub(super) struct Telemetry {
    connected: Gauge,
    failures: Counter,
    updates: [(ResourceType, Counter, Counter); 5],
}

impl Telemetry {
    pub(super) fn new(server: &str) -> Self {
        let server = server.to_owned();
        let counter_of = |name: &'static str, kind: ResourceType| counter!(name, "grpc.xds.server" => server.clone(), "grpc.xds.resource_type" => kind.type_url());
        Self {
            connected: gauge!("grpc.xds_client.connected", "grpc.xds.server" => server.clone()),
            failures: counter!("grpc.xds_client.server_failure", "grpc.xds.server" => server.clone()),
            updates: ResourceType::ALL.map(|kind| {
                let valid = counter_of("grpc.xds_client.resource_updates_valid", kind);
                (kind, valid, counter_of("grpc.xds_client.resource_updates_invalid", kind))
            }),
        }
    }

    pub(super) fn connected(&self, connected: bool) {
        self.connected.set(if connected { 1.0 } else { 0.0 });
    }

    pub(super) fn failure(&self) {
        self.failures.increment(1);
    }

    pub(super) fn update(&self, kind: ResourceType, valid: bool) {
        if let Some((_, good, bad)) = self.updates.iter().find(|(of, ..)| *of == kind) {
            if valid { good.increment(1) } else { bad.increment(1) }
        }
    }
}
