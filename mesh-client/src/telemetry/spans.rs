//! Spans of calls and attempts, through `tracing` (gRFC A72's names for gRPC, OpenTelemetry's attributes for HTTP).
//!
//! The ids that go out with an attempt are those of its span. Without OpenTelemetry they are made here and are fields of the span; with the
//! feature `otel` and a `tracing_opentelemetry` layer they are those that the layer gave it.

use super::{
    access_log::AccessLog,
    metrics::grpc::code_name,
    trace::{TraceContext, spans_parent},
};
use http::{HeaderMap, Uri, request::Parts};
use std::net::SocketAddr;
use tracing::{Level, Span, field::Empty, info_span};

/// The target of all spans and events, for filters.
const TARGET: &str = "mesh::call";

/// The span of one call.
pub(crate) struct CallSpan {
    span: Span,
    /// `None`: the call is part of no trace, and none was to be started.
    context: Option<TraceContext>,
    name: String,
    uri: Uri,
    grpc: bool,
}

/// The span of one attempt. Ends when it is dropped.
pub(crate) struct AttemptSpan {
    span: Span,
    grpc: bool,
    sent: u64,
    received: u64,
}

/// Which attempt it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Which {
    /// Attempts before it.
    pub(crate) previous: u32,
    /// The one before was not processed.
    pub(crate) transparent: bool,
    /// It had to wait for a connection.
    pub(crate) delayed: bool,
    pub(crate) endpoint: Option<SocketAddr>,
}

impl CallSpan {
    /// Begins the span of a request, and writes its context into the headers. `None`: nobody records it.
    pub(crate) fn begin(
        head: &mut Parts,
        target: &str,
        grpc: bool,
        start: impl FnOnce(&HeaderMap) -> Option<TraceContext>,
    ) -> Option<Self> {
        let authority = head.uri.authority();
        let (address, port) = (authority.map_or(target, |a| a.host()), authority.and_then(|a| a.port_u16()));
        let (name, span);
        if grpc {
            let path = head.uri.path().trim_start_matches('/');
            let (service, method) = path.rsplit_once('/').unwrap_or((path, ""));
            name = format!("{service}.{method}");
            span = info_span!(
                target: TARGET, "call",
                otel.name = format_args!("Sent.{name}"), otel.kind = "client",
                otel.status_code = Empty, otel.status_description = Empty,
                rpc.system = "grpc", rpc.service = service, rpc.method = method, rpc.grpc.status_code = Empty,
                server.address = address, server.port = port,
                mesh.target = target, mesh.route = Empty, mesh.cluster = Empty, mesh.attempts = Empty,
                mesh.response_flags = Empty, trace_id = Empty, span_id = Empty, parent_id = Empty,
            );
        } else {
            name = head.method.to_string();
            span = info_span!(
                target: TARGET, "call",
                otel.name = name, otel.kind = "internal",
                otel.status_code = Empty, otel.status_description = Empty,
                http.request.method = name, url.path = head.uri.path(), url.query = head.uri.query(),
                url.scheme = head.uri.scheme_str(), http.response.status_code = Empty, error.type = Empty,
                server.address = address, server.port = port,
                mesh.target = target, mesh.route = Empty, mesh.cluster = Empty, mesh.attempts = Empty,
                mesh.response_flags = Empty, trace_id = Empty, span_id = Empty, parent_id = Empty,
            );
        }
        if span.is_disabled() {
            return None;
        }
        let found = spans_parent(&head.headers, &head.extensions);
        let context = context::of_call(&span, found, || start(&head.headers));
        if let Some(context) = &context {
            context.inject(&mut head.headers);
            span.record("trace_id", tracing::field::display(context.trace_id()));
            span.record("span_id", format_args!("{:016x}", context.span_id()));
        }
        Some(Self { span, context, name, uri: head.uri.clone(), grpc })
    }

