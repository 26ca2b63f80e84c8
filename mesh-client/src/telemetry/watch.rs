//! What is seen of one call by those who watch calls: the access log, spans, gRPC's instruments. A mesh without any of them has none of this.

use super::{
    access_log::{AccessLog, Direction, ResponseFlags},
    messages::Messages,
    metrics::{
        Outcome, Sizes, Workload,
        grpc::{AttemptEnd, CallEnd, Method, Place},
    },
    spans::{AttemptSpan, CallSpan, Which},
    trace::TraceId,
};
use crate::{
    Error,
    body::MeshBody,
    outbound::{
        cluster::Placement,
        narrate,
        resolve::Facts,
        retry::{grpc_from_http, grpc_status},
        upstream::Upstream,
    },
};
use http::{HeaderMap, HeaderName, Response, header, request::Parts};
use mesh_tls::PeerIdentity;
use smallvec::SmallVec;
use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const SERVICE_TIME: HeaderName = HeaderName::from_static("x-envoy-upstream-service-time");

/// Messages whose lengths are kept for the spans of further attempts.
const MESSAGES: usize = 64;

/// Who watches the calls of a mesh. At least one does.
#[derive(Clone, Default)]
pub(crate) struct Observers {
    pub(crate) access_log: Option<AccessLogger>,
    pub(crate) spans: bool,
}

/// The application's own hook.
pub(crate) type AccessLogger = Arc<dyn Fn(&AccessLog) + Send + Sync>;

/// One call that is watched: shared by its future, its bodies and its attempts.
pub(crate) struct Watch {
    observers: Arc<Observers>,
    facts: Arc<Facts>,
    /// gRPC's instruments, of a gRPC call, where they are on.
    method: Option<Arc<Method>>,
    started: Instant,
    request: Meter,
    response: Meter,
    state: Mutex<State>,
}

/// What went one way.
#[derive(Debug, Default)]
struct Meter {
    bytes: AtomicU64,
    messages: AtomicU64,
}

struct State {
    /// Filled in as the call goes on.
    log: AccessLog,
    /// How it was judged, and by which cluster, if it came to one.
    outcome: Option<Outcome>,
    upstream: Option<Arc<Upstream>>,
    /// Of the last attempt's endpoint.
    workload: Workload,
    attempts: SmallVec<[Attempt; 2]>,
    /// The attempt that the caller gets; the last one, unless it is said.
    winner: Option<u32>,
    retries: u32,
    transparent: u32,
    /// With no attempt in flight, between two.
    delay: Duration,
    /// When the last attempt ended, unless another is in flight.
    waiting: Option<Instant>,
    /// Of the call, until it is over.
    span: Option<CallSpan>,
    /// The messages sent so far, for attempts to come: the first so many.
    sent: SmallVec<[u32; 2]>,
    /// The attempt that is next has to wait for a connection.
    delayed: bool,
    /// It was said.
    over: bool,
}

/// One attempt.
struct Attempt {
    number: u32,
    began: Instant,
    ended: bool,
    /// It began while another was in flight.
    hedge: bool,
    /// Where it went, where that is told.
    place: Option<Place>,
    span: Option<AttemptSpan>,
}

/// How an attempt ended.
struct Closed<'a> {
    http: u16,
    code: u32,
    error: Option<&'a str>,
    received: u64,
}

/// An attempt that is about to be sent.
pub(crate) struct Begun<'a> {
    pub(crate) number: u32,
    /// Transparent retries so far.
    pub(crate) transparent: u32,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) placement: Option<&'a Placement>,
    /// Whose endpoint it is.
    pub(crate) cluster: &'a Arc<str>,
    pub(crate) peer: Option<&'a PeerIdentity>,
}

/// Where a call was when its end was judged.
pub(crate) struct Judged<'a> {
    pub(crate) outcome: Outcome,
    pub(crate) cluster: Option<&'a Arc<str>>,
    /// The cluster, if it serves.
    pub(crate) upstream: Option<&'a Arc<Upstream>>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) attempts: u32,
    pub(crate) retries: u32,
    pub(crate) transparent: u32,
}

impl Judged<'_> {
    /// Before any attempt.
    pub(crate) fn early(outcome: Outcome) -> Self {
        Self { outcome, cluster: None, upstream: None, endpoint: None, attempts: 0, retries: 0, transparent: 0 }
    }
}

