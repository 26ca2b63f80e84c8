//! Certificates by name: TLS of clusters, of servers, and of the control plane's own connection.

mod ads;
mod names;
mod sds;
mod sds_source;

pub(crate) use ads::ads_connector;
pub use sds_source::{SdsConfig, SdsSource};

use crate::{error::BoxError, transport::Protocol};
use mesh_tls::{
    Acceptor, ClientAuth, ClientSettings, ClientTls, CryptoProvider, FileSource, FileSourceConfig, MemorySource,
    PeerCheck, Roots, ServerSettings, Source, TlsError,
};
use mesh_xds::{
    XdsClient,
    bootstrap::{CertificateProvider, FileWatcher, Node, SdsServer, ServerConfig},
    resource::{
        CertificateProviderRef, Credential, DownstreamTls, SdsOrigin, SdsRef, SecretKind, TlsCertificate, TrustedCa,
        UpstreamTls,
    },
};
use names::{names_spiffe_ids, san_matcher};
use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

/// The instance that stands for the workload's own identity, as Istio names it.
const WORKLOAD: &str = "default";

/// Every source of certificates that configurations can name. One is opened when it is first named, and shared.
#[derive(Debug)]
pub(crate) struct Identities {
    providers: BTreeMap<String, CertificateProvider>,
    /// Those that the application gave, by instance name.
    given: HashMap<String, Arc<dyn Source>>,
    /// Certificate provider instances, once they are used.
    instances: Mutex<HashMap<String, Arc<dyn Source>>>,
    /// Secrets and certificates of resources, while they are used.
    secrets: Mutex<HashMap<Secret, Weak<dyn Source>>>,
    /// Of clusters that say nothing of TLS; `None`: plaintext.
    fallback: Option<Fallback>,
    opener: Opener,
    xds: Option<XdsClient>,
}

/// TLS of clusters that say nothing (gRFC A29): one configuration for all of them.
#[derive(Debug)]
pub(crate) struct Fallback {
    http1: ClientTls,
    http2: ClientTls,
    /// The server name is not set: it is the endpoint's.
    by_endpoint: bool,
}

/// What a source is opened with.
#[derive(Clone, Debug)]
pub(crate) struct Opener {
    pub(crate) crypto: Arc<CryptoProvider>,
    pub(crate) runtime: tokio::runtime::Handle,
}

/// A source that is not a certificate provider instance.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Secret {
    Sds(Arc<str>, Role),
    /// Of a server that is not the control plane.
    Of(Arc<ServerConfig>, Arc<str>, Role),
    Certificate(Arc<TlsCertificate>),
    Trust(Arc<TrustedCa>),
}

/// What a source is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Role {
    Certificate,
    Trust,
}

/// What a resource may hold itself instead of naming it.
trait Held {
    const ROLE: Role;

    fn secret(of: &Arc<Self>) -> Secret;
}

impl Held for TlsCertificate {
    const ROLE: Role = Role::Certificate;

    fn secret(of: &Arc<Self>) -> Secret {
        Secret::Certificate(of.clone())
    }
}

impl Held for TrustedCa {
    const ROLE: Role = Role::Trust;

    fn secret(of: &Arc<Self>) -> Secret {
        Secret::Trust(of.clone())
    }
}

impl Identities {
    pub(crate) fn new(
        providers: BTreeMap<String, CertificateProvider>,
        given: HashMap<String, Arc<dyn Source>>,
        fallback: Option<Fallback>,
        opener: Opener,
        xds: Option<XdsClient>,
    ) -> Arc<Self> {
        let (instances, secrets) = (Mutex::default(), Mutex::default());
        Arc::new(Self { providers, given, instances, secrets, fallback, opener, xds })
    }

    /// TLS of a cluster that says nothing, to speak this protocol, and whether the server name is the endpoint's.
    pub(crate) fn fallback(&self, protocol: Protocol) -> Option<(ClientTls, bool)> {
        let Fallback { http1, http2, by_endpoint } = self.fallback.as_ref()?;
        let tls = match protocol {
            Protocol::Http1 => http1,
            Protocol::Http2 => http2,
        };
        Some((tls.clone(), *by_endpoint))
    }

