//! What the request path tells: explain, metrics, trace context.

pub mod access_log;
pub(crate) mod explain;
pub(crate) mod messages;
pub(crate) mod metrics;
pub(crate) mod spans;
pub mod trace;
pub(crate) mod watch;