impl Observers {
    /// Somebody watches.
    pub(crate) fn any(&self) -> bool {
        self.access_log.is_some() || self.spans
    }
}

impl Watch {
    pub(crate) fn new(
        observers: Arc<Observers>,
        facts: Arc<Facts>,
        head: &Parts,
        grpc: bool,
        started: Instant,
        span: Option<CallSpan>,
    ) -> Arc<Self> {
        let headers = &head.headers;
        let host = || headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let own = head.uri.authority().map(|authority| authority.as_str()).or_else(host);
        let log = AccessLog {
            direction: Direction::Outbound,
            remote: None,
            start_time: SystemTime::now(),
            duration: Duration::ZERO,
            response_duration: None,
            target: facts.label.clone(),
            method: head.method.clone(),
            uri: head.uri.clone(),
            authority: own.or(facts.authority.as_ref().map(|a| a.as_str())).unwrap_or_default().to_owned(),
            version: head.version,
            grpc,
            user_agent: headers.get(header::USER_AGENT).cloned(),
            request_id: headers.get(REQUEST_ID).cloned(),
            forwarded_for: headers.get(FORWARDED_FOR).cloned(),
            status: 0,
            grpc_status: None,
            flags: ResponseFlags::NONE,
            error: None,
            request_bytes: 0,
            response_bytes: 0,
            request_messages: 0,
            response_messages: 0,
            route: None,
            cluster: None,
            endpoint: None,
            attempts: 0,
            peer: None,
            upstream_service_time: None,
            details: None,
            trace_id: None,
        };
        let method = facts.calls.as_ref().filter(|_| grpc).map(|calls| calls.method(head.uri.path()));
        let state = State {
            log,
            outcome: None,
            upstream: None,
            workload: Workload::default(),
            attempts: SmallVec::new(),
            winner: None,
            retries: 0,
            transparent: 0,
            delay: Duration::ZERO,
            waiting: None,
            span,
            sent: SmallVec::new(),
            delayed: false,
            over: false,
        };
        let (request, response) = <(Meter, Meter)>::default();
        Arc::new(Self { observers, facts, method, started, request, response, state: Mutex::new(state) })
    }

    /// It is a gRPC call.
    pub(crate) fn is_grpc(&self) -> bool {
        self.state().log.grpc
    }

    /// Its route was found.
    pub(crate) fn routed(&self, route: &Arc<str>) {
        self.state().log.route = Some(route.clone());
    }

    /// It is part of a trace.
    pub(crate) fn traced(&self, trace: TraceId) {
        self.state().log.trace_id = Some(trace);
    }

    /// It was judged: nothing of it but the rest of its response comes after this.
    pub(crate) fn judged(&self, judged: &Judged<'_>) {
        let mut state = self.state();
        state.outcome = Some(judged.outcome);
        state.upstream = judged.upstream.cloned();
        (state.retries, state.transparent) = (judged.retries, judged.transparent);
        let log = &mut state.log;
        log.flags |= judged.outcome.flag;
        log.cluster = judged.cluster.cloned();
        log.endpoint = judged.endpoint;
        log.attempts = judged.attempts;
    }

    /// An attempt is about to be sent.
    pub(crate) fn attempt(&self, begun: &Begun<'_>, headers: &mut HeaderMap) {
        let now = Instant::now();
        let mut state = self.state();
        state.log.peer = begun.peer.map(narrate::identity);
        if self.facts.settings.metrics.workloads {
            let metadata = begun.placement.and_then(|placement| placement.metadata.as_deref());
            let principal = state.log.peer.as_deref().map(Arc::from);
            state.workload = Workload { text: metadata.and_then(Workload::named), principal };
        }
        if let Some(since) = state.waiting.take() {
            state.delay += now.saturating_duration_since(since);
        }
        let hedge = state.attempts.iter().any(|attempt| !attempt.ended);
        let which = Which {
            previous: u32::try_from(state.attempts.len()).unwrap_or(u32::MAX),
            transparent: begun.transparent > state.transparent,
            delayed: std::mem::take(&mut state.delayed),
            endpoint: begun.endpoint,
        };
        state.transparent = begun.transparent;
        let mut span = state.span.as_ref().map(|call| call.attempt(which, headers));
        if let Some(span) = &mut span {
            state.sent.iter().for_each(|length| span.sent(u64::from(*length)));
        }
        let told = self.facts.settings.metrics.labels_attempts() && self.method.is_some();
        let place = begun
            .placement
            .filter(|_| told)
            .map(|placement| Place { cluster: begun.cluster.clone(), locality: placement.locality.clone() });
        state.attempts.push(Attempt { number: begun.number, began: now, ended: false, hedge, place, span });
        if let Some(method) = &self.method {
            method.started();
        }
    }

