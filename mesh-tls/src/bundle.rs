//! Trust bundles: the roots of one trust domain, from PEM, DER or SPIFFE bundle JSON.

use crate::{MaterialError, material::certificates};
use base64::Engine;
use rustls_pki_types::{CertificateDer, TrustAnchor};
use serde::Deserialize;
use std::{fmt, time::Duration};

/// Bounds of a DER certificate's length, so that a concatenation can be cut.
const DER_SEQUENCE: u8 = 0x30;

/// The certificate authorities of one trust domain.
#[derive(Clone)]
pub struct TrustBundle {
    anchors: Vec<TrustAnchor<'static>>,
    sequence: Option<u64>,
    refresh_hint: Option<Duration>,
}

/// A SPIFFE bundle: a JWK set with a few members more (SPIFFE Trust Domain and Bundle, section 4).
#[derive(Deserialize)]
pub(crate) struct Jwks {
    #[serde(default)]
    keys: Vec<Key>,
    spiffe_sequence: Option<u64>,
    spiffe_refresh_hint: Option<u64>,
}

#[derive(Deserialize)]
struct Key {
    kty: Option<String>,
    r#use: Option<String>,
    #[serde(default)]
    x5c: Vec<String>,
}

/// What to do with keys that are not for X.509.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OtherKeys {
    /// gRFC A87: the bundle is refused.
    Refuse,
    /// SPIFFE Trust Domain and Bundle §4.2.2: they are no business of ours.
    Ignore,
}

impl TrustBundle {
    /// From PEM certificates.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_pem(pem: &[u8]) -> Result<Self, MaterialError> {
        Self::from_certificates(&certificates(pem)?)
    }

    /// From DER certificates.
    ///
    /// # Errors
    /// There is no certificate, or one of them cannot be a root.
    pub fn from_certificates(certificates: &[CertificateDer<'_>]) -> Result<Self, MaterialError> {
        if certificates.is_empty() {
            return Err(MaterialError::NoCertificate);
        }
        let anchors = certificates.iter().enumerate().map(|(i, der)| anchor(der, i + 1)).collect::<Result<_, _>>()?;
        Ok(Self { anchors, sequence: None, refresh_hint: None })
    }

    /// From concatenated DER, as the SPIFFE Workload API sends it.
    ///
    /// # Errors
    /// The bytes are no sequence of certificates, there is none, or one of them cannot be a root.
    pub fn from_concatenated_der(der: &[u8]) -> Result<Self, MaterialError> {
        Self::from_certificates(&split_der(der)?)
    }

    /// From a SPIFFE bundle in JSON. Keys whose `use` is not `x509-svid` are ignored.
    ///
    /// # Errors
    /// The JSON is malformed, or a key for X.509 has not exactly one certificate.
    pub fn from_json(json: &[u8]) -> Result<Self, MaterialError> {
        let jwks: Jwks = serde_json::from_slice(json).map_err(|e| MaterialError::Malformed(e.to_string()))?;
        Self::from_jwks(&jwks, OtherKeys::Ignore).map_err(MaterialError::Malformed)
    }

    pub(crate) fn from_jwks(jwks: &Jwks, others: OtherKeys) -> Result<Self, String> {
        let wanted = jwks.keys.iter().enumerate().filter(|(_, key)| others == OtherKeys::Refuse || key.is_x509());
        let anchors = wanted.map(|(i, key)| key.anchor().map_err(|reason| format!("keys[{i}] {reason}")));
        Ok(Self {
            anchors: anchors.collect::<Result<_, _>>()?,
            sequence: jwks.spiffe_sequence,
            refresh_hint: jwks.spiffe_refresh_hint.map(Duration::from_secs),
        })
    }

    /// How many authorities there are. An empty bundle is valid and trusts nobody.
    pub fn len(&self) -> usize {
        self.anchors.len()
    }

    /// Whether nobody is trusted.
    pub fn is_empty(&self) -> bool {
        self.anchors.is_empty()
    }

    /// `spiffe_sequence`: grows with every version of the bundle.
    pub fn sequence(&self) -> Option<u64> {
        self.sequence
    }

    /// `spiffe_refresh_hint`: how often the publisher wants the bundle to be fetched.
    pub fn refresh_hint(&self) -> Option<Duration> {
        self.refresh_hint
    }

    pub(crate) fn into_anchors(self) -> Vec<TrustAnchor<'static>> {
        self.anchors
    }
}

