//! The road of one request: configuration, route, filters, deadline, then attempts: pick, connect, send, judge.
//!
//! Nearly every call goes the [`direct`] road: its configuration is there, its endpoint is connected, its first attempt is its last. That
//! is one state machine in one allocation, which then carries the counts of the call until the response body ends. Whatever has to
//! wait for anything but the answer goes the [`general`] road, an `async fn` that can do all, from where the direct one stopped.

mod attempts;
mod chosen;
mod direct;
mod edit;
mod filtered;
mod finish;
mod general;
mod head;
mod hedged;
mod leaf;
mod mirror;
mod observed;
mod steer;
mod tap;

pub(crate) use finish::Finished;
pub(crate) use observed::Received;

use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::{BoxError, Kind},
    outbound::{
        cluster::InFlight,
        connect::Subchannel,
        resolve::{Routing, State},
        retry::{Attempts, HookRef, Policy, RetryBudget},
        timeout::{Idle, parse_grpc_timeout},
        upstream::Upstream,
    },
    telemetry::{
        access_log::ResponseFlags as Flag,
        explain::Explain,
        metrics::{Metrics, Source},
        trace::Propagation,
        watch::{Observers, Watch},
    },
};
use bytes::Bytes;
use chosen::{Chosen, Routed};
use direct::{Direct, First, Next};
use edit::Edited;
use http::{HeaderMap, Request, Response};
use http_body::Body;
use mesh_xds::resource::RoutingPriority;
use std::{
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use steer::Steering;
use tokio::time::Instant;

/// What a mesh was built with that calls read.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Limit of the wait for the first configuration, for calls that have no deadline.
    pub(crate) resolve_timeout: Duration,
    /// How long calls may wait for a connection; `None`: to their deadline.
    pub(crate) failfast: Option<Duration>,
    /// How long the head of a response may take from when the request was sent.
    pub(crate) response_headers: Option<Duration>,
    /// Bytes of a request body kept for a retry.
    pub(crate) max_replay_bytes: usize,
    /// How trace context is handed on.
    pub(crate) propagation: Propagation,
    /// What the application says of outcomes, where a policy has no hook of its own.
    pub(crate) retry_hook: Option<HookRef>,
    /// Of each cluster, beside the cluster's own.
    pub(crate) retry_budget: Option<Arc<RetryBudget>>,
    /// Every request records its decisions.
    pub(crate) explain_errors: bool,
    /// What is measured beyond what always is.
    pub(crate) metrics: Metrics,
    /// Who calls, for metrics.
    pub(crate) source: Source,
    /// Who watches calls; `None`: nobody does.
    pub(crate) observers: Option<Arc<Observers>>,
}

/// One call on its way to a response.
pub(crate) enum Road {
    /// An attempt on a connection that is open.
    Direct(Box<dyn Direct>),
    /// Anything else.
    General(Answer),
    /// Either, watched.
    Observed(Box<observed::Observed>),
    /// It failed before it began; `None` once that was said.
    Refused(Option<Error>),
}

/// What a call comes to.
type Answer = Pin<Box<dyn Future<Output = Result<Response<MeshBody>, Error>> + Send>>;

/// A call that has found its cluster. Everything it holds is given back when it is dropped.
pub(crate) struct Call {
    chosen: Chosen,
    /// Position of the cluster in [`Routing::upstreams`].
    upstream: usize,
    /// Position of the cluster whose endpoints take the attempt: the same, or a leaf of the aggregate that it is.
    leaf: usize,
    /// What was edited, for the edits of the response; only where the route has edits.
    edited: Option<Box<Edited>>,
    /// What picks go by; only where the cluster's policy asks for more than that there is a request.
    steering: Option<Box<Steering>>,
    attempts: Attempts,
    endpoint: Option<SocketAddr>,
    in_flight: Option<InFlight<Subchannel>>,
    /// Watches for it to stand still; only where there is a limit.
    idle: Option<Arc<Idle>>,
    /// It waits for a connection.
    connecting: bool,
    /// It is a copy of another: tried once.
    copy: bool,
    /// It counts against `max_requests`, to the end of the stream (gRFC A32).
    admitted: bool,
    /// By the breakers of this priority.
    priority: RoutingPriority,
    recorded: bool,
    flag: Flag,
    /// HTTP status of the response; 0 before there is one.
    status: u16,
    grpc_status: Option<u32>,
}

/// Whatever carries a call through its response body.
pub(crate) trait Held: Send + Sync {
    fn call(&self) -> &Call;
    fn call_mut(&mut self) -> &mut Call;
}

/// Begins a call. What needs no waiting is done here: the route, the cluster, the breaker. The endpoint is picked when the future is
/// first polled.
pub(crate) fn start<B>(core: &Arc<Core>, request: Request<B>) -> Road
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let started = Instant::now();
    match &core.facts.settings.observers {
        None => begin(core, request, started, None),
        Some(observers) => observed::start(core, observers, request, started),
    }
}

