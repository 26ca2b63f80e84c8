//! What a filter is: it sees a request before an endpoint is picked, and may watch the response.

use super::Reply;
use crate::{
    Error,
    telemetry::{access_log::ResponseFlags, explain::Explain},
};
use http::{HeaderMap, request, response};
use mesh_xds::resource::SessionHost;
use std::{borrow::Cow, net::SocketAddr, pin::Pin, time::Duration};
use tokio::time::Instant;

/// A filter with its configuration. One serves all calls of the routes that it is configured on, until the configuration changes.
///
/// Runs once per call, before the route's own edits and outside of retries; what it keeps of a call is given back when what it returned
/// is dropped.
///
/// ```
/// use mesh_client::filter::{Filter, FilterRequest, Reply, Step, Verdict};
///
/// struct Closed;
///
/// impl Filter for Closed {
///     fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
///         request.head_mut().headers.insert("x-seen", "1".parse().expect("a header value"));
///         Step::Now(match request.head().uri.path() {
///             "/closed" => Verdict::Answer(Reply::new(http::StatusCode::FORBIDDEN, "closed")),
///             _ => Verdict::Pass,
///         })
///     }
/// }
/// ```
pub trait Filter: Send + Sync + 'static {
    /// Decides about a request, now or later. What it returns is dropped when the caller gives up or the call's deadline passes.
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a>;

    /// Its configuration in a few words, for [`Mesh::explain`](crate::Mesh::explain).
    fn describe(&self) -> Cow<'_, str> {
        Cow::Borrowed("")
    }
}

/// When a filter decides.
pub enum Step<'a> {
    /// At once.
    Now(Verdict),
    /// When this is ready; bounded by the call's deadline.
    Later(Pin<Box<dyn Future<Output = Verdict> + Send + 'a>>),
}

/// What a filter decides about a request.
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It goes on, and this sees what comes back.
    Watch(Box<dyn Watch>),
    /// It is answered here. The filters before this one see the answer.
    Answer(Reply),
}

/// What of a filter sees the response. All methods have defaults that do nothing.
///
/// Those of a chain are asked in reverse order. [`end`](Self::end) is called once, whatever happens, unless the value was never returned.
pub trait Watch: Send + Sync + 'static {
    /// The head of the response, before the caller has it.
    fn response(&mut self, _response: &mut FilterResponse<'_>) {}

    /// How many of the `waiting` bytes of the body go on now, at least one; or no byte before an instant.
    ///
    /// # Errors
    /// The instant to ask again.
    fn throttle(&mut self, waiting: usize, _now: Instant) -> Result<usize, Instant> {
        Ok(waiting)
    }

    /// The trailers, before the caller has them.
    fn trailers(&mut self, _trailers: &mut HeaderMap) {}

    /// The call is over.
    fn end(&mut self, _outcome: &Outcome) {}
}

/// A request on its way through the filters.
#[derive(Debug)]
pub struct FilterRequest<'c> {
    pub(super) head: &'c mut request::Parts,
    pub(super) place: Place<'c>,
    pub(crate) found: Found,
}

/// What filters see of a call beside its head.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place<'c> {
    pub(crate) target: &'c str,
    pub(crate) route: &'c str,
    pub(crate) cluster: &'c str,
    pub(crate) grpc: bool,
    /// The route splits over several clusters.
    pub(crate) split: bool,
    pub(crate) deadline: Option<Instant>,
    pub(crate) explain: Option<Explain>,
}

/// What filters ask of the call.
#[derive(Clone, Debug, Default)]
pub(crate) struct Found {
    /// Position of the filter that decides now.
    pub(crate) position: usize,
    /// The body is read whole, and has at most so many bytes.
    pub(crate) buffer: Option<u64>,
    /// The endpoint of the caller's session, and perhaps its cluster.
    pub(crate) host: Option<SessionHost>,
    /// What it waits for, in words.
    pub(crate) waits: Option<String>,
    /// What was done to the request, in Envoy's words.
    pub(crate) flags: ResponseFlags,
}

/// The head of a response on its way back through the filters.
#[derive(Debug)]
pub struct FilterResponse<'c> {
    pub(crate) head: &'c mut response::Parts,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) cluster: &'c str,
    pub(crate) local: bool,
}

