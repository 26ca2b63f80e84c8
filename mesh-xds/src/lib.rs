//! The config path of mesh: bootstrap -> ads -> resource -> graph -> snapshot -> publish.
//!
//! An [`XdsClient`] speaks the aggregated discovery service to the control plane named by a
//! [`Bootstrap`], validates every resource by itself, and publishes one complete, immutable
//! [`Snapshot`] per watched target. Protobuf types stop at [`resource`]: nothing below this crate sees them.

pub mod resource;
pub mod snapshot;

pub use snapshot::Snapshot;
