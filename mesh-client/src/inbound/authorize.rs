//! Policies from code: who is let in, which tokens are needed, how much is taken.

use super::jwt::FetchKeys;
use http::HeaderName;
use mesh_xds::resource::{
    AuditLogging, CidrRange, HeaderMatcher, HeaderMatcherKind, HttpFilter, HttpFilterConfig, JwksSource, JwtConfig,
    JwtProvider as ProviderConfig, JwtRequirement, JwtRule, JwtTokenCache, LocalDescriptor, LocalRateLimitConfig,
    MetadataMatcher, PathTemplate, PeerName, Permission, Principal, RateLimit as LimitConfig, RateLimitAction,
    RbacAction, RbacConfig, RbacPolicy, RbacRules, RemoteJwks, RouteMatch, SafeRegex, StringMatcher, StringPattern,
    TokenBucket, ValueMatcher, VirtualHostLimits,
};
use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

/// Who may do what: [`InboundBuilder::authorize`](super::InboundBuilder::authorize).
///
/// Rules are of two kinds. With [`allow`](Self::allow) only what one of them matches is let in; with [`deny`](Self::deny) what one of them matches is
/// refused. Several can be given: they are asked in the order in which they were.
///
/// ```
/// use mesh_client::inbound::{Rbac, Rule};
///
/// let shop = Rbac::allow()
///     .rule("cart", Rule::new().spiffe_id("spiffe://cluster.local/ns/shop/sa/cart").path("/shop.Orders/*"))
///     .rule("readers", Rule::new().namespace("web").method("GET"));
/// let no_admin = Rbac::deny().rule("admin", Rule::new().path("/admin*").not_namespace("ops"));
/// ```
#[derive(Clone, Debug)]
pub struct Rbac {
    rules: RbacRules,
    shadow: bool,
    /// Of its rules.
    wrong: Option<String>,
    tokens: bool,
}

/// One rule of an [`Rbac`]: what is said by different methods has to hold all; of what is said several times by one method, one
/// (of [`header`](Self::header) and [`claim`](Self::claim): by name). Two go together: a path is one of the paths and the templates that are
/// said. Each `not_…` holds for itself.
///
/// ```
/// use mesh_client::inbound::Rule;
///
/// // Of this trust domain, and of one of two namespaces.
/// let rule = Rule::new().spiffe_id("spiffe://cluster.local/*").namespace("shop").namespace("web");
/// ```
///
/// In texts `*` stands for anything at the beginning or at the end, as in Istio's AuthorizationPolicy; alone it stands for anything
/// that is there.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    permissions: Vec<(Kind, Permission)>,
    principals: Vec<(Kind, Principal)>,
    /// Why it can never mean what it says.
    wrong: Option<String>,
}

/// What is said in one way.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    SpiffeId,
    TrustDomain,
    Namespace,
    Authenticated,
    Token,
    Path,
    Method,
    Host,
    Port,
    Address,
    Header(String),
    Claim(String),
    /// Each for itself.
    Not(usize),
}

impl Rbac {
    /// Lets in what a rule matches, and nothing else. Without rules nobody is let in.
    pub fn allow() -> Self {
        Self::of(RbacAction::Allow)
    }

    /// Refuses what a rule matches. Of a [header](Rule::header) that comes several times one value is enough, as handlers read one of them.
    pub fn deny() -> Self {
        Self::of(RbacAction::Deny)
    }

    fn of(action: RbacAction) -> Self {
        Self { rules: RbacRules { action, ..RbacRules::default() }, shadow: false, wrong: None, tokens: false }
    }

    /// One more rule. The name is for logs, metrics and audit.
    #[must_use]
    pub fn rule(mut self, name: impl Into<Arc<str>>, rule: Rule) -> Self {
        let name = name.into();
        if let Some(wrong) = &rule.wrong {
            self.wrong.get_or_insert_with(|| format!("rule `{name}`: {wrong}"));
        }
        self.tokens |= rule.principals.iter().any(|(kind, _)| matches!(kind, Kind::Token | Kind::Claim(_)));
        self.rules.policies.push(rule.policy(name, self.rules.action == RbacAction::Deny));
        self
    }

    /// Evaluated, logged and counted, and not enforced: a dry run.
    #[must_use]
    pub fn shadow(mut self) -> Self {
        self.shadow = true;
        self
    }

    /// Tells these loggers of decisions.
    #[must_use]
    pub fn audit(mut self, audit: AuditLogging) -> Self {
        self.rules.audit = Some(audit);
        self
    }

