//! What a configuration file says.

use super::fields::{Fields, Wrong};
use crate::{
    Keepalive,
    inbound::{
        Limits,
        authorize::{JwtAuthentication, JwtProvider, RateLimit, Rbac, Rule},
        jwt::KeySet,
    },
};
use mesh_tls::{ClientAuth, Mode, PeerCheck};
use mesh_xds::resource::{CidrRange, ClientCertDetails, ForwardClientCert, HttpFilter, HttpFilterConfig, PathTemplate};
use serde_json::Value;
use std::{net::IpAddr, path::PathBuf, time::Duration};

/// How often certificates are read again, unless the file says.
const REFRESH: Duration = Duration::from_secs(600);

/// All of a file.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) tls: Tls,
    pub(super) limits: Limits,
    /// In order.
    pub(super) filters: Vec<HttpFilter>,
    pub(super) forwarding: Option<(ForwardClientCert, ClientCertDetails)>,
}

/// How connections are secured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Tls {
    /// As the program says.
    Unsaid,
    /// Not at all.
    Off,
    Files(TlsFiles),
}

/// By which files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TlsFiles {
    pub(super) mode: Mode,
    pub(super) certificate: PathBuf,
    pub(super) key: PathBuf,
    pub(super) ca: Option<PathBuf>,
    pub(super) bundle_map: Option<PathBuf>,
    pub(super) crl: Option<PathBuf>,
    pub(super) refresh: Duration,
    pub(super) client_auth: ClientAuth,
    pub(super) peer: PeerCheck,
    pub(super) alpn: Vec<Vec<u8>>,
}

impl Tls {
    pub(super) fn is_on(&self) -> bool {
        matches!(self, Self::Files(files) if files.mode != Mode::Disabled)
    }
}

impl Said {
    /// What is not said is as in `limits`. `authenticated`: the program has tokens verified before.
    pub(super) fn read(text: &[u8], limits: &Limits, mut authenticated: bool) -> Result<Self, Wrong> {
        let value: Value = serde_json::from_slice(text).map_err(|error| Wrong::new("", error))?;
        let mut root = Fields::of("", value)?;
        let tls = root.object("tls")?.map(tls).transpose()?.unwrap_or(Tls::Unsaid);
        let limits = match root.object("limits")? {
            Some(fields) => self::limits(fields, limits.clone())?,
            None => limits.clone(),
        };
        let filters = root.objects("filters")?.into_iter().enumerate();
        let mut next = |(at, fields)| {
            let filter = filter(at, fields, authenticated)?;
            authenticated |= matches!(filter.config, HttpFilterConfig::Jwt(_));
            Ok::<_, Wrong>(filter)
        };
        let filters = filters.map(&mut next).collect::<Result<_, _>>()?;
        let forwarding = root.object("forward_client_cert")?.map(forwarding).transpose()?;
        root.end()?;
        Ok(Self { tls, limits, filters, forwarding })
    }
}

fn tls(mut fields: Fields) -> Result<Tls, Wrong> {
    let modes = [("strict", Mode::Strict), ("permissive", Mode::Permissive), ("disabled", Mode::Disabled)];
    let mode = fields.choice("mode", &modes)?.unwrap_or_default();
    if mode == Mode::Disabled && fields.rest().is_empty() {
        return Ok(Tls::Off);
    }
    let mut file = |name| Ok::<_, Wrong>(fields.string(name)?.map(PathBuf::from));
    let (ca, bundle_map) = (file("ca_certificate_file")?, file("spiffe_trust_bundle_map_file")?);
    let crl = file("crl_file")?;
    let auth = [("required", ClientAuth::Required), ("optional", ClientAuth::Optional), ("off", ClientAuth::Off)];
    let client_auth = fields.choice("client_auth", &auth)?.unwrap_or_default();
    if client_auth != ClientAuth::Off && ca.is_none() && bundle_map.is_none() {
        return Err(fields.wrong("ca_certificate_file", "is missing: nobody could be verified"));
    }
    let said = TlsFiles {
        mode,
        certificate: fields.needed("certificate_file")?.into(),
        key: fields.needed("private_key_file")?.into(),
        ca,
        bundle_map,
        crl,
        refresh: fields.duration("refresh_interval")?.unwrap_or(REFRESH).max(Duration::from_secs(1)),
        client_auth,
        peer: fields
            .choice("peer", &[("spiffe", PeerCheck::Spiffe), ("chain", PeerCheck::Chain)])?
            .unwrap_or(PeerCheck::Spiffe),
        alpn: fields.strings("alpn")?.into_iter().map(|(_, name)| name.into_bytes()).collect(),
    };
    fields.end()?;
    Ok(Tls::Files(said))
}

