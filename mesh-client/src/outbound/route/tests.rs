use super::{matcher::path_matches, *};
use crate::outbound::filter::{FilterRequest, Filters, Place, Watching};
use futures::FutureExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_xds::resource::{
    Action, ClusterSpecifier, FaultAbort, FaultConfig, FilterOverride, Forward as Forwarding, FractionalPercent,
    HeaderMatcher, HeaderMatcherKind, HttpFilter, HttpFilterConfig, PathMatcher, RetryOn, RetryPolicy, Route,
    RouteConfiguration, RouteMatch, SafeRegex, StringMatcher, StringPattern, VirtualHost, WeightedCluster,
};
use proptest::prelude::*;
use std::{collections::BTreeMap, sync::Arc};

fn forward(cluster: ClusterSpecifier) -> Action {
    Action::Forward(Arc::new(Forwarding::to(cluster)))
}

fn route(name: &str, path: PathMatcher) -> Route {
    let action = forward(ClusterSpecifier::Cluster(name.into()));
    Route::new(name, RouteMatch { path, ..RouteMatch::default() }, action)
}

fn prefix(p: &str) -> PathMatcher {
    PathMatcher::Prefix { prefix: p.into(), case_sensitive: true }
}

fn exact(p: &str) -> PathMatcher {
    PathMatcher::Exact { path: p.into(), case_sensitive: true }
}

fn header(name: &str, kind: HeaderMatcherKind) -> HeaderMatcher {
    HeaderMatcher { name: name.into(), kind, invert: false, treat_missing_as_empty: false }
}

fn is(value: &str) -> HeaderMatcherKind {
    HeaderMatcherKind::String(StringMatcher::exact(value))
}

fn vhost(routes: Vec<Route>) -> VirtualHost {
    VirtualHost { name: "vh".into(), routes, ..VirtualHost::default() }
}

fn compile(vhost: &VirtualHost, profile: Profile) -> RouteTable<Arc<str>> {
    compile_with(vhost, profile, &[])
}

fn compile_with(vhost: &VirtualHost, profile: Profile, filters: &[HttpFilter]) -> RouteTable<Arc<str>> {
    let shared = Filters::default();
    let routes = RouteConfiguration::default();
    let listener: Arc<str> = "listener".into();
    let scope = Scope {
        listener: &listener,
        around: None,
        routes: &routes,
        filters,
        profile,
        max_stream_duration: None,
        stream_idle_timeout: None,
        general: false,
        shared: &shared,
    };
    RouteTable::compile(vhost, scope, &mut |name| name.clone())
}

/// A request in owned parts.
struct Owned {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Owned {
    fn get(uri: &str, headers: &[(&str, &str)]) -> Self {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap());
        }
        Self { method: Method::GET, uri: uri.parse().unwrap(), headers: map }
    }

    fn head(&self) -> RequestHead<'_> {
        RequestHead::new(&self.method, &self.uri, &self.headers)
    }
}

fn found(table: &RouteTable<Arc<str>>, request: &Owned) -> Option<usize> {
    table.find(&request.head(), &mut |_| 0).ok().map(|entry| entry.index)
}

/// Whether one header matcher matches, through a table of one route.
fn header_matches(matcher: HeaderMatcher, profile: Profile, headers: &[(&str, &str)]) -> bool {
    let mut only = route("r", prefix(""));
    only.matches.headers = vec![matcher];
    found(&compile(&vhost(vec![only]), profile), &Owned::get("http://foo.test/a?q=1", headers)).is_some()
}

#[test]
fn the_first_match_wins_whatever_its_kind() {
    for padding in [0, 20] {
        let mut routes: Vec<_> = (0..padding).map(|n| route("pad", exact(&format!("/pad/{n}")))).collect();
        routes.push(route("api", prefix("/api")));
        routes.push(route("exact", exact("/api/users")));
        routes.push(route("all", prefix("/")));
        routes.push(route("late", exact("/late")));
        let table = compile(&vhost(routes), Profile::Grpc);
        let name = |path: &str| {
            let request = Owned::get(path, &[]);
            table.find(&request.head(), &mut |_| 0).unwrap().name.to_string()
        };
        assert_eq!(name("/api/users"), "api");
        assert_eq!(name("/late"), "all");
        assert_eq!(name("/other"), "all");
    }
}

