//! The compiled rules against a naive reading of the same, and the cases of gRFC A41 one by one.

mod builder;

use super::*;
use crate::outbound::route::RequestHead;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_xds::resource::{
    AuditLogging, CidrRange, HeaderMatcher, HeaderMatcherKind, HttpFilterConfig, MetadataMatcher, PeerName, Permission,
    Principal, RbacPolicy, SafeRegex, StringMatcher, StringPattern, ValueMatcher,
};
use proptest::prelude::*;
use serde_json::json;
use std::{
    net::{IpAddr, SocketAddr},
    sync::Mutex,
};

/// A request that owns what it is made of.
#[derive(Clone, Debug)]
struct Request {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    remote: SocketAddr,
    local: SocketAddr,
    tls: bool,
    sni: String,
    uris: Vec<String>,
    dns: Vec<String>,
    certificate: bool,
    claims: Option<serde_json::Value>,
}

impl Request {
    fn new(path: &str) -> Self {
        Self {
            method: Method::GET,
            uri: path.parse().unwrap(),
            headers: HeaderMap::new(),
            remote: "10.1.2.3:999".parse().unwrap(),
            local: "192.168.0.1:8080".parse().unwrap(),
            tls: false,
            sni: String::new(),
            uris: Vec::new(),
            dns: Vec::new(),
            certificate: false,
            claims: None,
        }
    }

    fn from(id: &str) -> Self {
        Self { tls: true, certificate: true, uris: vec![id.to_owned()], ..Self::new("/") }
    }

    fn with(mut self, name: &'static str, value: &str) -> Self {
        self.headers.append(HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
        self
    }

    fn asked(&self) -> Asked<'_> {
        let spiffe = match &self.uris[..] {
            [one] if one.starts_with("spiffe://") => Some(one.as_str()),
            _ => None,
        };
        let certificate = Certificate { uris: &self.uris, dns: &self.dns, ips: &[], subject: "CN=client", spiffe };
        Asked {
            head: RequestHead::new(&self.method, &self.uri, &self.headers),
            caller: Caller {
                remote: self.remote,
                local: self.local,
                tls: self.tls,
                server_name: &self.sni,
                certificate: self.certificate.then_some(certificate),
            },
            claims: self.claims.as_ref(),
        }
    }
}

fn rules(action: RbacAction, policies: Vec<(&str, Permission, Principal)>) -> RbacRules {
    let policies = policies.into_iter().map(|(name, permission, principal)| RbacPolicy {
        name: name.into(),
        permissions: vec![permission],
        principals: vec![principal],
    });
    RbacRules { action, policies: policies.collect(), audit: None }
}

fn compiled(rules: RbacRules) -> Authorization {
    let config = RbacConfig { rules: Some(rules), ..RbacConfig::default() };
    Authorization::compile(&"authz".into(), &config).unwrap()
}

fn allowed(permission: Permission, principal: Principal, request: &Request) -> bool {
    compiled(rules(RbacAction::Allow, vec![("p", permission, principal)])).check(&request.asked()).is_ok()
}

fn permits(permission: Permission, request: &Request) -> bool {
    allowed(permission, Principal::Any, request)
}

fn is(principal: Principal, request: &Request) -> bool {
    allowed(Permission::Any, principal, request)
}

fn text(pattern: StringPattern) -> StringMatcher {
    StringMatcher { pattern, ignore_case: false }
}

fn header(name: &str, kind: HeaderMatcherKind) -> HeaderMatcher {
    HeaderMatcher { name: name.into(), kind, invert: false, treat_missing_as_empty: false }
}

fn header_is(name: &str, value: &str) -> HeaderMatcher {
    header(name, HeaderMatcherKind::String(StringMatcher::exact(value)))
}

