//! Why a request failed: one opaque error, one pointer wide, that names target, route, cluster, endpoint, attempt and cause.

use crate::{
    outbound::retry::{grpc_from_http, grpc_from_reset},
    telemetry::explain::{Explain, Explanation},
    transport::TransportError,
};
use std::{
    error::Error as StdError,
    fmt,
    net::SocketAddr,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
};

/// Any boxed error.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// The error of a request made through a mesh.
///
/// Its [`Display`](fmt::Display) form names everything known about the failure. A [`tonic::Status`] with the right code is part
/// of the `source()` chain, so generated tonic clients report that code; [`Error::http_status`] gives the HTTP equivalent.
pub struct Error(Box<Inner>);

struct Inner {
    detail: Arc<Detail>,
    /// Carries `detail` as its source.
    status: tonic::Status,
}

/// What class of failure, and thereby which gRPC and HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A deadline passed.
    Timeout,
    /// Nothing moved for too long.
    Idle,
    /// Configuration for the target is not there (yet).
    Resolve,
    /// The request matches no virtual host or route, or one that does not forward.
    NoRoute,
    /// The cluster of the route is not known. The HTTP status that the route has for it.
    NoCluster(u16),
    /// No endpoint can be used.
    NoEndpoint,
    /// The connection or the stream failed.
    Transport,
    /// A circuit breaker refused the request.
    Overloaded,
    /// Dropped by the control plane's overload policy.
    Dropped,
    /// The caller's request body failed.
    RequestBody,
    /// The caller gave a request that cannot be sent.
    InvalidRequest,
}

/// Where in the mesh a request was when it failed. Filled in as far as the request came.
#[derive(Clone, Debug, Default)]
pub(crate) struct Place {
    pub(crate) target: Option<Arc<str>>,
    pub(crate) route: Option<Arc<str>>,
    pub(crate) cluster: Option<Arc<str>>,
    pub(crate) endpoint: Option<SocketAddr>,
    /// 1 is the first attempt; 0 is before any.
    pub(crate) attempt: u32,
    pub(crate) version: Option<Arc<str>>,
}

struct Detail {
    kind: Kind,
    message: String,
    place: Place,
    source: Option<BoxError>,
    /// How it came to it, where that was recorded.
    trail: OnceLock<Explain>,
}

impl Error {
    pub(crate) fn new(kind: Kind, message: impl Into<String>, place: Place, source: Option<BoxError>) -> Self {
        let detail = Arc::new(Detail { kind, message: message.into(), place, source, trail: OnceLock::new() });
        let code = match kind {
            Kind::Timeout | Kind::Idle => tonic::Code::DeadlineExceeded,
            Kind::RequestBody | Kind::InvalidRequest => tonic::Code::Internal,
            Kind::Transport => detail.source.as_deref().and_then(transport_code).unwrap_or(tonic::Code::Unavailable),
            Kind::NoCluster(status) => tonic::Code::from(grpc_from_http(status).cast_signed()),
            Kind::Resolve | Kind::NoRoute | Kind::NoEndpoint | Kind::Overloaded | Kind::Dropped => {
                tonic::Code::Unavailable
            }
        };
        let mut status = match detail.source.as_deref().filter(|_| kind == Kind::RequestBody).and_then(find_status) {
            Some(own) => own,
            None => tonic::Status::new(code, detail.to_string()),
        };
        status.set_source(detail.clone() as Arc<dyn StdError + Send + Sync>);
        Self(Box::new(Inner { detail, status }))
    }

    /// A deadline passed: the caller's, the route's or a try's. The message says which and of what length.
    pub fn is_timeout(&self) -> bool {
        matches!(self.0.detail.kind, Kind::Timeout | Kind::Idle)
    }

    /// Nothing moved for too long.
    pub(crate) fn is_idle(&self) -> bool {
        self.0.detail.kind == Kind::Idle
    }

    /// Nothing could take the request: no configuration, no route, no endpoint, or the connection failed.
    pub fn is_unavailable(&self) -> bool {
        self.0.status.code() == tonic::Code::Unavailable || matches!(self.0.detail.kind, Kind::NoCluster(_))
    }