fn limits(mut fields: Fields, mut limits: Limits) -> Result<Limits, Wrong> {
    fn set<T>(limit: &mut T, said: Option<T>) {
        if let Some(said) = said {
            *limit = said;
        }
    }
    // Zero is no limit.
    let some = |said: Option<Duration>| said.map(|limit| (!limit.is_zero()).then_some(limit));
    set(&mut limits.max_connections, fields.number("max_connections")?);
    set(&mut limits.max_handshakes, fields.number("max_handshakes")?);
    set(&mut limits.max_handshakes_per_address, fields.number("max_handshakes_per_address")?);
    set(&mut limits.handshake_timeout, fields.duration("handshake_timeout")?);
    set(&mut limits.max_concurrent_streams, fields.number("max_concurrent_streams")?);
    set(&mut limits.max_header_bytes, fields.number("max_header_bytes")?);
    set(&mut limits.max_connection_header_bytes, fields.number("max_connection_header_bytes")?);
    set(&mut limits.max_headers, fields.number("max_headers")?);
    set(&mut limits.header_timeout, fields.duration("header_timeout")?);
    set(&mut limits.stream_idle_timeout, some(fields.duration("stream_idle_timeout")?));
    set(&mut limits.idle_timeout, some(fields.duration("idle_timeout")?));
    set(&mut limits.max_connection_age, some(fields.duration("max_connection_age")?));
    set(&mut limits.tcp_keepalive, some(fields.duration("tcp_keepalive")?));
    set(&mut limits.tcp_user_timeout, some(fields.duration("tcp_user_timeout")?));
    set(&mut limits.drain_timeout, fields.duration("drain_timeout")?);
    set(&mut limits.drain_notice, fields.duration("drain_notice")?);
    set(&mut limits.stream_window, fields.number("stream_window")?);
    set(&mut limits.connection_window, fields.number("connection_window")?);
    if let Some(mut said) = fields.object("keepalive")? {
        let off = said.flag("off")?;
        let mut keepalive = limits.keepalive.unwrap_or_default();
        set(&mut keepalive.interval, said.duration("interval")?);
        set(&mut keepalive.repeat, said.duration("repeat")?);
        set(&mut keepalive.timeout, said.duration("timeout")?);
        set(&mut keepalive.jitter, said.duration("jitter")?);
        keepalive.while_idle |= said.flag("while_idle")?;
        limits.keepalive = Some(keepalive).filter(|_: &Keepalive| !off);
        said.end()?;
    }
    fields.end()?;
    Ok(limits)
}

/// One step, named by its place.
fn filter(at: usize, mut fields: Fields, authenticated: bool) -> Result<HttpFilter, Wrong> {
    let name = format!("filters[{at}]");
    let (authorize, jwt) = (fields.object("authorize")?, fields.object("jwt")?);
    let (rate_limit, others) = (fields.object("rate_limit")?, fields.rest());
    let sound = |wrong: Option<String>| wrong.map_or(Ok(()), |wrong| Err(Wrong::new(&name, wrong)));
    let filter = match (authorize, jwt, rate_limit) {
        (Some(said), None, None) => {
            let rules = authorization(said)?;
            sound(rules.wrong(authenticated))?;
            rules.filter(name)
        }
        (None, Some(said), None) => JwtAuthentication::from(provider(said)?).filter(name).0,
        (None, None, Some(said)) => {
            let limit = rate(said)?;
            sound(limit.wrong())?;
            limit.filter(name)
        }
        _ if others.is_empty() => return Err(Wrong::new(name, "must be one of authorize, jwt, rate_limit")),
        // Told by its name.
        _ => return fields.end().and(Err(Wrong::new(name, "is not known"))),
    };
    fields.end()?;
    Ok(filter)
}

