//! Bootstrap: where the control planes are, who we are, and which certificate providers exist.
//!
//! The JSON form is gRPC's (gRFC A27 and later). Fields that are not known are ignored with a note ([`Bootstrap::notes`]).

mod builder;
mod error;
mod json;
mod name;
mod uri;

#[cfg(test)]
mod tests;

pub use builder::BootstrapBuilder;
pub use error::{BootstrapError, Source};
pub(crate) use name::authority_of;
pub use uri::ServerAddress;
pub(crate) use uri::split_host_port;

use std::{collections::BTreeMap, fmt, path::PathBuf, sync::Arc, time::Duration};

/// The variable that names a bootstrap file. Wins over [`ENV_CONFIG`].
pub const ENV_FILE: &str = "GRPC_XDS_BOOTSTRAP";
/// The variable that holds the bootstrap JSON itself.
pub const ENV_CONFIG: &str = "GRPC_XDS_BOOTSTRAP_CONFIG";

/// A checked bootstrap.
#[derive(Clone, Debug, PartialEq)]
pub struct Bootstrap {
    /// `xds_servers`: at least one, in order of preference (gRFC A71).
    pub servers: Vec<ServerConfig>,
    /// `node`.
    pub node: Node,
    /// `certificate_providers` by instance name.
    pub certificate_providers: BTreeMap<String, CertificateProvider>,
    /// `client_default_listener_resource_name_template`; default `%s`.
    pub client_listener_template: String,
    /// `server_listener_resource_name_template`; no default: servers need it.
    pub server_listener_template: Option<String>,
    /// `authorities` by name.
    pub authorities: BTreeMap<String, Authority>,
    /// `allowed_grpc_services` by target (gRFC A102).
    pub allowed_grpc_services: BTreeMap<String, GrpcService>,
    /// Timing of the client; never part of the JSON.
    pub timing: Timing,
    notes: Vec<String>,
}

/// One entry of `xds_servers`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct ServerConfig {
    /// `server_uri` as configured, for people.
    pub uri: Arc<str>,
    /// Where it is.
    pub address: ServerAddress,
    /// The first supported entry of `channel_creds`.
    pub channel_creds: ChannelCreds,
    /// Supported entries of `call_creds`.
    pub call_creds: Vec<CallCreds>,
    /// `server_features`.
    pub features: ServerFeatures,
}

/// Channel credentials of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ChannelCreds {
    /// Plaintext.
    Insecure,
    /// TLS (gRFC A65).
    Tls(TlsCreds),
}

/// `tls` channel credentials (gRFC A65). Only with neither a CA file nor a bundle map are the system roots used.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsCreds {
    /// PEM bundle that signs the server.
    pub ca_certificate_file: Option<PathBuf>,
    /// SPIFFE trust bundle map, JSON (gRFC A87): the server has a SPIFFE id of one of its trust domains, and is verified by the roots of
    /// that one. If its certificate has DNS names or addresses too, one of them is the server's. Wins over `ca_certificate_file`.
    pub spiffe_trust_bundle_map_file: Option<PathBuf>,
    /// Our certificate chain, PEM. Given together with `private_key_file`, or not at all.
    pub certificate_file: Option<PathBuf>,
    /// Our key, PEM.
    pub private_key_file: Option<PathBuf>,
    /// How often the files are read again; default 600 s.
    pub refresh_interval: Duration,
}

/// Call credentials of a control plane.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CallCreds {
    /// A file that holds a JWT, sent as `authorization: Bearer` (gRFC A97). Only sent over TLS.
    JwtTokenFile(PathBuf),
}

/// `server_features`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ServerFeatures {
    /// Absent LDS and CDS resources are kept (gRFC A53).
    pub ignore_resource_deletion: bool,
    /// The server may direct authority rewriting and the like (gRFC A81).
    pub trusted_xds_server: bool,
    /// Data errors drop the cached resource (gRFC A88).
    pub fail_on_data_errors: bool,
    /// A resource that does not come in time is a transient error, after 30 s instead of 15 s (gRFC A88).
    pub resource_timer_is_transient_error: bool,
}

/// Who we are.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Node {
    /// Unique id.
    pub id: String,
    /// The service cluster we belong to.
    pub cluster: String,
    /// Where we run.
    pub locality: crate::resource::LocalityId,
    /// Opaque to us.
    pub metadata: serde_json::Map<String, serde_json::Value>,
}

/// One entry of `certificate_providers`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CertificateProvider {
    /// `file_watcher`.
    FileWatcher(FileWatcher),
    /// `sds`: ours, no other gRPC library has it.
    Sds(SdsServer),
    /// One that the application holds itself, and gives to who uses the bootstrap. Never in the JSON.
    Application,
    /// A plugin this library does not have. Resources that name it are rejected.
    Unknown {
        /// `plugin_name`.
        plugin: String,
    },
}

