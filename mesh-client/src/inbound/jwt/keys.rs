//! JSON Web Keys (RFC 7517), and signatures by them, through the crypto provider that TLS uses.

use super::token::{Failure, Token};
use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use mesh_tls::{CryptoProvider, SpiffeId, TrustDomain};
use rustls_pki_types::{AlgorithmIdentifier, alg_id};
use serde_json::Value;
use std::sync::Arc;

/// The keys of an issuer, or those of trust domains.
#[derive(Debug, Default)]
pub(crate) struct KeySet {
    keys: Vec<Key>,
    /// A key verifies tokens whose subject is a SPIFFE id of its trust domain, and no others.
    by_domain: bool,
}

#[derive(Debug)]
struct Key {
    /// Whose it is, in a set by trust domain.
    domain: Option<Arc<str>>,
    kid: String,
    alg: String,
    kind: Kind,
    /// As certificates have it: the contents of the bit string.
    public: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Rsa,
    P256,
    P384,
    P521,
    Ed25519,
}

/// No set has more keys.
const MAX_KEYS: usize = 256;

impl KeySet {
    /// Of a JSON Web Key Set, or of a SPIFFE bundle map: one set for each trust domain. Keys of a kind that is not known are left out.
    ///
    /// # Errors
    /// It is neither.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, String> {
        let set: Value = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        let mut all = Self::default();
        match set.get("trust_domains").and_then(Value::as_object) {
            Some(domains) => {
                all.by_domain = true;
                for (domain, set) in domains {
                    let _: TrustDomain = domain.parse().map_err(|error| format!("trust domain {domain:?} {error}"))?;
                    // What is wrong with one domain's keys is no matter of another's.
                    if let Err(reason) = all.add(set, Some(domain.as_str().into())) {
                        tracing::warn!(domain, reason, "no key of this trust domain counts");
                    }
                }
            }
            None => all.add(&set, None)?,
        }
        Ok(all)
    }

    fn add(&mut self, set: &Value, domain: Option<Arc<str>>) -> Result<(), String> {
        let keys = set.get("keys").and_then(Value::as_array).ok_or("has no list \"keys\"")?;
        if keys.len() > MAX_KEYS {
            return Err(format!("has {} keys, more than {MAX_KEYS}", keys.len()));
        }
        let keys = keys.iter().filter_map(Key::parse);
        self.keys.extend(keys.map(|key| Key { domain: domain.clone(), ..key }));
        Ok(())
    }

    /// Whether something may be verified by it. A map of bundles says of its domains whose keys count: also when there are none any more.
    pub(crate) fn is_usable(&self) -> bool {
        self.by_domain || !self.keys.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Whether one of the keys made the signature.
    pub(crate) fn verify(&self, token: &Token<'_>, provider: &CryptoProvider) -> Result<(), Failure> {
        let (kind, public, signature) = algorithm(&token.alg).ok_or(Failure::Algorithm)?;
        let verifier = provider
            .signature_verification_algorithms
            .all
            .iter()
            .find(|one| one.public_key_alg_id() == public && one.signature_alg_id() == signature)
            .ok_or(Failure::Algorithm)?;
        let subject = match self.by_domain {
            // JWT-SVID §3.1: a SPIFFE id, of a workload.
            true => Some(
                token.subject().parse::<SpiffeId>().ok().filter(|id| !id.path().is_empty()).ok_or(Failure::Subject)?,
            ),
            false => None,
        };
        let domain = subject.as_ref().map(SpiffeId::trust_domain_str);
        let mut failure = Failure::NoKey;
        for key in self.keys.iter().filter(|key| key.domain.as_deref() == domain) {
            let other_name = !token.kid.is_empty() && !key.kid.is_empty() && token.kid != key.kid;
            if other_name || (!key.alg.is_empty() && key.alg != token.alg) || key.kind != kind {
                continue;
            }
            failure = Failure::Verification;
            let signature = match kind {
                Kind::Rsa | Kind::Ed25519 => Some(token.signature.clone()),
                Kind::P256 => asn1(&token.signature, 32),
                Kind::P384 => asn1(&token.signature, 48),
                Kind::P521 => asn1(&token.signature, 66),
            };
            let signature = signature.ok_or(Failure::Verification)?;
            if verifier.verify_signature(&key.public, token.signed, &signature).is_ok() {
                return Ok(());
            }
        }
        Err(failure)
    }
}

