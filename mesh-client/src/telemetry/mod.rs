//! What the request path tells: explain, metrics, trace context.

pub(crate) mod explain;
pub(crate) mod metrics;
pub mod trace;