#[test]
fn the_query_is_no_part_of_the_path() {
    let table = compile(&vhost(vec![route("r", exact("/a"))]), Profile::Envoy);
    assert_eq!(found(&table, &Owned::get("/a?b=c", &[])), Some(0));
    assert_eq!(found(&table, &Owned::get("/a/", &[])), None);
}

#[test]
fn case_is_ignored_only_when_asked_and_regexes_match_in_full() {
    let table = compile(
        &vhost(vec![
            route("0", PathMatcher::Exact { path: "/abc".into(), case_sensitive: false }),
            route("1", PathMatcher::Prefix { prefix: "/pre".into(), case_sensitive: false }),
            route("2", PathMatcher::Regex(SafeRegex::new("/r[0-9]+").unwrap())),
            route("3", exact("/ABC/d")),
        ]),
        Profile::Envoy,
    );
    assert_eq!(found(&table, &Owned::get("/aBc", &[])), Some(0));
    assert_eq!(found(&table, &Owned::get("/PREfix", &[])), Some(1));
    assert_eq!(found(&table, &Owned::get("/r12", &[])), Some(2));
    assert_eq!(found(&table, &Owned::get("/r12/x", &[])), None);
    assert_eq!(found(&table, &Owned::get("/abc/d", &[])), None);
}

#[test]
fn no_route_names_the_virtual_host() {
    let table = compile(&vhost(vec![route("r", exact("/a"))]), Profile::Grpc);
    let request = Owned::get("/b", &[]);
    let error = table.find(&request.head(), &mut |_| 0).unwrap_err();
    assert_eq!(error.to_string(), "none of the 1 routes of virtual host \"vh\" matches");
}

#[test]
fn several_values_of_a_header_are_joined_with_commas() {
    let joined = header("x-env", is("a,b"));
    assert!(header_matches(joined.clone(), Profile::Envoy, &[("x-env", "a"), ("x-env", "b")]));
    assert!(header_matches(joined.clone(), Profile::Envoy, &[("x-env", "a,b")]));
    assert!(!header_matches(joined, Profile::Envoy, &[("x-env", "b"), ("x-env", "a")]));
}

#[test]
fn an_absent_header_matches_only_where_presence_is_asked() {
    let invert = |matcher: HeaderMatcher| HeaderMatcher { invert: true, ..matcher };
    let none: &[(&str, &str)] = &[];
    assert!(!header_matches(header("x", is("a")), Profile::Grpc, none));
    assert!(!header_matches(invert(header("x", is("a"))), Profile::Grpc, none));
    assert!(header_matches(invert(header("x", is("a"))), Profile::Grpc, &[("x", "b")]));
    assert!(header_matches(header("x", HeaderMatcherKind::Present(false)), Profile::Grpc, none));
    assert!(header_matches(invert(header("x", HeaderMatcherKind::Present(true))), Profile::Grpc, none));
    assert!(!header_matches(invert(header("x", HeaderMatcherKind::Present(false))), Profile::Grpc, none));
    let empty = HeaderMatcher { treat_missing_as_empty: true, ..invert(header("x", is("a"))) };
    assert!(header_matches(empty, Profile::Envoy, none));
}

#[test]
fn a_range_is_half_open_and_wants_an_integer() {
    let range = header("x", HeaderMatcherKind::Range { start: -1, end: 3 });
    for (value, matches) in [("-1", true), ("2", true), ("3", false), ("2.5", false), ("", false), ("-2", false)] {
        assert_eq!(header_matches(range.clone(), Profile::Grpc, &[("x", value)]), matches, "{value:?}");
        let inverted = HeaderMatcher { invert: true, ..range.clone() };
        assert_eq!(header_matches(inverted, Profile::Grpc, &[("x", value)]), !matches, "{value:?} inverted");
    }
}

#[test]
fn grpc_shows_matchers_the_metadata_and_its_content_type() {
    let present = |name: &str| header(name, HeaderMatcherKind::Present(true));
    for hidden in ["te", "grpc-timeout", "trace-bin"] {
        assert!(!header_matches(present(hidden), Profile::Grpc, &[(hidden, "v")]), "{hidden}");
        assert!(header_matches(present(hidden), Profile::Envoy, &[(hidden, "v")]), "{hidden}");
    }
    assert!(header_matches(header("content-type", is("application/grpc")), Profile::Grpc, &[]));
    assert!(header_matches(
        header("content-type", is("application/grpc+proto")),
        Profile::Grpc,
        &[("content-type", "application/grpc+proto")]
    ));
    assert!(!header_matches(present("content-type"), Profile::Envoy, &[]));
}

