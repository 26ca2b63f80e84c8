//! Placeholder.

mod outbound;
mod transport;
