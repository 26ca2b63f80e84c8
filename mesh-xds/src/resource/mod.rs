//! Validated xDS resources: proto -> plain types, one file per xDS type. Protobuf types stop here.

mod cluster;
mod decode;
mod endpoint;
mod kind;
mod listener;
mod matcher;
mod route;

pub use cluster::{
    CertificateProviderRef, CircuitBreakers, Cluster, Discovery, HttpProtocol, LbPolicy, OutlierDetection, RetryBudget,
    TransportSocket, UpstreamTls,
};
pub(crate) use decode::peek_name;
pub use decode::{Decoder, Invalid};
pub use endpoint::{ClusterLoadAssignment, DropOverload, Endpoint, HealthStatus, Locality, LocalityId, MetadataValue};
pub use kind::{Resource, ResourceType};
pub use listener::{
    FaultAbort, FaultConfig, FaultDelay, HttpConnectionManager, HttpFilter, HttpFilterConfig, Listener, RouteSource,
};
pub use matcher::{FractionalPercent, HeaderMatcher, HeaderMatcherKind, SafeRegex, StringMatcher, StringPattern};
pub use route::{
    Action, BackOff, ClusterSpecifier, DomainPattern, FilterOverride, Forward, MaxStreamDuration, PathMatcher, RetryOn,
    RetryPolicy, Route, RouteConfiguration, RouteMatch, VirtualHost, WeightedCluster,
};
