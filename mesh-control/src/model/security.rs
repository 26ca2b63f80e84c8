//! Who may call whom: transport security, authorization, and tokens of the callers' users.

use super::Object;
use crate::problem::{At, Located};
use std::{collections::BTreeMap, fmt, net::IpAddr};

/// Which workloads of its namespace (of every namespace, when it is the root namespace) an object is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selector {
    /// All must be equal; empty selects every workload.
    pub labels: BTreeMap<String, String>,
}

/// `PeerAuthentication`: which connections a workload takes.
#[derive(Clone, Debug)]
pub struct PeerAuthentication {
    /// The document.
    pub object: Object,
    /// Whose connections.
    pub selector: Selector,
    /// `None`: as the next wider scope says.
    pub mode: Option<MtlsMode>,
    /// By port of the workload; `None`: as the workload.
    pub ports: BTreeMap<u16, Option<MtlsMode>>,
}

/// Which connections are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum MtlsMode {
    /// Plaintext only.
    Disable,
    /// Mutual TLS and plaintext.
    Permissive,
    /// Mutual TLS only.
    Strict,
}

/// `AuthorizationPolicy`: which requests a workload takes.
#[derive(Clone, Debug)]
pub struct Authorization {
    /// The document.
    pub object: Object,
    /// Whose requests.
    pub selector: Selector,
    /// What happens to requests that a rule matches.
    pub action: AuthzAction,
    /// Any of them; none matches nothing.
    pub rules: Vec<Rule>,
    /// Only told, not enforced: the annotation `istio.io/dry-run`.
    pub dry_run: bool,
    /// What of it cannot be honoured, and where. The workloads that it selects then deny every request.
    pub refused: Option<Located<String>>,
}

/// What happens to requests that a policy matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AuthzAction {
    /// They are taken; once there is such a policy, all others are not.
    #[default]
    Allow,
    /// They are not taken, whatever else allows them.
    Deny,
    /// They are logged.
    Audit,
}

/// Matches when `from`, `to` and `when` all do.
#[derive(Clone, Debug, Default)]
pub struct Rule {
    /// Any of these callers, of which all clauses hold; none: every caller.
    pub from: Vec<Vec<Clause>>,
    /// Any of these operations, of which all clauses hold; none: every operation.
    pub to: Vec<Vec<Clause>>,
    /// All of these.
    pub when: Vec<Clause>,
}

/// A condition on one attribute of a request. At least one of the lists is not empty.
#[derive(Clone, Debug)]
pub struct Clause {
    /// Of what.
    pub attribute: Attribute,
    /// Any of these, when there are any.
    pub values: Vec<String>,
    /// None of these.
    pub not_values: Vec<String>,
    /// Where it was read.
    pub at: At,
}

/// What a condition is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// The caller's SPIFFE id without its scheme.
    SourcePrincipal,
    /// The namespace in it.
    SourceNamespace,
    /// The service account in it, `NAME` of the policy's own namespace or `NAMESPACE/NAME`.
    SourceServiceAccount,
    /// Where the connection comes from.
    SourceIp,
    /// Where the request comes from, by `x-forwarded-for`.
    RemoteIp,
    /// `ISSUER/SUBJECT` of the token.
    RequestPrincipal,
    /// Audiences of the token.
    RequestAudiences,
    /// `azp` of the token.
    RequestPresenter,
    /// A claim of the token, by its path.
    RequestClaim(Vec<String>),
    /// A header.
    RequestHeader(String),
    /// `:authority`.
    Host,
    /// `:method`.
    Method,
    /// The path without its query.
    Path,
    /// Where the connection goes to.
    DestinationIp,
    /// The workload's port.
    DestinationPort,
    /// The server name of the TLS handshake.
    ConnectionSni,
}

/// `RequestAuthentication`: which tokens a workload knows. A request with a bad one is refused, one without is not.
#[derive(Clone, Debug)]
pub struct RequestAuthentication {
    /// The document.
    pub object: Object,
    /// Whose requests.
    pub selector: Selector,
    /// The issuers.
    pub rules: Vec<JwtRule>,
}

/// An issuer of tokens.
#[derive(Clone, Debug)]
pub struct JwtRule {
    /// `iss`.
    pub issuer: Located<String>,
    /// Any of these; none: any.
    pub audiences: Vec<String>,
    /// Its keys.
    pub keys: JwtKeys,
    /// Where tokens are found: headers and what stands before the token in them.
    pub from_headers: Vec<(String, String)>,
    /// Where tokens are found: query parameters.
    pub from_params: Vec<String>,
    /// Where tokens are found: cookies.
    pub from_cookies: Vec<String>,
    /// A header for the payload, in base64.
    pub payload_to_header: Option<String>,
    /// Headers for claims, as header and claim.
    pub claims_to_headers: Vec<(String, String)>,
    /// The token stays in the request.
    pub forward: bool,
}