/// How a call ended.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Outcome {
    /// HTTP status of the response, or the one that stands for the error; 0 when the caller gave up before there was one.
    pub status: u16,
    /// gRPC status of a gRPC call (0..=16): of headers or trailers, or the one that stands for the error.
    pub grpc_status: Option<u32>,
    /// How.
    pub ended: Ended,
    /// From when the call began.
    pub took: Duration,
}

/// In which way a call ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ended {
    /// The response came whole.
    Complete,
    /// A filter answered.
    Answered,
    /// No response, or one that was cut off.
    Failed,
    /// A deadline passed.
    TimedOut,
    /// The caller gave up.
    Cancelled,
}

impl<'c> FilterRequest<'c> {
    pub(crate) fn new(head: &'c mut request::Parts, place: Place<'c>) -> Self {
        Self { head, place, found: Found::default() }
    }

    /// Method, URI, headers and extensions. The URI has scheme and authority.
    pub fn head(&self) -> &request::Parts {
        self.head
    }

    /// The same, to be changed. The route and the cluster are chosen already.
    pub fn head_mut(&mut self) -> &mut request::Parts {
        self.head
    }

    /// A gRPC call, by its content type.
    pub fn is_grpc(&self) -> bool {
        self.place.grpc
    }

    /// The target, as given to [`Mesh::channel`](crate::Mesh::channel); empty without a mesh.
    pub fn target(&self) -> &str {
        self.place.target
    }

    /// The name of the route, perhaps empty.
    pub fn route(&self) -> &str {
        self.place.route
    }

    /// The name of the cluster; empty without a mesh.
    pub fn cluster(&self) -> &str {
        self.place.cluster
    }

    /// When the call ends at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        self.place.deadline
    }

    /// The caller has a session with an endpoint: it is picked while it may be (gRFC A55).
    pub(super) fn stick_to(&mut self, host: &SessionHost) {
        self.found.host = Some(host.clone());
    }

    /// Has the body of the request read whole before it is sent. One of more than `max_bytes` is answered with 413 (RESOURCE_EXHAUSTED for
    /// gRPC). Of several filters the least limit holds.
    pub fn buffer_body(&mut self, max_bytes: u64) {
        self.found.buffer = Some(self.found.buffer.map_or(max_bytes, |known| known.min(max_bytes)));
    }

    /// Says what the filter is about to wait for, for the error should the deadline pass meanwhile.
    pub fn waits_for(&mut self, what: impl Into<String>) {
        self.found.waits = Some(what.into());
    }

    /// Says what was decided, and why, to a caller that asked for it ([`Explain`]). `text` is made only then.
    pub fn explain(&self, subject: &'static str, text: impl FnOnce() -> String) {
        if let Some(explain) = &self.place.explain {
            explain.add(subject, text());
        }
    }
}

impl FilterResponse<'_> {
    /// Status and headers.
    pub fn head(&self) -> &response::Parts {
        self.head
    }

    /// The same, to be changed.
    pub fn head_mut(&mut self) -> &mut response::Parts {
        self.head
    }

    /// The endpoint that answered.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    /// The cluster that answered; empty without a mesh.
    pub fn cluster(&self) -> &str {
        self.cluster
    }

    /// A filter answered, no endpoint did.
    pub fn is_local(&self) -> bool {
        self.local
    }
}

impl Outcome {
    pub(crate) fn of_error(error: &Error, grpc: bool, took: Duration) -> Self {
        Self {
            status: error.http_status().as_u16(),
            grpc_status: grpc.then(|| u32::from(i32::from(error.code()).unsigned_abs().try_into().unwrap_or(2u8))),
            ended: if error.is_timeout() { Ended::TimedOut } else { Ended::Failed },
            took,
        }
    }
}

impl std::fmt::Debug for Step<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Now(verdict) => f.debug_tuple("Now").field(verdict).finish(),
            Self::Later(_) => f.write_str("Later"),
        }
    }
}

impl std::fmt::Debug for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Pass => f.write_str("Pass"),
            Self::Watch(_) => f.write_str("Watch"),
            Self::Answer(reply) => f.debug_tuple("Answer").field(reply).finish(),
        }
    }
}
