//! `RouteMatch` compiled: path, headers, query, cookies and fraction, asked without allocation.

use super::{
    Profile,
    head::{Name, RequestHead, Value},
    params,
};
use crate::{Downstream, outbound::timeout::is_grpc};
use http::header;
use mesh_tls::PeerIdentity;
use mesh_xds::resource::{
    CookieMatcher, FilterStateMatch, FilterStateMatcher, FractionalPercent, HeaderMatcher, HeaderMatcherKind,
    MetadataMatcher, PathMatcher, QueryParameterMatcher, QueryParameterMatcherKind, RouteMatch, StringMatcher,
    StringPattern, TlsContextMatch,
};
use std::fmt;

/// When a route applies.
#[derive(Debug)]
pub(crate) struct Matcher {
    path: PathMatcher,
    /// The operators of a path template stand for any bytes.
    any_bytes: bool,
    headers: HeaderMatchers,
    /// What few routes ask for.
    rare: Option<Box<Rare>>,
    fraction: Option<FractionalPercent>,
}

#[derive(Debug)]
struct Rare {
    query: Box<[QueryParameterMatcher]>,
    cookies: Box<[CookieMatcher]>,
    /// Only gRPC, by the content type; the flag: one that is absent counts as gRPC's.
    grpc: Option<bool>,
    tls: TlsContextMatch,
    metadata: Box<[MetadataMatcher]>,
    filter_state: Box<[FilterStateMatcher]>,
}

/// Header matchers that all have to match.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeaderMatchers(Box<[Compiled]>);

#[derive(Clone, Debug)]
struct Compiled {
    name: Name,
    matcher: HeaderMatcher,
}

