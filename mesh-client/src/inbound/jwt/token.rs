//! A JSON Web Token taken apart (RFC 7515 compact serialization, RFC 7519 claims), and what can be wrong with one.

use base64::prelude::{BASE64_URL_SAFE_NO_PAD, Engine as _};
use mesh_xds::resource::JwtProvider;
use serde_json::Value;
use std::time::{Duration, SystemTime};

/// A token nobody has verified.
#[derive(Clone, Debug)]
pub(crate) struct Token<'t> {
    pub(super) header: Value,
    pub(super) payload: Value,
    pub(super) alg: String,
    pub(super) kid: String,
    /// What is signed: header, dot, payload.
    pub(super) signed: &'t [u8],
    /// The payload as it stands there.
    pub(super) encoded: &'t str,
    pub(super) signature: Vec<u8>,
}

/// Why a token is refused; the texts are Envoy's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    #[error("Jwt is missing")]
    Missing,
    #[error("Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections")]
    Form,
    #[error("Jwt header is an invalid Base64url encoded or an invalid JSON")]
    Header,
    #[error("Jwt header [alg] is not supported")]
    Algorithm,
    #[error("Jwt payload is an invalid Base64url encoded or an invalid JSON")]
    Payload,
    #[error("Jwt payload [iss], [sub], [aud], [exp], [nbf] or [iat] is of a wrong type")]
    Claim,
    #[error("Jwt signature is an invalid Base64url encoded")]
    Signature,
    #[error("Jwt issuer is not configured")]
    Issuer,
    #[error("Jwt subject is not allowed")]
    Subject,
    #[error("Audiences in Jwt are not allowed")]
    Audience,
    #[error("Jwt is expired")]
    Expired,
    #[error("Jwt not yet valid")]
    NotYet,
    #[error("Jwt has no expiration")]
    NoExpiration,
    #[error("Jwt lifetime is too long")]
    Lifetime,
    #[error("Jwks doesn't have key to match kid or alg from Jwt")]
    NoKey,
    #[error("Jwt verification fails")]
    Verification,
    #[error("Jwks remote fetch is failed")]
    Fetch,
    #[error("the requirement of the route is not configured")]
    Requirement,
}

/// No token is longer.
const MAX_LENGTH: usize = 64 * 1024;

impl<'t> Token<'t> {
    /// Takes a token apart. Nothing in it is to be believed yet.
    pub(crate) fn parse(text: &'t str) -> Result<Self, Failure> {
        if text.len() > MAX_LENGTH {
            return Err(Failure::Form);
        }
        let (signed, signature) = text.rsplit_once('.').ok_or(Failure::Form)?;
        let (header, payload) = signed.split_once('.').ok_or(Failure::Form)?;
        if payload.contains('.') {
            return Err(Failure::Form);
        }
        let header = object(header).ok_or(Failure::Header)?;
        let alg = header.get("alg").and_then(Value::as_str).ok_or(Failure::Header)?.to_owned();
        let kid = match header.get("kid") {
            None => String::new(),
            Some(kid) => kid.as_str().ok_or(Failure::Header)?.to_owned(),
        };
        // RFC 7515 §4.1.11: what is critical has to be understood, and nothing is.
        if header.get("crit").is_some() {
            return Err(Failure::Header);
        }
        let encoded = payload;
        let payload = object(payload).ok_or(Failure::Payload)?;
        let text = |name: &str| payload.get(name).is_none_or(Value::is_string);
        let number = |name: &str| payload.get(name).is_none_or(|value| value.as_f64().is_some_and(|n| n >= 0.0));
        let audience = match payload.get("aud") {
            None | Some(Value::String(_)) => true,
            Some(Value::Array(list)) => list.iter().all(Value::is_string),
            Some(_) => false,
        };
        if !(text("iss") && text("sub") && number("exp") && number("nbf") && number("iat") && audience) {
            return Err(Failure::Claim);
        }
        let signature = BASE64_URL_SAFE_NO_PAD.decode(signature).map_err(|_| Failure::Signature)?;
        Ok(Self { header, payload, alg, kid, signed: signed.as_bytes(), encoded, signature })
    }

    /// `iss`
    pub(crate) fn issuer(&self) -> &str {
        self.payload.get("iss").and_then(Value::as_str).unwrap_or_default()
    }

    /// `sub`
    pub(crate) fn subject(&self) -> &str {
        self.payload.get("sub").and_then(Value::as_str).unwrap_or_default()
    }

    fn seconds(&self, name: &str) -> Option<f64> {
        self.payload.get(name)?.as_f64()
    }

    /// All that is asked of a token but its signature.
    pub(crate) fn check(
        &self,
        provider: &JwtProvider,
        audiences: Option<&[String]>,
        now: SystemTime,
    ) -> Result<(), Failure> {
        if !provider.issuer.is_empty() && provider.issuer != self.issuer() {
            return Err(Failure::Issuer);
        }
        if provider.subjects.as_ref().is_some_and(|subjects| !subjects.matches(self.subject())) {
            return Err(Failure::Subject);
        }
        self.check_time(provider, now)?;
        let wanted = audiences.unwrap_or(&provider.audiences);
        if !wanted.is_empty() && !self.audiences().any(|found| wanted.iter().any(|one| plain(one) == plain(found))) {
            return Err(Failure::Audience);
        }
        Ok(())
    }

    /// `exp` and `nbf`, which a token that was kept has to be asked for again.
    pub(crate) fn check_time(&self, provider: &JwtProvider, now: SystemTime) -> Result<(), Failure> {
        let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
        let skew = provider.clock_skew.as_secs_f64();
        if self.seconds("nbf").is_some_and(|nbf| now < nbf - skew) {
            return Err(Failure::NotYet);
        }
        let Some(exp) = self.seconds("exp") else {
            let needed = provider.require_expiration || provider.max_lifetime.is_some();
            return if needed { Err(Failure::NoExpiration) } else { Ok(()) };
        };
        if now > exp + skew {
            return Err(Failure::Expired);
        }
        match provider.max_lifetime {
            Some(longest) if exp - self.seconds("iat").unwrap_or(now) > longest.as_secs_f64() => Err(Failure::Lifetime),
            _ => Ok(()),
        }
    }

    fn audiences(&self) -> impl Iterator<Item = &str> {
        let (one, many) = match self.payload.get("aud") {
            Some(Value::String(one)) => (Some(one.as_str()), &[][..]),
            Some(Value::Array(many)) => (None, many.as_slice()),
            _ => (None, &[][..]),
        };
        one.into_iter().chain(many.iter().filter_map(Value::as_str))
    }
}

impl Failure {
    /// How much it says of why none of several needs is met: what is wrong with a token more than that it is another's, and that more than that
    /// there is none.
    pub(super) fn says(self) -> u8 {
        match self {
            Self::Missing => 0,
            Self::Issuer => 1,
            _ => 2,
        }
    }

    /// Envoy answers 403 for an audience, and 401 for everything else.
    pub(crate) fn status(self) -> http::StatusCode {
        match self {
            Self::Audience | Self::Requirement => http::StatusCode::FORBIDDEN,
            _ => http::StatusCode::UNAUTHORIZED,
        }
    }
}

/// A URL of either scheme, with or without a slash at its end, is one audience (Envoy).
fn plain(audience: &str) -> &str {
    let rest = audience.strip_prefix("https://").or_else(|| audience.strip_prefix("http://")).unwrap_or(audience);
    rest.strip_suffix('/').unwrap_or(rest)
}

fn object(text: &str) -> Option<Value> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).ok()?;
    serde_json::from_slice(&bytes).ok().filter(Value::is_object)
}
