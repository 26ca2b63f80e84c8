//! Filters that routes configure, in chain order (gRFC A39).
//!
//! Compiled once per configuration into a [`Chain`] for each cluster of a route; a route without filters has none and costs nothing.

mod body;
mod chain;
mod compile;
mod custom;
mod fault;
mod hook;
mod reply;

pub(crate) use body::Filtered;
pub(crate) use chain::{Chain, Watching};
pub(crate) use compile::{Filters, Making};
pub(crate) use custom::Parser;
pub use custom::{FilterFactory, filter};
pub(crate) use fault::ActiveFaults;
pub(crate) use hook::Place;
pub use hook::{Ended, Filter, FilterRequest, FilterResponse, Outcome, Step, Verdict, Watch};
pub use reply::Reply;
