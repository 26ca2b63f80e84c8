//! The aggregated discovery service, client side: a protocol core without I/O and one task per control plane. The same core speaks
//! SDS to servers that have secrets only.

mod backoff;
mod connection;
mod driver;
mod sotw;
mod state;
mod telemetry;
mod transport;

#[cfg(test)]
mod tests;

/// What is asked of a server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Service {
    /// Everything, on one stream: `AggregatedDiscoveryService`.
    #[default]
    Aggregated,
    /// Secrets: `SecretDiscoveryService`, as SPIRE's agent and Istio's serve it to Envoy.
    Secrets,
}

pub use transport::{BoxedIo, Connect, Io, PlaintextConnect, connect_address};

pub(crate) use backoff::Backoff;
pub(crate) use driver::Driver;
pub(crate) use sotw::{Accepted, Verdict};
pub(crate) use state::Absence;
