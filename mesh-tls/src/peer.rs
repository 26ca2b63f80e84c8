//! The verified identity of the other side of a connection.

use crate::{SpiffeId, san::dns_matches, x509::Leaf};
use rustls_pki_types::CertificateDer;
use std::{fmt, net::IpAddr, sync::Arc};

/// Who the peer is, as its verified certificate says. Cheap to clone.
#[derive(Clone)]
pub struct PeerIdentity(Arc<Inner>);

struct Inner {
    spiffe_id: Option<SpiffeId>,
    leaf: Leaf,
    /// As it was shown, the leaf first; never empty.
    chain: Box<[CertificateDer<'static>]>,
    named: bool,
}

impl PeerIdentity {
    /// From a chain, the leaf first, that was verified before, its names too where it is `named`.
    pub(crate) fn from_verified(chain: &[CertificateDer<'_>], named: bool) -> Option<Self> {
        let leaf = Leaf::parse(chain.first()?).ok()?;
        let spiffe_id = match leaf.uri_sans.as_slice() {
            [uri] => uri.parse().ok(),
            _ => None,
        };
        let chain = chain.iter().map(|certificate| certificate.clone().into_owned()).collect();
        Some(Self(Arc::new(Inner { spiffe_id, leaf, chain, named })))
    }

    /// The SPIFFE id, when the certificate has exactly one URI SAN and it is one.
    pub fn spiffe_id(&self) -> Option<&SpiffeId> {
        self.0.spiffe_id.as_ref()
    }

    /// URI SANs, in order.
    pub fn uri_sans(&self) -> &[String] {
        &self.0.leaf.uri_sans
    }

    /// DNS SANs, in order.
    pub fn dns_sans(&self) -> &[String] {
        &self.0.leaf.dns_sans
    }

    /// IP address SANs, in order.
    pub fn ip_sans(&self) -> &[IpAddr] {
        &self.0.leaf.ip_sans
    }

    /// Whether its names were asked for when it was verified: by SAN matchers, or as the name of the server. Else it may be anybody's whom an authority
    /// knows.
    pub fn is_named(&self) -> bool {
        self.0.named
    }

    /// Whether the certificate is for this host: a DNS name, wildcards of the certificate included, or an IP address.
    pub fn is_for(&self, host: &str) -> bool {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(ip) => self.ip_sans().contains(&ip),
            Err(_) => self.dns_sans().iter().any(|san| dns_matches(bare, san)),
        }
    }

    /// Common name and organization: `CN=a, O=b`. For display, never for decisions.
    pub fn subject(&self) -> &str {
        &self.0.leaf.subject
    }

    /// End of validity in Unix seconds.
    pub fn not_after(&self) -> i64 {
        self.0.leaf.not_after
    }

    /// The leaf certificate in DER.
    pub fn certificate(&self) -> &[u8] {
        &self.0.chain[0]
    }

    /// The certificates that the peer showed, in DER, the leaf first. What is behind it was of use to verify it, or not.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.0.chain
    }
}

/// The SPIFFE id, or else the first SAN, or else the subject.
impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.leaf.name())
    }
}

impl fmt::Debug for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerIdentity")
            .field("subject", &self.0.leaf.subject)
            .field("sans", &self.0.leaf.sans())
            .finish_non_exhaustive()
    }
}
