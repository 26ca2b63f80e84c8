//! Which routes a path can match at all, in their order: exact paths hashed, literal prefixes sorted, the rest listed.

use mesh_xds::resource::{PathMatcher, Route};
use std::collections::{BTreeMap, HashMap};

/// Up to this many routes a scan beats the index.
const SCAN: usize = 8;

/// The index. First match wins, so every source holds ascending route numbers and they are merged.
#[derive(Debug)]
pub(super) enum PathIndex {
    Scan(u32),
    Indexed { exact: HashMap<Box<str>, Box<[u32]>>, prefixes: Box<[Prefix]>, rest: Box<[u32]> },
}

/// One distinct prefix; the slice of them is sorted.
#[derive(Debug)]
pub(super) struct Prefix {
    prefix: Box<str>,
    /// The longest other prefix that this one starts with.
    parent: Option<u32>,
    routes: Box<[u32]>,
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
    Indexed { exact: &'i [u32], prefixes: &'i [Prefix], longest: Option<u32>, rest: &'i [u32] },
}

impl PathIndex {
    pub(super) fn compile(routes: &[Route]) -> Self {
        let count = u32::try_from(routes.len()).unwrap_or(u32::MAX);
        if routes.len() <= SCAN {
            return Self::Scan(count);
        }
        let mut exact: HashMap<Box<str>, Vec<u32>> = HashMap::new();
        let mut literal: BTreeMap<Box<str>, Vec<u32>> = BTreeMap::new();
        let mut rest = Vec::new();
        for (number, route) in (0..count).zip(routes) {
            match &route.matches.path {
                PathMatcher::Exact { path, case_sensitive: true } => {
                    exact.entry(path.as_str().into()).or_default().push(number);
                }
                PathMatcher::Prefix { prefix, case_sensitive: true } => {
                    literal.entry(prefix.as_str().into()).or_default().push(number);
                }
                _ => rest.push(number),
            }
        }
        let mut prefixes: Vec<Prefix> = Vec::with_capacity(literal.len());
        // In sorted order the longest proper prefix of an entry is on the chain of the entry before it.
        for (prefix, routes) in literal {
            let mut parent = prefixes.len().checked_sub(1);
            while let Some(p) = parent
                && !prefix.starts_with(&*prefixes[p].prefix)
            {
                parent = prefixes[p].parent.map(|p| p as usize);
            }
            let parent = parent.and_then(|p| u32::try_from(p).ok());
            prefixes.push(Prefix { prefix, parent, routes: routes.into() });
        }
        Self::Indexed {
            exact: exact.into_iter().map(|(path, routes)| (path, routes.into())).collect(),
            prefixes: prefixes.into(),
            rest: rest.into(),
        }
    }

    pub(super) fn candidates(&self, path: &str) -> Candidates<'_> {
        let sources = match self {
            Self::Scan(count) => Sources::Scan(*count),
            Self::Indexed { exact, prefixes, rest } => Sources::Indexed {
                exact: exact.get(path).map_or(&[], |routes| routes),
                prefixes,
                longest: longest_prefix(prefixes, path),
                rest,
            },
        };
        Candidates { from: 0, sources }
    }
}

/// Every entry that `path` starts with is the greatest entry `<= path` or an ancestor of it.
fn longest_prefix(prefixes: &[Prefix], path: &str) -> Option<u32> {
    let mut at = u32::try_from(prefixes.partition_point(|p| *p.prefix <= *path)).ok()?.checked_sub(1);
    while let Some(p) = at
        && !path.starts_with(&*prefixes[p as usize].prefix)
    {
        at = prefixes[p as usize].parent;
    }
    at
}

fn first_from(routes: &[u32], from: u32) -> Option<u32> {
    routes.get(routes.partition_point(|r| *r < from)).copied()
}

impl Iterator for Candidates<'_> {
    type Item = u32;

    fn next(&mut self) -> Option<u32> {
        let next = match self.sources {
            Sources::Scan(count) => (self.from < count).then_some(self.from),
            Sources::Indexed { exact, prefixes, longest, rest } => {
                let mut next = [first_from(exact, self.from), first_from(rest, self.from)].into_iter().flatten().min();
                let mut at = longest;
                while let Some(p) = at {
                    let prefix = &prefixes[p as usize];
                    next = first_from(&prefix.routes, self.from).into_iter().chain(next).min();
                    at = prefix.parent;
                }
                next
            }
        }?;
        self.from = next + 1;
        Some(next)
    }
}
