//! Which routes a path can match at all, in their order: exact paths hashed, literal prefixes sorted, the rest listed.
//!
//! A regular expression or a template counts by the literal text it starts with, a comparison without regard to case by the
//! lower-cased path: what the index finds is asked again by its matcher, so it may find too much and never too little.

use mesh_xds::resource::{PathMatcher, Route};
use smallvec::SmallVec;
use std::collections::{BTreeMap, HashMap};

/// Up to this many routes a scan beats the index.
const SCAN: usize = 8;

/// The index. First match wins, so every source holds ascending route numbers and they are merged.
#[derive(Debug)]
pub(super) enum PathIndex {
    Scan(u32),
    Indexed(Box<Indexed>),
}

#[derive(Debug)]
pub(super) struct Indexed {
    cased: Literals,
    /// Asked for the lower-cased path.
    folded: Option<Literals>,
    /// Nothing is known of their paths.
    rest: Box<[u32]>,
}

/// Routes by the literal paths and prefixes they name.
#[derive(Debug, Default)]
struct Literals {
    exact: HashMap<Box<str>, Box<[u32]>>,
    /// Sorted.
    prefixes: Box<[Prefix]>,
}

/// One distinct prefix.
#[derive(Debug)]
struct Prefix {
    prefix: Box<str>,
    /// The longest other prefix that this one starts with.
    parent: Option<u32>,
    routes: Box<[u32]>,
}

/// What is collected before it is sorted.
#[derive(Default)]
struct Collected {
    exact: HashMap<Box<str>, Vec<u32>>,
    prefixes: BTreeMap<Box<str>, Vec<u32>>,
}

/// The candidates of one path, ascending. An iterator without allocation.
#[derive(Debug)]
pub(super) struct Candidates<'i> {
    from: u32,
    sources: Sources<'i>,
}

#[derive(Debug)]
enum Sources<'i> {
    Scan(u32),
    Indexed { cased: Found<'i>, folded: Option<Found<'i>>, rest: &'i [u32] },
}

/// What literals a path has.
#[derive(Debug)]
struct Found<'i> {
    exact: &'i [u32],
    prefixes: &'i [Prefix],
    longest: Option<u32>,
}

impl PathIndex {
    pub(super) fn compile(routes: &[Route]) -> Self {
        let count = u32::try_from(routes.len()).unwrap_or(u32::MAX);
        if routes.len() <= SCAN {
            return Self::Scan(count);
        }
        let (mut cased, mut folded) = (Collected::default(), Collected::default());
        let mut rest = Vec::new();
        for (number, route) in (0..count).zip(routes) {
            match &route.matches.path {
                PathMatcher::Exact { path, case_sensitive } => {
                    let to = if *case_sensitive { &mut cased } else { &mut folded };
                    to.exact.entry(path.as_str().into()).or_default().push(number);
                }
                PathMatcher::Prefix { prefix, case_sensitive } | PathMatcher::Separated { prefix, case_sensitive } => {
                    let to = if *case_sensitive { &mut cased } else { &mut folded };
                    to.prefixes.entry(prefix.as_str().into()).or_default().push(number);
                }
                PathMatcher::Template(template) => {
                    cased.prefixes.entry(template.literal_prefix().into()).or_default().push(number);
                }
                PathMatcher::Regex(regex) => match literal_prefix(regex.as_str()) {
                    prefix if prefix.is_empty() => rest.push(number),
                    prefix => cased.prefixes.entry(prefix.into()).or_default().push(number),
                },
            }
        }
        let folds = !folded.exact.is_empty() || !folded.prefixes.is_empty();
        let folded = folds.then(|| folded.sorted());
        Self::Indexed(Box::new(Indexed { cased: cased.sorted(), folded, rest: rest.into() }))
    }

    pub(super) fn candidates(&self, path: &str) -> Candidates<'_> {
        let sources = match self {
            Self::Scan(count) => Sources::Scan(*count),
            Self::Indexed(index) => Sources::Indexed {
                cased: index.cased.find(path.as_bytes()),
                folded: index.folded.as_ref().map(|literals| {
                    let mut lower: SmallVec<[u8; 128]> = SmallVec::from_slice(path.as_bytes());
                    lower.make_ascii_lowercase();
                    literals.find(&lower)
                }),
                rest: &index.rest,
            },
        };
        Candidates { from: 0, sources }
    }
}

