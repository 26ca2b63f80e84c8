//! Certificates of a server that speaks SDS and nothing else: the agents of SPIRE and of Istio, as Envoy uses them.

use super::{Opener, Role, ads_connector, sds::Followed};
use mesh_tls::{CryptoProvider, Material, Source, SourceError};
use mesh_xds::{
    Bootstrap, ClientOptions, XdsClient,
    ads::Service,
    bootstrap::{BootstrapError, ChannelCreds, Node, ServerConfig},
};
use std::sync::Arc;
use tokio::{runtime::Handle, sync::watch};

/// Settings of an [`SdsSource`].
#[derive(Clone, Debug)]
pub struct SdsConfig {
    /// The name in messages and metrics.
    pub name: String,
    /// Where the server is, and how it is spoken to.
    pub server: ServerConfig,
    /// The secret that is our certificate; default `default`. `None`: only roots are asked for.
    pub certificate: Option<String>,
    /// The secret that says whom to trust; default `ROOTCA`: the roots of our trust domain, for everybody. SPIRE's `ALL` has those of the domains that are
    /// federated with it too, each for its own peers. `None`: only a certificate is asked for.
    pub roots: Option<String>,
    /// Who we say we are; agents know it by the socket. Default: nobody.
    pub node: Node,
    /// A server on another machine without TLS is taken all the same: whoever is on the way has our key, or says whom we trust. Default: it is
    /// an error.
    pub dangerous_plaintext: bool,
    /// Loads the keys, and secures the connection where the server wants TLS.
    pub provider: Arc<CryptoProvider>,
}

/// Follows secrets of an SDS server (Envoy's Secret Discovery Service, state of the world): our certificate, and the roots.
///
/// A connection that ends is made again, for ever, after one second at first (gRFC A27's backoff). A secret that is wrong is refused
/// (NACK), and with one that is gone the last good one stays; [`Source::last_error`] says so. Revocation lists of a
/// `validation_context` are obeyed. Its tasks end when the source is dropped.
///
/// Over Unix sockets no PINGs are sent.
///
/// ```no_run
/// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
/// use mesh_client::{Mesh, identity::{SdsConfig, SdsSource}};
/// use std::sync::Arc;
///
/// // Istio's agent: ./var/run/secrets/workload-spiffe-uds/socket; SPIRE's: /tmp/spire-agent/public/api.sock
/// let config = SdsConfig::new("agent", "unix:/run/spire/agent.sock", mesh_tls::default_provider())?;
/// let source = SdsSource::new(config, &tokio::runtime::Handle::current())?;
/// let mesh = Mesh::builder().certificate_provider("default", Arc::new(source)).build().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct SdsSource(Followed);

impl SdsConfig {
    /// The secrets `default` and `ROOTCA` of a server without TLS on this machine: `unix:/path`, `unix:path` or `localhost:port`.
    ///
    /// # Errors
    /// The URI is none of these.
    pub fn new(
        name: impl Into<String>,
        server_uri: &str,
        provider: Arc<CryptoProvider>,
    ) -> Result<Self, BootstrapError> {
        Ok(Self {
            name: name.into(),
            server: ServerConfig::insecure(server_uri)?,
            certificate: Some("default".to_owned()),
            roots: Some("ROOTCA".to_owned()),
            node: Node::default(),
            dangerous_plaintext: false,
            provider,
        })
    }
}

impl SdsSource {
    /// Starts following. Does not wait for the server: [`mesh_tls::ready`] does.
    ///
    /// # Errors
    /// Neither a certificate nor roots are asked for, or a server on another machine has no TLS.
    pub fn new(config: SdsConfig, runtime: &Handle) -> Result<Self, SourceError> {
        let SdsConfig { name, server, certificate, roots, node, dangerous_plaintext, provider } = config;
        let wrong = |reason: String| SourceError::new(name.clone(), reason);
        if certificate.is_none() && roots.is_none() {
            return Err(wrong("neither a certificate nor roots are asked for".to_owned()));
        }
        if server.channel_creds == ChannelCreds::Insecure && !server.address.is_local() && !dangerous_plaintext {
            let reason = format!("keys would go in the clear to {}: it is not on this machine", server.uri);
            return Err(wrong(reason));
        }
        let bootstrap = Bootstrap::builder().server_config(server).node(node).build();
        let bootstrap = bootstrap.map_err(|error| wrong(error.to_string()))?;
        let opener = Opener { crypto: provider, runtime: runtime.clone() };
        let options = ClientOptions { service: Service::Secrets, ..ClientOptions::default() };
        let _runtime = runtime.enter();
        let client = XdsClient::with_options(Arc::new(bootstrap), ads_connector(opener.clone(), None), options);
        // The watches keep the client.
        let watches: Vec<_> = [(certificate, Role::Certificate), (roots, Role::Trust)]
            .into_iter()
            .filter_map(|(secret, role)| Some((client.watch_secret(&secret?), role)))
            .collect();
        Ok(Self(Followed::new(name, watches, &opener)))
    }
}

impl Source for SdsSource {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn current(&self) -> Arc<Material> {
        self.0.current()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed()
    }

    fn last_error(&self) -> Option<String> {
        self.0.last_error()
    }
}
