//! What fuzzers drive: bytes in, a panic when something does not hold. Not part of the public interface: may change at any time.

use crate::{
    RevocationPolicy, SanKind, SanMatcher, SpiffeId, TrustBundle, TrustDomain, TrustRoots, san::dns_matches, x509::Leaf,
};
use std::sync::Arc;

/// A line with what is wanted, then a certificate in DER: the names of the certificate against all kinds of matchers.
pub fn sans(data: &[u8]) {
    let (line, der) = data.split_at(data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len()));
    let wanted = String::from_utf8_lossy(line);
    let exact = SanMatcher::Exact(wanted.clone().into_owned());
    let prefix = wanted.clone().into_owned();
    let matches = SanMatcher::Matches {
        description: "prefix".into(),
        matches: Arc::new(move |san: &str| san.starts_with(&prefix)),
    };
    let Ok(leaf) = Leaf::parse(der.get(1..).unwrap_or_default()) else { return };
    for san in leaf.uri_sans.iter().chain(&leaf.dns_sans).chain(&leaf.email_sans) {
        assert!(san.bytes().all(|byte| (b' '..0x7f).contains(&byte)), "{san:?}");
    }
    for matcher in [exact, matches] {
        let untyped = matcher.matches(&leaf);
        let kinds = [SanKind::Uri, SanKind::Dns, SanKind::Email, SanKind::Ip];
        let typed = kinds.map(|kind| SanMatcher::typed(kind, matcher.clone()).matches(&leaf));
        assert_eq!(untyped, typed.contains(&true), "one kind matches exactly when any does");
    }
    for presented in &leaf.dns_sans {
        let covers = dns_matches(&wanted, presented);
        // a wildcard stands for one label and nothing else
        if covers && presented.contains('*') {
            assert_eq!(
                wanted.trim_end_matches('.').split('.').count(),
                presented.trim_end_matches('.').split('.').count()
            );
        }
        assert!(!covers || !wanted.is_empty());
    }
    assert!(leaf.name().len() < 1 << 24);
}

/// A SPIFFE id, or a trust domain.
pub fn spiffe(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(id) = text.parse::<SpiffeId>() {
        assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        assert!(text.len() <= 2048 && !text.contains(['?', '#', '%', '@']) && !text.ends_with('/'));
        assert_eq!(id.trust_domain().as_str().parse::<TrustDomain>(), Ok(id.trust_domain()));
    }
    if let Ok(domain) = text.parse::<TrustDomain>() {
        let id: SpiffeId = format!("spiffe://{domain}").parse().expect("a trust domain alone is an id");
        assert_eq!(id.path(), "");
    }
}

/// Bundles and bundle maps in JSON, certificates and revocation lists in PEM and DER.
pub fn bundles(data: &[u8]) {
    if let Ok(bundle) = TrustBundle::from_json(data) {
        assert!(bundle.len() <= data.len());
    }
    if let Ok(roots) = TrustRoots::from_bundle_map(data) {
        assert!(roots.is_by_trust_domain());
        for domain in roots.trust_domains() {
            assert!(roots.anchors(Some(domain.as_str())).is_some());
        }
    }
    let _ = TrustBundle::from_pem(data);
    if let Ok(bundle) = TrustBundle::from_concatenated_der(data) {
        assert!(!bundle.is_empty());
        let _ = TrustRoots::from(bundle).with_crl_pem(data, RevocationPolicy::default());
    }
    let empty = || TrustRoots::by_trust_domain([]);
    let _ = empty().with_crls([data], RevocationPolicy::default());
}
