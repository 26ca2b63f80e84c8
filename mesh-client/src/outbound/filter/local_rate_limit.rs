//! Local rate limit: token buckets in this process (Envoy's `local_ratelimit` filter).

use super::{
    Filter, FilterRequest, FilterResponse, Reply, Step, Verdict, Watch, bucket::Bucket, descriptor::Descriptors, draw,
    plain_facts,
};
use crate::{
    outbound::route::{Facts, Ops, RequestHead},
    telemetry::access_log::ResponseFlags as Flag,
};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header, request::Parts};
use lru::LruCache;
use mesh_xds::{
    resource::{LocalDescriptor, LocalRateLimitConfig},
    rls::Descriptor,
};
use std::{
    borrow::Cow,
    num::NonZero,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::time::Instant;

pub(super) const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
pub(super) const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
pub(super) const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
pub(super) const LIMITED: HeaderName = HeaderName::from_static("x-envoy-ratelimited");

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct LocalRateLimit {
    config: Arc<LocalRateLimitConfig>,
    buckets: Arc<Buckets>,
    descriptors: Descriptors,
    request_edits: Ops,
    response_edits: Ops,
}

/// The buckets of one configuration: what outlives a change of others.
#[derive(Debug)]
pub(crate) struct Buckets {
    general: Option<Arc<Bucket>>,
    /// Parallel to the descriptors of the configuration.
    own: Box<[Own]>,
}

#[derive(Debug)]
enum Own {
    One(Arc<Bucket>),
    /// One for each combination of values, those used last.
    Any(Mutex<LruCache<Entries, Arc<Bucket>>>),
}

/// Keys and values; they come from callers, who are not to know how they are hashed.
type Entries = Vec<(Arc<str>, Arc<str>)>;

/// What the buckets say of a request.
struct Said {
    limited: bool,
    /// The bucket that decided.
    bucket: Option<Arc<Bucket>>,
}

impl Buckets {
    pub(crate) fn new(config: &LocalRateLimitConfig, now: Instant) -> Self {
        let most = NonZero::new(config.max_dynamic).unwrap_or(NonZero::<usize>::MIN);
        let own = config.descriptors.iter().map(|descriptor| match descriptor.has_wildcard() {
            true => Own::Any(Mutex::new(LruCache::new(most))),
            false => Own::One(Arc::new(Bucket::new(descriptor.bucket, now))),
        });
        Self { general: config.bucket.map(|bucket| Arc::new(Bucket::new(bucket, now))), own: own.collect() }
    }

    /// The buckets of a request, the strictest first (Envoy), and whether each only looks on.
    fn of(&self, config: &LocalRateLimitConfig, found: &[Descriptor], now: Instant) -> Vec<(Arc<Bucket>, bool, u64)> {
        let mut buckets: Vec<_> = found
            .iter()
            .filter_map(|found| {
                let exact =
                    config.descriptors.iter().zip(&self.own).find(|(own, _)| !own.has_wildcard() && own.fits(found));
                let any =
                    || config.descriptors.iter().zip(&self.own).find(|(own, _)| own.has_wildcard() && own.fits(found));
                let (descriptor, own) = exact.or_else(any)?;
                let bucket = match own {
                    Own::One(bucket) => bucket.clone(),
                    Own::Any(buckets) => {
                        let mut buckets = buckets.lock().unwrap_or_else(PoisonError::into_inner);
                        let make = || Arc::new(Bucket::new(descriptor.bucket, now));
                        buckets.get_or_insert_ref(&found.entries, make).clone()
                    }
                };
                Some((bucket, descriptor.shadow, found.hits.unwrap_or(1)))
            })
            .collect();
        buckets.sort_by(|(a, ..), (b, ..)| a.rate().total_cmp(&b.rate()));
        buckets
    }

    /// Takes a token of every bucket that counts, up to one that has none.
    fn ask(&self, config: &LocalRateLimitConfig, found: &[Descriptor], now: Instant) -> Said {
        let own = self.of(config, found, now);
        for (bucket, shadow, hits) in &own {
            if !bucket.take(*hits, now) && !shadow {
                return Said { limited: true, bucket: Some(bucket.clone()) };
            }
        }
        if (own.is_empty() || config.always_consume_default)
            && let Some(general) = &self.general
            && !general.take(1, now)
        {
            return Said { limited: true, bucket: Some(general.clone()) };
        }
        let bucket = own.into_iter().next().map(|(bucket, ..)| bucket).or_else(|| self.general.clone());
        Said { limited: false, bucket }
    }
}

trait Fits {
    fn has_wildcard(&self) -> bool;
    fn fits(&self, found: &Descriptor) -> bool;
}

impl Fits for LocalDescriptor {
    fn has_wildcard(&self) -> bool {
        self.entries.iter().any(|(_, value)| value.is_empty())
    }

    /// Every entry, in order.
    fn fits(&self, found: &Descriptor) -> bool {
        self.entries.len() == found.entries.len()
            && self.entries.iter().zip(&found.entries).all(|((key, value), (found_key, found_value))| {
                key == found_key && (value.is_empty() || value == found_value)
            })
    }
}

impl LocalRateLimit {
    pub(super) fn new(config: Arc<LocalRateLimitConfig>, buckets: Arc<Buckets>, descriptors: Descriptors) -> Self {
        Self {
            request_edits: Ops::compile(&config.request_edits),
            response_edits: Ops::compile(&config.response_edits),
            config,
            buckets,
            descriptors,
        }
    }

    fn refuse(&self, request: &FilterRequest<'_>, said: &Said, now: Instant) -> Reply {
        let config = &self.config;
        let status = StatusCode::from_u16(config.status).unwrap_or(StatusCode::TOO_MANY_REQUESTS);
        let mut reply = Reply::new(status, "local_rate_limited").flag(Flag::RATE_LIMITED);
        reply = reply.grpc_status(if config.resource_exhausted { 8 } else { 14 });
        let headers = reply.headers_mut();
        headers.insert(LIMITED, HeaderValue::from_static("true"));
        let wait = said.bucket.as_ref().map_or(Duration::ZERO, |bucket| bucket.next(now));
        if config.retry_after && config.status == 429 {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds(wait).max(1)));
        }
        if config.x_headers {
            said.describe(headers, now);
        }
        let Parts { method, uri, headers: asked, .. } = request.head();
        let facts = Facts { request: Some(RequestHead::new(method, uri, asked)), ..plain_facts(request) };
        self.response_edits
            .apply(headers, |headers, text| text.value(&Facts { response: Some((status, headers)), ..facts }));
        reply
    }
}

