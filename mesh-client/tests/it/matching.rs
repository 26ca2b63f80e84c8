//! What a route may match beside headers: paths of every kind, query parameters, cookies, methods, gRPC; and hosts.

use crate::support::{
    CLUSTER, World,
    echo::{Echo, Way, get},
    edit, rule, service,
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::TypedExtensionConfig,
        route::v3::{
            CookieMatcher, HeaderMatcher, QueryParameterMatcher, Route, RouteAction, RouteConfiguration, RouteMatch,
            VirtualHost, header_matcher::HeaderMatchSpecifier, query_parameter_matcher::QueryParameterMatchSpecifier,
            route, route_action::ClusterSpecifier, route_match::GrpcRouteMatchOptions, route_match::PathSpecifier,
        },
    },
    extensions::path::r#match::uri_template::v3::UriTemplateMatchConfig,
    r#type::matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
};
use envoy_types::{pb::google::protobuf::BoolValue, util::pack_any};
use http::Request;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;

fn path(specifier: PathSpecifier) -> RouteMatch {
    RouteMatch { path_specifier: Some(specifier), ..RouteMatch::default() }
}

fn any_case(found: RouteMatch) -> RouteMatch {
    RouteMatch { case_sensitive: Some(BoolValue { value: false }), ..found }
}

pub(crate) fn under(prefix: &str) -> RouteMatch {
    path(PathSpecifier::Prefix(prefix.into()))
}

fn template(template: &str) -> RouteMatch {
    let config = UriTemplateMatchConfig { path_template: template.into() };
    let typed_config = Some(pack_any(config));
    path(PathSpecifier::PathMatchPolicy(TypedExtensionConfig { name: "template".into(), typed_config }))
}

pub(crate) fn string(pattern: MatchPattern) -> StringMatcher {
    StringMatcher { match_pattern: Some(pattern), ignore_case: false }
}

pub(crate) fn exact(text: &str) -> StringMatcher {
    string(MatchPattern::Exact(text.into()))
}

fn regex(text: &str) -> RegexMatcher {
    RegexMatcher { regex: text.into(), ..RegexMatcher::default() }
}

fn query(name: &str, specifier: QueryParameterMatchSpecifier) -> QueryParameterMatcher {
    QueryParameterMatcher { name: name.into(), query_parameter_match_specifier: Some(specifier) }
}

fn cookie(name: &str, value: &str, invert_match: bool) -> CookieMatcher {
    CookieMatcher { name: name.into(), string_match: Some(exact(value)), invert_match }
}

/// A route to a subset of the greeter.
pub(crate) fn to(subset: &str, found: RouteMatch) -> Route {
    Route {
        name: format!("to-{subset}"),
        r#match: Some(found),
        action: Some(route::Action::Route(RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(CLUSTER.replace("||", &format!("|{subset}|")))),
            ..RouteAction::default()
        })),
        ..Route::default()
    }
}

/// A mesh whose only virtual host has these routes, and two backends, `yes` and `no`.
pub(crate) async fn world(routes: Vec<Route>) -> (World, [Echo; 2]) {
    configured(|config| config.virtual_hosts[0].routes = routes).await
}

async fn configured(change: impl FnOnce(&mut RouteConfiguration)) -> (World, [Echo; 2]) {
    let backends = [Echo::start("yes").await, Echo::start("no").await];
    let endpoints = [("yes", backends[0].addr()), ("no", backends[1].addr())];
    let cp = ControlPlane::builder().yaml(service(&endpoints) + &rule("{}", &["yes", "no"])).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, change);
    (World::on(cp).await, backends)
}

/// Each match with requests that it takes and requests that it leaves.
async fn check(found: RouteMatch, takes: Vec<http::request::Builder>, leaves: Vec<http::request::Builder>) {
    // More routes than are scanned: the index is asked.
    let padding = (0..20).map(|n| to("no", path(PathSpecifier::Path(format!("/padding/{n}")))));
    let routes: Vec<_> = padding.chain([to("yes", found.clone()), to("no", under(""))]).collect();
    for routes in [routes[20..].to_vec(), routes] {
        let (world, _backends) = world(routes).await;
        for way in Way::BOTH {
            for (requests, expected) in [(&takes, "yes"), (&leaves, "no")] {
                for request in requests {
                    let copy = request.headers_ref().unwrap().iter().fold(
                        Request::builder().method(request.method_ref().unwrap()).uri(request.uri_ref().unwrap()),
                        |copy, (name, value)| copy.header(name, value),
                    );
                    let backend = way.backend(&world.mesh, copy).await;
                    assert_eq!(backend, expected, "{found:?}, {request:?}, {way:?}");
                }
            }
        }
    }
}

fn all(paths: &[&str]) -> Vec<http::request::Builder> {
    paths.iter().map(|path| get(path)).collect()
}

