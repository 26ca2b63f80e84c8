//! Trace context: taken from an incoming request, carried through the handler, written to the outgoing ones.
//!
//! W3C Trace Context (`traceparent`, `tracestate`) and B3 (one `b3` header, or `x-b3-*`). A context is written in the
//! formats it came in. mesh records no spans of its own, so it does not invent span ids either, unless told to: the span
//! that called us stays the parent of what we call, and the trace has no gaps.
//!
//! The context of an outgoing request is, in this order: the trace headers it already carries (they are kept); the
//! [`TraceContext`] in its extensions; that of the surrounding [`scope`]; a new trace.

mod b3;
mod layer;
mod w3c;

pub use layer::{ScopeFuture, ScopeLayer, ScopeService, TracePropagation, TracePropagationLayer};

use crate::headers::find;
use http::{Extensions, HeaderMap, HeaderName, HeaderValue};
use mesh_xds::resource::Tracing;
use std::fmt;

/// Envoy's: the caller wants a trace.
const CLIENT_TRACE_ID: HeaderName = HeaderName::from_static("x-client-trace-id");

/// The id of a trace: 128 bits, or 64 in old B3. Displays as 32 (or 16) hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TraceId(u128);

/// A position in a trace: which trace, which span is the parent, and whether it is recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    sampling: Sampling,
    formats: Formats,
    /// `tracestate`, passed on as it came; several headers are joined with `,`.
    state: Option<HeaderValue>,
    /// `baggage`, likewise.
    baggage: Option<HeaderValue>,
}

/// What was decided about recording.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sampling {
    /// B3 only: left to the receiver.
    Deferred,
    Deny,
    Accept,
    /// B3 only: record whatever the sampler says.
    Debug,
}

/// The header formats of a context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Formats {
    w3c: bool,
    b3_single: bool,
    b3_multi: bool,
}

/// How outgoing requests get their trace headers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Propagation {
    start: bool,
    /// `None`: as the control plane says.
    sampling: Option<f64>,
    child_spans: bool,
}

tokio::task_local! {
    static CURRENT: TraceContext;
}

/// Runs `future` with `context` as the surrounding one: requests sent by it, on the same task, continue the trace. Tasks
/// spawned inside do not inherit it.
pub async fn scope<F: Future>(context: TraceContext, future: F) -> F::Output {
    CURRENT.scope(context, future).await
}

/// Decides anew whether the trace of a request is recorded, where the request has a trace.
pub(crate) fn resample(headers: &mut HeaderMap, sampled: bool) {
    if let Some(mut context) = TraceContext::extract(headers) {
        context.sampling = if sampled { Sampling::Accept } else { Sampling::Deny };
        context.inject(headers);
    }
}

/// Gives the request of a further attempt a span id of its own, beside that of the attempt before.
pub(crate) fn respan(headers: &mut HeaderMap) {
    if let Some(context) = TraceContext::extract(headers) {
        context.inject_span(fastrand::u64(1..), headers);
    }
}

/// The context that an outgoing request continues, and whether the request itself says so.
pub(crate) fn spans_parent(headers: &HeaderMap, extensions: &Extensions) -> Option<(TraceContext, bool)> {
    if carries_context(headers) {
        return TraceContext::extract(headers).map(|context| (context, true));
    }
    extensions.get::<TraceContext>().cloned().or_else(current).map(|context| (context, false))
}

/// The context of the surrounding [`scope`].
pub fn current() -> Option<TraceContext> {
    CURRENT.try_with(TraceContext::clone).ok()
}

impl TraceContext {
    /// Reads the context of an incoming request: W3C if it is valid, else B3. `None` when there is none or it is malformed.
    /// `b3: 0` (or 1, d) alone decides about recording only, and begins a trace.
    pub fn extract(headers: &HeaderMap) -> Option<Self> {
        Self::extract_with(headers, &mut || fastrand::u64(..))
    }

    fn extract_with(headers: &HeaderMap, rng: &mut impl FnMut() -> u64) -> Option<Self> {
        let single = headers.contains_key(b3::SINGLE);
        let multi = headers.contains_key(b3::TRACE_ID) || headers.contains_key(b3::SAMPLED);
        if let Some((trace_id, span_id, sampled)) = w3c::parse(headers) {
            let sampling = if sampled { Sampling::Accept } else { Sampling::Deny };
            let formats = Formats { w3c: true, b3_single: single, b3_multi: multi };
            let (state, baggage) = (w3c::joined(headers, &w3c::STATE), w3c::joined(headers, &w3c::BAGGAGE));
            return Some(Self { trace_id, span_id, sampling, formats, state, baggage });
        }
        let parsed = if single { b3::parse_single(headers) } else { None };
        let formats = Formats { w3c: false, b3_single: single, b3_multi: multi };
        let (ids, sampling) = parsed.or_else(|| if multi { b3::parse_multi(headers) } else { None })?;
        let (trace_id, span_id) = ids.unwrap_or_else(|| (new_trace_id(rng), new_span_id(rng)));
        Some(Self { trace_id, span_id, sampling, formats, state: None, baggage: w3c::joined(headers, &w3c::BAGGAGE) })
    }

