//! The route and the cluster of a call, drawn once: they hold for all its attempts (gRFC A31).

use super::{
    Call,
    edit::{self, Edited},
    head,
    steer::Steering,
};
use crate::{
    Error,
    body::MeshBody,
    error::{BoxError, Kind, Place},
    outbound::{
        narrate,
        resolve::{Routing, UpstreamRef},
        retry::{Attempts, grpc_from_http},
        route::{ClusterChoice, Forward, RequestHead, RouteAction, RouteEntry},
        timeout::{Deadline, is_grpc},
    },
    telemetry::{
        access_log::ResponseFlags as Flag,
        explain::Explain,
        metrics::{self, Outcome},
        watch::{Judged, Watch},
    },
};
use http::{Response, request::Parts};
use mesh_xds::resource::SessionHost;
use std::sync::Arc;
use tokio::time::Instant;

/// What a route makes of a request.
#[allow(clippy::large_enum_variant, reason = "boxing it would cost an allocation per call")]
pub(super) enum Routed {
    /// It is forwarded.
    Forward(Chosen),
    /// It is answered here.
    Answered(Response<MeshBody>),
    /// It is answered here, if its filters let it be.
    Asking(Asking),
}

/// A call that the route answers after its filters saw it.
pub(super) struct Asking {
    pub(super) routing: Arc<Routing>,
    /// Position of the route in the virtual host; it answers.
    pub(super) route: usize,
    pub(super) started: Instant,
    pub(super) grpc: bool,
    pub(super) explain: Option<Explain>,
    pub(super) watch: Option<Arc<Watch>>,
}

/// What was decided for a call before its first attempt.
pub(super) struct Chosen {
    pub(super) routing: Arc<Routing>,
    /// Position of the route in the virtual host; it forwards.
    route: usize,
    /// Position of the cluster in the route.
    choice: usize,
    pub(super) deadline: Option<Deadline>,
    pub(super) started: Instant,
    pub(super) grpc: bool,
    /// The application set the authority.
    pub(super) own_authority: bool,
    pub(super) explain: Option<Explain>,
    /// What filters did to it, for the flags of its end.
    pub(super) flags: Flag,
    /// Only where somebody watches.
    pub(super) watch: Option<Arc<Watch>>,
}

impl Chosen {
    /// Finds the route of a request and draws its cluster. Completes the request's URI.
    ///
    /// # Errors
    /// No virtual host, no route, or one that does not forward.
    pub(super) fn of(
        routing: Arc<Routing>,
        head: &mut Parts,
        started: Instant,
        explain: Option<Explain>,
        watch: Option<Arc<Watch>>,
    ) -> Result<Routed, Error> {
        let grpc = is_grpc(&head.headers);
        let own_authority = head.uri.authority().is_some();
        head::complete_uri(head, routing.facts.authority.as_ref()).map_err(|e| {
            let place = Place { target: Some(routing.facts.label.clone()), ..Place::default() };
            Error::new(Kind::InvalidRequest, "the request's URI cannot be completed", place, Some(Box::new(e)))
        })?;
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        let unserved = |flags, status| {
            let outcome = Outcome { status, grpc: grpc.then_some(code(flags, status)), flag: flags };
            routing.facts.unserved.record(outcome, started.elapsed());
            if let Some(watch) = &watch {
                watch.judged(&Judged::early(outcome));
            }
        };
        let table = routing.table.as_deref().ok_or_else(|| {
            let snapshot = &routing.snapshot;
            let message = format!(
                "no virtual host of route configuration `{}` answers for `{}`",
                snapshot.routes.name, snapshot.host
            );
            unserved(Flag::NO_ROUTE, 404);
            refused(&routing, Kind::NoRoute, message, None, None)
        })?;
        let request = RequestHead::of(head);
        let found = match &explain {
            None => table.find(&request, &mut rng),
            Some(explain) => {
                let trail = table.explain(&request, &mut rng);
                explain.extend(narrate::config(&routing));
                explain.extend(narrate::route(&trail));
                trail.found
            }
        };
        let entry = found.map_err(|e| {
            let message = format!("{e} {} {}", head.method, head.uri.path());
            unserved(Flag::NO_ROUTE, 404);
            refused(&routing, Kind::NoRoute, message, None, None)
        })?;
        if let Some(watch) = &watch {
            watch.routed(&entry.name);
        }
        let forward = match &entry.action {
            RouteAction::Forward(forward) => forward,
            RouteAction::Answer(answer) if answer.filters.is_some() => {
                let route = entry.index;
                return Ok(Routed::Asking(Asking { route, started, grpc, explain, watch, routing }));
            }
            RouteAction::Answer(answer) => {
                // No flags, as in Envoy: the answer is what the route is for.
                let (status, code) = answer.outcome(grpc);
                let outcome = Outcome { status, grpc: code, flag: Flag::NONE };
                routing.facts.unserved.record(outcome, started.elapsed());
                if let Some(watch) = &watch {
                    watch.judged(&Judged::early(outcome));
                }
                return Ok(Routed::Answered(edit::answer(answer, entry, head, grpc, explain.as_ref())));
            }
            RouteAction::Unsupported(reason) => {
                let message = format!("the route does not forward: {reason}");
                unserved(Flag::NO_ROUTE, 404);
                return Err(refused(&routing, Kind::NoRoute, message, Some(entry), None));
            }
        };
        let choice = forward.draw(&request, &mut rng).map_err(|e| {
            let status = forward.cluster_not_found;
            unserved(Flag::NO_CLUSTER, status);
            refused(&routing, Kind::NoCluster(status), e.to_string(), Some(entry), None)
        })?;
        if let Some(explain) = &explain {
            explain.extend(narrate::limits(forward, &routing.facts.settings, &head.headers));
        }
        let route = entry.index;
        let deadline = forward.timeouts.deadline(started, &head.headers);
        let flags = Flag::NONE;
        Ok(Routed::Forward(Self {
            route,
            choice,
            deadline,
            started,
            grpc,
            own_authority,
            explain,
            flags,
            watch,
            routing,
        }))
    }

