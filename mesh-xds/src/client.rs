//! The xDS client: a handle that shares watched targets and stops its tasks when nobody uses it.

use crate::{
    ads::{Connect, Driver},
    bootstrap::{Bootstrap, BootstrapError},
    graph::{Graph, TargetKey},
    resource::Extensions,
    status::ClientStatus,
    watch::TargetWatch,
};
use std::{
    fmt,
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
        Self::with_extensions(bootstrap, connect, Extensions::default())
    }

    /// One that knows types of the application too.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn with_extensions(bootstrap: Arc<Bootstrap>, connect: Arc<dyn Connect>, extensions: Extensions) -> Self {
        let (stop, stopped) = watch::channel(());
        for note in bootstrap.notes() {
            tracing::warn!("xDS bootstrap: {note}");
        }
        let shared = Shared {
            graph: Mutex::new(Graph::new(bootstrap.clone())),
            bootstrap,
            connect,
            extensions,
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
        let key = (name.clone(), Arc::from(host));
        let state = self.handle.shared.graph(|graph| graph.watch(&key));
        Ok(TargetWatch::new(name, state, Arc::new(Subscription { handle: self.handle.clone(), key })))
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

    pub(crate) fn extensions(&self) -> &Extensions {
        &self.extensions
    }

    /// The only way to the graph: whatever changed in the subscriptions reaches the drivers afterwards.
    pub(crate) fn graph<T>(self: &Arc<Self>, step: impl FnOnce(&mut Graph) -> T) -> T {
        let mut graph = self.graph.lock().unwrap_or_else(PoisonError::into_inner);
        let result = step(&mut graph);
        let changed = graph.take_changed();
        drop(graph);
        for server in changed {
            self.wake(server);
        }
        result
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