/// Config of the `file_watcher` certificate provider.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileWatcher {
    /// Our certificate chain, PEM. Given together with `private_key_file`, or not at all.
    pub certificate_file: Option<PathBuf>,
    /// Our key, PEM.
    pub private_key_file: Option<PathBuf>,
    /// Trusted roots, PEM.
    pub ca_certificate_file: Option<PathBuf>,
    /// SPIFFE trust bundle map, JSON (gRFC A87). Wins over `ca_certificate_file`.
    pub spiffe_trust_bundle_map_file: Option<PathBuf>,
    /// How often the files are read again; default 600 s.
    pub refresh_interval: Duration,
}

/// Config of the `sds` certificate provider: an SDS server, as SPIRE's agent and Istio's are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SdsServer {
    /// `server_uri` and `channel_creds`, written as in `xds_servers`; without the latter plaintext.
    pub server: ServerConfig,
    /// `certificate_name`: the secret that is our certificate; default `default`. `None` (in JSON: empty): none.
    pub certificate: Option<String>,
    /// `root_name`: the secret that says whom to trust; default `ROOTCA`; SPIRE's `ALL` knows federated trust domains too. `None` (in JSON: empty): none.
    pub roots: Option<String>,
}

/// One entry of `authorities`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Authority {
    /// `client_listener_resource_name_template`; default `xdstp://<name>/envoy.config.listener.v3.Listener/%s`.
    pub client_listener_template: Option<String>,
    /// Empty: the top-level servers.
    pub servers: Vec<ServerConfig>,
}

/// One entry of `allowed_grpc_services`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcService {
    /// The first supported entry of `channel_creds`.
    pub channel_creds: ChannelCreds,
    /// Supported entries of `call_creds`.
    pub call_creds: Vec<CallCreds>,
}

/// Timing of the xDS client. The defaults are gRPC's.
#[derive(Clone, Debug, PartialEq)]
pub struct Timing {
    /// First reconnect delay; default 1 s, grows by 1.6 with 20 % jitter.
    pub backoff_base: Duration,
    /// Longest reconnect delay; default 120 s.
    pub backoff_max: Duration,
    /// Limit of one connection attempt; default 20 s.
    pub connect_timeout: Duration,
    /// HTTP/2 PING interval on the ADS connection; default 30 s, which go-control-plane's servers allow.
    pub keepalive_interval: Duration,
    /// A PING unanswered for so long closes the connection; default 10 s.
    pub keepalive_timeout: Duration,
    /// How long a requested resource may stay unsent before it counts as absent; default 15 s (gRFC A57), or 30 s with
    /// `resource_timer_is_transient_error`. `None` is the default.
    pub resource_timeout: Option<Duration>,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            backoff_base: Duration::from_secs(1),
            backoff_max: Duration::from_secs(120),
            connect_timeout: Duration::from_secs(20),
            keepalive_interval: Duration::from_secs(30),
            keepalive_timeout: Duration::from_secs(10),
            resource_timeout: None,
        }
    }
}

impl Bootstrap {
    /// Starts a bootstrap in code.
    pub fn builder() -> BootstrapBuilder {
        BootstrapBuilder::default()
    }

    /// What was ignored in the JSON, each as `field: reason`.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// The servers to ask for the resources of `authority` (`None`: names without an authority).
    ///
    /// # Errors
    /// The authority is not in the bootstrap.
    pub fn servers_of(&self, authority: Option<&str>) -> Result<&[ServerConfig], BootstrapError> {
        let Some(name) = authority.filter(|name| !name.is_empty()) else { return Ok(&self.servers) };
        let entry = self.authorities.get(name).ok_or_else(|| self.unknown_authority(name))?;
        Ok(if entry.servers.is_empty() { &self.servers } else { &entry.servers })
    }

    fn unknown_authority(&self, name: &str) -> BootstrapError {
        BootstrapError::UnknownAuthority {
            authority: name.to_owned(),
            known: self.authorities.keys().map(String::as_str).collect::<Vec<_>>().join(", "),
        }
    }
}

impl ServerConfig {
    /// A plaintext server.
    ///
    /// # Errors
    /// The URI is not one of `host:port`, `http://`, `https://`, `dns:///`, `unix:`.
    pub fn insecure(uri: &str) -> Result<Self, BootstrapError> {
        Ok(Self {
            uri: uri.into(),
            address: ServerAddress::parse(uri).map_err(|reason| BootstrapError::Field {
                origin: Source::Builder,
                path: "xds_servers[0].server_uri".to_owned(),
                reason,
            })?,
            channel_creds: ChannelCreds::Insecure,
            call_creds: Vec::new(),
            features: ServerFeatures::default(),
        })
    }
}

impl fmt::Debug for ServerConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("uri", &self.uri)
            .field("channel_creds", &self.channel_creds)
            .field("call_creds", &self.call_creds)
            .field("features", &self.features)
            .finish_non_exhaustive()
    }
}
