//! What a route does: forward, redirect, or answer at once.

use super::{
    FilterOverride, Format, FractionalPercent, HashPolicy, HeaderEdits, MetadataValue, PathTemplate, RateLimit,
    RegexRewrite, RetryPolicy, RoutingPriority, TemplateRewrite,
};
use bytes::Bytes;
use http::HeaderName;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// What a matching route does.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Forward to a cluster.
    Forward(Arc<Forward>),
    /// Answer with another place to go to.
    Redirect(Arc<Redirect>),
    /// Answer at once.
    Direct(Arc<DirectResponse>),
    /// A server answers the request by itself (gRFC A36). On clients the route matches and the request fails UNAVAILABLE (gRFC A28).
    NonForwarding,
    /// The route matches and the request fails UNAVAILABLE with this reason.
    Unsupported(Arc<str>),
}

/// `RouteAction`.
#[derive(Clone, Debug, PartialEq)]
pub struct Forward {
    /// Where to.
    pub cluster: ClusterSpecifier,
    /// `timeout`: `None` when unset (Envoy: 15 s), zero disables. Ignored in the gRPC profile (gRFC A31).
    pub timeout: Option<Duration>,
    /// gRFC A31.
    pub max_stream_duration: MaxStreamDuration,
    /// Replaces the virtual host's policy entirely.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// What policies that hash requests take for their hash, in order; combined (gRFC A42).
    pub hash_policies: Arc<[HashPolicy]>,
    /// `metadata_match.filter_metadata["envoy.lb"]`: which endpoints may be chosen.
    pub metadata_match: Option<Arc<BTreeMap<String, MetadataValue>>>,
    /// What the path becomes.
    pub path_rewrite: Option<PathRewrite>,
    /// What the authority becomes. A weighted cluster's own wins.
    pub host_rewrite: Option<HostRewrite>,
    /// A rewrite of the authority keeps the original one in `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// Descriptors for the rate limit filters.
    pub rate_limits: Vec<RateLimit>,
    /// Those of the virtual host count beside them (`include_vh_rate_limits`).
    pub include_vh_rate_limits: bool,
    /// Who gets copies of the requests: the route's policies, else the virtual host's, else the configuration's.
    pub mirrors: Arc<[Mirror]>,
    /// `idle_timeout`: a stream on which nothing moves for so long is ended. `None` when unset, zero disables. Not gRPC's.
    pub idle_timeout: Option<Duration>,
    /// Whose circuit breakers count its requests.
    pub priority: RoutingPriority,
    /// When a second request is sent while the first is on its way. Needs a retry policy, which limits it.
    pub hedge: Option<Hedge>,
    /// `cluster_not_found_response_code`: the HTTP status of requests whose cluster is not known; 503, 404 or 500.
    pub cluster_not_found: u16,
}

/// When a request is sent once more although an earlier one may still be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hedge {
    /// When the attempt's own limit passes, instead of giving it up (Envoy's `hedge_on_per_try_timeout`).
    PerTryTimeout,
    /// After each such time without an answer (gRFC A6 `hedgingDelay`).
    After(Duration),
}

/// `RequestMirrorPolicy`: copies of requests, whose responses are thrown away.
#[derive(Clone, Debug, PartialEq)]
pub struct Mirror {
    /// Where to.
    pub cluster: MirrorCluster,
    /// Share of the requests; `None` is all.
    pub fraction: Option<FractionalPercent>,
    /// Whether the copy's trace is recorded; `None`: as that of the request.
    pub trace_sampled: Option<bool>,
    /// The authority of the copy.
    pub host: MirrorHost,
}

/// Where copies go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorCluster {
    /// A cluster's name.
    Name(Arc<str>),
    /// The request header that holds the name of a cluster; one that the virtual host names somewhere.
    Header(HeaderName),
}

/// The authority of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MirrorHost {
    /// That of the request, with `-shadow` behind the host name.
    Shadow,
    /// That of the request (`disable_shadow_host_suffix_append`).
    Same,
    /// This one (`host_rewrite_literal`).
    Literal(Arc<str>),
}

/// `max_stream_duration`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MaxStreamDuration {
    /// Zero is no limit.
    pub max_stream_duration: Option<Duration>,
    /// Wins over the other when set, zero is no limit.
    pub grpc_timeout_header_max: Option<Duration>,
    /// Taken off the caller's `grpc-timeout` in the Envoy profile, unless nothing would be left.
    pub grpc_timeout_header_offset: Option<Duration>,
}

