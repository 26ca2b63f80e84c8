//! Validated xDS resources: proto -> plain types, one file per xDS type. Protobuf types stop here.

mod action;
mod cidr;
mod cluster;
mod connection;
mod decode;
mod dns;
mod edit;
mod endpoint;
mod filter;
mod format;
mod health_check;
mod jwt;
mod kind;
mod lb;
mod listener;
mod matcher;
mod metadata;
mod outlier;
mod rbac;
mod route;
mod secret;
mod server_listener;
mod template;
mod tls;

pub use action::{
    Action, ClusterSpecifier, DirectResponse, Forward, Hedge, HostRewrite, MaxStreamDuration, Mirror, MirrorCluster,
    MirrorHost, PathRewrite, Redirect, RedirectPath, WeightedCluster,
};
pub use cidr::{CidrRange, PrefixTooLong};
pub use cluster::{CircuitBreakers, Cluster, Discovery, HttpProtocol, RetryBudget, RoutingPriority, Thresholds};
pub use connection::{ConnectionOptions, Http2Keepalive, TcpKeepalive};
pub(crate) use decode::peek_name;
pub use decode::{Decoder, Invalid};
pub use dns::{DnsDiscovery, DnsRefresh, LookupFamily};
pub use edit::{AppendAction, HeaderAdd, HeaderEdits, HeaderOps};
pub use endpoint::{ClusterLoadAssignment, DropOverload, Endpoint, HealthStatus, Locality, LocalityId, MetadataValue};
pub use filter::{
    AdaptiveConcurrencyConfig, AdmissionControlConfig, BufferConfig, CustomFilter, Extensions, FaultAbort, FaultConfig,
    FaultDelay, FaultRateLimit, FilterOverride, FilterParser, FilterPayload, GlobalRateLimitConfig, HeaderField,
    HeaderMutation, HeaderMutationConfig, HttpFilter, HttpFilterConfig, LocalDescriptor, LocalRateLimitConfig,
    QueryMutation, RateLimit, RateLimitAction, RateLimitOfRoute, SessionHost, SessionState, StatefulSessionConfig,
    TokenBucket, VirtualHostLimits,
};
pub use format::{Field, FieldName, Format, FormatPart, TimePart};
pub use health_check::{
    EndpointHealthCheck, GrpcHealthCheck, HealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck,
};
pub use jwt::{
    JwksSource, JwtClaimToHeader, JwtConfig, JwtHeader, JwtOfRoute, JwtProvider, JwtRequirement, JwtRule,
    JwtTokenCache, RemoteJwks,
};
pub use kind::{Resource, ResourceType};
pub use lb::{
    ConsistentHashing, CookieHash, CustomLb, HashFunction, HashPolicy, HashSource, HealthStatuses, LbPolicy,
    LbSettings, LocalityLb, Maglev, PeakEwma, RingHash, SlowStart, SubsetConfig, SubsetFallback, SubsetSelector,
    WeightedRoundRobin,
};
pub(crate) use lb::{MAX_RING, MAX_TABLE, is_prime};
pub use listener::{HttpConnectionManager, Listener, RouteSource, Tracing};
pub use matcher::{
    CookieMatcher, Denominator, FractionalPercent, HeaderMatcher, HeaderMatcherKind, QueryParameterMatcher,
    QueryParameterMatcherKind, RegexRewrite, SafeRegex, StringMatcher, StringPattern,
};
pub use metadata::{FilterStateMatch, FilterStateMatcher, MetadataMatcher, Value, ValueMatcher};
pub use outlier::{FailureAccrual, OutlierDetection};
pub use rbac::{
    AuditLoggerConfig, AuditLoggerParser, AuditLogging, PeerName, Permission, Principal, RbacAction, RbacConfig,
    RbacPolicy, RbacRules,
};
pub use route::{
    AttemptCount, BackOff, DomainPattern, OmitHosts, PathMatcher, ResetFormat, ResetHeader, RetryOn, RetryPolicy,
    Route, RouteConfiguration, RouteMatch, TlsContextMatch, VirtualHost,
};
pub use secret::{DataSource, RootSource, Secret, SecretKind, TlsCertificate, TrustedCa};
pub use server_listener::{
    ClientCertDetails, FilterChain, FilterChainMatch, ForwardClientCert, ServerConnections, ServerListener, ServerName,
    SourceType, TransportProtocol,
};
pub use template::{PathTemplate, TemplateRewrite};
pub use tls::{
    CertificateProviderRef, Credential, DownstreamTls, SanKind, SanMatch, SdsOrigin, SdsRef, TransportSocket,
    TransportSocketMatch, UpstreamTls,
};
