//! What a server decides about a request, and what it sees of the answer.

use super::{
    ConnectionInfo,
    jwt::{FetchKeys, Fetched, JwtClaims, Keys, Shelf},
    normalize,
    refusals::Refusals,
    routes::{Entry, Routes},
    steps::Ran,
    xfcc::Forwarding,
};
use crate::{
    outbound::{
        filter::{
            Ended, FilterResponse, Filters, Found, Outcome as FilterOutcome, Reply, Surroundings, Watch, Watching,
        },
        retry::grpc_status,
        route::{Asked, Facts, RequestHead, ServerRoute},
        timeout::{Deadline, Rules, is_grpc},
    },
    telemetry::{
        access_log::{AccessLog, ResponseFlags as Flag},
        metrics::{Caller, Outcome, PeerMetrics, ServerMetrics},
        trace::TraceContext,
        watch::AccessLogger,
    },
    transport::is_told_overdue,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Version, request, response};
use http_body::Frame;
use mesh_tls::CryptoProvider;
use mesh_xds::resource::{ClientCertDetails, ForwardClientCert, HttpFilter, HttpFilterConfig, RouteConfiguration};
use std::{
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// What every request of a filter chain is asked, compiled.
pub(crate) struct Policy {
    routes: Routes,
    forwarding: Forwarding,
    metrics: Arc<ServerMetrics>,
    access_log: Option<AccessLogger>,
    normalize: bool,
}

/// What the policies of one inbound side share, and keep over changes of the configuration.
pub(crate) struct Kept {
    pub(super) filters: Filters,
    pub(super) shelf: Shelf,
    pub(super) metrics: Arc<ServerMetrics>,
    pub(super) access_log: Option<AccessLogger>,
    pub(super) provider: Arc<CryptoProvider>,
    /// Paths are normalised first.
    pub(super) normalize: bool,
    pub(super) refusals: Arc<Refusals>,
}

/// Who fetches these keys.
pub(crate) type FetcherOf<'a> = dyn Fn(&mesh_xds::resource::RemoteJwks) -> Option<Arc<dyn FetchKeys>> + 'a;

/// What a policy is made of.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    /// Name of the listener and its filter chain, under which its filters keep what they count.
    pub(crate) listener: &'a Arc<str>,
    /// The first so many filters count under this name: for all chains together.
    pub(crate) together: Option<(&'a Arc<str>, usize)>,
    /// Of the connection manager, in order.
    pub(crate) filters: &'a [HttpFilter],
    /// `None`: every request is served.
    pub(crate) routes: Option<&'a Arc<RouteConfiguration>>,
    pub(crate) forward_client_cert: ForwardClientCert,
    pub(crate) client_cert_details: ClientCertDetails,
    /// `common_http_protocol_options.max_stream_duration`
    pub(crate) max_stream_duration: Option<Duration>,
    /// For what calls clusters of the configuration; `None`: there are none.
    pub(crate) around: Option<Surroundings<'a>>,
    /// Keys of the application's own, for what is made in code.
    pub(crate) fetch: Option<&'a FetcherOf<'a>>,
}

/// What is at hand while a policy is compiled.
pub(super) struct Making<'a> {
    pub(super) listener: &'a Arc<str>,
    pub(super) together: Option<(&'a Arc<str>, usize)>,
    pub(super) filters: &'a [HttpFilter],
    pub(super) shared: &'a Kept,
    pub(super) keys: Keys<'a>,
    pub(super) max_stream_duration: Option<Duration>,
    pub(super) around: Option<Surroundings<'a>>,
}

/// When it is known what becomes of a request.
#[allow(clippy::large_enum_variant, reason = "the large one is the common one: a box for each request costs more")]
pub(crate) enum Verdict {
    /// At once.
    Now(Decision),
    /// Later: the head that it was asked with is taken (what is left behind means nothing) and comes back with the decision.
    Later(Deciding),
}

/// A decision to come.
pub(crate) type Deciding = Pin<Box<dyn Future<Output = (request::Parts, Decision)> + Send>>;

/// What becomes of a request.
pub(crate) enum Decision {
    /// It is served.
    Pass(Exchange),
    /// It is answered here; `Exchange` sees that answer.
    Answer(Reply, Exchange),
    /// The same, by its route.
    Respond(Response<Bytes>, Exchange),
}

/// One request and its answer, as far as somebody watches them. Dropped when the answer's body ended, or nobody wants it any more.
#[derive(Default)]
pub(crate) struct Exchange(Option<Seen>);

/// A request that is counted.
struct Seen {
    metrics: Arc<PeerMetrics>,
    started: Instant,
    /// By when it has to be answered.
    deadline: Option<Deadline>,
    grpc: bool,
    flags: Flag,
    /// 0: there was no answer.
    status: u16,
    code: Option<u32>,
    /// Our own answer.
    local: bool,
    trace: Option<TraceContext>,
    claims: Option<JwtClaims>,
    watching: Option<Box<Watching>>,
    editing: Option<Box<Editing>>,
    /// The request's body is read whole first, up to so many bytes.
    buffer: Option<u64>,
    log: Option<Box<Logged>>,
}

/// A request that is logged.
struct Logged {
    log: AccessLog,
    /// Our own end of the connection.
    local: SocketAddr,
    hook: AccessLogger,
}

impl Kept {
    pub(crate) fn new(metrics: ServerMetrics, provider: Arc<CryptoProvider>) -> Self {
        Self {
            filters: Filters::default(),
            shelf: Shelf::default(),
            metrics: Arc::new(metrics),
            access_log: None,
            provider,
            normalize: false,
            refusals: Arc::default(),
        }
    }

    /// Whether paths are normalised before anything looks at them.
    pub(crate) fn normalize(mut self, normalize: bool) -> Self {
        self.normalize = normalize;
        self
    }

    /// Tells this hook of every request.
    pub(crate) fn access_log(mut self, hook: Option<AccessLogger>) -> Self {
        self.access_log = hook;
        self
    }
}

impl Policy {
    /// Compiles what a filter chain says. What cannot be honoured lets nobody in.
    pub(crate) fn compile(source: Source<'_>, kept: &Kept) -> Self {
        let Source { listener, together, filters, around, .. } = source;
        let own = |remote: &mesh_xds::resource::RemoteJwks| {
            if let Some(fetch) = source.fetch.and_then(|fetch| fetch(remote)) {
                return Some(fetch);
            }
            let channel = kept.filters.services.channel(&remote.cluster, around?)?;
            Some(Arc::new(Fetched { channel, uri: remote.uri.clone() }) as Arc<dyn FetchKeys>)
        };
        let keys = Keys { shelf: &kept.shelf, provider: kept.provider.clone(), fetch: &own };
        let max_stream_duration = source.max_stream_duration;
        let making = Making { listener, together, filters, shared: kept, keys, max_stream_duration, around };
        filters.iter().for_each(meaningless);
        Self {
            routes: Routes::compile(source.routes, &making),
            forwarding: Forwarding::new(source.forward_client_cert, source.client_cert_details, kept.provider.clone()),
            metrics: kept.metrics.clone(),
            access_log: kept.access_log.clone(),
            normalize: kept.normalize,
        }
    }

    /// What of it cannot be honoured, where that is the same for all requests.
    pub(super) fn refusal(&self) -> Option<&Arc<str>> {
        self.routes.refusal()
    }

    /// Decides about a request, and edits its head.
    pub(crate) fn admit(&self, connection: &ConnectionInfo, head: &mut request::Parts) -> Verdict {
        self.forwarding.apply(connection, &mut head.headers);
        let mut exchange = self.begin(connection, head);
        if self.normalize && !normalize::path(&mut head.uri) {
            let reply =
                Reply::new(StatusCode::BAD_REQUEST, "the path is ambiguous").details("path_normalization_failed");
            return Verdict::Now(Decision::answer(reply, exchange));
        }
        let found = self.routes.find(&RequestHead::of(head));
        if let (Some(entry), Some(logged)) = (found, exchange.logged()) {
            logged.log.route = Some(entry.name.clone());
        }
        let Some(entry) = found else {
            exchange.flag(Flag::NO_ROUTE);
            let reply = Reply::new(StatusCode::NOT_FOUND, "no route matches").grpc_status(14).flag(Flag::NO_ROUTE);
            return Verdict::Now(Decision::answer(reply, exchange));
        };
        match entry.steps.run(0, &entry.name, connection, head, &mut exchange) {
            Ran::Passed => Verdict::Now(entry.served(exchange, head)),
            Ran::Answered(reply) => Verdict::Now(Decision::answer(reply, exchange)),
            Ran::Waits(from) => {
                let taken = std::mem::replace(head, Request::new(()).into_parts().0);
                Verdict::Later(Box::pin(later(entry.clone(), from, connection.clone(), taken, exchange)))
            }
        }
    }

    fn begin(&self, connection: &ConnectionInfo, head: &mut request::Parts) -> Exchange {
        let metrics = connection.seen().metrics.get_or_init(|| {
            let peer = connection.peer();
            let principal = peer.map(|peer| match peer.spiffe_id() {
                Some(id) => id.as_str().into(),
                None => peer.to_string().into(),
            });
            self.metrics.of(Caller { principal, mutual: peer.is_some() })
        });
        let trace = TraceContext::received(&head.headers);
        if let Some(trace) = &trace {
            head.extensions.insert(trace.clone());
        }
        let grpc = is_grpc(&head.headers);
        let log =
            self.access_log.as_ref().map(|hook| Box::new(Logged::begin(hook, connection, head, grpc, trace.as_ref())));
        Exchange(Some(Seen {
            metrics: metrics.clone(),
            started: Instant::now(),
            deadline: None,
            grpc,
            flags: Flag::NONE,
            status: 0,
            code: None,
            local: false,
            trace,
            claims: None,
            watching: None,
            editing: None,
            buffer: None,
            log,
        }))
    }
}

async fn later(
    entry: Arc<Entry>,
    from: usize,
    connection: ConnectionInfo,
    mut head: request::Parts,
    mut exchange: Exchange,
) -> (request::Parts, Decision) {
    let decision = match entry.steps.wait(from, &entry.name, &connection, &mut head, &mut exchange).await {
        Some(reply) => Decision::answer(reply, exchange),
        None => entry.served(exchange, &mut head),
    };
    (head, decision)
}

impl Entry {
    /// What becomes of a request that its filters let pass.
    fn served(self: &Arc<Self>, mut exchange: Exchange, head: &mut request::Parts) -> Decision {
        if let Some(reason) = &self.unavailable {
            tracing::debug!(target: "mesh::inbound", route = &*self.name, %reason, "not served");
            exchange.flag(Flag::NO_ROUTE);
            let reply = Reply::new(StatusCode::SERVICE_UNAVAILABLE, "the route is not served here").grpc_status(14);
            return Decision::answer(reply, exchange);
        }
        if matches!(self.action, ServerRoute::Served(_)) {
            exchange.limit(&self.timeouts, &head.headers);
        }
        match &self.action {
            ServerRoute::Served(None) => Decision::Pass(exchange),
            ServerRoute::Served(Some(edits)) => {
                let (version, start) = (head.version, SystemTime::now());
                match edits.request(head, &self.facts(version, start)) {
                    Ok(asked) => {
                        exchange.edit(Editing { entry: self.clone(), asked, version, start });
                        Decision::Pass(exchange)
                    }
                    Err(error) => {
                        tracing::debug!(target: "mesh::inbound", route = &*self.name, %error, "not served");
                        let reply = Reply::new(StatusCode::INTERNAL_SERVER_ERROR, "the route cannot be served");
                        let reply = reply.details(error.to_string());
                        Decision::answer(reply.grpc_status(13), exchange)
                    }
                }
            }
            ServerRoute::Answered(answer) => {
                let asked = RequestHead::new(&head.method, &head.uri, &head.headers);
                let response = answer.respond(&self.facts(head.version, SystemTime::now()), &asked, exchange.is_grpc());
                exchange.answers_here();
                Decision::Respond(response, exchange)
            }
        }
    }

    /// For the texts of its edits.
    fn facts(&self, version: Version, start: SystemTime) -> Facts<'_> {
        Facts { request: None, response: None, version, endpoint: None, cluster: "", route: &self.name, start }
    }
}

