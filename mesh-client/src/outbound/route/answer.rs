//! What a route answers itself: redirects and direct responses.

use super::{
    edits::{Ops, apply_response, replace_prefix},
    head::RequestHead,
    render::Facts,
};
use crate::outbound::{filter::Chain, retry::grpc_from_http};
use bytes::Bytes;
use http::{HeaderValue, Method, Response, StatusCode, header, uri::Authority};
use mesh_xds::resource::{DirectResponse, Redirect, RedirectPath};
use std::{borrow::Cow, sync::Arc};

/// An answer, compiled.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(super) what: What,
    /// Header edits in the order they are made.
    pub(super) edits: Box<[Arc<Ops>]>,
    /// The filters that see the request first, as in Envoy, where the router is the last of them.
    pub(crate) filters: Option<Arc<Chain>>,
}

#[derive(Debug)]
pub(super) enum What {
    /// With what of the path a prefix rewrite replaces.
    Redirect(Arc<Redirect>, Option<usize>),
    Direct(Arc<DirectResponse>),
}

impl Answer {
    /// The response to this request. A gRPC call gets its status in `grpc-status`, mapped from the HTTP status, with the body as
    /// its message (Envoy's local replies).
    pub(crate) fn respond(&self, facts: &Facts<'_>, head: &RequestHead<'_>, grpc: bool) -> Response<Bytes> {
        let (status, location, body) = match &self.what {
            What::Redirect(redirect, matched) => {
                (redirect.status, Some(location(redirect, *matched, head)), Bytes::new())
            }
            What::Direct(direct) => (direct.status, None, direct.body.clone()),
        };
        let mut response = Response::new(Bytes::new());
        let headers = response.headers_mut();
        if let Some(location) = location.and_then(|location| HeaderValue::try_from(location).ok()) {
            headers.insert(header::LOCATION, location);
        }
        if grpc {
            headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            headers.insert("grpc-status", HeaderValue::from(grpc_from_http(status)));
            if let Some(message) = Some(percent_encoded(&body)).filter(|message| !message.is_empty()) {
                headers.extend(
                    HeaderValue::try_from(message).ok().map(|m| (header::HeaderName::from_static("grpc-message"), m)),
                );
            }
        } else {
            if !body.is_empty() {
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            }
            headers.insert(header::CONTENT_LENGTH, HeaderValue::from(body.len()));
            *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            if head.method != Method::HEAD {
                *response.body_mut() = body;
            }
        }
        let status = response.status();
        apply_response(&self.edits, status, response.headers_mut(), &Facts { request: Some(*head), ..*facts });
        response
    }

    /// HTTP status and gRPC status, for metrics.
    pub(crate) fn outcome(&self, grpc: bool) -> (u16, Option<u32>) {
        let status = match &self.what {
            What::Redirect(redirect, _) => redirect.status,
            What::Direct(direct) => direct.status,
        };
        if grpc { (200, Some(grpc_from_http(status))) } else { (status, None) }
    }

    /// In words, for explain.
    pub(crate) fn describe(&self, head: &RequestHead<'_>) -> String {
        match &self.what {
            What::Redirect(redirect, matched) => {
                format!("redirected with {} to {}", redirect.status, location(redirect, *matched, head))
            }
            What::Direct(direct) => format!("answered here with {}, {} bytes", direct.status, direct.body.len()),
        }
    }
}

/// The `location` of a redirect (Envoy's `newUri`).
fn location(redirect: &Redirect, matched: Option<usize>, head: &RequestHead<'_>) -> String {
    let before = head.scheme();
    let scheme = redirect.scheme.as_deref().unwrap_or(before);
    let host = match (&redirect.host, redirect.port) {
        (Some(host), None) => Cow::Borrowed(host.as_str()),
        (Some(host), Some(port)) => Cow::Owned(format!("{}:{port}", bare(host))),
        (None, Some(port)) => Cow::Owned(format!("{}:{port}", bare(head.authority))),
        (None, None) => {
            // The default port of the scheme before says nothing about the one after.
            let default = if before == "https" { ":443" } else { ":80" };
            match head.authority.strip_suffix(default).filter(|_| scheme != before) {
                Some(host) => Cow::Borrowed(host),
                None => Cow::Borrowed(head.authority),
            }
        }
    };
    let query = head.query().filter(|_| !redirect.strip_query).map(|query| format!("?{query}")).unwrap_or_default();
    let path = head.path();
    let path = match &redirect.path {
        None => format!("{path}{query}"),
        Some(RedirectPath::Whole(whole)) if whole.contains('?') => whole.clone(),
        Some(RedirectPath::Whole(whole)) => format!("{whole}{query}"),
        Some(RedirectPath::Prefix(by)) => replace_prefix(path, matched, by) + &query,
        Some(RedirectPath::Regex(rewrite)) => rewrite.apply(path).into_owned() + &query,
    };
    let slash = if path.starts_with('/') { "" } else { "/" };
    format!("{scheme}://{host}{slash}{path}")
}

/// A host without its port.
fn bare(host: &str) -> Cow<'_, str> {
    match host.parse::<Authority>() {
        Ok(authority) => Cow::Owned(authority.host().to_owned()),
        Err(_) => Cow::Borrowed(host),
    }
}

/// As gRPC wants a message in a header.
pub(crate) fn percent_encoded(body: &[u8]) -> String {
    body.iter().fold(String::with_capacity(body.len()), |mut out, byte| {
        match byte {
            b' '..=b'~' if *byte != b'%' => out.push(char::from(*byte)),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
        out
    })
}
