//! HTTP filters of a connection manager, and what routes override of them (gRFC A39).

mod custom;
mod fault;
mod global_rate_limit;
mod header_mutation;
mod local_rate_limit;
mod overload;
mod rate_limit;
mod session;

pub use custom::{CustomFilter, Extensions, FilterParser, FilterPayload};
pub use fault::{FaultAbort, FaultConfig, FaultDelay, FaultRateLimit};
pub use global_rate_limit::{GlobalRateLimitConfig, RateLimitOfRoute};
pub use header_mutation::{HeaderMutation, HeaderMutationConfig, QueryMutation};
pub use local_rate_limit::{LocalDescriptor, LocalRateLimitConfig};
pub use overload::{AdaptiveConcurrencyConfig, AdmissionControlConfig, BufferConfig};
pub use rate_limit::{HeaderField, RateLimit, RateLimitAction, TokenBucket, VirtualHostLimits};
pub use session::{SessionHost, SessionState, StatefulSessionConfig};

use super::{JwtConfig, JwtOfRoute, RbacConfig};
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
    /// `envoy.extensions.filters.http.header_mutation.v3.HeaderMutation`. Those of routes come beside it.
    HeaderMutation(Arc<HeaderMutationConfig>),
    /// `envoy.extensions.filters.http.local_ratelimit.v3.LocalRateLimit`
    LocalRateLimit(Arc<LocalRateLimitConfig>),
    /// `envoy.extensions.filters.http.buffer.v3.Buffer`
    Buffer(BufferConfig),
    /// `envoy.extensions.filters.http.admission_control.v3.AdmissionControl`
    AdmissionControl(Arc<AdmissionControlConfig>),
    /// `envoy.extensions.filters.http.adaptive_concurrency.v3.AdaptiveConcurrency`
    AdaptiveConcurrency(Arc<AdaptiveConcurrencyConfig>),
    /// `envoy.extensions.filters.http.stateful_session.v3.StatefulSession` (gRFC A55)
    StatefulSession(Arc<StatefulSessionConfig>),
    /// `envoy.extensions.filters.http.ratelimit.v3.RateLimit`
    GlobalRateLimit(Arc<GlobalRateLimitConfig>),
    /// What a route says of that.
    GlobalRateLimitOfRoute(Arc<RateLimitOfRoute>),
    /// `envoy.extensions.filters.http.rbac.v3.RBAC` (gRFC A41): of servers only. A route's replaces it, and is off when it is empty.
    Rbac(Arc<RbacConfig>),
    /// `envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`: of servers only.
    Jwt(Arc<JwtConfig>),
    /// What a route says of that.
    JwtOfRoute(JwtOfRoute),
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

impl HttpFilter {
    /// A filter that is on.
    pub fn new(name: impl Into<Arc<str>>, config: HttpFilterConfig) -> Self {
        Self { name: name.into(), config, disabled: false }
    }
}

impl HttpFilterConfig {
    /// Has a meaning in a server only (gRFC A41).
    pub(crate) fn is_of_server(&self) -> bool {
        matches!(self, Self::Rbac(_) | Self::Jwt(_) | Self::JwtOfRoute(_))
    }
}