/// What is changed of a response.
struct Editing {
    entry: Arc<Entry>,
    /// The request, where that is made of it.
    asked: Option<Asked>,
    version: Version,
    start: SystemTime,
}

impl Editing {
    fn apply(&self, head: &mut response::Parts) {
        let ServerRoute::Served(Some(edits)) = &self.entry.action else { return };
        let facts = self.entry.facts(self.version, self.start);
        edits.response(head.status, &mut head.headers, self.asked.as_ref(), &facts);
    }
}

impl Decision {
    fn answer(reply: Reply, mut exchange: Exchange) -> Self {
        exchange.answered(&reply);
        Self::Answer(reply, exchange)
    }
}

impl Exchange {
    /// Nobody watches.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    fn logged(&mut self) -> Option<&mut Logged> {
        self.0.as_mut()?.log.as_deref_mut()
    }

    pub(super) fn is_grpc(&self) -> bool {
        self.0.as_ref().is_some_and(|seen| seen.grpc)
    }

    /// What a filter says of the request besides its verdict.
    pub(super) fn found(&mut self, found: &Found) {
        if let Some(seen) = &mut self.0 {
            seen.flags |= found.flags;
            seen.buffer = found.buffer.into_iter().chain(seen.buffer).min();
        }
    }

    /// It may take so long.
    fn limit(&mut self, timeouts: &Rules, headers: &HeaderMap) {
        if let Some(seen) = &mut self.0 {
            seen.deadline = timeouts.deadline_of(seen.started, headers, seen.grpc);
        }
    }

    /// When the answer has to be there: that of gRPC to its end, others have begun.
    pub(super) fn deadline(&self) -> Option<Instant> {
        Some(self.0.as_ref()?.deadline?.at)
    }

    /// Its time is over.
    pub(super) fn is_late(&mut self) -> Flag {
        let deadline = self.0.as_mut().and_then(|seen| seen.deadline.take());
        let of_stream = deadline.is_some_and(|deadline| deadline.source.is_stream_duration());
        let flag = if of_stream { Flag::UPSTREAM_MAX_STREAM_DURATION } else { Flag::UPSTREAM_REQUEST_TIMEOUT };
        self.flag(flag);
        flag
    }

    /// How many bytes of the request's body are read first, if it is to be whole.
    pub(super) fn buffer(&self) -> Option<u64> {
        self.0.as_ref()?.buffer
    }

    /// The request is not served after all.
    pub(super) fn refused(&mut self, reply: &Reply) {
        if let Some(seen) = &mut self.0 {
            seen.editing = None;
        }
        self.answered(reply);
    }

    fn edit(&mut self, editing: Editing) {
        if let Some(seen) = &mut self.0 {
            seen.editing = Some(Box::new(editing));
        }
    }

    fn answers_here(&mut self) {
        if let Some(seen) = &mut self.0 {
            seen.local = true;
        }
    }

    /// Who watches the body of the answer.
    pub(super) fn watching(&mut self) -> Option<Watching> {
        self.0.as_mut()?.watching.take().map(|watching| *watching)
    }

    pub(super) fn flag(&mut self, flag: Flag) {
        if let Some(seen) = &mut self.0 {
            seen.flags |= flag;
        }
    }

    /// Tokens were verified.
    pub(super) fn learnt(&mut self, claims: Option<JwtClaims>) {
        if let (Some(seen), Some(claims)) = (&mut self.0, claims) {
            seen.claims = Some(claims);
        }
    }

    /// What RBAC knows of tokens.
    pub(super) fn claims(&self) -> Option<&serde_json::Value> {
        Some(self.0.as_ref()?.claims.as_ref()?.metadata())
    }

    /// A filter wants to see the answer.
    pub(super) fn watch(&mut self, watch: Box<dyn Watch>) {
        if let Some(seen) = &mut self.0 {
            let started = seen.started;
            seen.watching.get_or_insert_with(|| Box::new(Watching::new(started))).push(watch);
        }
    }

    /// The trace that the request is part of.
    pub(super) fn trace(&self) -> Option<TraceContext> {
        self.0.as_ref()?.trace.clone()
    }

    /// The answer that comes is our own.
    fn answered(&mut self, reply: &Reply) {
        if let Some(seen) = &mut self.0 {
            let (_, _, flag) = reply.outcome(seen.grpc);
            seen.flags |= flag;
            seen.local = true;
            if let (Some(logged), Some(details)) = (&mut seen.log, reply.told_details()) {
                logged.log.details = Some(details.clone());
            }
        }
    }

    /// The head of the answer, before the client has it.
    pub(crate) fn response(&mut self, head: &mut response::Parts) {
        let Some(seen) = &mut self.0 else { return };
        if let Some(editing) = &seen.editing {
            editing.apply(head);
        }
        if let Some(watching) = &mut seen.watching {
            watching.response(&mut FilterResponse { head, endpoint: None, cluster: "", local: seen.local });
        }
        seen.status = head.status.as_u16();
        if let Some(logged) = &mut seen.log {
            logged.log.response_duration = Some(seen.started.elapsed());
        }
        if seen.grpc {
            seen.code = grpc_status(&head.headers);
        }
    }

    /// The next frame of the answer's body, before the client has it.
    pub(crate) fn frame(&mut self, frame: &mut Frame<Bytes>) {
        let Some(seen) = &mut self.0 else { return };
        if let (Some(logged), Some(data)) = (&mut seen.log, frame.data_ref()) {
            logged.log.response_bytes += data.len() as u64;
        }
        let Some(trailers) = frame.trailers_mut() else { return };
        if let Some(watching) = &mut seen.watching {
            watching.trailers(trailers);
        }
        if seen.grpc {
            seen.code = grpc_status(trailers).or(seen.code);
        }
    }

    /// The answer is complete: its last frame was handed on. Not called when it fails, or is dropped before.
    pub(crate) fn complete(&mut self) {
        if let Some(seen) = self.0.take() {
            seen.end(true);
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if let Some(mut seen) = self.0.take() {
            if is_told_overdue() {
                seen.flags |= Flag::STREAM_IDLE_TIMEOUT;
            }
            seen.end(false);
        }
    }
}

