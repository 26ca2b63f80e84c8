//! What the request path tells: trace context.

pub mod trace;
