//! Random routes, and who takes a random request: the table, and a reader that does what the documents say, one route after the other.

use crate::outbound::{
    filter::Filters,
    route::{Profile, RequestHead, RouteTable, Scope},
};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use mesh_xds::resource::{
    Action, ClusterSpecifier, Forward, HeaderMatcher, HeaderMatcherKind, PathMatcher, Route, RouteConfiguration,
    RouteMatch, StringMatcher, StringPattern, VirtualHost,
};
use std::sync::Arc;

/// Draws from bytes; zeros when they are used up.
struct Draw<'a>(&'a [u8]);

const NAMES: [&str; 3] = ["x-a", "x-b", ":method"];
const SEGMENTS: [&str; 5] = ["a", "b", "A", "ab", ""];
const VALUES: [&str; 6] = ["", "a", "A", "ab", "10", "POST"];

impl Draw<'_> {
    fn one(&mut self, below: usize) -> usize {
        let Some((&first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        usize::from(first) % below
    }

    fn of<'t>(&mut self, texts: &[&'t str]) -> &'t str {
        texts[self.one(texts.len())]
    }

    fn path(&mut self) -> String {
        (0..=self.one(3)).map(|_| format!("/{}", self.of(&SEGMENTS))).collect()
    }

    fn route(&mut self) -> RouteMatch {
        let case_sensitive = self.one(3) > 0;
        let text = self.path();
        let text = if case_sensitive { text } else { text.to_ascii_lowercase() };
        let path = match self.one(3) {
            0 => PathMatcher::Prefix { prefix: text, case_sensitive },
            1 => PathMatcher::Exact { path: text, case_sensitive },
            _ => PathMatcher::Separated { prefix: text.trim_end_matches('/').to_owned(), case_sensitive },
        };
        let headers = (0..self.one(3)).map(|_| self.header()).collect();
        RouteMatch { path, headers, grpc_only: self.one(8) == 7, ..RouteMatch::default() }
    }

    fn header(&mut self) -> HeaderMatcher {
        let name = self.of(&NAMES).to_owned();
        let kind = match self.one(6) {
            0 => HeaderMatcherKind::Present(self.one(2) == 0),
            1 => HeaderMatcherKind::Range { start: 5, end: 5 + self.one(8) as i64 },
            kind => {
                let ignore_case = self.one(2) == 0;
                let text = self.of(&VALUES);
                let text = if ignore_case { text.to_ascii_lowercase() } else { text.to_owned() };
                let pattern = match kind {
                    _ if text.is_empty() => StringPattern::Exact(text),
                    2 => StringPattern::Exact(text),
                    3 => StringPattern::Prefix(text),
                    4 => StringPattern::Suffix(text),
                    _ => StringPattern::Contains(text),
                };
                HeaderMatcherKind::String(StringMatcher { pattern, ignore_case })
            }
        };
        HeaderMatcher { name, kind, invert: self.one(4) == 0, treat_missing_as_empty: self.one(4) == 0 }
    }
}

/// Routes and a request, drawn from the bytes.
///
/// # Panics
/// When the table finds another route than the reader.
pub fn routes(data: &[u8]) {
    let mut draw = Draw(data);
    let matches: Vec<RouteMatch> = (0..=draw.one(24)).map(|_| draw.route()).collect();
    let action = Action::Forward(Arc::new(Forward::to(ClusterSpecifier::Cluster("cluster".into()))));
    let routes = matches.iter().map(|matches| Route::new("", matches.clone(), action.clone())).collect();
    let host = VirtualHost { name: "fuzz".into(), routes, ..VirtualHost::default() };
    let shared = Filters::default();
    let scope = Scope {
        routes: &RouteConfiguration::default(),
        listener: &"listener".into(),
        filters: &[],
        profile: Profile::Envoy,
        max_stream_duration: None,
        stream_idle_timeout: None,
        general: false,
        around: None,
        shared: &shared,
    };
    let table: RouteTable<Arc<str>> = RouteTable::compile(&host, scope, &mut Arc::clone);
    for _ in 0..4 {
        let method = if draw.one(2) == 0 { Method::GET } else { Method::POST };
        let path = draw.path();
        let uri: Uri = format!("http://fuzz{path}?q").parse().expect("a URI");
        let mut headers = HeaderMap::new();
        for _ in 0..draw.one(4) {
            let name = HeaderName::from_static(["x-a", "x-b"][draw.one(2)]);
            headers.append(name, HeaderValue::from_static(VALUES[draw.one(VALUES.len())]));
        }
        if draw.one(4) == 0 {
            headers.insert("content-type", HeaderValue::from_static("application/grpc+proto"));
        }
        let head = RequestHead::new(&method, &uri, &headers);
        let found = table.find(&head, &mut |_| 0).ok().map(|found| found.index);
        let expected = matches.iter().position(|route| takes(route, &method, &path, &headers));
        assert_eq!(found, expected, "{method} {path} {headers:?} among {matches:#?}");
    }
}

fn takes(route: &RouteMatch, method: &Method, path: &str, headers: &HeaderMap) -> bool {
    let case = |sensitive: bool| if sensitive { path.to_owned() } else { path.to_ascii_lowercase() };
    let taken = match &route.path {
        PathMatcher::Prefix { prefix, case_sensitive } => case(*case_sensitive).starts_with(prefix),
        PathMatcher::Exact { path, case_sensitive } => case(*case_sensitive) == *path,
        PathMatcher::Separated { prefix, case_sensitive } => {
            let path = case(*case_sensitive);
            path == *prefix || path.starts_with(&format!("{prefix}/"))
        }
        PathMatcher::Regex(_) | PathMatcher::Template(_) => unreachable!("none is drawn"),
    };
    let grpc = headers.contains_key("content-type");
    taken && (grpc || !route.grpc_only) && route.headers.iter().all(|header| has(header, method, headers))
}

fn has(matcher: &HeaderMatcher, method: &Method, headers: &HeaderMap) -> bool {
    let values: Vec<&str> = match matcher.name.as_str() {
        ":method" => vec![method.as_str()],
        name => headers.get_all(name).iter().map(|value| value.to_str().expect("they are texts")).collect(),
    };
    // A header that is treated as empty is there.
    let value = (!values.is_empty() || matcher.treat_missing_as_empty).then(|| values.join(","));
    let holds = match (&matcher.kind, value) {
        (HeaderMatcherKind::Present(wanted), value) => value.is_some() == *wanted,
        (_, None) => return false,
        (HeaderMatcherKind::Range { start, end }, Some(value)) => {
            value.parse::<i64>().is_ok_and(|number| (*start..*end).contains(&number))
        }
        (HeaderMatcherKind::String(wanted), Some(value)) => {
            let value = if wanted.ignore_case { value.to_ascii_lowercase() } else { value };
            match &wanted.pattern {
                StringPattern::Exact(text) => value == *text,
                StringPattern::Prefix(text) => value.starts_with(text),
                StringPattern::Suffix(text) => value.ends_with(text),
                StringPattern::Contains(text) => value.contains(text),
                StringPattern::Regex(_) => unreachable!("none is drawn"),
            }
        }
    };
    holds != matcher.invert
}
