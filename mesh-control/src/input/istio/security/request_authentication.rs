//! `RequestAuthentication`: whose tokens are known.

use super::{Node, no_targets, selector};
use crate::{
    input::fields::Fields,
    model::{JwksUri, JwtKeys, JwtRule, Object, RequestAuthentication},
    problem::{Located, Report},
};

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<RequestAuthentication> {
    spec.fields(report, "RequestAuthentication.spec", |f| {
        let selector = selector(f);
        no_targets(f);
        let rules = f.list("jwtRules").iter().filter_map(|node| rule(node, report)).collect();
        RequestAuthentication { object, selector, rules }
    })
}

fn rule(node: &Node, report: &Report) -> Option<JwtRule> {
    node.fields(report, "a JWT rule", |f| {
        let issuer = f.required_string("issuer", "the JWT rule");
        let audiences = texts(f, "audiences");
        let keys = keys(f);
        let from_headers = f.list("fromHeaders").iter().filter_map(|node| {
            node.fields(report, "an item of fromHeaders", |h| {
                let name = h.required_string("name", "the header").map(|n| n.value);
                Some((name?, h.text("prefix").unwrap_or_default()))
            })?
        });
        let claims_to_headers = f.list("outputClaimToHeaders").iter().filter_map(|node| {
            node.fields(report, "an item of outputClaimToHeaders", |c| {
                let header = c.required_string("header", "the claim");
                let claim = c.required_string("claim", "the claim");
                Some((header?.value, claim?.value))
            })?
        });
        let (from_headers, claims_to_headers) = (from_headers.collect(), claims_to_headers.collect());
        let (from_params, from_cookies) = (texts(f, "fromParams"), texts(f, "fromCookies"));
        let payload_to_header = f.text("outputPayloadToHeader").filter(|name| !name.is_empty());
        let forward = f.bool("forwardOriginalToken").unwrap_or(false);
        f.not_honoured(&["timeout", "spaceDelimitedClaims"]);
        Some(JwtRule {
            issuer: issuer?,
            audiences,
            keys: keys?,
            from_headers,
            from_params,
            from_cookies,
            payload_to_header,
            claims_to_headers,
            forward,
        })
    })?
}

fn texts(f: &Fields<'_>, name: &'static str) -> Vec<String> {
    let texts = f.strings(name);
    for empty in texts.iter().filter(|text| text.value.is_empty()) {
        f.report.error(&empty.at, format!("an item of {name} is empty"));
    }
    texts.into_iter().map(|text| text.value).collect()
}

fn keys(f: &Fields<'_>) -> Option<JwtKeys> {
    // `jwks_uri` is Istio's older name for it.
    let uri = f.string("jwksUri").or_else(|| f.string("jwks_uri"));
    match (f.string("jwks"), uri) {
        (Some(jwks), Some(_)) => {
            f.report.error(&jwks.at, "the JWT rule has both jwks and jwksUri");
            None
        }
        (Some(jwks), None) => {
            let parsed = serde_json::from_str::<serde_json::Value>(&jwks.value);
            if !parsed.is_ok_and(|json| json.get("keys").is_some_and(serde_json::Value::is_array)) {
                f.report.error(&jwks.at, "jwks is not a JSON Web Key Set: an object with a list `keys`");
            }
            Some(JwtKeys::Inline(jwks.value))
        }
        (None, Some(uri)) => parse_uri(uri, f.report).map(JwtKeys::Uri),
        (None, None) => {
            // Istio would ask the issuer's OpenID configuration where its keys are.
            f.report.error(f.at, "the JWT rule has neither jwks nor jwksUri: keys are not discovered");
            None
        }
    }
}

fn parse_uri(uri: Located<String>, report: &Report) -> Option<Located<JwksUri>> {
    let parsed = uri.value.split_once("://").and_then(|(scheme, rest)| {
        let default = match scheme {
            "http" => 80,
            "https" => 443,
            _ => return None,
        };
        let authority = rest.split(['/', '?', '#']).next().filter(|a| !a.is_empty() && !a.contains('@'))?;
        let (host, port) = match authority.rsplit_once(':') {
            Some((host, port)) => (host, port.parse().ok().filter(|port| *port > 0)?),
            None => (authority, default),
        };
        Some(JwksUri { uri: uri.value.clone(), host: host.to_ascii_lowercase(), port })
    });
    if parsed.is_none() {
        report.error(&uri.at, format!("`{}` is not an http or https URI", uri.value));
    }
    Some(Located { value: parsed?, at: uri.at })
}