#[test]
fn pseudo_headers_can_be_matched() {
    let matches = |name: &str, value: &str| header_matches(header(name, is(value)), Profile::Envoy, &[]);
    assert!(matches(":method", "GET"));
    assert!(matches(":path", "/a?q=1"));
    assert!(matches(":authority", "foo.test"));
    assert!(matches("host", "foo.test"));
    assert!(!matches(":method", "POST"));
}

#[test]
fn a_fraction_is_drawn_only_when_all_else_matches() {
    let mut half = route("half", prefix("/"));
    half.matches.fraction = Some(FractionalPercent(500_000));
    half.matches.headers = vec![header("x", HeaderMatcherKind::Present(true))];
    let mut never = route("never", prefix("/"));
    never.matches.fraction = Some(FractionalPercent(0));
    let table = compile(&vhost(vec![half, never, route("rest", prefix("/"))]), Profile::Grpc);
    let index = |headers: &[(&str, &str)], draw: u32| {
        let mut draws = 0;
        let request = Owned::get("/", headers);
        let found = table.find(&request.head(), &mut |bound| {
            assert_eq!(bound, 1_000_000);
            draws += 1;
            draw
        });
        (found.unwrap().index, draws)
    };
    assert_eq!(index(&[("x", "")], 499_999), (0, 1));
    assert_eq!(index(&[("x", "")], 500_000), (2, 2));
    // Zero percent is never, even for the lowest draw.
    assert_eq!(index(&[], 0), (2, 1));
}

fn split(weights: &[u32]) -> RouteTable<Arc<str>> {
    let part = |(n, weight): (usize, &u32)| WeightedCluster::new(n.to_string(), *weight);
    let mut only = route("r", prefix("/"));
    only.action = forward(ClusterSpecifier::Weighted(weights.iter().enumerate().map(part).collect()));
    compile(&vhost(vec![only]), Profile::Grpc)
}

fn forwarding(table: &RouteTable<Arc<str>>) -> &Forward<Arc<str>> {
    let request = Owned::get("/", &[]);
    match &table.find(&request.head(), &mut |_| 0).unwrap().action {
        RouteAction::Forward(forward) => forward,
        other => panic!("{other:?}"),
    }
}

fn draw<'t>(forward: &'t Forward<Arc<str>>, rng: &mut impl FnMut(u32) -> u32) -> &'t ClusterChoice<Arc<str>> {
    forward.choice(forward.draw(&Owned::get("/", &[]).head(), rng).unwrap())
}

#[test]
fn every_draw_of_a_split_falls_to_its_cluster() {
    let table = split(&[1, 3, 6]);
    let forward = forwarding(&table);
    assert_eq!(forward.clusters.total_weight(), 10);
    let drawn: String = (0..10).map(|n| draw(forward, &mut |_| n).name.to_string()).collect();
    assert_eq!(drawn, "0111222222");
}

#[test]
fn weights_up_to_the_largest_are_drawn_right() {
    let table = split(&[u32::MAX - 1, 1]);
    let forward = forwarding(&table);
    assert_eq!(&*draw(forward, &mut |bound| bound - 1).name, "1");
    assert_eq!(&*draw(forward, &mut |bound| bound - 2).name, "0");
}

#[test]
fn a_split_of_one_needs_no_draw_and_one_without_weight_is_refused() {
    let table = split(&[0, 7]);
    assert_eq!(&*draw(forwarding(&table), &mut |_| panic!("drawn")).name, "1");
    let table = split(&[0]);
    let request = Owned::get("/", &[]);
    let entry = table.find(&request.head(), &mut |_| 0).unwrap();
    assert!(matches!(entry.action, RouteAction::Unsupported(_)));
}

#[test]
fn the_routes_retry_policy_replaces_the_hosts_even_when_nothing_is_left_of_it() {
    let policy = |on: RetryOn, num_retries| Some(Arc::new(RetryPolicy { on, num_retries, ..RetryPolicy::default() }));
    let unavailable = RetryOn { grpc_codes: 1 << 14, ..RetryOn::default() };
    let with_retries = |on| {
        let mut only = route("r", prefix("/"));
        if let Action::Forward(forward) = &mut only.action {
            Arc::get_mut(forward).unwrap().retry_policy = on;
        }
        let mut vhost = vhost(vec![only]);
        vhost.retry_policy = policy(unavailable.clone(), 9);
        vhost
    };
    let retries = |vhost: &VirtualHost, profile| {
        forwarding(&compile(vhost, profile)).retry.as_ref().map(|policy| policy.max_retries())
    };
    assert_eq!(retries(&with_retries(None), Profile::Grpc), Some(4), "the host's, capped at five attempts");
    assert_eq!(retries(&with_retries(None), Profile::Envoy), Some(9));
    assert_eq!(retries(&with_retries(policy(unavailable.clone(), 2)), Profile::Grpc), Some(2));
    let http = RetryOn { http_5xx: true, ..RetryOn::default() };
    assert_eq!(retries(&with_retries(policy(http.clone(), 2)), Profile::Grpc), None, "no condition gRPC knows");
    assert_eq!(retries(&with_retries(policy(http, 2)), Profile::Envoy), Some(2));
}

