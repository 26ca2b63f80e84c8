//! HTTP filters of a connection manager, and what routes override of them (gRFC A39).

mod custom;
mod fault;

pub use custom::{CustomFilter, Extensions, FilterParser, FilterPayload};
pub use fault::{FaultAbort, FaultConfig, FaultDelay, FaultRateLimit};

use std::sync::Arc;

/// One entry of `http_filters`.
#[derive(Clone, Debug, PartialEq)]
pub struct HttpFilter {
    /// Instance name: the key of `typed_per_filter_config`.
    pub name: Arc<str>,
    /// The filter and its validated config.
    pub config: HttpFilterConfig,
    /// Off unless a route turns it on.
    pub disabled: bool,
}

/// The filters this library implements, and those that the application registered. Unknown optional filters are dropped at
/// validation, with a note.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum HttpFilterConfig {
    /// The terminal filter.
    Router,
    /// `envoy.extensions.filters.http.fault.v3.HTTPFault` (gRFC A33).
    Fault(Arc<FaultConfig>),
    /// One of the application's own.
    Custom(CustomFilter),
}

/// An entry of `typed_per_filter_config`.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterOverride {
    /// `FilterConfig.disabled`.
    pub disabled: bool,
    /// Instead of the filter's own config, or beside it where the filter says so; `None` keeps it.
    pub config: Option<HttpFilterConfig>,
}
