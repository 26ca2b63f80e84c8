//! The control plane: configuration in, resources out, and what happened on the way.

use crate::{
    bootstrap::Bootstrap,
    ca::{self, CertificateAuthority},
    input::{self, Loaded, Source},
    model::MtlsMode,
    problem::{Problem, Rejected},
    translate::{self, translate},
    watch,
};
use mesh_xds::server::{AdsServer, Nack, ResourceCache, ResourceSet};
use std::{
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{net::TcpListener, sync::broadcast, task::JoinSet};

/// Events kept for a receiver that is slow.
const EVENT_BACKLOG: usize = 256;

/// Why a configuration was not applied, or a control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The documents are wrong: `file:line:column: reason`, one a line.
    #[error(transparent)]
    Rejected(#[from] Rejected),
    /// A file or folder cannot be read.
    #[error("cannot read {0}")]
    Read(io::Error),
    /// The address cannot be bound.
    #[error("cannot listen on {addr}: {source}")]
    Listen {
        /// Which.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The dev CA failed.
    #[error(transparent)]
    Ca(#[from] ca::Error),
}

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A configuration is served.
    Applied {
        /// The cache's version that holds it.
        version: u64,
        /// What may be wrong with it.
        warnings: Vec<Problem>,
    },
    /// A configuration was not taken; the one before it is still served.
    Rejected {
        /// Why, as the [`Error`] says it.
        reason: String,
        /// The findings, when it was the documents.
        errors: Vec<Problem>,
    },
    /// A client refused resources.
    Nack(Nack),
}

/// Events from the moment of the call of [`ControlPlane::events`].
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
}

/// Settings of a control plane to be.
#[derive(Clone, Debug)]
#[must_use]
pub struct Builder {
    config: Config,
    listen: SocketAddr,
    ca: Option<PathBuf>,
    ca_in_memory: bool,
    ca_listen: SocketAddr,
    secrets: bool,
    lifetime: Duration,
    trust_domain: String,
    mtls: MtlsMode,
    identities: Vec<(String, String)>,
    raw: ResourceSet,
    node_id: String,
}

#[derive(Clone, Debug)]
enum Config {
    Text(String),
    /// Watched.
    Path(PathBuf),
}

/// A running control plane. Dropping it cuts its clients and stops its tasks.
#[derive(Debug)]
pub struct ControlPlane {
    server: AdsServer,
    core: Arc<Core>,
    node_id: String,
    client: (String, String),
    ca_addr: Option<SocketAddr>,
    _tasks: JoinSet<()>,
}

/// What the tasks share.
#[derive(Debug)]
pub(crate) struct Core {
    cache: ResourceCache,
    ca: Option<CertificateAuthority>,
    /// Keys of workloads are served over ADS.
    secrets: bool,
    options: translate::Options,
    raw: ResourceSet,
    events: broadcast::Sender<Event>,
    /// One apply at a time; holds the model in force.
    current: Mutex<Arc<Loaded>>,
}

impl Default for Builder {
    fn default() -> Self {
        Self {
            config: Config::Text(String::new()),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            ca: None,
            ca_in_memory: false,
            ca_listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            secrets: false,
            lifetime: ca::DEFAULT_LIFETIME,
            trust_domain: translate::Options::default().trust_domain,
            mtls: translate::Options::default().mtls,
            identities: Vec::new(),
            raw: ResourceSet::new(),
            node_id: crate::bootstrap::DEFAULT_NODE_ID.to_owned(),
        }
    }
}

impl Builder {
    /// The configuration, as YAML text.
    pub fn yaml(mut self, text: impl Into<String>) -> Self {
        self.config = Config::Text(text.into());
        self
    }

    /// The configuration is every `*.yaml` and `*.yml` in this folder, which is watched.
    pub fn dir(self, path: impl Into<PathBuf>) -> Self {
        self.path(path)
    }

    /// The configuration is this file, which is watched.
    pub fn file(self, path: impl Into<PathBuf>) -> Self {
        self.path(path)
    }

    /// The configuration is this file or folder, which is watched.
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.config = Config::Path(path.into());
        self
    }

    /// Where to listen; default `127.0.0.1:0`, a free port.
    pub fn listen(mut self, addr: SocketAddr) -> Self {
        self.listen = addr;
        self
    }

    /// Runs a dev CA in this folder, which is created when needed. There are identities for the service accounts of ServiceEntry
    /// endpoints, for `default` of each of their namespaces, and for those added by [`Self::identity`]: by files, and by a socket each
    /// with the SPIFFE Workload API and SDS; and over TLS by Istio's CA API ([`ControlPlane::ca_addr`]).
    pub fn ca(mut self, dir: impl Into<PathBuf>) -> Self {
        self.ca = Some(dir.into());
        self
    }

    /// Runs a dev CA that writes no key: the folder has the root certificate, and tokens and sockets of the workloads.
    pub fn ca_in_memory(self, dir: impl Into<PathBuf>) -> Self {
        Self { ca_in_memory: true, ..self.ca(dir) }
    }

    /// Where the dev CA listens: Istio's CA API and ADS, over TLS. Default `127.0.0.1:0`, a free port.
    pub fn ca_listen(mut self, addr: SocketAddr) -> Self {
        self.ca_listen = addr;
        self
    }

    /// Serves the secrets `default` and `ROOTCA` over ADS too, to nodes that say `NAMESPACE` and `SERVICE_ACCOUNT` in their metadata: whoever
    /// can connect gets any workload's key. Off by default.
    pub fn secrets_over_ads(mut self, on: bool) -> Self {
        self.secrets = on;
        self
    }

    /// How long certificates last; default 24 h. They are renewed at half of it.
    pub fn certificate_lifetime(mut self, lifetime: Duration) -> Self {
        self.lifetime = lifetime;
        self
    }

    /// Default `cluster.local`.
    pub fn trust_domain(mut self, trust_domain: impl Into<String>) -> Self {
        self.trust_domain = trust_domain.into();
        self
    }

    /// Which connections servers take where no PeerAuthentication says it; default PERMISSIVE. With STRICT every call within the mesh
    /// is mutual TLS, in both directions, from the first on.
    pub fn mtls(mut self, mode: MtlsMode) -> Self {
        self.mtls = mode;
        self
    }

    /// The CA also issues for this service account. The first one named is the one of [`ControlPlane::bootstrap`];
    /// `default/client` when none is.
    pub fn identity(mut self, namespace: impl Into<String>, account: impl Into<String>) -> Self {
        self.identities.push((namespace.into(), account.into()));
        self
    }

    /// Resources served beside those of the configuration, whatever it is; equal names win over it. They are not checked:
    /// a test can serve what no YAML would yield.
    pub fn raw_resources(mut self, resources: ResourceSet) -> Self {
        self.raw = resources;
        self
    }

    /// `node.id` of [`ControlPlane::bootstrap`]; default `mesh-client`.
    pub fn node_id(mut self, id: impl Into<String>) -> Self {
        self.node_id = id.into();
        self
    }

    /// Reads the configuration, opens the CA, listens, and serves.
    ///
    /// # Errors
    /// Any of it fails. Nothing is left running.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn start(mut self) -> Result<ControlPlane, Error> {
        if self.identities.is_empty() {
            self.identities.push(("default".to_owned(), "client".to_owned()));
        }
        let ca = match &self.ca {
            Some(dir) if self.ca_in_memory => {
                Some(CertificateAuthority::in_memory(dir, &self.trust_domain, self.lifetime)?)
            }
            Some(dir) => Some(CertificateAuthority::open(dir, &self.trust_domain, self.lifetime)?),
            None => None,
        };
        if let Some(ca) = &ca {
            for (namespace, account) in &self.identities {
                ca.issue(namespace, account)?;
            }
        }
        let core = Arc::new(Core {
            cache: ResourceCache::new(),
            ca: ca.clone(),
            secrets: self.secrets,
            options: translate::Options { trust_domain: self.trust_domain, mtls: self.mtls },
            raw: self.raw,
            events: broadcast::Sender::new(EVENT_BACKLOG),
            current: Mutex::default(),
        });
        let mut tasks = JoinSet::new();
        match self.config {
            Config::Text(text) => {
                core.apply(&[Source::inline(text)])?;
            }
            Config::Path(path) => {
                let sources = Source::path(&path).map_err(Error::Read)?;
                core.apply(&sources)?;
                tasks.spawn(watch::follow(path, sources, core.clone()));
            }
        }
        let addr = self.listen;
        let server = AdsServer::bind(addr, core.cache.clone()).await;
        let server = server.map_err(|source| Error::Listen { addr, source })?;
        tasks.spawn(report_nacks(core.cache.nacks(), core.events.clone()));
        let mut ca_addr = None;
        if let Some(ca) = ca {
            ca_addr = Some(authority(&ca, self.ca_listen, &core, &mut tasks).await?);
        }
        let client = self.identities.into_iter().next().unwrap_or_default();
        Ok(ControlPlane { server, core, node_id: self.node_id, client, ca_addr, _tasks: tasks })
    }
}