/// The keys of an issuer.
#[derive(Clone, Debug)]
pub enum JwtKeys {
    /// A JSON Web Key Set.
    Inline(String),
    /// Where one is fetched.
    Uri(Located<JwksUri>),
}

/// `http://HOST:PORT/...` or `https://...`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JwksUri {
    /// As it was written.
    pub uri: String,
    /// Lower-case.
    pub host: String,
    /// Of the scheme, when it is not said.
    pub port: u16,
}

/// An address range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IpBlock {
    /// Any address in it.
    pub address: IpAddr,
    /// Leading bits that must be equal.
    pub prefix: u8,
}

/// Policies of all the kinds.
#[derive(Clone, Debug, Default)]
pub struct Security {
    /// `PeerAuthentication`.
    pub peers: Vec<PeerAuthentication>,
    /// `AuthorizationPolicy`.
    pub authorizations: Vec<Authorization>,
    /// `RequestAuthentication`.
    pub requests: Vec<RequestAuthentication>,
}

/// What says which workloads it is about.
pub(crate) trait Scoped {
    fn object(&self) -> &Object;
    fn selector(&self) -> &Selector;

    /// Whether it is about this workload.
    fn selects(&self, namespace: &str, labels: &BTreeMap<String, String>, root_namespace: &str) -> bool {
        let own = &self.object().namespace;
        (own == namespace || own == root_namespace) && self.selector().matches(labels)
    }
}

macro_rules! scoped {
    ($($kind:ty),*) => {$(
        impl Scoped for $kind {
            fn object(&self) -> &Object {
                &self.object
            }
            fn selector(&self) -> &Selector {
                &self.selector
            }
        }
    )*};
}
scoped!(PeerAuthentication, Authorization, RequestAuthentication);

impl Selector {
    /// Whether these are labels of a workload that is selected.
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.labels.iter().all(|(key, value)| labels.get(key) == Some(value))
    }

    /// Whether every workload is selected.
    pub fn is_all(&self) -> bool {
        self.labels.is_empty()
    }
}

impl Security {
    /// Which connections a workload takes on this port: Istio's order, where the narrower scope wins and what says nothing is as
    /// if it were not there. `None`: nothing is said.
    pub fn mtls_mode(
        &self,
        namespace: &str,
        labels: &BTreeMap<String, String>,
        port: u16,
        root: &str,
    ) -> Option<MtlsMode> {
        let of = |wanted: &dyn Fn(&&PeerAuthentication) -> bool| self.peers.iter().find(wanted);
        let everywhere = of(&|p| p.object.namespace == root && p.selector.is_all());
        let here = of(&|p| p.object.namespace == namespace && namespace != root && p.selector.is_all());
        // A selector in the root namespace selects nothing: Istio.
        let own = of(&|p| {
            p.object.namespace == namespace && namespace != root && !p.selector.is_all() && p.selector.matches(labels)
        });
        let said = |policy: Option<&PeerAuthentication>| policy.and_then(|p| p.mode);
        let port = own.and_then(|p| p.ports.get(&port).copied().flatten());
        port.or(said(own)).or(said(here)).or(said(everywhere))
    }
}

impl IpBlock {
    /// `10.0.0.1`, `10.0.0.0/8`, `::1`, `fd00::/8`.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address.parse::<IpAddr>().ok()?, Some(prefix.parse::<u8>().ok()?)),
            None => (text.parse::<IpAddr>().ok()?, None),
        };
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(longest);
        (prefix <= longest).then_some(Self { address, prefix })
    }
}

impl fmt::Display for MtlsMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disable => "DISABLE",
            Self::Permissive => "PERMISSIVE",
            Self::Strict => "STRICT",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ip_blocks_are_addresses_or_ranges() {
        let block = |address: &str, prefix| Some(IpBlock { address: address.parse().unwrap(), prefix });
        assert_eq!(IpBlock::parse("10.0.0.1"), block("10.0.0.1", 32));
        assert_eq!(IpBlock::parse("10.0.0.0/8"), block("10.0.0.0", 8));
        assert_eq!(IpBlock::parse("fd00::/8"), block("fd00::", 8));
        for bad in ["", "10.0.0.0/33", "10.0.0/8", "::/129", "10.0.0.1/", "host"] {
            assert_eq!(IpBlock::parse(bad), None, "{bad}");
        }
    }
}
