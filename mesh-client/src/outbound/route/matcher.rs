//! `RouteMatch` compiled: path, headers and fraction, asked without allocation.

use super::{
    Profile,
    head::{Name, RequestHead, Value},
};
use mesh_xds::resource::{FractionalPercent, HeaderMatcher, HeaderMatcherKind, PathMatcher, RouteMatch, StringPattern};
use std::fmt;

/// When a route applies.
#[derive(Debug)]
pub(crate) struct Matcher {
    path: PathMatcher,
    headers: HeaderMatchers,
    fraction: Option<FractionalPercent>,
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
    Fraction(FractionalPercent),
}

impl Matcher {
    pub(super) fn compile(matches: &RouteMatch, profile: Profile) -> Self {
        Self {
            path: matches.path.clone(),
            headers: HeaderMatchers::compile(&matches.headers, profile),
            fraction: matches.fraction,
        }
    }

    /// Path, headers, fraction, in this order: the draw is made only when all else matches.
    pub(super) fn check(&self, head: &RequestHead<'_>, rng: &mut impl FnMut(u32) -> u32) -> Result<(), Mismatch<'_>> {
        if !path_matches(&self.path, head.path()) {
            return Err(Mismatch::Path(&self.path));
        }
        self.headers.check(head).map_err(Mismatch::Header)?;
        match self.fraction {
            Some(fraction) if !fraction.admits(rng(FractionalPercent::HUNDRED.0)) => Err(Mismatch::Fraction(fraction)),
            _ => Ok(()),
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
        let matched = match (&self.matcher.kind, value.bytes()) {
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
        PathMatcher::Regex(regex) => regex.matches_bytes(path.as_bytes()),
    }
}

impl fmt::Display for Mismatch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(PathMatcher::Prefix { prefix, .. }) => write!(f, "the path does not start with {prefix:?}"),
            Self::Path(PathMatcher::Exact { path, .. }) => write!(f, "the path is not {path:?}"),
            Self::Path(PathMatcher::Regex(regex)) => write!(f, "the path does not match {regex:?}"),
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
                        let (verb, pattern) = match &string.pattern {
                            StringPattern::Exact(p) => ("equal to", p.as_str()),
                            StringPattern::Prefix(p) => ("starting with", p.as_str()),
                            StringPattern::Suffix(p) => ("ending with", p.as_str()),
                            StringPattern::Contains(p) => ("containing", p.as_str()),
                            StringPattern::Regex(p) => ("matching", p.as_str()),
                        };
                        write!(f, "header {name} is absent or {not}{verb} {pattern:?}")
                    }
                }
            }
        }
    }
}