    /// The span itself: what is logged meanwhile is in it.
    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    /// The first configuration had to be waited for.
    pub(crate) fn resolved(&self) {
        tracing::info!(target: TARGET, parent: &self.span, "Delayed name resolution complete");
    }

    /// Begins the span of an attempt, and writes its context into the attempt's headers.
    pub(crate) fn attempt(&self, which: Which, headers: &mut HeaderMap) -> AttemptSpan {
        let (ip, port) = (which.endpoint.map(|e| e.ip().to_string()), which.endpoint.map(|e| e.port()));
        let span = if self.grpc {
            info_span!(
                target: TARGET, parent: &self.span, "attempt",
                otel.name = format_args!("Attempt.{}", self.name), otel.kind = "client",
                otel.status_code = Empty, otel.status_description = Empty,
                "previous-rpc-attempts" = which.previous, "transparent-retry" = which.transparent,
                rpc.system = "grpc", rpc.grpc.status_code = Empty,
                network.peer.address = ip, network.peer.port = port,
                trace_id = Empty, span_id = Empty, parent_id = Empty,
            )
        } else {
            info_span!(
                target: TARGET, parent: &self.span, "attempt",
                otel.name = self.name, otel.kind = "client",
                otel.status_code = Empty, otel.status_description = Empty,
                http.request.method = self.name, url.full = %self.uri, http.response.status_code = Empty, error.type = Empty,
                http.request.resend_count = (which.previous > 0).then_some(which.previous),
                network.peer.address = ip, network.peer.port = port,
                trace_id = Empty, span_id = Empty, parent_id = Empty,
            )
        };
        if let (Some(call), false) = (&self.context, span.is_disabled()) {
            let id = context::of_attempt(&span);
            call.inject_span(id, headers);
            span.record("trace_id", tracing::field::display(call.trace_id()));
            span.record("span_id", format_args!("{id:016x}"));
            span.record("parent_id", format_args!("{:016x}", call.span_id()));
        }
        if which.delayed {
            tracing::info!(target: TARGET, parent: &span, "Delayed LB pick complete");
        }
        AttemptSpan { span, grpc: self.grpc, sent: 0, received: 0 }
    }

    /// The call is over.
    pub(crate) fn end(&self, log: &AccessLog) {
        let span = &self.span;
        if let Some(route) = log.route.as_deref().filter(|name| !name.is_empty()) {
            span.record("mesh.route", route);
        }
        if let Some(cluster) = log.cluster.as_deref() {
            span.record("mesh.cluster", cluster);
        }
        span.record("mesh.attempts", log.attempts);
        if !log.flags.is_empty() {
            span.record("mesh.response_flags", tracing::field::display(log.flags));
        }
        status(span, self.grpc, log.status, log.grpc_status, log.error.as_deref());
    }
}

impl AttemptSpan {
    /// A message was sent, of so many bytes.
    pub(crate) fn sent(&mut self, bytes: u64) {
        tracing::event!(
            target: TARGET, parent: &self.span, Level::INFO,
            { "sequence-number" = self.sent, "message-size" = bytes }, "Outbound message"
        );
        self.sent += 1;
    }

    /// A message came, of so many bytes.
    pub(crate) fn received(&mut self, bytes: u64) {
        tracing::event!(
            target: TARGET, parent: &self.span, Level::INFO,
            { "sequence-number" = self.received, "message-size" = bytes }, "Inbound message"
        );
        self.received += 1;
    }

    /// It ended so.
    pub(crate) fn end(self, http: u16, code: u32, error: Option<&str>) {
        status(&self.span, self.grpc, http, Some(code), error);
    }
}

