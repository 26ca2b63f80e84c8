//! What the fuzzers in `fuzz/` and the test that plays their corpora drive: bytes in, a panic when something does not hold. Not part of the
//! public interface: may change at any time.

mod routes;

use crate::{
    inbound::ForwardedClient,
    outbound::{
        cluster::Report,
        retry::{Condition, Kept, Outcome, Policy},
        route::{cookie, parameter},
        timeout::{encode_grpc_timeout, parse_grpc_timeout},
    },
    trace::TraceContext,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use http_body::{Body, Frame};
use mesh_xds::{
    Bootstrap,
    resource::{ResetFormat, Resource, ResourceType, WeightedRoundRobin},
};
use std::{
    collections::{BTreeMap, VecDeque},
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

pub use mesh_tls::fuzz_api::{bundles, sans, spiffe};
pub use routes::routes;

/// A fuzz target: what it takes is its own affair, but it takes anything.
pub type Target = fn(&[u8]);

/// All targets, by name.
pub const TARGETS: [(&str, Target); 14] = [
    ("routes", routes),
    ("cookies", cookies),
    ("trace", trace),
    ("replay", replay),
    ("bootstrap", bootstrap),
    ("resources", resources),
    ("orca", orca),
    ("statuses", statuses),
    ("jwt", jwt),
    ("xfcc", xfcc),
    ("sans", sans),
    ("spiffe", spiffe),
    ("bundles", bundles),
    ("sniff", sniff),
];

/// RFC 7515 appendix A.2.
const KEYS: &[u8] = include_bytes!("rfc7515_a2.json");
const TOKEN: &str = include_str!("rfc7515_a2.jwt");

/// A set of keys, a line, and a token, or a token alone: nothing panics, and of all tokens keys that are not in the input believe one: the one that was signed.
///
/// # Panics
/// When that does not hold.
pub fn jwt(data: &[u8]) {
    let (keys, token) = data.iter().position(|byte| *byte == b'\n').map_or((&[][..], data), |at| data.split_at(at));
    let Ok(token) = std::str::from_utf8(token) else { return };
    crate::inbound::fuzz::verify(keys, token.trim());
    let good = TOKEN.trim();
    let signed = |token: &str| token.rsplit_once('.').map(|(signed, _)| signed.to_owned());
    let verified = crate::inbound::fuzz::verify(KEYS, token.trim());
    assert!(!verified || signed(token.trim()) == signed(good), "a token is believed that was not signed");
    assert!(verified || token.trim() != good, "the token that was signed is not believed");
}

/// The first bytes of a connection, as they arrive: TLS is never taken for plaintext or the other way round, what is decided stays
/// decided, and names are such as filter chains compare with.
///
/// # Panics
/// When that does not hold.
pub fn sniff(data: &[u8]) {
    let is_tls = data.starts_with(&[0x16, 0x03]);
    for hello in [false, true] {
        let mut before = None;
        // Bytes come one by one at first, and then in pieces.
        let ends = (1..data.len().min(64)).chain((64..data.len()).step_by(101)).chain([data.len()]);
        for end in ends.filter(|end| *end > 0) {
            let Some((tls, name, protocols)) = crate::inbound::fuzz::sniff(&data[..end], hello) else {
                assert!(before.is_none(), "decided, and then not");
                continue;
            };
            assert_eq!(tls, is_tls, "{end} bytes");
            assert!(tls || (name.is_none() && protocols.len() == 1));
            assert!(before.is_none_or(|before| before == tls));
            assert!(name.is_none_or(|name| !name.is_empty() && !name.bytes().any(|byte| byte.is_ascii_uppercase())));
            before = Some(tls);
        }
        assert!(hello || data.len() < 2 || before.is_some(), "two bytes tell");
    }
}

/// A value of `x-forwarded-client-cert`: what is read is written so that it is read again.
///
/// # Panics
/// When that does not hold.
pub fn xfcc(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(clients) = ForwardedClient::parse(text) else { return };
    let written = clients.iter().map(ToString::to_string).filter(|one| !one.is_empty()).collect::<Vec<_>>().join(",");
    let known = |clients: &[ForwardedClient]| {
        clients.iter().filter(|one| **one != ForwardedClient::default()).cloned().collect::<Vec<_>>()
    };
    let again = ForwardedClient::parse(&written).expect("what we write is well formed");
    assert_eq!(known(&again), known(&clients), "{written}");
}

/// Lines of `name: value`; what is no header is left out.
fn headers(data: &[u8]) -> HeaderMap {
    let lines = data.split(|byte| *byte == b'\n').filter_map(|line| {
        let colon = line.iter().position(|byte| *byte == b':')?;
        let name = HeaderName::from_bytes(line[..colon].trim_ascii()).ok()?;
        Some((name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?))
    });
    let mut headers = HeaderMap::new();
    for (name, value) in lines.take(64) {
        headers.append(name, value);
    }
    headers
}

/// Cookies and query parameters, against a reader that goes byte by byte. First line: the name; then headers, and a query in `q:`.
///
/// # Panics
/// When they differ.
pub fn cookies(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n').unwrap_or(data.len());
    let Ok(name) = std::str::from_utf8(&data[..end]) else { return };
    let headers = headers(&data[end..]);
    let mut expected = None;
    'lines: for line in headers.get_all(http::header::COOKIE) {
        let mut rest = line.as_bytes();
        loop {
            let next = rest.iter().position(|byte| *byte == b';');
            let pair = &rest[..next.unwrap_or(rest.len())];
            if let Some(equals) = pair.iter().position(|byte| *byte == b'=')
                && pair[..equals].trim_ascii() == name.as_bytes()
            {
                let value = pair[equals + 1..].trim_ascii();
                let quoted = value.len() >= 2 && value.starts_with(b"\"") && value.ends_with(b"\"");
                expected = Some(if quoted { &value[1..value.len() - 1] } else { value });
                break 'lines;
            }
            match next {
                Some(next) => rest = &rest[next + 1..],
                None => break,
            }
        }
    }
    assert_eq!(cookie(&headers, name), expected, "cookie {name:?} of {headers:?}");
    if let Some(Ok(query)) = headers.get("q").map(HeaderValue::to_str) {
        let first = query.split('&').find(|pair| pair.split('=').next() == Some(name));
        let expected = first.map(|pair| pair.find('=').map_or("", |at| &pair[at + 1..]));
        assert_eq!(parameter(query, name), expected, "parameter {name:?} of {query:?}");
    }
}

/// Trace headers: what is read is written in the same way, and read again.
///
/// # Panics
/// When that gives another context.
pub fn trace(data: &[u8]) {
    let headers = headers(data);
    let Some(context) = TraceContext::extract(&headers) else { return };
    let mut written = headers;
    context.inject(&mut written);
    let again = TraceContext::extract(&written).expect("what we write can be read");
    assert_eq!((again.trace_id(), again.span_id()), (context.trace_id(), context.span_id()), "{written:?}");
    assert_eq!(again.is_sampled(), context.is_sampled(), "{written:?}");
    assert_ne!(context.span_id(), 0, "{written:?}");
}

/// A body of so many frames, some of which are not there at once.
struct Scripted(VecDeque<Option<Bytes>>);

impl Body for Scripted {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.0.pop_front() {
            Some(None) => Poll::Pending,
            frame => Poll::Ready(frame.flatten().map(|data| Ok(Frame::data(data)))),
        }
    }
}

