//! What a cluster needs of a connection to one endpoint, so that it can be tested without a network.

use super::{Breaker, CheckTarget, Ended, Failed, Report, orca};
use crate::outbound::connect::{Connector, Demand, Foresight, Kept, Said, Subchannel};
use mesh_xds::resource::Cluster;
use std::{error::Error, fmt, net::SocketAddr, pin::Pin, sync::Arc, time::Duration};
use tokio::sync::watch;

pub(crate) use crate::outbound::connect::Connectivity;

/// Why a link last failed to connect.
pub(crate) type LinkError = Arc<dyn Error + Send + Sync>;

/// Makes the connector of a cluster, when the cluster comes and when its transport changes. Connections count against
/// the given breaker.
pub(crate) type ConnectorFactory<L> = Arc<dyn Fn(&Cluster, &Arc<Breaker>) -> Arc<<L as Link>::Connector> + Send + Sync>;

/// The connection (or connections) to one endpoint.
pub(crate) trait Link: fmt::Debug + Send + Sync + Sized + 'static {
    /// What the links of one cluster share: TLS, protocol, timeouts.
    type Connector: fmt::Debug + Send + Sync + 'static;

    /// What is kept of one health check for the next: its connection.
    type Kept: Default + Send + 'static;

    /// Makes an idle link: no connection, no task.
    fn open(address: SocketAddr, connector: &Arc<Self::Connector>) -> Arc<Self>;

    /// The connector for an endpoint of which this is said: that of the cluster, or a variant of it.
    fn variant(connector: &Arc<Self::Connector>, _: Said<'_>) -> Arc<Self::Connector> {
        connector.clone()
    }

    /// Whether endpoints at one address of which this and that is said are connected to in different ways.
    fn differ(_: &Self::Connector, _: Said<'_>, _: Said<'_>) -> bool {
        false
    }

    /// Changes after the state of a link of this connector, or of a variant of it, did.
    fn changes(connector: &Self::Connector) -> watch::Receiver<u64>;

    /// The state now: an atomic load. A link that failed is in `TransientFailure`, through the attempts that it makes by
    /// itself, until one succeeds.
    fn connectivity(&self) -> Connectivity;

    /// The error of the last attempt, if it failed.
    fn last_error(&self) -> Option<LinkError>;

    /// No new requests come: connections close when those in flight end. Idempotent.
    fn drain(&self);

    /// A request has needed a connection of this connector.
    fn is_used(connector: &Self::Connector) -> bool;

    /// Asks an endpoint how it is.
    fn check<'a>(
        connector: &'a Arc<Self::Connector>,
        target: &'a CheckTarget,
        kept: &'a mut Self::Kept,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failed>> + Send + 'a>>;

    /// The endpoint was found unhealthy: connections close now, if the cluster says so; or, if `drain`, when their requests end.
    /// The next request connects again.
    fn unhealthy(&self, drain: bool);

    /// What a cluster of this connector foresees; `None`: nothing.
    fn foresight(_: &Self::Connector) -> Option<Foresight> {
        None
    }

    /// Streams, and room for them.
    fn demand(&self) -> Demand {
        Demand::default()
    }

    /// Makes one more connection, for requests that are to be expected.
    fn foresee(&self) {}

    /// Follows the load reports of the endpoint (gRFC A51) on a connection that is there, until they end.
    fn reports(
        &self,
        address: SocketAddr,
        period: Duration,
        take: impl Fn(&Report) + Send + Sync,
    ) -> impl Future<Output = Ended> + Send;
}

impl Link for Subchannel {
    type Connector = Connector;
    type Kept = Kept;

    fn open(address: SocketAddr, connector: &Arc<Connector>) -> Arc<Self> {
        Self::new(address, connector.clone())
    }

    fn variant(connector: &Arc<Connector>, said: Said<'_>) -> Arc<Connector> {
        connector.variant(said)
    }

    fn differ(connector: &Connector, before: Said<'_>, now: Said<'_>) -> bool {
        connector.differ(before, now)
    }

    fn changes(connector: &Connector) -> watch::Receiver<u64> {
        connector.subscribe()
    }

    fn connectivity(&self) -> Connectivity {
        self.state()
    }

    fn last_error(&self) -> Option<LinkError> {
        Self::last_error(self).map(|error| error as LinkError)
    }

    fn drain(&self) {
        Self::drain(self);
    }

    fn is_used(connector: &Connector) -> bool {
        connector.is_used()
    }

    fn check<'a>(
        connector: &'a Arc<Connector>,
        target: &'a CheckTarget,
        kept: &'a mut Kept,
    ) -> Pin<Box<dyn Future<Output = Result<(), Failed>> + Send + 'a>> {
        Box::pin(connector.check(target, kept))
    }

    fn unhealthy(&self, drain: bool) {
        Self::unhealthy(self, drain);
    }

    fn foresight(connector: &Connector) -> Option<Foresight> {
        connector.foresight()
    }

    fn demand(&self) -> Demand {
        Self::demand(self)
    }

    fn foresee(&self) {
        Self::foresee(self);
    }

    async fn reports(&self, address: SocketAddr, period: Duration, take: impl Fn(&Report) + Send + Sync) -> Ended {
        orca::follow(self, address, period, take).await
    }
}
