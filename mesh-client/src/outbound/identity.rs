//! Certificates by provider instance: TLS of clusters, and of the control plane's own connection.

use crate::{error::BoxError, outbound::connect::DialRef};
use futures::future::BoxFuture;
use mesh_tls::{
    ClientSettings, ClientTls, CryptoProvider, FileSource, FileSourceConfig, PeerCheck, Roots, SanMatcher, Source,
};
use mesh_xds::{
    ads::{BoxedIo, Connect, connect_address},
    bootstrap::{CertificateProvider, ChannelCreds, FileWatcher, ServerAddress, ServerConfig, TlsCreds},
    resource::{CertificateProviderRef, Credential, SanMatch, StringPattern, UpstreamTls},
};
use std::{
    collections::{BTreeMap, HashMap},
    io,
    sync::{Arc, Mutex, PoisonError},
};

/// The certificate providers of a bootstrap. A source is opened when the first cluster names it, and shared.
#[derive(Debug)]
pub(crate) struct Identities {
    providers: BTreeMap<String, CertificateProvider>,
    sources: Mutex<HashMap<String, Arc<dyn Source>>>,
    crypto: Arc<CryptoProvider>,
    runtime: tokio::runtime::Handle,
}

/// Opens ADS connections, with TLS where the bootstrap asks for it.
#[derive(Debug)]
struct AdsConnect {
    identities: Arc<Identities>,
    dial: Option<DialRef>,
    /// By credentials: servers with equal ones share their configuration.
    tls: Mutex<HashMap<TlsCreds, ClientTls>>,
}

impl Identities {
    pub(crate) fn new(
        providers: BTreeMap<String, CertificateProvider>,
        crypto: Arc<CryptoProvider>,
        runtime: tokio::runtime::Handle,
    ) -> Arc<Self> {
        Arc::new(Self { providers, sources: Mutex::default(), crypto, runtime })
    }

    /// TLS as a cluster's `UpstreamTlsContext` says (gRFC A29). Files that cannot be read yet are tried again; until then handshakes
    /// fail with the reason.
    pub(crate) fn client_tls(&self, tls: &UpstreamTls, alpn: &[&str]) -> Result<ClientTls, BoxError> {
        let roots = match &tls.ca {
            Some(roots) => Roots::Source(self.credential(roots)?),
            None => Roots::System,
        };
        let mut settings = ClientSettings::new(roots);
        settings.identity = tls.identity.as_ref().map(|own| self.credential(own)).transpose()?;
        settings.san_matchers = tls.san_matchers.iter().map(san_matcher).collect();
        if !tls.san_matchers.is_empty() && tls.san_matchers.iter().all(names_spiffe_id) {
            settings.check = PeerCheck::Spiffe;
        }
        settings.sni.clone_from(&tls.sni);
        settings.alpn = match tls.alpn.is_empty() {
            true => alpn.iter().map(|p| p.as_bytes().to_vec()).collect(),
            false => tls.alpn.iter().map(|p| p.as_bytes().to_vec()).collect(),
        };
        Ok(ClientTls::new(settings, self.crypto.clone())?)
    }

    /// How the ADS connection is opened.
    pub(crate) fn ads_connector(self: &Arc<Self>, dial: Option<DialRef>) -> Arc<dyn Connect> {
        Arc::new(AdsConnect { identities: self.clone(), dial, tls: Mutex::default() })
    }

    fn credential<T>(&self, credential: &Credential<T>) -> Result<Arc<dyn Source>, BoxError> {
        match credential {
            Credential::Provider(provider) => self.source(provider),
            other => Err(format!("certificates can only come from provider instances, not from {other:?}").into()),
        }
    }

    fn source(&self, provider: &CertificateProviderRef) -> Result<Arc<dyn Source>, BoxError> {
        let instance = &provider.instance;
        let mut sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = sources.get(instance) {
            return Ok(source.clone());
        }
        let watcher = match self.providers.get(instance) {
            Some(CertificateProvider::FileWatcher(watcher)) => watcher,
            Some(CertificateProvider::Unknown { plugin }) => {
                return Err(
                    format!("certificate provider instance `{instance}` is of the unknown plugin `{plugin}`").into()
                );
            }
            None => return Err(format!("certificate provider instance `{instance}` is not in the bootstrap").into()),
        };
        let source = self.open(instance, watcher)?;
        sources.insert(instance.clone(), source.clone());
        Ok(source)
    }

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

impl AdsConnect {
    fn tls(&self, creds: &TlsCreds, server: &ServerConfig) -> Result<ClientTls, BoxError> {
        let mut cache = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tls) = cache.get(creds) {
            return Ok(tls.clone());
        }
        let files = FileWatcher {
            certificate_file: creds.certificate_file.clone(),
            private_key_file: creds.private_key_file.clone(),
            ca_certificate_file: creds.ca_certificate_file.clone(),
            spiffe_trust_bundle_map_file: None,
            refresh_interval: creds.refresh_interval,
        };
        // no file at all is legal (gRFC A65): the roots of the system, and no certificate of our own
        let any =
            files.certificate_file.is_some() || files.private_key_file.is_some() || files.ca_certificate_file.is_some();
        let name = format!("xds_servers {}", server.uri);
        let source = any.then(|| self.identities.open(&name, &files)).transpose()?;
        let roots = match (&source, &creds.ca_certificate_file) {
            (Some(source), Some(_)) => Roots::Source(source.clone()),
            _ => Roots::System,
        };
        let settings = ClientSettings {
            identity: source.filter(|_| creds.certificate_file.is_some()),
            check: PeerCheck::ServerName,
            alpn: vec![b"h2".to_vec()],
            ..ClientSettings::new(roots)
        };
        let tls = ClientTls::new(settings, self.identities.crypto.clone())?;
        cache.insert(creds.clone(), tls.clone());
        Ok(tls)
    }
}

impl Connect for AdsConnect {
    fn connect(&self, server: &ServerConfig) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let tls = match &server.channel_creds {
            ChannelCreds::Insecure => Ok(None),
            ChannelCreds::Tls(creds) => self.tls(creds, server).map(Some),
        };
        let address = server.address.clone();
        let dial = self.dial.clone();
        Box::pin(async move {
            let tls = tls.map_err(io::Error::other)?;
            let io = match dial {
                None => connect_address(&address).await?,
                Some(DialRef(dial)) => dial.control_plane(&address).await?,
            };
            let Some(tls) = tls else { return Ok(io) };
            let name = match &address {
                ServerAddress::Tcp { host, .. } => Some(host.clone()),
                ServerAddress::Unix(_) => None,
            };
            let (stream, _) = tls.connect(io, name.as_deref()).await.map_err(io::Error::other)?;
            Ok(Box::new(stream) as BoxedIo)
        })
    }
}

fn san_matcher(san: &SanMatch) -> SanMatcher {
    let matcher = &san.matcher;
    match (&matcher.pattern, matcher.ignore_case) {
        (StringPattern::Exact(value), false) => SanMatcher::Exact(value.clone()),
        _ => {
            let matches = matcher.clone();
            SanMatcher::Matches {
                description: format!("{:?}", matcher.pattern),
                matches: Arc::new(move |san| matches.matches(san)),
            }
        }
    }
}

fn names_spiffe_id(san: &SanMatch) -> bool {
    match &san.matcher.pattern {
        StringPattern::Exact(value) | StringPattern::Prefix(value) => value.starts_with("spiffe://"),
        _ => false,
    }
}
