//! The road of one request: configuration, route, fault, deadline, then attempts: pick, connect, send, judge.

use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::{BoxError, Kind, Place},
    outbound::{
        cluster::{Endpoint, InFlight, Outcome as Verdict, Permit, Pick, Resource},
        connect::Subchannel,
        filter::FaultAbortStatus,
        narrate,
        resolve::{Routing, State, UpstreamRef},
        retry::{Attempts, Decision, Failure, Kept, Outcome, Policy, Situation},
        route::{ClusterChoice, Forward, NoRoute, RequestHead, RouteAction, RouteEntry},
        timeout::{Deadline, is_grpc, parse_grpc_timeout, write_grpc_timeout},
        upstream::Upstream,
    },
    telemetry::{explain::Explain, metrics, trace::Propagation},
    transport::{self, Lease, RecvBody, TransportError},
};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header, request::Parts, uri::Scheme,
};
use http_body::Body;
use smallvec::SmallVec;
use std::{future::poll_fn, net::SocketAddr, sync::Arc, task::Poll, time::Duration};
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

/// Connection attempts of one call that fail before anything is sent; each makes its endpoint unavailable, so this bounds only races.
const MAX_CONNECT_FAILURES: u32 = 32;

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

/// The head of a request, kept for further attempts. Cheaper than a clone of a header map: no table of hashes, no allocation.
struct SavedHead {
    method: Method,
    uri: Uri,
    headers: SmallVec<[(HeaderName, HeaderValue); 4]>,
}

/// How a response ended.
pub(crate) enum Finished<'a> {
    /// With trailers.
    Trailers(&'a HeaderMap),
    /// Without.
    End,
    /// The stream or connection broke.
    Cut,
    /// The call's deadline passed.
    TimedOut,
}

/// What an attempt ended in.
enum Attempt {
    Response(Response<RecvBody>),
    Failed(Failure, Error),
}