impl Said {
    /// draft-polli-ratelimit-headers-03
    fn describe(&self, headers: &mut HeaderMap, now: Instant) {
        let Some(bucket) = &self.bucket else { return };
        headers.insert(LIMIT, HeaderValue::from(bucket.max()));
        headers.insert(REMAINING, HeaderValue::from(bucket.tokens(now)));
        headers.insert(RESET, HeaderValue::from(seconds(bucket.next(now))));
    }
}

/// Rounded up.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

impl Filter for LocalRateLimit {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        if !draw(self.config.enabled) {
            return Step::Now(Verdict::Pass);
        }
        let now = Instant::now();
        let found = if self.descriptors.is_empty() { Vec::new() } else { self.descriptors.of(request) };
        let said = self.buckets.ask(&self.config, &found, now);
        if said.limited {
            if draw(self.config.enforced) {
                return Step::Now(Verdict::Answer(self.refuse(request, &said, now)));
            }
            request.explain("rate limit", || "over the local limit, not enforced".to_owned());
            let facts = plain_facts(request);
            let Parts { method, uri, headers, .. } = request.head_mut();
            self.request_edits.apply(headers, |headers, text| {
                text.value(&Facts { request: Some(RequestHead::new(method, uri, headers)), ..facts })
            });
        }
        if self.config.x_headers && said.bucket.is_some() {
            return Step::Now(Verdict::Watch(Box::new(said)));
        }
        Step::Now(Verdict::Pass)
    }

    fn describe(&self) -> Cow<'_, str> {
        let LocalRateLimitConfig { bucket, descriptors, .. } = &*self.config;
        let bucket = bucket.map_or_else(String::new, |bucket| {
            format!(", {} per {:?}, at most {}", bucket.tokens_per_fill, bucket.fill_interval, bucket.max_tokens)
        });
        format!("local rate limit{bucket}, {} descriptors", descriptors.len()).into()
    }
}

impl Watch for Said {
    fn response(&mut self, response: &mut FilterResponse<'_>) {
        self.describe(&mut response.head_mut().headers, Instant::now());
    }
}
