//! The config path of mesh: bootstrap -> ads -> resource -> graph -> snapshot -> publish.
//!
//! An [`XdsClient`] speaks the aggregated discovery service to the control plane named by a
//! [`Bootstrap`], validates every resource by itself, and publishes one complete, immutable
//! [`Snapshot`] per watched target. Protobuf types stop at [`resource`]: nothing below this crate sees them.

pub mod ads;
pub mod bootstrap;
mod client;
mod graph;
pub mod lint;
pub mod resource;
pub mod rls;
#[cfg(feature = "server")]
pub mod server;
pub mod snapshot;
pub mod source;
pub mod status;
mod watch;

pub use bootstrap::Bootstrap;
pub use client::{ClientOptions, XdsClient};
pub use snapshot::{ServerSnapshot, Snapshot};
pub use watch::{Closed, SecretWatch, ServerWatch, TargetWatch, Watch};
