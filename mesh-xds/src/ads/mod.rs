//! The aggregated discovery service, client side: a protocol core without I/O and one task per control plane.

mod transport;

pub use transport::{BoxedIo, Connect, Io, PlaintextConnect, connect_address};