impl Seen {
    fn end(mut self, complete: bool) {
        let took = self.started.elapsed();
        if !complete && !self.flags.contains(Flag::STREAM_IDLE_TIMEOUT) {
            self.flags |= Flag::DOWNSTREAM_CONNECTION_TERMINATION;
        }
        let grpc = self.grpc.then(|| self.code.unwrap_or(if complete { 2 } else { 1 }));
        if let Some(watching) = &mut self.watching {
            let ended = match (complete, self.local) {
                (true, true) => Ended::Answered,
                (true, false) => Ended::Complete,
                (false, _) => Ended::Cancelled,
            };
            watching.end(&FilterOutcome { status: self.status, grpc_status: grpc, ended, took });
        }
        if let Some(logged) = self.log {
            let Logged { mut log, local, hook } = *logged;
            log.duration = took;
            (log.status, log.grpc_status, log.flags) = (self.status, grpc, self.flags);
            log.endpoint = (self.status != 0 && !self.local).then_some(local);
            hook(&log);
        }
        self.metrics.record(Outcome { status: self.status, grpc, flag: self.flags }, took);
    }
}

impl Logged {
    fn begin(
        hook: &AccessLogger,
        connection: &ConnectionInfo,
        head: &request::Parts,
        grpc: bool,
        trace: Option<&TraceContext>,
    ) -> Self {
        let log = AccessLog {
            remote: Some(connection.remote_addr()),
            peer: connection.peer().map(ToString::to_string),
            trace_id: trace.map(TraceContext::trace_id),
            ..AccessLog::served(head, grpc)
        };
        Self { log, local: connection.local_addr(), hook: hook.clone() }
    }
}

/// Says what of a client's filters has no meaning in a server.
fn meaningless(filter: &HttpFilter) {
    let reason = match &filter.config {
        HttpFilterConfig::StatefulSession(_) => "a server chooses no endpoint",
        HttpFilterConfig::GlobalRateLimit(_) => "servers do not ask a rate limit service",
        _ => return,
    };
    tracing::warn!(target: "mesh::inbound", filter = &*filter.name, reason, "the filter has no effect in a server");
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy").field("routes", &self.routes).finish_non_exhaustive()
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").finish_non_exhaustive()
    }
}

impl fmt::Debug for Exchange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Exchange").field("watched", &self.0.is_some()).finish()
    }
}
