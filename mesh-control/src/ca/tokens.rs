//! JSON Web Tokens that say who a workload is: JWT-SVIDs, signed with ES256 by a key of the authority.

use super::{Error, files};
use base64::{Engine as _, prelude::BASE64_URL_SAFE_NO_PAD as BASE64};
use rcgen::{KeyPair, SigningKey as _};
use rustls_pki_types::alg_id;
use serde_json::{Value, json};
use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const KEY: &str = "jwt-key.pem";
const JWKS: &str = "jwks.json";
/// Length of each of the two numbers of a signature, and of the coordinates of the key.
const NUMBER: usize = 32;
/// Clocks may differ by this much.
const LEEWAY: u64 = 30;

/// Issues tokens, and knows its own.
pub(super) struct Tokens {
    key: KeyPair,
    kid: String,
    issuer: String,
    jwks: String,
}

/// A verified token.
#[derive(Debug)]
pub(super) struct Verified {
    /// `sub`.
    pub(super) subject: String,
    pub(super) claims: Value,
}

impl Tokens {
    pub(super) fn open(dir: &Path, trust_domain: &str, in_memory: bool) -> Result<Self, Error> {
        let path = dir.join(KEY);
        let bad = |source| Error::Certificate { path: path.clone(), source };
        let file = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::File { path, source }
        };
        let key = if !in_memory && path.exists() {
            let text = files::read_own(&path, files::Closed::Wholly).map_err(file(&path))?;
            KeyPair::from_pem_and_sign_algo(&text, &rcgen::PKCS_ECDSA_P256_SHA256).map_err(bad)?
        } else {
            let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(bad)?;
            if !in_memory {
                files::write_private(&path, &key.serialize_pem()).map_err(file(&path))?;
            }
            key
        };
        // An uncompressed point: 4, x, y.
        let (x, y) = key.public_key_raw()[1..].split_at(NUMBER);
        let kid = BASE64.encode(&x[..8]);
        let (x, y) = (BASE64.encode(x), BASE64.encode(y));
        let jwk = json!({"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "jwt-svid", "kid": kid, "x": x, "y": y});
        let jwks = json!({"keys": [jwk]}).to_string();
        let written = dir.join(JWKS);
        files::write_private(&written, &jwks).map_err(file(&written))?;
        Ok(Self { key, kid, issuer: format!("https://{trust_domain}"), jwks })
    }

    /// `iss` of the tokens.
    pub(super) fn issuer(&self) -> &str {
        &self.issuer
    }

    /// The keys that verify them, a JSON Web Key Set.
    pub(super) fn jwks(&self) -> &str {
        &self.jwks
    }

    /// A token for these audiences.
    pub(super) fn issue(
        &self,
        subject: &str,
        audiences: &[String],
        lifetime: Duration,
        now: SystemTime,
    ) -> Result<String, rcgen::Error> {
        let now = seconds(now);
        let header = json!({"alg": "ES256", "kid": self.kid, "typ": "JWT"});
        let claims = json!({
            "iss": self.issuer, "sub": subject, "aud": audiences, "iat": now, "exp": now + lifetime.as_secs().max(1),
        });
        let signed = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(claims.to_string()));
        let signature = self.key.sign(signed.as_bytes())?;
        let signature = numbers_of(&signature).ok_or(rcgen::Error::RemoteKeyError)?;
        Ok(format!("{signed}.{}", BASE64.encode(signature)))
    }

