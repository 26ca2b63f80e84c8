//! What a route does: rewrites, edits and answers; and the matches that only Envoy has.

use super::*;
use crate::resource::{
    AppendAction, CookieMatcher, Format, HostRewrite, Mirror, MirrorCluster, MirrorHost, PathRewrite,
    QueryParameterMatcherKind, RedirectPath,
};
use envoy_types::pb::envoy::{
    config::{
        core::v3::{DataSource, HeaderValue, HeaderValueOption, data_source::Specifier as Source},
        route::v3::{
            CookieMatcher as ProtoCookie, CorsPolicy, DirectResponseAction, QueryParameterMatcher, RedirectAction,
            query_parameter_matcher::QueryParameterMatchSpecifier,
            redirect_action::{PathRewriteSpecifier, SchemeRewriteSpecifier},
            route_action::{HostRewriteSpecifier, RequestMirrorPolicy, UpgradeConfig},
        },
    },
    extensions::path::{
        r#match::uri_template::v3::UriTemplateMatchConfig, rewrite::uri_template::v3::UriTemplateRewriteConfig,
    },
    r#type::matcher::v3::RegexMatchAndSubstitute,
};

const ROUTE: &str = "virtual_hosts[0].routes[0]";

fn add(key: &str, value: &str) -> HeaderValueOption {
    let header = HeaderValue { key: key.into(), value: value.into(), ..HeaderValue::default() };
    HeaderValueOption { header: Some(header), ..HeaderValueOption::default() }
}

fn substitute(regex: &str, substitution: &str) -> RegexMatchAndSubstitute {
    let pattern = RegexMatcher { regex: regex.into(), ..RegexMatcher::default() };
    RegexMatchAndSubstitute { pattern: Some(pattern), substitution: substitution.into() }
}

fn template(path: &str) -> Option<PathSpecifier> {
    let config = UriTemplateMatchConfig { path_template: path.into() };
    let typed_config = Some(any(&config));
    Some(PathSpecifier::PathMatchPolicy(TypedExtensionConfig { name: "t".into(), typed_config }))
}

fn rewrite_template(path: &str) -> Option<TypedExtensionConfig> {
    let config = UriTemplateRewriteConfig { path_template_rewrite: path.into() };
    Some(TypedExtensionConfig { name: "t".into(), typed_config: Some(any(&config)) })
}

fn mirror(cluster: &str) -> RequestMirrorPolicy {
    RequestMirrorPolicy { cluster: cluster.into(), ..RequestMirrorPolicy::default() }
}

fn query(name: &str) -> QueryParameterMatcher {
    QueryParameterMatcher { name: name.into(), query_parameter_match_specifier: None }
}

fn string(text: &str) -> StringMatcher {
    StringMatcher { match_pattern: Some(MatchPattern::Exact(text.into())), ignore_case: false }
}