/// Serves one request.
pub(crate) async fn call<B>(core: Arc<Core>, request: Request<B>, started: Instant) -> Result<Response<MeshBody>, Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let (mut head, body) = request.into_parts();
    let explain = head.extensions.get::<Explain>().cloned();
    if let Some(explain) = &explain {
        explain.add("target", &*core.label);
    }
    let grpc = is_grpc(&head.headers);
    let routing = match core.routing() {
        Some(routing) => routing,
        None => core.configured(grpc, &head.headers, started).await?,
    };
    complete_uri(&mut head, &core);
    let mut random = fastrand::Rng::new();
    let mut rng = |bound: u32| random.u32(..bound.max(1));

    // Which route, which cluster. The draw holds for every attempt of the call (gRFC A31).
    let table = routing.table.as_deref().ok_or_else(|| core.no_virtual_host(&routing))?;
    let request_head = RequestHead::new(&head.method, &head.uri, &head.headers);
    if let Some(explain) = &explain {
        explain.extend(narrate::config(&routing));
        explain.extend(narrate::route(&table.explain(&request_head, &mut rng)));
    }
    let entry = table.find(&request_head, &mut rng).map_err(|e| core.no_route(&routing, &e, &head))?;
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
            inject_faults(&core, &routing, entry, choice, &head, grpc, deadline.as_ref(), explain.as_ref()).await?
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
    let attempts = call.run(forward, head, body, deadline.as_ref());
    let result = match &deadline {
        None => attempts.await,
        Some(deadline) => match tokio::time::timeout_at(deadline.at, attempts).await {
            Ok(result) => result,
            Err(_) => Err(call.timed_out(deadline, call.stage)),
        },
    };
    match result {
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

impl Call {
    /// Attempts until one is final.
    async fn run<B>(
        &mut self,
        forward: &Forward<UpstreamRef>,
        head: Parts,
        body: B,
        deadline: Option<&Deadline>,
    ) -> Result<Response<RecvBody>, Error>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let policy = forward.retry.as_deref();
        let per_try = policy.and_then(Policy::per_try_timeout);
        let avoid_tried = policy.is_none_or(Policy::avoid_previous_hosts);
        let cap = self.core.settings.max_replay_bytes;
        let mut unread = Some(body);
        let begun = poll_fn(|cx| {
            let body = unread.take().expect("polled once: it is ready at once");
            Poll::Ready(Kept::new(body, cap, cx))
        });
        let (kept, first) = match begun.await {
            Ok(body) => body,
            Err(error) => {
                return Err(self.error(Kind::RequestBody, "the request was not sent whole".into(), Some(error)));
            }
        };
        let saved = SavedHead::of(&head);
        let mut next = Some((head, first));
        let mut tried: SmallVec<[Arc<Endpoint<Subchannel>>; 2]> = SmallVec::new();
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        loop {
            let attempt = match self.lease(&tried).await {
                Err((failure, error)) => Attempt::Failed(failure, error),
                Ok(lease) => {
                    if let Some(explain) = &self.explain {
                        explain.add("peer", narrate::peer(lease.peer()));
                    }
                    let (mut head, body) = next.take().unwrap_or_else(|| (saved.restore(), kept.again()));
                    self.attempts.write_header(&mut head.headers, self.core.profile);
                    if self.grpc && (deadline.is_some() || per_try.is_some()) {
                        write_grpc_timeout(&mut head.headers, deadline, per_try, Instant::now());
                    }
                    self.send(lease, Request::from_parts(head, body), per_try).await
                }
            };
            let outcome = match &attempt {
                Attempt::Response(r) => Outcome::of_response(r.status(), r.headers(), self.grpc),
                Attempt::Failed(failure, _) => Outcome::Failure(*failure),
            };
            self.judge(&attempt, &outcome);
            let attempt = match attempt {
                // The common end, without a look at the clock.
                Attempt::Response(response)
                    if self.explain.is_none() && policy.is_none_or(|policy| !policy.retries(&outcome)) =>
                {
                    return Ok(response);
                }
                other => other,
            };
            let situation =
                Situation { replayable: kept.is_replayable(), now: Instant::now(), deadline: deadline.map(|d| d.at) };
            let upstream = &self.upstream;
            let budget = || upstream.retry_permit().map(Some);
            let number = self.attempts.number();
            let decision = self.attempts.next(policy, &outcome, situation, budget, &mut rng);
            if let Some(explain) = &self.explain {
                narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
            }
            let delay = match decision {
                Decision::Return(_) => {
                    return match attempt {
                        Attempt::Response(response) => Ok(response),
                        Attempt::Failed(_, error) => Err(error),
                    };
                }
                Decision::RetryNow => None,
                Decision::RetryAfter(delay) => Some(delay),
            };
            self.upstream.metrics.retries.increment(1);
            if let Some(in_flight) = self.in_flight.take().filter(|_| avoid_tried) {
                tried.push(in_flight.endpoint().clone());
            }
            drop(attempt);
            if let Some(delay) = delay {
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// A stream on a connection to a picked endpoint. An endpoint that cannot be connected to is left for the next one: nothing was
    /// sent, so this is no retry.
    async fn lease(&mut self, tried: &[Arc<Endpoint<Subchannel>>]) -> Result<Lease, (Failure, Error)> {
        let mut random = fastrand::Rng::new();
        let mut failures = 0;
        let mut pending = None;
        loop {
            let endpoint = match self.upstream.live.pick(tried, &mut random) {
                Pick::Endpoint(endpoint) => endpoint,
                Pick::Fail(cause) => {
                    self.flag = "UH";
                    let message = "no endpoint can be used".into();
                    return Err((Failure::NoEndpoint, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))));
                }
                Pick::Drop(category) => {
                    let message = format!("dropped by the control plane's overload policy (category {category})");
                    return Err((Failure::Overloaded, self.error(Kind::Dropped, message, None)));
                }
            };
            self.endpoint = Some(endpoint.address());
            self.in_flight = Some(endpoint.start());
            if let Some(lease) = endpoint.link().ready() {
                return Ok(lease);
            }
            self.wait_in_line(&mut pending)?;
            self.stage = "while waiting for a connection";
            let cause = match endpoint.link().acquire().await {
                Ok(lease) => return Ok(lease),
                Err(cause) => cause,
            };
            if let Some(mut failed) = self.in_flight.take() {
                failed.record(Verdict::LocalOrigin);
            }
            if let Some(explain) = &self.explain {
                explain.add("connect", format!("{} failed: {}", endpoint.address(), narrate::chain(&cause)));
            }
            failures += 1;
            if failures >= MAX_CONNECT_FAILURES {
                self.flag = "UF";
                return Err((
                    Failure::Connect,
                    self.error(Kind::NoEndpoint, "no connection".into(), Some(Box::new(cause))),
                ));
            }
        }
    }

    /// Counts the call as waiting for a connection (Envoy's `max_pending_requests`), once.
    fn wait_in_line(&mut self, pending: &mut Option<Permit>) -> Result<(), (Failure, Error)> {
        if pending.is_none() {
            let permit = self.upstream.live.breaker().acquire(Resource::PendingRequests).map_err(|over| {
                self.flag = "UO";
                (
                    Failure::Overloaded,
                    self.error(Kind::Overloaded, "the circuit breaker is open".into(), Some(Box::new(over))),
                )
            })?;
            *pending = Some(permit);
        }
        Ok(())
    }

    async fn send<B>(&mut self, lease: Lease, request: Request<B>, per_try: Option<Duration>) -> Attempt
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        self.stage = SENT;
        let sent = match per_try {
            None => lease.send(request).await,
            Some(limit) => match tokio::time::timeout(limit, lease.send(request)).await {
                Ok(sent) => sent,
                Err(_) => {
                    let message =
                        format!("the attempt had no response within its limit of {limit:?} (per_try_timeout)");
                    self.flag = "UT";
                    return Attempt::Failed(Failure::PerTryTimeout, self.error(Kind::Timeout, message, None));
                }
            },
        };
        match sent {
            Ok(response) => Attempt::Response(response),
            Err(error) => {
                let failure = Failure::of_transport(&error);
                self.flag = "UC";
                let (kind, message) = match error.kind() {
                    transport::Kind::RequestBody => (Kind::RequestBody, "the request was not sent whole"),
                    transport::Kind::InvalidRequest => (Kind::InvalidRequest, "the request cannot be sent"),
                    _ => (Kind::Transport, "the request failed"),
                };
                Attempt::Failed(failure, self.error(kind, message.into(), Some(Box::new(error))))
            }
        }
    }

    /// Tells outlier detection how an attempt that has no more to come ended. A response that goes on is judged at its end.
    fn judge(&mut self, attempt: &Attempt, outcome: &Outcome) {
        let Some(in_flight) = &mut self.in_flight else { return };
        let verdict = match (attempt, outcome) {
            (Attempt::Response(_), Outcome::Response(r)) => match r.grpc {
                Some(code) => Verdict::of_grpc(tonic::Code::from_i32(i32::try_from(code).unwrap_or(2))),
                None if self.grpc => return,
                None => Verdict::of_http(StatusCode::from_u16(r.status).unwrap_or(StatusCode::OK)),
            },
            (Attempt::Failed(_, error), Outcome::Failure(failure)) => match failure {
                Failure::Connect | Failure::Reset(_) | Failure::PerTryTimeout | Failure::Deadline => {
                    Verdict::LocalOrigin
                }
                // A graceful GOAWAY says nothing against the endpoint, a refused stream does.
                Failure::Refused if is_refused(error) => Verdict::LocalOrigin,
                _ => return,
            },
            _ => return,
        };
        in_flight.record(verdict);
    }

    /// The head is passed on: what the rest of the call holds moves into the body.
    fn respond(mut self, response: Response<RecvBody>, deadline: Option<Deadline>) -> Response<MeshBody> {
        let (head, body) = response.into_parts();
        self.status = head.status.as_u16();
        self.flag = "-";
        self.attempts.settle();
        if self.grpc {
            self.grpc_status = grpc_status(&head.headers);
        }
        if let Some(explain) = &self.explain {
            explain.add("response", format!("HTTP {}", head.status));
        }
        if body.is_end_stream() {
            self.finish(Finished::End);
        }
        Response::from_parts(head, MeshBody::live(body, self, deadline))
    }

    /// The call is over: counted once, and everything it holds is given back.
    pub(crate) fn finish(&mut self, how: Finished<'_>) {
        if std::mem::replace(&mut self.recorded, true) {
            return;
        }
        let mut verdict = None;
        match how {
            Finished::Trailers(trailers) if self.grpc => {
                self.grpc_status = grpc_status(trailers).or(self.grpc_status);
            }
            Finished::Trailers(_) | Finished::End => {}
            Finished::Cut => {
                verdict = (self.status != 0).then_some(Verdict::LocalOrigin);
                self.flag = if self.flag == "-" { "UC" } else { self.flag };
                self.grpc_status = self.grpc_status.or(Some(14));
            }
            Finished::TimedOut => {
                verdict = Some(Verdict::LocalOrigin);
                self.flag = "UT";
                self.grpc_status = Some(4);
            }
        }
        let verdict = verdict.unwrap_or_else(|| match (self.grpc, self.grpc_status) {
            (true, Some(code)) => Verdict::of_grpc(tonic::Code::from_i32(i32::from(code))),
            _ => Verdict::of_http(StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK)),
        });
        if let Some(mut in_flight) = self.in_flight.take() {
            in_flight.record(verdict);
        }
        self.permit = None;
        self.record();
    }

    fn record(&self) {
        let outcome = metrics::Outcome {
            status: self.status,
            grpc: if self.grpc { Some(self.grpc_status.unwrap_or(2)) } else { None },
            flag: self.flag,
        };
        self.upstream.metrics.record(outcome, self.started.elapsed());
    }

    /// The call's deadline passed.
    pub(crate) fn timed_out(&self, deadline: &Deadline, when: &str) -> Error {
        let message = format!("deadline of {:?} exceeded {when} ({})", deadline.limit, deadline.source);
        self.error(Kind::Timeout, message, None)
    }

    /// An error that says where the call was.
    pub(crate) fn error(&self, kind: Kind, message: String, source: Option<BoxError>) -> Error {
        let snapshot = &self.routing.snapshot;
        let route = snapshot
            .virtual_host
            .and_then(|v| snapshot.routes.virtual_hosts.get(v))
            .and_then(|v| v.routes.get(self.route))
            .map(|r| r.name.clone());
        let place = Place {
            target: Some(self.core.label.clone()),
            route,
            cluster: Some(self.upstream.name.clone()),
            endpoint: self.endpoint,
            attempt: self.attempts.number(),
            version: Some(snapshot.version.clone()),
        };
        Error::new(kind, message, place, source)
    }
}