/// One cluster, a weighted set, or what the request says.
#[derive(Clone, Debug, PartialEq)]
pub enum ClusterSpecifier {
    /// A cluster's name.
    Cluster(Arc<str>),
    /// Weights are positive; their sum fits u32.
    Weighted(Vec<WeightedCluster>),
    /// The request header that holds the name of a cluster; one that the virtual host names somewhere.
    Header(HeaderName),
}

/// One part of a weighted split.
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedCluster {
    /// The cluster; empty where a header names it.
    pub name: Arc<str>,
    /// `cluster_header`: the request header that holds the name of the cluster; one that the virtual host names somewhere.
    pub header: Option<HeaderName>,
    /// Greater than zero.
    pub weight: u32,
    /// `metadata_match`: added to the route's, key by key; its own win.
    pub metadata_match: Option<Arc<BTreeMap<String, MetadataValue>>>,
    /// `typed_per_filter_config`: beats the route's and the virtual host's.
    pub filter_overrides: BTreeMap<Arc<str>, FilterOverride>,
    /// Header edits: the most specific level.
    pub edits: HeaderEdits,
    /// `host_rewrite_literal`: wins over the route's.
    pub host_rewrite: Option<Arc<str>>,
}

/// What the path of a forwarded request becomes; the query stays.
#[derive(Clone, Debug, PartialEq)]
pub enum PathRewrite {
    /// Instead of the prefix that matched, or of the whole path where none did (`prefix_rewrite`).
    Prefix(String),
    /// Matches are replaced (`regex_rewrite`).
    Regex(RegexRewrite),
    /// Made of what the route's path template caught (`path_rewrite_policy` with a `UriTemplateRewriteConfig`).
    Template(Arc<PathTemplate>, TemplateRewrite),
    /// The whole path; not if it comes out empty (`path_rewrite`).
    Whole(Format),
}

/// What the authority of a forwarded request becomes.
#[derive(Clone, Debug, PartialEq)]
pub enum HostRewrite {
    /// `host_rewrite_literal`
    Literal(Arc<str>),
    /// The first value of this header, unless absent or empty (`host_rewrite_header`).
    Header(HeaderName),
    /// Made of the path (`host_rewrite_path_regex`).
    PathRegex(RegexRewrite),
    /// Not if it comes out empty (`host_rewrite`).
    Format(Format),
    /// The `hostname` of the endpoint, unless that is empty (`auto_host_rewrite`).
    Endpoint {
        /// The control plane is one that gRPC lets rewrite authorities (`trusted_xds_server`, gRFC A81).
        trusted: bool,
    },
}

/// `RedirectAction`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// Another scheme.
    pub scheme: Option<String>,
    /// Another host; the port of the original goes with it.
    pub host: Option<String>,
    /// Another port.
    pub port: Option<u16>,
    /// Another path.
    pub path: Option<RedirectPath>,
    /// The query is dropped.
    pub strip_query: bool,
}

/// The path of a redirect.
#[derive(Clone, Debug, PartialEq)]
pub enum RedirectPath {
    /// The whole path; with a `?` the query too (`path_redirect`).
    Whole(String),
    /// Instead of the prefix that matched (`prefix_rewrite`).
    Prefix(String),
    /// Matches are replaced (`regex_rewrite`).
    Regex(RegexRewrite),
}

/// `DirectResponseAction`.
#[derive(Clone, Debug, PartialEq)]
pub struct DirectResponse {
    /// HTTP status, 200..=599.
    pub status: u16,
    /// May be empty.
    pub body: Bytes,
}

impl Forward {
    /// Forwards, and nothing else.
    pub fn to(cluster: ClusterSpecifier) -> Self {
        Self {
            cluster,
            timeout: None,
            max_stream_duration: MaxStreamDuration::default(),
            retry_policy: None,
            hash_policies: Arc::default(),
            metadata_match: None,
            path_rewrite: None,
            host_rewrite: None,
            append_x_forwarded_host: false,
            mirrors: Arc::default(),
            idle_timeout: None,
            priority: RoutingPriority::Default,
            rate_limits: Vec::new(),
            include_vh_rate_limits: false,
            hedge: None,
            cluster_not_found: 503,
        }
    }
}

impl WeightedCluster {
    /// A part without edits and overrides.
    pub fn new(name: impl Into<Arc<str>>, weight: u32) -> Self {
        Self {
            name: name.into(),
            header: None,
            weight,
            metadata_match: None,
            filter_overrides: BTreeMap::new(),
            edits: HeaderEdits::default(),
            host_rewrite: None,
        }
    }
}
