//! What came of an attempt.

use super::{HookOutcome, HookRef, Policy};
use crate::headers::find;
use crate::transport::{Kind, TransportError};
use h2::Reason;
use http::{HeaderMap, HeaderName, StatusCode};
use std::time::Duration;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
const PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// What came of an attempt, as far as retries care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// A response head arrived.
    Response(Response),
    /// None arrived.
    Failure(Failure),
}

/// A response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    /// HTTP status.
    pub(crate) status: u16,
    /// The gRPC status when the call is gRPC and this head already ends it: trailers-only, or no gRPC answer at all
    /// (mapped from the HTTP status). `None`: messages may follow, the attempt is committed.
    pub(crate) grpc: Option<u32>,
    /// `grpc-retry-pushback-ms`, of such a head.
    pub(crate) pushback: Pushback,
    /// What else of it a policy asked for.
    pub(crate) signs: Signs,
}

/// What only some policies look for in a response head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Signs {
    /// It has one of the policy's headers.
    pub(crate) by_header: bool,
    /// It says that a rate limit refused the request (`x-envoy-ratelimited`).
    pub(crate) rate_limited: bool,
    /// When it asks the caller to come back, within what the policy allows.
    pub(crate) reset: Option<Duration>,
}

/// What the server says of retries (gRFC A6).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pushback {
    /// Nothing.
    #[default]
    None,
    /// Exactly this delay, instead of the back-off.
    After(Duration),
    /// Not at all: negative, unreadable or repeated.
    Stop,
}

/// Why no response head arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The connection could not be made, or not in time.
    Connect,
    /// The chosen connection ended or failed before anything of the request was written: it never left the client.
    NeverSent,
    /// REFUSED_STREAM, or a GOAWAY that excludes the stream: the server did not process it.
    Refused,
    /// The stream was reset with this reason, or (`None`) its connection was lost.
    Reset(Option<Reason>),
    /// The attempt's own limit passed.
    PerTryTimeout,
    /// There is no endpoint to try.
    NoEndpoint,
    /// A local limit, or a drop by the load balancer: never retried (gRFC A32).
    Overloaded,
    /// The call's deadline passed.
    Deadline,
    /// Our own side failed: the request's body, or a request that cannot be sent. Never retried.
    Local,
}

impl Outcome {
    /// Reads a response head. `grpc`: the call is gRPC.
    pub(crate) fn of_response(status: StatusCode, headers: &HeaderMap, grpc: bool) -> Self {
        let code = if grpc { grpc_code(status, headers) } else { None };
        let pushback = if code.is_some() { pushback(headers) } else { Pushback::None };
        Self::Response(Response { status: status.as_u16(), grpc: code, pushback, signs: Signs::default() })
    }

    /// With what `policy` looks for in the headers.
    pub(crate) fn read_by(mut self, policy: &Policy, headers: &HeaderMap) -> Self {
        if let Self::Response(response) = &mut self {
            policy.read(response, headers);
        }
        self
    }

    /// What the application says of it; it is not asked about what can never be retried.
    pub(crate) fn ask(
        &self,
        hook: &HookRef,
        attempt: u32,
        response: Option<(StatusCode, &HeaderMap)>,
        error: Option<&(dyn std::error::Error + 'static)>,
    ) -> Option<bool> {
        let grpc = match self {
            Self::Response(response) => response.grpc.map(|code| tonic::Code::from_i32(code.cast_signed())),
            Self::Failure(Failure::Overloaded | Failure::Deadline | Failure::Local) => return None,
            Self::Failure(_) => None,
        };
        hook.ask(&HookOutcome { attempt, response, grpc, error })
    }

    /// Guesses from the error of some other client: connect failures and HTTP/2 resets are found in the `source()`
    /// chain; everything else is a lost connection, unless it says that it is a local limit.
    pub(crate) fn of_error(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut at = Some(error);
        let mut failure = Failure::Reset(None);
        while let Some(error) = at {
            if error.is::<crate::outbound::timeout::Elapsed>() {
                return Self::Failure(Failure::Deadline);
            }
            if error.is::<crate::outbound::cluster::Overloaded>() {
                return Self::Failure(Failure::Overloaded);
            }
            if error.is::<super::PerTryElapsed>() {
                return Self::Failure(Failure::PerTryTimeout);
            }
            if error.is::<super::ReplayError>() {
                return Self::Failure(Failure::Local);
            }
            if let Some(transport) = error.downcast_ref::<TransportError>() {
                return Self::Failure(Failure::of_transport(transport));
            }
            if let Some(h2) = error.downcast_ref::<h2::Error>() {
                return Self::Failure(Failure::of_h2(h2));
            }
            if let Some(hyper) = error.downcast_ref::<hyper::Error>() {
                if hyper.is_canceled() {
                    failure = Failure::NeverSent;
                } else if hyper.is_user() {
                    return Self::Failure(Failure::Local);
                }
            } else if let Some(io) = error.downcast_ref::<std::io::Error>()
                && matches!(io.kind(), std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::AddrNotAvailable)
            {
                return Self::Failure(Failure::Connect);
            }
            at = error.source();
        }
        Self::Failure(failure)
    }
}

impl Failure {
    /// What our own transport says of an attempt that got no response head.
    pub(crate) fn of_transport(error: &TransportError) -> Self {
        match error.kind() {
            Kind::NotSent => Self::NeverSent,
            Kind::RequestBody | Kind::InvalidRequest => Self::Local,
            Kind::GoAway | Kind::RefusedStream if error.is_unprocessed() => Self::Refused,
            _ if error.is_unprocessed() => Self::NeverSent,
            Kind::Reset(reason) => Self::Reset(Some(reason)),
            _ => Self::Reset(None),
        }
    }

