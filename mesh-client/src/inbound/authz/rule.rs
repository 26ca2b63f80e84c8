//! Permissions and principals as one tree, and what it looks at.

use crate::outbound::route::{HeaderMatchers, Profile, RequestHead};
use mesh_xds::resource::{
    CidrRange, HeaderMatcher, MetadataMatcher, PathTemplate, PeerName, Permission, Principal, StringMatcher,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// A request and who sent it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'r> {
    pub(crate) head: RequestHead<'r>,
    pub(crate) caller: Caller<'r>,
    /// What the JWT filter learnt: the value of its namespace.
    pub(crate) claims: Option<&'r serde_json::Value>,
}

/// A connection, as far as rules know it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caller<'r> {
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    pub(crate) tls: bool,
    /// Empty where none was asked for.
    pub(crate) server_name: &'r str,
    pub(crate) certificate: Option<Certificate<'r>>,
}

/// A verified client certificate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Certificate<'r> {
    pub(crate) uris: &'r [String],
    pub(crate) dns: &'r [String],
    pub(crate) ips: &'r [IpAddr],
    pub(crate) subject: &'r str,
    pub(crate) spiffe: Option<&'r str>,
}

/// One thing that is asked.
#[derive(Clone, Debug)]
pub(super) enum Rule {
    Any,
    All(Box<[Self]>),
    OneOf(Box<[Self]>),
    Not(Box<Self>),
    Header(HeaderMatchers),
    /// Joined, or one of its values.
    AnyHeader(HeaderMatchers),
    Path(StringMatcher),
    Template(Arc<PathTemplate>),
    LocalIp(CidrRange),
    /// From the first to before the second.
    LocalPort(u32, u32),
    ServerName(StringMatcher),
    Metadata(MetadataMatcher),
    Authenticated(Option<StringMatcher>),
    Certificate(Option<PeerName>),
    PeerPrincipal(StringMatcher),
    RemoteIp(CidrRange),
}

/// Whose metadata there are.
pub(crate) const JWT_NAMESPACE: &str = "envoy.filters.http.jwt_authn";

impl<'r> Caller<'r> {
    /// In one word, for logs: the first URI SAN, or DNS SAN, or the subject; empty without a certificate.
    pub(crate) fn principal(&self) -> &'r str {
        let Some(certificate) = self.certificate else { return "" };
        let first = certificate.uris.first().or(certificate.dns.first());
        first.map_or(certificate.subject, String::as_str)
    }
}

impl Rule {
    pub(super) fn permissions(any: &[Permission]) -> Self {
        Self::one_of(any.iter().map(Self::permission).collect())
    }

    pub(super) fn principals(any: &[Principal]) -> Self {
        Self::one_of(any.iter().map(Self::principal).collect())
    }

    fn permission(permission: &Permission) -> Self {
        match permission {
            Permission::Any => Self::Any,
            Permission::All(all) => Self::all(all.iter().map(Self::permission).collect()),
            Permission::OneOf(any) => Self::permissions(any),
            Permission::Not(not) => Self::Not(Box::new(Self::permission(not))),
            Permission::Header(header) => Self::header(header),
            Permission::AnyHeader(header) => match Self::header(header) {
                Self::Header(header) => Self::AnyHeader(header),
                other => other,
            },
            Permission::UrlPath(path) => Self::Path(path.clone()),
            Permission::UriTemplate(template) => Self::Template(template.clone()),
            Permission::DestinationIp(range) => Self::LocalIp(*range),
            Permission::DestinationPort(port) => Self::LocalPort((*port).into(), u32::from(*port) + 1),
            Permission::DestinationPortRange(start, end) => Self::LocalPort(*start, *end),
            Permission::RequestedServerName(name) => Self::ServerName(name.clone()),
            Permission::Metadata(metadata) => Self::Metadata(metadata.clone()),
        }
    }

