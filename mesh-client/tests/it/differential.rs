//! Random routes and requests: the route taken is the one that a naive reading of Envoy's documents takes.
//!
//! Each route answers by itself with its position, so that no backend is needed; the configuration comes over xDS.

use crate::support::{
    CLUSTER, World,
    echo::{Way, get},
    edit, service, until,
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{DataSource, RuntimeFractionalPercent, data_source::Specifier},
            route::v3::{
                CookieMatcher, DirectResponseAction, HeaderMatcher, QueryParameterMatcher, Route, RouteConfiguration,
                RouteMatch, header_matcher::HeaderMatchSpecifier,
                query_parameter_matcher::QueryParameterMatchSpecifier, route, route_match::PathSpecifier,
            },
        },
        r#type::{
            matcher::v3::{RegexMatcher, StringMatcher, string_matcher::MatchPattern},
            v3::{FractionalPercent, Int64Range},
        },
    },
    google::protobuf::BoolValue,
};
use http::request::Builder;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::select,
    test_runner::{Config, TestRunner},
};

/// A regular expression, and what it means.
type Expression = (&'static str, fn(&str) -> bool);

const PATH_EXPRESSIONS: [Expression; 3] = [
    ("/a(/.*)?", |path| path == "/a" || path.starts_with("/a/")),
    ("/[ab]+", |path| path.len() > 1 && path[1..].chars().all(|c| c == 'a' || c == 'b')),
    (".*/b", |path| path.ends_with("/b")),
];
const VALUE_EXPRESSIONS: [Expression; 2] = [
    ("[0-9]+", |value| !value.is_empty() && value.chars().all(|c| c.is_ascii_digit())),
    ("a.*", |value| value.starts_with('a')),
];

#[derive(Clone, Debug)]
struct Rule {
    path: Path,
    fold: Option<bool>,
    headers: Vec<Header>,
    query: Vec<(&'static str, Result<Text, bool>)>,
    cookies: Vec<(&'static str, &'static str, bool)>,
    method: Option<&'static str>,
    /// All or nothing: what lies between is no matter for a model.
    fraction: Option<bool>,
}

#[derive(Clone, Debug)]
enum Path {
    Prefix(String),
    Exact(String),
    Separated(String),
    Matches(usize),
}

#[derive(Clone, Debug)]
struct Header {
    name: &'static str,
    kind: HeaderKind,
    invert: bool,
    missing_is_empty: bool,
}

#[derive(Clone, Debug)]
enum HeaderKind {
    Is(Text),
    Between(i64, i64),
    Present(bool),
}

#[derive(Clone, Debug)]
enum Text {
    Exact(&'static str, bool),
    Prefix(&'static str, bool),
    Suffix(&'static str, bool),
    Contains(&'static str, bool),
    Matches(usize),
}

#[derive(Clone, Debug)]
struct Asked {
    method: &'static str,
    path: String,
    headers: Vec<(&'static str, &'static str)>,
    query: Vec<(&'static str, Option<&'static str>)>,
    cookies: Vec<(&'static str, &'static str)>,
}

// What the documents say.

impl Rule {
    fn takes(&self, asked: &Asked) -> bool {
        let fold = self.fold == Some(false);
        let case = |text: &str| if fold { text.to_ascii_lowercase() } else { text.to_owned() };
        let path = match &self.path {
            Path::Prefix(prefix) => case(&asked.path).starts_with(&case(prefix)),
            Path::Exact(exact) => case(&asked.path) == case(exact),
            Path::Separated(prefix) => {
                let (path, prefix) = (case(&asked.path), case(prefix));
                path == prefix || path.starts_with(&(prefix + "/"))
            }
            Path::Matches(which) => PATH_EXPRESSIONS[*which].1(&asked.path),
        };
        path && self.method.is_none_or(|method| method == asked.method)
            && self.headers.iter().all(|header| header.takes(asked))
            && self.query.iter().all(|(name, wanted)| {
                let value = asked.query.iter().find(|(other, _)| other == name).map(|(_, value)| value.unwrap_or(""));
                match wanted {
                    Ok(text) => value.is_some_and(|value| text.takes(value)),
                    Err(present) => value.is_some() == *present,
                }
            })
            && self.cookies.iter().all(|(name, wanted, invert)| {
                let value = asked.cookies.iter().find(|(other, _)| other == name).map(|(_, value)| value);
                (value == Some(wanted)) != *invert
            })
            && self.fraction != Some(false)
    }
}

impl Header {
    fn takes(&self, asked: &Asked) -> bool {
        let values: Vec<&str> =
            asked.headers.iter().filter(|(name, _)| *name == self.name).map(|(_, value)| *value).collect();
        let value = match (values.is_empty(), self.missing_is_empty) {
            (true, false) => None,
            _ => Some(values.join(",")),
        };
        let taken = match (&self.kind, value) {
            (HeaderKind::Present(wanted), value) => value.is_some() == *wanted,
            // Inverted or not.
            (_, None) => return false,
            (HeaderKind::Is(text), Some(value)) => text.takes(&value),
            (HeaderKind::Between(from, to), Some(value)) => {
                value.parse::<i64>().is_ok_and(|number| *from <= number && number < *to)
            }
        };
        taken != self.invert
    }
}

impl Text {
    fn takes(&self, value: &str) -> bool {
        let case = |text: &str, fold: bool| if fold { text.to_ascii_lowercase() } else { text.to_owned() };
        match *self {
            Self::Exact(text, fold) => case(value, fold) == case(text, fold),
            Self::Prefix(text, fold) => case(value, fold).starts_with(&case(text, fold)),
            Self::Suffix(text, fold) => case(value, fold).ends_with(&case(text, fold)),
            Self::Contains(text, fold) => case(value, fold).contains(&case(text, fold)),
            Self::Matches(which) => VALUE_EXPRESSIONS[which].1(value),
        }
    }
}

// The same, as the mesh is told.

fn regex((expression, _): Expression) -> RegexMatcher {
    RegexMatcher { regex: expression.to_owned(), ..RegexMatcher::default() }
}

fn answer(position: &str, found: RouteMatch) -> Route {
    let body = DataSource { specifier: Some(Specifier::InlineString(position.to_owned())), ..DataSource::default() };
    Route {
        name: format!("route-{position}"),
        r#match: Some(found),
        action: Some(route::Action::DirectResponse(DirectResponseAction {
            status: 200,
            body: Some(body),
            ..DirectResponseAction::default()
        })),
        ..Route::default()
    }
}

fn path(specifier: PathSpecifier) -> RouteMatch {
    RouteMatch { path_specifier: Some(specifier), ..RouteMatch::default() }
}

impl Rule {
    fn message(&self) -> RouteMatch {
        let specifier = match &self.path {
            Path::Prefix(prefix) => PathSpecifier::Prefix(prefix.clone()),
            Path::Exact(exact) => PathSpecifier::Path(exact.clone()),
            Path::Separated(prefix) => PathSpecifier::PathSeparatedPrefix(prefix.clone()),
            Path::Matches(which) => PathSpecifier::SafeRegex(regex(PATH_EXPRESSIONS[*which])),
        };
        let method = self.method.map(|method| HeaderMatcher {
            name: ":method".to_owned(),
            header_match_specifier: Some(HeaderMatchSpecifier::StringMatch(Text::Exact(method, false).message())),
            ..HeaderMatcher::default()
        });
        RouteMatch {
            case_sensitive: self.fold.map(|value| BoolValue { value }),
            headers: self.headers.iter().map(Header::message).chain(method).collect(),
            query_parameters: self.query.iter().map(|(name, wanted)| query(name, wanted)).collect(),
            cookies: (self.cookies.iter())
                .map(|(name, value, invert)| CookieMatcher {
                    name: (*name).to_owned(),
                    string_match: Some(Text::Exact(value, false).message()),
                    invert_match: *invert,
                })
                .collect(),
            runtime_fraction: self.fraction.map(|all| RuntimeFractionalPercent {
                default_value: Some(FractionalPercent { numerator: if all { 100 } else { 0 }, denominator: 0 }),
                ..RuntimeFractionalPercent::default()
            }),
            ..path(specifier)
        }
    }
}

fn query(name: &str, wanted: &Result<Text, bool>) -> QueryParameterMatcher {
    let specifier = match wanted {
        Ok(text) => QueryParameterMatchSpecifier::StringMatch(text.message()),
        Err(present) => QueryParameterMatchSpecifier::PresentMatch(*present),
    };
    QueryParameterMatcher { name: name.to_owned(), query_parameter_match_specifier: Some(specifier) }
}

impl Header {
    fn message(&self) -> HeaderMatcher {
        HeaderMatcher {
            name: self.name.to_owned(),
            invert_match: self.invert,
            treat_missing_header_as_empty: self.missing_is_empty,
            header_match_specifier: Some(match &self.kind {
                HeaderKind::Is(text) => HeaderMatchSpecifier::StringMatch(text.message()),
                HeaderKind::Between(start, end) => {
                    HeaderMatchSpecifier::RangeMatch(Int64Range { start: *start, end: *end })
                }
                HeaderKind::Present(wanted) => HeaderMatchSpecifier::PresentMatch(*wanted),
            }),
        }
    }
}

impl Text {
    fn message(&self) -> StringMatcher {
        let (pattern, ignore_case) = match *self {
            Self::Exact(text, fold) => (MatchPattern::Exact(text.to_owned()), fold),
            Self::Prefix(text, fold) => (MatchPattern::Prefix(text.to_owned()), fold),
            Self::Suffix(text, fold) => (MatchPattern::Suffix(text.to_owned()), fold),
            Self::Contains(text, fold) => (MatchPattern::Contains(text.to_owned()), fold),
            Self::Matches(which) => (MatchPattern::SafeRegex(regex(VALUE_EXPRESSIONS[which])), false),
        };
        StringMatcher { match_pattern: Some(pattern), ignore_case }
    }
}

impl Asked {
    fn request(&self) -> Builder {
        let query: Vec<String> = (self.query.iter())
            .map(|(name, value)| value.map_or_else(|| (*name).to_owned(), |value| format!("{name}={value}")))
            .collect();
        let query = if query.is_empty() { String::new() } else { format!("?{}", query.join("&")) };
        let cookies: Vec<String> = self.cookies.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let mut request = get(&format!("{}{query}", self.path)).method(self.method);
        if !cookies.is_empty() {
            request = request.header("cookie", cookies.join("; "));
        }
        self.headers.iter().fold(request, |request, (name, value)| request.header(*name, *value))
    }
}

// What is drawn. Few names and values, so that most rules meet most requests half-way.

const HEADERS: [&str; 2] = ["x-a", "x-b"];
const PARAMETERS: [&str; 2] = ["q", "Q"];
const COOKIES: [&str; 2] = ["c", "d"];
const METHODS: [&str; 2] = ["GET", "POST"];
const VALUES: [&str; 6] = ["1", "12", "-5", "a", "aB", "ab"];

fn any_path() -> impl Strategy<Value = String> {
    (vec(select(&["a", "b", "ab", "A"][..]), 1..4), any::<bool>())
        .prop_map(|(segments, slash)| format!("/{}{}", segments.join("/"), if slash { "/" } else { "" }))
}

fn any_text() -> impl Strategy<Value = Text> {
    let value = || (select(&VALUES[..]), any::<bool>());
    prop_oneof![
        value().prop_map(|(text, fold)| Text::Exact(text, fold)),
        value().prop_map(|(text, fold)| Text::Prefix(text, fold)),
        value().prop_map(|(text, fold)| Text::Suffix(text, fold)),
        value().prop_map(|(text, fold)| Text::Contains(text, fold)),
        (0..VALUE_EXPRESSIONS.len()).prop_map(Text::Matches),
    ]
}

fn any_header() -> impl Strategy<Value = Header> {
    let kind = prop_oneof![
        4 => (any_text(), any::<bool>()).prop_map(|(text, empty)| (HeaderKind::Is(text), empty)),
        1 => (-9..2i64, 2..20i64, any::<bool>()).prop_map(|(from, to, empty)| (HeaderKind::Between(from, to), empty)),
        1 => any::<bool>().prop_map(|wanted| (HeaderKind::Present(wanted), false)),
    ];
    (select(&HEADERS[..]), kind, any::<bool>()).prop_map(|(name, (kind, missing_is_empty), invert)| Header {
        name,
        kind,
        invert,
        missing_is_empty,
    })
}

fn any_rule() -> impl Strategy<Value = Rule> {
    let bare = |path: String| path.trim_end_matches('/').to_owned();
    let path = prop_oneof![
        any_path().prop_map(Path::Prefix),
        any_path().prop_map(Path::Exact),
        any_path().prop_map(bare).prop_map(Path::Separated),
        (0..PATH_EXPRESSIONS.len()).prop_map(Path::Matches),
    ];
    let wanted = prop_oneof![any_text().prop_map(Ok), any::<bool>().prop_map(Err)];
    let rest = (
        vec((select(&PARAMETERS[..]), wanted), 0..2),
        vec((select(&COOKIES[..]), select(&VALUES[..]), any::<bool>()), 0..2),
        option::weighted(0.2, select(&METHODS[..])),
        option::weighted(0.2, any::<bool>()),
    );
    (path, option::of(any::<bool>()), vec(any_header(), 0..2), rest).prop_map(
        |(path, fold, headers, (query, cookies, method, fraction))| Rule {
            path,
            fold,
            headers,
            query,
            cookies,
            method,
            fraction,
        },
    )
}

fn any_request() -> impl Strategy<Value = Asked> {
    (
        select(&METHODS[..]),
        any_path(),
        vec((select(&HEADERS[..]), select(&VALUES[..])), 0..4),
        vec((select(&PARAMETERS[..]), option::of(select(&VALUES[..]))), 0..3),
        vec((select(&COOKIES[..]), select(&VALUES[..])), 0..3),
    )
        .prop_map(|(method, path, headers, query, cookies)| Asked { method, path, headers, query, cookies })
}

async fn answered(world: &World, way: Way, request: Builder) -> String {
    let response = way.send(&world.mesh, request, "").await.expect("every request is answered by a route");
    String::from_utf8(response.body().to_vec()).unwrap()
}

/// Why the client refused what it was told last.
fn refusal(world: &World) -> Option<String> {
    let resources = world.mesh.status().expect("there is a control plane").resources;
    resources.into_iter().find_map(|resource| resource.error_state).map(|error| format!("{error:?}"))
}

/// Puts `rules` in force, and asks both ways in.
async fn check(world: &World, version: usize, rules: &[Rule], requests: &[Asked]) -> Result<(), TestCaseError> {
    let numbered = rules.iter().enumerate().map(|(at, rule)| answer(&at.to_string(), rule.message()));
    let version = format!("version {version}");
    let routes: Vec<Route> = std::iter::once(answer(&version, path(PathSpecifier::Path("/version".to_owned()))))
        .chain(numbered)
        .chain([answer("none", path(PathSpecifier::Prefix("/".to_owned())))])
        .collect();
    edit::<RouteConfiguration>(&world.cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        config.virtual_hosts[0].routes = routes;
    });
    for way in Way::BOTH {
        until("the routes are in force", async || {
            if let Some(error) = refusal(world) {
                panic!("{error}");
            }
            answered(world, way, get("/version")).await == version
        })
        .await;
        for asked in requests {
            let expected = rules.iter().position(|rule| rule.takes(asked));
            let expected = expected.map_or_else(|| "none".to_owned(), |at| at.to_string());
            prop_assert_eq!(answered(world, way, asked.request()).await, expected, "{:?}, {:?}", way, asked);
        }
    }
    Ok(())
}

#[test]
fn the_route_taken_is_the_one_that_a_naive_reader_of_the_documents_takes() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let world = runtime.block_on(async {
        let backend = "127.0.0.1:9".parse().unwrap();
        let cp = ControlPlane::builder().yaml(service(&[("v1", backend)])).start().await.unwrap();
        edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
            config.virtual_hosts[0].routes = vec![answer("version 0", path(PathSpecifier::Prefix("/".to_owned())))];
        });
        World::on(cp).await
    });
    let version = std::cell::Cell::new(0);
    let config = Config { cases: 128, failure_persistence: None, max_shrink_iters: 64, ..Config::default() };
    TestRunner::new(config)
        .run(&(vec(any_rule(), 1..30), vec(any_request(), 1..25)), |(rules, requests)| {
            version.set(version.get() + 1);
            runtime.block_on(check(&world, version.get(), &rules, &requests))
        })
        .unwrap();
}
