//! Local rate limit (`envoy.extensions.filters.http.local_ratelimit.v3`).

use super::rate_limit::{RateLimit, TokenBucket, VirtualHostLimits};
use crate::resource::{FractionalPercent, HeaderOps};
use std::sync::Arc;

/// `LocalRateLimit`
#[derive(Clone, Debug, PartialEq)]
pub struct LocalRateLimitConfig {
    /// HTTP status of what is refused, at least 400; default 429.
    pub status: u16,
    /// Of requests without a descriptor of their own; always there in the config of a route.
    pub bucket: Option<TokenBucket>,
    /// Share of requests that are counted; default none.
    pub enabled: FractionalPercent,
    /// Share of those over the limit that are refused; default none.
    pub enforced: FractionalPercent,
    /// On requests over the limit that go on.
    pub request_edits: HeaderOps,
    /// On the answer to what is refused.
    pub response_edits: HeaderOps,
    /// With buckets of their own.
    pub descriptors: Vec<LocalDescriptor>,
    /// 0..=10: which limits of the route count.
    pub stage: u32,
    /// Instead of those of the route and the virtual host; empty is none.
    pub rate_limits: Vec<RateLimit>,
    /// Which of the virtual host's count.
    pub virtual_host: VirtualHostLimits,
    /// The general bucket counts for requests with a descriptor too; default true.
    pub always_consume_default: bool,
    /// `x-ratelimit-limit`, `-remaining` and `-reset` on responses.
    pub x_headers: bool,
    /// `retry-after` on the answer, where its status is 429.
    pub retry_after: bool,
    /// gRPC calls are refused with RESOURCE_EXHAUSTED instead of UNAVAILABLE.
    pub resource_exhausted: bool,
    /// At most this many buckets for the values of one descriptor with empty ones; default 20.
    pub max_dynamic: usize,
}

impl LocalRateLimitConfig {
    /// All requests are counted in this bucket, and refused when it is empty.
    pub fn of(bucket: TokenBucket) -> Self {
        Self {
            status: 429,
            bucket: Some(bucket),
            enabled: FractionalPercent::HUNDRED,
            enforced: FractionalPercent::HUNDRED,
            request_edits: HeaderOps::default(),
            response_edits: HeaderOps::default(),
            descriptors: Vec::new(),
            stage: 0,
            rate_limits: Vec::new(),
            virtual_host: VirtualHostLimits::default(),
            always_consume_default: true,
            x_headers: false,
            retry_after: false,
            resource_exhausted: false,
            max_dynamic: 20,
        }
    }
}

/// `LocalRateLimitDescriptor`
#[derive(Clone, Debug, PartialEq)]
pub struct LocalDescriptor {
    /// Key and value, in order; an empty value stands for any, with a bucket for each.
    pub entries: Vec<(Arc<str>, Arc<str>)>,
    /// Its bucket.
    pub bucket: TokenBucket,
    /// Over the limit requests go on.
    pub shadow: bool,
}
