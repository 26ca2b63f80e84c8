//! A route's limits, compiled, and the deadline they give a call.

use super::{encode_grpc_timeout, parse_grpc_timeout};
use crate::headers::find;
use crate::outbound::route::Profile;
use http::{HeaderMap, HeaderName, header};
use mesh_xds::resource::{Forward, MaxStreamDuration};
use std::{fmt, time::Duration};
use tokio::time::Instant;

pub(super) const GRPC_TIMEOUT: HeaderName = HeaderName::from_static("grpc-timeout");

/// Envoy's `RouteAction.timeout` when unset.
const ENVOY_DEFAULT: Duration = Duration::from_secs(15);

/// The limits of one route.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rules {
    profile: Profile,
    grpc: Option<(Duration, Source)>,
    plain: Option<(Duration, Source)>,
    /// Taken off the caller's `grpc-timeout`.
    offset: Option<Duration>,
}

/// When a call ends, and who said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Deadline {
    /// The moment.
    pub(crate) at: Instant,
    /// How long after the call's start that is.
    pub(crate) limit: Duration,
    /// Where the limit comes from.
    pub(crate) source: Source,
}

/// Where a limit comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    /// The caller's `grpc-timeout` header.
    GrpcTimeout,
    /// `RouteAction.timeout`.
    Route,
    /// `max_stream_duration.grpc_timeout_header_max` of the route.
    GrpcTimeoutHeaderMax,
    /// `max_stream_duration.max_stream_duration` of the route.
    RouteMaxStreamDuration,
    /// `common_http_protocol_options.max_stream_duration` of the connection manager.
    ListenerMaxStreamDuration,
    /// A timeout layer.
    Layer,
    /// A timeout layer, for response headers.
    Headers,
    /// Nobody: what a copy of a request without a limit may take.
    Mirror,
}

impl Source {
    /// A `max_stream_duration`.
    pub(crate) fn is_stream_duration(self) -> bool {
        matches!(self, Self::RouteMaxStreamDuration | Self::ListenerMaxStreamDuration)
    }
}

impl Rules {
    /// gRFC A31 for both profiles; Envoy's `timeout` in its own. A configured zero is no limit and hides the next one.
    pub(crate) fn compile(forward: &Forward, listener: Option<Duration>, profile: Profile) -> Self {
        let timeout = match profile {
            Profile::Grpc => None,
            Profile::Envoy => Some((forward.timeout.unwrap_or(ENVOY_DEFAULT), Source::Route)),
        };
        Self::of(timeout, forward.max_stream_duration, listener, profile)
    }

    /// Of a server's route: what is not said is no limit. A caller's `grpc-timeout` holds for gRPC alone.
    pub(crate) fn of_server(route: Option<&Forward>, listener: Option<Duration>) -> Self {
        let timeout = route.and_then(|route| route.timeout).map(|limit| (limit, Source::Route));
        let stream = route.map_or_else(MaxStreamDuration::default, |route| route.max_stream_duration);
        Self::of(timeout, stream, listener, Profile::Envoy)
    }

    fn of(
        timeout: Option<(Duration, Source)>,
        stream: MaxStreamDuration,
        listener: Option<Duration>,
        profile: Profile,
    ) -> Self {
        let duration = (stream.max_stream_duration.map(|d| (d, Source::RouteMaxStreamDuration)))
            .or(listener.map(|d| (d, Source::ListenerMaxStreamDuration)));
        let grpc = stream.grpc_timeout_header_max.map(|d| (d, Source::GrpcTimeoutHeaderMax)).or(duration);
        // gRFC A31 does not know it.
        let offset = stream.grpc_timeout_header_offset.filter(|_| profile == Profile::Envoy);
        Self { profile, grpc: shorter(timeout, grpc), plain: shorter(timeout, duration), offset }
    }

    /// Limits of a policy given in code: `limit` holds for every call.
    pub(crate) fn fixed(limit: Duration) -> Self {
        let limit = Some((limit, Source::Layer));
        Self { profile: Profile::Envoy, grpc: limit, plain: limit, offset: None }
    }

    /// The deadline of a call that starts `now`; `None` is no limit.
    pub(crate) fn deadline(&self, now: Instant, headers: &HeaderMap) -> Option<Deadline> {
        self.deadline_of(now, headers, self.profile == Profile::Grpc || is_grpc(headers))
    }

    /// The same, where it is known whether the call is gRPC.
    pub(crate) fn deadline_of(&self, now: Instant, headers: &HeaderMap, grpc: bool) -> Option<Deadline> {
        let limit = if grpc {
            let caller = find(headers, &GRPC_TIMEOUT).and_then(parse_grpc_timeout);
            let caller = caller.map(|caller| match self.offset.and_then(|offset| caller.checked_sub(offset)) {
                Some(left) if !left.is_zero() => left,
                _ => caller,
            });
            match (caller, self.grpc) {
                (Some(caller), Some((limit, _))) if caller <= limit => Some((caller, Source::GrpcTimeout)),
                (Some(caller), None) => Some((caller, Source::GrpcTimeout)),
                (_, limit) => limit,
            }
        } else {
            self.plain
        };
        let (limit, source) = limit?;
        Some(Deadline { at: now.checked_add(limit)?, limit, source })
    }
}

/// The shorter of two limits; zero is none.
fn shorter(a: Option<(Duration, Source)>, b: Option<(Duration, Source)>) -> Option<(Duration, Source)> {
    [a, b].into_iter().flatten().filter(|(d, _)| !d.is_zero()).min_by_key(|(d, _)| *d)
}

impl Deadline {
    /// What is left; zero when over.
    pub(crate) fn remaining(&self, now: Instant) -> Duration {
        self.at.saturating_duration_since(now)
    }
}

/// Whether the request is gRPC by its content type (`application/grpc`, with `+proto` or parameters).
pub(crate) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(value) = find(headers, &header::CONTENT_TYPE) else { return false };
    match value.as_bytes().split_at_checked(16) {
        Some((b"application/grpc", rest)) => matches!(rest.first(), None | Some(b'+' | b';')),
        _ => false,
    }
}

/// Tells the server of a gRPC call how long this attempt may take: the rest of the deadline, or `per_try` if shorter.
///
/// A header that already says so, give or take a hundredth, stays as it is and costs nothing: that is the first attempt
/// of every call whose caller set a deadline. Without any limit the header is not touched.
pub(crate) fn write_grpc_timeout(
    headers: &mut HeaderMap,
    deadline: Option<&Deadline>,
    per_try: Option<Duration>,
    now: Instant,
) {
    let Some(left) = deadline.map(|d| d.remaining(now)).into_iter().chain(per_try).min() else { return };
    if let Some(said) = find(headers, &GRPC_TIMEOUT).and_then(parse_grpc_timeout)
        && said >= left
        && said - left <= left / 100
    {
        return;
    }
    headers.insert(GRPC_TIMEOUT, encode_grpc_timeout(left));
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GrpcTimeout => "set by the caller's grpc-timeout",
            Self::Route => "set by the route's timeout",
            Self::GrpcTimeoutHeaderMax => "set by the route's grpc_timeout_header_max",
            Self::RouteMaxStreamDuration => "set by the route's max_stream_duration",
            Self::ListenerMaxStreamDuration => "set by the listener's max_stream_duration",
            Self::Layer => "set by the timeout layer",
            Self::Headers => "set by the timeout layer, from the end of the request to the headers of the response",
            Self::Mirror => "of a copy of a request without a deadline",
        })
    }
}

#[cfg(test)]
mod tests;
