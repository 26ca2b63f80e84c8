//! Placeholder.

#[doc(hidden)]
pub mod bench_api;
mod outbound;
mod transport;