/// gRPC: OK or an error (A72). HTTP: an error from 400 on, or without a response; else unset, as OpenTelemetry has it.
fn status(span: &Span, grpc: bool, http: u16, code: Option<u32>, error: Option<&str>) {
    let failed = if grpc {
        let code = code.unwrap_or(2);
        span.record("rpc.grpc.status_code", code);
        if code == 0 {
            span.record("otel.status_code", "OK");
        }
        (code != 0).then(|| code_name(code).to_owned())
    } else {
        if http > 0 {
            span.record("http.response.status_code", http);
        }
        let failed =
            (http == 0 || http >= 400).then(|| if http == 0 { "cancelled".to_owned() } else { http.to_string() });
        if let Some(failed) = &failed {
            span.record("error.type", failed.as_str());
        }
        failed
    };
    if let Some(failed) = failed {
        span.record("otel.status_code", "ERROR");
        span.record("otel.status_description", error.unwrap_or(&failed));
    }
}

/// The ids of spans where OpenTelemetry gives none: made here.
mod own {
    use super::TraceContext;
    use tracing::Span;

    pub(super) fn of_call(
        span: &Span,
        found: Option<TraceContext>,
        start: impl FnOnce() -> Option<TraceContext>,
    ) -> Option<TraceContext> {
        match found {
            Some(parent) => {
                span.record("parent_id", format_args!("{:016x}", parent.span_id()));
                Some(parent.child(fastrand::u64(1..)))
            }
            None => start(),
        }
    }

    pub(super) fn of_attempt() -> u64 {
        fastrand::u64(1..)
    }
}

#[cfg(not(feature = "otel"))]
mod context {
    use super::{TraceContext, own};
    use tracing::Span;

    pub(super) fn of_call(
        span: &Span,
        found: Option<(TraceContext, bool)>,
        start: impl FnOnce() -> Option<TraceContext>,
    ) -> Option<TraceContext> {
        own::of_call(span, found.map(|(context, _)| context), start)
    }

    pub(super) fn of_attempt(_: &Span) -> u64 {
        own::of_attempt()
    }
}

/// As OpenTelemetry has them, where a layer of it is installed.
#[cfg(feature = "otel")]
mod context {
    use super::{TraceContext, own};
    use opentelemetry::{
        Context,
        trace::{SpanContext, SpanId, TraceContextExt, TraceFlags, TraceId, TraceState},
    };
    use tracing::Span;
    use tracing_opentelemetry::OpenTelemetrySpanExt;

    fn given(span: &Span) -> Option<SpanContext> {
        let context = span.context();
        let given = context.span().span_context().clone();
        given.is_valid().then_some(given)
    }

    /// `found` is the parent, unless the application is in a span of its own and the request itself says nothing.
    pub(super) fn of_call(
        span: &Span,
        found: Option<(TraceContext, bool)>,
        start: impl FnOnce() -> Option<TraceContext>,
    ) -> Option<TraceContext> {
        let carried = found.as_ref().is_some_and(|(_, carried)| *carried);
        let found = found.map(|(context, _)| context);
        if let Some(parent) = &found
            && (carried || given(&Span::current()).is_none())
        {
            let state = parent.state().and_then(|state| state.parse().ok()).unwrap_or(TraceState::NONE);
            let flags = if parent.is_sampled() { TraceFlags::SAMPLED } else { TraceFlags::default() };
            let (trace_id, span_id) = (TraceId::from(parent.trace_id().number()), SpanId::from(parent.span_id()));
            let remote = SpanContext::new(trace_id, span_id, flags, true, state);
            // Refused where no layer listens: then the ids are made here.
            let _ = span.set_parent(Context::new().with_remote_span_context(remote));
        }
        let Some(given) = given(span) else { return own::of_call(span, found, start) };
        let number = u128::from_be_bytes(given.trace_id().to_bytes());
        let id = u64::from_be_bytes(given.span_id().to_bytes());
        let state = Some(given.trace_state().header()).filter(|state| !state.is_empty());
        Some(TraceContext::given(found.as_ref(), number, id, given.is_sampled(), state.as_deref()))
    }

    pub(super) fn of_attempt(span: &Span) -> u64 {
        given(span).map_or_else(own::of_attempt, |given| u64::from_be_bytes(given.span_id().to_bytes()))
    }
}