impl Key {
    fn is_x509(&self) -> bool {
        self.r#use.as_deref() == Some("x509-svid")
    }

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

impl fmt::Debug for TrustBundle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustBundle({} roots)", self.anchors.len())
    }
}

pub(crate) fn anchor(der: &CertificateDer<'_>, index: usize) -> Result<TrustAnchor<'static>, MaterialError> {
    match webpki::anchor_from_trusted_cert(der) {
        Ok(anchor) => Ok(anchor.to_owned()),
        Err(e) => Err(MaterialError::Certificate { index, reason: e.to_string() }),
    }
}

/// Cuts concatenated DER certificates apart.
pub(crate) fn split_der(mut der: &[u8]) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let malformed = || MaterialError::Malformed("it is no sequence of DER certificates".into());
    let mut certificates = Vec::new();
    while let [DER_SEQUENCE, first, rest @ ..] = der {
        let (header, length) = match first {
            0..=0x7f => (2, usize::from(*first)),
            0x81..=0x83 => {
                let bytes = rest.get(..usize::from(first & 0x7f)).ok_or_else(malformed)?;
                (2 + bytes.len(), bytes.iter().fold(0, |length, byte| length << 8 | usize::from(*byte)))
            }
            _ => return Err(malformed()),
        };
        let (certificate, rest) = der.split_at_checked(header + length).ok_or_else(malformed)?;
        certificates.push(CertificateDer::from(certificate.to_vec()));
        der = rest;
    }
    if der.is_empty() { Ok(certificates) } else { Err(malformed()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, KeyPair};

    fn root() -> CertificateDer<'static> {
        CertificateParams::new(vec![]).unwrap().self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    fn json(keys: &[(&str, &str)]) -> String {
        let x5c = base64::engine::general_purpose::STANDARD.encode(root());
        let keys = keys.iter().map(|(kty, r#use)| format!(r#"{{"kty":"{kty}","use":"{use}","x5c":["{x5c}"]}}"#));
        format!(r#"{{"keys":[{}],"spiffe_sequence":7,"spiffe_refresh_hint":300}}"#, keys.collect::<Vec<_>>().join(","))
    }

    #[test]
    fn a_bundle_is_read_with_its_sequence_and_hint_and_keys_of_others_are_ignored() {
        let bundle = TrustBundle::from_json(json(&[("EC", "x509-svid"), ("EC", "jwt-svid")]).as_bytes()).unwrap();
        assert_eq!(bundle.len(), 1);
        assert_eq!(bundle.sequence(), Some(7));
        assert_eq!(bundle.refresh_hint(), Some(Duration::from_secs(300)));
        assert!(TrustBundle::from_json(br#"{"keys":[]}"#).unwrap().is_empty());
        let error = TrustBundle::from_json(json(&[("oct", "x509-svid")]).as_bytes()).unwrap_err();
        assert!(error.to_string().contains("keys[0] has kty"), "{error}");
    }

    #[test]
    fn concatenated_certificates_are_cut_apart() {
        let (a, b) = (root(), root());
        let both = [a.as_ref(), b.as_ref()].concat();
        assert_eq!(split_der(&both).unwrap(), [a.clone(), b]);
        assert_eq!(TrustBundle::from_concatenated_der(&both).unwrap().len(), 2);
        assert!(split_der(&both[..both.len() - 1]).is_err());
        assert!(split_der(&[a.as_ref(), &[0]].concat()).is_err());
        assert_eq!(TrustBundle::from_concatenated_der(&[]).unwrap_err(), MaterialError::NoCertificate);
    }

    proptest! {
        #[test]
        fn no_input_panics(bytes: Vec<u8>) {
            let _ = split_der(&bytes);
            let _ = TrustBundle::from_json(&bytes);
        }

        #[test]
        fn what_was_cut_gives_the_whole(parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..300), 0..5)) {
            let encoded: Vec<Vec<u8>> = parts.iter().map(|part| {
                let length = u16::try_from(part.len()).unwrap().to_be_bytes();
                [&[0x30, 0x82], &length[..], part].concat()
            }).collect();
            let cut = split_der(&encoded.concat()).unwrap();
            prop_assert_eq!(cut.iter().map(|der| der.to_vec()).collect::<Vec<_>>(), encoded);
        }
    }
}