#[tokio::test]
async fn every_kind_of_path() {
    let separated = path(PathSpecifier::PathSeparatedPrefix("/api/dev".into()));
    check(under("/a"), all(&["/a", "/ab", "/a?q"]), all(&["/", "/A", "/b/a"])).await;
    check(any_case(under("/A")), all(&["/a", "/AB"]), all(&["/b"])).await;
    check(path(PathSpecifier::Path("/a".into())), all(&["/a", "/a?b=c"]), all(&["/a/", "/A"])).await;
    check(any_case(path(PathSpecifier::Path("/a".into()))), all(&["/a", "/A"]), all(&["/a/"])).await;
    let expression = path(PathSpecifier::SafeRegex(regex("/v[0-9]+/.*")));
    check(expression, all(&["/v1/", "/v22/x?y"]), all(&["/v/", "/x/v1/", "/V1/"])).await;
    let taken = all(&["/api/dev", "/api/dev/", "/api/dev/v1", "/api/dev?param=true"]);
    check(separated.clone(), taken, all(&["/api/developer", "/api/DEV"])).await;
    check(any_case(separated), all(&["/API/dev/v1"]), all(&["/api/developer"])).await;
    check(template("/users/{id}/*"), all(&["/users/7/a?b"]), all(&["/users/7", "/users/7/a/b"])).await;
    check(template("/files/**.mpd"), all(&["/files/a/b.mpd"]), all(&["/files/a/b.mp4"])).await;
}

#[tokio::test]
async fn query_parameters_cookies_methods_and_schemes() {
    let with_query = |matchers: Vec<QueryParameterMatcher>| RouteMatch { query_parameters: matchers, ..under("/") };
    let value = |matcher| QueryParameterMatchSpecifier::StringMatch(matcher);
    check(
        with_query(vec![query("v", value(exact("1")))]),
        all(&["/?v=1", "/x?a=b&v=1", "/?v=1&v=2"]),
        all(&["/", "/?v=2", "/?v", "/?V=1", "/?v=2&v=1"]),
    )
    .await;
    let both = vec![
        query("v", value(string(MatchPattern::SafeRegex(regex("[0-9]+"))))),
        query("debug", QueryParameterMatchSpecifier::PresentMatch(true)),
    ];
    check(with_query(both), all(&["/?v=12&debug", "/?debug=&v=1"]), all(&["/?v=12", "/?debug", "/?v=x&debug"])).await;
    let absent = query("v", QueryParameterMatchSpecifier::PresentMatch(false));
    check(with_query(vec![absent]), all(&["/", "/?x"]), all(&["/?v", "/?v=1"])).await;

    let with_cookies = |matchers: Vec<CookieMatcher>| RouteMatch { cookies: matchers, ..under("/") };
    let cookies = |line: &str| get("/").header("cookie", line);
    check(
        with_cookies(vec![cookie("user", "jason", false)]),
        vec![cookies("user=jason"), cookies("a=b; user=jason; c=d"), cookies("user=\"jason\"")],
        vec![get("/"), cookies("user=json"), cookies("xuser=jason"), cookies("user=json; user=jason")],
    )
    .await;
    // An absent cookie does not match, which is inverted too.
    check(
        with_cookies(vec![cookie("user", "jason", true)]),
        vec![get("/"), cookies("user=json")],
        vec![cookies("user=jason")],
    )
    .await;

    let header = |name: &str, value: &str| HeaderMatcher {
        name: name.into(),
        header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(exact(value))),
        ..HeaderMatcher::default()
    };
    let post = || get("/").method("POST");
    let with_headers = |headers| RouteMatch { headers, ..under("/") };
    check(with_headers(vec![header(":method", "POST"), header(":scheme", "http")]), vec![post()], vec![get("/")]).await;
    let authority = header(":authority", "greeter.default.svc.cluster.local:50051");
    check(with_headers(vec![authority]), vec![get("/")], vec![]).await;

    let grpc = RouteMatch { grpc: Some(GrpcRouteMatchOptions {}), ..under("/") };
    let typed = |content_type: &str| get("/").header("content-type", content_type);
    check(
        grpc,
        vec![typed("application/grpc"), typed("application/grpc+proto")],
        vec![typed("application/grpc-web"), typed("application/json")],
    )
    .await;
}

#[tokio::test]
async fn the_longest_domain_of_the_best_kind_answers_for_the_host() {
    let host = |domains: &[&str], subset: &str| VirtualHost {
        name: format!("host-{}", domains[0]),
        domains: domains.iter().map(|domain| (*domain).to_owned()).collect(),
        routes: vec![to(subset, under("/"))],
        ..VirtualHost::default()
    };
    let full = "greeter.default.svc.cluster.local";
    let cases: [(&[&str], &[&str]); 7] = [
        (&[full], &["*.cluster.local", "greeter*", "*"]),
        (&["greeter.default.svc.cluster.local:50051"], &["greeter.default.svc.cluster.local:50052", "*"]),
        (&["GREETER.default.SVC.cluster.local"], &["*"]),
        (&["*.svc.cluster.local"], &["*.cluster.local", "greeter.default.svc.*", "*"]),
        (&["greeter.default.*"], &["greeter.*", "*"]),
        (&["*.cluster.local:50051"], &["*"]),
        (&["*"], &["elsewhere"]),
    ];
    for (best, others) in cases {
        for turned in [false, true] {
            let mut hosts = vec![host(best, "yes")];
            hosts.extend(others.iter().map(|domain| host(&[*domain], "no")));
            if turned {
                hosts.reverse();
            }
            let (world, _backends) = configured(|config| config.virtual_hosts = hosts).await;
            for way in Way::BOTH {
                assert_eq!(way.backend(&world.mesh, get("/")).await, "yes", "{best:?} of {others:?}, {way:?}");
            }
        }
    }
}
