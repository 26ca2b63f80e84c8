//! How a cluster chooses its endpoints: policies (gRFC A27, A42, A48, A52, A58, A61, A68, A76) and what surrounds them.

use super::{HealthStatus, MetadataValue, RegexRewrite};
use http::HeaderName;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// Entries of a ring, at most (gRFC A42 and Envoy).
pub(crate) const MAX_RING: u64 = 8 << 20;
/// Places of a Maglev table, at most (Envoy).
pub(crate) const MAX_TABLE: u64 = 5_000_011;

/// Whether a Maglev table may have so many places.
pub(crate) fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

/// Load-balancing policies.
#[derive(Clone, Debug, PartialEq)]
pub enum LbPolicy {
    /// In turn, by weight.
    RoundRobin,
    /// Uniform or weighted draw.
    Random,
    /// Fewest in flight of `choice_count` draws with replacement (gRFC A48: 2..=10).
    LeastRequest {
        /// Draws.
        choice_count: u32,
        /// `active_request_bias`, where it is not 1: endpoints of different weights are drawn with the probability of
        /// `weight / (in flight + 1)^bias`. `None`: the least in flight per weight of the draws. Endpoints of one weight are drawn alike.
        bias: Option<f64>,
        /// `selection_method` FULL_SCAN: the fewest in flight of all endpoints, where they are of one weight.
        full_scan: bool,
    },
    /// Consistent hashing on a ring (gRFC A42, A76).
    RingHash(RingHash),
    /// Consistent hashing by a table (Envoy).
    Maglev(Maglev),
    /// In turn, by weights that the endpoints report (gRFC A58).
    WeightedRoundRobin(Arc<WeightedRoundRobin>),
    /// One endpoint for everything, while it can be connected to (gRFC A61, A62, A113).
    PickFirst {
        /// Take the endpoints in random order.
        shuffle: bool,
    },
    /// The cheaper of two draws by latency times requests in flight (Linkerd).
    PeakEwma(PeakEwma),
    /// A random part of the endpoints, the same for the life of the client (gRFC A68).
    RandomSubsetting {
        /// How many endpoints; greater than zero.
        subset_size: u32,
        /// Chooses among them.
        child: Arc<Self>,
    },
    /// A policy that the program registered.
    Custom(Arc<CustomLb>),
}

/// `RingHash`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RingHash {
    /// Entries at least; default 1024.
    pub min_size: u64,
    /// Entries at most; default and limit 8,388,608.
    pub max_size: u64,
    /// Places the entries.
    pub function: HashFunction,
    /// What endpoints are known by, and how much load one may have.
    pub hashing: ConsistentHashing,
    /// Requests are hashed by this header alone (gRFC A76, `requestHashHeader`); `None`: by the route's hash policies.
    pub request_header: Option<HeaderName>,
}

/// `Maglev`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Maglev {
    /// A prime up to 5,000,011; default 65,537.
    pub table_size: u64,
    /// What endpoints are known by, and how much load one may have.
    pub hashing: ConsistentHashing,
}

/// `ConsistentHashingLbConfig`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConsistentHashing {
    /// Endpoints are placed by their hostname, not their address.
    pub use_hostname: bool,
    /// An endpoint takes at most this percentage of its share of the load, 100 or more; `None`: any load.
    pub balance_factor: Option<u32>,
}

/// The hash functions of a ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HashFunction {
    /// XXH64 with seed 0.
    #[default]
    XxHash,
    /// MurmurHash64A, as in libstdc++'s `std::hash`.
    MurmurHash2,
}

/// `ClientSideWeightedRoundRobin` (gRFC A58).
#[derive(Clone, Debug, PartialEq)]
pub struct WeightedRoundRobin {
    /// `Some`: reports come out of band, at least this often (default 10 s); `None`: with the responses.
    pub oob_period: Option<Duration>,
    /// An endpoint's weight is used only after it has reported for so long; default 10 s.
    pub blackout: Duration,
    /// A weight that is older than this is no longer used; default 180 s.
    pub expiration: Duration,
    /// How often weights are taken over; default 1 s, at least 100 ms.
    pub update: Duration,
    /// How much errors lower the weight; default 1.0, not negative.
    pub error_penalty: f64,
    /// `metric_names_for_computing_utilization` (gRFC A114): the largest of these, after the application's own and before the CPU's.
    pub utilization_metrics: Vec<String>,
}

