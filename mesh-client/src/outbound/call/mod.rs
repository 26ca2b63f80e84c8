//! The road of one request: configuration, route, fault, deadline, then attempts: pick, connect, send, judge.

mod attempts;
mod fault;
mod finish;
mod head;

pub(crate) use finish::Finished;

use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::{BoxError, Kind, Place},
    outbound::{
        cluster::{InFlight, Permit},
        connect::Subchannel,
        narrate,
        resolve::{Routing, State, UpstreamRef},
        retry::Attempts,
        route::{ClusterChoice, NoRoute, RequestHead, RouteAction, RouteEntry},
        timeout::{is_grpc, parse_grpc_timeout},
        upstream::Upstream,
    },
    telemetry::{explain::Explain, metrics, trace::Propagation},
};
use bytes::Bytes;
use http::{HeaderMap, Response, request::Parts};
use http_body::Body;
use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::time::Instant;

/// What a mesh was built with that calls read.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// Limit of the wait for the first configuration, for calls that have no deadline.
    pub(crate) resolve_timeout: Duration,
    /// Bytes of a request body kept for a retry.
    pub(crate) max_replay_bytes: usize,
    /// How trace context is handed on.
    pub(crate) propagation: Propagation,
}

/// Where a call is once its request is on its way.
const SENT: &str = "before the response began";

/// A call that has found its cluster. Everything it holds is given back when it is dropped.
pub(crate) struct Call {
    core: Arc<Core>,
    routing: Arc<Routing>,
    upstream: Arc<Upstream>,
    /// Position of the route in the virtual host.
    route: usize,
    attempts: Attempts,
    endpoint: Option<SocketAddr>,
    /// What it waits for, for errors.
    stage: &'static str,
    in_flight: Option<InFlight<Subchannel>>,
    /// Counts against `max_requests` to the end of the stream (gRFC A32).
    permit: Option<Permit>,
    started: Instant,
    grpc: bool,
    /// HTTP status of the response; 0 before there is one.
    status: u16,
    grpc_status: Option<u8>,
    flag: &'static str,
    recorded: bool,
    explain: Option<Explain>,
}

