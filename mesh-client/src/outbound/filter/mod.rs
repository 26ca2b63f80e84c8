//! Filters that routes configure, in chain order.

mod fault;

pub(crate) use fault::{ActiveFaults, Fault, FaultAbortStatus};
