//! JWT authentication of requests (Envoy's `jwt_authn`): tokens are found, verified, and what they say is told on.

mod keys;
mod locate;
mod store;
#[cfg(test)]
mod tests;
mod token;

pub(crate) use keys::KeySet;
pub use store::FetchKeys;
pub(crate) use store::{Fetched, KeyStore, Shelf};
pub(crate) use token::Token;

use crate::outbound::{
    filter::Reply,
    route::{Matcher, RequestHead},
};
use http::{HeaderName, HeaderValue, Method, header, request};
use locate::{Found, Place};
use mesh_tls::CryptoProvider;
use mesh_xds::resource::{JwtConfig, JwtOfRoute, JwtProvider, JwtRequirement, RemoteJwks};
use serde_json::{Map, Value};
use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::SystemTime,
};
use store::Why;
use token::Failure;

/// A JWT filter of one route, compiled.
pub(crate) struct Authentication {
    needs: Needs,
    /// Taken away from every request: only we say what is in them.
    ours: Box<[HeaderName]>,
    bypass_cors: bool,
    strip: bool,
    provider: Arc<CryptoProvider>,
}

enum Needs {
    ByRule(Box<[(Matcher, Option<Need>)]>),
    Always(Need),
}

/// What a request needs.
enum Need {
    Of(Arc<Issuer>, Option<Vec<String>>),
    OneOf(Box<[Self]>),
    All(Box<[Self]>),
    /// A token of one of these, or none.
    Optional(Box<[Arc<Issuer>]>),
    /// The same, and bad ones are ignored.
    Ignored(Box<[Arc<Issuer>]>),
    /// The route names one that is not configured.
    Unknown,
}

/// One provider, and its keys.
struct Issuer {
    config: Arc<JwtProvider>,
    keys: Arc<KeyStore>,
    places: Box<[Place]>,
    /// Tokens that were good.
    kept: Option<Mutex<Kept>>,
}

/// By the keys that verified them.
#[derive(Default)]
struct Kept {
    by: Option<Arc<KeySet>>,
    tokens: HashMap<Box<str>, Arc<Good>>,
}

/// A verified token, and what is done with it.
struct Good {
    header: Value,
    payload: Value,
    encoded: Box<str>,
}

/// What the tokens of a request say: in the extensions of the request, for handlers.
#[derive(Clone, Debug)]
pub struct JwtClaims(Arc<Learnt>);

/// What tokens say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learnt {
    payloads: Vec<Value>,
    /// For RBAC: by the names of `payload_in_metadata` and `header_in_metadata`.
    pub(super) metadata: Value,
}

/// What is known without waiting.
pub(super) enum Checked {
    Passed(Option<JwtClaims>),
    Refused(Reply),
    /// Keys have to be fetched.
    Fetching,
}

/// Why a need is not met.
enum Unmet {
    Failed(Failure),
    Fetch(Arc<KeyStore>, Why),
}

/// A token that met a need.
struct Met<'r> {
    issuer: Arc<Issuer>,
    good: Arc<Good>,
    found: Found<'r>,
}

/// What keys are had by.
pub(super) struct Keys<'a> {
    pub(super) shelf: &'a Shelf,
    pub(super) provider: Arc<CryptoProvider>,
    /// How keys of a cluster are fetched.
    pub(super) fetch: &'a dyn Fn(&RemoteJwks) -> Option<Arc<dyn FetchKeys>>,
}

impl JwtClaims {
    /// The payloads of the verified tokens, those of earlier filters first.
    pub fn payloads(&self) -> &[Value] {
        &self.0.payloads
    }

    /// A claim of the first token that has it.
    pub fn get(&self, claim: &str) -> Option<&Value> {
        self.0.payloads.iter().find_map(|payload| payload.get(claim))
    }

    /// `iss` of the first token.
    pub fn issuer(&self) -> Option<&str> {
        self.0.payloads.first()?.get("iss")?.as_str()
    }