impl Key {
    fn parse(jwk: &Value) -> Option<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str).unwrap_or_default();
        let bytes = |name: &str| BASE64_URL_SAFE_NO_PAD.decode(text(name).trim_end_matches('=')).ok();
        // SPIFFE says `jwt-svid` (JWT-SVID, section 5).
        if !matches!(text("use"), "" | "sig" | "jwt-svid") {
            return None;
        }
        let (kind, public) = match (text("kty"), text("crv")) {
            ("RSA", _) => {
                let parts = [integer(&bytes("n")?), integer(&bytes("e")?)].concat();
                (Kind::Rsa, tagged(0x30, &parts))
            }
            ("EC", curve) => {
                let (kind, length) = match curve {
                    "P-256" => (Kind::P256, 32),
                    "P-384" => (Kind::P384, 48),
                    "P-521" => (Kind::P521, 66),
                    _ => return None,
                };
                let (x, y) = (bytes("x")?, bytes("y")?);
                if x.len() != length || y.len() != length {
                    return None;
                }
                (kind, [&[4][..], &x, &y].concat())
            }
            ("OKP", "Ed25519") => (Kind::Ed25519, bytes("x").filter(|x| x.len() == 32)?),
            _ => return None,
        };
        Some(Self { domain: None, kid: text("kid").to_owned(), alg: text("alg").to_owned(), kind, public })
    }
}

fn algorithm(alg: &str) -> Option<(Kind, AlgorithmIdentifier, AlgorithmIdentifier)> {
    Some(match alg {
        "RS256" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PKCS1_SHA256),
        "RS384" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PKCS1_SHA384),
        "RS512" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PKCS1_SHA512),
        "PS256" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PSS_SHA256),
        "PS384" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PSS_SHA384),
        "PS512" => (Kind::Rsa, alg_id::RSA_ENCRYPTION, alg_id::RSA_PSS_SHA512),
        "ES256" => (Kind::P256, alg_id::ECDSA_P256, alg_id::ECDSA_SHA256),
        "ES384" => (Kind::P384, alg_id::ECDSA_P384, alg_id::ECDSA_SHA384),
        "ES512" => (Kind::P521, alg_id::ECDSA_P521, alg_id::ECDSA_SHA512),
        "EdDSA" => (Kind::Ed25519, alg_id::ED25519, alg_id::ED25519),
        _ => return None,
    })
}

/// The two numbers of a signature (RFC 7518 §3.4), as ASN.1 has them.
fn asn1(signature: &[u8], length: usize) -> Option<Vec<u8>> {
    let (r, s) = signature.split_at_checked(length)?;
    (s.len() == length).then(|| tagged(0x30, &[integer(r), integer(s)].concat()))
}

fn integer(bytes: &[u8]) -> Vec<u8> {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    let digits = &bytes[zeros.min(bytes.len().saturating_sub(1))..];
    let sign: &[u8] = if digits.first().is_none_or(|first| first & 0x80 != 0) { &[0] } else { &[] };
    tagged(0x02, &[sign, digits].concat())
}

fn tagged(tag: u8, contents: &[u8]) -> Vec<u8> {
    let length = contents.len().to_be_bytes();
    let bytes = &length[length.iter().take_while(|byte| **byte == 0).count().min(length.len() - 1)..];
    let mut out = vec![tag];
    if contents.len() >= 0x80 {
        out.push(0x80 | u8::try_from(bytes.len()).unwrap_or(8));
    }
    out.extend_from_slice(bytes);
    out.extend_from_slice(contents);
    out
}