    /// The first configuration had to be waited for.
    pub(crate) fn resolved(&self) {
        if let Some(span) = &self.state().span {
            span.resolved();
        }
    }

    /// The attempt that is next has to wait for a connection.
    pub(crate) fn delayed(&self) {
        self.state().delayed = true;
    }

    /// Bytes of the request were read.
    pub(crate) fn sent(&self, data: &[u8], messages: Option<&mut Messages>) {
        let messages = messages.map_or(0, |messages| messages.take(data, |length| self.message_sent(length)));
        self.request.add(data.len(), messages);
    }

    fn message_sent(&self, length: u32) {
        if !self.observers.spans {
            return;
        }
        let mut state = self.state();
        if state.sent.len() < MESSAGES {
            state.sent.push(length);
        }
        for span in state.attempts.iter_mut().filter_map(|attempt| attempt.span.as_mut()) {
            span.sent(u64::from(length));
        }
    }

    /// Bytes of the response were handed on.
    pub(crate) fn received(&self, data: &[u8], messages: Option<&mut Messages>) {
        let messages = messages.map_or(0, |messages| messages.take(data, |length| self.message_received(length)));
        self.response.add(data.len(), messages);
    }

    fn message_received(&self, length: u32) {
        if !self.observers.spans {
            return;
        }
        let mut state = self.state();
        let winner = state.winner;
        let attempts = state.attempts.iter_mut();
        let open =
            attempts.rev().find(|attempt| winner.is_none_or(|winner| winner == attempt.number) && !attempt.ended);
        if let Some(span) = open.and_then(|attempt| attempt.span.as_mut()) {
            span.received(u64::from(length));
        }
    }

    /// An attempt ended with this HTTP status (0: none) and this gRPC status; the call did not. One that found no connection is told
    /// of here first.
    pub(crate) fn attempt_ended(&self, number: u32, http: u16, code: u32, error: Option<&str>) {
        let now = Instant::now();
        let mut state = self.state();
        self.close(&mut state, number, &Closed { http, code, error, received: 0 }, now);
        if state.attempts.iter().all(|attempt| attempt.ended) {
            state.waiting = Some(now);
        }
    }

    fn close(&self, state: &mut State, number: u32, closed: &Closed<'_>, now: Instant) {
        let &Closed { http, code, error, received } = closed;
        let found = state.attempts.iter_mut().find(|attempt| attempt.number == number && !attempt.ended);
        let (began, place) = match found {
            Some(attempt) => {
                attempt.ended = true;
                if let Some(span) = attempt.span.take() {
                    span.end(http, code, error);
                }
                (attempt.began, attempt.place.take())
            }
            None => {
                state.attempts.push(Attempt { number, began: now, ended: true, hedge: false, place: None, span: None });
                if let Some(method) = &self.method {
                    method.started();
                }
                (now, None)
            }
        };
        if let Some(method) = &self.method {
            let took = now.saturating_duration_since(began);
            method.attempt(&AttemptEnd { code, took, sent: self.request.payload(), received }, place.as_ref());
        }
    }

    /// Of several attempts in flight this one is the caller's.
    pub(crate) fn won(&self, number: u32) {
        self.state().winner = Some(number);
    }

    /// Whose endpoint it went to, where that is to be told.
    pub(crate) fn workload(&self) -> Option<Workload> {
        self.facts.settings.metrics.workloads.then(|| self.state().workload.clone())
    }

    /// The caller gets this response.
    pub(crate) fn answered(&self, response: &Response<MeshBody>) {
        let mut state = self.state();
        let log = &mut state.log;
        log.response_duration = Some(self.started.elapsed());
        log.status = response.status().as_u16();
        log.upstream_service_time = response.headers().get(SERVICE_TIME).cloned();
        if log.grpc {
            log.grpc_status = grpc_status(response.headers());
        }
    }

