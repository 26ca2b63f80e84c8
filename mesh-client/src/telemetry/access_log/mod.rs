//! One record for each request, at its end: for [`MeshBuilder::access_log`](crate::MeshBuilder::access_log).

mod flags;
mod format;

pub use flags::ResponseFlags;

use crate::telemetry::trace::TraceId;
use http::{HeaderValue, Method, Uri, Version};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

/// Whose request it was.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Direction {
    /// This process made it.
    #[default]
    Outbound,
    /// This process served it.
    Inbound,
}

/// What became of one request, from its beginning to the end of its response.
///
/// There is one for every request, however it ended: answered by an endpoint, by a route or a filter, failed, or given up by the caller. What
/// is not known is `None`, or empty.
///
/// Displays as a line in the default format of Istio's and Envoy's access log, without the line break; [`to_json`](Self::to_json) gives the
/// same as an object.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AccessLog {
    /// Whether it was made or served here.
    pub direction: Direction,
    /// When the request began.
    pub start_time: SystemTime,
    /// From then to the end of the response.
    pub duration: Duration,
    /// From then to the head of the response.
    pub response_duration: Option<Duration>,
    /// The target, as given to [`Mesh::channel`](crate::Mesh::channel).
    pub target: Arc<str>,
    /// The request's method.
    pub method: Method,
    /// The request's URI as the application gave it: before rewrites.
    pub uri: Uri,
    /// The request's authority, its `host` header or that of the target.
    pub authority: String,
    /// The request's version, as the application gave it.
    pub version: Version,
    /// A gRPC call, by its content type.
    pub grpc: bool,
    /// `user-agent` of the request.
    pub user_agent: Option<HeaderValue>,
    /// `x-request-id` of the request.
    pub request_id: Option<HeaderValue>,
    /// `x-forwarded-for` of the request.
    pub forwarded_for: Option<HeaderValue>,
    /// HTTP status of the response. Where there was none, the one that stands for the error ([`Error::http_status`](crate::Error::http_status));
    /// 0 when the caller gave up before.
    pub status: u16,
    /// gRPC status (0..=16) of a gRPC call: of the trailers or the head, or the one that stands for the error.
    pub grpc_status: Option<u32>,
    /// Why it ended so.
    pub flags: ResponseFlags,
    /// Why it was answered so, in Envoy's words, where a server's filter says it: `rbac_access_denied_matched_policy[NAME]`,
    /// `jwt_authn_access_denied{REASON}`.
    pub details: Option<Arc<str>>,
    /// The error that the caller got, with its causes.
    pub error: Option<String>,
    /// Bytes of the request's body that were read from the application; a retry does not count again.
    pub request_bytes: u64,
    /// Bytes of the response's body that were handed to the application.
    pub response_bytes: u64,
    /// gRPC messages of the request; 0 for other requests.
    pub request_messages: u64,
    /// gRPC messages of the response.
    pub response_messages: u64,
    /// The name of the route, perhaps empty; `None`: no route was found.
    pub route: Option<Arc<str>>,
    /// The cluster that it was for.
    pub cluster: Option<Arc<str>>,
    /// The client of a request that was served.
    pub remote: Option<SocketAddr>,
    /// The endpoint of the last attempt; our own address, where the application answered a request that was served.
    pub endpoint: Option<SocketAddr>,
    /// Attempts made, 0 when it ended before one.
    pub attempts: u32,
    /// The SPIFFE id of the endpoint, or of the client of a request that was served; else the subject of its certificate; `None` without TLS.
    pub peer: Option<String>,
    /// `x-envoy-upstream-service-time` of the response.
    pub upstream_service_time: Option<HeaderValue>,
    /// The trace that the request is part of.
    pub trace_id: Option<TraceId>,
}

impl AccessLog {
    /// The beginning of a request that is served. Its bytes are those that it announces.
    pub(crate) fn served(head: &http::request::Parts, grpc: bool) -> Self {
        let header = |name: &str| head.headers.get(name).cloned();
        let text = |name| head.headers.get(name).and_then(|value| value.to_str().ok());
        let own = head.uri.authority().map(|authority| authority.as_str());
        Self {
            direction: Direction::Inbound,
            start_time: SystemTime::now(),
            duration: Duration::ZERO,
            response_duration: None,
            target: "".into(),
            method: head.method.clone(),
            uri: head.uri.clone(),
            authority: own.or_else(|| text(http::header::HOST)).unwrap_or_default().to_owned(),
            version: head.version,
            grpc,
            user_agent: header("user-agent"),
            request_id: header("x-request-id"),
            forwarded_for: header("x-forwarded-for"),
            status: 0,
            grpc_status: None,
            flags: ResponseFlags::NONE,
            details: None,
            error: None,
            request_bytes: text(http::header::CONTENT_LENGTH).and_then(|text| text.parse().ok()).unwrap_or(0),
            response_bytes: 0,
            request_messages: 0,
            response_messages: 0,
            route: None,
            cluster: None,
            remote: None,
            endpoint: None,
            attempts: 0,
            peer: None,
            upstream_service_time: None,
            trace_id: None,
        }
    }

    /// Path and query of the request.
    pub fn path(&self) -> &str {
        self.uri.path_and_query().map_or("/", |path| path.as_str())
    }
}