    /// `sub` of the first token.
    pub fn subject(&self) -> Option<&str> {
        self.0.payloads.first()?.get("sub")?.as_str()
    }

    pub(super) fn metadata(&self) -> &Value {
        &self.0.metadata
    }
}

impl Authentication {
    pub(super) fn compile(config: &JwtConfig, of_route: Option<&JwtOfRoute>, keys: &Keys<'_>) -> Result<Self, String> {
        let mut issuers = BTreeMap::new();
        for (name, provider) in &config.providers {
            let store = keys.shelf.store(&provider.jwks, keys.fetch);
            let store = store.map_err(|error| format!("the keys of provider `{name}`: {error}"))?;
            issuers.insert(name.clone(), Arc::new(Issuer::new(provider, store)));
        }
        let all: Vec<_> = issuers.values().cloned().collect();
        let needs = match of_route {
            Some(JwtOfRoute::Requirement(name)) => Needs::Always(
                config.requirements.get(name).map_or(Need::Unknown, |need| Need::compile(need, &issuers, &all)),
            ),
            _ => Needs::ByRule(
                config
                    .rules
                    .iter()
                    .map(|rule| {
                        let need = rule.requirement.as_ref().map(|need| Need::compile(need, &issuers, &all));
                        (Matcher::of_server(&rule.matches), need)
                    })
                    .collect(),
            ),
        };
        Ok(Self { needs, ..Self::without(config, keys.provider.clone()) })
    }

    /// One that asks for nothing.
    pub(super) fn without(config: &JwtConfig, provider: Arc<CryptoProvider>) -> Self {
        let ours = config.providers.values().flat_map(|provider| {
            let claims = provider.claim_to_headers.iter().map(|claim| &claim.header);
            provider.forward_payload_header.iter().chain(claims).cloned()
        });
        Self {
            needs: Needs::ByRule(Box::default()),
            ours: ours.collect(),
            bypass_cors: config.bypass_cors_preflight,
            strip: config.strip_failure_response,
            provider,
        }
    }

    /// Whether it changes requests also where it asks for nothing.
    pub(super) fn edits(&self) -> bool {
        !self.ours.is_empty()
    }

    /// Decides, if nothing has to be fetched. What tokens say goes into the head.
    pub(super) fn check(&self, head: &mut request::Parts) -> Checked {
        match self.met(head, &[]) {
            Ok(met) => Checked::Passed(self.pass(met, head)),
            Err(Unmet::Failed(failure)) => Checked::Refused(self.refuse(failure, head)),
            Err(Unmet::Fetch(..)) => Checked::Fetching,
        }
    }

    /// The same, with all the time it takes: each set of keys is fetched once at most.
    pub(super) async fn fetched(&self, head: &mut request::Parts) -> Result<Option<JwtClaims>, Reply> {
        let mut tried: Vec<Arc<KeyStore>> = Vec::new();
        loop {
            match self.met(head, &tried) {
                Ok(met) => return Ok(self.pass(met, head)),
                Err(Unmet::Failed(failure)) => return Err(self.refuse(failure, head)),
                Err(Unmet::Fetch(store, why)) => {
                    store.fetched(why).await;
                    tried.push(store);
                }
            }
        }
    }

    /// The tokens that meet what the request needs.
    fn met(&self, head: &request::Parts, tried: &[Arc<KeyStore>]) -> Result<Vec<Used>, Unmet> {
        let asked = RequestHead::of(head);
        if self.bypass_cors && is_preflight(head) {
            return Ok(Vec::new());
        }
        let need = match &self.needs {
            Needs::Always(need) => Some(need),
            Needs::ByRule(rules) => {
                let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
                rules.iter().find(|(matcher, _)| matcher.matches(&asked, &mut rng)).and_then(|(_, need)| need.as_ref())
            }
        };
        let Some(need) = need else { return Ok(Vec::new()) };
        let mut met = Vec::new();
        need.check(&asked, &Checking { tried, provider: &self.provider, now: SystemTime::now() }, &mut met)?;
        Ok(met.into_iter().map(|met| Used { issuer: met.issuer, good: met.good, at: met.found.at }).collect())
    }

