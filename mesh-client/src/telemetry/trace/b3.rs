//! B3 propagation: the single `b3` header and the `x-b3-*` headers (openzipkin/b3-propagation).

use super::{Sampling, read_hex, write_hex};
use crate::headers;
use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const SINGLE: HeaderName = HeaderName::from_static("b3");
pub(super) const TRACE_ID: HeaderName = HeaderName::from_static("x-b3-traceid");
pub(super) const SPAN_ID: HeaderName = HeaderName::from_static("x-b3-spanid");
pub(super) const PARENT_SPAN_ID: HeaderName = HeaderName::from_static("x-b3-parentspanid");
pub(super) const SAMPLED: HeaderName = HeaderName::from_static("x-b3-sampled");
pub(super) const FLAGS: HeaderName = HeaderName::from_static("x-b3-flags");

/// Trace and span id, unless the header only decides about recording.
type Parsed = (Option<(u128, u64)>, Sampling);

/// `{trace}-{span}[-{sampling}[-{parent}]]`, or the sampling state alone.
pub(super) fn parse_single(headers: &HeaderMap) -> Option<Parsed> {
    let value = headers.get(SINGLE)?.as_bytes();
    let mut parts = value.split(|b| *b == b'-');
    let first = parts.next()?;
    let Some(span) = parts.next() else { return Some((None, sampling(first)?)) };
    let sampling = match parts.next() {
        Some(state) => sampling(state)?,
        None => Sampling::Deferred,
    };
    match (parts.next(), parts.next()) {
        (None, _) => {}
        (Some(parent), None) => drop(span_id(parent)?),
        _ => return None,
    }
    Some((Some((trace_id(first)?, span_id(span)?)), sampling))
}

/// `x-b3-traceid`, `x-b3-spanid`, `x-b3-sampled`, `x-b3-flags`.
pub(super) fn parse_multi(headers: &HeaderMap) -> Option<Parsed> {
    let bytes = |name| headers.get(name).map(HeaderValue::as_bytes);
    let sampling = match (bytes(FLAGS), bytes(SAMPLED)) {
        (Some(b"1"), _) => Sampling::Debug,
        (_, Some(b"true")) => Sampling::Accept,
        (_, Some(b"false")) => Sampling::Deny,
        (_, Some(state)) => sampling(state)?,
        (_, None) => Sampling::Deferred,
    };
    match (bytes(TRACE_ID), bytes(SPAN_ID)) {
        (Some(trace), Some(span)) => Some((Some((trace_id(trace)?, span_id(span)?)), sampling)),
        (None, None) => Some((None, sampling)),
        _ => None,
    }
}

pub(super) fn encode_single(trace_id: u128, span_id: u64, sampling: Sampling) -> HeaderValue {
    let mut text = [b'-'; 51];
    let trace = trace_digits(trace_id);
    write_hex(trace_id, &mut text[..trace]);
    write_hex(u128::from(span_id), &mut text[trace + 1..trace + 17]);
    let length = match state(sampling) {
        Some(state) => {
            text[trace + 18] = state;
            trace + 19
        }
        None => trace + 17,
    };
    headers::value(&text[..length])
}

pub(super) fn inject_multi(trace_id: u128, span_id: u64, sampling: Sampling, headers: &mut HeaderMap) {
    let mut text = [0; 32];
    let trace = trace_digits(trace_id);
    write_hex(trace_id, &mut text[..trace]);
    headers.insert(TRACE_ID, headers::value(&text[..trace]));
    write_hex(u128::from(span_id), &mut text[..16]);
    headers.insert(SPAN_ID, headers::value(&text[..16]));
    headers.remove(PARENT_SPAN_ID);
    match sampling {
        Sampling::Debug => drop(headers.insert(FLAGS, HeaderValue::from_static("1"))),
        Sampling::Accept => drop(headers.insert(SAMPLED, HeaderValue::from_static("1"))),
        Sampling::Deny => drop(headers.insert(SAMPLED, HeaderValue::from_static("0"))),
        Sampling::Deferred => {}
    }
}

/// A trace id that fits 64 bits is written so: it came so, from a system that knows no longer ones.
fn trace_digits(trace_id: u128) -> usize {
    if u64::try_from(trace_id).is_ok() { 16 } else { 32 }
}

fn trace_id(text: &[u8]) -> Option<u128> {
    matches!(text.len(), 16 | 32).then(|| read_hex(text, true))?.filter(|id| *id != 0)
}

fn span_id(text: &[u8]) -> Option<u64> {
    let id = (text.len() == 16).then(|| read_hex(text, true))??;
    u64::try_from(id).ok().filter(|id| *id != 0)
}

fn sampling(text: &[u8]) -> Option<Sampling> {
    Some(match text {
        b"0" => Sampling::Deny,
        b"1" => Sampling::Accept,
        b"d" => Sampling::Debug,
        _ => return None,
    })
}

fn state(sampling: Sampling) -> Option<u8> {
    match sampling {
        Sampling::Deferred => None,
        Sampling::Deny => Some(b'0'),
        Sampling::Accept => Some(b'1'),
        Sampling::Debug => Some(b'd'),
    }
}
