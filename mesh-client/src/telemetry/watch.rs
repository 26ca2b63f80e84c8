//! What is seen of one call by those who watch calls: the access log, spans, gRPC's instruments. A mesh without any of them has none of this.

use super::{
    access_log::{AccessLog, ResponseFlags},
    trace::TraceId,
};
use crate::{
    Error,
    body::MeshBody,
    outbound::{
        resolve::Facts,
        retry::{grpc_from_http, grpc_status},
    },
};
use http::{HeaderMap, HeaderName, Response, header, request::Parts};
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

/// Who watches the calls of a mesh. At least one does.
#[derive(Clone, Default)]
pub(crate) struct Observers {
    pub(crate) access_log: Option<AccessLogger>,
}

/// The application's own hook.
pub(crate) type AccessLogger = Arc<dyn Fn(&AccessLog) + Send + Sync>;

/// One call that is watched: shared by its future, its bodies and its attempts.
pub(crate) struct Watch {
    observers: Arc<Observers>,
    started: Instant,
    pub(crate) request: Meter,
    pub(crate) response: Meter,
    state: Mutex<State>,
}

/// What went one way.
#[derive(Debug, Default)]
pub(crate) struct Meter {
    bytes: AtomicU64,
    messages: AtomicU64,
}

struct State {
    /// Filled in as the call goes on.
    log: AccessLog,
    /// It was said.
    over: bool,
}

/// Where a call was when its end was judged.
pub(crate) struct Judged<'a> {
    pub(crate) flags: ResponseFlags,
    pub(crate) cluster: Option<&'a Arc<str>>,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) attempts: u32,
}

impl Observers {
    /// Somebody watches.
    pub(crate) fn any(&self) -> bool {
        self.access_log.is_some()
    }
}

impl Watch {
    pub(crate) fn new(
        observers: Arc<Observers>,
        facts: &Facts,
        head: &Parts,
        grpc: bool,
        started: Instant,
    ) -> Arc<Self> {
        let headers = &head.headers;
        let host = || headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let own = head.uri.authority().map(|authority| authority.as_str()).or_else(host);
        let log = AccessLog {
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
            trace_id: None,
        };
        let state = Mutex::new(State { log, over: false });
        Arc::new(Self { observers, started, request: Meter::default(), response: Meter::default(), state })
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
        let log = &mut state.log;
        log.flags |= judged.flags;
        log.cluster = judged.cluster.cloned();
        log.endpoint = judged.endpoint;
        log.attempts = judged.attempts;
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
        if let Some(logger) = &self.observers.access_log {
            logger(log);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Meter {
    /// So much more went by.
    pub(crate) fn add(&self, bytes: usize, messages: u64) {
        self.bytes.fetch_add(bytes as u64, Relaxed);
        if messages > 0 {
            self.messages.fetch_add(messages, Relaxed);
        }
    }

    /// Bytes and messages.
    pub(crate) fn read(&self) -> (u64, u64) {
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