    /// A new trace in the W3C format.
    fn start(sampled: bool, rng: &mut impl FnMut() -> u64) -> Self {
        Self {
            trace_id: new_trace_id(rng),
            span_id: new_span_id(rng),
            sampling: if sampled { Sampling::Accept } else { Sampling::Deny },
            formats: Formats { w3c: true, b3_single: false, b3_multi: false },
            state: None,
            baggage: None,
        }
    }

    /// What a server works in: the context that came, or, for baggage alone, a new trace that carries it.
    pub(crate) fn received(headers: &HeaderMap) -> Option<Self> {
        Self::extract(headers).or_else(|| {
            let baggage = w3c::joined(headers, &w3c::BAGGAGE)?;
            Some(Self { baggage: Some(baggage), ..Self::start(true, &mut || fastrand::u64(..)) })
        })
    }

    /// A span below this one.
    pub(crate) fn child(&self, span_id: u64) -> Self {
        Self { span_id, ..self.clone() }
    }

    /// A span that somebody else records, in the formats of the one it continues.
    #[cfg(feature = "otel")]
    pub(crate) fn given(
        found: Option<&Self>,
        trace_id: u128,
        span_id: u64,
        sampled: bool,
        state: Option<&str>,
    ) -> Self {
        let w3c = Formats { w3c: true, b3_single: false, b3_multi: false };
        Self {
            trace_id,
            span_id,
            sampling: if sampled { Sampling::Accept } else { Sampling::Deny },
            formats: found.map_or(w3c, |found| found.formats),
            state: state.and_then(|state| HeaderValue::from_str(state).ok()),
            baggage: found.and_then(|found| found.baggage.clone()),
        }
    }

    /// `tracestate`.
    #[cfg(feature = "otel")]
    pub(crate) fn state(&self) -> Option<&str> {
        self.state.as_ref()?.to_str().ok()
    }

    /// The W3C `baggage` that goes along, as it came.
    pub fn baggage(&self) -> Option<&HeaderValue> {
        self.baggage.as_ref()
    }

    /// The same with this `baggage`, for requests that have none of their own.
    #[must_use]
    pub fn with_baggage(mut self, baggage: HeaderValue) -> Self {
        self.baggage = Some(baggage);
        self
    }

    /// Writes the context in its formats, over what is there.
    pub fn inject(&self, headers: &mut HeaderMap) {
        self.inject_span(self.span_id, headers);
    }

    pub(crate) fn inject_span(&self, span_id: u64, headers: &mut HeaderMap) {
        if self.formats.w3c {
            headers.insert(w3c::PARENT, w3c::encode(self.trace_id, span_id, self.is_sampled()));
            match &self.state {
                Some(state) => drop(headers.insert(w3c::STATE, state.clone())),
                None if find(headers, &w3c::STATE).is_some() => drop(headers.remove(w3c::STATE)),
                None => {}
            }
        }
        if let Some(baggage) = self.baggage.as_ref().filter(|_| find(headers, &w3c::BAGGAGE).is_none()) {
            headers.insert(w3c::BAGGAGE, baggage.clone());
        }
        if self.formats.b3_single {
            headers.insert(b3::SINGLE, b3::encode_single(self.trace_id, span_id, self.sampling));
        }
        if self.formats.b3_multi {
            b3::inject_multi(self.trace_id, span_id, self.sampling, headers);
        }
    }

    /// The trace.
    pub fn trace_id(&self) -> TraceId {
        TraceId(self.trace_id)
    }

    /// The parent of what comes next.
    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    /// Whether the trace is recorded.
    pub fn is_sampled(&self) -> bool {
        matches!(self.sampling, Sampling::Accept | Sampling::Debug)
    }
}

impl Default for Propagation {
    /// Starts traces, and has as many of them recorded as the control plane says: all, where it says nothing (Envoy).
    fn default() -> Self {
        Self { start: true, sampling: None, child_spans: false }
    }
}

impl Propagation {
    /// Whether a request without any context begins a trace; default true.
    #[must_use]
    pub fn start(mut self, start: bool) -> Self {
        self.start = start;
        self
    }

    /// The share of new traces that are marked as recorded, 0..=1, whatever the control plane says. Default: as its `Tracing` says
    /// (`random_sampling`, `client_sampling` for requests with `x-client-trace-id`, `overall_sampling`), else all.
    #[must_use]
    pub fn sampling(mut self, share: f64) -> Self {
        self.sampling = Some(share);
        self
    }