    /// A circuit breaker or the control plane's drop policy refused it, at once.
    pub fn is_overloaded(&self) -> bool {
        matches!(self.0.detail.kind, Kind::Overloaded | Kind::Dropped)
    }

    /// The request never left this process: it was decided here, before any attempt.
    pub fn is_local(&self) -> bool {
        match self.0.detail.kind {
            Kind::Transport | Kind::RequestBody => false,
            Kind::Timeout | Kind::Idle => self.0.detail.place.endpoint.is_none(),
            _ => self.0.detail.place.attempt <= 1,
        }
    }

    /// The target the request was for, as given to [`Mesh::channel`](crate::Mesh::channel), or the host of an HTTP request.
    pub fn target(&self) -> Option<&str> {
        self.0.detail.place.target.as_deref()
    }

    /// The cluster it was routed to.
    pub fn cluster(&self) -> Option<&str> {
        self.0.detail.place.cluster.as_deref()
    }

    /// The endpoint of the last attempt.
    pub fn endpoint(&self) -> Option<SocketAddr> {
        self.0.detail.place.endpoint
    }

    /// How many attempts were made.
    pub fn attempts(&self) -> u32 {
        self.0.detail.place.attempt
    }

    /// The message and its causes, without the place.
    pub(crate) fn reason(&self) -> String {
        self.0.detail.reason()
    }

    /// How it came to it: every decision up to the failure, where the request carried an [`Explain`] or the mesh was built with
    /// [`explain_errors`](crate::MeshBuilder::explain_errors). [`Explanation::of_error`] finds it in an error that was made of this one.
    pub fn explanation(&self) -> Option<Explanation> {
        self.0.detail.trail.get().map(Explain::explanation)
    }

    /// The first record counts.
    pub(crate) fn explained_by(&self, explain: &Explain) {
        let _ = self.0.detail.trail.set(explain.clone());
    }

    /// The gRPC code it stands for.
    pub fn code(&self) -> tonic::Code {
        self.0.status.code()
    }

    /// The HTTP status a proxy would have answered with: 504 for timeouts, 404 without a route, what the route says without a cluster
    /// (`cluster_not_found_response_code`), else 503 (Envoy's replies).
    pub fn http_status(&self) -> http::StatusCode {
        match self.0.detail.kind {
            Kind::Timeout | Kind::Idle => http::StatusCode::GATEWAY_TIMEOUT,
            Kind::NoRoute => http::StatusCode::NOT_FOUND,
            Kind::NoCluster(status) => {
                http::StatusCode::from_u16(status).unwrap_or(http::StatusCode::SERVICE_UNAVAILABLE)
            }
            Kind::RequestBody | Kind::InvalidRequest => http::StatusCode::BAD_REQUEST,
            _ => http::StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The answer a proxy would have sent, for servers that hand the failure on: status, `x-envoy-overloaded` when a breaker
    /// refused, and the message as text.
    pub fn to_response(&self) -> http::Response<String> {
        let mut response = http::Response::new(self.to_string());
        *response.status_mut() = self.http_status();
        response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("text/plain"));
        if self.is_overloaded() {
            response.headers_mut().insert("x-envoy-overloaded", http::HeaderValue::from_static("true"));
        }
        response
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.detail.fmt(f)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Error")
            .field("kind", &self.0.detail.kind)
            .field("message", &self.0.detail.message)
            .field("place", &self.0.detail.place)
            .field("source", &self.0.detail.source)
            .finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&self.0.status)
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        error.0.status
    }
}

impl Detail {
    /// The message and its causes.
    fn reason(&self) -> String {
        with_causes(self.message.clone(), self.source())
    }
}

