//! The one task per control plane: pumps events into the core and carries out its actions. Decides nothing.

use super::{
    connection::{Connection, dial},
    sotw,
    state::{Action, Event, State},
    telemetry::Telemetry,
};
use crate::{
    bootstrap::ServerConfig,
    client::Shared,
    resource::{Decoder, ResourceType},
};
use envoy_types::pb::envoy::{config::core::v3::Node, service::discovery::v3::DiscoveryResponse};
use futures::future::BoxFuture;
use std::{future::pending, sync::Arc, time::SystemTime};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

/// The conversation with one control plane.
pub(crate) struct Driver {
    shared: Arc<Shared>,
    /// Index of the server in the graph.
    server: usize,
    config: ServerConfig,
    node: Node,
    state: State,
    link: Link,
    telemetry: Telemetry,
}

enum Link {
    Down,
    Connecting(BoxFuture<'static, Result<Connection, String>>),
    Open(Connection),
}

enum Happened {
    Connected(Result<Connection, String>),
    Message(Result<Option<DiscoveryResponse>, String>),
}

impl Driver {
    pub(crate) fn new(shared: Arc<Shared>, server: usize) -> Self {
        let config = shared.graph(|graph| graph.server(server).clone());
        Self {
            server,
            node: sotw::encode_node(&shared.bootstrap().node, shared.service()),
            state: State::new(config.features, &shared.bootstrap().timing, fastrand::Rng::new()),
            link: Link::Down,
            telemetry: Telemetry::new(&config.uri),
            config,
            shared,
        }
    }

    /// Runs until the sender of `stop` is dropped. `changed` says that the subscriptions may have changed.
    pub(crate) async fn run(mut self, changed: Arc<Notify>, mut stop: watch::Receiver<()>) {
        loop {
            self.subscribe();
            let timeout = self.state.next_timeout();
            tokio::select! {
                // Only ever an error: the sender is gone.
                _ = stop.changed() => return,
                () = changed.notified() => {}
                happened = self.link.next() => self.happened(happened),
                () = async { match timeout { Some(at) => sleep_until(at).await, None => pending().await } } => {
                    self.event(Event::Tick);
                }
            }
        }
    }

    /// Tells the core what is wanted now.
    fn subscribe(&mut self) {
        let server = self.server;
        let wanted = self.shared.graph(|graph| ResourceType::ALL.map(|kind| (kind, graph.wanted(server, kind))));
        for (kind, names) in wanted {
            self.event(Event::Wanted(kind, names));
        }
    }

    fn event(&mut self, event: Event) {
        for action in self.state.handle(event, Instant::now()) {
            self.act(action);
        }
    }

    fn act(&mut self, action: Action) {
        let server = self.server;
        match action {
            Action::Connect => {
                let timing = self.shared.bootstrap().timing.clone();
                let dial = dial(self.shared.connect().clone(), self.config.clone(), timing, self.shared.service());
                self.link = Link::Connecting(Box::pin(dial));
            }
            Action::Disconnect => {
                tracing::debug!(server = &*self.config.uri, "xDS stream closed: nothing is subscribed");
                self.link = Link::Down;
                self.connected(false);
            }
            Action::Send(request) => {
                if let Link::Open(connection) = &self.link {
                    tracing::debug!(
                        server = &*self.config.uri,
                        kind = %request.kind,
                        version = &*request.version,
                        names = request.names.len(),
                        rejects = request.error.as_deref(),
                        "xDS request"
                    );
                    connection.send(sotw::encode(request, &self.node));
                }
            }
            Action::Absent(kind, name, absence) => self.shared.graph(|graph| graph.absent(kind, &name, absence)),
            Action::Missing(name) => self.shared.graph(|graph| graph.missing(&name)),
            Action::Unreachable(error) => {
                self.telemetry.failure();
                self.shared.graph(|graph| graph.reachable(server, Some(error)));
            }
            Action::Reachable => self.shared.graph(|graph| graph.reachable(server, None)),
        }
    }

    fn connected(&mut self, connected: bool) {
        let server = self.server;
        self.telemetry.connected(connected);
        self.shared.graph(|graph| graph.connected(server, connected));
    }

    fn happened(&mut self, happened: Happened) {
        match happened {
            Happened::Connected(Ok(connection)) => {
                tracing::info!(server = &*self.config.uri, "connected to the control plane");
                self.link = Link::Open(connection);
                self.connected(true);
                self.event(Event::Connected);
            }
            Happened::Message(Ok(Some(response))) => self.response(response),
            Happened::Connected(Err(error)) | Happened::Message(Err(error)) => self.closed(error),
            Happened::Message(Ok(None)) => self.closed("the control plane ended the stream".to_owned()),
        }
    }

    fn closed(&mut self, error: String) {
        tracing::warn!(server = &*self.config.uri, "no connection to the control plane: {error}");
        self.link = Link::Down;
        self.connected(false);
        self.event(Event::Closed(error.into()));
    }

    fn response(&mut self, response: DiscoveryResponse) {
        let Some(kind) = ResourceType::from_type_url(&response.type_url) else {
            tracing::warn!(server = &*self.config.uri, type_url = response.type_url, "xDS response of unknown type");
            return;
        };
        let names = sotw::names(kind, &response);
        let wanted = self.shared.graph(|graph| {
            let find = |name: Option<String>| {
                let (name, entry) = graph.entry(kind, &name?)?;
                Some((name.clone(), entry.accepted().cloned()))
            };
            names.into_iter().map(find).collect()
        });
        let mut decoder = Decoder::new(&self.shared.bootstrap().certificate_providers)
            .with_services(&self.shared.bootstrap().allowed_grpc_services)
            .with_extensions(self.shared.extensions())
            .trusted(self.config.features.trusted_xds_server);
        let decoded = sotw::decode(kind, response, wanted, &mut decoder);
        let version = decoded.response.version.clone();
        tracing::debug!(
            server = &*self.config.uri,
            %kind,
            version = &*version,
            resources = decoded.verdicts.len(),
            error = decoded.response.error.as_deref(),
            "xDS response"
        );
        for (_, verdict) in &decoded.verdicts {
            self.telemetry.update(kind, !matches!(verdict, sotw::Verdict::Rejected(_)));
        }
        let server = self.server;
        let actions = self.state.handle(Event::Response(decoded.response), Instant::now());
        self.shared.graph(|graph| graph.apply(server, kind, &version, decoded.verdicts, SystemTime::now()));
        for action in actions {
            self.act(action);
        }
        // The dependants first, then the ACK.
        self.subscribe();
        self.event(Event::Applied(kind));
    }
}

impl Link {
    /// Cancel safe: what it waits for lives in `self`.
    async fn next(&mut self) -> Happened {
        match self {
            Self::Down => pending().await,
            Self::Connecting(dial) => Happened::Connected(dial.await),
            Self::Open(connection) => Happened::Message(connection.next().await),
        }
    }
}