#[test]
fn the_most_specific_fault_override_wins_and_nothing_is_merged() {
    let fault = |code| {
        Arc::new(FaultConfig {
            abort: Some(FaultAbort::Grpc { code, percentage: FractionalPercent::HUNDRED }),
            ..FaultConfig::default()
        })
    };
    let over = |disabled, code: Option<u32>| {
        BTreeMap::from([(
            Arc::from("fault"),
            FilterOverride { disabled, config: code.map(|code| HttpFilterConfig::Fault(fault(code))) },
        )])
    };
    let filters = |disabled| {
        vec![
            HttpFilter { name: "fault".into(), config: HttpFilterConfig::Fault(fault(1)), disabled },
            HttpFilter { name: "router".into(), config: HttpFilterConfig::Router, disabled: false },
        ]
    };
    // Which code a request is aborted with, given overrides of host, route and cluster.
    let code = |filters: &[HttpFilter], levels: [Option<BTreeMap<Arc<str>, FilterOverride>>; 3]| {
        let [host, of_route, cluster] = levels.map(Option::unwrap_or_default);
        let part = |name: &str| WeightedCluster { filter_overrides: cluster.clone(), ..WeightedCluster::new(name, 1) };
        let mut only = route("r", prefix("/"));
        only.action = forward(ClusterSpecifier::Weighted(vec![part("a"), part("b")]));
        only.filter_overrides = of_route;
        let vhost = VirtualHost { filter_overrides: host, ..vhost(vec![only]) };
        let table = compile_with(&vhost, Profile::Grpc, filters);
        let chain = draw(forwarding(&table), &mut |_| 0).filters.as_ref()?;
        let (mut parts, ()) = http::Request::get("http://h/").body(()).unwrap().into_parts();
        let mut request = FilterRequest::new(&mut parts, Place { grpc: true, ..Place::default() });
        let mut watching = Watching::new(tokio::time::Instant::now());
        let reply = chain.request(&mut request, &mut watching).now_or_never().expect("nothing waits")?;
        Some(reply.outcome(true).1)
    };
    let on = filters(false);
    assert_eq!(code(&on, [None, None, None]), Some(1));
    assert_eq!(code(&on, [Some(over(false, Some(2))), None, None]), Some(2));
    assert_eq!(code(&on, [Some(over(false, Some(2))), Some(over(false, Some(3))), None]), Some(3));
    assert_eq!(code(&on, [None, Some(over(false, Some(3))), Some(over(false, Some(4)))]), Some(4));
    assert_eq!(code(&on, [None, Some(over(true, None)), None]), None);
    assert_eq!(code(&on, [None, Some(over(true, None)), Some(over(false, None))]), Some(1));
    assert_eq!(code(&filters(true), [None, None, None]), None);
    assert_eq!(code(&filters(true), [None, Some(over(false, None)), None]), Some(1));
}

#[test]
fn explain_says_why_each_earlier_route_did_not_match() {
    let mut canary = route("canary", prefix("/"));
    canary.matches.headers = vec![header("x-canary", is("1"))];
    let mut drawn = route("drawn", prefix("/"));
    drawn.matches.fraction = Some(FractionalPercent(25_000));
    let routes = vec![route("users", exact("/users")), canary, drawn, route("rest", prefix("/"))];
    let table = compile(&vhost(routes), Profile::Grpc);
    let request = Owned::get("/orders", &[]);
    let trail = table.explain(&request.head(), &mut |bound| bound - 1);
    let reasons: Vec<_> = trail.skipped.iter().map(|s| format!("{} {}: {}", s.index, s.name, s.reason)).collect();
    assert_eq!(
        reasons,
        [
            "0 users: the path is not \"/users\"",
            "1 canary: header x-canary is absent or not equal to \"1\"",
            "2 drawn: not drawn for its share of 2.5 %",
        ]
    );
    assert_eq!(&*trail.found.unwrap().name, "rest");
}