impl fmt::Display for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Place { target, route, cluster, endpoint, attempt, version } = &self.place;
        if let Some(target) = target {
            write!(f, "{target}: ")?;
        }
        f.write_str(&self.reason())?;
        let mut open = false;
        let mut part = |f: &mut fmt::Formatter<'_>, name: &str, value: &dyn fmt::Display| {
            let start = if open { ", " } else { " (" };
            open = true;
            write!(f, "{start}{name} {value}")
        };
        if let Some(route) = route.as_deref().filter(|r| !r.is_empty()) {
            part(f, "route", &route)?;
        }
        if let Some(cluster) = cluster {
            part(f, "cluster", cluster)?;
        }
        if let Some(endpoint) = endpoint {
            part(f, "endpoint", endpoint)?;
        }
        if *attempt > 0 {
            part(f, "attempt", attempt)?;
        }
        if let Some(version) = version {
            part(f, "config", version)?;
        }
        if open { f.write_str(")") } else { Ok(()) }
    }
}

impl fmt::Debug for Detail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl StdError for Detail {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|s| s as &(dyn StdError + 'static))
    }
}

/// The record of how a request failed, somewhere in the chain.
pub(crate) fn trail(error: &(dyn StdError + 'static)) -> Option<Explanation> {
    let mut next = Some(error);
    while let Some(error) = next {
        let found = match (error.downcast_ref::<Error>(), error.downcast_ref::<Detail>()) {
            (Some(error), _) => error.explanation(),
            (_, Some(detail)) => detail.trail.get().map(Explain::explanation),
            _ => None,
        };
        if found.is_some() {
            return found;
        }
        next = error.source();
    }
    None
}

/// A status somewhere in the chain: what a tonic request stream ended with.
fn find_status(error: &(dyn StdError + Send + Sync + 'static)) -> Option<tonic::Status> {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(status) = error.downcast_ref::<tonic::Status>() {
            return Some(tonic::Status::with_details(
                status.code(),
                status.message(),
                bytes::Bytes::copy_from_slice(status.details()),
            ));
        }
        next = error.source();
    }
    None
}

/// Runs what the application gave us and may panic; then what it said is the error.
pub(crate) fn caught<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default()
    })
}

/// An error with its causes: `a: b: c`.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> String {
    with_causes(error.to_string(), error.source())
}

fn with_causes(mut text: String, mut next: Option<&(dyn StdError + 'static)>) -> String {
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// gRPC over HTTP/2: the code that a stream's RST_STREAM error maps to; everything else is UNAVAILABLE.
fn transport_code(error: &(dyn StdError + Send + Sync + 'static)) -> Option<tonic::Code> {
    let mut next: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(transport) = error.downcast_ref::<TransportError>() {
            let reset = transport.reset_reason();
            return reset.map(|reason| tonic::Code::from(grpc_from_reset(Some(reason)).cast_signed()));
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Error {
        let place = Place {
            target: Some("xds:///greeter:50051".into()),
            route: Some("canary".into()),
            cluster: Some("outbound|50051|v2|greeter".into()),
            endpoint: Some(([127, 0, 0, 1], 6001).into()),
            attempt: 3,
            version: Some("eds=7".into()),
        };
        let io = std::io::Error::new(std::io::ErrorKind::ConnectionRefused, "connection refused");
        Error::new(Kind::Transport, "the connection failed", place, Some(Box::new(io)))
    }

    #[test]
    fn display_names_target_route_cluster_endpoint_attempt_version_and_cause() {
        assert_eq!(
            sample().to_string(),
            "xds:///greeter:50051: the connection failed: connection refused (route canary, \
             cluster outbound|50051|v2|greeter, endpoint 127.0.0.1:6001, attempt 3, config eds=7)"
        );
    }

    #[test]
    fn is_one_pointer_wide_and_becomes_a_status_whose_chain_ends_in_the_cause() {
        assert_eq!(size_of::<Error>(), size_of::<usize>());
        let status = tonic::Status::from_error(Box::new(sample()));
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(status.message().contains("connection refused"), "{status}");
        let mut last: &dyn StdError = &status;
        while let Some(next) = last.source() {
            last = next;
        }
        assert!(last.downcast_ref::<std::io::Error>().is_some());
    }

    #[test]
    fn a_status_of_the_request_stream_is_handed_on() {
        let source: BoxError = Box::new(tonic::Status::already_exists("twice"));
        let error = Error::new(Kind::RequestBody, "the request body failed", Place::default(), Some(source));
        assert_eq!(error.code(), tonic::Code::AlreadyExists);
    }
}