/// Peak EWMA: Linkerd's balancer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeakEwma {
    /// Latency of an endpoint that has not answered yet; default 30 ms.
    pub default_rtt: Duration,
    /// How long a latency is remembered; default 10 s.
    pub decay: Duration,
    /// Failures (5xx, 429, the gRPC statuses like them) count as this latency; zero: as their own. Default 5 s.
    pub penalty: Duration,
}

/// A policy that is not one of ours: a `TypedStruct` (gRFC A52).
#[derive(Clone, Debug, PartialEq)]
pub struct CustomLb {
    /// The last part of the type URL.
    pub name: Arc<str>,
    /// Its configuration; an object.
    pub config: serde_json::Value,
}

/// What surrounds the policy of a cluster.
#[derive(Clone, Debug, PartialEq)]
pub struct LbSettings {
    /// Below this percentage of healthy endpoints health is disregarded (Envoy profile); default 50, 0 never.
    pub panic_threshold: f64,
    /// Fail requests instead of disregarding health.
    pub fail_on_panic: bool,
    /// How localities are weighed.
    pub localities: LocalityLb,
    /// Endpoints that are new get less.
    pub slow_start: Option<SlowStart>,
    /// Health statuses of endpoints that a session may stick to.
    pub override_host_statuses: HealthStatuses,
    /// `lb_subset_config`.
    pub subsets: Option<Arc<SubsetConfig>>,
}

/// How requests are shared among the localities of a priority.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum LocalityLb {
    /// By the weights of the assignment.
    #[default]
    Weighted,
    /// Our own first, as far as it does not get more than its share (Envoy).
    ZoneAware {
        /// Percent of requests; default 100.
        enabled: f64,
        /// Only with so many endpoints; default 6.
        min_cluster_size: u64,
    },
}

/// `SlowStartConfig`: weight times `max(min_weight, (age/window)^(1/aggression))`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SlowStart {
    /// How long an endpoint counts as new.
    pub window: Duration,
    /// 1: linear; greater: faster at first. Greater than zero, default 1.
    pub aggression: f64,
    /// Percent; default 10.
    pub min_weight: f64,
}

/// A set of [`HealthStatus`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthStatuses(u8);

/// `LbSubsetConfig`: endpoints by their `envoy.lb` metadata.
#[derive(Clone, Debug, PartialEq)]
pub struct SubsetConfig {
    /// When no subset matches.
    pub fallback: SubsetFallback,
    /// Of [`SubsetFallback::Default`].
    pub default_subset: BTreeMap<String, MetadataValue>,
    /// The subsets: one for each combination of values of these keys.
    pub selectors: Vec<SubsetSelector>,
    /// When the subset that was fallen back to is empty: any endpoint.
    pub panic_mode_any: bool,
}

/// One selector of subsets.
#[derive(Clone, Debug, PartialEq)]
pub struct SubsetSelector {
    /// In order, each once.
    pub keys: Vec<String>,
    /// A subset is its first endpoint alone.
    pub single_host: bool,
    /// `None`: that of the cluster.
    pub fallback: Option<SubsetFallback>,
}

/// What is done when no endpoint has the metadata of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubsetFallback {
    /// The request fails.
    None,
    /// Any endpoint.
    Any,
    /// The default subset.
    Default,
    /// The subset by these keys alone.
    Keys(Vec<String>),
}

/// One entry of a route's `hash_policy` (gRFC A42, and Envoy's).
#[derive(Clone, Debug, PartialEq)]
pub struct HashPolicy {
    /// What is hashed.
    pub source: HashSource,
    /// When it gives a hash, later entries are not looked at.
    pub terminal: bool,
}