    /// Why it can never mean what it says. `authenticated`: tokens are verified before it is asked.
    pub(super) fn wrong(&self, authenticated: bool) -> Option<String> {
        let blind = || "asks about tokens, and no `jwt` is given before it: it would never match".to_owned();
        self.wrong.clone().or_else(|| (self.tokens && !authenticated).then(blind))
    }

    pub(super) fn filter(self, name: impl Into<Arc<str>>) -> HttpFilter {
        let config = match self.shadow {
            true => RbacConfig { shadow_rules: Some(self.rules), ..RbacConfig::default() },
            false => RbacConfig { rules: Some(self.rules), ..RbacConfig::default() },
        };
        HttpFilter { name: name.into(), config: HttpFilterConfig::Rbac(Arc::new(config)), disabled: false }
    }
}

impl Rule {
    /// One that matches everything.
    pub fn new() -> Self {
        Self::default()
    }

    /// Callers whose certificate has this URI SAN, such as `spiffe://cluster.local/ns/shop/sa/cart` or `spiffe://cluster.local/*`.
    #[must_use]
    pub fn spiffe_id(self, id: &str) -> Self {
        self.principal(Kind::SpiffeId, of_uri(id))
    }

    /// Callers of this trust domain, such as `cluster.local`.
    #[must_use]
    pub fn trust_domain(self, domain: &str) -> Self {
        let pattern = StringPattern::Prefix(format!("spiffe://{domain}/"));
        let matcher = StringMatcher { pattern, ignore_case: false };
        self.principal(Kind::TrustDomain, Principal::Certificate(Some(PeerName::Uri(matcher))))
    }

    /// Callers of this namespace: a URI SAN is `spiffe://TRUST-DOMAIN/ns/NAMESPACE/...`, Istio's form of the id. Of whatever trust domain whose roots the
    /// server has: where others are federated, say which one as well ([`trust_domain`](Self::trust_domain)), as in
    /// [`not_namespace`](Self::not_namespace), where one of theirs is as good as ours.
    #[must_use]
    pub fn namespace(self, namespace: &str) -> Self {
        self.principal(Kind::Namespace, of_namespace(namespace))
    }

    /// Callers of any other, and those without an identity.
    #[must_use]
    pub fn not_namespace(self, namespace: &str) -> Self {
        let not = Principal::Not(Box::new(of_namespace(namespace)));
        let kind = Kind::Not(self.principals.len());
        self.principal(kind, not)
    }

    /// All callers but these.
    #[must_use]
    pub fn not_spiffe_id(self, id: &str) -> Self {
        let not = Principal::Not(Box::new(of_uri(id)));
        let kind = Kind::Not(self.principals.len());
        self.principal(kind, not)
    }

    /// Callers with a verified certificate.
    #[must_use]
    pub fn authenticated(self) -> Self {
        self.principal(Kind::Authenticated, Principal::Certificate(None))
    }

    /// Connections from this block of addresses.
    #[must_use]
    pub fn from_addresses(self, range: CidrRange) -> Self {
        self.principal(Kind::Address, Principal::RemoteIp(range))
    }

    /// Connections from elsewhere.
    #[must_use]
    pub fn not_from_addresses(self, range: CidrRange) -> Self {
        let kind = Kind::Not(self.principals.len());
        self.principal(kind, Principal::Not(Box::new(Principal::RemoteIp(range))))
    }

    /// Requests with a verified token of this issuer and subject; `*` in either.
    #[must_use]
    pub fn token(self, issuer: &str, subject: &str) -> Self {
        let both = vec![claim("iss", pattern(issuer), false), claim("sub", pattern(subject), false)];
        self.principal(Kind::Token, Principal::All(both))
    }

    /// Requests with a verified token whose claim has this value, or has it in its list.
    #[must_use]
    pub fn claim(self, name: &str, value: &str) -> Self {
        let either = vec![claim(name, pattern(value), false), claim(name, pattern(value), true)];
        self.principal(Kind::Claim(name.to_owned()), Principal::OneOf(either))
    }

    /// Requests for this path, without its query: byte by byte as it came. `/admin*` is not `/%61dmin`, `//admin` or `/x/../admin`, which what
    /// serves files or normalises paths takes for the same: before such a service, [`InboundBuilder::normalize_paths`] makes one of them, or
    /// say what is allowed instead of what is not.
    ///
    /// [`InboundBuilder::normalize_paths`]: super::InboundBuilder::normalize_paths
    #[must_use]
    pub fn path(self, path: &str) -> Self {
        self.permission(Kind::Path, Permission::UrlPath(pattern(path)))
    }

