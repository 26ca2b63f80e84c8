//! The protocol core of state-of-the-world ADS: `(Event, now) -> Actions`, without I/O and without a clock.
//!
//! It knows which names are subscribed and where each stands, versions and nonces, timers and the reconnect delay. It does
//! not know what a resource is. The driver carries out the actions and reports what happened as events.

use super::backoff::Backoff;
use crate::{
    bootstrap::{ServerFeatures, Timing},
    resource::ResourceType,
};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    sync::Arc,
    time::Duration,
};
use tokio::time::Instant;

/// A stream without subscriptions is closed after this time.
const LINGER: Duration = Duration::from_secs(10);
/// How long a name that was just subscribed may be missing from full responses before that says something: a response can
/// cross the request on the wire. Then a listener counts as absent, a cluster only as missing: the resource timer (gRFC A57)
/// decides on it, as on everything for which no response comes.
const CROSSING: Duration = Duration::from_millis(250);

/// What happened.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// These are all the names wanted of a type.
    Wanted(ResourceType, BTreeSet<Arc<str>>),
    /// The stream is open, or at least the connection is: requests can be sent.
    Connected,
    /// A response came and was validated.
    Response(Response),
    /// What the last response of the type said is applied and its dependants are wanted: it can be acknowledged.
    Applied(ResourceType),
    /// The connection attempt failed or the stream ended.
    Closed(Arc<str>),
    /// A timer may be due.
    Tick,
}

/// A validated response.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) kind: ResourceType,
    pub(crate) version: Arc<str>,
    pub(crate) nonce: Arc<str>,
    /// Names of the resources in it, good or bad.
    pub(crate) received: HashSet<Arc<str>>,
    /// Names the control plane says do not exist.
    pub(crate) absent: Vec<Arc<str>>,
    /// A resource could not even be named, so absence proves nothing.
    pub(crate) unnamed: bool,
    /// All errors of the response: not acknowledged.
    pub(crate) error: Option<Arc<str>>,
}

/// What to do.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Action {
    /// Open a connection and a stream; answer with `Connected` or `Closed`.
    Connect,
    /// Drop the stream; no `Closed` is expected.
    Disconnect,
    /// Send a request on the stream.
    Send(Request),
    /// The control plane has no such resource.
    Absent(ResourceType, Arc<str>, Absence),
    /// A cluster that is not in the answers to its subscription so far. Its timer runs on.
    Missing(Arc<str>),
    /// The control plane could not be reached, or the stream ended without any response (gRFC A57).
    Unreachable(Arc<str>),
    /// The first response of a stream came.
    Reachable,
}

/// How a resource turned out not to exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Absence {
    /// Is left out of a full response (LDS, CDS) to a subscription that names it, or the control plane said so.
    Removed,
    /// Not sent in time (gRFC A57).
    TimedOut,
    /// Not sent in time, by a server for which this is transient (gRFC A88).
    Transient,
}

/// A DiscoveryRequest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Request {
    pub(crate) kind: ResourceType,
    /// Last accepted version of the type.
    pub(crate) version: Arc<str>,
    /// Nonce of the last response on this stream.
    pub(crate) nonce: Arc<str>,
    pub(crate) names: Vec<Arc<str>>,
    /// Rejects the response of that nonce.
    pub(crate) error: Option<Arc<str>>,
    /// The first request of the stream carries the node.
    pub(crate) with_node: bool,
}

/// The state of the conversation with one control plane.
#[derive(Debug)]
pub(crate) struct State {
    features: ServerFeatures,
    resource_timeout: Duration,
    backoff_base: Duration,
    backoff: Backoff,
    rng: fastrand::Rng,
    phase: Phase,
    last_attempt: Option<Instant>,
    /// Since when nothing is wanted.
    idle_since: Option<Instant>,
    types: BTreeMap<ResourceType, TypeState>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Phase {
    /// Nothing is wanted.
    Idle,
    Waiting {
        until: Instant,
    },
    Connecting,
    Live {
        node_sent: bool,
        answered: bool,
    },
}

#[derive(Debug, Default)]
struct TypeState {
    names: BTreeMap<Arc<str>, Standing>,
    /// What the last request of this stream named; `None`: no request yet.
    sent: Option<BTreeSet<Arc<str>>>,
    version: Arc<str>,
    nonce: Arc<str>,
    /// A response waits for its ACK or NACK.
    reply: Option<Reply>,
}

#[derive(Clone, Debug)]
struct Reply {
    version: Arc<str>,
    error: Option<Arc<str>>,
}

/// Where a wanted name stands.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Standing {
    /// Not received yet; the timer runs while the subscription is on a live stream.
    Requested { deadline: Option<Instant>, left_out: LeftOut },
    /// Received, good or bad.
    Received,
    /// Does not exist.
    Absent,
}

