//! SPIFFE ids and trust domains (SPIFFE-ID standard, section 2).

use std::{fmt, str::FromStr, sync::Arc};

/// Longest id in bytes (SPIFFE-ID §2.3).
const MAX_ID: usize = 2048;
/// Longest trust domain in bytes (SPIFFE-ID §2.3).
const MAX_TRUST_DOMAIN: usize = 255;
const SCHEME: &str = "spiffe://";

/// A SPIFFE id such as `spiffe://cluster.local/ns/prod/sa/reviews`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpiffeId {
    id: Arc<str>,
    /// Where the path begins: at its `/`, or at the end.
    path: usize,
}

/// The trust domain of a [`SpiffeId`], such as `cluster.local`. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Arc<str>);

/// Why a string is not a SPIFFE id or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpiffeIdError {
    /// The string is empty.
    #[error("is empty")]
    Empty,
    /// More bytes than the standard allows.
    #[error("is {length} bytes long, the limit is {limit}")]
    TooLong {
        /// Bytes given.
        length: usize,
        /// Bytes allowed.
        limit: usize,
    },
    /// It does not begin with `spiffe://`.
    #[error("does not begin with spiffe://")]
    Scheme,
    /// There is nothing between `spiffe://` and the path.
    #[error("has no trust domain")]
    NoTrustDomain,
    /// The trust domain holds something else than `a-z`, `0-9`, `.`, `-` and `_`: user info and ports are not allowed either.
    #[error("has {0:?} in its trust domain, where only a-z, 0-9, '.', '-' and '_' are allowed")]
    TrustDomainCharacter(char),
    /// A path segment holds something else than `A-Z`, `a-z`, `0-9`, `.`, `-` and `_`: queries, fragments and percent-encoding are not allowed either.
    #[error("has {0:?} in its path, where only letters, digits, '.', '-' and '_' are allowed")]
    PathCharacter(char),
    /// Two slashes in a row, or a slash at the end.
    #[error("has an empty path segment")]
    EmptySegment,
    /// It names a trust domain as a whole, where a workload is wanted (X509-SVID §5.2).
    #[error("has no path: it names a trust domain, not a workload")]
    NoPath,
    /// A segment is `.` or `..`.
    #[error("has a relative path segment")]
    DotSegment,
}

impl SpiffeId {
    /// The trust domain.
    pub fn trust_domain(&self) -> TrustDomain {
        TrustDomain(self.trust_domain_str().into())
    }

    /// The trust domain, borrowed.
    pub fn trust_domain_str(&self) -> &str {
        &self.id[SCHEME.len()..self.path]
    }

    /// The path with its leading slash, or the empty string.
    pub fn path(&self) -> &str {
        &self.id[self.path..]
    }

    /// The whole id.
    pub fn as_str(&self) -> &str {
        &self.id
    }
}

impl TrustDomain {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeIdError;

    fn from_str(id: &str) -> Result<Self, Self::Err> {
        if id.is_empty() {
            return Err(SpiffeIdError::Empty);
        }
        if id.len() > MAX_ID {
            return Err(SpiffeIdError::TooLong { length: id.len(), limit: MAX_ID });
        }
        let rest = id.strip_prefix(SCHEME).ok_or(SpiffeIdError::Scheme)?;
        let (domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        check_trust_domain(domain)?;
        if let Some(segments) = path.strip_prefix('/') {
            segments.split('/').try_for_each(check_segment)?;
        }
        Ok(Self { id: id.into(), path: SCHEME.len() + domain.len() })
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeIdError;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        check_trust_domain(name)?;
        Ok(Self(name.into()))
    }
}

fn check_trust_domain(name: &str) -> Result<(), SpiffeIdError> {
    if name.is_empty() {
        return Err(SpiffeIdError::NoTrustDomain);
    }
    if name.len() > MAX_TRUST_DOMAIN {
        return Err(SpiffeIdError::TooLong { length: name.len(), limit: MAX_TRUST_DOMAIN });
    }
    match name.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_')) {
        Some(c) => Err(SpiffeIdError::TrustDomainCharacter(c)),
        None => Ok(()),
    }
}

