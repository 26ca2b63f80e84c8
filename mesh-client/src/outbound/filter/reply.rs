//! The answer of a filter.

use crate::{
    outbound::retry::{grpc_from_http, http_from_grpc},
    outbound::route::percent_encoded,
    telemetry::access_log::ResponseFlags as Flag,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, header};
use std::sync::Arc;

/// The answer of a filter, for either kind of caller: a gRPC call gets its status in `grpc-status`, with the body as its message; others
/// get the HTTP status and the body as text (Envoy's local replies).
#[derive(Clone, Debug)]
pub struct Reply {
    status: StatusCode,
    grpc: u32,
    headers: HeaderMap,
    body: Bytes,
    flag: Flag,
    /// For the access log.
    details: Option<Arc<str>>,
}

impl Reply {
    /// With this HTTP status, and the gRPC status that it maps to.
    pub fn new(status: StatusCode, body: impl Into<Bytes>) -> Self {
        let grpc = grpc_from_http(status.as_u16());
        Self { status, grpc, headers: HeaderMap::new(), body: body.into(), flag: Flag::NONE, details: None }
    }

    /// With this gRPC status (0..=16; others are UNKNOWN), and the HTTP status that it maps to.
    pub fn of_grpc(code: u32, message: impl Into<Bytes>) -> Self {
        let code = if code > 16 { 2 } else { code };
        let status = StatusCode::from_u16(http_from_grpc(code)).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self { grpc: code, ..Self::new(status, message) }
    }

    /// Another gRPC status than the HTTP status maps to.
    #[must_use]
    pub fn grpc_status(mut self, code: u32) -> Self {
        self.grpc = if code > 16 { 2 } else { code };
        self
    }

    /// One more header.
    #[must_use]
    pub fn header(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.append(name, value);
        self
    }

    /// The headers.
    pub fn headers_mut(&mut self) -> &mut HeaderMap {
        &mut self.headers
    }

    pub(crate) fn flag(mut self, flag: Flag) -> Self {
        self.flag = flag;
        self
    }

    /// Why, for the access log: `%RESPONSE_CODE_DETAILS%`.
    pub(crate) fn details(mut self, details: impl Into<Arc<str>>) -> Self {
        self.details = Some(details.into());
        self
    }

    pub(crate) fn told_details(&self) -> Option<&Arc<str>> {
        self.details.as_ref()
    }

    /// HTTP status, gRPC status and flag, for metrics.
    pub(crate) fn outcome(&self, grpc: bool) -> (u16, u32, Flag) {
        (if grpc { 200 } else { self.status.as_u16() }, self.grpc, self.flag)
    }

    /// In words.
    pub(crate) fn describe(&self) -> String {
        format!("answered with gRPC status {} / HTTP {}", self.grpc, self.status.as_u16())
    }

    /// The response. `body` is false where none may be (HEAD).
    pub(crate) fn respond(self, grpc: bool, body: bool) -> Response<Bytes> {
        let mut response = Response::new(Bytes::new());
        *response.headers_mut() = self.headers;
        let headers = response.headers_mut();
        if grpc {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(self.grpc));
            if self.grpc != 0
                && !self.body.is_empty()
                && let Ok(message) = HeaderValue::try_from(percent_encoded(&self.body))
            {
                headers.insert("grpc-message", message);
            }
            return response;
        }
        if !self.body.is_empty() && !headers.contains_key(header::CONTENT_TYPE) {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
        }
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(self.body.len()));
        *response.status_mut() = self.status;
        if body {
            *response.body_mut() = self.body;
        }
        response
    }
}