impl Attempt {
    /// In words.
    fn ended(&self) -> String {
        match self {
            Self::Response(response) => match grpc_status(response.headers()) {
                Some(code) => format!("HTTP {}, grpc-status {code}", response.status().as_u16()),
                None => format!("HTTP {}", response.status().as_u16()),
            },
            Self::Failed(_, error) => error.reason(),
        }
    }
}

impl Drop for Call {
    /// The caller gave up: counted as a downstream disconnect; outlier detection is told nothing.
    fn drop(&mut self) {
        if !self.recorded {
            self.flag = "DC";
            self.grpc_status = Some(1);
            self.record();
        }
    }
}

impl SavedHead {
    fn of(head: &Parts) -> Self {
        let headers = head.headers.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
        Self { method: head.method.clone(), uri: head.uri.clone(), headers }
    }

    fn restore(&self) -> Parts {
        let mut request = Request::new(());
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = self.uri.clone();
        for (name, value) in &self.headers {
            request.headers_mut().append(name, value.clone());
        }
        request.into_parts().0
    }
}

/// Gives the URI the scheme and the authority that it lacks: the application's own authority wins, then a host header, then the target.
fn complete_uri(head: &mut Parts, core: &Core) {
    if head.uri.authority().is_some() && head.uri.scheme().is_some() {
        return;
    }
    let mut uri = std::mem::take(&mut head.uri).into_parts();
    if uri.authority.is_none() {
        uri.authority = head
            .headers
            .get(header::HOST)
            .and_then(|h| h.to_str().ok()?.parse().ok())
            .or_else(|| core.authority.clone());
    }
    if uri.authority.is_some() {
        uri.scheme.get_or_insert(Scheme::HTTP);
        uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    }
    head.uri = Uri::from_parts(uri).unwrap_or_default();
}

