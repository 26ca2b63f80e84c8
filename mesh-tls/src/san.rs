//! SAN matchers of xDS (gRFC A29, `match_subject_alt_names`): any matcher against any SAN.

use crate::x509::Leaf;
use std::{fmt, net::IpAddr, sync::Arc};

/// One matcher for subject alternative names.
#[derive(Clone)]
pub enum SanMatcher {
    /// Equal to a URI, IP address or e-mail SAN, or to a DNS SAN case-insensitively, where a leftmost label `*` of
    /// the certificate stands for exactly one label (gRFC A29).
    Exact(String),
    /// Any other test, applied to the text of each SAN.
    Matches {
        /// What is wanted, as errors print it: `prefix "spiffe://td/"`.
        description: String,
        /// The test.
        matches: Arc<dyn Fn(&str) -> bool + Send + Sync>,
    },
    /// The matcher looks at SANs of this kind only (`match_typed_subject_alt_names`). There is no kind for OTHER_NAME:
    /// a configuration that asks for it cannot be honoured and is to be refused.
    Typed {
        /// Which SANs.
        kind: SanKind,
        /// What is asked of them.
        matcher: Box<Self>,
    },
}

/// The kinds of subject alternative names (`SubjectAltNameMatcher.san_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SanKind {
    /// DNS names; exact matches are wildcard-aware.
    Dns,
    /// URIs.
    Uri,
    /// E-mail addresses.
    Email,
    /// IP addresses; exact matches compare addresses, others their text.
    Ip,
}

impl SanMatcher {
    /// A matcher for SANs of one kind.
    pub fn typed(kind: SanKind, matcher: Self) -> Self {
        Self::Typed { kind, matcher: Box::new(matcher) }
    }

    /// Whether any SAN of the certificate matches.
    pub(crate) fn matches(&self, leaf: &Leaf) -> bool {
        [SanKind::Uri, SanKind::Dns, SanKind::Email, SanKind::Ip].into_iter().any(|kind| self.matches_kind(leaf, kind))
    }

    fn matches_kind(&self, leaf: &Leaf, kind: SanKind) -> bool {
        let texts = match kind {
            SanKind::Uri => &leaf.uri_sans,
            SanKind::Dns => &leaf.dns_sans,
            SanKind::Email => &leaf.email_sans,
            SanKind::Ip => {
                return match self {
                    Self::Exact(wanted) => wanted.parse().is_ok_and(|wanted: IpAddr| leaf.ip_sans.contains(&wanted)),
                    Self::Matches { matches, .. } => leaf.ip_sans.iter().any(|ip| matches(&ip.to_string())),
                    Self::Typed { kind: only, matcher } => *only == kind && matcher.matches_kind(leaf, kind),
                };
            }
        };
        match self {
            Self::Exact(wanted) if kind == SanKind::Dns => texts.iter().any(|san| dns_matches(wanted, san)),
            Self::Exact(wanted) => texts.contains(wanted),
            Self::Matches { matches, .. } => texts.iter().any(|san| matches(san)),
            Self::Typed { kind: only, matcher } => *only == kind && matcher.matches_kind(leaf, kind),
        }
    }
}

impl fmt::Display for SanMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(wanted) => f.write_str(wanted),
            Self::Matches { description, .. } => f.write_str(description),
            Self::Typed { kind, matcher } => write!(f, "{kind}:{matcher}"),
        }
    }
}

/// As in front of SANs in errors.
impl fmt::Display for SanKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Dns => "DNS",
            Self::Uri => "URI",
            Self::Email => "email",
            Self::Ip => "IP",
        })
    }
}

