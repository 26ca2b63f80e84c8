//! Trust roots: one set for all peers, or one for each trust domain (gRFC A87).

use crate::{MaterialError, TrustDomain, material::certificates};
use base64::Engine;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

/// Certificate authorities that peers may be signed by.
pub struct TrustRoots(Kind);

enum Kind {
    One(Vec<TrustAnchor<'static>>),
    ByDomain(BTreeMap<TrustDomain, Vec<TrustAnchor<'static>>>),
}

/// SPIFFE bundle map: only `spiffe_sequence` and `keys` of a bundle, and `kty`, `use` and `x5c` of a key are read (A87).
#[derive(Deserialize)]
struct BundleMap {
    trust_domains: BTreeMap<String, Bundle>,
}

#[derive(Deserialize)]
struct Bundle {
    #[serde(default)]
    keys: Vec<Key>,
}

#[derive(Deserialize)]
struct Key {
    kty: Option<String>,
    r#use: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

impl TrustRoots {
    /// One set of roots for all peers, from PEM.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_pem(pem: &[u8]) -> Result<Self, MaterialError> {
        Self::from_der(&certificates(pem)?)
    }

    /// One set of roots for all peers, from DER.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_der(certificates: &[CertificateDer<'_>]) -> Result<Self, MaterialError> {
        if certificates.is_empty() {
            return Err(MaterialError::NoCertificate);
        }
        let anchors = certificates.iter().enumerate().map(|(i, der)| anchor(der, i + 1)).collect::<Result<_, _>>()?;
        Ok(Self(Kind::One(anchors)))
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
            let anchors = bundle
                .keys
                .iter()
                .enumerate()
                .map(|(i, key)| key.anchor().map_err(|reason| invalid(format!("keys[{i}] {reason}"))));
            domains.insert(domain, anchors.collect::<Result<_, _>>()?);
        }
        Ok(Self(Kind::ByDomain(domains)))
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
        let roots = Arc::new(Self(Kind::One(anchors)));
        *shared = Arc::downgrade(&roots);
        Ok(roots)
    }

    /// The trust domains of a bundle map; empty when one set serves all.
    pub fn trust_domains(&self) -> Vec<TrustDomain> {
        match &self.0 {
            Kind::One(_) => Vec::new(),
            Kind::ByDomain(domains) => domains.keys().cloned().collect(),
        }
    }

    /// Whether the roots are chosen by trust domain, so that peers must have a SPIFFE id.
    pub fn is_by_trust_domain(&self) -> bool {
        matches!(self.0, Kind::ByDomain(_))
    }

    /// The roots for a peer of this trust domain.
    pub(crate) fn anchors(&self, domain: Option<&str>) -> Option<&[TrustAnchor<'static>]> {
        match &self.0 {
            Kind::One(anchors) => Some(anchors),
            Kind::ByDomain(domains) => domains.get(domain?).map(Vec::as_slice),
        }
    }
}

impl Key {
    fn anchor(&self) -> Result<TrustAnchor<'static>, String> {
        match self.kty.as_deref() {
            Some("RSA" | "EC") => {}
            Some(other) => return Err(format!("has kty {other:?}, only RSA and EC are supported")),
            None => return Err("has no kty".into()),
        }
        match self.r#use.as_deref() {
            Some("x509-svid") => {}
            Some(other) => return Err(format!("has use {other:?}, only x509-svid is supported")),
            None => return Err("has no use".into()),
        }
        let [certificate] = self.x5c.as_slice() else {
            return Err(format!("must have exactly one certificate in x5c, it has {}", self.x5c.len()));
        };
        let der = base64::engine::general_purpose::STANDARD.decode(certificate).map_err(|e| format!("x5c: {e}"))?;
        anchor(&der.into(), 1).map_err(|e| format!("x5c: {e}"))
    }
}

impl fmt::Debug for TrustRoots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Kind::One(anchors) => write!(f, "TrustRoots({} roots)", anchors.len()),
            Kind::ByDomain(domains) => {
                f.write_str("TrustRoots")?;
                f.debug_map().entries(domains.iter().map(|(domain, anchors)| (domain, anchors.len()))).finish()
            }
        }
    }
}

fn anchor(der: &CertificateDer<'_>, index: usize) -> Result<TrustAnchor<'static>, MaterialError> {
    match webpki::anchor_from_trusted_cert(der) {
        Ok(anchor) => Ok(anchor.to_owned()),
        Err(e) => Err(MaterialError::Certificate { index, reason: e.to_string() }),
    }
}
