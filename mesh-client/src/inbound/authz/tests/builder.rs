//! Rules from code against a naive reading of what was said.

use super::*;
use crate::inbound::{Rbac, Rule as Built};
use mesh_xds::resource::HttpFilterConfig;

/// One call of a method of the builder.
#[derive(Clone, Debug)]
enum Said {
    SpiffeId(String),
    TrustDomain(String),
    Namespace(String),
    NotNamespace(String),
    NotSpiffeId(String),
    Authenticated,
    FromAddresses(CidrRange),
    NotFromAddresses(CidrRange),
    Token(String, String),
    Claim(String, String),
    Path(String),
    NotPath(String),
    Template(String),
    Method(String),
    Host(String),
    Header(String, String),
    Port(u16),
}

impl Said {
    fn tell(&self, rule: Built) -> Built {
        match self {
            Self::SpiffeId(id) => rule.spiffe_id(id),
            Self::TrustDomain(domain) => rule.trust_domain(domain),
            Self::Namespace(namespace) => rule.namespace(namespace),
            Self::NotNamespace(namespace) => rule.not_namespace(namespace),
            Self::NotSpiffeId(id) => rule.not_spiffe_id(id),
            Self::Authenticated => rule.authenticated(),
            Self::FromAddresses(range) => rule.from_addresses(*range),
            Self::NotFromAddresses(range) => rule.not_from_addresses(*range),
            Self::Token(issuer, subject) => rule.token(issuer, subject),
            Self::Claim(name, value) => rule.claim(name, value),
            Self::Path(path) => rule.path(path),
            Self::NotPath(path) => rule.not_path(path),
            Self::Template(template) => rule.path_template(mesh_xds::resource::PathTemplate::new(template).unwrap()),
            Self::Method(method) => rule.method(method),
            Self::Host(host) => rule.host(host),
            Self::Header(name, value) => rule.header(name, value),
            Self::Port(port) => rule.port(*port),
        }
    }

    /// What has to hold for itself: one of those of the same way.
    fn way(&self) -> Option<&str> {
        Some(match self {
            Self::NotNamespace(_) | Self::NotSpiffeId(_) | Self::NotFromAddresses(_) | Self::NotPath(_) => return None,
            Self::SpiffeId(_) => "id",
            Self::TrustDomain(_) => "domain",
            Self::Namespace(_) => "namespace",
            Self::Authenticated => "certificate",
            Self::FromAddresses(_) => "address",
            Self::Token(..) => "token",
            Self::Claim(name, _) => name,
            Self::Path(_) | Self::Template(_) => "path",
            Self::Method(_) => "method",
            Self::Host(_) => "host",
            Self::Header(name, _) => name,
            Self::Port(_) => "port",
        })
    }

    fn holds(&self, r: &Request, deny: bool) -> bool {
        let ids: &[String] = if r.certificate { &r.uris } else { &[] };
        let namespace = |wanted: &str| ids.iter().any(|id| id.split('/').nth(4) == Some(wanted));
        let claim = |name: &str, wanted: &str| match r.claims.as_ref().map(|claims| &claims["payload"][name]) {
            Some(serde_json::Value::String(value)) => fits(wanted, value),
            Some(serde_json::Value::Array(list)) => list.iter().any(|value| fits(wanted, value.as_str().unwrap())),
            _ => false,
        };
        let path = r.uri.path();
        match self {
            Self::TrustDomain(wanted) => ids.iter().any(|id| id.split('/').nth(2) == Some(wanted)),
            Self::SpiffeId(wanted) => ids.iter().any(|id| fits(wanted, id)),
            Self::NotSpiffeId(wanted) => !ids.iter().any(|id| fits(wanted, id)),
            Self::Namespace(wanted) => namespace(wanted),
            Self::NotNamespace(wanted) => !namespace(wanted),
            Self::Authenticated => r.certificate,
            Self::FromAddresses(range) => range.contains(r.remote.ip()),
            Self::NotFromAddresses(range) => !range.contains(r.remote.ip()),
            Self::Token(issuer, subject) => claim("iss", issuer) && claim("sub", subject),
            Self::Claim(name, wanted) => claim(name, wanted),
            Self::Path(wanted) => fits(wanted, path),
            Self::NotPath(wanted) => !fits(wanted, path),
            // `/NAME/{id}` is all that there is here.
            Self::Template(template) => {
                let prefix = template.strip_suffix("{id}").unwrap();
                path.strip_prefix(prefix).is_some_and(|rest| !rest.is_empty() && !rest.contains('/'))
            }
            Self::Method(wanted) => fits(wanted, r.method.as_str()),
            Self::Host(wanted) => fits(wanted, "shop"),
            Self::Header(name, wanted) => {
                let values: Vec<_> = r.headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect();
                let one = deny && values.iter().any(|value| fits(wanted, value));
                one || (!values.is_empty() && fits(wanted, &values.join(",")))
            }
            Self::Port(port) => r.local.port() == *port,
        }
    }
}

