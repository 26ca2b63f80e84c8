//! The end of a call: counted once, judged once, and everything it holds given back.

use super::Call;
use crate::{
    Error,
    error::{BoxError, Kind, Place},
    outbound::{
        cluster::Outcome as Verdict,
        retry::grpc_status,
        route::Profile,
        timeout::{Deadline, StoodStill},
    },
    telemetry::{access_log::ResponseFlags as Flag, metrics::Outcome},
    transport::{RecvBody, TransportError},
};
use http::{HeaderMap, Response, StatusCode};
use std::net::SocketAddr;

/// How a response ended.
pub(crate) enum Finished<'a> {
    /// With trailers.
    Trailers(&'a HeaderMap),
    /// Without.
    End,
    /// The stream or connection broke.
    Cut,
    /// The call's deadline passed.
    TimedOut,
    /// Nothing moved for too long.
    StoodStill,
}

/// What of a call's flags still counts when it was answered.
const KEPT: Flag = Flag::UPSTREAM_RETRY_LIMIT_EXCEEDED.with(Flag::UPSTREAM_OVERFLOW);

impl Finished<'_> {
    /// With this error.
    pub(crate) fn by(error: &Error) -> Self {
        match (error.is_idle(), error.is_timeout()) {
            (true, _) => Self::StoodStill,
            (_, true) => Self::TimedOut,
            _ => Self::Cut,
        }
    }
}

impl Call {
    /// The response is passed on, edited: the call goes on with its body.
    pub(super) fn answered(&mut self, response: &mut Response<RecvBody>) {
        self.edit_response(response);
        self.set_cookies(response.headers_mut());
        if self.chosen.forward().attempt_count.in_response {
            self.attempts.write_count(response.headers_mut());
        }
        self.status = response.status().as_u16();
        self.flag = self.flag & KEPT;
        self.attempts.settle();
        if self.chosen.grpc {
            self.grpc_status = grpc_status(response.headers());
        }
        if let Some(explain) = &self.chosen.explain {
            explain.add("response", format!("HTTP {}", response.status()));
        }
        if response.body().has_ended() {
            self.finish(Finished::End);
        }
    }

    /// The call is over: counted once, and everything it holds is given back.
    pub(crate) fn finish(&mut self, how: Finished<'_>) {
        if std::mem::replace(&mut self.recorded, true) {
            return;
        }
        let verdict = match how {
            Finished::Trailers(trailers) if self.chosen.grpc => {
                self.grpc_status = grpc_status(trailers).or(self.grpc_status);
                Some(self.verdict())
            }
            Finished::Trailers(_) | Finished::End => Some(self.verdict()),
            Finished::Cut => {
                if self.flag.is_empty() {
                    self.flag = Flag::UPSTREAM_CONNECTION_TERMINATION;
                }
                self.grpc_status = self.grpc_status.or(Some(14));
                // Before a response the attempt was judged already.
                (self.status != 0).then_some(Verdict::LocalOrigin)
            }
            Finished::TimedOut | Finished::StoodStill => {
                self.flag = match &self.chosen.deadline {
                    _ if matches!(how, Finished::StoodStill) => Flag::STREAM_IDLE_TIMEOUT,
                    Some(deadline) if deadline.source.is_stream_duration() => Flag::UPSTREAM_MAX_STREAM_DURATION,
                    _ => Flag::UPSTREAM_REQUEST_TIMEOUT,
                };
                self.grpc_status = Some(4);
                // Envoy asks the endpoint's part in a timeout only until the head of the response.
                let answered = self.status != 0 && self.chosen.routing.facts.profile == Profile::Envoy;
                (!answered).then_some(Verdict::LocalOrigin)
            }
        };
        if let (Finished::Trailers(trailers), Some(verdict)) = (&how, verdict) {
            self.take_report(trailers);
            self.learn_late(verdict);
        }
        if let (Some(mut in_flight), Some(verdict)) = (self.in_flight.take(), verdict) {
            in_flight.record(verdict);
        }
        self.give_back();
        self.record();
    }

    /// What a response that came whole says of its endpoint.
    fn verdict(&self) -> Verdict {
        match (self.chosen.grpc, self.grpc_status) {
            (true, Some(code)) => Verdict::of_grpc_status(code),
            _ => Verdict::of_http(StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK)),
        }
    }

    fn record(&self) {
        let outcome = Outcome {
            status: self.status,
            grpc: if self.chosen.grpc { Some(self.grpc_status.unwrap_or(2)) } else { None },
            flag: self.flag | self.chosen.flags,
        };
        let took = self.chosen.started.elapsed();
        match &self.chosen.watch {
            None => self.upstream().metrics.record(outcome, took),
            Some(_) => self.tell(outcome, took),
        }
    }

    /// The response broke off.
    pub(crate) fn broke(&mut self, error: &TransportError) {
        self.flag = broken(error);
    }

    /// Counts against `max_requests` no longer.
    fn give_back(&mut self) {
        if std::mem::replace(&mut self.admitted, false) {
            self.leaf().live.end_request(self.priority);
        }
    }

    /// The endpoint of the last attempt.
    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    pub(crate) fn is_grpc(&self) -> bool {
        self.chosen.grpc
    }

    /// When the call ends.
    pub(crate) fn deadline(&self) -> Option<&Deadline> {
        self.chosen.deadline.as_ref()
    }

    /// The call's deadline passed.
    pub(crate) fn timed_out(&self, deadline: &Deadline) -> Error {
        let when = match (self.status, self.connecting) {
            (0, true) => "while waiting for a connection",
            (0, false) => "before the response began",
            _ => "while the response body was read",
        };
        let message = format!("deadline of {:?} exceeded {when} ({})", deadline.limit, deadline.source);
        self.error(Kind::Timeout, message, None)
    }

    /// Nothing moved for too long.
    pub(crate) fn stood_still(&self, still: StoodStill) -> Error {
        self.error(Kind::Idle, still.to_string(), None)
    }

    /// An error that says where the call was.
    pub(crate) fn error(&self, kind: Kind, message: String, source: Option<BoxError>) -> Error {
        let routing = &self.chosen.routing;
        let place = Place {
            target: Some(routing.facts.label.clone()),
            route: Some(self.chosen.entry().name.clone()),
            cluster: Some(self.upstream().name.clone()),
            endpoint: self.endpoint,
            attempt: self.attempts.number(),
            version: Some(routing.snapshot.version.clone()),
        };
        let error = Error::new(kind, message, place, source);
        if let Some(explain) = &self.chosen.explain {
            error.explained_by(explain);
        }
        error
    }
}

impl Drop for Call {
    /// The caller gave up: counted as a downstream disconnect; outlier detection is told nothing.
    fn drop(&mut self) {
        if !self.recorded {
            self.flag = Flag::DOWNSTREAM_CONNECTION_TERMINATION;
            self.grpc_status = Some(1);
            self.record();
        }
        self.give_back();
    }
}

/// Envoy's word for how a stream broke.
pub(super) fn broken(error: &TransportError) -> Flag {
    use crate::transport::Kind;
    match error.kind() {
        Kind::Reset(_) | Kind::RefusedStream => Flag::UPSTREAM_REMOTE_RESET,
        Kind::Protocol => Flag::UPSTREAM_PROTOCOL_ERROR,
        Kind::RequestBody | Kind::InvalidRequest => Flag::LOCAL_RESET,
        _ => Flag::UPSTREAM_CONNECTION_TERMINATION,
    }
}