impl ControlPlane {
    /// Settings to start one.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// The gRPC bootstrap of a client, JSON. With a CA on, it has the certificate provider `default` with the client's
    /// identity.
    pub fn bootstrap(&self) -> String {
        self.bootstrap_for(&self.client.0, &self.client.1)
    }

    /// The same with the identity of another service account.
    pub fn bootstrap_for(&self, namespace: &str, account: &str) -> String {
        let ca = self.ca().filter(|ca| !ca.is_in_memory());
        let identity_dir = ca.map(|ca| ca.identity_dir(namespace, account));
        let workload = self.ca().map(|_| (namespace.to_owned(), account.to_owned()));
        let (server, node_id) = (self.addr().to_string(), self.node_id.clone());
        Bootstrap { server, node_id, identity_dir, workload }.to_string()
    }

    /// Replaces the whole configuration by this YAML text. When this returns, the cache serves it. A watched folder wins
    /// again with its next change.
    ///
    /// # Errors
    /// The text is rejected as a whole, and the configuration before it stays.
    ///
    /// # Cancel safety
    /// The change happens at the first poll.
    pub async fn apply(&self, yaml: &str) -> Result<u64, Error> {
        self.core.apply(&[Source::inline(yaml)])
    }

    /// What is served, for tests that serve resources of their own. The next change of the configuration replaces all of
    /// it; see also [`Builder::raw_resources`].
    pub fn cache(&self) -> &ResourceCache {
        &self.core.cache
    }

