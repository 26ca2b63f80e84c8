//! The xDS client: a handle that shares watched targets and stops its tasks when nobody uses it.

use crate::{
    ads::{Connect, Driver, Service},
    bootstrap::{Bootstrap, BootstrapError},
    graph::{Graph, Job, Published, TargetKey},
    resource::Extensions,
    source::{ResolverConfig, Resolvers, refresh},
    status::ClientStatus,
    watch::{SecretWatch, ServerWatch, TargetWatch, Watch},
};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};
use tokio::{
    runtime,
    sync::{Notify, watch},
};

/// A client of the control planes of one [`Bootstrap`]. Clones are handles to the same client; its tasks stop when the
/// last clone and the last [`TargetWatch`] are dropped.
#[derive(Clone)]
pub struct XdsClient {
    handle: Arc<Handle>,
}

/// What a client may be told besides its bootstrap.
#[derive(Clone, Debug, Default)]
pub struct ClientOptions {
    /// Types of the application.
    pub extensions: Extensions,
    /// Who resolves the names of DNS clusters; `None`: the system's configuration (`/etc/resolv.conf`). The hosts file is read either way.
    pub resolver: Option<ResolverConfig>,
    /// What the servers are asked. Of those that have secrets only nothing but [`XdsClient::watch_secret`] gets an answer.
    pub service: Service,
}

/// Lives as long as a client or a watch does.
struct Handle {
    shared: Arc<Shared>,
    /// The drivers end when this is dropped.
    _stop: watch::Sender<()>,
}

/// What the handles and the drivers have in common.
pub(crate) struct Shared {
    bootstrap: Arc<Bootstrap>,
    connect: Arc<dyn Connect>,
    extensions: Extensions,
    resolvers: Arc<Resolvers>,
    service: Service,
    graph: Mutex<Graph>,
    /// One per driver, by the server's index in the graph: "your subscriptions changed".
    drivers: Mutex<Vec<Arc<Notify>>>,
    runtime: runtime::Handle,
    stop: watch::Receiver<()>,
}

/// Unsubscribes when the watch is dropped.
struct Subscription {
    handle: Arc<Handle>,
    key: TargetKey,
}

impl XdsClient {
    /// A client that opens its connections through `connect`. Connects when something is watched.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn new(bootstrap: Arc<Bootstrap>, connect: Arc<dyn Connect>) -> Self {
        Self::with_options(bootstrap, connect, ClientOptions::default())
    }

    /// One that knows types of the application too, or resolves the names of DNS clusters in another way.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn with_options(bootstrap: Arc<Bootstrap>, connect: Arc<dyn Connect>, options: ClientOptions) -> Self {
        let (stop, stopped) = watch::channel(());
        for note in bootstrap.notes() {
            tracing::warn!("xDS bootstrap: {note}");
        }
        let shared = Shared {
            graph: Mutex::new(Graph::new(bootstrap.clone())),
            bootstrap,
            connect,
            extensions: options.extensions,
            resolvers: Arc::new(Resolvers::new(options.resolver)),
            service: options.service,
            drivers: Mutex::default(),
            runtime: runtime::Handle::current(),
            stop: stopped,
        };
        Self { handle: Arc::new(Handle { shared: Arc::new(shared), _stop: stop }) }
    }

    /// Watches `xds://authority/target`; `host` picks the virtual host. Equal names and hosts share one entry.
    ///
    /// # Errors
    /// The authority is not in the bootstrap.
    pub fn watch(&self, authority: Option<&str>, target: &str, host: &str) -> Result<TargetWatch, BootstrapError> {
        let name: Arc<str> = self.handle.shared.bootstrap.resource_name(authority, target)?.into();
        let key = TargetKey::Client { name: name.clone(), host: host.into() };
        Ok(self.subscribe(name, key))
    }

    /// Watches what a server that listens on `address` is to do (gRFC A36): the listener that the bootstrap's
    /// `server_listener_resource_name_template` names, with the routes of all its filter chains.
    ///
    /// # Errors
    /// The bootstrap has no such template.
    pub fn watch_server(&self, address: SocketAddr) -> Result<ServerWatch, BootstrapError> {
        let name = self.handle.shared.bootstrap.server_resource_name(&address.to_string());
        let name: Arc<str> = name.ok_or(BootstrapError::NoServerTemplate)?.into();
        let key = TargetKey::Server(name.clone());
        Ok(self.subscribe(name, key))
    }

    /// Watches a `Secret` by its name.
    pub fn watch_secret(&self, name: &str) -> SecretWatch {
        let name: Arc<str> = name.into();
        self.subscribe(name.clone(), TargetKey::Secret(name))
    }

    fn subscribe<S: Published>(&self, name: Arc<str>, key: TargetKey) -> Watch<S> {
        let state = self.handle.shared.graph(|graph| graph.watch(&key));
        Watch::new(name, state, Arc::new(Subscription { handle: self.handle.clone(), key }))
    }

    /// What the client knows: connections and resources.
    pub fn status(&self) -> ClientStatus {
        self.handle.shared.graph(|graph| graph.status())
    }

    /// The bootstrap it was made from.
    pub fn bootstrap(&self) -> &Arc<Bootstrap> {
        &self.handle.shared.bootstrap
    }
}

