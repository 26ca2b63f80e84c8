//! RDS: `envoy.config.route.v3.RouteConfiguration`.

use super::{
    Action, ClusterSpecifier, CookieMatcher, FilterOverride, FilterStateMatcher, FractionalPercent, HeaderEdits,
    HeaderMatcher, MetadataMatcher, MetadataValue, MirrorCluster, PathTemplate, QueryParameterMatcher, RateLimit,
    SafeRegex,
};
use http::HeaderName;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// A validated RouteConfiguration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteConfiguration {
    /// Resource name.
    pub name: Arc<str>,
    /// May be empty: the target then has no route.
    pub virtual_hosts: Vec<VirtualHost>,
    /// Header edits of every route: the least specific level.
    pub edits: HeaderEdits,
    /// The more specific a level, the later its edits are made (`most_specific_header_mutations_wins`); default: the earlier.
    pub most_specific_edits_win: bool,
    /// `typed_per_filter_config` by filter instance name: the least specific level.
    pub filter_overrides: BTreeMap<Arc<str>, FilterOverride>,
}

/// One virtual host.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct VirtualHost {
    /// Its name, for explain and errors.
    pub name: Arc<str>,
    /// The authorities it answers for.
    pub domains: Vec<DomainPattern>,
    /// First match wins.
    pub routes: Vec<Route>,
    /// For routes that have none.
    pub retry_policy: Option<Arc<RetryPolicy>>,
    /// Who is told how often a request was tried.
    pub attempt_count: AttemptCount,
    /// `typed_per_filter_config` by filter instance name.
    pub filter_overrides: BTreeMap<Arc<str>, FilterOverride>,
    /// Header edits of its routes.
    pub edits: HeaderEdits,
    /// Descriptors for the rate limit filters.
    pub rate_limits: Vec<RateLimit>,
}

/// A domain of a virtual host, lower-cased (gRFC A27: exact > suffix > prefix > any; longer wins within a kind).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DomainPattern {
    /// `foo.com`
    Exact(String),
    /// `*.foo.com`: holds `.foo.com`; `*` stands for at least one character.
    Suffix(String),
    /// `foo.*`: holds `foo.`.
    Prefix(String),
    /// `*`
    Any,
}

/// One route.
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    /// Its name, or empty.
    pub name: Arc<str>,
    /// When it applies.
    pub matches: RouteMatch,
    /// What is done.
    pub action: Action,
    /// `typed_per_filter_config` by filter instance name.
    pub filter_overrides: BTreeMap<Arc<str>, FilterOverride>,
    /// Header edits.
    pub edits: HeaderEdits,
}

/// `RouteMatch`: all parts must match. The default matches every request.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteMatch {
    /// The path (without query).
    pub path: PathMatcher,
    /// Every one must match.
    pub headers: Vec<HeaderMatcher>,
    /// Every one must match.
    pub query: Vec<QueryParameterMatcher>,
    /// Every one must match.
    pub cookies: Vec<CookieMatcher>,
    /// `grpc`: only requests whose content type is gRPC's.
    pub grpc_only: bool,
    /// Of the connection that the request came to this process by.
    pub tls: TlsContextMatch,
    /// `dynamic_metadata`: every one must match.
    pub metadata: Vec<MetadataMatcher>,
    /// Every one must match.
    pub filter_state: Vec<FilterStateMatcher>,
    /// `runtime_fraction.default_value`; `None` is always.
    pub fraction: Option<FractionalPercent>,
}

/// `TlsContextMatchOptions`. The default matches every request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlsContextMatch {
    /// Whether the caller presented a certificate.
    pub presented: Option<bool>,
    /// Whether its certificate was verified.
    pub validated: Option<bool>,
}

/// The path specifier.
#[derive(Clone, Debug, PartialEq)]
pub enum PathMatcher {
    /// Starts with.
    Prefix {
        /// Lower-cased when not case sensitive.
        prefix: String,
        /// Default true.
        case_sensitive: bool,
    },
    /// Is equal.
    Exact {
        /// Lower-cased when not case sensitive.
        path: String,
        /// Default true.
        case_sensitive: bool,
    },
    /// Is equal, or starts with it and a `/` (`path_separated_prefix`).
    Separated {
        /// Lower-cased when not case sensitive; does not end in `/`.
        prefix: String,
        /// Default true.
        case_sensitive: bool,
    },
    /// The whole path matches.
    Regex(SafeRegex),
    /// The whole path matches (`path_match_policy` with a `UriTemplateMatchConfig`).
    Template(Arc<PathTemplate>),
}

