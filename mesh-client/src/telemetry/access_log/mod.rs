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
    /// The endpoint of the last attempt.
    pub endpoint: Option<SocketAddr>,
    /// Attempts made, 0 when it ended before one.
    pub attempts: u32,
    /// The SPIFFE id of the endpoint, or the subject of its certificate; `None` without TLS.
    pub peer: Option<String>,
    /// `x-envoy-upstream-service-time` of the response.
    pub upstream_service_time: Option<HeaderValue>,
    /// The trace that the request is part of.
    pub trace_id: Option<TraceId>,
}

impl AccessLog {
    /// Path and query of the request.
    pub fn path(&self) -> &str {
        self.uri.path_and_query().map_or("/", |path| path.as_str())
    }
}