    /// The response ended with these trailers.
    pub(crate) fn trailers(&self, trailers: &HeaderMap) {
        let mut state = self.state();
        if state.log.grpc {
            state.log.grpc_status = grpc_status(trailers).or(state.log.grpc_status);
        }
    }

    /// The caller gets this error, instead of a response or of the rest of its body.
    pub(crate) fn failed(&self, error: &Error) {
        let mut state = self.state();
        let log = &mut state.log;
        log.error = Some(error.reason());
        if log.status == 0 {
            log.status = error.http_status().as_u16();
        }
        if log.grpc {
            log.grpc_status = Some(i32::from(error.code()).unsigned_abs());
        }
        log.endpoint = log.endpoint.or(error.endpoint());
    }

    /// The call is over, and is reported; once. `complete`: the caller did not give up.
    pub(crate) fn end(&self, complete: bool) {
        let mut state = self.state();
        if std::mem::replace(&mut state.over, true) {
            return;
        }
        let log = &mut state.log;
        log.duration = self.started.elapsed();
        (log.request_bytes, log.request_messages) = self.request.read();
        (log.response_bytes, log.response_messages) = self.response.read();
        if !complete {
            // Before its end was judged there was nothing to judge.
            log.flags |= ResponseFlags::DOWNSTREAM_CONNECTION_TERMINATION;
        }
        if log.grpc && log.grpc_status.is_none() {
            log.grpc_status = Some(match (complete, log.status) {
                (false, _) => 1,
                (true, 200) => 2,
                (true, status) => grpc_from_http(status),
            });
        }
        self.measure(&mut state);
        if let Some(logger) = &self.observers.access_log {
            logger(&state.log);
        }
    }

    /// What is measured of calls that are over.
    fn measure(&self, state: &mut State) {
        let now = Instant::now();
        let code = state.log.grpc_status.unwrap_or(2);
        let last = state.winner.unwrap_or(state.log.attempts);
        let open: SmallVec<[u32; 2]> = state.attempts.iter().filter(|a| !a.ended).map(|a| a.number).collect();
        for number in open.into_iter().filter(|number| *number != last) {
            // Another won, and cut it off.
            self.close(state, number, &Closed { http: 0, code: 1, error: None, received: 0 }, now);
        }
        if state.log.attempts > 0 && !state.attempts.iter().any(|a| a.number == last && a.ended) {
            let error = state.log.error.clone();
            let http = if error.is_some() && state.log.response_duration.is_none() { 0 } else { state.log.status };
            let received = self.response.payload();
            self.close(state, last, &Closed { http, code, error: error.as_deref(), received }, now);
        }
        if let Some(span) = state.span.take() {
            span.end(&state.log);
        }
        if let Some(method) = &self.method {
            let hedges = state.attempts.iter().filter(|attempt| attempt.hedge).count();
            let hedges = u32::try_from(hedges).unwrap_or(u32::MAX);
            method.call(&CallEnd {
                code,
                took: state.log.duration,
                retries: state.retries.saturating_sub(hedges),
                transparent: state.transparent,
                hedges,
                delay: state.delay,
            });
        }
        let metrics = self.facts.settings.metrics;
        if let (true, Some(upstream), Some(outcome)) = (metrics.sizes, &state.upstream, state.outcome) {
            let log = &state.log;
            let sizes = Sizes {
                bytes: [log.request_bytes, log.response_bytes],
                messages: [log.request_messages, log.response_messages],
            };
            let workload = metrics.workloads.then(|| state.workload.clone());
            upstream.metrics.record_sizes(outcome, workload, sizes);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    /// So much more went by.
    fn add(&self, bytes: usize, messages: u64) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
        if messages > 0 {
            self.messages.fetch_add(messages, Relaxed);
        }
    }

    /// Bytes of gRPC messages, without their prefixes.
    fn payload(&self) -> u64 {
        let (bytes, messages) = self.read();
        bytes.saturating_sub(5 * messages)
    }

    /// Bytes and messages.
    fn read(&self) -> (u64, u64) {
        (self.bytes.load(Relaxed), self.messages.load(Relaxed))
    }
}

impl fmt::Debug for Observers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Observers").field("access_log", &self.access_log.is_some()).finish()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}
