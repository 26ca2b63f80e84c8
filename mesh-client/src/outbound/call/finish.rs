//! The end of a call: counted once, judged once, and everything it holds given back.

use super::Call;
use crate::{
    Error,
    body::MeshBody,
    error::{BoxError, Kind, Place},
    outbound::{cluster::Outcome as Verdict, timeout::Deadline},
    telemetry::metrics,
    transport::RecvBody,
};
use http::{HeaderMap, HeaderName, Response, StatusCode};
use http_body::Body;

const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");

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
}

impl Call {
    /// The head is passed on: what the rest of the call holds moves into the body.
    pub(super) fn respond(mut self, response: Response<RecvBody>, deadline: Option<Deadline>) -> Response<MeshBody> {
        let (head, body) = response.into_parts();
        self.status = head.status.as_u16();
        self.flag = "-";
        self.attempts.settle();
        if self.grpc {
            self.grpc_status = grpc_status(&head.headers);
        }
        if let Some(explain) = &self.explain {
            explain.add("response", format!("HTTP {}", head.status));
        }
        if body.is_end_stream() {
            self.finish(Finished::End);
        }
        Response::from_parts(head, MeshBody::live(body, self, deadline))
    }

    /// The call is over: counted once, and everything it holds is given back.
    pub(crate) fn finish(&mut self, how: Finished<'_>) {
        if std::mem::replace(&mut self.recorded, true) {
            return;
        }
        let verdict = match how {
            Finished::Trailers(trailers) if self.grpc => {
                self.grpc_status = grpc_status(trailers).or(self.grpc_status);
                Some(self.verdict())
            }
            Finished::Trailers(_) | Finished::End => Some(self.verdict()),
            Finished::Cut => {
                self.flag = if self.flag == "-" { "UC" } else { self.flag };
                self.grpc_status = self.grpc_status.or(Some(14));
                // Before a response the attempt was judged already.
                (self.status != 0).then_some(Verdict::LocalOrigin)
            }
            Finished::TimedOut => {
                self.flag = "UT";
                self.grpc_status = Some(4);
                Some(Verdict::LocalOrigin)
            }
        };
        if let (Some(mut in_flight), Some(verdict)) = (self.in_flight.take(), verdict) {
            in_flight.record(verdict);
        }
        self.permit = None;
        self.record();
    }

    /// What a response that came whole says of its endpoint.
    fn verdict(&self) -> Verdict {
        match (self.grpc, self.grpc_status) {
            (true, Some(code)) => Verdict::of_grpc(tonic::Code::from_i32(i32::from(code))),
            _ => Verdict::of_http(StatusCode::from_u16(self.status).unwrap_or(StatusCode::OK)),
        }
    }

    fn record(&self) {
        let outcome = metrics::Outcome {
            status: self.status,
            grpc: if self.grpc { Some(self.grpc_status.unwrap_or(2)) } else { None },
            flag: self.flag,
        };
        self.upstream.metrics.record(outcome, self.started.elapsed());
    }

    /// The call's deadline passed.
    pub(crate) fn timed_out(&self, deadline: &Deadline, when: &str) -> Error {
        let message = format!("deadline of {:?} exceeded {when} ({})", deadline.limit, deadline.source);
        self.error(Kind::Timeout, message, None)
    }

    /// An error that says where the call was.
    pub(crate) fn error(&self, kind: Kind, message: String, source: Option<BoxError>) -> Error {
        let snapshot = &self.routing.snapshot;
        let route = snapshot
            .virtual_host
            .and_then(|v| snapshot.routes.virtual_hosts.get(v))
            .and_then(|v| v.routes.get(self.route))
            .map(|r| r.name.clone());
        let place = Place {
            target: Some(self.core.label.clone()),
            route,
            cluster: Some(self.upstream.name.clone()),
            endpoint: self.endpoint,
            attempt: self.attempts.number(),
            version: Some(snapshot.version.clone()),
        };
        Error::new(kind, message, place, source)
    }
}

impl Drop for Call {
    /// The caller gave up: counted as a downstream disconnect; outlier detection is told nothing.
    fn drop(&mut self) {
        if !self.recorded {
            self.flag = "DC";
            self.grpc_status = Some(1);
            self.record();
        }
    }
}

pub(super) fn grpc_status(headers: &HeaderMap) -> Option<u8> {
    let value = headers.get(GRPC_STATUS)?;
    Some(value.to_str().ok().and_then(|v| v.parse().ok()).unwrap_or(2))
}