fn check_segment(segment: &str) -> Result<(), SpiffeIdError> {
    match segment {
        "" => return Err(SpiffeIdError::EmptySegment),
        "." | ".." => return Err(SpiffeIdError::DotSegment),
        _ => {}
    }
    match segment.chars().find(|c| !matches!(c, 'a'..='z' | 'A'..='Z' | '0'..='9' | '.' | '-' | '_')) {
        Some(c) => Err(SpiffeIdError::PathCharacter(c)),
        None => Ok(()),
    }
}

impl TryFrom<&str> for SpiffeId {
    type Error = SpiffeIdError;

    fn try_from(id: &str) -> Result<Self, Self::Error> {
        id.parse()
    }
}

impl TryFrom<&str> for TrustDomain {
    type Error = SpiffeIdError;

    fn try_from(name: &str) -> Result<Self, Self::Error> {
        name.parse()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Lets maps keyed by trust domain be searched with a borrowed name.
impl std::borrow::Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn parts_of_an_id_are_told_apart() {
        let id: SpiffeId = "spiffe://cluster.local/ns/prod/sa/reviews".parse().unwrap();
        assert_eq!(id.trust_domain().as_str(), "cluster.local");
        assert_eq!(id.path(), "/ns/prod/sa/reviews");
        assert_eq!(SpiffeId::try_from("spiffe://td").unwrap().path(), "");
    }

    #[test]
    fn malformed_ids_are_refused_with_their_reason() {
        use SpiffeIdError::*;
        let long = format!("spiffe://td/{}", "a".repeat(2048));
        let long_domain = format!("spiffe://{}", "a".repeat(256));
        for (id, reason) in [
            ("", Empty),
            ("https://td/a", Scheme),
            ("SPIFFE://td/a", Scheme),
            ("spiffe:/td/a", Scheme),
            ("spiffe://", NoTrustDomain),
            ("spiffe:///a", NoTrustDomain),
            ("spiffe://TD/a", TrustDomainCharacter('T')),
            ("spiffe://user@td/a", TrustDomainCharacter('@')),
            ("spiffe://td:80/a", TrustDomainCharacter(':')),
            ("spiffe://td?q=1", TrustDomainCharacter('?')),
            ("spiffe://td/", EmptySegment),
            ("spiffe://td/a/", EmptySegment),
            ("spiffe://td//a", EmptySegment),
            ("spiffe://td/./a", DotSegment),
            ("spiffe://td/a/..", DotSegment),
            ("spiffe://td/a?q=1", PathCharacter('?')),
            ("spiffe://td/a#f", PathCharacter('#')),
            ("spiffe://td/%61", PathCharacter('%')),
            ("spiffe://td/é", PathCharacter('é')),
            (long.as_str(), TooLong { length: 2060, limit: 2048 }),
            (long_domain.as_str(), TooLong { length: 256, limit: 255 }),
        ] {
            assert_eq!(id.parse::<SpiffeId>(), Err(reason), "{id}");
        }
    }

    proptest! {
        #[test]
        fn well_formed_ids_round_trip(domain in "[a-z0-9._-]{1,255}", path in proptest::collection::vec("[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,20}", 0..20)) {
            let tail: String = path.iter().map(|segment| format!("/{segment}")).collect();
            let text = format!("spiffe://{domain}{tail}");
            let id: SpiffeId = text.parse().unwrap();
            prop_assert_eq!(id.to_string(), text);
            prop_assert_eq!(id.trust_domain().to_string(), domain);
            prop_assert_eq!(id.path(), tail);
        }

        #[test]
        fn anything_accepted_is_well_formed(text in "(spiffe://)?[a-zA-Z0-9./:?#%@_-]{0,60}") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                let rest = text.strip_prefix("spiffe://").unwrap();
                prop_assert!(!rest.contains([':', '?', '#', '%', '@']) && !rest.contains("//") && !rest.ends_with('/'));
                prop_assert!(rest.split('/').skip(1).all(|s| !s.is_empty() && s != "." && s != ".."));
                prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
            }
        }

        #[test]
        fn no_input_panics(text in any::<String>()) {
            let _ = text.parse::<SpiffeId>();
            let _ = format!("spiffe://{text}").parse::<SpiffeId>();
            let _ = text.parse::<TrustDomain>();
        }
    }
}
