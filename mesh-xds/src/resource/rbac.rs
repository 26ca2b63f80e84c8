//! RBAC: who may do what on a server (`envoy.extensions.filters.http.rbac.v3.RBAC`, gRFC A41, audit logging of gRFC A59).

use super::{CidrRange, FilterPayload, HeaderMatcher, PathTemplate, StringMatcher};
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

/// `envoy.type.matcher.v3.MetadataMatcher` over the dynamic metadata of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct MetadataMatcher {
    /// Whose metadata: a namespace such as `envoy.filters.http.jwt_authn`.
    pub filter: Arc<str>,
    /// Keys, from the outside in.
    pub path: Vec<String>,
    /// What is asked of the value there.
    pub value: ValueMatcher,
    /// The result is inverted, that of absent metadata too.
    pub invert: bool,
}

/// `envoy.type.matcher.v3.ValueMatcher`
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum ValueMatcher {
    /// Null.
    Null,
    /// A number in the half-open range.
    DoubleRange(f64, f64),
    /// This number.
    Double(f64),
    /// A string.
    String(StringMatcher),
    /// This truth value.
    Bool(bool),
    /// There is a value; `false` never matches, as in Envoy.
    Present(bool),
    /// A list with an element that matches.
    List(Box<Self>),
    /// One of these.
    OneOf(Vec<Self>),
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

impl MetadataMatcher {
    /// Whether the metadata of a request match. `of` gives the value of a namespace.
    pub fn matches<'v>(&self, of: impl FnOnce(&str) -> Option<&'v serde_json::Value>) -> bool {
        let found = self.path.iter().try_fold(of(&self.filter), |value, key| Some(value?.get(key.as_str())));
        self.value.matches(found.flatten()) != self.invert
    }
}

impl ValueMatcher {
    /// Whether a value, or none, matches.
    pub fn matches(&self, value: Option<&serde_json::Value>) -> bool {
        use serde_json::Value;
        match (self, value) {
            (Self::OneOf(any), value) => any.iter().any(|one| one.matches(value)),
            (_, None) => false,
            (Self::Null, Some(value)) => value.is_null(),
            (Self::DoubleRange(start, end), Some(value)) => {
                value.as_f64().is_some_and(|number| (*start..*end).contains(&number))
            }
            #[allow(clippy::float_cmp, reason = "Envoy compares exactly")]
            (Self::Double(wanted), Some(value)) => value.as_f64() == Some(*wanted),
            (Self::String(matcher), Some(value)) => value.as_str().is_some_and(|text| matcher.matches(text)),
            (Self::Bool(wanted), Some(value)) => value.as_bool() == Some(*wanted),
            (Self::Present(wanted), Some(_)) => *wanted,
            (Self::List(element), Some(Value::Array(list))) => list.iter().any(|value| element.matches(Some(value))),
            (Self::List(_), Some(_)) => false,
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn metadata_match_as_in_envoy() {
        let claims = json!({"payload": {"iss": "a", "groups": ["x", "y"], "n": 3, "ok": true, "none": null}});
        let matches = |path: &[&str], value: ValueMatcher| {
            let path = path.iter().map(|key| (*key).to_owned()).collect();
            let matcher = MetadataMatcher { filter: "jwt".into(), path, value, invert: false };
            let of = |name: &str| (name == "jwt").then_some(&claims);
            let inverted = MetadataMatcher { invert: true, ..matcher.clone() };
            assert_ne!(matcher.matches(of), inverted.matches(of));
            matcher.matches(of)
        };
        let text = |text: &str| ValueMatcher::String(StringMatcher::exact(text));
        assert!(matches(&["payload", "iss"], text("a")) && !matches(&["payload", "iss"], text("b")));
        assert!(matches(&["payload", "groups"], ValueMatcher::List(Box::new(text("y")))));
        assert!(!matches(&["payload", "iss"], ValueMatcher::List(Box::new(text("a")))), "a string is no list");
        assert!(matches(&["payload", "n"], ValueMatcher::Double(3.0)));
        assert!(matches(&["payload", "n"], ValueMatcher::DoubleRange(3.0, 4.0)));
        assert!(!matches(&["payload", "n"], ValueMatcher::DoubleRange(1.0, 3.0)));
        assert!(matches(&["payload", "ok"], ValueMatcher::Bool(true)));
        assert!(matches(&["payload", "none"], ValueMatcher::Null));
        assert!(matches(&["payload", "n"], ValueMatcher::Present(true)));
        for absent in [ValueMatcher::Null, ValueMatcher::Present(true), ValueMatcher::Present(false), text("")] {
            assert!(!matches(&["payload", "absent"], absent));
        }
        assert!(matches(&["payload", "iss"], ValueMatcher::OneOf(vec![text("b"), text("a")])));
    }
}