impl Collected {
    fn sorted(self) -> Literals {
        let mut prefixes: Vec<Prefix> = Vec::with_capacity(self.prefixes.len());
        // In sorted order the longest proper prefix of an entry is on the chain of the entry before it.
        for (prefix, routes) in self.prefixes {
            let mut parent = prefixes.len().checked_sub(1);
            while let Some(p) = parent
                && !prefix.starts_with(&*prefixes[p].prefix)
            {
                parent = prefixes[p].parent.map(|p| p as usize);
            }
            let parent = parent.and_then(|p| u32::try_from(p).ok());
            prefixes.push(Prefix { prefix, parent, routes: routes.into() });
        }
        let exact = self.exact.into_iter().map(|(path, routes)| (path, routes.into())).collect();
        Literals { exact, prefixes: prefixes.into() }
    }
}

impl Literals {
    fn find(&self, path: &[u8]) -> Found<'_> {
        // Only ASCII was folded, so the path is still text.
        let exact = std::str::from_utf8(path).ok().filter(|_| !self.exact.is_empty());
        let exact = exact.and_then(|path| self.exact.get(path)).map_or(&[][..], |routes| routes);
        Found { exact, prefixes: &self.prefixes, longest: longest_prefix(&self.prefixes, path) }
    }
}

impl Found<'_> {
    /// The first route from `from` on.
    fn next(&self, from: u32) -> Option<u32> {
        let mut next = first_from(self.exact, from);
        let mut at = self.longest;
        while let Some(p) = at {
            let prefix = &self.prefixes[p as usize];
            next = first_from(&prefix.routes, from).into_iter().chain(next).min();
            at = prefix.parent;
        }
        next
    }
}

/// Every entry that `path` starts with is the greatest entry `<= path` or an ancestor of it.
fn longest_prefix(prefixes: &[Prefix], path: &[u8]) -> Option<u32> {
    let mut at = u32::try_from(prefixes.partition_point(|p| p.prefix.as_bytes() <= path)).ok()?.checked_sub(1);
    while let Some(p) = at
        && !path.starts_with(prefixes[p as usize].prefix.as_bytes())
    {
        at = prefixes[p as usize].parent;
    }
    at
}

fn first_from(routes: &[u32], from: u32) -> Option<u32> {
    // As a rule all of them are left.
    match routes.first() {
        Some(first) if *first >= from => Some(*first),
        _ => routes.get(routes.partition_point(|r| *r < from)).copied(),
    }
}

/// Text that everything the expression matches starts with; empty when that is not plain to see.
fn literal_prefix(regex: &str) -> String {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let mut prefix = String::new();
    // An alternative may begin otherwise.
    if regex.contains('|') {
        return prefix;
    }
    let mut rest = regex.chars();
    while let Some(c) = rest.next() {
        match c {
            '*' | '?' | '{' | '+' => {
                // It is about the character before.
                prefix.pop();
                return prefix;
            }
            '\\' => match rest.next() {
                Some(escaped) if escaped.is_ascii_punctuation() && !matches!(escaped, '<' | '>') => {
                    prefix.push(escaped)
                }
                _ => return prefix,
            },
            c if c.is_ascii_alphanumeric() || "/-_~%!&',:;@= ".contains(c) => prefix.push(c),
            _ => return prefix,
        }
    }
    prefix
}

impl Iterator for Candidates<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let next = match &self.sources {
            Sources::Scan(count) => (self.from < *count).then_some(self.from),
            Sources::Indexed { cased, folded, rest } => {
                let folded = folded.as_ref().and_then(|found| found.next(self.from));
                [cased.next(self.from), folded, first_from(rest, self.from)].into_iter().flatten().min()
            }
        }?;
        self.from = next + 1;
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_counts_by_the_text_it_starts_with() {
        for (regex, prefix) in [
            ("/api/v[0-9]+/.*", "/api/v"),
            ("^/users/(.*)$", "/users/"),
            ("/a\\.b/.*", "/a.b/"),
            ("/a+b", "/"),
            ("/ab?c", "/a"),
            ("/ab{2}", "/a"),
            ("/a|/b", ""),
            ("(?i)/a", ""),
            (".*", ""),
            ("/a\\d", "/a"),
        ] {
            assert_eq!(literal_prefix(regex), prefix, "{regex}");
        }
    }
}