    /// Lets the call into its cluster, makes the route's edits, and gives the request its trace context.
    ///
    /// # Errors
    /// The cluster cannot be used, its overload policy drops the call, its breaker is open, or an edit comes to nothing that can be
    /// sent.
    pub(super) fn admit(self, head: &mut Parts) -> Result<Call, Error> {
        let choice = self.choice();
        let upstream = match &choice.cluster {
            UpstreamRef::Live(upstream) => *upstream,
            UpstreamRef::Failed(cause) => {
                let message = "the route's cluster cannot be used".into();
                let status = self.forward().cluster_not_found;
                self.count(status, grpc_from_http(status), Flag::NO_CLUSTER);
                return Err(self.refused(Kind::NoCluster(status), message, Box::new(cause.clone())));
            }
        };
        if let Some(explain) = &self.explain {
            explain.extend(narrate::cluster(self.forward(), choice));
        }
        let (leaf, part) = self.leaf_of(upstream);
        let live = &self.routing.upstreams()[leaf];
        if let Some(category) = live.live.drop_overload(&mut fastrand::Rng::new()) {
            self.say("overload", || format!("dropped, category {category}"));
            self.count(503, 14, Flag::DROP_OVERLOAD);
            let message = format!("dropped by the control plane's overload policy (category {category})");
            return Err(self.refused(Kind::Dropped, message, "drop_overload".into()));
        }
        // Nothing is counted yet that an edit which fails would have to give back.
        let edited = match &choice.edits {
            None => None,
            Some(edits) => Some(edit::request(edits, &self, head)?),
        };
        let priority = self.forward().priority;
        if let Err(over) = live.live.begin_request(priority) {
            self.say("breaker", || format!("open: {over}"));
            self.count(503, 14, Flag::UPSTREAM_OVERFLOW);
            return Err(self.refused(Kind::Overloaded, "the circuit breaker is open".into(), Box::new(over)));
        }
        let clusters = match self.routing.leaves(upstream) {
            [] => &[leaf],
            leaves => leaves,
        };
        let mut steering = Steering::of(&self, clusters, head);
        if part.is_some() {
            steering.get_or_insert_default().part = part;
        }
        if let Some(explain) = &self.explain {
            let hash = steering.as_ref().and_then(|steering| steering.hash());
            if leaf != upstream {
                explain.extend([narrate::leaf(live, &choice.name)]);
            }
            explain.extend(narrate::balancing(live, choice.metadata.as_deref(), Some(hash)));
            explain.add("breaker", narrate::breaker(live, priority));
            explain.extend(narrate::standing(live));
        }
        let tracing = self.routing.snapshot.listener.http.tracing.as_ref();
        let trace = self.routing.facts.settings.propagation.apply(&mut head.headers, &head.extensions, tracing);
        if let (Some(explain), Some(trace)) = (&self.explain, trace) {
            explain.add("trace", trace.to_string());
        }
        if let (Some(watch), Some(trace)) = (&self.watch, trace) {
            watch.traced(trace);
        }
        let mut call = self.call((upstream, leaf), edited, false);
        call.steering = steering;
        if call.chosen.forward().attempt_count.in_request {
            call.attempts.write_count(&mut head.headers);
        }
        Ok(call)
    }