    /// What it all is made with.
    pub(crate) fn crypto(&self) -> &Arc<CryptoProvider> {
        &self.opener.crypto
    }

    /// TLS as a cluster's `UpstreamTlsContext` says (gRFC A29), to speak this protocol. What is not there yet is waited for within the
    /// connect timeout; files that cannot be read are tried again, and until then handshakes fail with the reason.
    pub(crate) fn client_tls(&self, tls: &UpstreamTls, protocol: Protocol) -> Result<ClientTls, BoxError> {
        let roots = match &tls.ca {
            Some(roots) => Roots::Source(self.source(roots)?),
            None => Roots::System,
        };
        let mut settings = ClientSettings::new(roots);
        settings.identity = tls.identity.as_ref().map(|own| self.source(own)).transpose()?;
        settings.san_matchers = tls.san_matchers.iter().map(san_matcher).collect();
        if tls.verify_server_name {
            settings.check = PeerCheck::ServerName;
        } else if names_spiffe_ids(&tls.san_matchers) {
            settings.check = PeerCheck::Spiffe;
        }
        settings.auto_sni_san = tls.auto_sni_san_validation;
        settings.sni.clone_from(&tls.sni);
        settings.alpn = names::alpn(&tls.alpn, protocol);
        Ok(ClientTls::new(settings, self.opener.crypto.clone())?)
    }

    /// TLS as a filter chain's `DownstreamTlsContext` says (gRFC A29).
    pub(crate) fn server_tls(&self, tls: &DownstreamTls, handshake_timeout: Duration) -> Result<Acceptor, BoxError> {
        let identity = self.source(&tls.identity)?;
        let mut settings = ServerSettings::mtls(identity.clone());
        settings.check = if names_spiffe_ids(&tls.san_matchers) { PeerCheck::Spiffe } else { PeerCheck::Chain };
        settings.san_matchers = tls.san_matchers.iter().map(san_matcher).collect();
        (settings.roots, settings.client_auth) = match &tls.ca {
            None => (Roots::Source(identity), ClientAuth::Off),
            Some(ca) => {
                let auth = if tls.require_client_certificate { ClientAuth::Required } else { ClientAuth::Optional };
                (Roots::Source(self.source(ca)?), auth)
            }
        };
        if !tls.alpn.is_empty() {
            settings.alpn = tls.alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        }
        settings.handshake_timeout = handshake_timeout;
        Ok(Acceptor::new(settings, self.opener.crypto.clone())?)
    }

    fn source<T: Held>(&self, credential: &Credential<T>) -> Result<Arc<dyn Source>, BoxError> {
        match credential {
            Credential::Provider(CertificateProviderRef { instance, .. }) => self.instance(instance),
            Credential::Sds(SdsRef { origin: SdsOrigin::Workload, name }) => self.instance(WORKLOAD).map_err(|error| {
                format!("the secret `{name}` is the workload's own identity, which the mesh does not have: {error}")
                    .into()
            }),
            Credential::Sds(SdsRef { origin: SdsOrigin::Ads, name }) => {
                self.shared(Secret::Sds(name.clone(), T::ROLE), || {
                    let xds = self.xds.as_ref().ok_or("there is no control plane to have secrets from")?;
                    let watch = {
                        let _runtime = self.opener.runtime.enter();
                        xds.watch_secret(name)
                    };
                    Ok(sds::follow(watch, T::ROLE, &self.opener))
                })
            }
            Credential::Sds(SdsRef { origin: SdsOrigin::Server(server), name }) => {
                self.shared(Secret::Of(server.clone(), name.clone(), T::ROLE), || {
                    let (certificate, roots) = match T::ROLE {
                        Role::Certificate => (Some(name.to_string()), None),
                        Role::Trust => (None, Some(name.to_string())),
                    };
                    self.sds(format!("secret {name} of {}", server.uri), (**server).clone(), certificate, roots)
                })
            }
            Credential::Inline(held) => {
                let secret = T::secret(held);
                self.shared(secret.clone(), || self.held(&secret))
            }
        }
    }