    /// Checks that a token is ours, for this audience, and not expired.
    ///
    /// # Errors
    /// Why it is refused, without the token.
    pub(super) fn verify(&self, token: &str, audience: &str, now: SystemTime) -> Result<Verified, &'static str> {
        let (signed, signature) = token.rsplit_once('.').ok_or("it is no JWT")?;
        let (header, claims) = signed.split_once('.').ok_or("it is no JWT")?;
        let decoded =
            |part: &str| BASE64.decode(part).ok().and_then(|json| serde_json::from_slice::<Value>(&json).ok());
        let header = decoded(header).ok_or("its header is no JSON")?;
        if header["alg"] != "ES256" || header["kid"] != self.kid.as_str() {
            return Err("it is signed by a key that is not ours");
        }
        let signature = BASE64.decode(signature).ok().and_then(|numbers| signature_of(&numbers));
        let signature = signature.ok_or("its signature is malformed")?;
        let provider = mesh_tls::default_provider();
        let mut algorithms = provider.signature_verification_algorithms.all.iter();
        let algorithm = algorithms
            .find(|a| a.public_key_alg_id() == alg_id::ECDSA_P256 && a.signature_alg_id() == alg_id::ECDSA_SHA256)
            .ok_or("ES256 is not supported")?;
        let verified = algorithm.verify_signature(self.key.public_key_raw(), signed.as_bytes(), &signature);
        verified.map_err(|_| "its signature is wrong")?;
        let claims = decoded(claims).ok_or("its claims are no JSON")?;
        let meant = match &claims["aud"] {
            Value::String(one) => one == audience,
            Value::Array(all) => all.iter().any(|one| one == audience),
            _ => false,
        };
        if !meant {
            return Err("it is for another audience");
        }
        if claims["exp"].as_u64().is_none_or(|expiry| expiry + LEEWAY < seconds(now)) {
            return Err("it is expired");
        }
        let subject = claims["sub"].as_str().ok_or("it has no subject")?.to_owned();
        Ok(Verified { subject, claims })
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

/// An ECDSA signature as JWS has it (RFC 7518, 3.4), of its ASN.1 form: SEQUENCE of two INTEGERs.
fn numbers_of(signature: &[u8]) -> Option<[u8; 2 * NUMBER]> {
    let [0x30, _, rest @ ..] = signature else { return None };
    let mut numbers = [0; 2 * NUMBER];
    let mut rest = rest;
    for place in numbers.chunks_mut(NUMBER) {
        let [0x02, length, tail @ ..] = rest else { return None };
        let (number, tail) = tail.split_at_checked(usize::from(*length))?;
        let digits = &number[number.iter().take_while(|byte| **byte == 0).count()..];
        place.get_mut(NUMBER.checked_sub(digits.len())?..)?.copy_from_slice(digits);
        rest = tail;
    }
    Some(numbers)
}

/// The other way round.
fn signature_of(numbers: &[u8]) -> Option<Vec<u8>> {
    if numbers.len() != 2 * NUMBER {
        return None;
    }
    let mut content = Vec::new();
    for number in numbers.chunks(NUMBER) {
        let zeros = number.iter().take_while(|byte| **byte == 0).count().min(NUMBER - 1);
        let digits = &number[zeros..];
        let sign = digits[0] >= 0x80;
        content.extend([0x02, u8::try_from(digits.len() + usize::from(sign)).ok()?]);
        content.extend(sign.then_some(0));
        content.extend_from_slice(digits);
    }
    let mut signature = vec![0x30, u8::try_from(content.len()).ok()?];
    signature.extend(content);
    Some(signature)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(dir: &Path) -> Tokens {
        Tokens::open(dir, "cluster.local", false).unwrap()
    }

    #[test]
    fn tokens_are_verified_by_audience_expiry_and_signature() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, now) = (tokens(dir.path()), SystemTime::now());
        let token = ours.issue("me", &["a".into(), "b".into()], Duration::from_secs(60), now).unwrap();
        assert_eq!(ours.verify(&token, "b", now).unwrap().subject, "me");
        assert_eq!(tokens(dir.path()).verify(&token, "a", now).unwrap().claims["iss"], "https://cluster.local");
        let refused = |token: &str, audience: &str, later: u64| {
            ours.verify(token, audience, now + Duration::from_secs(later)).unwrap_err()
        };
        assert_eq!(refused(&token, "c", 0), "it is for another audience");
        assert_eq!(refused(&token, "a", 91), "it is expired");
        assert_eq!(refused("a.b", "a", 0), "it is no JWT");
        assert_eq!(refused("a.b.c", "a", 0), "its header is no JSON");
        let (signed, signature) = token.rsplit_once('.').unwrap();
        let (header, claims) = signed.split_once('.').unwrap();
        let other = String::from_utf8(BASE64.decode(claims).unwrap()).unwrap().replace("me", "you");
        assert_eq!(
            refused(&format!("{header}.{}.{signature}", BASE64.encode(other)), "a", 0),
            "its signature is wrong"
        );
        let none = BASE64.encode(r#"{"alg":"none"}"#);
        assert_eq!(refused(&format!("{none}.{claims}."), "a", 0), "it is signed by a key that is not ours");
        let elsewhere = tempfile::tempdir().unwrap();
        let foreign = tokens(elsewhere.path()).issue("me", &["a".into()], Duration::from_secs(60), now).unwrap();
        assert_eq!(refused(&foreign, "a", 0), "it is signed by a key that is not ours");
    }

    #[test]
    fn signatures_have_two_forms() {
        let mut numbers = [0; 64];
        (numbers[1], numbers[2], numbers[32], numbers[63]) = (0x80, 1, 0xff, 7);
        let signature = signature_of(&numbers).unwrap();
        assert_eq!(&signature[..6], [0x30, 2 + 32 + 2 + 33, 2, 32, 0, 0x80]);
        assert_eq!(numbers_of(&signature), Some(numbers));
        assert_eq!(signature_of(&[0; 3]), None);
        assert_eq!(numbers_of(&signature[..20]), None);
    }
}
