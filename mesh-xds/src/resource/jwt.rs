//! JWT authentication of requests (`envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication`).

use super::{RouteMatch, StringMatcher};
use http::HeaderName;
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A filter that verifies the tokens of requests.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct JwtConfig {
    /// Who issues tokens, by name.
    pub providers: BTreeMap<Arc<str>, Arc<JwtProvider>>,
    /// What requests need: the first whose match fits. A request that none fits needs nothing.
    pub rules: Vec<JwtRule>,
    /// Requirements that routes and rules name.
    pub requirements: BTreeMap<Arc<str>, JwtRequirement>,
    /// CORS preflights need no token.
    pub bypass_cors_preflight: bool,
    /// The answer does not say what was wrong.
    pub strip_failure_response: bool,
}

/// A rule of a [`JwtConfig`].
#[derive(Clone, Debug, PartialEq)]
pub struct JwtRule {
    /// Which requests.
    pub matches: RouteMatch,
    /// What they need; `None`: nothing.
    pub requirement: Option<JwtRequirement>,
}

/// What a request needs.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum JwtRequirement {
    /// A token of this provider.
    Provider {
        /// Key of [`JwtConfig::providers`].
        name: Arc<str>,
        /// Instead of the provider's own, where given.
        audiences: Option<Vec<String>>,
    },
    /// One of these; the first that is met counts.
    OneOf(Vec<Self>),
    /// All of these.
    All(Vec<Self>),
    /// No token, or a good one of any provider beside it.
    AllowMissing,
    /// Whatever comes: a good token is used, a bad one ignored.
    AllowMissingOrFailed,
}

/// One issuer of tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtProvider {
    /// `iss`; empty: any.
    pub issuer: String,
    /// One of them has to be in `aud`; empty: any.
    pub audiences: Vec<String>,
    /// Of `sub`.
    pub subjects: Option<StringMatcher>,
    /// A token without `exp` is refused.
    pub require_expiration: bool,
    /// The longest time to `exp`.
    pub max_lifetime: Option<Duration>,
    /// Where its keys are.
    pub jwks: JwksSource,
    /// The token stays in the request.
    pub forward: bool,
    /// Where the token is, in this order: headers, parameters, cookies. Without any: `authorization: Bearer`, then `access_token`.
    pub from_headers: Vec<JwtHeader>,
    /// Query parameters.
    pub from_params: Vec<String>,
    /// Cookies.
    pub from_cookies: Vec<String>,
    /// Gets the payload in base64url.
    pub forward_payload_header: Option<HeaderName>,
    /// With `=` at its end.
    pub pad_forward_payload_header: bool,
    /// The payload becomes metadata under this key; empty: it does not.
    pub payload_in_metadata: String,
    /// Claims that are strings of words become lists in the metadata.
    pub space_delimited_claims: Vec<String>,
    /// The header of the token becomes metadata under this key; empty: it does not.
    pub header_in_metadata: String,
    /// Leeway of `exp` and `nbf`; default 60 s.
    pub clock_skew: Duration,
    /// What claims become.
    pub claim_to_headers: Vec<JwtClaimToHeader>,
    /// Good tokens that are kept, so that they are not verified again (`jwt_cache_config`).
    pub cache: Option<JwtTokenCache>,
}

/// How many verified tokens are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JwtTokenCache {
    /// At most so many; default 100.
    pub tokens: usize,
    /// None that is longer, in bytes; default 4096.
    pub max_length: usize,
}

/// A header with a token.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtHeader {
    /// Its name.
    pub name: HeaderName,
    /// Stands before the token, perhaps not at the beginning; case-sensitive.
    pub prefix: String,
}

/// A claim that becomes a header.
#[derive(Clone, Debug, PartialEq)]
pub struct JwtClaimToHeader {
    /// The header; what came under this name is taken away.
    pub header: HeaderName,
    /// Keys of the claim, from the outside in.
    pub path: Vec<String>,
}

/// Where the keys of a provider are.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum JwksSource {
    /// Given: a JSON Web Key Set, an object with `keys`.
    Inline(Arc<str>),
    /// A file with one; read when the filter is made, and again when it changed.
    File(Arc<str>),
    /// Fetched over HTTP.
    Remote(RemoteJwks),
}

/// `RemoteJwks`
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteJwks {
    /// `https://host/path`
    pub uri: http::Uri,
    /// The cluster that serves it.
    pub cluster: Arc<str>,
    /// Of one fetch.
    pub timeout: Duration,
    /// Until it is fetched again; default 10 min, at least one second.
    pub cache_duration: Duration,
    /// Fetched when the filter is made, not by the first request; and again before it is too old.
    pub async_fetch: bool,
    /// After a failure of such a fetch; default 1 s.
    pub failed_refetch: Duration,
    /// Further attempts of one fetch.
    pub retries: u32,
    /// How much longer than `cache_duration` the last good keys verify tokens while fetches fail. In Envoy those of `async_fetch` do for ever, as
    /// here, and others not at all; here they do for an hour.
    pub stale: Duration,
}

/// What a route says of the filter (`PerRouteConfig`).
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum JwtOfRoute {
    /// Its requests need nothing.
    Disabled,
    /// They need what this names in [`JwtConfig::requirements`].
    Requirement(Arc<str>),
}

impl JwtProvider {
    /// One with these keys and the defaults of all else.
    pub fn new(issuer: impl Into<String>, jwks: JwksSource) -> Self {
        Self {
            issuer: issuer.into(),
            audiences: Vec::new(),
            subjects: None,
            require_expiration: false,
            max_lifetime: None,
            jwks,
            forward: false,
            from_headers: Vec::new(),
            from_params: Vec::new(),
            from_cookies: Vec::new(),
            forward_payload_header: None,
            pad_forward_payload_header: false,
            payload_in_metadata: String::new(),
            space_delimited_claims: Vec::new(),
            header_in_metadata: String::new(),
            clock_skew: Duration::from_secs(60),
            claim_to_headers: Vec::new(),
            cache: None,
        }
    }
}

impl JwtConfig {
    /// The clusters that keys are fetched from.
    pub fn clusters(&self) -> impl Iterator<Item = &Arc<str>> {
        self.providers.values().filter_map(|provider| match &provider.jwks {
            JwksSource::Remote(remote) => Some(&remote.cluster),
            _ => None,
        })
    }
}