/// A request body through its attempts. First byte: the cap; then for each frame its length (255: it is not there yet); what is behind a
/// zero says how many frames each attempt reads.
///
/// # Panics
/// When an attempt sends anything but the body from its start.
pub fn replay(data: &[u8]) {
    let Some((&cap, script)) = data.split_first() else { return };
    let script = &script[..script.len().min(64)];
    let end = script.iter().position(|byte| *byte == 0).unwrap_or(script.len());
    let mut whole = Vec::new();
    let frame = |(i, &length): (usize, &u8)| match length {
        255 => None,
        length => {
            let frame = vec![u8::try_from(i).unwrap_or(0); usize::from(length)];
            whole.extend_from_slice(&frame);
            Some(Bytes::from(frame))
        }
    };
    let frames: VecDeque<_> = script[..end].iter().enumerate().map(frame).collect();
    let cx = &mut Context::from_waker(Waker::noop());
    let Ok((kept, first)) = Kept::new(Scripted(frames), usize::from(cap), cx) else { return };
    let mut attempt = Some(first);
    for reads in script[end..].iter().skip(1).chain([&255]) {
        let mut body = attempt.take().unwrap_or_else(|| kept.again());
        let mut read = Vec::new();
        let mut polls = 0;
        let ended = loop {
            if polls == usize::from(*reads) * 4 {
                break false;
            }
            polls += 1;
            assert!(
                body.size_hint().lower() + read.len() as u64 <= whole.len() as u64,
                "more is promised than there is"
            );
            match Pin::new(&mut body).poll_frame(cx) {
                Poll::Pending => {}
                Poll::Ready(None) => break true,
                Poll::Ready(Some(Ok(frame))) => {
                    read.extend_from_slice(frame.data_ref().expect("there are no trailers"))
                }
                // It was longer than the cap, and an attempt before has sent some of it.
                Poll::Ready(Some(Err(_))) => {
                    assert!(!kept.is_replayable(), "it can be sent again, and is not");
                    return;
                }
            }
        };
        assert!(whole.starts_with(&read), "{read:?} is no beginning of {whole:?}");
        assert!(!ended || read.len() == whole.len(), "it ended after {} of {} bytes", read.len(), whole.len());
    }
}

