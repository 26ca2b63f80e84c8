//! Tokens of every algorithm that the provider of a default build has, made here and verified as in a request.

mod fetching;

use super::*;
use base64::prelude::{BASE64_URL_SAFE_NO_PAD as B64, Engine as _};
use bytes::Bytes;
use http::Request;
use mesh_xds::resource::{JwksSource, JwtClaimToHeader, JwtHeader, JwtRule, JwtTokenCache, RouteMatch};
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ECDSA_P384_SHA384, PKCS_ED25519, SigningKey as _};
use serde_json::json;
use std::{
    pin::Pin,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

/// Signs tokens.
struct Signer {
    kid: &'static str,
    alg: &'static str,
    pair: KeyPair,
}

impl Signer {
    fn new(kid: &'static str, alg: &'static str) -> Self {
        let algorithm = match alg {
            "ES256" => &PKCS_ECDSA_P256_SHA256,
            "ES384" => &PKCS_ECDSA_P384_SHA384,
            _ => &PKCS_ED25519,
        };
        Self { kid, alg, pair: KeyPair::generate_for(algorithm).unwrap() }
    }

    fn jwk(&self) -> Value {
        let public = self.pair.public_key_raw();
        match self.alg {
            "EdDSA" => json!({"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "x": B64.encode(public)}),
            alg => {
                let (x, y) = public[1..].split_at((public.len() - 1) / 2);
                let crv = if alg == "ES256" { "P-256" } else { "P-384" };
                json!({"kty": "EC", "crv": crv, "kid": self.kid, "alg": alg, "x": B64.encode(x), "y": B64.encode(y)})
            }
        }
    }

    fn sign(&self, claims: &Value) -> String {
        let header = json!({"alg": self.alg, "kid": self.kid, "typ": "JWT"}).to_string();
        let signed = format!("{}.{}", B64.encode(header), B64.encode(claims.to_string()));
        let signature = self.pair.sign(signed.as_bytes()).unwrap();
        let raw =
            if self.alg == "EdDSA" { signature } else { raw(&signature, if self.alg == "ES256" { 32 } else { 48 }) };
        format!("{signed}.{}", B64.encode(raw))
    }
}

/// Two numbers out of ASN.1, as a token has them.
fn raw(der: &[u8], length: usize) -> Vec<u8> {
    let mut rest = &der[if der[1] & 0x80 == 0 { 2 } else { 3 }..];
    let mut out = Vec::new();
    for _ in 0..2 {
        let (number, after) = rest[2..].split_at(rest[1].into());
        rest = after;
        let digits: Vec<u8> = number.iter().copied().skip_while(|byte| *byte == 0).collect();
        out.extend(std::iter::repeat_n(0, length - digits.len()));
        out.extend(digits);
    }
    out
}

fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

fn claims() -> Value {
    json!({"iss": "https://issuer", "sub": "anna", "aud": ["shop"], "exp": now() + 600, "groups": ["a", "b"], "scope": "r w"})
}

fn set(signers: &[&Signer]) -> String {
    json!({"keys": signers.iter().map(|signer| signer.jwk()).collect::<Vec<_>>()}).to_string()
}

fn provider(jwks: JwksSource) -> JwtProvider {
    JwtProvider { payload_in_metadata: "payload".into(), ..JwtProvider::new("https://issuer", jwks) }
}

fn config(provider: JwtProvider, requirement: Option<JwtRequirement>) -> JwtConfig {
    JwtConfig {
        providers: [("p".into(), Arc::new(provider))].into(),
        rules: vec![JwtRule { matches: RouteMatch::default(), requirement }],
        ..JwtConfig::default()
    }
}

fn needed() -> Option<JwtRequirement> {
    Some(JwtRequirement::Provider { name: "p".into(), audiences: None })
}

fn compile(config: &JwtConfig) -> Authentication {
    compile_with(config, &|_| None)
}

fn compile_with(config: &JwtConfig, fetch: &dyn Fn(&RemoteJwks) -> Option<Arc<dyn FetchKeys>>) -> Authentication {
    let shelf = Shelf::default();
    let keys = Keys { shelf: &shelf, provider: mesh_tls::default_provider(), fetch };
    Authentication::compile(config, None, &keys).unwrap()
}

fn bearer(token: &str) -> request::Parts {
    Request::get("http://shop/cart").header("authorization", format!("Bearer {token}")).body(()).unwrap().into_parts().0
}

fn bare() -> request::Parts {
    Request::get("http://shop/cart").body(()).unwrap().into_parts().0
}

/// The status and text of the refusal.
fn refused(authentication: &Authentication, mut head: request::Parts) -> (u16, String) {
    match authentication.check(&mut head) {
        Checked::Refused(reply) => {
            let response = reply.respond(false, true);
            (response.status().as_u16(), String::from_utf8(response.body().to_vec()).unwrap())
        }
        Checked::Passed(_) => panic!("was let in"),
        Checked::Fetching => panic!("has to fetch"),
    }
}

fn passed(authentication: &Authentication, head: &mut request::Parts) -> Option<JwtClaims> {
    match authentication.check(head) {
        Checked::Passed(claims) => claims,
        Checked::Refused(reply) => panic!("{}", reply.describe()),
        Checked::Fetching => panic!("has to fetch"),
    }
}

#[test]
fn tokens_of_every_curve_are_verified() {
    for alg in ["ES256", "ES384", "EdDSA"] {
        let (signer, other) = (Signer::new("k", alg), Signer::new("k", alg));
        let authentication = compile(&config(provider(JwksSource::Inline(set(&[&signer]).into())), needed()));
        // Signatures differ in the length of their numbers.
        for _ in 0..20 {
            let mut head = bearer(&signer.sign(&claims()));
            let told = passed(&authentication, &mut head).unwrap();
            assert_eq!((told.issuer(), told.subject()), (Some("https://issuer"), Some("anna")), "{alg}");
            assert!(!head.headers.contains_key("authorization"), "it is not forwarded");
        }
        let forged = refused(&authentication, bearer(&other.sign(&claims())));
        assert_eq!(forged, (401, "Jwt verification fails".to_owned()), "{alg}");
    }
}

#[test]
fn rsa_keys_are_verified_as_rfc_7515_has_them() {
    // RFC 7515 appendix A.2.
    let n = "ofgWCuLjybRlzo0tZWJjNiuSfb4p4fAkd_wWJcyQoTbji9k0l8W26mPddxHmfHQp-Vaw-4qPCJrcS2mJPMEzP1Pt0Bm4d4QlL-yRT-SFd2lZS-pCgNMsD1W_YpRPEwOWvG6b32690r2jZ47soMZo9wGzjb_7OMg0LOL-bSf63kpaSHSXndS5z5rexMdbBYUsLA9e-KXBdQOS-UTo7WTBEMa2R2CapHg665xsmtdVMTBQY4uDZlxvb3qCo5ZwKh9kG4LT6_I5IhlJH7aGhyxXFvUK-DWNmoudF8NAco9_h9iaGNj8q2ethFkMLs91kzk2PAcDTW9gb54h4FRWyuXpoQ";
    let token = "eyJhbGciOiJSUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.cC4hiUPoj9Eetdgtv3hF80EGrhuB__dzERat0XF9g2VtQgr9PJbu3XOiZj5RZmh7AAuHIm4Bh-0Qc_lF5YKt_O8W2Fp5jujGbds9uJdbF9CUAr7t1dnZcAcQjbKBYNX4BAynRFdiuB--f_nZLgrnbyTyWzO75vRK5h6xBArLIARNPvkSjtQBMHlb1L07Qe7K0GarZRmB_eSN9383LcOLn6_dO--xi12jzDwusC-eOkHWEsqtFZESc6BfI7noOPqvhJ1phCnvWh6IeYI2w9QOYEUipUTI8np6LbgGY9Fs98rqVt5AXLIhWkWywlVmtVrBp0igcN_IoypGlUPQGe77Rw";
    let keys = KeySet::parse(json!({"keys": [{"kty": "RSA", "n": n, "e": "AQAB"}]}).to_string().as_bytes()).unwrap();
    let provider = mesh_tls::default_provider();
    let parsed = Token::parse(token).unwrap();
    assert_eq!(keys.verify(&parsed, &provider), Ok(()));
    let changed = token.replace("eyJpc3MiOiJqb2Ui", "eyJpc3MiOiJqb2Yi");
    assert_eq!(keys.verify(&Token::parse(&changed).unwrap(), &provider), Err(Failure::Verification));
    let at = Duration::from_secs(1_300_819_380 + 61);
    let expired =
        parsed.check(&JwtProvider::new("joe", JwksSource::Inline("".into())), None, SystemTime::UNIX_EPOCH + at);
    assert_eq!(expired, Err(Failure::Expired));
}

#[test]
fn rsa_signatures_of_both_kinds_and_every_digest_are_verified() {
    // A key of 2048 bits; the tokens were signed with openssl, those of PS with a salt as long as the digest (RFC 7518 section 3.5).
    let n = "0xyvZyNarTitHO2BDA5eR4ZDGs3VTmP5O0mJTAgDMiWRI8iKbnYO-KudvFnYrTTZRvCMFmYHVuZGi7g9eLeJwo8uVcXOt9dSG0jFzVsUI8r0jzIm8189XCV-k-gYN-C2Zd5E1Yh6OvN7zzPSD_tg9Z_6rwYbin1oAlTmxfsIDCCjL1acTUKPQBtVGwd6z63iKmfWHV07ZYK7fgtDD_0FcyHwmWfuFNSgYzsTp2RnFdfz0PmX6Z6pnYYf-7mhSJYMxZT6F5ENyvN9MZFc_KXEP2msOOaVA0VRzAVFUU2I-TsFTODkhDkJ2tWfXA7jZvdrd2-7YP79cTU8D34p3IbYBQ";
    let signatures = [
        (
            "RS384",
            "l32PJ77k2JtaRFF3SWzRtZjpjhsI2KUah8QT9OdDRy4hSAPVORndtFLiJdtapNntiWnfg0jWbWIvrCSzIXG_pgdLY5_AGmS3OcBTvxmVGFspTTnqpHvBQFRFSiOVlCnZSK459Eyxa9Jb9w8opW8d6jpvDOL6cHFyz7_8a-vlNG9d2W6kdcBfIjYUv9pPZliBBcU3YvB3hHAeczi2UpX0EXnST6-Xz3hVesGpQgwNAYqJ3WqpDqD9Wnumk50bkYfuTcnPrHgGOsG4FmKwVrYtxxWgjcgHQGnLniOrLPhc-A2d6fjN0dLwkbKas7MyaC9OHSr3u1E2-N60vsxiWh4W-A",
        ),
        (
            "RS512",
            "ovuGOmRhTOgxlWM-mbClQscupjiAyQtyWVEIFjr5AotgUHZCrAIGYTLIp3hF4ZK4BQf-oqwnO6TLE8nvrEQe0D8dBHzz_ub0bQPi3wEsOobZT9xzJCJytff2a3GiHC5ToVy8TScpyUxDUV_shgVEJAC9Jm03-N8taGnnp_MlEZxKieHHiI54Z_6R0Y2QjnqwbRnQgAfYQb8MbLCg-BPNN3RK9WcQVwImlpdSVhDcZaHpKKH7DwiSzjDBBPhCdsKYmnpdw8y6d21FdlYu0FUiXG1GM8-laRw_eBqRs8vad5Bk2gZqg9ZSRtu9vLMJDYtBOX5RICVHJvcbCSqW0BQT8A",
        ),
        (
            "PS256",
            "BDXSK-pfon7CqNAHeyXnGqiJh0cFyk1HMgyKXxhclWUxrA1Agj29_fDscsJcU4yw5IwGxbZQ6aDhxt3XkUCn9kLoO_bl3IPJtMtn0mJ8fC22NMeLpygGELmdkjzGDgvdARuSQ-kQZ7D1JDp3DcKmdGxOZd_Wa1nJKLLt4cSEgTpyCeplfC0UF9WSkqb4xka6bTg48b4yw_AsjEttTHZLF01hcNt_zU3H9N2P3AVmgiAB2PVh6w5nBRPJWjWbgZv7xrtNZQ7h7yc0hyBIZjgxqbx1cXIbm8_-GeHFWpnTt9tMlWMKnZawTgC0gwSf2dtsZRiBaxQHkjF2z2iI2swMtA",
        ),
        (
            "PS384",
            "KSOvoQa8q_f2vEKROGoONkzMyvr6o8yQqGcEUqLHxK0KWST4vfY_IB6IvpEzDUU-o1XLiw2Qt57Gw_3DK2cYceNjTFCwrzG-Q4f4Lu-AvTlTdX6KbayRHw-kEVHfqiZOVW77X2y-rtWMzX8H_YgtDjIKvMoCZVVS6ZAu6i1VrNQL5_P4MEqblwEIxE8WWbGY-xfnCgOdjwfljWjxtzrIQBj9445MJq48u2qr8dd7IZo-swGAEPz3tggbFuiPo8VDWUlynXQK2IQiduJjqc0jqJ01O2Jr2XNUtek-e4GKLRAa_NMs3ZjoATRXk1XSaNNg0iPgRUDOA_cdBX7FZRmi2w",
        ),
        (
            "PS512",
            "fKMoXpQCIiSmo-qmyBRSzwiNjiXFKpQ9jEi7uEDdj9uSRQvwh-3LbWL83AI9-j-eBXHEV3drsUe9xjq0PQdD6KMLQiNCH9uLEUcJAz8paTigtRNZBe9ZanP3qVs8VGprxmQ0ugAUaoLDv4j2gsloSykFRs6V_aIMR8gIlDC4yrwsmWCe24ETOUKSfFyq4dYpX-EGw9IxZVfWljBlGbg_G5ERDJpxnq5nh73VFMk1s_xVKBPtcyqGHwlKwBvGJNuCRk8OYmHlizl3Z4pve8p3vC0hRX3hATL6yyKH6RnGlhr8HotIhAFpqnH0yYdlI3vDwo4y327MbatR9LWcCqdkkg",
        ),
    ];
    let set = |key: Value| KeySet::parse(json!({"keys": [key]}).to_string().as_bytes()).unwrap();
    let keys = set(json!({"kty": "RSA", "n": n, "e": "AQAB"}));
    let provider = mesh_tls::default_provider();
    let token = |alg: &str, payload: &str, signature: &str| {
        format!("{}.{}.{signature}", B64.encode(json!({"alg": alg}).to_string()), B64.encode(payload))
    };
    let verified = |keys: &KeySet, token: &str| keys.verify(&Token::parse(token).unwrap(), &provider);
    let payload = r#"{"iss":"joe","exp":1300819380}"#;
    for (alg, signature) in signatures {
        assert_eq!(verified(&keys, &token(alg, payload, signature)), Ok(()), "{alg}");
        let changed = payload.replace("joe", "jim");
        assert_eq!(verified(&keys, &token(alg, &changed, signature)), Err(Failure::Verification), "{alg}");
        for (other, _) in signatures.iter().filter(|(other, _)| *other != alg) {
            assert_eq!(
                verified(&keys, &token(other, payload, signature)),
                Err(Failure::Verification),
                "{alg} is not {other}"
            );
        }
        // A key that says what it is for signs nothing else.
        let only = set(json!({"kty": "RSA", "n": n, "e": "AQAB", "alg": alg}));
        assert_eq!(verified(&only, &token(alg, payload, signature)), Ok(()));
        let another = if alg == "PS256" { "RS512" } else { "PS256" };
        let only = set(json!({"kty": "RSA", "n": n, "e": "AQAB", "alg": another}));
        assert_eq!(
            verified(&only, &token(alg, payload, signature)),
            Err(Failure::NoKey),
            "{alg} with a key of {another}"
        );
    }
}

#[test]
fn bad_tokens_are_refused_with_their_reason() {
    let signer = Signer::new("k", "ES256");
    let mut provider = provider(JwksSource::Inline(set(&[&signer]).into()));
    provider.audiences = vec!["shop".into()];
    let authentication = compile(&config(provider, needed()));
    let with = |change: &dyn Fn(&mut Value)| {
        let mut claims = claims();
        change(&mut claims);
        refused(&authentication, bearer(&signer.sign(&claims)))
    };
    assert_eq!(refused(&authentication, bare()), (401, "Jwt is missing".into()));
    assert_eq!(with(&|c| c["iss"] = "other".into()).1, "Jwt issuer is not configured");
    assert_eq!(with(&|c| c["aud"] = "other".into()), (403, "Audiences in Jwt are not allowed".into()));
    assert_eq!(with(&|c| c["exp"] = (now() - 61).into()).1, "Jwt is expired");
    assert_eq!(with(&|c| c["nbf"] = (now() + 90).into()).1, "Jwt not yet valid");
    assert!(with(&|c| c["exp"] = "soon".into()).1.contains("wrong type"));
    let good = signer.sign(&claims());
    let (signed, _) = good.rsplit_once('.').unwrap();
    assert_eq!(
        refused(&authentication, bearer(signed)).1,
        "Jwt is not in the form of Header.Payload.Signature with two dots and 3 sections"
    );
    assert_eq!(
        refused(&authentication, bearer(&format!("{signed}.%"))).1,
        "Jwt signature is an invalid Base64url encoded"
    );
    let none = format!("{}.{}.", B64.encode(r#"{"alg":"none"}"#), B64.encode(claims().to_string()));
    assert_eq!(refused(&authentication, bearer(&none)).1, "Jwt header [alg] is not supported");
    let mixed = format!(
        "{}.{}.{}",
        B64.encode(r#"{"alg":"HS256","kid":"k"}"#),
        B64.encode(claims().to_string()),
        B64.encode("x")
    );
    assert_eq!(refused(&authentication, bearer(&mixed)).1, "Jwt header [alg] is not supported");
    let stranger = Signer::new("z", "ES256").sign(&claims());
    assert_eq!(refused(&authentication, bearer(&stranger)).1, "Jwks doesn't have key to match kid or alg from Jwt");
    // Within the leeway of 60 seconds.
    let mut late = claims();
    late["exp"] = (now() - 30).into();
    assert!(passed(&authentication, &mut bearer(&signer.sign(&late))).is_some());
}

#[test]
fn a_refusal_says_where_to_send_a_token() {
    let signer = Signer::new("k", "ES256");
    let authentication = compile(&config(provider(JwksSource::Inline(set(&[&signer]).into())), needed()));
    let Checked::Refused(reply) = authentication.check(&mut bearer("x")) else { panic!() };
    let response = reply.clone().respond(false, true);
    let challenge = response.headers()["www-authenticate"].to_str().unwrap();
    assert_eq!(challenge, "Bearer realm=\"http://shop/cart\", error=\"invalid_token\"");
    assert_eq!(reply.respond(true, true).headers()["grpc-status"], "16");
    let mut stripped = config(provider(JwksSource::Inline(set(&[&signer]).into())), needed());
    stripped.strip_failure_response = true;
    assert_eq!(refused(&compile(&stripped), bare()), (401, String::new()));
}

#[test]
fn tokens_may_be_optional_and_are_never_half_believed() {
    let signer = Signer::new("k", "ES256");
    let jwks = || JwksSource::Inline(set(&[&signer]).into());
    let one = || needed().unwrap();
    let optional = Some(JwtRequirement::OneOf(vec![one(), JwtRequirement::AllowMissing]));
    let authentication = compile(&config(provider(jwks()), optional));
    assert!(passed(&authentication, &mut bare()).is_none());
    assert!(passed(&authentication, &mut bearer(&signer.sign(&claims()))).is_some());
    assert_eq!(refused(&authentication, bearer("x.y.z")).0, 401);
    let lenient = Some(JwtRequirement::OneOf(vec![JwtRequirement::AllowMissingOrFailed, one()]));
    let authentication = compile(&config(provider(jwks()), lenient));
    assert!(passed(&authentication, &mut bearer("x.y.z")).is_none());
    assert!(passed(&authentication, &mut bearer(&signer.sign(&claims()))).is_some());
    // One good token beside a bad one is not enough: the handler may take the other.
    let authentication = compile(&config(provider(jwks()), needed()));
    let mut both = bearer(&signer.sign(&claims()));
    both.headers.append("authorization", HeaderValue::from_static("Bearer x.y.z"));
    assert_eq!(refused(&authentication, both).0, 401);
    let nothing = compile(&config(provider(jwks()), None));
    assert!(passed(&nothing, &mut bearer("x.y.z")).is_none(), "a rule without a requirement");
}

#[test]
fn what_a_token_says_is_told_on_and_cannot_be_forged() {
    let signer = Signer::new("k", "EdDSA");
    let mut provider = provider(JwksSource::Inline(set(&[&signer]).into()));
    let claim = |header: &'static str, path: &[&str]| JwtClaimToHeader {
        header: HeaderName::from_static(header),
        path: path.iter().map(|key| (*key).to_owned()).collect(),
    };
    provider.claim_to_headers =
        vec![claim("x-sub", &["sub"]), claim("x-groups", &["groups"]), claim("x-tenant", &["tenant"])];
    provider.forward_payload_header = Some(HeaderName::from_static("x-payload"));
    provider.space_delimited_claims = vec!["scope".into()];
    provider.from_params = vec!["token".into()];
    provider.from_cookies = vec!["session".into()];
    let authentication = compile(&config(provider, needed()));
    let token = signer.sign(&claims());
    let request = Request::get(format!("http://shop/cart?a=1&token={token}&b=2"));
    let request = request.header("x-sub", "admin").header("x-tenant", "all").header("x-payload", "e30");
    let mut head = request.body(()).unwrap().into_parts().0;
    let told = passed(&authentication, &mut head).unwrap();
    assert_eq!(head.headers["x-sub"], "anna");
    assert!(!head.headers.contains_key("x-groups"), "lists become no headers");
    assert!(!head.headers.contains_key("x-tenant"), "only we say what is in it");
    assert_eq!(head.headers["x-payload"], token.split('.').nth(1).unwrap());
    assert_eq!(head.uri.to_string(), "http://shop/cart?a=1&b=2");
    assert_eq!(told.metadata()["payload"]["scope"], json!(["r", "w"]));
    assert_eq!(told.get("scope"), Some(&json!("r w")));
    let cookie = Request::get("http://shop/").header("cookie", format!("a=1; session={token}")).body(()).unwrap();
    assert!(passed(&authentication, &mut cookie.into_parts().0).is_some());
}

#[test]
fn what_several_filters_learn_is_kept() {
    let (first, second) = (Signer::new("a", "ES256"), Signer::new("b", "EdDSA"));
    let filter = |signer: &Signer, issuer: &str, header: &'static str, name: &str| {
        let provider = JwtProvider {
            payload_in_metadata: name.into(),
            from_headers: vec![JwtHeader { name: HeaderName::from_static(header), prefix: String::new() }],
            ..JwtProvider::new(issuer, JwksSource::Inline(set(&[signer]).into()))
        };
        compile(&config(provider, needed()))
    };
    let request = || {
        let token = |signer: &Signer, issuer: &str, sub: &str| signer.sign(&json!({"iss": issuer, "sub": sub}));
        let request = Request::get("http://shop/").header("x-first", token(&first, "one", "anna"));
        request.header("x-second", token(&second, "two", "bert")).body(()).unwrap().into_parts().0
    };
    let mut head = request();
    passed(&filter(&first, "one", "x-first", "user"), &mut head).unwrap();
    let told = passed(&filter(&second, "two", "x-second", "device"), &mut head).unwrap();
    assert_eq!(
        told.metadata(),
        &json!({"user": {"iss": "one", "sub": "anna"}, "device": {"iss": "two", "sub": "bert"}})
    );
    let subjects =
        |claims: &JwtClaims| claims.payloads().iter().map(|claims| claims["sub"].clone()).collect::<Vec<_>>();
    assert_eq!(subjects(&told), ["anna", "bert"]);
    assert_eq!(subjects(head.extensions.get().unwrap()), ["anna", "bert"], "so does the handler see them");
    // Under one name the later filter's counts, as in Envoy; one that learns nothing takes nothing away.
    let mut head = request();
    passed(&filter(&first, "one", "x-first", "user"), &mut head).unwrap();
    let told = passed(&filter(&second, "two", "x-second", "user"), &mut head).unwrap();
    assert_eq!((told.metadata(), subjects(&told).len()), (&json!({"user": {"iss": "two", "sub": "bert"}}), 2));
    let nothing = compile(&config(provider(JwksSource::Inline(set(&[&first]).into())), None));
    assert!(passed(&nothing, &mut head).is_none());
    assert_eq!(subjects(head.extensions.get().unwrap()).len(), 2);
}

#[test]
fn each_of_several_parameters_and_cookies_of_a_name_has_to_be_good() {
    let signer = Signer::new("k", "EdDSA");
    let mut provider = provider(JwksSource::Inline(set(&[&signer]).into()));
    provider.from_params = vec!["to ken".into()];
    provider.from_cookies = vec!["session".into()];
    let authentication = compile(&config(provider, needed()));
    let (good, other) = (signer.sign(&claims()), signer.sign(&json!({"iss": "https://issuer", "sub": "bert"})));
    let query = |query: &str| Request::get(format!("http://shop/cart?{query}")).body(()).unwrap().into_parts().0;
    let name = ["to%20ken", "to+ken", "%74o%20%6ben"];
    for name in name {
        let mut head = query(&format!("a=%41&{name}={}&b", good.replace('.', "%2E")));
        assert_eq!(passed(&authentication, &mut head).unwrap().subject(), Some("anna"), "{name}");
        assert_eq!(head.uri, "http://shop/cart?a=%41&b", "{name}: taken out, and nothing else changed");
        for (first, second) in [(good.as_str(), "x.y.z"), ("x.y.z", &good), (&good, "")] {
            let mixed = query(&format!("to+ken={first}&{name}={second}"));
            assert_eq!(refused(&authentication, mixed).0, 401, "{name}: {first} {second}");
        }
    }
    let mut both = query(&format!("to+ken={good}&to%20ken={other}"));
    assert_eq!(passed(&authentication, &mut both).unwrap().payloads().len(), 2);
    assert_eq!(both.uri, "http://shop/cart");
    let mut twice = query(&format!("to+ken={good}&to%20ken={good}"));
    assert_eq!(passed(&authentication, &mut twice).unwrap().payloads().len(), 1, "one token");
    assert_eq!(refused(&authentication, query("to%2ken=x&token=y")), (401, "Jwt is missing".into()));
    let cookies = |lines: &[&str]| {
        let mut head = bare();
        for line in lines {
            head.headers.append("cookie", HeaderValue::from_str(&line.replace('G', &good)).unwrap());
        }
        head
    };
    assert!(passed(&authentication, &mut cookies(&["a=1; session=G"])).is_some());
    for bad in [&["session=G; session=x.y.z"][..], &["session=G", "session=\"x.y.z\""], &["session=x; session=G"]] {
        assert_eq!(refused(&authentication, cookies(bad)).0, 401, "{bad:?}");
    }
}

#[test]
fn kept_tokens_expire_all_the_same() {
    let signer = Signer::new("k", "ES256");
    let mut provider = provider(JwksSource::Inline(set(&[&signer]).into()));
    provider.cache = Some(JwtTokenCache { tokens: 2, max_length: 4096 });
    let keys = Shelf::default().store(&provider.jwks, |_| None).unwrap();
    let issuer = Arc::new(Issuer::new(&Arc::new(provider), keys));
    let tokens: Vec<_> =
        (0..3).map(|n| signer.sign(&json!({"iss": "https://issuer", "n": n, "exp": now() + 5}))).collect();
    let crypto = mesh_tls::default_provider();
    let verify = |token: &str, now| {
        let found = Found { text: token.to_owned().into(), at: locate::At::Cookie };
        issuer.verify(found, None, &Checking { tried: &[], provider: &crypto, now }).is_ok()
    };
    for token in tokens.iter().chain(&tokens) {
        assert!(verify(token, SystemTime::now()));
        assert!(issuer.kept.as_ref().unwrap().lock().unwrap().tokens.len() <= 2);
    }
    assert!(!verify(&tokens[2], SystemTime::now() + Duration::from_secs(66)));
}

/// Serves sets of keys, one after the other.
struct Server {
    sets: Vec<Result<String, String>>,
    fetches: Arc<AtomicUsize>,
}

impl FetchKeys for Server {
    fn fetch(&self) -> Pin<Box<dyn Future<Output = Result<Bytes, crate::BoxError>> + Send>> {
        let at = self.fetches.fetch_add(1, Ordering::SeqCst).min(self.sets.len() - 1);
        let set = self.sets[at].clone();
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Ok(set?.into())
        })
    }
}

fn remote(sets: Vec<Result<String, String>>) -> (Authentication, Arc<AtomicUsize>) {
    let fetches = Arc::new(AtomicUsize::new(0));
    (fetched_by(Arc::new(Server { sets, fetches: fetches.clone() })), fetches)
}

fn fetched_by(server: Arc<dyn FetchKeys>) -> Authentication {
    let source = RemoteJwks {
        uri: "http://issuer/keys".parse().unwrap(),
        cluster: "issuer".into(),
        timeout: Duration::from_secs(5),
        cache_duration: Duration::from_secs(600),
        async_fetch: false,
        failed_refetch: Duration::from_secs(1),
        retries: 0,
        stale: Duration::from_secs(3600),
    };
    let config = config(provider(JwksSource::Remote(source)), needed());
    compile_with(&config, &move |_| Some(server.clone()))
}

#[tokio::test(start_paused = true)]
async fn keys_are_fetched_once_and_again_before_they_are_too_old() {
    let signer = Signer::new("k", "ES256");
    let (authentication, fetches) = remote(vec![Ok(set(&[&signer]))]);
    let token = signer.sign(&claims());
    assert!(matches!(authentication.check(&mut bearer(&token)), Checked::Fetching));
    let (mut a, mut b) = (bearer(&token), bearer(&token));
    let (a, b) = tokio::join!(authentication.fetched(&mut a), authentication.fetched(&mut b));
    assert!(a.is_ok() && b.is_ok());
    assert_eq!(fetches.load(Ordering::SeqCst), 1, "both waited for one fetch");
    tokio::time::advance(Duration::from_secs(596)).await;
    assert!(passed(&authentication, &mut bearer(&token)).is_some(), "still good");
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(fetches.load(Ordering::SeqCst), 2, "fetched again meanwhile");
    tokio::time::advance(Duration::from_secs(590)).await;
    assert!(passed(&authentication, &mut bearer(&token)).is_some());
}

#[tokio::test(start_paused = true)]
async fn a_new_key_is_learnt_and_unknown_ones_cost_few_fetches() {
    let (old, new) = (Signer::new("old", "ES256"), Signer::new("new", "ES256"));
    let (authentication, fetches) = remote(vec![Ok(set(&[&old])), Ok(set(&[&old, &new]))]);
    assert!(authentication.fetched(&mut bearer(&old.sign(&claims()))).await.is_ok());
    tokio::time::advance(Duration::from_secs(6)).await;
    assert!(authentication.fetched(&mut bearer(&new.sign(&claims()))).await.is_ok(), "rotated");
    let stranger = Signer::new("none", "ES256").sign(&claims());
    for _ in 0..20 {
        assert!(authentication.fetched(&mut bearer(&stranger)).await.is_err());
    }
    assert_eq!(fetches.load(Ordering::SeqCst), 2, "bounded");
}

#[tokio::test(start_paused = true)]
async fn a_failed_fetch_refuses_and_is_tried_again() {
    let signer = Signer::new("k", "ES256");
    let (authentication, fetches) = remote(vec![Err("down".into()), Ok("no keys".into()), Ok(set(&[&signer]))]);
    let token = signer.sign(&claims());
    let failed = authentication.fetched(&mut bearer(&token)).await.unwrap_err();
    assert_eq!(failed.respond(false, true).body(), "Jwks remote fetch is failed");
    assert!(authentication.fetched(&mut bearer(&token)).await.is_err(), "not at once again");
    assert_eq!(fetches.load(Ordering::SeqCst), 1);
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(authentication.fetched(&mut bearer(&token)).await.is_err(), "no keys");
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(authentication.fetched(&mut bearer(&token)).await.is_ok());
}