#[test]
fn bad_actions_and_matches_are_rejected() {
    rejects(
        ResourceType::RouteConfiguration,
        &good(),
        &[
            ("virtual_hosts[0].routes[0].match.path_separated_prefix", "ends in /", |r| {
                matches(r).path_specifier = Some(PathSpecifier::PathSeparatedPrefix("/a/".into()));
            }),
            ("virtual_hosts[0].routes[0].match.path_match_policy.typed_config.path_template", "twice", |r| {
                matches(r).path_specifier = template("/{a}/{a}");
            }),
            ("virtual_hosts[0].routes[0].match.path_match_policy.typed_config", "expected", |r| {
                let policy = TypedExtensionConfig { name: "t".into(), typed_config: Some(unknown("x.Y")) };
                matches(r).path_specifier = Some(PathSpecifier::PathMatchPolicy(policy));
            }),
            ("virtual_hosts[0].routes[0].match.query_parameters[0].name", "empty", |r| {
                matches(r).query_parameters = vec![query("")];
            }),
            ("virtual_hosts[0].routes[0].match.cookies[0].string_match", "missing", |r| {
                matches(r).cookies = vec![ProtoCookie { name: "a".into(), ..ProtoCookie::default() }];
            }),
            ("virtual_hosts[0].routes[0].route.regex_rewrite", "prefix_rewrite is set too", |r| {
                action(r).prefix_rewrite = "/".into();
                action(r).regex_rewrite = Some(substitute("a", "b"));
            }),
            ("virtual_hosts[0].routes[0].route.regex_rewrite", "group 2", |r| {
                action(r).regex_rewrite = Some(substitute("(a)", "\\2"));
            }),
            ("virtual_hosts[0].routes[0].route.path_rewrite_policy", "match by path template", |r| {
                action(r).path_rewrite_policy = rewrite_template("/a");
            }),
            (
                "virtual_hosts[0].routes[0].route.path_rewrite_policy.typed_config.path_template_rewrite",
                "no variable",
                |r| {
                    matches(r).path_specifier = template("/{a}");
                    action(r).path_rewrite_policy = rewrite_template("/{b}");
                },
            ),
            ("virtual_hosts[0].routes[0].route.request_mirror_policies[0].cluster", "empty", |r| {
                action(r).request_mirror_policies = vec![mirror("")];
            }),
            ("virtual_hosts[0].request_mirror_policies[0].cluster_header", "only one", |r| {
                let both = RequestMirrorPolicy { cluster_header: "x".into(), ..mirror("m") };
                r.virtual_hosts[0].request_mirror_policies = vec![both];
            }),
            ("virtual_hosts[0].routes[0].route.host_rewrite_literal", "not an authority", |r| {
                action(r).host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteLiteral("a b".into()));
            }),
            ("virtual_hosts[0].routes[0].route.weighted_clusters.clusters[0].cluster_header", "only one", |r| {
                let part = ClusterWeight {
                    cluster_header: "x".into(),
                    name: "c".into(),
                    weight: uint(1),
                    ..ClusterWeight::default()
                };
                action(r).cluster_specifier = Some(Specifier::WeightedClusters(WeightedCluster {
                    clusters: vec![part],
                    ..WeightedCluster::default()
                }));
            }),
            ("virtual_hosts[0].routes[0].request_headers_to_add[0].header.value", "unknown operator %NOPE%", |r| {
                route(r).request_headers_to_add = vec![add("x", "%NOPE%")];
            }),
            ("virtual_hosts[0].response_headers_to_add[0].header.key", "may not be changed", |r| {
                r.virtual_hosts[0].response_headers_to_add = vec![add(":status", "200")];
            }),
            ("request_headers_to_remove[0]", "may not be changed", |r| {
                r.request_headers_to_remove = vec!["Host".into()]
            }),
            ("virtual_hosts[0].routes[0].direct_response.status", "200..=599", |r| {
                route(r).action = Some(ProtoAction::DirectResponse(DirectResponseAction::default()));
            }),
            ("virtual_hosts[0].routes[0].direct_response.body", "5000 bytes", |r| {
                let specifier = Some(Source::InlineString("x".repeat(5000)));
                let body = Some(DataSource { specifier, ..DataSource::default() });
                let direct = DirectResponseAction { status: 200, body, ..DirectResponseAction::default() };
                route(r).action = Some(ProtoAction::DirectResponse(direct));
            }),
            ("virtual_hosts[0].routes[0].redirect.response_code", "unknown code 9", |r| {
                let redirect = RedirectAction { response_code: 9, ..RedirectAction::default() };
                route(r).action = Some(ProtoAction::Redirect(redirect));
            }),
        ],
    );
}

#[test]
fn envoys_matches_are_read() {
    let mut proto = good();
    let matcher = QueryParameterMatchSpecifier::StringMatch(string("1"));
    matches(&mut proto).query_parameters = vec![
        QueryParameterMatcher { query_parameter_match_specifier: Some(matcher), ..query("q") },
        QueryParameterMatcher {
            query_parameter_match_specifier: Some(QueryParameterMatchSpecifier::PresentMatch(false)),
            ..query("absent")
        },
    ];
    matches(&mut proto).cookies =
        vec![ProtoCookie { name: "c".into(), string_match: Some(string("v")), invert_match: true }];
    matches(&mut proto).path_specifier = template("/a/{b}");
    let (routes, notes) = accepted(&proto);
    let found = &routes.virtual_hosts[0].routes[0].matches;
    assert_eq!(found.query[0].kind, QueryParameterMatcherKind::String(crate::resource::StringMatcher::exact("1")));
    assert_eq!(found.query[1].kind, QueryParameterMatcherKind::Present(false));
    let value = crate::resource::StringMatcher::exact("v");
    assert_eq!(found.cookies, [CookieMatcher { name: "c".into(), value, invert: true }]);
    assert!(matches!(&found.path, PathMatcher::Template(template) if template.matches("/a/x")));
    assert_eq!(notes, []);
}

#[test]
fn rewrites_and_edits_are_read() {
    let mut proto = good();
    matches(&mut proto).path_specifier = template("/{a}");
    let action = action(&mut proto);
    action.path_rewrite_policy = rewrite_template("/x/{a}");
    action.host_rewrite_specifier = Some(HostRewriteSpecifier::HostRewriteHeader("X-Host".into()));
    action.cluster_specifier = Some(Specifier::ClusterHeader(":authority".into()));
    let mut replace = add("X-A", "%REQ(x)%");
    replace.append = Some(BoolValue { value: false });
    route(&mut proto).request_headers_to_add = vec![replace, add("x-b", "b")];
    route(&mut proto).response_headers_to_remove = vec!["Server".into()];
    let (routes, notes) = accepted(&proto);
    let forward = forward(&proto);
    assert!(matches!(forward.path_rewrite, Some(PathRewrite::Template(..))));
    assert_eq!(forward.host_rewrite, Some(HostRewrite::Header("x-host".parse().unwrap())));
    assert_eq!(forward.cluster, ClusterSpecifier::Header("host".parse().unwrap()));
    let edits = &routes.virtual_hosts[0].routes[0].edits;
    assert_eq!(edits.request.add[0].action, AppendAction::Overwrite);
    assert_eq!(edits.request.add[1].value, Format::literal("b"));
    assert_eq!(edits.response.remove, ["server"]);
    assert_eq!(notes, []);
}

