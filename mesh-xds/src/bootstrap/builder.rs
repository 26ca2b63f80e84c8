//! A bootstrap made in code, checked as strictly as one from JSON.

use super::{Authority, Bootstrap, BootstrapError, CertificateProvider, Node, ServerConfig, Source, Timing};
use std::collections::BTreeMap;

/// Builds a [`Bootstrap`] in code. Errors are reported by [`build`](Self::build).
#[derive(Clone, Debug)]
pub struct BootstrapBuilder {
    servers: Vec<Result<ServerConfig, (String, String)>>,
    node: Node,
    certificate_providers: BTreeMap<String, CertificateProvider>,
    client_listener_template: String,
    server_listener_template: Option<String>,
    authorities: BTreeMap<String, Authority>,
    timing: Timing,
}

impl Default for BootstrapBuilder {
    fn default() -> Self {
        Self {
            servers: Vec::new(),
            node: Node::default(),
            certificate_providers: BTreeMap::new(),
            client_listener_template: "%s".to_owned(),
            server_listener_template: None,
            authorities: BTreeMap::new(),
            timing: Timing::default(),
        }
    }
}

impl BootstrapBuilder {
    /// Adds a plaintext control plane (`host:port`, `http://host:port`, `unix:path`).
    #[must_use]
    pub fn server(mut self, uri: &str) -> Self {
        let index = self.servers.len();
        self.servers.push(ServerConfig::insecure(uri).map_err(|error| match error {
            BootstrapError::Field { reason, .. } => (format!("xds_servers[{index}].server_uri"), reason),
            other => (format!("xds_servers[{index}]"), other.to_string()),
        }));
        self
    }

    /// Adds a control plane.
    #[must_use]
    pub fn server_config(mut self, server: ServerConfig) -> Self {
        self.servers.push(Ok(server));
        self
    }

    /// Who we are. Default: all empty.
    #[must_use]
    pub fn node(mut self, node: Node) -> Self {
        self.node = node;
        self
    }

    /// Our node id.
    #[must_use]
    pub fn node_id(mut self, id: impl Into<String>) -> Self {
        self.node.id = id.into();
        self
    }

    /// Adds a certificate provider instance.
    #[must_use]
    pub fn certificate_provider(mut self, instance: impl Into<String>, provider: CertificateProvider) -> Self {
        self.certificate_providers.insert(instance.into(), provider);
        self
    }

    /// `client_default_listener_resource_name_template`; default `%s`.
    #[must_use]
    pub fn client_listener_template(mut self, template: impl Into<String>) -> Self {
        self.client_listener_template = template.into();
        self
    }

    /// `server_listener_resource_name_template`.
    #[must_use]
    pub fn server_listener_template(mut self, template: impl Into<String>) -> Self {
        self.server_listener_template = Some(template.into());
        self
    }

    /// Adds an authority.
    #[must_use]
    pub fn authority(mut self, name: impl Into<String>, authority: Authority) -> Self {
        self.authorities.insert(name.into(), authority);
        self
    }

    /// Timing of the client.
    #[must_use]
    pub fn timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// Checks everything.
    ///
    /// # Errors
    /// No server, an invalid server URI, or an authority's template that does not belong to it.
    pub fn build(self) -> Result<Bootstrap, BootstrapError> {
        let field = |path: String, reason: String| BootstrapError::Field { origin: Source::Builder, path, reason };
        if self.servers.is_empty() {
            return Err(field("xds_servers".to_owned(), "at least one server is needed".to_owned()));
        }
        let servers =
            self.servers.into_iter().collect::<Result<Vec<_>, _>>().map_err(|(path, reason)| field(path, reason))?;
        for (name, authority) in &self.authorities {
            if let Some(template) = &authority.client_listener_template {
                check_authority_template(name, template).map_err(|reason| {
                    field(format!("authorities[\"{name}\"].client_listener_resource_name_template"), reason)
                })?;
            }
        }
        Ok(Bootstrap {
            servers,
            node: self.node,
            certificate_providers: self.certificate_providers,
            client_listener_template: self.client_listener_template,
            server_listener_template: self.server_listener_template,
            authorities: self.authorities,
            allowed_grpc_services: BTreeMap::new(),
            timing: self.timing,
            notes: Vec::new(),
        })
    }
}

/// gRFC A47: the template of an authority starts with `xdstp://<authority>/`.
pub(super) fn check_authority_template(name: &str, template: &str) -> Result<(), String> {
    let expected = format!("xdstp://{name}/");
    if template.starts_with(&expected) { Ok(()) } else { Err(format!("\"{template}\" must start with \"{expected}\"")) }
}