/// Routes over a small alphabet, so that many of them match many paths.
fn any_route() -> impl Strategy<Value = Route> {
    let path = proptest::collection::vec(prop_oneof!["/", "a", "b", "A"], 0..5).prop_map(|parts| parts.concat());
    let matcher = (path, 0..7u8).prop_map(|(path, kind)| match kind {
        0..3 => prefix(&path),
        3..5 => exact(&path),
        5 => PathMatcher::Prefix { prefix: path.to_ascii_lowercase(), case_sensitive: false },
        _ => PathMatcher::Regex(SafeRegex::new(&format!("{path}.*")).unwrap()),
    });
    let headers = proptest::collection::vec((any_kind(), any::<bool>()), 0..2).prop_map(|kinds| {
        let named = |(kind, invert)| HeaderMatcher { invert, ..header("x", kind) };
        kinds.into_iter().map(named).collect::<Vec<_>>()
    });
    let fraction = proptest::option::weighted(0.3, (0..=1_000_000u32).prop_map(FractionalPercent));
    (matcher, headers, fraction).prop_map(|(path, headers, fraction)| Route {
        matches: RouteMatch { path, headers, fraction, ..RouteMatch::default() },
        ..route("r", prefix(""))
    })
}

fn any_kind() -> impl Strategy<Value = HeaderMatcherKind> {
    let pattern = prop_oneof![
        Just(StringPattern::Exact("a".into())),
        Just(StringPattern::Prefix("a".into())),
        Just(StringPattern::Suffix("b".into())),
        Just(StringPattern::Contains(",".into())),
        Just(StringPattern::Regex(SafeRegex::new("[ab,]*").unwrap())),
    ];
    prop_oneof![
        pattern.prop_map(|pattern| HeaderMatcherKind::String(StringMatcher { pattern, ignore_case: false })),
        (-2..3i64, -2..3i64).prop_map(|(start, end)| HeaderMatcherKind::Range { start, end }),
        any::<bool>().prop_map(HeaderMatcherKind::Present),
    ]
}

/// The rules as written, without an index.
fn naive(routes: &[Route], path: &str, values: &[String], mut draws: impl FnMut() -> u32) -> Option<usize> {
    let value = (!values.is_empty()).then(|| values.join(","));
    routes.iter().position(|route| {
        let headers = route.matches.headers.iter().all(|m| {
            let base = match (&m.kind, &value) {
                (HeaderMatcherKind::Present(want), value) => value.is_some() == *want,
                (_, None) => return false,
                (HeaderMatcherKind::String(s), Some(v)) => s.matches(v),
                (HeaderMatcherKind::Range { start, end }, Some(v)) => {
                    v.parse::<i64>().is_ok_and(|v| v >= *start && v < *end)
                }
            };
            base ^ m.invert
        });
        path_matches(&route.matches.path, path) && headers && route.matches.fraction.is_none_or(|f| draws() < f.0)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_table_finds_what_a_naive_scan_finds(
        routes in proptest::collection::vec(any_route(), 0..40),
        path in proptest::collection::vec(prop_oneof!["/", "a", "b", "A"], 0..6),
        values in proptest::collection::vec(prop_oneof!["a", "b", "ab", "1", "-2"], 0..3),
        seed in any::<u64>(),
    ) {
        let path = format!("/{}", path.concat());
        let headers: Vec<_> = values.iter().map(|v| ("x", v.as_str())).collect();
        let request = Owned::get(&format!("http://h{path}"), &headers);
        let table = compile(&vhost(routes.clone()), Profile::Envoy);
        let (mut a, mut b) = (fastrand::Rng::with_seed(seed), fastrand::Rng::with_seed(seed));
        let fast = table.find(&request.head(), &mut |bound| a.u32(..bound)).ok().map(|entry| entry.index);
        let slow = naive(&routes, &path, &values, || b.u32(..1_000_000));
        prop_assert_eq!(fast, slow);
        let mut c = fastrand::Rng::with_seed(seed);
        let trail = table.explain(&request.head(), &mut |bound| c.u32(..bound));
        prop_assert_eq!(trail.found.ok().map(|entry| entry.index), slow);
        prop_assert_eq!(trail.skipped.len(), slow.unwrap_or(routes.len()));
    }
}