#[test]
fn a_namespace_is_a_whole_segment_of_any_uri() {
    use crate::inbound::{Rbac, Rule as Said};
    let asked = |rule: Said, uris: &[&str]| {
        let HttpFilterConfig::Rbac(config) = Rbac::allow().rule("p", rule).filter("authz").config else { panic!() };
        let uris = uris.iter().map(|uri| (*uri).to_owned()).collect();
        let request = Request { uris, ..Request::from("") };
        Authorization::compile(&"authz".into(), &config).unwrap().check(&request.asked()).is_ok()
    };
    let (web, shop) = ("spiffe://a/ns/web/sa/x", "spiffe://b/ns/shop/sa/x");
    for (namespace, uris, is) in [
        ("web", &[web][..], true),
        ("web", &[shop], false),
        ("web", &[shop, web], true),
        ("web", &["https://a/ns/web/sa/x"], false),
        ("web", &["spiffe://a/ns/web"], false),
        ("web", &["spiffe://a/ns/web/"], false),
        ("web", &["spiffe://a/x/ns/web/sa/x"], false),
        ("web", &["spiffe://b/ns/shop/sa/ns/web/x"], false),
        ("web", &["spiffe:///ns/web/sa/x"], false),
        ("we", &[web], false),
        ("w.b", &[web], false),
        ("we*", &[web], true),
        ("*eb", &[web], true),
        ("*hop*", &[shop], false),
        ("*", &[web], true),
        ("*", &["spiffe://a/x/y"], false),
        ("web/sa", &["spiffe://a/ns/web/sa/x"], true),
    ] {
        assert_eq!(asked(Said::new().namespace(namespace), uris), is, "{namespace} {uris:?}");
        assert_eq!(asked(Said::new().not_namespace(namespace), uris), !is, "not {namespace} {uris:?}");
    }
    let endless = "w".repeat(1 << 20);
    assert!(!asked(Said::new().namespace(&endless), &[web]) && asked(Said::new().not_namespace(&endless), &[web]));
}

#[test]
fn actions_decide_as_documented() {
    let admin = || ("p", Permission::UrlPath(StringMatcher::exact("/admin")), Principal::Any);
    let (inside, outside) = (Request::new("/admin?x=1"), Request::new("/"));
    for (action, in_allowed, out_allowed) in
        [(RbacAction::Allow, true, false), (RbacAction::Deny, false, true), (RbacAction::Log, true, true)]
    {
        let engine = compiled(rules(action, vec![admin()]));
        assert_eq!(engine.check(&inside.asked()).is_ok(), in_allowed, "{action:?}");
        assert_eq!(engine.check(&outside.asked()).is_ok(), out_allowed, "{action:?}");
    }
    assert_eq!(
        compiled(rules(RbacAction::Deny, vec![admin()])).check(&inside.asked()),
        Err(Denied { policy: Some("p".into()) })
    );
    assert_eq!(compiled(rules(RbacAction::Allow, vec![])).check(&inside.asked()), Err(Denied { policy: None }));
    assert!(compiled(rules(RbacAction::Deny, vec![])).check(&inside.asked()).is_ok());
}

#[test]
fn shadow_rules_refuse_nobody() {
    let config = RbacConfig {
        shadow_rules: Some(rules(RbacAction::Deny, vec![("p", Permission::Any, Principal::Any)])),
        ..RbacConfig::default()
    };
    let engine = Authorization::compile(&"authz".into(), &config).unwrap();
    assert!(engine.check(&Request::new("/").asked()).is_ok());
    assert!(Authorization::compile(&"authz".into(), &RbacConfig::default()).is_none(), "nothing is asked");
}

#[test]
fn headers_are_seen_as_grfc_a41_has_them() {
    let request = Request { method: Method::POST, ..Request::new("http://Shop:80/a?b=1") }
        .with("x-a", "1")
        .with("x-a", "2")
        .with("te", "trailers")
        .with("host", "other");
    let permits = |matcher: HeaderMatcher| permits(Permission::Header(matcher), &request);
    assert!(permits(header_is(":method", "POST")) && permits(header_is(":path", "/a?b=1")));
    assert!(permits(header_is(":authority", "Shop:80")) && permits(header_is("host", "Shop:80")));
    assert!(permits(header_is("x-a", "1,2")), "several values are joined");
    assert!(!permits(header("te", HeaderMatcherKind::Present(true))), "te is the transport's");
    assert!(permits(header("x-b", HeaderMatcherKind::Present(false))));
    assert!(!permits(HeaderMatcher { invert: true, ..header_is("x-b", "1") }), "what is absent matches nothing");
}