    fn principal(principal: &Principal) -> Self {
        match principal {
            Principal::Any => Self::Any,
            Principal::All(all) => Self::all(all.iter().map(Self::principal).collect()),
            Principal::OneOf(any) => Self::principals(any),
            Principal::Not(not) => Self::Not(Box::new(Self::principal(not))),
            Principal::Authenticated(name) => Self::Authenticated(name.clone()),
            Principal::Certificate(name) => Self::Certificate(name.clone()),
            Principal::PeerPrincipal(name) => Self::PeerPrincipal(name.clone()),
            Principal::RemoteIp(range) => Self::RemoteIp(*range),
            Principal::Header(header) => Self::header(header),
            Principal::UrlPath(path) => Self::Path(path.clone()),
            Principal::Metadata(metadata) => Self::Metadata(metadata.clone()),
        }
    }

    /// Every header is seen, but for `te`, which is the transport's (gRFC A41).
    fn header(header: &HeaderMatcher) -> Self {
        let profile = if header.name == "te" { Profile::Grpc } else { Profile::Envoy };
        Self::Header(HeaderMatchers::compile(std::slice::from_ref(header), profile))
    }

    fn all(mut rules: Vec<Self>) -> Self {
        rules.retain(|rule| !matches!(rule, Self::Any));
        match rules.len() {
            0 => Self::Any,
            1 => rules.remove(0),
            _ => Self::All(rules.into()),
        }
    }

    fn one_of(mut rules: Vec<Self>) -> Self {
        match rules.len() {
            _ if rules.iter().any(|rule| matches!(rule, Self::Any)) => Self::Any,
            1 => rules.remove(0),
            _ => Self::OneOf(rules.into()),
        }
    }

    pub(super) fn matches(&self, asked: &Asked<'_>) -> bool {
        let Asked { head, caller, claims } = asked;
        match self {
            Self::Any => true,
            Self::All(all) => all.iter().all(|rule| rule.matches(asked)),
            Self::OneOf(any) => any.iter().any(|rule| rule.matches(asked)),
            Self::Not(rule) => !rule.matches(asked),
            Self::Header(header) => header.matches(head),
            Self::AnyHeader(header) => header.matches_any(head),
            Self::Path(path) => path.matches(head.path()),
            Self::Template(template) => template.matches_any_bytes(head.path()),
            Self::LocalIp(range) => range.contains(caller.local.ip()),
            Self::LocalPort(start, end) => (*start..*end).contains(&u32::from(caller.local.port())),
            Self::ServerName(name) => name.matches(caller.server_name),
            Self::Metadata(matcher) => matcher.matches(|namespace| claims.filter(|_| namespace == JWT_NAMESPACE)),
            Self::Authenticated(None) => caller.tls,
            Self::Authenticated(Some(name)) => match caller.certificate {
                // gRFC A41: the empty name.
                None => caller.tls && name.matches(""),
                Some(certificate) => {
                    certificate.uris.iter().chain(certificate.dns).any(|san| name.matches(san))
                        || name.matches(certificate.subject)
                }
            },
            Self::Certificate(None) => caller.certificate.is_some(),
            Self::Certificate(Some(name)) => caller.certificate.is_some_and(|certificate| certificate.has(name)),
            Self::PeerPrincipal(name) => {
                caller.certificate.and_then(|certificate| certificate.spiffe).is_some_and(|id| name.matches(id))
            }
            Self::RemoteIp(range) => range.contains(caller.remote.ip()),
        }
    }
}

impl Certificate<'_> {
    fn has(&self, name: &PeerName) -> bool {
        match name {
            PeerName::Uri(matcher) => self.uris.iter().any(|uri| matcher.matches(uri)),
            PeerName::Dns(matcher) => self.dns.iter().any(|dns| matcher.matches(dns)),
            PeerName::Ip(matcher) => self.ips.iter().any(|ip| matcher.matches(&ip.to_string())),
        }
    }
}