    /// Requests for any other path.
    #[must_use]
    pub fn not_path(self, path: &str) -> Self {
        let kind = Kind::Not(self.permissions.len());
        self.permission(kind, Permission::Not(Box::new(Permission::UrlPath(pattern(path)))))
    }

    /// Requests for a path of this template, such as `/orders/{id}/items`. Here its operators stand for any characters, also for those that no
    /// path should have: nobody gets around a rule by one.
    #[must_use]
    pub fn path_template(self, template: PathTemplate) -> Self {
        self.permission(Kind::Path, Permission::UriTemplate(Arc::new(template)))
    }

    /// Requests with this method.
    #[must_use]
    pub fn method(self, method: &str) -> Self {
        self.permission(Kind::Method, Permission::Header(header(":method", pattern(method))))
    }

    /// Requests for this authority, in any case. A port counts where one is said: without one `admin.test` is `admin.test:8080` too, and `admin.test.` with
    /// the final dot.
    #[must_use]
    pub fn host(self, host: &str) -> Self {
        let matcher = StringMatcher { ignore_case: true, ..of_host(&host.to_ascii_lowercase()) };
        self.permission(Kind::Host, Permission::Header(header(":authority", matcher)))
    }

    /// Requests with this header. Several values are joined with `,`; in an [`Rbac::deny`] each of them counts as well, by itself. A name that no header can
    /// have is an error of [`bind`](super::InboundBuilder::bind).
    #[must_use]
    pub fn header(mut self, name: &str, value: &str) -> Self {
        let name = name.to_ascii_lowercase();
        if HeaderName::from_bytes(name.as_bytes()).is_err() {
            self.wrong.get_or_insert_with(|| format!("`{name}` is not the name of a header"));
        }
        let permission = Permission::Header(header(&name, pattern(value)));
        self.permission(Kind::Header(name), permission)
    }

    /// Connections to this port.
    #[must_use]
    pub fn port(self, port: u16) -> Self {
        self.permission(Kind::Port, Permission::DestinationPort(port))
    }

    fn permission(mut self, kind: Kind, permission: Permission) -> Self {
        self.permissions.push((kind, permission));
        self
    }

    fn principal(mut self, kind: Kind, principal: Principal) -> Self {
        self.principals.push((kind, principal));
        self
    }

    fn policy(mut self, name: Arc<str>, denies: bool) -> RbacPolicy {
        if denies {
            // Whoever says a header twice says it.
            for (kind, permission) in &mut self.permissions {
                if let (Kind::Header(_), Permission::Header(header)) = (&*kind, &*permission) {
                    *permission = Permission::AnyHeader(header.clone());
                }
            }
        }
        let permissions = grouped(self.permissions).into_iter().map(Permission::OneOf).collect::<Vec<_>>();
        let principals = grouped(self.principals).into_iter().map(Principal::OneOf).collect::<Vec<_>>();
        RbacPolicy {
            name,
            permissions: vec![if permissions.is_empty() { Permission::Any } else { Permission::All(permissions) }],
            principals: vec![if principals.is_empty() { Principal::Any } else { Principal::All(principals) }],
        }
    }
}