impl Default for PathMatcher {
    /// Every path.
    fn default() -> Self {
        Self::Prefix { prefix: String::new(), case_sensitive: true }
    }
}

/// Who is told how often a request was tried. Envoy's headers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttemptCount {
    /// Endpoints: `x-envoy-attempt-count`, from 1 (`include_request_attempt_count`).
    pub in_request: bool,
    /// The caller, by the same header (`include_attempt_count_in_response`).
    pub in_response: bool,
    /// Endpoints: `x-envoy-is-timeout-retry: true` where the attempt before had no answer in time
    /// (`include_is_timeout_retry_header`).
    pub after_timeout: bool,
}

/// `RetryPolicy`, gRPC (A44) and Envoy fields.
#[derive(Clone, Debug, PartialEq)]
pub struct RetryPolicy {
    /// Conditions.
    pub on: RetryOn,
    /// Retries after the first attempt; at least 1. The gRPC profile caps attempts at 5.
    pub num_retries: u32,
    /// Limit of each attempt; `None` is the call's.
    pub per_try_timeout: Option<Duration>,
    /// How long an attempt may stand still.
    pub per_try_idle_timeout: Option<Duration>,
    /// Exponential, jittered.
    pub back_off: BackOff,
    /// Envoy `previous_hosts`: an attempt avoids the hosts that failed before.
    pub avoid_previous_hosts: bool,
    /// Hosts that retries stay away from while there are others.
    pub omit_hosts: Vec<OmitHosts>,
    /// `previous_priorities`: retries go to other priorities than as many attempts before (`update_frequency`). Zero: off.
    pub leave_priorities: u32,
    /// Responses with one of these headers are retried (`retriable-headers`).
    pub retriable_headers: Vec<HeaderMatcher>,
    /// Only requests with one of these headers are retried; empty is all.
    pub retriable_request_headers: Vec<HeaderMatcher>,
    /// Headers that say when to come back, instead of the back-off.
    pub reset_headers: Vec<ResetHeader>,
    /// The longest time that such a header may ask for.
    pub max_reset: Duration,
}

/// A predicate of hosts that retries stay away from.
#[derive(Clone, Debug, PartialEq)]
pub enum OmitHosts {
    /// Those whose metadata says `envoy.lb: canary: true`.
    Canary,
    /// Those whose `envoy.lb` metadata has all of these.
    Metadata(BTreeMap<String, MetadataValue>),
}

/// A response header that says when to come back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResetHeader {
    /// As in `retry-after`.
    pub name: HeaderName,
    /// What its number means.
    pub format: ResetFormat,
}

/// What the number in a [`ResetHeader`] means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetFormat {
    /// Seconds from now.
    Seconds,
    /// Seconds since 1970.
    UnixTime,
}

/// `retry_on`, decoded. Unknown words are ignored with a note.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetryOn {
    /// Bit `n` is set when gRPC code `n` is retriable (cancelled, deadline-exceeded, internal, resource-exhausted, unavailable).
    pub grpc_codes: u32,
    /// `5xx`
    pub http_5xx: bool,
    /// `gateway-error`: 502, 503, 504.
    pub gateway_error: bool,
    /// `reset`: the upstream does not answer at all (reset, disconnect, read timeout).
    pub reset: bool,
    /// `reset-before-request`.
    pub reset_before_request: bool,
    /// `connect-failure`.
    pub connect_failure: bool,
    /// `refused-stream`.
    pub refused_stream: bool,
    /// `retriable-4xx`: 409.
    pub retriable_4xx: bool,
    /// `envoy-ratelimited`: responses with `x-envoy-ratelimited`, which are not retried otherwise.
    pub rate_limited: bool,
    /// `retriable_status_codes`, in force when `retriable-status-codes` is listed, or numbers in `retry_on` itself (Istio).
    pub statuses: Vec<u16>,
}

/// Exponential back-off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackOff {
    /// First delay; default 25 ms, at least 1 ms.
    pub base: Duration,
    /// Longest delay; default 10 x base.
    pub max: Duration,
}

impl Default for RetryPolicy {
    /// Retries nothing.
    fn default() -> Self {
        Self {
            on: RetryOn::default(),
            num_retries: 1,
            per_try_timeout: None,
            per_try_idle_timeout: None,
            back_off: BackOff::default(),
            avoid_previous_hosts: false,
            omit_hosts: Vec::new(),
            leave_priorities: 0,
            retriable_headers: Vec::new(),
            retriable_request_headers: Vec::new(),
            reset_headers: Vec::new(),
            max_reset: Duration::from_secs(300),
        }
    }
}

