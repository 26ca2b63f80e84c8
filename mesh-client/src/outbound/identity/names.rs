//! What peers are called: SAN matchers, and protocols by ALPN.

use crate::transport::Protocol;
use mesh_tls::{SanKind as Kind, SanMatcher};
use mesh_xds::resource::{SanKind, SanMatch, StringPattern};
use std::sync::Arc;

/// What says that a connection is between members of an Istio mesh.
const ISTIO: &str = "istio";

/// A matcher of xDS as `mesh-tls` has it.
pub(super) fn san_matcher(san: &SanMatch) -> SanMatcher {
    let SanMatch { kind, matcher } = san;
    let any = match (&matcher.pattern, matcher.ignore_case) {
        (StringPattern::Exact(value), false) => SanMatcher::Exact(value.clone()),
        _ => {
            let matches = matcher.clone();
            SanMatcher::Matches {
                description: format!("{:?}", matcher.pattern),
                matches: Arc::new(move |san| matches.matches(san)),
            }
        }
    };
    let kind = match kind {
        None => return any,
        Some(SanKind::Dns) => Kind::Dns,
        Some(SanKind::Uri) => Kind::Uri,
        Some(SanKind::Email) => Kind::Email,
        Some(SanKind::Ip) => Kind::Ip,
    };
    SanMatcher::typed(kind, any)
}

/// Whether every matcher wants a SPIFFE id: then the peer must have exactly one.
pub(super) fn names_spiffe_ids(matchers: &[SanMatch]) -> bool {
    let names_one = |san: &SanMatch| match &san.matcher.pattern {
        StringPattern::Exact(value) | StringPattern::Prefix(value) => value.starts_with("spiffe://"),
        _ => false,
    };
    !matchers.is_empty() && matchers.iter().all(names_one)
}

/// What is offered by ALPN. To members of an Istio mesh what its own proxies offer (the filter `istio.alpn`), so that they know plain
/// HTTP from other TCP: what they are spoken to in is then in the name.
pub(super) fn alpn(configured: &[String], protocol: Protocol) -> Vec<Vec<u8>> {
    let offered: Vec<&str> = match protocol {
        Protocol::Http2 if configured.iter().any(|name| name == ISTIO) => vec!["istio-h2", ISTIO, "h2"],
        Protocol::Http1 if configured.iter().any(|name| name == ISTIO) => vec!["istio-http/1.1", ISTIO, "http/1.1"],
        _ if !configured.is_empty() => configured.iter().map(String::as_str).collect(),
        Protocol::Http2 => vec!["h2"],
        Protocol::Http1 => vec!["http/1.1"],
    };
    offered.into_iter().map(|name| name.as_bytes().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_of_an_istio_mesh_are_offered_what_its_proxies_offer() {
        let offered = |configured: &[&str], protocol| {
            let configured: Vec<_> = configured.iter().map(|name| (*name).to_owned()).collect();
            let names = alpn(&configured, protocol);
            names.into_iter().map(|name| String::from_utf8(name).unwrap()).collect::<Vec<_>>().join(" ")
        };
        let istiod = ["istio-peer-exchange", "istio", "h2"];
        assert_eq!(offered(&istiod, Protocol::Http2), "istio-h2 istio h2");
        assert_eq!(offered(&istiod[..2], Protocol::Http1), "istio-http/1.1 istio http/1.1");
        assert_eq!(offered(&["h2", "http/1.1"], Protocol::Http2), "h2 http/1.1");
        assert_eq!(offered(&[], Protocol::Http1), "http/1.1");
        assert_eq!(offered(&[], Protocol::Http2), "h2");
    }
}