    /// A call that was let in, or a copy, which was not yet.
    fn call(self, (upstream, leaf): (usize, usize), edited: Option<Box<Edited>>, copy: bool) -> Call {
        let priority = self.forward().priority;
        Call {
            upstream,
            leaf,
            edited,
            steering: None,
            idle: None,
            attempts: Attempts::default(),
            endpoint: None,
            in_flight: None,
            connecting: false,
            copy,
            admitted: !copy,
            priority,
            recorded: copy,
            flag: Flag::NONE,
            status: 0,
            grpc_status: None,
            chosen: self,
        }
    }

    /// The call of a copy of the request, which is for this cluster.
    pub(super) fn copy(&self, upstream: usize) -> Call {
        let chosen = Self { routing: self.routing.clone(), explain: None, watch: None, ..*self };
        let (leaf, _) = chosen.leaf_of(upstream);
        chosen.call((upstream, leaf), None, true)
    }

    /// To a caller who wants to know.
    fn say(&self, subject: &'static str, text: impl FnOnce() -> String) {
        if let Some(explain) = &self.explain {
            explain.add(subject, text());
        }
    }

    /// Counts a call that ends before its first attempt.
    pub(super) fn count(&self, status: u16, grpc: u32, flag: Flag) {
        let flags = flag | self.flags;
        let outcome = Outcome { status, grpc: self.grpc.then_some(grpc), flag: flags };
        let choice = self.choice();
        let upstream = match &choice.cluster {
            UpstreamRef::Live(i) => Some(&self.routing.upstreams()[*i]),
            UpstreamRef::Failed(_) => None,
        };
        match upstream {
            Some(upstream) => upstream.metrics.record(outcome, self.started.elapsed()),
            None => {
                let source = &self.routing.facts.settings.source;
                metrics::unserved(source, Some(&choice.name), outcome, self.started.elapsed());
            }
        }
        if let Some(watch) = &self.watch {
            watch.judged(&Judged { cluster: Some(&choice.name), upstream, ..Judged::early(outcome) });
        }
    }

    /// The route.
    pub(super) fn entry(&self) -> &RouteEntry<UpstreamRef> {
        let table = self.routing.table.as_deref().expect("the route was found in it, and it never changes");
        table.entry(self.route)
    }

    /// What the route does.
    pub(super) fn forward(&self) -> &Forward<UpstreamRef> {
        match &self.entry().action {
            RouteAction::Forward(forward) => forward,
            RouteAction::Answer(_) | RouteAction::Unsupported(_) => {
                unreachable!("only a route that forwards is chosen")
            }
        }
    }

    /// The cluster, as the route names it.
    pub(super) fn choice(&self) -> &ClusterChoice<UpstreamRef> {
        self.forward().choice(self.choice)
    }

    /// Takes the cluster of a session instead of the one drawn, where the route has it. Gives the name of the cluster.
    pub(super) fn stick(&mut self, host: Option<&SessionHost>) -> Arc<str> {
        let cluster = host.and_then(|host| host.cluster.as_deref());
        let known = cluster.and_then(|name| self.forward().clusters.iter().position(|choice| &*choice.name == name));
        self.choice = known.unwrap_or(self.choice);
        self.choice().name.clone()
    }

    pub(super) fn refused(&self, kind: Kind, message: String, cause: BoxError) -> Error {
        refused(&self.routing, kind, message, Some(self.entry()), Some((self.choice(), cause)))
    }
}

/// The gRPC code of a request without a route, or without a cluster.
fn code(flag: Flag, status: u16) -> u32 {
    if flag == Flag::NO_CLUSTER { grpc_from_http(status) } else { 14 }
}

/// An error before any attempt.
pub(super) fn refused(
    routing: &Routing,
    kind: Kind,
    message: String,
    route: Option<&RouteEntry<UpstreamRef>>,
    cluster: Option<(&ClusterChoice<UpstreamRef>, BoxError)>,
) -> Error {
    let (cluster, cause) = cluster.map_or((None, None), |(choice, cause)| (Some(choice.name.clone()), Some(cause)));
    let place = Place {
        target: Some(routing.facts.label.clone()),
        route: route.map(|r| r.name.clone()),
        cluster,
        version: Some(routing.snapshot.version.clone()),
        ..Place::default()
    };
    Error::new(kind, message, place, cause)
}
