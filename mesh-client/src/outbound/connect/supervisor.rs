//! The task that sees one connection through: idle timeout, new certificates, the end.

use super::{Connector, Security, Subchannel, TlsRenewal, numbers::Closed};
use crate::{
    outbound::cluster::{Permit, Resource},
    time::{FAR, after},
    transport::{Connection, Kind},
};
use mesh_xds::resource::RoutingPriority;
use std::{
    net::SocketAddr,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout, timeout_at},
};

/// Between two attempts to replace a connection whose certificates changed.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);
/// The idle timeout is watched in this many steps.
const LOOKS: u32 = 4;

/// A connection and where it belongs.
pub(super) struct Supervised {
    pub(super) subchannel: Weak<Subchannel>,
    pub(super) connector: Arc<Connector>,
    pub(super) connection: Connection,
    pub(super) generation: u64,
    pub(super) address: SocketAddr,
}

/// Ends with the connection. Holds its `permit` so long. `retired` changes when the connection was drained because its endpoint is
/// not used any more: what is still open after the drain time is cut.
pub(super) async fn run(this: Supervised, permit: Option<Permit>, mut retired: watch::Receiver<()>) {
    let connection = &this.connection;
    let why = tokio::select! {
        () = connection.closed() => None,
        _ = retired.changed() => Some(Closed::Retired),
        () = this.idle() => Some(Closed::Idle),
        () = this.expired() => Some(Closed::Age),
        bound = this.outdated() => {
            // Boxed: the state of a handshake is large, and this task lives as long as its connection.
            Box::pin(this.renew(bound)).await;
            Some(Closed::Renewed)
        }
    };
    if matches!(why, Some(Closed::Idle | Closed::Age | Closed::Renewed)) {
        connection.drain();
    }
    tokio::select! {
        () = connection.closed() => {}
        () = this.drained_too_long(retired) => {
            connection.abort(Kind::DrainTimeout);
            connection.closed().await;
        }
    }
    this.connector.settings.numbers.closed(why.unwrap_or_else(|| Closed::Ended(connection.fate())));
    drop(permit);
}

impl Supervised {
    /// Returns when the connection carried nothing for the idle timeout.
    async fn idle(&self) {
        let limit = self.connector.settings.idle_timeout;
        if limit.is_zero() {
            return std::future::pending().await;
        }
        let (mut before, mut quiet) = (None, 0);
        loop {
            let now = (self.connection.in_flight() == 0).then(|| self.connection.started());
            quiet = if now.is_some() && now == before { quiet + 1 } else { 0 };
            if quiet == LOOKS {
                return;
            }
            before = now;
            sleep(limit / LOOKS).await;
        }
    }

    /// Returns when the connection is as old as it may become.
    async fn expired(&self) {
        let settings = &self.connector.settings;
        match settings.max_duration {
            None => std::future::pending().await,
            Some(max) => {
                let max = max.min(FAR);
                sleep(max + max.mul_f64(settings.max_duration_jitter * fastrand::f64())).await;
            }
        }
    }

    /// Returns when the drain time is over since the connection was retired.
    async fn drained_too_long(&self, mut retired: watch::Receiver<()>) {
        // An error says so too: the sender is gone.
        let _ = retired.changed().await;
        let never = std::future::pending::<()>();
        // The longest sleep is as good as none.
        let _ = timeout(self.connector.settings.drain_timeout, never).await;
    }

    /// Returns when there are newer certificates than the connection's, and how long it may live on.
    async fn outdated(&self) -> Duration {
        let settings = &self.connector.settings;
        let (Security::Tls(tls), TlsRenewal::Within(bound)) = (&settings.security, settings.renewal) else {
            return std::future::pending().await;
        };
        let mut generations = tls.generations();
        while tls.generation() <= self.generation {
            generations.changed().await;
        }
        bound
    }

    /// Puts a connection with the new certificates beside this one, if that works within the bound.
    async fn renew(&self, bound: Duration) {
        let bound = after(Instant::now(), bound);
        let attempts = async {
            loop {
                let Some(subchannel) = self.subchannel.upgrade() else { return };
                let listener = subchannel.listener();
                drop(subchannel);
                match self.connector.open(self.address, listener).await {
                    Ok(opened) => {
                        let breaker = self.connector.breaker.as_ref();
                        let permit = breaker
                            .and_then(|breaker| breaker.acquire(RoutingPriority::Default, Resource::Connections).ok());
                        match self.subchannel.upgrade() {
                            Some(subchannel) => subchannel.add(opened, permit, false),
                            None => opened.connection.drain(),
                        }
                        return;
                    }
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "new certificates do not connect");
                        sleep(RENEWAL_PAUSE).await;
                    }
                }
            }
        };
        tokio::select! {
            () = self.connection.closed() => {}
            _ = timeout_at(bound, attempts) => {}
        }
    }
}