impl fmt::Debug for SanMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether the DNS SAN `presented`, which may begin with `*.`, covers `wanted`. A final dot is ignored; `*.com` and
/// wildcards elsewhere than in the whole leftmost label cover nothing.
pub(crate) fn dns_matches(wanted: &str, presented: &str) -> bool {
    let wanted = wanted.strip_suffix('.').unwrap_or(wanted);
    let presented = presented.strip_suffix('.').unwrap_or(presented);
    if wanted.is_empty() {
        return false;
    }
    if !presented.contains('*') {
        return presented.eq_ignore_ascii_case(wanted);
    }
    let (Some(parent), Some((first, wanted_parent))) = (presented.strip_prefix("*."), wanted.split_once('.')) else {
        return false;
    };
    !parent.contains('*') && parent.contains('.') && !first.is_empty() && parent.eq_ignore_ascii_case(wanted_parent)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dns_names_match_exactly_or_by_one_wildcard_label() {
        for (wanted, presented, expected) in [
            ("a.example.com", "a.example.com", true),
            ("A.example.com", "a.EXAMPLE.com.", true),
            ("a.example.com.", "a.example.com", true),
            ("a.example.com", "*.example.com", true),
            ("a.b.example.com", "*.example.com", false),
            ("example.com", "*.example.com", false),
            (".example.com", "*.example.com", false),
            ("example.com", "*.com", false),
            ("a.example.com", "*", false),
            ("a.example.com", "a*.example.com", false),
            ("a.b.example.com", "*.*.example.com", false),
            ("b.example.com", "a.example.com", false),
            ("", "", false),
        ] {
            assert_eq!(dns_matches(wanted, presented), expected, "{wanted} against {presented}");
        }
    }

    #[test]
    fn exact_compares_uris_as_they_are() {
        let leaf = Leaf { uri_sans: vec!["spiffe://td/A".into()], ..Leaf::default() };
        assert!(SanMatcher::Exact("spiffe://td/A".into()).matches(&leaf));
        assert!(!SanMatcher::Exact("spiffe://td/a".into()).matches(&leaf));
        assert!(!SanMatcher::Exact("spiffe://td/".into()).matches(&leaf));
    }

    #[test]
    fn a_typed_matcher_sees_its_kind_only() {
        let leaf = Leaf {
            uri_sans: vec!["spiffe://td/a".into(), "a.b.c".into()],
            dns_sans: vec!["*.b.c".into(), "spiffe://td/dns".into()],
            ip_sans: vec!["fe80::1".parse().unwrap()],
            email_sans: vec!["me@a.b".into()],
            ..Leaf::default()
        };
        for (kind, wanted, expected) in [
            (SanKind::Dns, "x.b.c", true),
            (SanKind::Dns, "spiffe://td/a", false),
            (SanKind::Uri, "spiffe://td/a", true),
            (SanKind::Uri, "spiffe://td/dns", false),
            (SanKind::Uri, "x.b.c", false),
            (SanKind::Ip, "fe80:0:0::1", true),
            (SanKind::Ip, "me@a.b", false),
            (SanKind::Email, "me@a.b", true),
            (SanKind::Email, "ME@a.b", false),
        ] {
            let matcher = SanMatcher::typed(kind, SanMatcher::Exact(wanted.into()));
            assert_eq!(matcher.matches(&leaf), expected, "{matcher}");
        }
        let any = SanMatcher::Matches { description: "any".into(), matches: Arc::new(|_| true) };
        let none = Leaf { dns_sans: Vec::new(), ..leaf.clone() };
        assert!(SanMatcher::typed(SanKind::Dns, any.clone()).matches(&leaf));
        assert!(!SanMatcher::typed(SanKind::Dns, any.clone()).matches(&none));
        assert!(SanMatcher::typed(SanKind::Ip, any).matches(&none));
    }

    #[test]
    fn a_custom_matcher_sees_every_kind_of_san() {
        let leaf = Leaf {
            uri_sans: vec!["spiffe://td/a".into()],
            dns_sans: vec!["a.b".into()],
            ip_sans: vec![[10, 0, 0, 1].into()],
            email_sans: vec!["me@a.b".into()],
            ..Leaf::default()
        };
        for san in ["spiffe://td/a", "a.b", "10.0.0.1", "me@a.b"] {
            let matcher = SanMatcher::Matches { description: "test".into(), matches: Arc::new(move |s| s == san) };
            assert!(matcher.matches(&leaf), "{san}");
        }
    }
}