fn begin<B>(core: &Arc<Core>, request: Request<B>, started: Instant, watch: Option<Arc<Watch>>) -> Road
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let (mut head, body) = request.into_parts();
    let routing = match core.routing() {
        Some(routing) if head.extensions.get::<Explain>().is_none() && !core.facts.settings.explain_errors => routing,
        _ => return Road::General(Box::pin(general::call(core.clone(), head, body, started, watch))),
    };
    let routed = match Chosen::of(routing, &mut head, started, None, watch) {
        Ok(Routed::Answered(response)) => return Road::General(Box::pin(std::future::ready(Ok(response)))),
        Ok(Routed::Asking(asking)) => return Road::General(Box::pin(filtered::asking(asking, head))),
        Ok(Routed::Forward(chosen)) => Ok(chosen),
        Err(error) => Err(error),
    };
    let admitted = routed.and_then(|chosen| {
        if chosen.forward().general || chosen.choice().filters.is_some() {
            return Ok(Err(chosen));
        }
        chosen.admit(&mut head).map(Ok)
    });
    match admitted {
        Ok(Ok(call)) => Road::Direct(Box::new(First::new(call, head, body))),
        Ok(Err(chosen)) => Road::General(Box::pin(general::chosen(chosen, head, body))),
        Err(error) => Road::Refused(Some(error)),
    }
}

impl Road {
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<MeshBody>, Error>> {
        if let Self::Direct(direct) = self {
            let next = ready!(direct.poll(cx));
            let Self::Direct(direct) = std::mem::replace(self, Self::Refused(None)) else {
                unreachable!("it was direct above")
            };
            match next {
                Next::Response(response) => {
                    let (head, body) = response.into_parts();
                    return Poll::Ready(Ok(Response::from_parts(head, MeshBody::live(body, direct))));
                }
                Next::Failed(error) => return Poll::Ready(Err(error)),
                Next::GoOn => *self = Self::General(direct.go_on()),
            }
        }
        match self {
            Self::General(answer) => answer.as_mut().poll(cx),
            Self::Observed(observed) => observed.poll(cx),
            Self::Refused(error) => Poll::Ready(Err(error.take().expect("not polled again once it is ready"))),
            Self::Direct(_) => unreachable!("it was replaced above"),
        }
    }
}

impl Call {
    /// The cluster.
    fn upstream(&self) -> &Arc<Upstream> {
        &self.chosen.routing.upstreams()[self.upstream]
    }

    /// The cluster whose endpoints take the attempt.
    #[inline]
    fn leaf(&self) -> &Arc<Upstream> {
        &self.chosen.routing.upstreams()[self.leaf]
    }

    /// What is retried.
    fn policy(&self) -> Option<&Arc<Policy>> {
        self.chosen.forward().retry.as_ref().filter(|_| !self.copy)
    }
}

impl Held for Call {
    fn call(&self) -> &Self {
        self
    }

    fn call_mut(&mut self) -> &mut Self {
        self
    }
}

impl Core {
    /// The live configuration: one pointer load.
    fn routing(&self) -> Option<Arc<Routing>> {
        match &**self.resolver.state() {
            State::Ready(routing) => Some(routing.clone()),
            _ => None,
        }
    }

    /// Waits for the first configuration under the caller's deadline, or the mesh's limit when there is none.
    async fn configured(&self, grpc: bool, headers: &HeaderMap, started: Instant) -> Result<Arc<Routing>, Error> {
        let own = if grpc { headers.get("grpc-timeout").and_then(parse_grpc_timeout) } else { None };
        let limit = own.unwrap_or(self.facts.settings.resolve_timeout);
        let settled = match started.checked_add(limit) {
            Some(at) => {
                tokio::time::timeout_at(at, self.resolver.settled()).await.map_err(|_| self.not_configured_in(limit))?
            }
            None => self.resolver.settled().await,
        };
        match settled {
            State::Ready(routing) => Ok(routing),
            State::Absent(cause) => {
                Err(self.unresolved(Kind::Resolve, "the target is not in the mesh".into(), Some(cause)))
            }
            State::Pending(cause) => Err(self.unresolved(Kind::Resolve, "the mesh was shut down".into(), cause)),
        }
    }

    /// Whether requests for `host` are this channel's.
    pub(crate) fn serves(&self, host: &str) -> bool {
        let own = self.target.host();
        own.eq_ignore_ascii_case(host) || own.strip_suffix(":80").is_some_and(|own| own.eq_ignore_ascii_case(host))
    }
}

impl Settings {
    /// Whether calls need more than the direct road has, whatever their route.
    pub(crate) fn needs_general_road(&self) -> bool {
        self.retry_hook.is_some() || self.retry_budget.is_some() || self.response_headers.is_some()
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolve_timeout: Duration::from_secs(20),
            failfast: None,
            response_headers: None,
            max_replay_bytes: 64 << 10,
            propagation: Propagation::default(),
            retry_hook: None,
            retry_budget: None,
            explain_errors: false,
            metrics: Metrics::default(),
            source: Source::default(),
            observers: None,
        }
    }
}
