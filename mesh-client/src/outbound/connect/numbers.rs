//! What is counted of the connections of one cluster. Handles are resolved when its configuration changes.

use super::ConnectError;
use crate::{
    telemetry::metrics::{Instrument, Metrics},
    transport::Fate,
};
use metrics::{Counter, Gauge, SharedString, counter, gauge};
use std::{fmt, sync::Arc};

/// The handles.
#[derive(Clone)]
pub(crate) struct Numbers(Arc<Handles>);

struct Handles {
    cluster: SharedString,
    active: Gauge,
    opened: Counter,
    /// gRPC's: attempts that succeeded and failed.
    succeeded: [Option<Counter>; 2],
    failed: [Option<Counter>; 2],
    open: Option<Gauge>,
    /// Whose, for gRPC's.
    target: SharedString,
    on: Metrics,
    pick_first: bool,
}

/// Why a connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Closed {
    /// It carried nothing for the idle timeout.
    Idle,
    /// It was as old as it may become.
    Age,
    /// It was replaced by one with newer certificates.
    Renewed,
    /// Its endpoint was removed or is not well, or nobody uses the cluster any more.
    Retired,
    /// By the peer or the network.
    Ended(Fate),
}

impl Numbers {
    /// Of the cluster of this name. `target`: who used it first, for gRPC's instruments that are `on`.
    pub(crate) fn new(cluster: &str, target: &str, pick_first: bool, on: Metrics) -> Self {
        let (cluster, target) = (SharedString::from(cluster.to_owned()), SharedString::from(target.to_owned()));
        let counters = |own: Instrument, first: Instrument| {
            let labels = [("grpc.target", target.clone()), ("grpc.lb.backend_service", cluster.clone())];
            [
                on.has(own).then(|| counter!(own.name(), &labels)),
                (pick_first && on.has(first)).then(|| counter!(first.name(), "grpc.target" => target.clone())),
            ]
        };
        let open = Instrument::SubchannelOpenConnections;
        Self(Arc::new(Handles {
            active: gauge!("mesh_connections_active", "cluster" => cluster.clone()),
            opened: counter!("mesh_connections_opened_total", "cluster" => cluster.clone()),
            succeeded: counters(Instrument::SubchannelAttemptsSucceeded, Instrument::PickFirstAttemptsSucceeded),
            failed: counters(Instrument::SubchannelAttemptsFailed, Instrument::PickFirstAttemptsFailed),
            open: on.has(open).then(|| {
                let labels = [("grpc.target", target.clone()), ("grpc.lb.backend_service", cluster.clone())];
                gauge!(open.name(), &labels)
            }),
            cluster,
            target,
            on,
            pick_first,
        }))
    }

    /// A connection was made.
    pub(super) fn opened(&self) {
        self.0.opened.increment(1);
        self.0.active.increment(1.0);
        self.0.succeeded.iter().flatten().for_each(|counter| counter.increment(1));
        self.0.open.iter().for_each(|gauge| gauge.increment(1.0));
    }

    /// None was.
    pub(super) fn failed(&self, error: &ConnectError) {
        let stage = match error {
            ConnectError::Tcp { .. } => "tcp",
            ConnectError::Tls { .. } => "tls",
            ConnectError::Settings { .. } => "settings",
            ConnectError::Http { .. } => "http",
            ConnectError::Timeout { .. } => "timeout",
            ConnectError::Removed { .. } => return,
        };
        counter!("mesh_connection_failures_total", "cluster" => self.0.cluster.clone(), "stage" => stage).increment(1);
        self.0.failed.iter().flatten().for_each(|counter| counter.increment(1));
    }

    /// One that was made ended.
    pub(super) fn closed(&self, why: Closed) {
        let handles = &self.0;
        handles.active.decrement(1.0);
        let cause = why.as_str();
        counter!("mesh_connections_closed_total", "cluster" => handles.cluster.clone(), "cause" => cause).increment(1);
        handles.open.iter().for_each(|gauge| gauge.decrement(1.0));
        if handles.on.has(Instrument::SubchannelDisconnections) {
            let labels = [
                ("grpc.target", handles.target.clone()),
                ("grpc.lb.backend_service", handles.cluster.clone()),
                ("grpc.disconnect_error", why.disconnect_error()),
            ];
            counter!(Instrument::SubchannelDisconnections.name(), &labels).increment(1);
        }
        if handles.pick_first && handles.on.has(Instrument::PickFirstDisconnections) {
            counter!(Instrument::PickFirstDisconnections.name(), "grpc.target" => handles.target.clone()).increment(1);
        }
    }
}

impl Closed {
    fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Age => "max_duration",
            Self::Renewed => "certificates",
            Self::Retired => "retired",
            Self::Ended(Fate::GoAway(_)) => "goaway",
            Self::Ended(Fate::Requests) => "max_requests",
            Self::Ended(Fate::Silent) => "keepalive",
            Self::Ended(Fate::Cut) => "cut",
            Self::Ended(Fate::Reset | Fate::TimedOut | Fate::Aborted | Fate::Socket) => "socket",
            Self::Ended(Fate::Unknown) => "closed",
        }
    }

    /// gRFC A94's word.
    fn disconnect_error(self) -> SharedString {
        match self {
            Self::Idle | Self::Age | Self::Renewed | Self::Retired | Self::Ended(Fate::Requests | Fate::Cut) => {
                "subchannel shutdown".into()
            }
            Self::Ended(Fate::GoAway(reason)) => format!("GOAWAY {}", name(reason)).into(),
            Self::Ended(Fate::Reset) => "connection reset".into(),
            Self::Ended(Fate::TimedOut | Fate::Silent) => "connection timed out".into(),
            Self::Ended(Fate::Aborted) => "connection aborted".into(),
            Self::Ended(Fate::Socket) => "socket error".into(),
            Self::Ended(Fate::Unknown) => "unknown".into(),
        }
    }
}

/// As RFC 9113 section 7 names it.
fn name(reason: h2::Reason) -> String {
    const NAMES: [&str; 14] = [
        "NO_ERROR",
        "PROTOCOL_ERROR",
        "INTERNAL_ERROR",
        "FLOW_CONTROL_ERROR",
        "SETTINGS_TIMEOUT",
        "STREAM_CLOSED",
        "FRAME_SIZE_ERROR",
        "REFUSED_STREAM",
        "CANCEL",
        "COMPRESSION_ERROR",
        "CONNECT_ERROR",
        "ENHANCE_YOUR_CALM",
        "INADEQUATE_SECURITY",
        "HTTP_1_1_REQUIRED",
    ];
    let code = u32::from(reason);
    let known = usize::try_from(code).ok().and_then(|code| NAMES.get(code));
    known.map_or_else(|| code.to_string(), |name| (*name).to_owned())
}

impl Default for Numbers {
    fn default() -> Self {
        Self::new("", "", false, Metrics::default())
    }
}

impl fmt::Debug for Numbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Numbers").finish_non_exhaustive()
    }
}