    /// Tells on what tokens say, and takes them out of the request.
    fn pass(&self, met: Vec<Used>, head: &mut request::Parts) -> Option<JwtClaims> {
        for name in &self.ours {
            head.headers.remove(name);
        }
        if met.is_empty() {
            return None;
        }
        // What an earlier filter learnt stays; where both tell it under one name, the later does (Envoy: MergeFrom).
        let before = head.extensions.remove::<JwtClaims>();
        let Learnt { mut payloads, metadata } = before.map(|before| Arc::unwrap_or_clone(before.0)).unwrap_or_default();
        let mut metadata = match metadata {
            Value::Object(metadata) => metadata,
            _ => Map::new(),
        };
        for Used { issuer, good, at } in met {
            let config = &issuer.config;
            if let Some(name) = &config.forward_payload_header {
                let padding = if config.pad_forward_payload_header { (4 - good.encoded.len() % 4) % 4 } else { 0 };
                let value = format!("{}{}", good.encoded, "=".repeat(padding));
                if let Ok(value) = HeaderValue::try_from(value) {
                    head.headers.append(name, value);
                }
            }
            for claim in &config.claim_to_headers {
                let value = claim.path.iter().try_fold(&good.payload, |value, key| value.get(key.as_str()));
                if let Some(value) = value.and_then(text_of).and_then(|text| HeaderValue::try_from(text).ok()) {
                    head.headers.append(&claim.header, value);
                }
            }
            if !config.forward {
                at.take_out(head);
            }
            if !config.payload_in_metadata.is_empty() {
                let payload = normalized(&good.payload, &config.space_delimited_claims);
                metadata.insert(config.payload_in_metadata.clone(), payload);
            }
            if !config.header_in_metadata.is_empty() {
                metadata.insert(config.header_in_metadata.clone(), good.header.clone());
            }
            payloads.push(good.payload.clone());
        }
        let claims = JwtClaims(Arc::new(Learnt { payloads, metadata: Value::Object(metadata) }));
        head.extensions.insert(claims.clone());
        Some(claims)
    }

    /// Envoy's answer: the reason as its body, and where to send a token.
    fn refuse(&self, failure: Failure, head: &request::Parts) -> Reply {
        metrics::counter!("mesh_jwt_denied_total", "reason" => failure.to_string()).increment(1);
        let details = format!("jwt_authn_access_denied{{{}}}", failure.to_string().replace(' ', "_"));
        if self.strip {
            return Reply::new(failure.status(), "").grpc_status(16).details(details);
        }
        let asked = RequestHead::new(&head.method, &head.uri, &head.headers);
        let error = if failure == Failure::Missing { "" } else { ", error=\"invalid_token\"" };
        let uri = format!("{}://{}{}", asked.scheme(), asked.authority, asked.path()).replace(['"', '\\'], "");
        let uri: String = uri.chars().take(256).collect();
        let reply = Reply::new(failure.status(), failure.to_string()).details(details);
        let reply = reply.grpc_status(if failure.status() == http::StatusCode::FORBIDDEN { 7 } else { 16 });
        match HeaderValue::try_from(format!("Bearer realm=\"{uri}\"{error}")) {
            Ok(value) => reply.header(header::WWW_AUTHENTICATE, value),
            Err(_) => reply,
        }
    }
}

/// A token that met a need, without the request.
struct Used {
    issuer: Arc<Issuer>,
    good: Arc<Good>,
    at: locate::At,
}

struct Checking<'c> {
    /// Fetched for this request already.
    tried: &'c [Arc<KeyStore>],
    provider: &'c CryptoProvider,
    now: SystemTime,
}