    /// The source of this secret that is in use, or else a new one.
    fn shared(
        &self,
        secret: Secret,
        open: impl FnOnce() -> Result<Arc<dyn Source>, BoxError>,
    ) -> Result<Arc<dyn Source>, BoxError> {
        let mut secrets = self.secrets.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = secrets.get(&secret).and_then(Weak::upgrade) {
            return Ok(source);
        }
        let source = open()?;
        secrets.retain(|_, source| source.strong_count() > 0);
        secrets.insert(secret, Arc::downgrade(&source));
        Ok(source)
    }

    /// What a resource holds itself. Text is read once, and is wrong for ever if it is wrong.
    fn held(&self, secret: &Secret) -> Result<Arc<dyn Source>, BoxError> {
        let kind = match secret {
            Secret::Certificate(own) => SecretKind::Certificate(own.clone()),
            Secret::Trust(ca) => SecretKind::Trust(ca.clone()),
            Secret::Sds(name, _) | Secret::Of(_, name, _) => {
                return Err(format!("the secret `{name}` is not held by a resource").into());
            }
        };
        if let Some(files) = sds::files(&kind) {
            return sds::open_files("the files of the TLS context", files, &self.opener);
        }
        let source = MemorySource::empty("the TLS context");
        sds::read(&kind, &self.opener.crypto)?.put(&source);
        Ok(Arc::new(source))
    }

    fn instance(&self, instance: &str) -> Result<Arc<dyn Source>, BoxError> {
        if let Some(source) = self.given.get(instance) {
            return Ok(source.clone());
        }
        let mut instances = self.instances.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = instances.get(instance) {
            return Ok(source.clone());
        }
        let source = match self.providers.get(instance) {
            Some(CertificateProvider::FileWatcher(watcher)) => self.opener.open(instance, watcher)?,
            Some(CertificateProvider::Sds(SdsServer { server, certificate, roots })) => {
                self.sds(instance.to_owned(), server.clone(), certificate.clone(), roots.clone())?
            }
            Some(CertificateProvider::Unknown { plugin }) => {
                return Err(
                    format!("certificate provider instance `{instance}` is of the unknown plugin `{plugin}`").into()
                );
            }
            Some(CertificateProvider::Application) | None => {
                return Err(format!("certificate provider instance `{instance}` is not in the bootstrap").into());
            }
        };
        instances.insert(instance.to_owned(), source.clone());
        Ok(source)
    }
}

impl Identities {
    /// Secrets of a server that has nothing else.
    fn sds(
        &self,
        name: String,
        server: ServerConfig,
        certificate: Option<String>,
        roots: Option<String>,
    ) -> Result<Arc<dyn Source>, BoxError> {
        let node = self.xds.as_ref().map_or_else(Node::default, |xds| xds.bootstrap().node.clone());
        let provider = self.opener.crypto.clone();
        // Where the bootstrap wants plaintext to another machine it says so.
        let config = SdsConfig { name, server, certificate, roots, node, dangerous_plaintext: true, provider };
        Ok(Arc::new(SdsSource::new(config, &self.opener.runtime)?))
    }
}

impl Fallback {
    /// Checks the settings.
    pub(crate) fn new(settings: &ClientSettings, crypto: &Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let tls = |protocol| {
            let mut settings = settings.clone();
            if settings.alpn.is_empty() {
                settings.alpn = names::alpn(&[], protocol);
            }
            ClientTls::new(settings, crypto.clone())
        };
        let (http1, http2) = (tls(Protocol::Http1)?, tls(Protocol::Http2)?);
        Ok(Self { http1, http2, by_endpoint: settings.sni.is_none() })
    }
}

impl Opener {
    fn open(&self, name: &str, files: &FileWatcher) -> Result<Arc<dyn Source>, BoxError> {
        let mut config = FileSourceConfig::new(name, self.crypto.clone());
        config.certificate_file.clone_from(&files.certificate_file);
        config.private_key_file.clone_from(&files.private_key_file);
        config.ca_certificate_file.clone_from(&files.ca_certificate_file);
        config.spiffe_trust_bundle_map_file.clone_from(&files.spiffe_trust_bundle_map_file);
        config.refresh_interval = files.refresh_interval;
        config.lazy = true;
        Ok(Arc::new(FileSource::new(config, &self.runtime)?))
    }
}