/// Whether full responses that came after a subscription had the name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum LeftOut {
    /// None came.
    No,
    /// They did not; that counts from then on.
    Since(Instant),
    /// They did not, and the graph knows.
    Told,
}

impl State {
    pub(crate) fn new(features: ServerFeatures, timing: &Timing, rng: fastrand::Rng) -> Self {
        let default = if features.resource_timer_is_transient_error { 30 } else { 15 };
        Self {
            features,
            resource_timeout: timing.resource_timeout.unwrap_or(Duration::from_secs(default)),
            backoff_base: timing.backoff_base,
            backoff: Backoff::new(timing.backoff_base, timing.backoff_max),
            rng,
            phase: Phase::Idle,
            last_attempt: None,
            idle_since: None,
            types: ResourceType::ALL.into_iter().map(|kind| (kind, TypeState::default())).collect(),
        }
    }

    /// The only way in.
    pub(crate) fn handle(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let mut actions = Vec::new();
        match event {
            Event::Wanted(kind, names) => self.wanted(kind, &names, now, &mut actions),
            Event::Connected => self.connected(now, &mut actions),
            Event::Response(response) => self.response(response, now, &mut actions),
            Event::Applied(kind) => self.applied(kind, now, &mut actions),
            Event::Closed(error) => self.closed(error, now, &mut actions),
            Event::Tick => self.tick(now, &mut actions),
        }
        actions
    }

    /// When the next `Tick` is due.
    pub(crate) fn next_timeout(&self) -> Option<Instant> {
        let reconnect = match self.phase {
            Phase::Waiting { until } => Some(until),
            _ => None,
        };
        let idle = match self.phase {
            Phase::Live { .. } => self.idle_since.map(|since| since + LINGER),
            _ => None,
        };
        let names = self.types.values().flat_map(|state| state.names.values()).filter_map(Standing::due);
        names.chain(reconnect).chain(idle).min()
    }

    fn entry(&mut self, kind: ResourceType) -> &mut TypeState {
        self.types.entry(kind).or_default()
    }

    fn wants_nothing(&self) -> bool {
        self.types.values().all(|state| state.names.is_empty())
    }

    fn wanted(&mut self, kind: ResourceType, names: &BTreeSet<Arc<str>>, now: Instant, actions: &mut Vec<Action>) {
        let state = self.entry(kind);
        if state.names.len() == names.len() && names.iter().all(|name| state.names.contains_key(name)) {
            return;
        }
        state.names.retain(|name, _| names.contains(name));
        for name in names {
            state.names.entry(name.clone()).or_insert(Standing::Requested { deadline: None, left_out: LeftOut::No });
        }
        let replying = state.reply.is_some();
        let idle = self.wants_nothing();
        self.idle_since = idle.then_some(now);
        match self.phase {
            Phase::Idle if !idle => self.connect(now, actions),
            Phase::Waiting { .. } if idle => self.phase = Phase::Idle,
            // The reply to a waiting response carries the new names.
            Phase::Live { .. } if !replying => self.subscribe(kind, now, actions),
            _ => {}
        }
    }

    fn connect(&mut self, now: Instant, actions: &mut Vec<Action>) {
        self.phase = Phase::Connecting;
        self.last_attempt = Some(now);
        actions.push(Action::Connect);
    }

    fn connected(&mut self, now: Instant, actions: &mut Vec<Action>) {
        if self.phase != Phase::Connecting {
            return;
        }
        self.phase = Phase::Live { node_sent: false, answered: false };
        for kind in ResourceType::ALL {
            self.subscribe(kind, now, actions);
        }
    }

    /// Sends the subscription of the type if it differs from what was sent.
    ///
    /// An empty list as the first request of a type would be a wildcard subscription (LDS, CDS), so it is never sent; after
    /// names were sent it unsubscribes from all of them.
    fn subscribe(&mut self, kind: ResourceType, now: Instant, actions: &mut Vec<Action>) {
        let state = self.entry(kind);
        let unchanged = match &state.sent {
            None => state.names.is_empty(),
            Some(sent) => sent.len() == state.names.len() && state.names.keys().all(|name| sent.contains(name)),
        };
        if !unchanged {
            self.send(kind, None, now, actions);
        }
    }

    fn send(&mut self, kind: ResourceType, error: Option<Arc<str>>, now: Instant, actions: &mut Vec<Action>) {
        let Phase::Live { node_sent, .. } = &mut self.phase else { return };
        let with_node = !std::mem::replace(node_sent, true);
        let deadline = now + self.resource_timeout;
        let state = self.types.entry(kind).or_default();
        state.sent = Some(state.names.keys().cloned().collect());
        for standing in state.names.values_mut() {
            if let Standing::Requested { deadline: timer @ None, .. } = standing {
                *timer = Some(deadline);
            }
        }
        actions.push(Action::Send(Request {
            kind,
            version: state.version.clone(),
            nonce: state.nonce.clone(),
            names: state.names.keys().cloned().collect(),
            error,
            with_node,
        }));
    }