/// Istio's texts.
fn fits(wanted: &str, text: &str) -> bool {
    match wanted {
        "*" => !text.is_empty(),
        _ if wanted.starts_with('*') => text.ends_with(&wanted[1..]),
        _ if wanted.ends_with('*') => text.starts_with(&wanted[..wanted.len() - 1]),
        _ => wanted == text,
    }
}

fn holds(said: &[Said], request: &Request, deny: bool) -> bool {
    said.iter().all(|one| match one.way() {
        None => one.holds(request, deny),
        way => said.iter().any(|other| other.way() == way && other.holds(request, deny)),
    })
}

fn said() -> impl Strategy<Value = Said> {
    let id = || {
        prop_oneof![
            Just("*".to_owned()),
            "spiffe://t/ns/[ab]/\\*",
            "\\*/sa/[ab]",
            "spiffe://[tu]/ns/[ab]/sa/[ab]",
            "spiffe://[tu]/\\*",
            // The subject of every certificate here.
            Just("CN=client".to_owned()),
        ]
    };
    let path = || prop_oneof![Just("*".to_owned()), "/[ab]{1,2}\\*", "\\*[ab]", "/[ab]/[ab]"];
    let word = || prop_oneof![Just("*".to_owned()), "[ab]", "a\\*"];
    prop_oneof![
        id().prop_map(Said::SpiffeId),
        "[tu]".prop_map(Said::TrustDomain),
        "[ab]".prop_map(Said::Namespace),
        "[ab]".prop_map(Said::NotNamespace),
        id().prop_map(Said::NotSpiffeId),
        Just(Said::Authenticated),
        ranges().prop_map(Said::FromAddresses),
        ranges().prop_map(Said::NotFromAddresses),
        (word(), word()).prop_map(|(issuer, subject)| Said::Token(issuer, subject)),
        ("iss|groups", word()).prop_map(|(name, value)| Said::Claim(name, value)),
        path().prop_map(Said::Path),
        path().prop_map(Said::NotPath),
        "/[ab]/\\{id\\}".prop_map(Said::Template),
        prop_oneof![Just("GET"), Just("POST"), Just("P*")].prop_map(|method| Said::Method(method.to_owned())),
        prop_oneof![Just("shop"), Just("sho*"), Just("other")].prop_map(|host| Said::Host(host.to_owned())),
        ("x-[ab]", word()).prop_map(|(name, value)| Said::Header(name, value)),
        (1u16..3).prop_map(Said::Port),
    ]
}

fn callers() -> impl Strategy<Value = Request> {
    let claims = proptest::option::of(("[ab]", "[ab]", proptest::collection::vec("[ab]{1,2}", 0..3)));
    let header = proptest::collection::vec(("x-[ab]", "[ab]{0,2}"), 0..3);
    let connection = (0u8..4, 1u16..3, proptest::option::of("spiffe://[tu]/ns/[ab]/sa/[ab]"));
    ("/[ab]{1,2}(/[ab]{1,2})?", any::<bool>(), header, connection, claims).prop_map(
        |(path, post, headers, (remote, port, id), claims)| {
            let mut request = id.map_or_else(|| Request::new("/"), |id| Request::from(&id));
            request.uri = format!("http://shop{path}").parse().unwrap();
            request.method = if post { Method::POST } else { Method::GET };
            for (name, value) in headers {
                request.headers.append(HeaderName::try_from(name).unwrap(), HeaderValue::try_from(value).unwrap());
            }
            request.remote = ([10, 0, 0, remote], 1).into();
            request.local = ([10, 0, 0, 1], port).into();
            request.claims =
                claims.map(|(iss, sub, groups)| json!({"payload": {"iss": iss, "sub": sub, "groups": groups}}));
            request
        },
    )
}

proptest! {
    #[test]
    fn rules_from_code_mean_what_is_said(
        rules in proptest::collection::vec(proptest::collection::vec(said(), 0..4), 0..3),
        deny in any::<bool>(),
        requests in proptest::collection::vec(callers(), 1..12),
    ) {
        let rbac = if deny { Rbac::deny() } else { Rbac::allow() };
        let rbac = rules.iter().fold(rbac, |rbac, said| {
            rbac.rule("r", said.iter().fold(Built::new(), |rule, one| one.tell(rule)))
        });
        let HttpFilterConfig::Rbac(config) = rbac.filter("authz").config else { unreachable!() };
        let engine = Authorization::compile(&"authz".into(), &config).unwrap();
        for request in &requests {
            let matched = rules.iter().any(|said| holds(said, request, deny));
            prop_assert_eq!(engine.check(&request.asked()).is_ok(), matched != deny, "{:?}", request);
        }
    }
}