fn authorization(mut fields: Fields) -> Result<Rbac, Wrong> {
    let action = fields.choice("action", &[("allow", true), ("deny", false)])?;
    let mut rbac = match action.ok_or_else(|| fields.wrong("action", "is missing"))? {
        true => Rbac::allow(),
        false => Rbac::deny(),
    };
    if fields.flag("shadow")? {
        rbac = rbac.shadow();
    }
    for (at, mut said) in fields.objects("rules")?.into_iter().enumerate() {
        let name = said.string("name")?.unwrap_or_else(|| format!("rules[{at}]"));
        rbac = rbac.rule(name, rule(said)?);
    }
    fields.end()?;
    Ok(rbac)
}

fn rule(mut fields: Fields) -> Result<Rule, Wrong> {
    type Say = fn(Rule, &str) -> Rule;
    let mut rule = Rule::new();
    let texts: [(&str, Say); 9] = [
        ("spiffe_ids", Rule::spiffe_id),
        ("trust_domains", Rule::trust_domain),
        ("not_spiffe_ids", Rule::not_spiffe_id),
        ("namespaces", Rule::namespace),
        ("not_namespaces", Rule::not_namespace),
        ("paths", Rule::path),
        ("not_paths", Rule::not_path),
        ("methods", Rule::method),
        ("hosts", Rule::host),
    ];
    for (name, say) in texts {
        for (_, text) in fields.strings(name)? {
            rule = say(rule, &text);
        }
    }
    for (path, text) in fields.strings("path_templates")? {
        rule = rule.path_template(PathTemplate::new(&text).map_err(|error| Wrong::new(path, error))?);
    }
    if fields.flag("authenticated")? {
        rule = rule.authenticated();
    }
    for (path, text) in fields.strings("addresses")? {
        rule = rule.from_addresses(range(path, &text)?);
    }
    for (path, text) in fields.strings("not_addresses")? {
        rule = rule.not_from_addresses(range(path, &text)?);
    }
    for mut token in fields.objects("tokens")? {
        let any = || "*".to_owned();
        let (issuer, subject) = (token.string("issuer")?, token.string("subject")?);
        rule = rule.token(&issuer.unwrap_or_else(any), &subject.unwrap_or_else(any));
        token.end()?;
    }
    for (name, say) in [("claims", Rule::claim as fn(Rule, &str, &str) -> Rule), ("headers", Rule::header)] {
        let Some(mut said) = fields.object(name)? else { continue };
        for key in said.rest() {
            for (_, value) in said.strings(&key)? {
                rule = say(rule, &key, &value);
            }
        }
    }
    let ports = fields.each("ports", |path, value| {
        let port = value.as_u64().and_then(|port| u16::try_from(port).ok());
        port.ok_or_else(|| Wrong::new(path, "must be a port"))
    })?;
    rule = ports.into_iter().fold(rule, Rule::port);
    fields.end()?;
    Ok(rule)
}

/// An address, or a block such as `10.0.0.0/8`.
fn range(path: String, text: &str) -> Result<CidrRange, Wrong> {
    let (address, bits) = text.split_once('/').map_or((text, None), |(address, bits)| (address, Some(bits)));
    let range = address.parse::<IpAddr>().ok().and_then(|address| {
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Some(all), |bits| bits.parse().ok())?;
        CidrRange::new(address, bits).ok()
    });
    range.ok_or_else(|| Wrong::new(path, format!("\"{text}\" is no block of addresses")))
}

fn provider(mut fields: Fields) -> Result<JwtProvider, Wrong> {
    let issuer = fields.needed("issuer")?;
    let mut provider = match (fields.value("jwks"), fields.string("jwks_file")?) {
        (Some(jwks), None) => {
            let text = jwks.to_string();
            KeySet::parse(text.as_bytes()).map_err(|error| fields.wrong("jwks", error))?;
            JwtProvider::inline(issuer, text)
        }
        (None, Some(file)) => JwtProvider::file(issuer, file),
        _ => return Err(fields.wrong("jwks_file", "one of jwks and jwks_file is needed")),
    };
    for (_, audience) in fields.strings("audiences")? {
        provider = provider.audience(audience);
    }
    if fields.flag("optional")? {
        provider = provider.optional();
    }
    fields.end()?;
    Ok(provider)
}

