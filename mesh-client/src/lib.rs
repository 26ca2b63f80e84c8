//! The request path of mesh: an embeddable, proxyless service mesh for tonic and hyper clients.
//!
//! A [`Mesh`] joins one process to a mesh: it learns from an xDS control plane (or from DNS, or a fixed list) where services are and how
//! requests to them are treated, and applies that in process, with no sidecar.
//!
//! - [`Mesh::channel`] gives a [`MeshChannel`]: the `T` of any generated tonic client.
//! - [`Mesh::layer`] wraps any hyper client: hosts the mesh knows are routed, all others go to the inner client untouched.
//! - [`retry::RetryLayer`], [`retry::HedgeLayer`], [`timeout::TimeoutLayer`], [`circuit_breaker::CircuitBreakerLayer`],
//!   [`balance::LoadBalanceLayer`], [`filter::RateLimitLayer`], [`filter::FaultLayer`] and [`trace::TracePropagationLayer`] are the same parts
//!   as plain tower layers.
//!
//! ```no_run
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let mesh = mesh_client::Mesh::from_env().await?;
//! let channel = mesh.channel("xds:///greeter.default.svc.cluster.local:50051")?;
//! // let mut greeter = GreeterClient::new(channel);
//! # Ok(()) }
//! ```

mod atomic;
#[doc(hidden)]
pub mod bare;
#[doc(hidden)]
pub mod bench_api;
mod body;
mod channel;
mod downstream;
mod error;
#[doc(hidden)]
pub mod fuzz_api;
mod headers;
pub mod inbound;
mod layer;
mod mesh;
mod outbound;
mod task;
mod telemetry;
mod time;
mod transport;

pub use body::MeshBody;
pub use channel::{MeshChannel, ResponseFuture};
pub use downstream::Downstream;
pub use error::{BoxError, Error};
pub use inbound::{ConnectionInfo, Inbound};
pub use layer::{LayerBody, LayerFuture, MeshLayer, MeshService};
pub use mesh::{BuildError, Mesh, MeshBuilder};
pub use mesh_xds::resource::Value;
pub use outbound::{Profile, cluster::ChannelLoad, connect::TlsRenewal, resolve::TargetError};
pub use telemetry::{
    access_log,
    explain::{Explain, Explanation, Step},
    trace,
};
pub use transport::Keepalive;

/// What a server's connections are secured with, and who its callers are: [`InboundBuilder::tls`](inbound::InboundBuilder::tls).
pub mod tls {
    pub use mesh_tls::{
        Acceptor, ClientAuth, Identity, JwtBundles, MemorySource, Mode, PeerCheck, PeerIdentity, Roots, SanMatcher,
        ServerSettings, Source, SpiffeId, TlsError, TlsVersion, TlsVersions, TrustRoots, default_provider,
    };
}

/// What targets without a control plane do with requests, from code: [`MeshBuilder::policy`]. The types are those that xDS decodes to.
pub mod policy {
    pub use mesh_xds::{
        resource::{
            Action, AppendAction, BackOff, CircuitBreakers, Cluster, ClusterLoadAssignment, ClusterSpecifier,
            ConnectionOptions, ConsistentHashing, CookieHash, CookieMatcher, CustomLb, DirectResponse, Discovery,
            DnsDiscovery, DnsRefresh, DropOverload, Endpoint, EndpointHealthCheck, FailureAccrual, FilterOverride,
            FilterStateMatch, FilterStateMatcher, Format, Forward, GrpcHealthCheck, HashFunction, HashPolicy,
            HashSource, HeaderAdd, HeaderEdits, HeaderMatcher, HeaderMatcherKind, HeaderOps, HealthCheck,
            HealthChecker, HealthStatus, HealthStatuses, Hedge, HostRewrite, Http2Keepalive, HttpHealthCheck,
            HttpProtocol, LbPolicy, LbSettings, Locality, LocalityId, LocalityLb, LookupFamily, Maglev,
            MaxStreamDuration, MetadataMatcher, MetadataValue, Mirror, MirrorCluster, MirrorHost, OmitHosts,
            OutlierDetection, PathMatcher, PathRewrite, PathTemplate, PeakEwma, QueryParameterMatcher,
            QueryParameterMatcherKind, RateLimit, RateLimitAction, Redirect, RedirectPath, RegexRewrite, ResetFormat,
            ResetHeader, RetryBudget, RetryOn, RetryPolicy, RingHash, Route, RouteMatch, RoutingPriority, SafeRegex,
            SlowStart, StringMatcher, StringPattern, SubsetConfig, SubsetFallback, SubsetSelector, TcpHealthCheck,
            TcpKeepalive, TemplateRewrite, Thresholds, TlsContextMatch, TransportSocket, TransportSocketMatch,
            UpstreamTls, ValueMatcher, WeightedCluster, WeightedRoundRobin,
        },
        source::{Policy, PolicyError, route},
    };
}

