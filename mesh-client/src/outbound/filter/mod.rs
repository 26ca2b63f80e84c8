//! Filters that routes configure, in chain order (gRFC A39).
//!
//! Compiled once per configuration into a [`Chain`] for each cluster of a route; a route without filters has none and costs nothing.

mod admission;
mod body;
mod bucket;
mod buffer;
mod chain;
mod compile;
mod concurrency;
mod custom;
mod descriptor;
mod fault;
mod global_rate_limit;
mod header_mutation;
mod hook;
mod layer;
mod local_rate_limit;
mod reply;
mod service;
mod session;

pub(crate) use body::Filtered;
pub(crate) use buffer::Buffered;
pub(crate) use chain::{Chain, Watching};
pub(crate) use compile::{Filters, Making};
pub(crate) use custom::Parser;
pub use custom::{FilterFactory, filter};
pub(crate) use descriptor::Limits;
pub(crate) use fault::ActiveFaults;
use fault::Fault;
pub use hook::{Ended, Filter, FilterRequest, FilterResponse, Outcome, Step, Verdict, Watch};
pub(crate) use hook::{Found, Place};
pub use layer::{FaultLayer, FilterBody, FilterLayer, FilterService, RateLimitLayer, ResponseFuture};
use local_rate_limit::LocalRateLimit;
pub use reply::Reply;
pub(crate) use service::Surroundings;

use crate::outbound::route::Facts;
use mesh_xds::resource::FractionalPercent;
use std::time::SystemTime;

/// Whether this request is one of that share.
fn draw(share: FractionalPercent) -> bool {
    share == FractionalPercent::HUNDRED || share.admits(fastrand::u32(..FractionalPercent::HUNDRED.0))
}

/// What a filter knows for the `%VARS%` of header edits, without the request.
fn plain_facts<'c>(request: &FilterRequest<'c>) -> Facts<'c> {
    Facts {
        request: None,
        response: None,
        version: request.head().version,
        endpoint: None,
        cluster: request.place.cluster,
        route: request.place.route,
        start: SystemTime::now(),
    }
}