impl Need {
    fn compile(need: &JwtRequirement, issuers: &BTreeMap<Arc<str>, Arc<Issuer>>, beside: &[Arc<Issuer>]) -> Self {
        match need {
            JwtRequirement::Provider { name, audiences } => match issuers.get(name) {
                Some(issuer) => Self::Of(issuer.clone(), audiences.clone()),
                None => Self::Unknown,
            },
            JwtRequirement::OneOf(any) => {
                // Those that are met without a token come last, and look where their siblings look (Envoy).
                let own: Vec<_> = any
                    .iter()
                    .filter_map(|one| match one {
                        JwtRequirement::Provider { name, .. } => issuers.get(name).cloned(),
                        _ => None,
                    })
                    .collect();
                let lenient = |one: &&JwtRequirement| {
                    matches!(one, JwtRequirement::AllowMissing | JwtRequirement::AllowMissingOrFailed)
                };
                let beside = if own.is_empty() { beside } else { &own };
                let ordered = any.iter().filter(|one| !lenient(one)).chain(any.iter().filter(lenient));
                Self::OneOf(ordered.map(|one| Self::compile(one, issuers, beside)).collect())
            }
            JwtRequirement::All(all) => Self::All(all.iter().map(|one| Self::compile(one, issuers, beside)).collect()),
            JwtRequirement::AllowMissing => Self::Optional(beside.into()),
            JwtRequirement::AllowMissingOrFailed => Self::Ignored(beside.into()),
            _ => Self::Unknown,
        }
    }

    fn check<'r>(&self, head: &RequestHead<'r>, checking: &Checking<'_>, met: &mut Vec<Met<'r>>) -> Result<(), Unmet> {
        match self {
            Self::Unknown => Err(Unmet::Failed(Failure::Requirement)),
            Self::Of(issuer, audiences) => {
                let found = issuer.find(head);
                if found.is_empty() {
                    return Err(Unmet::Failed(Failure::Missing));
                }
                // All have to be good: the handler may look at any of them.
                for found in found {
                    met.push(issuer.verify(found, audiences.as_deref(), checking)?);
                }
                Ok(())
            }
            Self::All(all) => all.iter().try_for_each(|one| one.check(head, checking, met)),
            Self::OneOf(any) => {
                let mut last = Failure::Missing;
                for one in any {
                    let before = met.len();
                    match one.check(head, checking, met) {
                        Ok(()) => return Ok(()),
                        Err(Unmet::Failed(failure)) => {
                            met.truncate(before);
                            if failure.says() >= last.says() {
                                last = failure;
                            }
                        }
                        Err(fetch) => return Err(fetch),
                    }
                }
                Err(Unmet::Failed(last))
            }
            Self::Optional(issuers) => each_token(issuers, head, checking, met),
            Self::Ignored(issuers) => {
                let before = met.len();
                match each_token(issuers, head, checking, met) {
                    Err(Unmet::Failed(_)) => {
                        met.truncate(before);
                        Ok(())
                    }
                    other => other,
                }
            }
        }
    }
}

/// Every token where these issuers' are is a good one of theirs.
fn each_token<'r>(
    issuers: &[Arc<Issuer>],
    head: &RequestHead<'r>,
    checking: &Checking<'_>,
    met: &mut Vec<Met<'r>>,
) -> Result<(), Unmet> {
    let mut seen: Vec<Found<'r>> = Vec::new();
    for found in issuers.iter().flat_map(|issuer| issuer.find(head)) {
        if !seen.contains(&found) {
            seen.push(found);
        }
    }
    for found in seen {
        let token = Token::parse(&found.text).map_err(Unmet::Failed)?;
        let of = |exact: bool| {
            issuers.iter().find(|issuer| {
                let own = &issuer.config.issuer;
                (if exact { own == token.issuer() } else { own.is_empty() }) && issuer.find(head).contains(&found)
            })
        };
        let issuer = of(true).or_else(|| of(false)).ok_or(Unmet::Failed(Failure::Issuer))?.clone();
        met.push(issuer.verify(found.clone(), None, checking)?);
    }
    Ok(())
}