/// Why a route does not apply.
#[derive(Debug)]
pub(super) enum Mismatch<'m> {
    Path(&'m PathMatcher),
    Header(&'m HeaderMatcher),
    Query(&'m QueryParameterMatcher),
    Cookie(&'m CookieMatcher),
    NotGrpc,
    Certificate(bool),
    Metadata(&'m MetadataMatcher),
    FilterState(&'m FilterStateMatcher),
    Fraction(FractionalPercent),
}

impl Matcher {
    pub(crate) fn compile(matches: &RouteMatch, profile: Profile) -> Self {
        Self {
            any_bytes: false,
            path: matches.path.clone(),
            headers: HeaderMatchers::compile(&matches.headers, profile),
            rare: Rare::compile(matches, profile),
            fraction: matches.fraction,
        }
    }

    /// The same for a server, where a route says what a request is asked: nobody gets around it by a byte that no path should have.
    pub(crate) fn of_server(matches: &RouteMatch) -> Self {
        Self { any_bytes: true, ..Self::compile(matches, Profile::Envoy) }
    }

    /// Whether a request is one of them. `rng(bound)` is uniform in `0..bound`, and drawn for fractions only.
    pub(crate) fn matches(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> bool {
        self.check(head, rng).is_ok()
    }

    /// Path, headers, the rest, fraction, in this order: the draw is made only when all else matches.
    pub(super) fn check(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> Result<(), Mismatch<'_>> {
        let path = match &self.path {
            PathMatcher::Template(template) if self.any_bytes => template.matches_any_bytes(head.path()),
            path => path_matches(path, head.path()),
        };
        if !path {
            return Err(Mismatch::Path(&self.path));
        }
        self.headers.check(head).map_err(Mismatch::Header)?;
        if let Some(rare) = &self.rare {
            rare.check(head)?;
        }
        match self.fraction {
            Some(fraction) if !fraction.admits(rng(FractionalPercent::HUNDRED.0)) => Err(Mismatch::Fraction(fraction)),
            _ => Ok(()),
        }
    }
}

impl Rare {
    fn compile(matches: &RouteMatch, profile: Profile) -> Option<Box<Self>> {
        let RouteMatch { query, cookies, grpc_only, tls, metadata, filter_state, .. } = matches;
        let beside = *tls != TlsContextMatch::default() || !metadata.is_empty() || !filter_state.is_empty();
        if query.is_empty() && cookies.is_empty() && !grpc_only && !beside {
            return None;
        }
        Some(Box::new(Self {
            query: query.as_slice().into(),
            cookies: cookies.as_slice().into(),
            grpc: grpc_only.then_some(profile == Profile::Grpc),
            tls: *tls,
            metadata: metadata.as_slice().into(),
            filter_state: filter_state.as_slice().into(),
        }))
    }

    fn check(&self, head: &RequestHead<'_>) -> Result<(), Mismatch<'_>> {
        if let Some(assumed) = self.grpc {
            let absent = assumed && !head.headers.contains_key(header::CONTENT_TYPE);
            if !absent && !is_grpc(head.headers) {
                return Err(Mismatch::NotGrpc);
            }
        }
        if let Some(failed) = self.query.iter().find(|m| !params::query_matches(m, head.query())) {
            return Err(Mismatch::Query(failed));
        }
        if let Some(failed) = self.cookies.iter().find(|m| !params::cookie_matches(m, head.headers)) {
            return Err(Mismatch::Cookie(failed));
        }
        self.check_beside(head)
    }

    /// What is known of the request beside it.
    fn check_beside(&self, head: &RequestHead<'_>) -> Result<(), Mismatch<'_>> {
        // A certificate that was presented and not verified never gets here.
        let verified = || head.extensions.is_some_and(|extensions| extensions.get::<PeerIdentity>().is_some());
        if let Some(wanted) = [self.tls.presented, self.tls.validated].into_iter().flatten().find(|w| *w != verified())
        {
            return Err(Mismatch::Certificate(wanted));
        }
        if self.metadata.is_empty() && self.filter_state.is_empty() {
            return Ok(());
        }
        let downstream = Downstream::of(head.extensions);
        let metadata = |m: &&MetadataMatcher| !m.matches(|namespace| downstream.and_then(|d| d.metadata(namespace)));
        if let Some(failed) = self.metadata.iter().find(metadata) {
            return Err(Mismatch::Metadata(failed));
        }
        let state = |m: &&FilterStateMatcher| !m.matches(downstream.and_then(|d| d.filter_state(&m.key)));
        match self.filter_state.iter().find(state) {
            Some(failed) => Err(Mismatch::FilterState(failed)),
            None => Ok(()),
        }
    }
}

impl HeaderMatchers {
    pub(crate) fn compile(headers: &[HeaderMatcher], profile: Profile) -> Self {
        let compile = |m: &HeaderMatcher| Compiled { name: Name::compile(&m.name, profile), matcher: m.clone() };
        Self(headers.iter().map(compile).collect())
    }

    /// Whether all match.
    pub(crate) fn matches(&self, head: &RequestHead<'_>) -> bool {
        self.check(head).is_ok()
    }

    /// The same, and for each it is enough that one of the header's values matches.
    pub(crate) fn matches_any(&self, head: &RequestHead<'_>) -> bool {
        let one = |c: &Compiled| c.matches(head) || head.values(&c.name).any(|value| c.holds(Some(value)));
        self.0.iter().all(one)
    }

    fn check(&self, head: &RequestHead<'_>) -> Result<(), &HeaderMatcher> {
        match self.0.iter().find(|c| !c.matches(head)) {
            Some(failed) => Err(&failed.matcher),
            None => Ok(()),
        }
    }
}

impl Compiled {
    /// gRFC A28: an absent header never matches, inverted or not, except where presence itself is asked.
    fn matches(&self, head: &RequestHead<'_>) -> bool {
        let value = match head.value(&self.name) {
            Value::Absent if self.matcher.treat_missing_as_empty => Value::One(b""),
            value => value,
        };
        self.holds(value.bytes())
    }

    fn holds(&self, value: Option<&[u8]>) -> bool {
        let matched = match (&self.matcher.kind, value) {
            (HeaderMatcherKind::Present(want), value) => value.is_some() == *want,
            (_, None) => return false,
            (HeaderMatcherKind::String(string), Some(value)) => string.matches_bytes(value),
            (HeaderMatcherKind::Range { start, end }, Some(value)) => std::str::from_utf8(value)
                .ok()
                .and_then(|v| v.parse::<i64>().ok())
                .is_some_and(|v| (*start..*end).contains(&v)),
        };
        matched != self.matcher.invert
    }
}

/// Whether `path` (without query) matches. Patterns of case-insensitive matchers are lower-case already.
pub(super) fn path_matches(matcher: &PathMatcher, path: &str) -> bool {
    match matcher {
        PathMatcher::Prefix { prefix, case_sensitive: true } => path.starts_with(prefix.as_str()),
        PathMatcher::Prefix { prefix, case_sensitive: false } => {
            path.as_bytes().get(..prefix.len()).is_some_and(|head| head.eq_ignore_ascii_case(prefix.as_bytes()))
        }
        PathMatcher::Exact { path: exact, case_sensitive: true } => path == exact,
        PathMatcher::Exact { path: exact, case_sensitive: false } => path.eq_ignore_ascii_case(exact),
        PathMatcher::Separated { prefix, case_sensitive } => {
            let Some((head, rest)) = path.as_bytes().split_at_checked(prefix.len()) else { return false };
            let same = match case_sensitive {
                true => head == prefix.as_bytes(),
                false => head.eq_ignore_ascii_case(prefix.as_bytes()),
            };
            same && matches!(rest.first(), None | Some(b'/'))
        }
        PathMatcher::Regex(regex) => regex.matches_bytes(path.as_bytes()),
        PathMatcher::Template(template) => template.matches(path),
    }
}

/// What of the path a prefix rewrite replaces: as many bytes, or `None` for all of it (Envoy).
pub(super) fn matched_length(matcher: &PathMatcher) -> Option<usize> {
    match matcher {
        PathMatcher::Prefix { prefix, .. } | PathMatcher::Separated { prefix, .. } => Some(prefix.len()),
        PathMatcher::Exact { .. } | PathMatcher::Regex(_) | PathMatcher::Template(_) => None,
    }
}

impl fmt::Display for Mismatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(PathMatcher::Prefix { prefix, .. }) => write!(f, "the path does not start with {prefix:?}"),
            Self::Path(PathMatcher::Exact { path, .. }) => write!(f, "the path is not {path:?}"),
            Self::Path(PathMatcher::Separated { prefix, .. }) => {
                write!(f, "the path is neither {prefix:?} nor below it")
            }
            Self::Path(PathMatcher::Regex(regex)) => write!(f, "the path does not match {regex:?}"),
            Self::Path(PathMatcher::Template(template)) => write!(f, "the path does not match template {template:?}"),
            Self::NotGrpc => f.write_str("the request is not gRPC"),
            Self::Certificate(true) => f.write_str("the caller's certificate is not known"),
            Self::Certificate(false) => f.write_str("the caller presented a certificate"),
            Self::Metadata(m) => {
                let not = if m.invert { "" } else { "absent or not " };
                write!(f, "metadata {} of {:?} is {not}what it asks for", m.path.join("."), m.filter)
            }
            Self::FilterState(FilterStateMatcher { key, value }) => match value {
                FilterStateMatch::String(string) => {
                    write!(f, "filter state {key:?} is absent or not {}", Words(string))
                }
                FilterStateMatch::Address { ranges, invert } => {
                    let not = if *invert { "" } else { "not " };
                    write!(f, "filter state {key:?} is absent, no address, or {not}in {ranges:?}")
                }
            },
            Self::Query(m) => match &m.kind {
                QueryParameterMatcherKind::Present(want) => {
                    write!(f, "query parameter {} is {}", m.name, if *want { "absent" } else { "present" })
                }
                QueryParameterMatcherKind::String(string) => {
                    write!(f, "query parameter {} is absent or not {}", m.name, Words(string))
                }
            },
            Self::Cookie(m) => match m.invert {
                false => write!(f, "cookie {} is absent or not {}", m.name, Words(&m.value)),
                true => write!(f, "cookie {} is {}", m.name, Words(&m.value)),
            },
            Self::Fraction(FractionalPercent(ppm)) => {
                write!(f, "not drawn for its share of {} %", f64::from(*ppm) / 10_000.0)
            }
            Self::Header(m) => {
                let (name, not) = (&m.name, if m.invert { "" } else { "not " });
                match &m.kind {
                    HeaderMatcherKind::Present(want) => {
                        write!(f, "header {name} is {}", if *want != m.invert { "absent" } else { "present" })
                    }
                    HeaderMatcherKind::Range { start, end } => {
                        write!(f, "header {name} is absent or {not}in {start}..{end}")
                    }
                    HeaderMatcherKind::String(string) => {
                        write!(f, "header {name} is absent or {not}{}", Words(string))
                    }
                }
            }
        }
    }
}

/// A string matcher: `equal to "a"`.
struct Words<'m>(&'m StringMatcher);

impl fmt::Display for Words<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (verb, pattern) = match &self.0.pattern {
            StringPattern::Exact(p) => ("equal to", p.as_str()),
            StringPattern::Prefix(p) => ("starting with", p.as_str()),
            StringPattern::Suffix(p) => ("ending with", p.as_str()),
            StringPattern::Contains(p) => ("containing", p.as_str()),
            StringPattern::Regex(p) => ("matching", p.as_str()),
        };
        write!(f, "{verb} {pattern:?}")
    }
}