/// What is hashed of a request.
#[derive(Clone, Debug, PartialEq)]
pub enum HashSource {
    /// A header: its values joined with `,` (gRPC), or each by itself, sorted (Envoy).
    Header {
        /// Lower-case; or `:authority`, `:method`, `:path`, `:scheme`.
        name: Arc<str>,
        /// Applied to the value first.
        rewrite: Option<RegexRewrite>,
    },
    /// A cookie's value.
    Cookie(CookieHash),
    /// The first query parameter of this name.
    QueryParameter(Arc<str>),
    /// `filter_state` `io.grpc.channel_id`: the same for all requests of a channel.
    ChannelId,
    /// `connection_properties.source_ip`: the address that the request came to this process from.
    SourceIp,
    /// `filter_state` of another key: a string that the application gave the request.
    FilterState(Arc<str>),
}

/// `HashPolicy.Cookie`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CookieHash {
    /// Its name.
    pub name: Arc<str>,
    /// `Some`: made when missing, and set with the response; zero: for the session.
    pub ttl: Option<Duration>,
    /// Of the cookie that is set; may be empty.
    pub path: Arc<str>,
    /// More attributes of the cookie that is set.
    pub attributes: Vec<(String, String)>,
}

impl HealthStatuses {
    /// UNKNOWN and HEALTHY.
    pub const USABLE: Self = Self(0).and(HealthStatus::Unknown).and(HealthStatus::Healthy);
    /// None.
    pub const NONE: Self = Self(0);

    /// With this one, too.
    #[must_use]
    pub const fn and(self, status: HealthStatus) -> Self {
        Self(self.0 | 1 << status as u8)
    }

    /// Whether it is in the set.
    pub const fn contains(self, status: HealthStatus) -> bool {
        self.0 & 1 << status as u8 != 0
    }
}

impl LbPolicy {
    /// Least request of so many draws.
    pub const fn least_request(choice_count: u32) -> Self {
        Self::LeastRequest { choice_count, bias: None, full_scan: false }
    }

    /// Whether the hash of a request decides.
    pub fn uses_hash(&self) -> bool {
        match self {
            Self::RingHash(_) | Self::Maglev(_) | Self::Custom(_) => true,
            Self::RandomSubsetting { child, .. } => child.uses_hash(),
            _ => false,
        }
    }

    /// The header that requests are hashed by instead of the route's policies (gRFC A76).
    pub fn request_hash_header(&self) -> Option<&HeaderName> {
        match self {
            Self::RingHash(ring) => ring.request_header.as_ref(),
            Self::RandomSubsetting { child, .. } => child.request_hash_header(),
            _ => None,
        }
    }
}

impl Default for RingHash {
    fn default() -> Self {
        Self {
            min_size: 1024,
            max_size: 8 << 20,
            function: HashFunction::XxHash,
            hashing: ConsistentHashing::default(),
            request_header: None,
        }
    }
}

impl Default for Maglev {
    fn default() -> Self {
        Self { table_size: 65_537, hashing: ConsistentHashing::default() }
    }
}

impl Default for WeightedRoundRobin {
    fn default() -> Self {
        Self {
            oob_period: None,
            blackout: Duration::from_secs(10),
            expiration: Duration::from_secs(180),
            update: Duration::from_secs(1),
            error_penalty: 1.0,
            utilization_metrics: Vec::new(),
        }
    }
}

impl Default for PeakEwma {
    fn default() -> Self {
        Self { default_rtt: Duration::from_millis(30), decay: Duration::from_secs(10), penalty: Duration::from_secs(5) }
    }
}

impl Default for LbSettings {
    fn default() -> Self {
        Self {
            panic_threshold: 50.0,
            fail_on_panic: false,
            localities: LocalityLb::Weighted,
            slow_start: None,
            override_host_statuses: HealthStatuses::USABLE,
            subsets: None,
        }
    }
}