#[test]
fn principals_are_san_or_subject() {
    let id = "spiffe://td/ns/shop/sa/cart";
    let named = |name: &str| Principal::Authenticated(Some(StringMatcher::exact(name)));
    let request = Request { dns: vec!["cart.shop".into()], ..Request::from(id) };
    assert!(is(named(id), &request) && is(named("cart.shop"), &request) && is(named("CN=client"), &request));
    assert!(!is(named("spiffe://td/ns/shop/sa/car"), &request));
    let regex =
        |source: &str| Principal::Authenticated(Some(text(StringPattern::Regex(SafeRegex::new(source).unwrap()))));
    assert!(is(regex(".*/ns/shop/.*"), &request) && !is(regex(".*/ns/sho/.*"), &request));
    assert!(is(regex(".+"), &request), "principals: [\"*\"]");
    let plain = Request::new("/");
    let tls = Request { tls: true, ..Request::new("/") };
    assert!(!is(Principal::Authenticated(None), &plain) && is(Principal::Authenticated(None), &tls));
    assert!(
        !is(regex(".+"), &tls) && !is(named(""), &plain) && is(named(""), &tls),
        "no certificate is the empty name"
    );
    assert!(!is(Principal::Certificate(None), &tls) && is(Principal::Certificate(None), &request));
    let uri = |id: &str| Principal::Certificate(Some(PeerName::Uri(StringMatcher::exact(id))));
    assert!(is(uri(id), &request) && !is(uri("cart.shop"), &request));
    let peer = Principal::PeerPrincipal(text(StringPattern::Prefix("spiffe://td/".into())));
    assert!(is(peer.clone(), &request) && !is(peer, &tls));
}

#[test]
fn addresses_and_ports_are_those_of_the_connection() {
    let range = |text: &str, bits| CidrRange::new(text.parse().unwrap(), bits).unwrap();
    let request = Request { sni: "a.test".into(), ..Request::new("/") };
    assert!(is(Principal::RemoteIp(range("10.0.0.0", 8)), &request));
    assert!(!is(Principal::RemoteIp(range("10.0.0.0", 16)), &request));
    let mapped = Request { remote: "[::ffff:10.1.2.3]:1".parse().unwrap(), ..request.clone() };
    assert!(is(Principal::RemoteIp(range("10.0.0.0", 8)), &mapped), "a dual-stack socket hides nobody");
    assert!(permits(Permission::DestinationIp(range("192.168.0.0", 16)), &request));
    assert!(
        permits(Permission::DestinationPort(8080), &request) && !permits(Permission::DestinationPort(80), &request)
    );
    assert!(permits(Permission::DestinationPortRange(8080, 8081), &request));
    assert!(!permits(Permission::DestinationPortRange(8000, 8080), &request));
    assert!(permits(Permission::RequestedServerName(StringMatcher::exact("a.test")), &request));
    assert!(permits(Permission::RequestedServerName(StringMatcher::exact("")), &Request::new("/")));
}

#[test]
fn claims_are_those_of_the_jwt_filter() {
    let claim = |filter: &str, invert| {
        Principal::Metadata(MetadataMatcher {
            filter: filter.into(),
            path: vec!["payload".into(), "iss".into()],
            value: ValueMatcher::String(StringMatcher::exact("me")),
            invert,
        })
    };
    let bare = Request::new("/");
    let request = Request { claims: Some(json!({"payload": {"iss": "me"}})), ..bare.clone() };
    assert!(is(claim(rule::JWT_NAMESPACE, false), &request) && !is(claim(rule::JWT_NAMESPACE, false), &bare));
    assert!(is(claim(rule::JWT_NAMESPACE, true), &bare));
    assert!(
        !is(claim("other", false), &request) && is(claim("other", true), &request),
        "gRFC A41: unknown never matches"
    );
}

#[derive(Default)]
struct Heard(Mutex<Vec<(String, String, bool)>>);

