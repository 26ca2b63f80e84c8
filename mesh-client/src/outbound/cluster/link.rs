//! What a cluster needs of a connection to one endpoint, so that it can be tested without a network.

use super::Breaker;
use mesh_xds::resource::Cluster;
use std::{error::Error, fmt, net::SocketAddr, sync::Arc, sync::Weak};

/// Why a link last failed to connect.
pub(crate) type LinkError = Arc<dyn Error + Send + Sync>;

/// State of a link, as gRPC's connectivity states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connectivity {
    /// Not connected; connects when it is first used.
    Idle,
    /// First attempt under way.
    Connecting,
    /// Usable.
    Ready,
    /// The last attempt failed. Stays so, through attempts made in the background, until one succeeds.
    TransientFailure,
}

/// The connection (or connections) to one endpoint.
pub(crate) trait Link: fmt::Debug + Send + Sync + Sized + 'static {
    /// Everything links of one cluster share: TLS, protocol, timeouts.
    type Connector: fmt::Debug + Send + Sync + 'static;

    /// Makes an idle link: no connection, no task. It tells `observer` of each change of state, holding no lock.
    fn open(address: SocketAddr, connector: &Arc<Self::Connector>, observer: Observer) -> Arc<Self>;

    /// The current state; called once or more per pick, so no more than an atomic load.
    fn connectivity(&self) -> Connectivity;

    /// The error of the last failed attempt, if the last attempt failed.
    fn last_error(&self) -> Option<LinkError>;

    /// No new requests come: connections close when those in flight end. Idempotent.
    fn drain(&self);
}

/// Makes the connector of a cluster, when the cluster comes and when its transport changes. Connections count against
/// the given breaker.
pub(crate) type ConnectorFactory<L> = Arc<dyn Fn(&Cluster, &Arc<Breaker>) -> Arc<<L as Link>::Connector> + Send + Sync>;

/// Is told of changes of state.
pub(crate) trait Observe: Send + Sync {
    /// A link has come to this state.
    fn link_changed(&self, state: Connectivity);
}

/// Where a link reports changes of state. Holds nothing alive.
#[derive(Clone)]
pub(crate) struct Observer(Weak<dyn Observe>);

impl Observer {
    /// Reports to `target` while it lives.
    pub(crate) fn new(target: Weak<dyn Observe>) -> Self {
        Self(target)
    }

    /// Says that the link came to `state`. Cheap; must be called without any lock of the link held.
    pub(crate) fn notify(&self, state: Connectivity) {
        if let Some(target) = self.0.upgrade() {
            target.link_changed(state);
        }
    }
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}