impl Shared {
    pub(crate) fn bootstrap(&self) -> &Arc<Bootstrap> {
        &self.bootstrap
    }

    pub(crate) fn connect(&self) -> &Arc<dyn Connect> {
        &self.connect
    }

    pub(crate) fn service(&self) -> Service {
        self.service
    }

    pub(crate) fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// The only way to the graph: whatever changed in the subscriptions reaches the drivers afterwards.
    pub(crate) fn graph<T>(self: &Arc<Self>, step: impl FnOnce(&mut Graph) -> T) -> T {
        let mut graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        let result = step(&mut graph);
        let changed = graph.take_changed();
        let jobs = graph.take_jobs();
        drop(graph);
        for server in changed {
            self.wake(server);
        }
        for job in jobs {
            self.resolve(&job);
        }
        result
    }

    /// Looks the names of a DNS cluster up again and again, each by itself, while a target uses the cluster.
    fn resolve(self: &Arc<Self>, job: &Job) {
        for (place, host) in job.discovery.names.iter().enumerate().filter(|(_, host)| host.parse::<IpAddr>().is_err())
        {
            let (shared, resolvers) = (Arc::downgrade(self), self.resolvers.clone());
            let (cluster, host, generation) = (job.cluster.clone(), host.clone(), job.generation);
            let (family, every) = (job.discovery.family, job.discovery.refresh);
            let (mut unused, mut stop) = (job.stop.clone(), self.stop.clone());
            self.runtime.spawn(async move {
                let tell = |found| {
                    let Some(shared) = shared.upgrade() else { return false };
                    shared.graph(|graph| graph.answered(&cluster, generation, place, found))
                };
                tokio::select! {
                    () = refresh(&host, family, every, &*resolvers, tell) => {}
                    _ = unused.changed() => {}
                    _ = stop.changed() => {}
                }
            });
        }
    }

    /// Tells a driver that its subscriptions changed; starts it if it does not run yet.
    fn wake(self: &Arc<Self>, server: usize) {
        let mut drivers = self.drivers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut started = Vec::new();
        while drivers.len() <= server {
            let changed = Arc::new(Notify::new());
            started.push((drivers.len(), changed.clone()));
            drivers.push(changed);
        }
        drivers[server].notify_one();
        drop(drivers);
        for (server, changed) in started {
            let driver = Driver::new(self.clone(), server);
            self.runtime.spawn(driver.run(changed, self.stop.clone()));
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        self.handle.shared.graph(|graph| graph.unwatch(&self.key));
    }
}

impl fmt::Debug for XdsClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XdsClient").field("servers", &self.handle.shared.bootstrap.servers).finish_non_exhaustive()
    }
}
