//! RBAC: who may do what on a server (`envoy.extensions.filters.http.rbac.v3.RBAC`, gRFC A41, audit logging of gRFC A59).

use super::{CidrRange, FilterPayload, HeaderMatcher, MetadataMatcher, PathTemplate, StringMatcher};
use std::{any::Any, fmt, sync::Arc};

/// A filter that lets requests in or refuses them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RbacConfig {
    /// What is enforced; `None` lets everything in.
    pub rules: Option<RbacRules>,
    /// What is evaluated, logged and counted, and never enforced.
    pub shadow_rules: Option<RbacRules>,
    /// In front of the names of what is counted.
    pub rules_stat_prefix: Arc<str>,
    /// The same of the shadow rules.
    pub shadow_rules_stat_prefix: Arc<str>,
}

/// Policies with one action.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RbacRules {
    /// What a policy that matches means.
    pub action: RbacAction,
    /// Ordered by name; the first that matches counts.
    pub policies: Vec<RbacPolicy>,
    /// Who is told of decisions.
    pub audit: Option<AuditLogging>,
}

/// `RBAC.Action`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum RbacAction {
    /// What matches is let in, all else is refused.
    #[default]
    Allow,
    /// What matches is refused, all else is let in.
    Deny,
    /// What matches is logged; all is let in.
    Log,
}

/// `Policy`: applies where a permission and a principal match.
#[derive(Clone, Debug, PartialEq)]
pub struct RbacPolicy {
    /// Its key in the map of policies.
    pub name: Arc<str>,
    /// What is done: one of these. Never empty.
    pub permissions: Vec<Permission>,
    /// Who does it: one of these. Never empty.
    pub principals: Vec<Principal>,
}

/// What is done.
#[derive(Clone, Debug, PartialEq)]
pub enum Permission {
    /// Anything.
    Any,
    /// All of these.
    All(Vec<Self>),
    /// One of these.
    OneOf(Vec<Self>),
    /// All but this.
    Not(Box<Self>),
    /// A header of the request; `:method`, `:path` and `:authority` (which is `host`) are known too.
    Header(HeaderMatcher),
    /// The same, or one of several values of the header: of rules from code.
    AnyHeader(HeaderMatcher),
    /// The path without its query.
    UrlPath(StringMatcher),
    /// The path without its query.
    UriTemplate(Arc<PathTemplate>),
    /// The address that was connected to.
    DestinationIp(CidrRange),
    /// The port that was connected to.
    DestinationPort(u16),
    /// The same, from the first to before the second.
    DestinationPortRange(u32, u32),
    /// The name that the TLS handshake asked for (SNI); empty where it asked for none.
    RequestedServerName(StringMatcher),
    /// What a filter before this one learnt.
    Metadata(MetadataMatcher),
}

/// Who does it.
#[derive(Clone, Debug, PartialEq)]
pub enum Principal {
    /// Anybody.
    Any,
    /// All of these.
    All(Vec<Self>),
    /// One of these.
    OneOf(Vec<Self>),
    /// All but this.
    Not(Box<Self>),
    /// A URI SAN of the peer's certificate, or a DNS SAN, or the subject; empty where TLS was without a certificate (gRFC A41). `None`:
    /// any connection with TLS.
    Authenticated(Option<StringMatcher>),
    /// A peer with a certificate, which has this subject alternative name (`mtls_authenticated`); `None`: any.
    Certificate(Option<PeerName>),
    /// The SPIFFE id of the peer: the filter state `io.istio.peer_principal`, as Istio's sidecars have it.
    PeerPrincipal(StringMatcher),
    /// The address at the other end of the connection: `direct_remote_ip`, `remote_ip` and `source_ip` are the same (gRFC A41).
    RemoteIp(CidrRange),
    /// A header of the request, as of [`Permission::Header`].
    Header(HeaderMatcher),
    /// The path without its query.
    UrlPath(StringMatcher),
    /// What a filter before this one learnt: the claims of a JWT.
    Metadata(MetadataMatcher),
}

/// A subject alternative name of one kind.
#[derive(Clone, Debug, PartialEq)]
pub enum PeerName {
    /// URI.
    Uri(StringMatcher),
    /// DNS name.
    Dns(StringMatcher),
    /// IP address, as text.
    Ip(StringMatcher),
}

/// `RBAC.AuditLoggingOptions`, of which something is told to somebody.
#[derive(Clone, Debug, PartialEq)]
pub struct AuditLogging {
    /// Refused requests are told.
    pub on_deny: bool,
    /// Admitted requests are told.
    pub on_allow: bool,
    /// To these.
    pub loggers: Vec<AuditLoggerConfig>,
}

/// An audit logger.
#[derive(Clone)]
#[non_exhaustive]
pub enum AuditLoggerConfig {
    /// `StdoutAuditLog`: one JSON object a line, to the standard output.
    Stdout,
    /// One that the application registered.
    Custom {
        /// Name of the configuration's type.
        type_name: Arc<str>,
        /// The configuration as it came.
        payload: FilterPayload,
        /// What [`AuditLoggerParser::parse`] made of it.
        made: Arc<dyn Any + Send + Sync>,
    },
}

/// Reads the configurations of one type of audit logger.
pub trait AuditLoggerParser: Send + Sync {
    /// Validates a configuration.
    ///
    /// # Errors
    /// Why it is refused: the resource is rejected, with the path of the field.
    fn parse(&self, payload: &FilterPayload) -> Result<Arc<dyn Any + Send + Sync>, String>;
}

impl RbacConfig {
    /// Nothing is decided, logged or counted.
    pub fn is_inert(&self) -> bool {
        self.rules.is_none() && self.shadow_rules.is_none()
    }
}

impl AuditLoggerConfig {
    /// One that was made in code.
    pub fn custom(name: impl Into<Arc<str>>, made: Arc<dyn Any + Send + Sync>) -> Self {
        Self::Custom { type_name: name.into(), payload: FilterPayload::Message(Vec::new()), made }
    }
}

impl PartialEq for AuditLoggerConfig {
    /// By what came, not by what was made of it.
    fn eq(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Stdout, Self::Stdout) => true,
            (Self::Custom { type_name, payload, .. }, Self::Custom { type_name: name, payload: other, .. }) => {
                type_name == name && payload == other
            }
            _ => false,
        }
    }
}

impl fmt::Debug for AuditLoggerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdout => f.write_str("Stdout"),
            Self::Custom { type_name, payload, .. } => {
                f.debug_struct("Custom").field("type_name", type_name).field("payload", payload).finish_non_exhaustive()
            }
        }
    }
}