impl AuditLogger for Heard {
    fn log(&self, event: &AuditEvent<'_>) {
        let mut heard = self.0.lock().unwrap();
        heard.push((event.rpc_method.to_owned(), event.matched_rule.to_owned(), event.authorized));
    }
}

#[test]
fn audit_loggers_hear_what_their_condition_says() {
    for (on_deny, on_allow) in [(true, false), (false, true), (true, true)] {
        let heard = Arc::new(Heard::default());
        let loggers = vec![audit_logger("test", heard.clone())];
        let mut rules =
            rules(RbacAction::Allow, vec![("p", Permission::UrlPath(StringMatcher::exact("/a")), Principal::Any)]);
        rules.audit = Some(AuditLogging { on_deny, on_allow, loggers });
        let engine = compiled(rules);
        assert!(
            engine.check(&Request::new("/a").asked()).is_ok() && engine.check(&Request::new("/b").asked()).is_err()
        );
        let mut expected = Vec::new();
        if on_allow {
            expected.push(("/a".to_owned(), "p".to_owned(), true));
        }
        if on_deny {
            expected.push(("/b".to_owned(), String::new(), false));
        }
        assert_eq!(*heard.0.lock().unwrap(), expected);
    }
}

/// The same, read naively.
fn naive_permission(permission: &Permission, r: &Request) -> bool {
    match permission {
        Permission::Any => true,
        Permission::All(all) => all.iter().filter(|one| !naive_permission(one, r)).count() == 0,
        Permission::OneOf(any) => any.iter().filter(|one| naive_permission(one, r)).count() > 0,
        Permission::Not(not) => !naive_permission(not, r),
        Permission::Header(matcher) => naive_header(matcher, r),
        Permission::UrlPath(matcher) => matcher.matches(r.uri.path()),
        Permission::DestinationPort(port) => *port == r.local.port(),
        Permission::DestinationPortRange(start, end) => (*start..*end).contains(&u32::from(r.local.port())),
        Permission::DestinationIp(range) => range.contains(r.local.ip()),
        Permission::RequestedServerName(matcher) => matcher.matches(&r.sni),
        other => panic!("{other:?}"),
    }
}

fn naive_principal(principal: &Principal, r: &Request) -> bool {
    match principal {
        Principal::Any => true,
        Principal::All(all) => all.iter().filter(|one| !naive_principal(one, r)).count() == 0,
        Principal::OneOf(any) => any.iter().filter(|one| naive_principal(one, r)).count() > 0,
        Principal::Not(not) => !naive_principal(not, r),
        Principal::Header(matcher) => naive_header(matcher, r),
        Principal::RemoteIp(range) => range.contains(r.remote.ip()),
        Principal::Authenticated(None) => r.tls,
        Principal::Authenticated(Some(matcher)) => {
            let mut names: Vec<String> = r.uris.iter().chain(&r.dns).cloned().collect();
            names.push("CN=client".into());
            if !r.certificate {
                names = vec![String::new()];
            }
            r.tls && names.iter().any(|name| matcher.matches(name))
        }
        other => panic!("{other:?}"),
    }
}

fn naive_header(matcher: &HeaderMatcher, r: &Request) -> bool {
    let values: Vec<_> = r.headers.get_all(&matcher.name).iter().map(|v| v.to_str().unwrap()).collect();
    match (&matcher.kind, values.is_empty()) {
        (HeaderMatcherKind::Present(wanted), absent) => (*wanted != absent) != matcher.invert,
        (_, true) => false,
        (HeaderMatcherKind::String(string), false) => string.matches(&values.join(",")) != matcher.invert,
        (other, _) => panic!("{other:?}"),
    }
}

fn naive(rules: &RbacRules, r: &Request) -> bool {
    let matched = rules.policies.iter().any(|policy| {
        policy.permissions.iter().any(|one| naive_permission(one, r))
            && policy.principals.iter().any(|one| naive_principal(one, r))
    });
    match rules.action {
        RbacAction::Allow => matched,
        RbacAction::Deny => !matched,
        RbacAction::Log => true,
    }
}