/// The bootstrap file: it is taken, or refused for a reason.
///
/// # Panics
/// When no reason is given.
pub fn bootstrap(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    match Bootstrap::from_json(text) {
        Ok(bootstrap) => assert!(!bootstrap.servers.is_empty() || !bootstrap.authorities.is_empty(), "{bootstrap:?}"),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// An xDS resource, first byte its type: taken with a name, or refused with a path.
///
/// # Panics
/// When what was taken is not taken again, or a refusal says nothing.
pub fn resources(data: &[u8]) {
    const TYPES: [ResourceType; 4] = [
        ResourceType::Listener,
        ResourceType::RouteConfiguration,
        ResourceType::Cluster,
        ResourceType::ClusterLoadAssignment,
    ];
    let Some((&kind, bytes)) = data.split_first() else { return };
    let kind = TYPES[usize::from(kind) % TYPES.len()];
    let providers = BTreeMap::new();
    let decode = || Resource::decode(kind, bytes, &mut mesh_xds::resource::Decoder::new(&providers));
    match decode() {
        Ok(resource) => assert_eq!(decode().map(|again| again.name().clone()).ok().as_ref(), Some(resource.name())),
        Err(invalid) => assert!(!invalid.to_string().is_empty()),
    }
}

/// Load reports in headers.
///
/// # Panics
/// When a weight is no positive number.
pub fn orca(data: &[u8]) {
    let Some(report) = Report::of(&headers(data)) else { return };
    if let Some(weight) = report.weight(&WeightedRoundRobin::default()) {
        assert!(weight.is_finite() && weight > 0.0, "{weight} of {report:?}");
    }
}

/// Statuses, and headers that say when to come back.
///
/// # Panics
/// When a deadline that is written is not what was read.
pub fn statuses(data: &[u8]) {
    const MAX: Duration = Duration::from_secs(300);
    let headers = headers(data);
    for status in [200, 429, 503] {
        let policy = Policy::http()
            .on(Condition::Http5xx)
            .on(Condition::Grpc(tonic::Code::Unavailable))
            .on(Condition::RateLimited)
            .reset_header(http::header::RETRY_AFTER, ResetFormat::Seconds)
            .reset_header(HeaderName::from_static("x-reset"), ResetFormat::UnixTime)
            .max_reset(MAX)
            .build();
        let status = StatusCode::from_u16(status).expect("it is one");
        let outcome = Outcome::of_response(status, &headers, headers.contains_key("grpc-status"));
        let _ = policy.retries(&outcome.read_by(&policy, &headers));
    }
    if let Some(timeout) = headers.get("grpc-timeout").and_then(parse_grpc_timeout) {
        assert_eq!(parse_grpc_timeout(&encode_grpc_timeout(timeout)), Some(timeout));
    }
}