impl Default for BackOff {
    fn default() -> Self {
        Self { base: Duration::from_millis(25), max: Duration::from_millis(250) }
    }
}

impl RetryOn {
    /// Whether gRPC status `code` is retriable.
    pub fn grpc(&self, code: u32) -> bool {
        code < 32 && self.grpc_codes & (1 << code) != 0
    }
}

impl RouteConfiguration {
    /// Index of the virtual host for an authority: exact > longest suffix > longest prefix > `*`; the first on a tie
    /// (gRFC A27). Case-insensitive. The authority counts both as given and without its port; as given wins on a tie.
    pub fn virtual_host_for(&self, authority: &str) -> Option<usize> {
        let hosts = self.virtual_hosts.iter().enumerate();
        let domains = hosts.flat_map(|(index, host)| host.domains.iter().map(move |domain| (domain, index)));
        DomainPattern::best(domains, authority)
    }
}

impl VirtualHost {
    /// Every cluster that its routes and their mirrors name: what a `cluster_header` may choose from.
    pub fn cluster_names(&self) -> BTreeSet<Arc<str>> {
        let mut names = BTreeSet::new();
        for route in &self.routes {
            let Action::Forward(forward) = &route.action else { continue };
            match &forward.cluster {
                ClusterSpecifier::Cluster(name) => drop(names.insert(name.clone())),
                ClusterSpecifier::Weighted(clusters) => {
                    let named = clusters.iter().filter(|part| part.header.is_none());
                    names.extend(named.map(|part| part.name.clone()));
                }
                ClusterSpecifier::Header(_) => {}
            }
            names.extend(forward.mirrors.iter().filter_map(|mirror| match &mirror.cluster {
                MirrorCluster::Name(name) => Some(name.clone()),
                MirrorCluster::Header(_) => None,
            }));
        }
        names
    }
}

impl Route {
    /// A route without edits and overrides.
    pub fn new(name: impl Into<Arc<str>>, matches: RouteMatch, action: Action) -> Self {
        Self { name: name.into(), matches, action, filter_overrides: BTreeMap::new(), edits: HeaderEdits::default() }
    }
}

/// `None` when there is no port; the colons of a bare IPv6 address are not one.
fn without_port(host: &str) -> Option<&str> {
    let (name, port) = host.rsplit_once(':')?;
    let numeric = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let single = !name.contains(':') || name.ends_with(']');
    (numeric && single).then_some(name)
}

impl DomainPattern {
    /// Reads `name`, `*suffix`, `prefix*` or `*`. `None`: it is none of them.
    pub fn parse(domain: &str) -> Option<Self> {
        let lower = domain.to_ascii_lowercase();
        let valid = |rest: &str| !rest.is_empty() && !rest.contains('*');
        if lower == "*" {
            Some(Self::Any)
        } else if let Some(rest) = lower.strip_prefix('*') {
            valid(rest).then(|| Self::Suffix(rest.to_owned()))
        } else if let Some(rest) = lower.strip_suffix('*') {
            valid(rest).then(|| Self::Prefix(rest.to_owned()))
        } else {
            valid(&lower).then_some(Self::Exact(lower))
        }
    }

    /// What belongs to the best of these domains for an authority, by the rules of [`RouteConfiguration::virtual_host_for`].
    pub fn best<'d, T: Copy>(domains: impl Iterator<Item = (&'d Self, T)> + Clone, authority: &str) -> Option<T> {
        let host = authority.to_ascii_lowercase();
        let best = |host: &str| {
            let mut best: Option<((u8, usize), T)> = None;
            for (rank, of) in domains.clone().filter_map(|(domain, of)| Some((domain.rank(host)?, of))) {
                if best.is_none_or(|(known, _)| rank > known) {
                    best = Some((rank, of));
                }
            }
            best
        };
        match (best(&host), without_port(&host).and_then(best)) {
            (Some((rank, _)), Some((other, of))) if other > rank => Some(of),
            (given, bare) => given.or(bare).map(|(_, of)| of),
        }
    }

    /// How well the pattern fits a lower-case host: kind, then length.
    fn rank(&self, host: &str) -> Option<(u8, usize)> {
        match self {
            Self::Exact(name) => (name == host).then_some((3, name.len())),
            // `*` stands for at least one character.
            Self::Suffix(rest) => (host.len() > rest.len() && host.ends_with(rest.as_str())).then_some((2, rest.len())),
            Self::Prefix(rest) => {
                (host.len() > rest.len() && host.starts_with(rest.as_str())).then_some((1, rest.len()))
            }
            Self::Any => Some((0, 0)),
        }
    }
}