/// gRFC A33: every filter delays or aborts by its own draw.
#[allow(clippy::too_many_arguments, reason = "one call site; a struct would only rename the arguments")]
async fn inject_faults(
    core: &Core,
    routing: &Routing,
    route: &RouteEntry<UpstreamRef>,
    choice: &ClusterChoice<UpstreamRef>,
    head: &Parts,
    grpc: bool,
    deadline: Option<&Deadline>,
    explain: Option<&Explain>,
) -> Result<Option<Response<MeshBody>>, Error> {
    for fault in &choice.faults {
        let plan = {
            let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
            fault.decide(&RequestHead::new(&head.method, &head.uri, &head.headers), &mut rng)
        };
        if let Some(delay) = plan.delay {
            if let Some(explain) = explain {
                explain.add("fault", format!("delayed by {delay:?}"));
            }
            let over = deadline.filter(|d| d.remaining(Instant::now()) <= delay);
            tokio::time::sleep(over.map_or(delay, |d| d.remaining(Instant::now()))).await;
            if let Some(deadline) = over {
                let message = format!(
                    "deadline of {:?} exceeded in an injected delay of {delay:?} ({})",
                    deadline.limit, deadline.source
                );
                return Err(core.local(routing, Kind::Timeout, message, Some(route), None));
            }
        }
        if let Some(abort) = plan.abort {
            if let Some(explain) = explain {
                explain.add("fault", format!("aborted with gRPC status {} / HTTP {}", abort.grpc, abort.http));
            }
            return Ok(Some(abort_response(abort, grpc)));
        }
    }
    Ok(None)
}

fn abort_response(abort: FaultAbortStatus, grpc: bool) -> Response<MeshBody> {
    if !grpc {
        let mut response = Response::new(MeshBody::local(Bytes::from_static(FaultAbortStatus::MESSAGE.as_bytes())));
        *response.status_mut() = StatusCode::from_u16(abort.http).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
        return response;
    }
    let mut response = Response::new(MeshBody::local(Bytes::new()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from(abort.grpc));
    if abort.grpc != 0 {
        headers.insert("grpc-message", HeaderValue::from_static(FaultAbortStatus::MESSAGE));
    }
    response
}

fn is_refused(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(transport) = error.downcast_ref::<TransportError>() {
            return transport.kind() == transport::Kind::RefusedStream;
        }
        next = error.source();
    }
    false
}

fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    let value = headers.get("grpc-status")?;
    Some(value.to_str().ok().and_then(|v| v.parse().ok()).unwrap_or(2))
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
