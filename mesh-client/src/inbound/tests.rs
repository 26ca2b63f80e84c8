//! Policies as a control plane says them: routes, their overrides, and the order of filters.

use super::{
    Chain, ConnectionInfo, Decision, Kept, Policy, RateLimit, Security, Source, Verdict,
    chain_match::{Facts, Spoken},
};
use crate::{outbound::filter::Reply, telemetry::metrics::ServerMetrics};
use http::{HeaderName, Request, request};
use mesh_xds::resource::{
    Action, AppendAction, ClientCertDetails, ClusterSpecifier, Denominator, DomainPattern, FaultAbort, FaultConfig,
    FaultDelay, FilterOverride, Format, Forward, ForwardClientCert, FractionalPercent, HeaderAdd, HeaderMutation,
    HeaderMutationConfig, HttpFilter, HttpFilterConfig, JwtConfig, JwtOfRoute, PathMatcher, Permission, Principal,
    RbacAction, RbacConfig, RbacPolicy, RbacRules, Route, RouteConfiguration, RouteMatch, StringMatcher, VirtualHost,
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

fn connection() -> ConnectionInfo {
    let spoken = Spoken::default();
    let facts = Facts { remote: "10.0.0.9:1".parse().unwrap(), local: "10.0.0.1:80".parse().unwrap(), spoken };
    let chain = Chain::new("", Security::Plaintext, Arc::default(), None);
    ConnectionInfo::new(facts, false, None, Arc::new(chain), 0)
}

fn filter(name: &str, config: HttpFilterConfig) -> HttpFilter {
    HttpFilter { name: name.into(), config, disabled: false }
}

fn rbac(action: RbacAction, path: &str) -> HttpFilterConfig {
    let policy = RbacPolicy {
        name: "p".into(),
        permissions: vec![Permission::UrlPath(StringMatcher::exact(path))],
        principals: vec![Principal::Any],
    };
    let rules = RbacRules { action, policies: vec![policy], audit: None };
    HttpFilterConfig::Rbac(Arc::new(RbacConfig { rules: Some(rules), ..RbacConfig::default() }))
}

fn fault(delay: Option<Duration>, status: u16) -> HttpFilterConfig {
    let percentage = FractionalPercent::HUNDRED;
    HttpFilterConfig::Fault(Arc::new(FaultConfig {
        delay: delay.map(|delay| FaultDelay { fixed: Some(delay), percentage, denominator: Denominator::Hundred }),
        abort: Some(FaultAbort::Http { status, percentage }),
        ..FaultConfig::default()
    }))
}

fn route(path: &str, action: Action, overrides: &[(&str, Option<HttpFilterConfig>)]) -> Route {
    let matches =
        RouteMatch { path: PathMatcher::Prefix { prefix: path.into(), case_sensitive: true }, ..RouteMatch::default() };
    let overrides = overrides.iter().map(|(name, config)| {
        let entry = FilterOverride { disabled: config.is_none(), config: config.clone() };
        (Arc::from(*name), entry)
    });
    Route { filter_overrides: overrides.collect::<BTreeMap<_, _>>(), ..Route::new(path, matches, action) }
}

fn forward(cluster: &str) -> Action {
    Action::Forward(Arc::new(Forward::to(ClusterSpecifier::Cluster(cluster.into()))))
}

fn policy(filters: &[HttpFilter], routes: Option<Vec<Route>>) -> Policy {
    let kept = Kept::new(ServerMetrics::default(), mesh_tls::default_provider());
    policy_of("inbound", None, filters, routes, &kept)
}

fn policy_of(
    listener: &str,
    together: Option<(&Arc<str>, usize)>,
    filters: &[HttpFilter],
    routes: Option<Vec<Route>>,
    kept: &Kept,
) -> Policy {
    let routes = routes.map(|routes| {
        let host =
            VirtualHost { domains: vec![DomainPattern::Exact("shop.test".into())], routes, ..VirtualHost::default() };
        Arc::new(RouteConfiguration { virtual_hosts: vec![host], ..RouteConfiguration::default() })
    });
    let source = Source {
        listener: &listener.into(),
        together,
        filters,
        routes: routes.as_ref(),
        forward_client_cert: ForwardClientCert::default(),
        client_cert_details: ClientCertDetails::default(),
        max_stream_duration: None,
        around: None,
        fetch: None,
    };
    Policy::compile(source, kept)
}

fn get(uri: &str) -> request::Parts {
    Request::get(uri).body(()).unwrap().into_parts().0
}

/// HTTP status and gRPC code of the answer, or `None` where it is served.
async fn asked(policy: &Policy, mut head: request::Parts) -> Option<(u16, u32)> {
    let of = |reply: Reply| {
        let (status, code, _) = reply.outcome(false);
        Some((status, code))
    };
    let decision = match policy.admit(&connection(), &mut head) {
        Verdict::Now(decision) => decision,
        Verdict::Later(deciding) => deciding.await.1,
    };
    match decision {
        Decision::Pass(_) => None,
        Decision::Answer(reply, _) => of(reply),
        Decision::Respond(response, _) => Some((response.status().as_u16(), 0)),
    }
}

#[tokio::test]
async fn a_server_serves_by_itself_and_what_forwards_is_unavailable() {
    let routes = vec![
        route("/own", Action::NonForwarding, &[]),
        route("/istio", forward("inbound|80||"), &[]),
        route("/other", forward("outbound|80||x"), &[]),
        route("/not", Action::Unsupported("because".into()), &[]),
    ];
    let policy = policy(&[], Some(routes));
    for (uri, expected) in [
        ("http://shop.test/own/1", None),
        ("http://shop.test:80/istio", None),
        ("http://shop.test/other", Some((503, 14))),
        ("http://shop.test/not", Some((503, 14))),
        ("http://shop.test/unknown", Some((404, 14))),
        ("http://other.test/own", Some((404, 14))),
    ] {
        assert_eq!(asked(&policy, get(uri)).await, expected, "{uri}");
    }
}

#[tokio::test]
async fn limits_of_the_program_count_for_all_chains_together_and_others_for_their_own() {
    let limit = |name: &str| RateLimit::total(1, Duration::from_secs(3600)).filter(name);
    let kept = Kept::new(ServerMetrics::default(), mesh_tls::default_provider());
    let name: Arc<str> = "server/x".into();
    for (filters, own, second) in [(vec![limit("program")], 1, Some((429, 8))), (vec![limit("chain")], 0, None)] {
        let [a, b] = ["a", "b"].map(|chain| policy_of(chain, Some((&name, own)), &filters, None, &kept));
        assert_eq!(asked(&a, get("http://shop.test/")).await, None);
        assert_eq!(asked(&b, get("http://shop.test/")).await, second);
        assert_eq!(asked(&a, get("http://shop.test/")).await, Some((429, 8)));
    }
}

#[tokio::test]
async fn routes_replace_the_rules_or_switch_them_off() {
    let filters = [filter("authz", rbac(RbacAction::Allow, "/only"))];
    let routes = vec![
        route("/open", Action::NonForwarding, &[("authz", None)]),
        route("/empty", Action::NonForwarding, &[("authz", Some(HttpFilterConfig::Rbac(Arc::default())))]),
        route("/own", Action::NonForwarding, &[("authz", Some(rbac(RbacAction::Allow, "/own/1")))]),
        route("/mixed", Action::NonForwarding, &[("authz", Some(fault(None, 503)))]),
        route("/", Action::NonForwarding, &[("unknown", Some(rbac(RbacAction::Deny, "/only")))]),
    ];
    let policy = policy(&filters, Some(routes));
    for (path, expected) in [
        ("/open", None),
        ("/empty", None),
        ("/own/1", None),
        ("/own/2", Some((403, 7))),
        ("/only", None),
        ("/else", Some((403, 7))),
        ("/mixed", Some((403, 14))),
    ] {
        assert_eq!(asked(&policy, get(&format!("http://shop.test{path}"))).await, expected, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn filters_are_asked_in_their_order_also_when_they_wait() {
    let deny = || filter("deny", rbac(RbacAction::Deny, "/"));
    let abort = || filter("fault", fault(Some(Duration::from_secs(1)), 418));
    assert_eq!(asked(&policy(&[deny(), abort()], None), get("http://a/")).await, Some((403, 7)));
    assert_eq!(asked(&policy(&[abort(), deny()], None), get("http://a/")).await, Some((418, 2)));
    // What comes behind what waited is asked as well.
    let wait = filter(
        "fault",
        HttpFilterConfig::Fault(Arc::new(FaultConfig {
            delay: Some(FaultDelay {
                fixed: Some(Duration::from_secs(1)),
                percentage: FractionalPercent::HUNDRED,
                denominator: Denominator::Hundred,
            }),
            ..FaultConfig::default()
        })),
    );
    assert_eq!(asked(&policy(&[wait.clone(), deny()], None), get("http://a/")).await, Some((403, 7)));
    assert_eq!(asked(&policy(&[wait, deny()], None), get("http://a/other")).await, None);
    let off = HttpFilter { disabled: true, ..deny() };
    assert_eq!(asked(&policy(&[off], None), get("http://a/")).await, None);
}

#[tokio::test]
async fn a_filter_before_rbac_changes_what_it_sees() {
    let add = HeaderAdd {
        name: HeaderName::from_static("x-role"),
        value: Format::parse("guest").unwrap(),
        action: AppendAction::Overwrite,
        keep_empty: false,
    };
    let mutation = HeaderMutationConfig { request: vec![HeaderMutation::Add(add)], ..HeaderMutationConfig::default() };
    let mutation = filter("mutation", HttpFilterConfig::HeaderMutation(Arc::new(mutation)));
    let mut head = get("http://a/");
    head.headers.insert("x-role", "admin".parse().unwrap());
    let policy = policy(&[mutation], None);
    let Verdict::Now(Decision::Pass(_)) = policy.admit(&connection(), &mut head) else { panic!() };
    assert_eq!(head.headers["x-role"], "guest");
}

#[tokio::test]
async fn a_requirement_that_is_not_configured_lets_nobody_in() {
    let jwt = || filter("jwt", HttpFilterConfig::Jwt(Arc::new(JwtConfig::default())));
    let of = |config| Some(HttpFilterConfig::JwtOfRoute(config));
    let routes = vec![
        route("/off", Action::NonForwarding, &[("jwt", of(JwtOfRoute::Disabled))]),
        route("/unknown", Action::NonForwarding, &[("jwt", of(JwtOfRoute::Requirement("x".into())))]),
        route("/", Action::NonForwarding, &[]),
    ];
    let policy = policy(&[jwt()], Some(routes));
    assert_eq!(asked(&policy, get("http://shop.test/off")).await, None);
    assert_eq!(asked(&policy, get("http://shop.test/unknown")).await, Some((403, 7)));
    assert_eq!(asked(&policy, get("http://shop.test/")).await, None, "no rule, no need");
}

#[test]
fn an_age_that_no_clock_can_tell_is_never_reached() {
    let limits = super::Limits::default().max_connection_age(Some(Duration::MAX));
    for _ in 0..64 {
        let age = super::serve::age(&limits).expect("there is one");
        assert!(age > Duration::from_secs(1 << 40), "{age:?}");
    }
    let limits = super::Limits::default().max_connection_age(Some(Duration::from_secs(10)));
    let age = super::serve::age(&limits).expect("there is one");
    assert!((Duration::from_secs(9)..=Duration::from_secs(11)).contains(&age), "{age:?}");
}