    /// The dev CA, when it is on.
    pub fn ca(&self) -> Option<&CertificateAuthority> {
        self.core.ca.as_ref()
    }

    /// Where the dev CA serves Istio's CA API and ADS over TLS, with a certificate of its root for `localhost`, the loopback addresses
    /// and `istiod.istio-system.svc`. A request for a certificate is authenticated by a token (`token` in the workload's folder) or by a
    /// client certificate.
    pub fn ca_addr(&self) -> Option<SocketAddr> {
        self.ca_addr
    }

    /// The configuration in force.
    pub fn config(&self) -> Arc<Loaded> {
        self.core.current.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How many clients are connected.
    pub fn connections(&self) -> usize {
        self.server.connections()
    }

    /// What happens from now on.
    pub fn events(&self) -> Events {
        Events { receiver: self.core.events.subscribe() }
    }

    /// Ends the streams of all clients and frees the port.
    pub async fn shutdown(self) {
        self.server.shutdown().await;
    }
}

impl Events {
    /// The next event; `None` after the control plane is gone. A receiver that lags misses the oldest.
    ///
    /// # Cancel safety
    /// No event is lost.
    pub async fn next(&mut self) -> Option<Event> {
        loop {
            match self.receiver.recv().await {
                Ok(event) => return Some(event),
                Err(broadcast::error::RecvError::Lagged(missed)) => tracing::debug!(missed, "events missed"),
                Err(broadcast::error::RecvError::Closed) => return None,
            }
        }
    }
}

impl Core {
    /// All or nothing; reports either as an event.
    pub(crate) fn apply(&self, sources: &[Source]) -> Result<u64, Error> {
        // Held to the end: what is served and what is in force change together.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let (loaded, resources) = match self.prepare(sources) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.reject(&error);
                return Err(error);
            }
        };
        for warning in &loaded.warnings {
            tracing::debug!("{warning}");
        }
        let version = self.cache.set(resources);
        let warnings = loaded.warnings.clone();
        *current = Arc::new(loaded);
        let _ = self.events.send(Event::Applied { version, warnings });
        Ok(version)
    }

    pub(crate) fn reject(&self, error: &Error) {
        let errors = match error {
            Error::Rejected(rejected) => rejected.errors.clone(),
            _ => Vec::new(),
        };
        let _ = self.events.send(Event::Rejected { reason: error.to_string(), errors });
    }

    fn prepare(&self, sources: &[Source]) -> Result<(Loaded, ResourceSet), Error> {
        let loaded = input::load(sources)?;
        if let Some(ca) = &self.ca {
            for service in &loaded.model.services {
                let namespace = &service.object.namespace;
                ca.ensure(namespace, "default")?;
                for account in service.endpoints.iter().filter_map(|e| e.service_account.as_deref()) {
                    ca.ensure(namespace, account)?;
                }
            }
        }
        let resources = self.resources(&loaded);
        Ok((loaded, resources))
    }

    fn resources(&self, loaded: &Loaded) -> ResourceSet {
        let mut resources = translate(&loaded.model, &self.options);
        if let Some(ca) = self.ca.as_ref().filter(|_| self.secrets) {
            ca::serve::secrets(ca, &mut resources);
        }
        resources.extend(self.raw.clone());
        resources
    }

    /// Serves the newest certificates.
    fn republish(&self) {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        self.cache.set(self.resources(&current));
    }
}

/// Starts the servers of the dev CA, and its renewal. Returns where it listens.
async fn authority(
    ca: &CertificateAuthority,
    addr: SocketAddr,
    core: &Arc<Core>,
    tasks: &mut JoinSet<()>,
) -> Result<SocketAddr, Error> {
    let cannot = |source| Error::Listen { addr, source };
    let listener = TcpListener::bind(addr).await.map_err(cannot)?;
    let addr = listener.local_addr().map_err(cannot)?;
    tasks.spawn(ca::serve::secure(listener, addr, ca.clone(), core.cache.clone())?);
    #[cfg(unix)]
    tasks.spawn(ca::serve::Sockets::open(ca.clone(), core.cache.clone())?.follow());
    tasks.spawn(ca.clone().renew());
    if core.secrets {
        let (mut news, core) = (ca.news(), core.clone());
        tasks.spawn(async move {
            while news.changed().await.is_ok() {
                core.republish();
            }
        });
    }
    Ok(addr)
}

async fn report_nacks(mut nacks: broadcast::Receiver<Nack>, events: broadcast::Sender<Event>) {
    loop {
        match nacks.recv().await {
            Ok(nack) => {
                let _ = events.send(Event::Nack(nack));
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {}
            Err(broadcast::error::RecvError::Closed) => return,
        }
    }
}

#[cfg(test)]
mod tests;
