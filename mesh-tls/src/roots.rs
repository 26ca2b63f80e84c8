//! Trust roots: one set for all peers, or one for each trust domain (gRFC A87), with revocation lists when there are any.

use crate::{
    MaterialError, RevocationPolicy, TrustBundle, TrustDomain,
    bundle::{Jwks, OtherKeys, anchor},
    revocation::Revocation,
};
use rustls_pki_types::{CertificateDer, TrustAnchor};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Certificate authorities that peers may be signed by, and what they have revoked. Immutable.
pub struct TrustRoots {
    kind: Kind,
    revocation: Option<Revocation>,
}

enum Kind {
    One(Vec<TrustAnchor<'static>>),
    ByDomain(BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>),
}

/// SPIFFE bundle map: only `spiffe_sequence` and `keys` of a bundle, and `kty`, `use` and `x5c` of a key are read (A87).
#[derive(Deserialize)]
struct BundleMap {
    trust_domains: BTreeMap<String, Jwks>,
}

impl TrustRoots {
    /// One set of roots for all peers, from PEM.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_pem(pem: &[u8]) -> Result<Self, MaterialError> {
        Ok(TrustBundle::from_pem(pem)?.into())
    }

    /// One set of roots for all peers, from DER.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_der(certificates: &[CertificateDer<'_>]) -> Result<Self, MaterialError> {
        Ok(TrustBundle::from_certificates(certificates)?.into())
    }

    /// One set of roots for each trust domain; peers of others are refused, as are peers without a SPIFFE id.
    pub fn by_trust_domain(bundles: impl IntoIterator<Item = (TrustDomain, TrustBundle)>) -> Self {
        let bundles = bundles.into_iter().map(|(domain, bundle)| (domain, bundle.into_anchors()));
        Self { kind: Kind::ByDomain(bundles.collect()), revocation: None }
    }

    /// Roots by trust domain, from a SPIFFE bundle map: `{"trust_domains": {"td": {"keys": [{"kty", "use", "x5c"}]}}}`.
    ///
    /// # Errors
    /// The JSON is malformed, or any entry is not valid: then the whole map is refused (gRFC A87). An empty map is valid
    /// and trusts nobody.
    pub fn from_bundle_map(json: &[u8]) -> Result<Self, MaterialError> {
        let map: BundleMap = serde_json::from_slice(json).map_err(|e| MaterialError::Malformed(e.to_string()))?;
        let mut domains = BTreeMap::new();
        for (name, bundle) in map.trust_domains {
            let invalid = |reason: String| MaterialError::Bundle { domain: name.clone(), reason };
            let domain: TrustDomain = name.parse().map_err(|e| invalid(format!("the name {e}")))?;
            let bundle = TrustBundle::from_jwks(&bundle, OtherKeys::Refuse).map_err(invalid)?;
            domains.insert(domain, bundle);
        }
        Ok(Self::by_trust_domain(domains))
    }

    /// Looks peers' certificates up in these revocation lists: PEM, any number of `X509 CRL` blocks. They replace those
    /// given before.
    ///
    /// # Errors
    /// There is none, or one of them is malformed.
    pub fn with_crl_pem(mut self, pem: &[u8], policy: RevocationPolicy) -> Result<Self, MaterialError> {
        self.revocation = Some(Revocation::from_pem(pem, policy)?);
        Ok(self)
    }

    /// As [`TrustRoots::with_crl_pem`], from DER. No list at all means that nothing is revoked.
    ///
    /// # Errors
    /// One of them is malformed.
    pub fn with_crls<'a>(
        mut self,
        lists: impl IntoIterator<Item = &'a [u8]>,
        policy: RevocationPolicy,
    ) -> Result<Self, MaterialError> {
        self.revocation = Some(Revocation::from_der(lists, policy)?);
        Ok(self)
    }

    /// The roots of the operating system (`SSL_CERT_FILE` and `SSL_CERT_DIR` are honoured). Read once and shared as
    /// long as somebody holds them.
    ///
    /// # Errors
    /// None could be found.
    pub fn system() -> Result<Arc<Self>, MaterialError> {
        static SHARED: Mutex<Weak<TrustRoots>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(roots) = shared.upgrade() {
            return Ok(roots);
        }
        let found = rustls_native_certs::load_native_certs();
        // a store may hold certificates too old or odd for webpki: those are left out
        let anchors: Vec<_> = found.certs.iter().filter_map(|der| anchor(der, 0).ok()).collect();
        if anchors.is_empty() {
            let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
            return Err(MaterialError::Malformed(format!(
                "the system has no root certificates {}",
                reasons.join("; ")
            )));
        }
        let roots = Arc::new(Self { kind: Kind::One(anchors), revocation: None });
        *shared = Arc::downgrade(&roots);
        Ok(roots)
    }

    /// The trust domains of a bundle map; empty when one set serves all.
    pub fn trust_domains(&self) -> Vec<TrustDomain> {
        match &self.kind {
            Kind::One(_) => Vec::new(),
            Kind::ByDomain(domains) => domains.keys().cloned().collect(),
        }
    }

    /// Whether the roots are chosen by trust domain, so that peers must have a SPIFFE id.
    pub fn is_by_trust_domain(&self) -> bool {
        matches!(self.kind, Kind::ByDomain(_))
    }

    pub(crate) fn revocation(&self) -> Option<&Revocation> {
        self.revocation.as_ref()
    }

    /// The roots for a peer of this trust domain.
    pub(crate) fn anchors(&self, domain: Option<&str>) -> Option<&[TrustAnchor<'static>]> {
        match &self.kind {
            Kind::One(anchors) => Some(anchors),
            Kind::ByDomain(domains) => domains.get(domain?).map(Vec::as_slice),
        }
    }
}

impl From<TrustBundle> for TrustRoots {
    /// One set of roots for all peers.
    fn from(bundle: TrustBundle) -> Self {
        Self { kind: Kind::One(bundle.into_anchors()), revocation: None }
    }
}

impl fmt::Debug for TrustRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::One(anchors) => write!(f, "TrustRoots({} roots)", anchors.len()),
            Kind::ByDomain(domains) => {
                f.write_str("TrustRoots")?;
                f.debug_map().entries(domains.iter().map(|(domain, anchors)| (domain, anchors.len()))).finish()
            }
        }
    }
}
