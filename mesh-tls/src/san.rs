//! SAN matchers of xDS (gRFC A29, `match_subject_alt_names`): any matcher against any SAN.

use crate::x509::Leaf;
use std::{fmt, sync::Arc};

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
}

impl SanMatcher {
    /// Whether any SAN of the certificate matches.
    pub(crate) fn matches(&self, leaf: &Leaf) -> bool {
        let ips = || leaf.ip_sans.iter().map(ToString::to_string);
        match self {
            Self::Exact(wanted) => {
                leaf.uri_sans.iter().chain(&leaf.email_sans).any(|san| san == wanted)
                    || leaf.dns_sans.iter().any(|san| dns_matches(wanted, san))
                    || ips().any(|san| san == *wanted)
            }
            Self::Matches { matches, .. } => {
                leaf.uri_sans.iter().chain(&leaf.dns_sans).chain(&leaf.email_sans).any(|san| matches(san))
                    || ips().any(|san| matches(&san))
            }
        }
    }
}

impl fmt::Display for SanMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(wanted) => f.write_str(wanted),
            Self::Matches { description, .. } => f.write_str(description),
        }
    }
}

impl fmt::Debug for SanMatcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether the DNS SAN `presented`, which may begin with `*.`, covers `wanted`. A final dot is ignored; `*.com` and
/// wildcards elsewhere than in the whole leftmost label cover nothing.
fn dns_matches(wanted: &str, presented: &str) -> bool {
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