/// Serves one request. What is large is an argument or a local once, and borrowed from there: the future is allocated and moved
/// for every call.
pub(crate) async fn call<B>(
    core: Arc<Core>,
    mut request: Option<(Parts, B)>,
    started: Instant,
) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let (head, _) = request.as_mut().expect("taken below, once the cluster is known");
    let explain = head.extensions.get::<Explain>().cloned();
    if let Some(explain) = &explain {
        explain.add("target", &*core.label);
    }
    let grpc = is_grpc(&head.headers);
    let routing = match core.routing() {
        Some(routing) => routing,
        None => core.configured(grpc, &head.headers, started).await?,
    };
    head::complete_uri(head, &core).map_err(|e| {
        let place = Place { target: Some(core.label.clone()), ..Place::default() };
        Error::new(Kind::InvalidRequest, "the request's URI cannot be completed", place, Some(Box::new(e)))
    })?;
    let mut random = fastrand::Rng::new();
    let mut rng = |bound: u32| random.u32(..bound.max(1));

    // Which route, which cluster. The draw holds for every attempt of the call (gRFC A31).
    let table = routing.table.as_deref().ok_or_else(|| core.no_virtual_host(&routing))?;
    let request_head = RequestHead::new(&head.method, &head.uri, &head.headers);
    let found = match &explain {
        None => table.find(&request_head, &mut rng),
        Some(explain) => {
            let trail = table.explain(&request_head, &mut rng);
            explain.extend(narrate::config(&routing));
            explain.extend(narrate::route(&trail));
            trail.found
        }
    };
    let entry = found.map_err(|e| core.no_route(&routing, &e, head))?;
    let forward = match &entry.action {
        RouteAction::Forward(forward) => forward,
        RouteAction::Unsupported(reason) => {
            return Err(core.local(
                &routing,
                Kind::NoRoute,
                format!("the route does not forward: {reason}"),
                Some(entry),
                None,
            ));
        }
    };
    let choice = forward.draw(&mut rng);
    let deadline = forward.timeouts.deadline(started, &head.headers);

    if !choice.faults.is_empty()
        && let Some(response) =
            fault::inject(&core, &routing, entry, choice, head, grpc, deadline.as_ref(), explain.as_ref()).await?
    {
        return Ok(response);
    }
    let upstream = match &choice.cluster {
        UpstreamRef::Live(upstream) => upstream.clone(),
        UpstreamRef::Failed(cause) => {
            let message = "the route's cluster cannot be used".into();
            return Err(core.local(
                &routing,
                Kind::NoEndpoint,
                message,
                Some(entry),
                Some((choice, Box::new(cause.clone()))),
            ));
        }
    };
    if let Some(explain) = &explain {
        explain.extend(narrate::cluster(forward, choice));
    }
    if let Some(category) = upstream.live.drop_overload(&mut random) {
        upstream
            .metrics
            .record(metrics::Outcome { status: 503, grpc: grpc.then_some(14), flag: "DO" }, started.elapsed());
        let message = format!("dropped by the control plane's overload policy (category {category})");
        return Err(core.local(&routing, Kind::Dropped, message, Some(entry), Some((choice, "drop_overload".into()))));
    }
    let permit = match upstream.live.begin_request() {
        Ok(permit) => permit,
        Err(over) => {
            upstream
                .metrics
                .record(metrics::Outcome { status: 503, grpc: grpc.then_some(14), flag: "UO" }, started.elapsed());
            let message = "the circuit breaker is open".into();
            return Err(core.local(&routing, Kind::Overloaded, message, Some(entry), Some((choice, Box::new(over)))));
        }
    };
    let trace = core.settings.propagation.apply(&mut head.headers, &head.extensions);
    if let (Some(explain), Some(trace)) = (&explain, trace) {
        explain.add("trace", trace.to_string());
    }

    let route = entry.index;
    let mut call = Call {
        core,
        routing: routing.clone(),
        upstream,
        route,
        attempts: Attempts::default(),
        endpoint: None,
        stage: SENT,
        in_flight: None,
        permit: Some(permit),
        started,
        grpc,
        status: 0,
        grpc_status: None,
        flag: "-",
        recorded: false,
        explain,
    };
    let result = {
        let mut attempts = pin!(call.run(forward, &mut request, deadline.as_ref()));
        match &deadline {
            None => Ok(attempts.await),
            Some(deadline) => tokio::time::timeout_at(deadline.at, attempts.as_mut()).await.map_err(|_| deadline),
        }
    };
    match result.unwrap_or_else(|deadline| Err(call.timed_out(deadline, call.stage))) {
        Ok(response) => Ok(call.respond(response, deadline)),
        Err(error) => {
            call.finish(if error.is_timeout() { Finished::TimedOut } else { Finished::Cut });
            Err(error)
        }
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
        let limit = own.unwrap_or(self.settings.resolve_timeout);
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

    fn no_virtual_host(&self, routing: &Routing) -> Error {
        let message = format!(
            "no virtual host of route configuration `{}` answers for `{}`",
            routing.snapshot.routes.name, routing.snapshot.host
        );
        self.local(routing, Kind::NoRoute, message, None::<&RouteEntry<UpstreamRef>>, None)
    }

    fn no_route(&self, routing: &Routing, error: &NoRoute, head: &Parts) -> Error {
        let message = format!("{error} {} {}", head.method, head.uri.path());
        self.local(routing, Kind::NoRoute, message, None::<&RouteEntry<UpstreamRef>>, None)
    }

    /// An error before any attempt.
    fn local(
        &self,
        routing: &Routing,
        kind: Kind,
        message: String,
        route: Option<&RouteEntry<UpstreamRef>>,
        cluster: Option<(&ClusterChoice<UpstreamRef>, BoxError)>,
    ) -> Error {
        let (cluster, cause) = cluster.map_or((None, None), |(choice, cause)| (Some(choice.name.clone()), Some(cause)));
        let place = Place {
            target: Some(self.label.clone()),
            route: route.map(|r| r.name.clone()),
            cluster,
            version: Some(routing.snapshot.version.clone()),
            ..Place::default()
        };
        Error::new(kind, message, place, cause)
    }

    /// Whether requests for `host` are this channel's.
    pub(crate) fn serves(&self, host: &str) -> bool {
        let own = self.target.host();
        own.eq_ignore_ascii_case(host) || own.strip_suffix(":80").is_some_and(|own| own.eq_ignore_ascii_case(host))
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            resolve_timeout: Duration::from_secs(20),
            max_replay_bytes: 64 << 10,
            propagation: Propagation::default(),
        }
    }
}