    /// What an HTTP/2 error says about an attempt whose request was sent.
    pub(crate) fn of_h2(error: &h2::Error) -> Self {
        match error.reason() {
            Some(Reason::REFUSED_STREAM) => Self::Refused,
            // A GOAWAY only fails the streams it excludes: the others finish.
            Some(_) if error.is_go_away() && error.is_remote() => Self::Refused,
            Some(reason) if error.is_reset() => Self::Reset(Some(reason)),
            _ => Self::Reset(None),
        }
    }
}

/// `grpc-status`, where there is one; an unreadable one is UNKNOWN (gRPC over HTTP/2).
pub(crate) fn grpc_status(headers: &HeaderMap) -> Option<u32> {
    let value = find(headers, &GRPC_STATUS)?;
    Some(value.to_str().ok().and_then(|value| value.parse().ok()).unwrap_or(2))
}

/// The final status a head carries.
fn grpc_code(status: StatusCode, headers: &HeaderMap) -> Option<u32> {
    match grpc_status(headers) {
        Some(code) => Some(code),
        None if status == StatusCode::OK => None,
        None => Some(grpc_from_http(status.as_u16())),
    }
}

fn pushback(headers: &HeaderMap) -> Pushback {
    let mut values = headers.get_all(PUSHBACK).iter();
    match (values.next(), values.next()) {
        (None, _) => Pushback::None,
        (Some(one), None) => match one.to_str().ok().and_then(|v| v.parse::<i32>().ok()).map(u64::try_from) {
            Some(Ok(ms)) => Pushback::After(Duration::from_millis(ms)),
            _ => Pushback::Stop,
        },
        _ => Pushback::Stop,
    }
}

/// gRPC's `http-grpc-status-mapping.md`.
pub(crate) fn grpc_from_http(status: u16) -> u32 {
    match status {
        400 => 13,
        401 => 16,
        403 => 7,
        404 => 12,
        429 | 502 | 503 | 504 => 14,
        _ => 2,
    }
}

/// Envoy's `Grpc::Utility::grpcToHttpStatus` (that of google.rpc.Code). Codes above 16 are 500.
pub(crate) fn http_from_grpc(code: u32) -> u16 {
    match code {
        0 => 200,
        1 => 499,
        3 | 9 | 11 => 400,
        4 => 504,
        5 => 404,
        6 | 10 => 409,
        7 => 403,
        8 => 429,
        12 => 501,
        14 => 503,
        16 => 401,
        _ => 500,
    }
}

/// gRPC over HTTP/2, "Errors": the status of a stream that ended with this RST_STREAM code; `None` is a lost connection.
pub(crate) fn grpc_from_reset(reason: Option<Reason>) -> u32 {
    match reason {
        None | Some(Reason::REFUSED_STREAM) => 14,
        Some(Reason::CANCEL) => 1,
        Some(Reason::ENHANCE_YOUR_CALM) => 8,
        Some(Reason::INADEQUATE_SECURITY) => 7,
        Some(_) => 13,
    }
}

#[cfg(test)]
mod tests;
