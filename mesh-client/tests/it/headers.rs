//! Every kind of header matcher.

#![allow(deprecated, reason = "control planes still send the deprecated kinds")]

use crate::support::{CLUSTER, World, echo::Way, edit, greeter, routes, rule, service, to};
use envoy_types::pb::envoy::{
    config::route::v3::{
        HeaderMatcher, Route, RouteAction, RouteConfiguration, RouteMatch,
        header_matcher::HeaderMatchSpecifier as Kind, route, route_action::ClusterSpecifier,
        route_match::PathSpecifier,
    },
    r#type::{
        matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
        v3::Int64Range,
    },
};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;

/// A matcher of the header `x-test`, and values with what it makes of them; `None` sends no such header.
struct Case {
    name: &'static str,
    matcher: HeaderMatcher,
    values: Vec<(Option<&'static str>, bool)>,
}

fn case(name: &'static str, kind: Kind, values: &[(Option<&'static str>, bool)]) -> Case {
    let matcher =
        HeaderMatcher { name: "x-test".to_owned(), header_match_specifier: Some(kind), ..HeaderMatcher::default() };
    Case { name, matcher, values: values.to_vec() }
}

fn inverted(name: &'static str, kind: Kind, values: &[(Option<&'static str>, bool)]) -> Case {
    let mut case = case(name, kind, values);
    case.matcher.invert_match = true;
    case
}

fn or_empty(mut case: Case) -> Case {
    case.matcher.treat_missing_header_as_empty = true;
    case
}

fn regex(text: &str) -> RegexMatcher {
    RegexMatcher { regex: text.to_owned(), ..RegexMatcher::default() }
}

fn string(pattern: MatchPattern, ignore_case: bool) -> Kind {
    Kind::StringMatch(StringMatcher { match_pattern: Some(pattern), ignore_case })
}

fn cases() -> Vec<Case> {
    let range = || Kind::RangeMatch(Int64Range { start: -5, end: 10 });
    let exact = |text: &str| MatchPattern::Exact(text.to_owned());
    vec![
        case(
            "exact",
            Kind::ExactMatch("Yes".into()),
            &[(Some("Yes"), true), (Some("yes"), false), (Some("Yes!"), false), (Some(""), false), (None, false)],
        ),
        case(
            "prefix",
            Kind::PrefixMatch("can".into()),
            &[(Some("canary"), true), (Some("a-can"), false), (None, false)],
        ),
        case(
            "suffix",
            Kind::SuffixMatch("ary".into()),
            &[(Some("canary"), true), (Some("ary-"), false), (None, false)],
        ),
        case(
            "contains",
            Kind::ContainsMatch("nar".into()),
            &[(Some("canary"), true), (Some("car"), false), (None, false)],
        ),
        case(
            "regex",
            Kind::SafeRegexMatch(regex("[a-c]+[0-9]")),
            &[(Some("abc7"), true), (Some("abc77"), false), (Some("-abc7"), false), (None, false)],
        ),
        case(
            "range",
            range(),
            &[
                (Some("-5"), true),
                (Some("9"), true),
                (Some("10"), false),
                (Some("-6"), false),
                (Some("7.5"), false),
                (Some("seven"), false),
                (None, false),
            ],
        ),
        case("present", Kind::PresentMatch(true), &[(Some(""), true), (Some("x"), true), (None, false)]),
        case("absent", Kind::PresentMatch(false), &[(Some(""), false), (Some("x"), false), (None, true)]),
        // A header that is missing matches nothing, inverted or not; only presence itself is another matter.
        inverted(
            "not exact",
            Kind::ExactMatch("no".into()),
            &[(Some("no"), false), (Some("yes"), true), (None, false)],
        ),
        inverted("not in range", range(), &[(Some("3"), false), (Some("10"), true), (Some("x"), true), (None, false)]),
        inverted("not present", Kind::PresentMatch(true), &[(Some("x"), false), (None, true)]),
        case("string", string(exact("Yes"), false), &[(Some("Yes"), true), (Some("yes"), false), (None, false)]),
        case("any case", string(exact("Yes"), true), &[(Some("yES"), true), (Some("Yes"), true), (Some("ye"), false)]),
        case(
            "prefix of any case",
            string(MatchPattern::Prefix("Can".into()), true),
            &[(Some("CANARY"), true), (Some("xcan"), false)],
        ),
        case(
            "suffix of any case",
            string(MatchPattern::Suffix("Ary".into()), true),
            &[(Some("CANARY"), true), (Some("aryx"), false)],
        ),
        case(
            "contained in any case",
            string(MatchPattern::Contains("nAr".into()), true),
            &[(Some("CANARY"), true), (Some("car"), false)],
        ),
        case(
            "string regex",
            string(MatchPattern::SafeRegex(regex("a+")), false),
            &[(Some("aa"), true), (Some("ab"), false)],
        ),
        or_empty(case(
            "missing is empty",
            string(exact(""), false),
            &[(Some(""), true), (None, true), (Some("x"), false)],
        )),
        or_empty(inverted("missing is not no", Kind::ExactMatch("no".into()), &[(None, true), (Some("no"), false)])),
    ]
}

/// A route to the greeter's subset for requests whose `x-case` is this one.
fn route(case: Option<(usize, &HeaderMatcher)>, subset: &str) -> Route {
    let gate = |n: usize| HeaderMatcher {
        name: "x-case".to_owned(),
        header_match_specifier: Some(Kind::ExactMatch(n.to_string())),
        ..HeaderMatcher::default()
    };
    Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            headers: case.map(|(n, matcher)| vec![gate(n), matcher.clone()]).unwrap_or_default(),
            ..RouteMatch::default()
        }),
        action: Some(route::Action::Route(RouteAction {
            cluster_specifier: Some(ClusterSpecifier::Cluster(CLUSTER.replace("||", &format!("|{subset}|")))),
            ..RouteAction::default()
        })),
        ..Route::default()
    }
}

#[tokio::test]
async fn every_kind_of_header_matcher_chooses_the_route() {
    let (yes, no) = (greeter("yes").await, greeter("no").await);
    let http = format!("[{{route: [{{destination: {}}}, {{destination: {}, weight: 1}}]}}]", to("yes"), to("no"));
    let yaml = service(&[("yes", yes.addr()), ("no", no.addr())]) + &routes(&http) + &rule("{}", &["yes", "no"]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let cases = cases();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let matched = cases.iter().enumerate().map(|(n, case)| route(Some((n, &case.matcher)), "yes"));
        config.virtual_hosts[0].routes = matched.chain([route(None, "no")]).collect();
    });
    let world = World::on(cp).await;
    for (n, case) in cases.iter().enumerate() {
        for (value, matches) in &case.values {
            let number = n.to_string();
            let headers: Vec<_> =
                [("x-case", &*number)].into_iter().chain(value.map(|value| ("x-test", value))).collect();
            let expected = if *matches { "yes" } else { "no" };
            for way in Way::BOTH {
                let backend = way.greeter(&world.mesh, &headers).await;
                assert_eq!(backend, expected, "{} of {value:?}, {way:?}", case.name);
            }
        }
    }
    // Values of one name are one list (gRFC A28).
    let contains = cases.iter().position(|case| case.name == "regex").unwrap();
    let headers = [("x-case", &*contains.to_string()), ("x-test", "abc7"), ("x-test", "abc7")];
    for way in Way::BOTH {
        assert_eq!(way.greeter(&world.mesh, &headers).await, "no", "`abc7,abc7` is another value, {way:?}");
    }
}