fn rate(mut fields: Fields) -> Result<RateLimit, Wrong> {
    type Kind = fn(u32, Duration) -> RateLimit;
    let requests = fields.number("requests")?.filter(|requests| *requests > 0);
    let requests = requests.ok_or_else(|| fields.wrong("requests", "must be given, and more than zero"))?;
    let period = fields.duration("period")?.unwrap_or(Duration::from_secs(1));
    let kinds: [(&str, Kind); 3] =
        [("all", RateLimit::total), ("identity", RateLimit::per_identity), ("address", RateLimit::per_address)];
    let mut limit = fields.choice("per", &kinds)?.unwrap_or(RateLimit::total)(requests, period);
    if let Some(burst) = fields.number("burst")? {
        limit = limit.burst(burst);
    }
    fields.end()?;
    Ok(limit)
}

fn forwarding(mut fields: Fields) -> Result<(ForwardClientCert, ClientCertDetails), Wrong> {
    let modes = [
        ("sanitize", ForwardClientCert::Sanitize),
        ("forward_only", ForwardClientCert::ForwardOnly),
        ("append_forward", ForwardClientCert::AppendForward),
        ("sanitize_set", ForwardClientCert::SanitizeSet),
        ("always_forward_only", ForwardClientCert::AlwaysForwardOnly),
    ];
    let mode = fields.choice("mode", &modes)?.unwrap_or_default();
    let mut details = ClientCertDetails::default();
    for (path, name) in fields.strings("details")? {
        match name.as_str() {
            "subject" => details.subject = true,
            "cert" => details.cert = true,
            "chain" => details.chain = true,
            "dns" => details.dns = true,
            "uri" => details.uri = true,
            _ => return Err(Wrong::new(path, "must be one of subject, cert, chain, dns, uri")),
        }
    }
    fields.end()?;
    Ok((mode, details))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_is_told_with_its_place() {
        for (text, place, what) in [
            ("{", "", "EOF"),
            ("[]", "", "must be an object"),
            (r#"{"tsl": {}}"#, "tsl", "not known"),
            (r#"{"tls": {"certificate_file": "a"}}"#, "tls.ca_certificate_file", "missing"),
            (r#"{"tls": {"client_auth": "off", "certificate_file": "a"}}"#, "tls.private_key_file", "missing"),
            (r#"{"tls": {"client_auth": "of"}}"#, "tls.client_auth", "required, optional, off"),
            (r#"{"limits": {"max_streams": 1}}"#, "limits.max_streams", "not known"),
            (r#"{"limits": {"max_headers": -1}}"#, "limits.max_headers", "whole number"),
            (r#"{"limits": {"idle_timeout": "10"}}"#, "limits.idle_timeout", "such as \"10s\""),
            (r#"{"limits": {"keepalive": {"x": 1}}}"#, "limits.keepalive.x", "not known"),
            (r#"{"filters": [{}]}"#, "filters[0]", "one of authorize, jwt, rate_limit"),
            (r#"{"filters": [{"cors": {}}]}"#, "filters[0].cors", "not known"),
            (r#"{"filters": [{"authorize": {}}]}"#, "filters[0].authorize.action", "missing"),
            (
                r#"{"filters": [{"authorize": {"action": "deny", "rules": [{}, {"path": ["/"]}]}}]}"#,
                "filters[0].authorize.rules[1].path",
                "not known",
            ),
            (
                r#"{"filters": [{"authorize": {"action": "deny", "rules": [{"addresses": ["10.0.0.0/33"]}]}}]}"#,
                "filters[0].authorize.rules[0].addresses[0]",
                "no block",
            ),
            (
                r#"{"filters": [{"authorize": {"action": "deny", "rules": [{"claims": {"role": ["guest"]}}]}}]}"#,
                "filters[0]",
                "no `jwt` is given before",
            ),
            (r#"{"filters": [{"jwt": {"issuer": "i"}}]}"#, "filters[0].jwt.jwks_file", "needed"),
            (r#"{"filters": [{"rate_limit": {"requests": 0}}]}"#, "filters[0].rate_limit.requests", "more than zero"),
            (r#"{"forward_client_cert": {"details": ["all"]}}"#, "forward_client_cert.details[0]", "one of"),
        ] {
            let said = Said::read(text.as_bytes(), &Limits::default(), false).expect_err(text).to_string();
            assert!(said.starts_with(place) && said.contains(what), "{text}: {said}");
        }
    }
}
