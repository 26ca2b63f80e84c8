//! Where certificates come from.

mod expiry;
mod file;
#[cfg(feature = "grpc")]
mod grpc;
mod jwt;
mod memory;
mod shelf;

pub use file::{FileSource, FileSourceConfig};
#[cfg(feature = "grpc")]
pub use grpc::{
    CaAuth, CaTls, EndpointError, IstioCaConfig, IstioCaSource, JwtToken, SvidChoice, WorkloadApiConfig,
    WorkloadApiSource, WorkloadEndpoint,
};
pub use jwt::JwtBundles;
pub use memory::MemorySource;

use crate::Material;
use std::{fmt, sync::Arc};
use tokio::sync::watch;

/// Where certificates come from: one immutable generation at a time.
///
/// An implementation makes the new material visible through [`Source::current`] before it announces the generation, and
/// raises [`Material::generation`] with every change. What it once held it keeps until it has something newer.
pub trait Source: Send + Sync + fmt::Debug + 'static {
    /// The name in messages and metrics.
    fn name(&self) -> &str;

    /// The newest material. Cheap: called once or twice for each handshake.
    fn current(&self) -> Arc<Material>;

    /// Follows the generation of the material.
    fn changed(&self) -> watch::Receiver<u64>;

    /// Why the newest material is not newer, or missing: the last attempt's error.
    fn last_error(&self) -> Option<String> {
        None
    }
}

/// Waits until the source has something, and returns it; for ever, if it never has. Not needed before handshakes, which
/// fail with the source's last error as long as it has nothing.
pub async fn ready(source: &dyn Source) -> Arc<Material> {
    let mut changed = source.changed();
    loop {
        let material = source.current();
        if material.generation > 0 {
            return material;
        }
        if changed.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}
