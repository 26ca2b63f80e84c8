//! The aggregated discovery service, client side: a protocol core without I/O and one task per control plane.

mod backoff;
mod connection;
mod driver;
mod sotw;
mod state;
mod telemetry;
mod transport;

#[cfg(test)]
mod tests;

pub use transport::{BoxedIo, Connect, Io, PlaintextConnect, connect_address};

pub(crate) use backoff::Backoff;
pub(crate) use driver::Driver;
pub(crate) use sotw::{Accepted, Verdict};
pub(crate) use state::Absence;