#[test]
fn redirects_and_direct_responses_are_read() {
    let mut proto = good();
    let redirect = RedirectAction {
        response_code: 3,
        port_redirect: 8443,
        scheme_rewrite_specifier: Some(SchemeRewriteSpecifier::HttpsRedirect(true)),
        path_rewrite_specifier: Some(PathRewriteSpecifier::PrefixRewrite("/new".into())),
        ..RedirectAction::default()
    };
    route(&mut proto).action = Some(ProtoAction::Redirect(redirect));
    let (routes, _) = accepted(&proto);
    let Action::Redirect(redirect) = &routes.virtual_hosts[0].routes[0].action else { panic!() };
    assert_eq!((redirect.status, redirect.port, redirect.scheme.as_deref()), (307, Some(8443), Some("https")));
    assert_eq!(redirect.path, Some(RedirectPath::Prefix("/new".into())));

    let specifier = Some(Source::Filename("/etc/x".into()));
    let body = Some(DataSource { specifier, ..DataSource::default() });
    let direct = DirectResponseAction { status: 200, body, ..DirectResponseAction::default() };
    route(&mut proto).action = Some(ProtoAction::DirectResponse(direct));
    let (routes, notes) = accepted(&proto);
    assert!(matches!(routes.virtual_hosts[0].routes[0].action, Action::Unsupported(_)));
    assert_eq!(note_paths(&notes), ["virtual_hosts[0].routes[0].action"]);
}

#[test]
fn what_is_not_honoured_is_said() {
    let mut proto = good();
    proto.virtual_hosts[0].cors = Some(CorsPolicy::default());
    action(&mut proto).cors = Some(CorsPolicy::default());
    action(&mut proto).upgrade_configs = vec![UpgradeConfig::default()];
    route(&mut proto).request_headers_to_add = vec![add("x", "%DOWNSTREAM_REMOTE_ADDRESS%")];
    let (_, notes) = accepted(&proto);
    let value = format!("{ROUTE}.request_headers_to_add[0].header.value");
    let expected = ["virtual_hosts[0].cors", "virtual_hosts[0].routes[0].route.cors"];
    for path in expected.into_iter().chain(["virtual_hosts[0].routes[0].route.upgrade_configs", &value]) {
        assert!(note_paths(&notes).contains(&path), "{path} is not in {notes:?}");
    }
}

#[test]
fn the_most_specific_level_that_has_mirrors_wins() {
    let mut proto = good();
    let clusters = |proto: &Proto| -> Vec<MirrorCluster> {
        forward(proto).mirrors.iter().map(|mirror| mirror.cluster.clone()).collect()
    };
    let named = |name: &str| MirrorCluster::Name(name.into());
    assert_eq!(clusters(&proto), []);
    proto.request_mirror_policies = vec![mirror("config")];
    assert_eq!(clusters(&proto), [named("config")]);
    proto.virtual_hosts[0].request_mirror_policies = vec![mirror("host")];
    assert_eq!(clusters(&proto), [named("host")]);
    let by_header = RequestMirrorPolicy { cluster_header: ":authority".into(), ..RequestMirrorPolicy::default() };
    action(&mut proto).request_mirror_policies = vec![mirror("route"), by_header];
    assert_eq!(clusters(&proto), [named("route"), MirrorCluster::Header(http::header::HOST)]);
    let names = accepted(&proto).0.virtual_hosts[0].cluster_names();
    assert!(names.contains("route") && !names.contains("host"), "{names:?}");
}

#[test]
fn a_mirror_says_share_authority_and_sampling() {
    let mut proto = good();
    let plain = Mirror {
        cluster: MirrorCluster::Name("m".into()),
        fraction: None,
        trace_sampled: None,
        host: MirrorHost::Shadow,
    };
    action(&mut proto).request_mirror_policies = vec![mirror("m")];
    assert_eq!(*forward(&proto).mirrors, *std::slice::from_ref(&plain));
    let share = ProtoFraction { numerator: 25, denominator: 0 };
    action(&mut proto).request_mirror_policies = vec![RequestMirrorPolicy {
        runtime_fraction: Some(RuntimeFractionalPercent { default_value: Some(share), runtime_key: String::new() }),
        trace_sampled: Some(BoolValue { value: false }),
        disable_shadow_host_suffix_append: true,
        ..mirror("m")
    }];
    let said = Mirror {
        fraction: Some(FractionalPercent(250_000)),
        trace_sampled: Some(false),
        host: MirrorHost::Same,
        ..plain
    };
    assert_eq!(*forward(&proto).mirrors, [said]);
}

#[test]
fn an_authority_of_the_endpoint_says_whether_grpc_may_use_it() {
    let mut proto = good();
    action(&mut proto).host_rewrite_specifier = Some(HostRewriteSpecifier::AutoHostRewrite(BoolValue { value: true }));
    assert_eq!(forward(&proto).host_rewrite, Some(HostRewrite::Endpoint { trusted: false }));
    action(&mut proto).host_rewrite_specifier = Some(HostRewriteSpecifier::AutoHostRewrite(BoolValue { value: false }));
    assert_eq!(forward(&proto).host_rewrite, None);
}