/// Byte streams of the application's own under all connections: [`MeshBuilder::dial`].
pub mod dial {
    pub use crate::outbound::connect::Dial;
    pub use mesh_xds::{
        ads::{BoxedIo, Io},
        bootstrap::ServerAddress,
    };
}

/// What is measured of requests beyond what always is: [`MeshBuilder::metrics`].
pub mod metrics {
    pub use crate::telemetry::metrics::{AttemptLabel, Instrument, Metrics};
}

/// Filters that routes configure, and your own ([`MeshBuilder::filter`]); as layers for any client: [`RateLimitLayer`](filter::RateLimitLayer),
/// [`FaultLayer`](filter::FaultLayer).
pub mod filter {
    pub use crate::outbound::filter::{
        Ended, FaultLayer, Filter, FilterBody, FilterFactory, FilterLayer, FilterRequest, FilterResponse,
        FilterService, Outcome, RateLimitLayer, Reply, ResponseFuture, Step, Verdict, Watch, filter,
    };
    pub use mesh_xds::resource::{
        AdaptiveConcurrencyConfig, AdmissionControlConfig, BufferConfig, Denominator, FaultAbort, FaultConfig,
        FaultDelay, FaultRateLimit, FilterPayload, FractionalPercent, GlobalRateLimitConfig, HeaderField,
        HeaderMutation, HeaderMutationConfig, HttpFilter, HttpFilterConfig, LocalDescriptor, LocalRateLimitConfig,
        QueryMutation, RateLimitOfRoute, SessionState, StatefulSessionConfig, TokenBucket, VirtualHostLimits,
    };
}

/// Load balancing over services, for any client: [`LoadBalanceLayer`](balance::LoadBalanceLayer); and policies of the program's own:
/// [`MeshBuilder::lb_policy`].
pub mod balance {
    pub use crate::outbound::pick::{
        Balance, Change, Discover, EndpointInfo, EndpointPicker, Endpoints, LbPolicyFactory, LoadBalanceLayer,
        NoServices, PickRequest, RequestHash, ResponseBody, ResponseFuture, ServiceList,
    };
    pub use mesh_xds::resource::{LbPolicy, OutlierDetection};
}

/// Where certificates come from, beside the sources of `mesh_tls`.
pub mod identity {
    pub use crate::outbound::identity::{SdsConfig, SdsSource};
    pub use mesh_xds::bootstrap::{BootstrapError, CallCreds, ChannelCreds, Node, ServerConfig, TlsCreds};
}

/// Retries, for any client: [`RetryLayer`](retry::RetryLayer).
pub mod retry {
    pub use crate::outbound::retry::{
        Condition, DEFAULT_REPLAY_CAP, Hedge, HedgeBody, HedgeFuture, HedgeLayer, Hook, HookOutcome, HookVerdict,
        PerTryElapsed, Permit, Policy, PolicyBuilder, ReplayBody, ReplayError, ResponseFuture, Retry, RetryBudget,
        RetryLayer,
    };
    pub use mesh_xds::resource::{ResetFormat, ResetHeader};
}

/// Circuit breaking, for any client: [`CircuitBreakerLayer`](circuit_breaker::CircuitBreakerLayer).
pub mod circuit_breaker {
    pub use crate::outbound::cluster::{
        CircuitBreaker, CircuitBreakerLayer, Limits, Overloaded, ResponseBody, ResponseFuture,
    };
}

/// Deadlines, for any client: [`TimeoutLayer`](timeout::TimeoutLayer).
pub mod timeout {
    pub use crate::outbound::timeout::{
        Elapsed, HeadersFuture, HeadersTimeout, HeadersTimeoutLayer, RequestBody, ResponseBody, ResponseFuture,
        Timeout, TimeoutLayer,
    };
}
