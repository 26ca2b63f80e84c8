//! TLS of clusters and of server listeners: `UpstreamTlsContext` and `DownstreamTlsContext`.

use super::{MetadataValue, StringMatcher, TlsCertificate, TrustedCa};
use crate::bootstrap::ServerConfig;
use std::{collections::BTreeMap, fmt, sync::Arc};

/// The metadata of endpoints that `transport_socket_matches` looks at.
const SOCKET_MATCH: &str = "envoy.transport_socket_match";

/// Transport to the endpoints.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum TransportSocket {
    /// Nothing is said: the fallback credentials of the client (gRFC A29), which are plaintext unless it was told otherwise.
    #[default]
    Fallback,
    /// TCP.
    Plaintext,
    /// `UpstreamTlsContext` (gRFC A29).
    Tls(Arc<UpstreamTls>),
}

/// One of a cluster's `transport_socket_matches`: how endpoints with such metadata are connected to. Istio's auto-mTLS is made of it.
#[derive(Clone, Debug, PartialEq)]
pub struct TransportSocketMatch {
    /// For people.
    pub name: String,
    /// What the endpoint's metadata has to say under `envoy.transport_socket_match`; empty matches every endpoint.
    pub wanted: BTreeMap<String, MetadataValue>,
    /// Plaintext or TLS.
    pub socket: TransportSocket,
}

/// `UpstreamTlsContext`, client side.
#[derive(Clone, Debug, PartialEq)]
pub struct UpstreamTls {
    /// Who signs the servers' certificates; `None` means `system_root_certs` (gRFC A82).
    pub ca: Option<Credential<TrustedCa>>,
    /// Our own certificate; `None` sends none.
    pub identity: Option<Credential<TlsCertificate>>,
    /// Any matcher against any SAN; empty accepts any.
    pub san_matchers: Vec<SanMatch>,
    /// `sni`.
    pub sni: Option<String>,
    /// `auto_host_sni`: the SNI is the endpoint's hostname, where it has one (gRFC A101).
    pub auto_host_sni: bool,
    /// `auto_sni_san_validation`: the certificate needs a DNS SAN equal to the SNI that was sent, instead of `san_matchers` (gRFC
    /// A101). Without an SNI those count.
    pub auto_sni_san_validation: bool,
    /// `auto_san_validation` of the cluster's HTTP options: the certificate must be valid for the name of the server as well, the endpoint's
    /// hostname where `auto_host_sni` says so, else `sni`; without a name no server is.
    pub verify_server_name: bool,
    /// `alpn_protocols`; empty: `h2` or `http/1.1` by the cluster's protocol.
    pub alpn: Vec<String>,
}

/// `DownstreamTlsContext`, server side.
#[derive(Clone, Debug, PartialEq)]
pub struct DownstreamTls {
    /// Our certificate.
    pub identity: Credential<TlsCertificate>,
    /// Who signs the clients' certificates; `None`: clients are not asked for one.
    pub ca: Option<Credential<TrustedCa>>,
    /// Any matcher against any SAN of the client's certificate; empty accepts any.
    pub san_matchers: Vec<SanMatch>,
    /// `require_client_certificate`: only with `ca`. Without it clients may present one, which is verified then.
    pub require_client_certificate: bool,
    /// `alpn_protocols`; empty: `h2` and `http/1.1`.
    pub alpn: Vec<String>,
}

/// Where a certificate or trusted roots are found. `T` is what they are where the resource itself holds them.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum Credential<T> {
    /// A certificate provider instance of the bootstrap.
    Provider(CertificateProviderRef),
    /// A `Secret` resource.
    Sds(SdsRef),
    /// Files or text that the resource names.
    Inline(Arc<T>),
}

/// `SdsSecretConfig`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SdsRef {
    /// Name of the `Secret`.
    pub name: Arc<str>,
    /// Who has it.
    pub origin: SdsOrigin,
}

/// Who has a `Secret`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SdsOrigin {
    /// The control plane, over the same ADS stream.
    Ads,
    /// The workload itself: what Istio's agent serves to Envoy under the names `default` and `ROOTCA`. Here they are the identity
    /// that the application gave to the mesh, or else the certificate provider instance `default` of the bootstrap.
    Workload,
    /// A server of its own: `google_grpc`, where the bootstrap's `allowed_grpc_services` have its target (gRFC A102).
    Server(Arc<ServerConfig>),
}

/// A certificate provider instance of the bootstrap.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CertificateProviderRef {
    /// Key of `certificate_providers`.
    pub instance: String,
    /// `certificate_name`, passed to the provider.
    pub certificate: String,
}

/// One entry of `match_subject_alt_names` or `match_typed_subject_alt_names`.
#[derive(Clone, Debug, PartialEq)]
pub struct SanMatch {
    /// SANs of which kind; `None`: of any.
    pub kind: Option<SanKind>,
    /// What they are to be. `Exact` against a DNS SAN knows wildcards (gRFC A29).
    pub matcher: StringMatcher,
}

/// `SubjectAltNameMatcher.SanType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SanKind {
    /// E-mail address.
    Email,
    /// Host name.
    Dns,
    /// URI, as a SPIFFE id is.
    Uri,
    /// IP address.
    Ip,
}

impl TransportSocketMatch {
    /// Whether it is for an endpoint with this metadata.
    pub fn matches(&self, metadata: Option<&BTreeMap<String, BTreeMap<String, MetadataValue>>>) -> bool {
        let said = metadata.and_then(|metadata| metadata.get(SOCKET_MATCH));
        self.wanted.iter().all(|(key, value)| said.and_then(|said| said.get(key)) == Some(value))
    }
}

impl<T> Credential<T> {
    /// The instance of the bootstrap, if it is one.
    pub fn provider(&self) -> Option<&CertificateProviderRef> {
        match self {
            Self::Provider(provider) => Some(provider),
            Self::Sds(_) | Self::Inline(_) => None,
        }
    }

    /// The `Secret` of the control plane, if it is one.
    pub fn ads_secret(&self) -> Option<&Arc<str>> {
        match self {
            Self::Sds(SdsRef { name, origin: SdsOrigin::Ads }) => Some(name),
            _ => None,
        }
    }
}

impl<T> fmt::Debug for Credential<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Provider(provider) => f.debug_tuple("Provider").field(provider).finish(),
            Self::Sds(secret) => f.debug_tuple("Sds").field(secret).finish(),
            // It may hold a private key.
            Self::Inline(_) => f.debug_tuple("Inline").finish_non_exhaustive(),
        }
    }
}