impl Issuer {
    fn new(config: &Arc<JwtProvider>, keys: Arc<KeyStore>) -> Self {
        let kept = config.cache.map(|_| Mutex::default());
        Self { config: config.clone(), keys, places: Place::all(config), kept }
    }

    /// Each once.
    fn find<'r>(&self, head: &RequestHead<'r>) -> Vec<Found<'r>> {
        let mut found = Vec::new();
        self.places.iter().for_each(|place| place.find(head, &mut found));
        found
    }

    fn verify<'r>(
        self: &Arc<Self>,
        found: Found<'r>,
        audiences: Option<&[String]>,
        checking: &Checking<'_>,
    ) -> Result<Met<'r>, Unmet> {
        let token = Token::parse(&found.text).map_err(Unmet::Failed)?;
        token.check(&self.config, audiences, checking.now).map_err(Unmet::Failed)?;
        let tried = checking.tried.iter().any(|store| Arc::ptr_eq(store, &self.keys));
        let Some(keys) = self.keys.keys() else {
            let failed = Unmet::Failed(Failure::Fetch);
            return Err(if tried { failed } else { Unmet::Fetch(self.keys.clone(), Why::Needed) });
        };
        if let Some(good) = self.kept(&keys, &found.text) {
            return Ok(Met { issuer: self.clone(), good, found });
        }
        match keys.verify(&token, checking.provider) {
            Ok(()) => {}
            Err(Failure::NoKey) if !tried && self.keys.may_learn() => {
                return Err(Unmet::Fetch(self.keys.clone(), Why::Unknown));
            }
            Err(failure) => return Err(Unmet::Failed(failure)),
        }
        let good = Arc::new(Good { encoded: token.encoded.into(), header: token.header, payload: token.payload });
        self.keep(&keys, &found.text, &good);
        Ok(Met { issuer: self.clone(), good, found })
    }

    fn kept(&self, keys: &Arc<KeySet>, text: &str) -> Option<Arc<Good>> {
        let kept = self.kept.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        let same = kept.by.as_ref().is_some_and(|by| Arc::ptr_eq(by, keys));
        same.then(|| kept.tokens.get(text).cloned()).flatten()
    }

    fn keep(&self, keys: &Arc<KeySet>, text: &str, good: &Arc<Good>) {
        let (Some(kept), Some(limits)) = (&self.kept, self.config.cache) else { return };
        if text.len() > limits.max_length {
            return;
        }
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.by.as_ref().is_none_or(|by| !Arc::ptr_eq(by, keys)) {
            *kept = Kept { by: Some(keys.clone()), tokens: HashMap::new() };
        }
        if kept.tokens.len() >= limits.tokens
            && let Some(any) = kept.tokens.keys().next().cloned()
        {
            kept.tokens.remove(&any);
        }
        kept.tokens.insert(text.into(), good.clone());
    }
}

fn is_preflight(head: &request::Parts) -> bool {
    let has = |name: HeaderName| head.headers.get(name).is_some_and(|value| !value.is_empty());
    head.method == Method::OPTIONS && has(header::ORIGIN) && has(header::ACCESS_CONTROL_REQUEST_METHOD)
}

/// Only simple values become headers (Envoy).
fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(value) => Some(value.to_string()),
        _ => None,
    }
}

/// Strings of words become lists, where it is said so.
fn normalized(payload: &Value, claims: &[String]) -> Value {
    let mut payload = payload.clone();
    for claim in claims {
        if let Some(value) = payload.get_mut(claim)
            && let Some(words) = value.as_str()
        {
            *value = words.split(' ').filter(|word| !word.is_empty()).map(Value::from).collect();
        }
    }
    payload
}

impl fmt::Debug for Authentication {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authentication").finish_non_exhaustive()
    }
}