    fn response(&mut self, response: Response, now: Instant, actions: &mut Vec<Action>) {
        let Phase::Live { answered, .. } = &mut self.phase else { return };
        if !std::mem::replace(answered, true) {
            self.backoff.reset();
            actions.push(Action::Reachable);
        }
        let kind = response.kind;
        let keep_deleted = self.features.ignore_resource_deletion || response.unnamed;
        let state = self.types.entry(kind).or_default();
        // A type that was never asked for on this stream gets no reply: the reply would be a wildcard subscription.
        if state.sent.is_none() {
            return;
        }
        state.nonce = response.nonce;
        state.reply = Some(Reply { version: response.version, error: response.error });
        for name in &response.received {
            if let Some(standing) = state.names.get_mut(name) {
                *standing = Standing::Received;
            }
        }
        for (name, standing) in &mut state.names {
            let left_out = kind.is_full_state()
                && !keep_deleted
                && *standing == Standing::Received
                && !response.received.contains(name);
            // The response may have crossed the request on the wire; the answer to the request is not far behind it.
            if let Standing::Requested { deadline: Some(_), left_out: left_out @ LeftOut::No } = standing
                && kind.is_full_state()
                && !response.unnamed
            {
                *left_out = LeftOut::Since(now + CROSSING);
            }
            let said = *standing != Standing::Absent && response.absent.contains(name);
            if left_out || said {
                *standing = Standing::Absent;
                actions.push(Action::Absent(kind, name.clone(), Absence::Removed));
            }
        }
    }

    fn applied(&mut self, kind: ResourceType, now: Instant, actions: &mut Vec<Action>) {
        let state = self.entry(kind);
        let Some(reply) = state.reply.take() else { return };
        if reply.error.is_none() {
            state.version = reply.version;
        }
        self.send(kind, reply.error, now, actions);
    }

    fn closed(&mut self, error: Arc<str>, now: Instant, actions: &mut Vec<Action>) {
        let answered = match self.phase {
            Phase::Connecting => false,
            Phase::Live { answered, .. } => answered,
            Phase::Idle | Phase::Waiting { .. } => return,
        };
        self.forget_stream();
        if !answered {
            actions.push(Action::Unreachable(error));
        }
        if self.wants_nothing() {
            self.phase = Phase::Idle;
            return;
        }
        let until = if answered {
            // At once, but not more often than the base delay.
            self.last_attempt.map_or(now, |last| now.max(last + self.backoff_base))
        } else {
            now + self.backoff.next(&mut self.rng)
        };
        if until <= now { self.connect(now, actions) } else { self.phase = Phase::Waiting { until } }
    }

    /// Timers run only while the subscription is on a live stream (gRFC A57); nonces belong to a stream.
    fn forget_stream(&mut self) {
        for state in self.types.values_mut() {
            state.sent = None;
            state.nonce = Arc::default();
            state.reply = None;
            for standing in state.names.values_mut() {
                if let Standing::Requested { deadline, left_out } = standing {
                    *left_out = LeftOut::No;
                    *deadline = None;
                }
            }
        }
    }

    fn tick(&mut self, now: Instant, actions: &mut Vec<Action>) {
        match self.phase {
            Phase::Waiting { until } if until <= now => self.connect(now, actions),
            Phase::Live { .. } if self.idle_since.is_some_and(|since| since + LINGER <= now) => {
                self.forget_stream();
                self.phase = Phase::Idle;
                actions.push(Action::Disconnect);
            }
            _ => {}
        }
        let absence =
            if self.features.resource_timer_is_transient_error { Absence::Transient } else { Absence::TimedOut };
        for (kind, state) in &mut self.types {
            for (name, standing) in &mut state.names {
                if standing.due().is_none_or(|due| now < due) {
                    continue;
                }
                let Standing::Requested { deadline, left_out } = standing else { continue };
                let absence = match left_out {
                    LeftOut::Since(_) if *kind == ResourceType::Listener => Absence::Removed,
                    LeftOut::Since(at) if *at <= now && deadline.is_some_and(|deadline| now < deadline) => {
                        *left_out = LeftOut::Told;
                        actions.push(Action::Missing(name.clone()));
                        continue;
                    }
                    _ => absence,
                };
                *standing = Standing::Absent;
                actions.push(Action::Absent(*kind, name.clone(), absence));
            }
        }
    }
}

impl Standing {
    /// When its next timer is due.
    fn due(&self) -> Option<Instant> {
        match self {
            Self::Requested { deadline, left_out: LeftOut::Since(at) } => deadline.iter().chain([at]).min().copied(),
            Self::Requested { deadline, .. } => *deadline,
            Self::Received | Self::Absent => None,
        }
    }
}
