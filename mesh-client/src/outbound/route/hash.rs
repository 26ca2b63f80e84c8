//! The hash of a request (gRFC A42, and Envoy's `HashPolicyImpl`): what consistent hashing goes by.

use super::{
    Profile, RequestHead,
    head::Name,
    params::{cookie, parameter},
};
use crate::{
    Downstream,
    outbound::pick::{xxh64, xxh64_seeded},
};
use http::HeaderValue;
use mesh_xds::resource::{CookieHash, HashPolicy, HashSource, RegexRewrite};
use smallvec::SmallVec;
use std::{borrow::Cow, fmt::Write as _, sync::Arc};

/// The hash policies of a route, compiled.
#[derive(Debug)]
pub(crate) struct Hasher {
    policies: Box<[(Source, bool)]>,
    profile: Profile,
}

#[derive(Debug)]
enum Source {
    Header { name: Name, rewrite: Option<RegexRewrite> },
    Cookie(CookieHash),
    QueryParameter(Arc<str>),
    ChannelId,
    Address,
    FilterState(Arc<str>),
}

/// What became of a request's hash policies.
#[derive(Debug, Default)]
pub(crate) struct Hashed {
    /// `None`: the request has nothing to hash.
    pub(crate) hash: Option<u64>,
    /// `set-cookie` values for the response: cookies that were missing, and made.
    pub(crate) cookies: Vec<HeaderValue>,
}

impl Hasher {
    /// `None`: there are no policies.
    pub(super) fn compile(policies: &[HashPolicy], profile: Profile) -> Option<Self> {
        let source = |policy: &HashPolicy| {
            let source = match &policy.source {
                HashSource::Header { name, rewrite } => {
                    Source::Header { name: Name::compile(name, profile), rewrite: rewrite.clone() }
                }
                HashSource::Cookie(cookie) => Source::Cookie(cookie.clone()),
                HashSource::QueryParameter(name) => Source::QueryParameter(name.clone()),
                HashSource::ChannelId => Source::ChannelId,
                HashSource::SourceIp => Source::Address,
                HashSource::FilterState(key) => Source::FilterState(key.clone()),
            };
            (source, policy.terminal)
        };
        (!policies.is_empty()).then(|| Self { policies: policies.iter().map(source).collect(), profile })
    }

    /// The hash of a request. `channel` is the same for all requests of a channel; `random` makes the cookies that are missing.
    pub(crate) fn hash(&self, head: &RequestHead<'_>, channel: u64, mut random: impl FnMut() -> u64) -> Hashed {
        let mut hashed = Hashed::default();
        for (source, terminal) in &self.policies {
            let new = match source {
                Source::Header { name, rewrite } => header_hash(head, name, rewrite.as_ref(), self.profile),
                Source::Cookie(wanted) => match cookie(head.headers, &wanted.name) {
                    Some(value) => Some(xxh64(value)),
                    None => wanted.ttl.map(|_| {
                        let value = format!("{:016x}", random());
                        hashed.cookies.extend(set_cookie(wanted, &value));
                        xxh64(value.as_bytes())
                    }),
                },
                Source::QueryParameter(name) => {
                    head.query().and_then(|query| parameter(query, name)).map(|value| xxh64(value.as_bytes()))
                }
                Source::ChannelId => Some(channel),
                // As text, like Envoy.
                Source::Address => Downstream::source_of(head.extensions)
                    .map(|source| xxh64(source.ip().to_canonical().to_string().as_bytes())),
                Source::FilterState(key) => Downstream::of(head.extensions)
                    .and_then(|downstream| downstream.filter_state(key))
                    .map(|value| xxh64(value.as_bytes())),
            };
            if let Some(new) = new {
                hashed.hash = Some(hashed.hash.map_or(new, |hash| hash.rotate_left(1) ^ new));
            }
            if *terminal && hashed.hash.is_some() {
                break;
            }
        }
        hashed
    }
}

/// The hash of one header (gRFC A76, `requestHashHeader`).
pub(crate) fn hash_of_header(head: &RequestHead<'_>, name: &http::HeaderName, profile: Profile) -> Option<u64> {
    header_hash(head, &Name::compile(name.as_str(), profile), None, profile)
}

/// gRPC hashes the values joined; Envoy chains the hashes of the sorted values. For one value they agree.
fn header_hash(head: &RequestHead<'_>, name: &Name, rewrite: Option<&RegexRewrite>, profile: Profile) -> Option<u64> {
    if let (Profile::Envoy, Name::Header(name)) = (profile, name) {
        let values = head.headers.get_all(name).iter().map(HeaderValue::as_bytes);
        let mut values: SmallVec<[Cow<'_, [u8]>; 1]> = values.map(|value| rewritten(value, rewrite)).collect();
        values.sort();
        let hash = values.iter().fold(0, |seed, value| xxh64_seeded(seed, value));
        return (!values.is_empty()).then_some(hash);
    }
    let value = head.value(name);
    value.bytes().map(|value| xxh64(&rewritten(value, rewrite)))
}

/// A value that is not text is not rewritten.
fn rewritten<'v>(value: &'v [u8], rewrite: Option<&RegexRewrite>) -> Cow<'v, [u8]> {
    match (rewrite, std::str::from_utf8(value)) {
        (Some(rewrite), Ok(text)) => match rewrite.apply(text) {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        },
        _ => Cow::Borrowed(value),
    }
}

/// Envoy `Utility::makeSetCookieValue`.
fn set_cookie(cookie: &CookieHash, value: &str) -> Option<HeaderValue> {
    let mut text = format!("{}=\"{value}\"", cookie.name);
    // Writing to a String cannot fail.
    if let Some(ttl) = cookie.ttl.filter(|ttl| ttl.as_secs() > 0) {
        let _ = write!(text, "; Max-Age={}", ttl.as_secs());
    }
    if !cookie.path.is_empty() {
        let _ = write!(text, "; Path={}", cookie.path);
    }
    for (name, value) in &cookie.attributes {
        let _ = if value.is_empty() { write!(text, "; {name}") } else { write!(text, "; {name}={value}") };
    }
    text.push_str("; HttpOnly");
    HeaderValue::try_from(text).ok()
}

#[cfg(test)]
mod tests;