/// What is said in one way belongs together.
fn grouped<T>(mut said: Vec<(Kind, T)>) -> Vec<Vec<T>> {
    said.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut groups: Vec<(Kind, Vec<T>)> = Vec::new();
    for (kind, one) in said {
        match groups.last_mut() {
            Some((of, group)) if *of == kind => group.push(one),
            _ => groups.push((kind, vec![one])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// Istio's texts: `*`, `*suffix`, `prefix*`, or the whole.
fn pattern(text: &str) -> StringMatcher {
    let of = |pattern| StringMatcher { pattern, ignore_case: false };
    match (text, text.strip_prefix('*'), text.strip_suffix('*')) {
        ("*", ..) => of(StringPattern::Regex(SafeRegex::new("(?s-u:.)+").expect("a constant that compiles"))),
        (_, Some(suffix), _) => of(StringPattern::Suffix(suffix.to_owned())),
        (_, None, Some(prefix)) => of(StringPattern::Prefix(prefix.to_owned())),
        _ => StringMatcher::exact(text),
    }
}

/// The host of an authority, with whatever port and final dot where the text has none.
fn of_host(host: &str) -> StringMatcher {
    let digits = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let port =
        host.rsplit_once(':').filter(|(name, port)| digits(port) && (!name.contains(':') || name.ends_with(']')));
    if port.is_some() || host.ends_with('*') {
        return pattern(host);
    }
    let (front, name) = host.strip_prefix('*').map_or(("", host), |name| ("(?s-u:.)*", name));
    let regex = SafeRegex::new(&format!(r"(?i){front}{}\.?(?::[0-9]*)?", regex::escape(name)));
    // Longer than any authority.
    regex.map_or_else(
        |_| pattern(host),
        |regex| StringMatcher { pattern: StringPattern::Regex(regex), ignore_case: true },
    )
}

/// A name in the subject or among the DNS names is no identity.
fn of_uri(id: &str) -> Principal {
    Principal::Certificate(Some(PeerName::Uri(pattern(id))))
}

/// Any URI SAN: a certificate that has several is no SPIFFE id, and its bearer is in each of the namespaces.
fn of_namespace(namespace: &str) -> Principal {
    let (front, middle) = match namespace.strip_prefix('*') {
        _ if namespace == "*" => ("[^/]+", ""),
        Some(rest) => ("[^/]*", rest),
        None => ("", namespace),
    };
    let (middle, back) = match middle.strip_suffix('*') {
        Some(rest) if front.is_empty() => (rest, "[^/]*"),
        _ => (middle, ""),
    };
    let regex = format!("spiffe://[^/]+/ns/{front}{}{back}/.+", regex::escape(middle));
    match SafeRegex::new(&regex) {
        Ok(regex) => {
            let matcher = StringMatcher { pattern: StringPattern::Regex(regex), ignore_case: false };
            Principal::Certificate(Some(PeerName::Uri(matcher)))
        }
        // Longer than any SAN.
        Err(_) => Principal::Not(Box::new(Principal::Any)),
    }
}

fn header(name: &str, matcher: StringMatcher) -> HeaderMatcher {
    let kind = HeaderMatcherKind::String(matcher);
    HeaderMatcher { name: name.to_owned(), kind, invert: false, treat_missing_as_empty: false }
}

/// Under which tokens are known to RBAC, as Istio has it.
const PAYLOAD: &str = "payload";

fn claim(name: &str, matcher: StringMatcher, list: bool) -> Principal {
    let value = ValueMatcher::String(matcher);
    Principal::Metadata(MetadataMatcher {
        filter: "envoy.filters.http.jwt_authn".into(),
        path: vec![PAYLOAD.to_owned(), name.to_owned()],
        value: if list { ValueMatcher::List(Box::new(value)) } else { value },
        invert: false,
    })
}

/// An issuer of tokens: [`InboundBuilder::jwt`](super::InboundBuilder::jwt), alone or in a [`JwtAuthentication`].
#[derive(Clone)]
pub struct JwtProvider {
    config: ProviderConfig,
    optional: bool,
    fetch: Option<Arc<dyn FetchKeys>>,
}

impl JwtProvider {
    /// One whose keys are given: a JSON Web Key Set, as text.
    pub fn inline(issuer: impl Into<String>, jwks: impl Into<Arc<str>>) -> Self {
        Self::of(issuer, JwksSource::Inline(jwks.into()), None)
    }

    /// One whose keys are in a file, which is read again when it changes.
    pub fn file(issuer: impl Into<String>, path: impl Into<Arc<str>>) -> Self {
        Self::of(issuer, JwksSource::File(path.into()), None)
    }

    /// One whose keys are fetched, when they are first needed and each ten minutes. While they cannot be, the last good ones are used
    /// for an hour more ([`stale_keys`](Self::stale_keys)).
    pub fn fetched_by(issuer: impl Into<String>, fetch: Arc<dyn FetchKeys>) -> Self {
        let issuer = issuer.into();
        let remote = RemoteJwks {
            uri: http::Uri::from_static("http://jwks/"),
            cluster: format!("code/{issuer}/{:p}", Arc::as_ptr(&fetch)).into(),
            timeout: Duration::from_secs(5),
            cache_duration: Duration::from_secs(600),
            async_fetch: false,
            failed_refetch: Duration::from_secs(1),
            retries: 1,
            stale: Duration::from_secs(3600),
        };
        Self::of(issuer, JwksSource::Remote(remote), Some(fetch))
    }

    /// The same, from `uri` over a channel of a mesh.
    pub fn fetched(issuer: impl Into<String>, channel: crate::MeshChannel, uri: http::Uri) -> Self {
        Self::fetched_by(issuer, Arc::new(super::jwt::Fetched { channel, uri }))
    }

    /// JWT SVIDs (SPIFFE): tokens for `audience`, whose subject is a SPIFFE id of one of the trust domains of `bundles`, signed by a key of that one.
    /// They have to have an expiry, and may have any issuer. Keys that are replaced count at once, and while no new ones can be had the last ones do.
    ///
    /// ```no_run
    /// # async fn run(endpoint: mesh_tls::WorkloadEndpoint) -> Result<(), Box<dyn std::error::Error>> {
    /// use mesh_client::{Inbound, inbound::{JwtProvider, Rbac, Rule}};
    /// use mesh_tls::{WorkloadApiConfig, WorkloadApiSource};
    ///
    /// let config = WorkloadApiConfig::new("agent", endpoint, mesh_tls::default_provider());
    /// let agent = WorkloadApiSource::new(config, &tokio::runtime::Handle::current());
    /// let inbound = Inbound::builder()
    ///     .jwt(JwtProvider::spiffe(agent.jwt_bundles(), "orders"))
    ///     .authorize(Rbac::allow().rule("cart", Rule::new().claim("sub", "spiffe://cluster.local/ns/shop/sa/cart")))
    ///     .bind("0.0.0.0:8080")
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn spiffe(bundles: mesh_tls::JwtBundles, audience: impl Into<String>) -> Self {
        let mut provider = Self::fetched_by("", Arc::new(bundles)).audience(audience).stale_keys(Duration::MAX);
        provider.config.require_expiration = true;
        provider
    }

    fn of(issuer: impl Into<String>, jwks: JwksSource, fetch: Option<Arc<dyn FetchKeys>>) -> Self {
        let mut config = ProviderConfig::new(issuer, jwks);
        config.payload_in_metadata = PAYLOAD.to_owned();
        config.cache = Some(JwtTokenCache { tokens: 1000, max_length: 4096 });
        config.forward = true;
        Self { config, optional: false, fetch }
    }

    /// `aud` has to have one of those that are given.
    #[must_use]
    pub fn audience(mut self, audience: impl Into<String>) -> Self {
        self.config.audiences.push(audience.into());
        self
    }

    /// Requests without a token are let in; a bad one is refused all the same.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    /// How much longer than the ten minutes for which they are good fetched keys are used while they cannot be fetched again. Default one hour; zero: tokens are then
    /// refused. Nothing for keys that are given or in a file: the last good ones of a file are used for ever.
    #[must_use]
    pub fn stale_keys(mut self, longest: Duration) -> Self {
        if let JwksSource::Remote(remote) = &mut self.config.jwks {
            remote.stale = longest;
        }
        self
    }

    /// All else that Envoy's providers can say.
    #[must_use]
    pub fn configure(mut self, change: impl FnOnce(&mut ProviderConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// Who fetches its keys.
    fn own_keys(&self) -> Option<OwnKeys> {
        let JwksSource::Remote(remote) = &self.config.jwks else { return None };
        Some((remote.cluster.clone(), self.fetch.clone()?))
    }
}

/// Which tokens requests need: [`InboundBuilder::jwt`](super::InboundBuilder::jwt).
///
/// ```no_run
/// # fn of(staff: mesh_client::inbound::JwtProvider, customers: mesh_client::inbound::JwtProvider) {
/// use mesh_client::inbound::{Inbound, JwtAuthentication};
///
/// let builder = Inbound::builder().jwt(JwtAuthentication::any_of([staff, customers]).optional());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct JwtAuthentication {
    providers: Vec<JwtProvider>,
    optional: bool,
}

impl JwtAuthentication {
    /// A token of one of these issuers. Each [`jwt`](super::InboundBuilder::jwt) is asked for itself: two of them want a token of each.
    ///
    /// Without any nobody is let in.
    pub fn any_of(providers: impl IntoIterator<Item = JwtProvider>) -> Self {
        let providers: Vec<_> = providers.into_iter().collect();
        let optional = providers.iter().any(|provider| provider.optional);
        Self { providers, optional }
    }

    /// Requests without a token are let in; a bad one is refused all the same.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }

    pub(super) fn filter(self, name: impl Into<Arc<str>>) -> (HttpFilter, Vec<OwnKeys>) {
        let fetches = self.providers.iter().filter_map(JwtProvider::own_keys).collect();
        let named = |(index, provider): (usize, JwtProvider)| -> (Arc<str>, _) {
            (format!("{} #{index}", provider.config.issuer).into(), Arc::new(provider.config))
        };
        let providers: BTreeMap<_, _> = self.providers.into_iter().enumerate().map(named).collect();
        let one = |name: &Arc<str>| JwtRequirement::Provider { name: name.clone(), audiences: None };
        let mut any: Vec<_> = providers.keys().map(one).collect();
        if self.optional {
            any.push(JwtRequirement::AllowMissing);
        }
        let requirement = Some(JwtRequirement::OneOf(any));
        let rules = vec![JwtRule { matches: RouteMatch::default(), requirement }];
        let config = HttpFilterConfig::Jwt(Arc::new(JwtConfig { providers, rules, ..JwtConfig::default() }));
        (HttpFilter { name: name.into(), config, disabled: false }, fetches)
    }
}

impl From<JwtProvider> for JwtAuthentication {
    fn from(provider: JwtProvider) -> Self {
        Self::any_of([provider])
    }
}

/// Who fetches the keys of the cluster of this name.
pub(super) type OwnKeys = (Arc<str>, Arc<dyn FetchKeys>);

impl fmt::Debug for JwtProvider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtProvider")
            .field("config", &self.config)
            .field("optional", &self.optional)
            .finish_non_exhaustive()
    }
}

/// How many requests are taken: [`InboundBuilder::rate_limit`](super::InboundBuilder::rate_limit). What is above is answered with 429
/// (gRPC: RESOURCE_EXHAUSTED). No requests at all, or in no time, is an error of [`bind`](super::InboundBuilder::bind).
#[derive(Clone, Debug)]
pub struct RateLimit {
    bucket: TokenBucket,
    per: Option<RateLimitAction>,
    callers: usize,
}

impl RateLimit {
    /// Of all callers together: so many in each `period`, and as many at once.
    pub fn total(requests: u32, period: Duration) -> Self {
        let bucket = TokenBucket { max_tokens: requests, tokens_per_fill: requests, fill_interval: period };
        Self { bucket, per: None, callers: 10_000 }
    }

    /// Of each caller, by the SPIFFE id; those without one share a limit.
    pub fn per_identity(requests: u32, period: Duration) -> Self {
        Self { per: Some(RateLimitAction::PeerPrincipal { key: "peer".into() }), ..Self::total(requests, period) }
    }

    /// Of each address; of IPv6, of each /64, which is what one customer has.
    pub fn per_address(requests: u32, period: Duration) -> Self {
        Self { per: Some(RateLimitAction::MaskedRemoteAddress { v4: 32, v6: 64 }), ..Self::total(requests, period) }
    }

    /// So many at once.
    #[must_use]
    pub fn burst(mut self, requests: u32) -> Self {
        self.bucket.max_tokens = requests;
        self
    }

    /// Why it is no limit.
    pub(super) fn wrong(&self) -> Option<String> {
        let TokenBucket { max_tokens, tokens_per_fill, fill_interval } = self.bucket;
        let none = max_tokens == 0 || tokens_per_fill == 0 || fill_interval < Duration::from_millis(1);
        none.then(|| format!("{tokens_per_fill} requests in {fill_interval:?}, {max_tokens} at once, is no limit"))
    }

    pub(super) fn filter(self, name: impl Into<Arc<str>>) -> HttpFilter {
        let (bucket, descriptors, rate_limits) = match self.per {
            None => (Some(self.bucket), Vec::new(), Vec::new()),
            Some(action) => {
                let key: Arc<str> = match &action {
                    RateLimitAction::PeerPrincipal { key } => key.clone(),
                    _ => "masked_remote_address".into(),
                };
                let descriptor =
                    LocalDescriptor { entries: vec![(key, "".into())], bucket: self.bucket, shadow: false };
                (None, vec![descriptor], vec![LimitConfig { stage: 0, actions: vec![action], hits_addend: None }])
            }
        };
        let config = LocalRateLimitConfig {
            bucket,
            descriptors,
            rate_limits,
            virtual_host: VirtualHostLimits::Ignore,
            retry_after: true,
            resource_exhausted: true,
            max_dynamic: self.callers,
            ..LocalRateLimitConfig::of(self.bucket)
        };
        HttpFilter { name: name.into(), config: HttpFilterConfig::LocalRateLimit(Arc::new(config)), disabled: false }
    }
}