fn matchers() -> impl Strategy<Value = StringMatcher> {
    let word = || "[ab/]{1,2}".prop_map(|text: String| text);
    prop_oneof![
        word().prop_map(StringMatcher::exact),
        word().prop_map(|word| text(StringPattern::Prefix(word))),
        word().prop_map(|word| text(StringPattern::Suffix(word))),
        word().prop_map(|word| text(StringPattern::Contains(word))),
    ]
}

fn header_matchers() -> impl Strategy<Value = HeaderMatcher> {
    let kind = prop_oneof![
        any::<bool>().prop_map(HeaderMatcherKind::Present),
        matchers().prop_map(HeaderMatcherKind::String),
    ];
    ("x-[ab]", kind, any::<bool>()).prop_map(|(name, kind, invert)| HeaderMatcher { invert, ..header(&name, kind) })
}

fn ranges() -> impl Strategy<Value = CidrRange> {
    (0u8..4, 24u32..=32).prop_map(|(last, bits)| CidrRange::new(IpAddr::from([10, 0, 0, last]), bits).unwrap())
}

fn permissions() -> impl Strategy<Value = Permission> {
    let leaf = prop_oneof![
        Just(Permission::Any),
        header_matchers().prop_map(Permission::Header),
        matchers().prop_map(Permission::UrlPath),
        (1u16..4).prop_map(Permission::DestinationPort),
        (0u32..3, 3u32..5).prop_map(|(start, end)| Permission::DestinationPortRange(start, end)),
        ranges().prop_map(Permission::DestinationIp),
        matchers().prop_map(Permission::RequestedServerName),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Permission::All),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Permission::OneOf),
            inner.prop_map(|one| Permission::Not(Box::new(one))),
        ]
    })
}

fn principals() -> impl Strategy<Value = Principal> {
    let leaf = prop_oneof![
        Just(Principal::Any),
        Just(Principal::Authenticated(None)),
        matchers().prop_map(|matcher| Principal::Authenticated(Some(matcher))),
        header_matchers().prop_map(Principal::Header),
        ranges().prop_map(Principal::RemoteIp),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Principal::All),
            proptest::collection::vec(inner.clone(), 1..4).prop_map(Principal::OneOf),
            inner.prop_map(|one| Principal::Not(Box::new(one))),
        ]
    })
}

fn requests() -> impl Strategy<Value = Request> {
    let names = || proptest::collection::vec("[ab/]{1,3}", 0..3);
    let headers = proptest::collection::vec(("x-[ab]", "[ab/]{0,3}"), 0..4);
    ("/[ab/]{0,3}", headers, 0u8..4, 0u8..4, 1u16..4, any::<(bool, bool)>(), "[ab]{0,2}", names(), names()).prop_map(
        |(path, headers, remote, local, port, (tls, certificate), sni, uris, dns)| {
            let mut request = Request::new("/");
            request.uri = Uri::builder().path_and_query(path).build().unwrap();
            for (name, value) in headers {
                request.headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
            }
            request.remote = ([10, 0, 0, remote], 1).into();
            request.local = ([10, 0, 0, local], port).into();
            Request { tls, certificate: certificate && tls, sni, uris, dns, ..request }
        },
    )
}

proptest! {
    #[test]
    fn compiled_rules_decide_as_a_naive_reading_of_them(
        action in prop_oneof![Just(RbacAction::Allow), Just(RbacAction::Deny), Just(RbacAction::Log)],
        policies in proptest::collection::vec(
            (proptest::collection::vec(permissions(), 1..3), proptest::collection::vec(principals(), 1..3)), 0..4),
        requests in proptest::collection::vec(requests(), 1..8),
    ) {
        let policies = policies.into_iter().enumerate().map(|(index, (permissions, principals))| {
            RbacPolicy { name: format!("p{index}").into(), permissions, principals }
        });
        let rules = RbacRules { action, policies: policies.collect(), audit: None };
        let engine = compiled(rules.clone());
        for request in &requests {
            prop_assert_eq!(engine.check(&request.asked()).is_ok(), naive(&rules, request), "{:?}", request);
        }
    }
}