    /// Whether every attempt of an outgoing request gets a span id of its own, below the one it continues; default false. For those who
    /// record a client span under that id: without one, the trace shows a missing parent. [`MeshBuilder::spans`](crate::MeshBuilder::spans)
    /// does both.
    #[must_use]
    pub fn child_spans(mut self, child_spans: bool) -> Self {
        self.child_spans = child_spans;
        self
    }

    /// Gives an outgoing request its context, and returns the trace it is part of. At most one allocation for W3C.
    pub(crate) fn apply(
        &self,
        headers: &mut HeaderMap,
        extensions: &Extensions,
        configured: Option<&Tracing>,
    ) -> Option<TraceId> {
        self.apply_with(headers, extensions, configured, &mut || fastrand::u64(..))
    }

    /// Spans give the ids.
    pub(crate) fn without_child_spans(mut self, without: bool) -> Self {
        self.child_spans &= !without;
        self
    }

    /// Every attempt has a span id.
    pub(crate) fn has_child_spans(&self) -> bool {
        self.child_spans
    }

    /// A new trace, if one is to be started.
    pub(crate) fn begin(&self, headers: &HeaderMap, configured: Option<&Tracing>) -> Option<TraceContext> {
        let rng = &mut || fastrand::u64(..);
        self.start.then(|| TraceContext::start(self.samples(headers, configured, rng), rng))
    }

    /// Whether a new trace is recorded.
    fn samples(&self, headers: &HeaderMap, configured: Option<&Tracing>, rng: &mut impl FnMut() -> u64) -> bool {
        let mut draw = |share: f64| share >= 1.0 || fraction(rng()) < share;
        match (self.sampling, configured) {
            (Some(share), _) => draw(share),
            (None, None) => true,
            (None, Some(tracing)) => {
                let forced = find(headers, &CLIENT_TRACE_ID).is_some() && draw(tracing.client);
                (forced || draw(tracing.random)) && draw(tracing.overall)
            }
        }
    }

    fn apply_with(
        &self,
        headers: &mut HeaderMap,
        extensions: &Extensions,
        configured: Option<&Tracing>,
        rng: &mut impl FnMut() -> u64,
    ) -> Option<TraceId> {
        if carries_context(headers) {
            let context = TraceContext::extract_with(headers, rng)?;
            if self.child_spans {
                context.inject_span(new_span_id(rng), headers);
            }
            return Some(context.trace_id());
        }
        let mut forward = |context: &TraceContext| {
            let span_id = if self.child_spans { new_span_id(rng) } else { context.span_id };
            context.inject_span(span_id, headers);
            context.trace_id()
        };
        if let Some(context) = extensions.get::<TraceContext>() {
            return Some(forward(context));
        }
        if let Ok(trace_id) = CURRENT.try_with(&mut forward) {
            return Some(trace_id);
        }
        self.start.then(|| {
            let context = TraceContext::start(self.samples(headers, configured, rng), rng);
            context.inject(headers);
            context.trace_id()
        })
    }
}

/// Whether the request says anything about a trace already. Malformed headers are the application's own, and kept.
fn carries_context(headers: &HeaderMap) -> bool {
    // Requests have few headers: comparing names costs less than hashing these four.
    headers.keys().any(|name| [w3c::PARENT, b3::SINGLE, b3::TRACE_ID, b3::SAMPLED].contains(name))
}

/// Uniform in `0.0..1.0`.
fn fraction(bits: u64) -> f64 {
    #[allow(clippy::cast_precision_loss, reason = "53 bits fit exactly")]
    let numerator = (bits >> 11) as f64;
    numerator / (1u64 << 53) as f64
}

/// Never zero: an all-zero id is invalid in every format.
fn new_trace_id(rng: &mut impl FnMut() -> u64) -> u128 {
    (u128::from(rng()) << 64 | u128::from(rng())).max(1)
}

fn new_span_id(rng: &mut impl FnMut() -> u64) -> u64 {
    rng().max(1)
}

/// Lower-case hexadecimal digits of `value`, as many as `text` is long: an even number.
fn write_hex(value: u128, text: &mut [u8]) {
    const DIGITS: [u8; 16] = *b"0123456789abcdef";
    for (pair, byte) in text.rchunks_exact_mut(2).zip(value.to_le_bytes()) {
        pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 0xf)]]);
    }
}

/// Digits to a number; upper case only where the format allows it.
fn read_hex(text: &[u8], upper_case: bool) -> Option<u128> {
    text.iter().try_fold(0u128, |value, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            b'A'..=b'F' if upper_case => digit - b'A' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

#[cfg(feature = "otel")]
impl TraceId {
    pub(crate) fn number(self) -> u128 {
        self.0
    }
}

impl fmt::Display for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for TraceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests;
