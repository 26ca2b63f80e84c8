//! W3C Trace Context, level 1: `traceparent` and `tracestate`.

use super::{read_hex, write_hex};
use crate::headers;
use http::{HeaderMap, HeaderName, HeaderValue};

pub(super) const PARENT: HeaderName = HeaderName::from_static("traceparent");
pub(super) const STATE: HeaderName = HeaderName::from_static("tracestate");
/// W3C Baggage.
pub(super) const BAGGAGE: HeaderName = HeaderName::from_static("baggage");

/// Length of a version 00 header; later versions may append `-` and more.
const LENGTH: usize = 55;

/// Trace id, parent id and the sampled flag. `None` when absent, repeated or malformed.
pub(super) fn parse(headers: &HeaderMap) -> Option<(u128, u64, bool)> {
    let mut values = headers.get_all(PARENT).iter();
    let value = values.next()?.as_bytes();
    if values.next().is_some() || value.len() < LENGTH {
        return None;
    }
    let (head, more) = value.split_at(LENGTH);
    let version = read_hex(&head[..2], false)?;
    let length_fits = if version == 0 { more.is_empty() } else { matches!(more.first(), None | Some(b'-')) };
    if version == 0xff || !length_fits || head[2] != b'-' || head[35] != b'-' || head[52] != b'-' {
        return None;
    }
    let trace_id = read_hex(&head[3..35], false)?;
    let span_id = u64::try_from(read_hex(&head[36..52], false)?).ok()?;
    let flags = read_hex(&head[53..], false)?;
    (trace_id != 0 && span_id != 0).then_some((trace_id, span_id, flags & 1 == 1))
}

/// All values of a header that is a list, joined in their order.
pub(super) fn joined(headers: &HeaderMap, name: &HeaderName) -> Option<HeaderValue> {
    let mut values = headers.get_all(name).iter();
    let first = values.next()?;
    let Some(second) = values.next() else { return Some(first.clone()) };
    let mut joined = first.as_bytes().to_vec();
    for value in std::iter::once(second).chain(values) {
        joined.push(b',');
        joined.extend_from_slice(value.as_bytes());
    }
    HeaderValue::from_bytes(&joined).ok()
}

/// The header, hidden from HPACK's table (RFC 7541 section 7.1.3): a value that never comes again would only push out those
/// that do, and every lookup would compare it with all earlier ones.
pub(super) fn encode(trace_id: u128, span_id: u64, sampled: bool) -> HeaderValue {
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    write_hex(trace_id, &mut text[3..35]);
    write_hex(u128::from(span_id), &mut text[36..52]);
    if sampled {
        text[54] = b'1';
    }
    let mut value = headers::value(&text);
    value.set_sensitive(true);
    value
}
