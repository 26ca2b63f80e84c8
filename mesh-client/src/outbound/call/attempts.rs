//! The attempts of a call: pick an endpoint, get a stream on a connection to it, send, judge, and again.

use super::{Call, SENT, finish::grpc_status, head::SavedHead};
use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        cluster::{Endpoint, InFlight, Outcome as Verdict, Permit, Pick, Resource, Unavailable},
        connect::Subchannel,
        narrate,
        resolve::UpstreamRef,
        retry::{Decision, Failure, Kept, Outcome, Policy, Situation},
        route::Forward,
        timeout::{Deadline, write_grpc_timeout},
    },
    transport::{self, Lease, RecvBody, TransportError},
};
use bytes::Bytes;
use http::{Request, Response, StatusCode, request::Parts};
use http_body::Body;
use smallvec::SmallVec;
use std::{future::poll_fn, sync::Arc, task::Poll, time::Duration};
use tokio::time::Instant;

/// Connection attempts of one call that fail before anything is sent; each makes its endpoint unavailable, so this bounds only races.
const MAX_CONNECT_FAILURES: u32 = 32;

/// What an attempt ended in.
enum Attempt {
    Response(Response<RecvBody>),
    Failed(Failure, Error),
}

impl Call {
    /// Attempts until one is final.
    pub(super) async fn run<B>(
        &mut self,
        forward: &Forward<UpstreamRef>,
        request: &mut Option<(Parts, B)>,
        deadline: Option<&Deadline>,
    ) -> Result<Response<RecvBody>, Error>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let policy = forward.retry.as_deref();
        let per_try = policy.and_then(Policy::per_try_timeout);
        let avoid_tried = policy.is_none_or(Policy::avoid_previous_hosts);
        let cap = self.core.settings.max_replay_bytes;
        let begun = poll_fn(|cx| {
            let (head, body) = request.take().expect("polled once: it is ready at once");
            let (kept, body) = match Kept::new(body, cap, cx) {
                Ok(body) => body,
                Err(error) => return Poll::Ready(Err(error)),
            };
            Poll::Ready(Ok((SavedHead::of(&head), kept, Some(Request::from_parts(head, body)))))
        });
        let (saved, kept, mut next) = match begun.await {
            Ok(begun) => begun,
            Err(error) => {
                return Err(self.error(Kind::RequestBody, "the request was not sent whole".into(), Some(error)));
            }
        };
        let mut tried: SmallVec<[Arc<Endpoint<Subchannel>>; 2]> = SmallVec::new();
        let mut rng = |bound: u32| fastrand::u32(..bound.max(1));
        loop {
            let attempt = match self.lease(&tried).await {
                Err((failure, error)) => Attempt::Failed(failure, error),
                Ok(lease) => {
                    if let Some(explain) = &self.explain {
                        explain.add("peer", narrate::peer(lease.peer()));
                    }
                    let mut request = next.take().unwrap_or_else(|| saved.restore(kept.again()));
                    self.attempts.write_header(request.headers_mut(), self.core.profile);
                    if self.grpc && (deadline.is_some() || per_try.is_some()) {
                        write_grpc_timeout(request.headers_mut(), deadline, per_try, Instant::now());
                    }
                    self.stage = SENT;
                    let mut sending = lease.send(request);
                    match per_try {
                        None => self.sent((&mut sending).await),
                        Some(limit) => match tokio::time::timeout(limit, &mut sending).await {
                            Ok(sent) => self.sent(sent),
                            Err(_) => self.elapsed(limit),
                        },
                    }
                }
            };
            let outcome = match &attempt {
                Attempt::Response(r) => Outcome::of_response(r.status(), r.headers(), self.grpc),
                Attempt::Failed(failure, _) => Outcome::Failure(*failure),
            };
            self.judge(&attempt, &outcome);
            let attempt = match attempt {
                // The common end, without a look at the clock.
                Attempt::Response(response)
                    if self.explain.is_none() && policy.is_none_or(|policy| !policy.retries(&outcome)) =>
                {
                    return Ok(response);
                }
                other => other,
            };
            let situation =
                Situation { replayable: kept.is_replayable(), now: Instant::now(), deadline: deadline.map(|d| d.at) };
            let upstream = &self.upstream;
            let budget = || upstream.retry_permit(self.core.profile).map(Some);
            let number = self.attempts.number();
            let decision = self.attempts.next(policy, &outcome, situation, budget, &mut rng);
            if let Some(explain) = &self.explain {
                narrate::attempt(explain, number, self.endpoint, &attempt.ended(), decision);
            }
            let delay = match decision {
                Decision::Return(_) => {
                    return match attempt {
                        Attempt::Response(response) => Ok(response),
                        Attempt::Failed(_, error) => Err(error),
                    };
                }
                Decision::RetryNow => None,
                Decision::RetryAfter(delay) => Some(delay),
            };
            self.upstream.metrics.retries.increment(1);
            if let Some(in_flight) = self.in_flight.take().filter(|_| avoid_tried) {
                // One that was let go of (it is draining, or the stream never left) may be picked again.
                tried.push(in_flight.endpoint().clone());
            }
            drop(attempt);
            if let Some(delay) = delay {
                tokio::time::sleep(delay).await;
            }
        }
    }

    /// A stream on a connection to a picked endpoint. An endpoint that cannot be connected to is left for the next one: nothing was
    /// sent, so this is no retry.
    async fn lease(&mut self, tried: &[Arc<Endpoint<Subchannel>>]) -> Result<Lease, (Failure, Error)> {
        let mut random = fastrand::Rng::new();
        let mut failures = 0;
        let mut pending = None;
        // An error from here on must not name the endpoint of the attempt before.
        self.endpoint = None;
        loop {
            let endpoint = match self.upstream.live.pick(tried, &mut random) {
                Pick::Endpoint(endpoint) => endpoint,
                Pick::Fail(cause) => {
                    // An endpoint that refuses connections may take the next one: that is a failure to connect.
                    let (failure, flag) = match &*cause {
                        Unavailable::Unreachable { .. } => (Failure::Connect, "UF"),
                        _ => (Failure::NoEndpoint, "UH"),
                    };
                    self.flag = flag;
                    let message = "no endpoint can be used".into();
                    return Err((failure, self.error(Kind::NoEndpoint, message, Some(Box::new(cause)))));
                }
            };
            self.endpoint = Some(endpoint.address());
            let in_flight = self.in_flight.insert(InFlight::of(endpoint));
            if let Some(lease) = in_flight.endpoint().link().ready() {
                return Ok(lease);
            }
            let endpoint = in_flight.endpoint().clone();
            self.wait_in_line(&mut pending)?;
            self.stage = "while waiting for a connection";
            let cause = match endpoint.link().acquire().await {
                Ok(lease) => return Ok(lease),
                Err(cause) => cause,
            };
            if let Some(mut failed) = self.in_flight.take() {
                failed.record(Verdict::LocalOrigin);
            }
            if let Some(explain) = &self.explain {
                explain.add("connect", format!("{} failed: {}", endpoint.address(), narrate::chain(&cause)));
            }
            failures += 1;
            if failures >= MAX_CONNECT_FAILURES {
                self.flag = "UF";
                return Err((
                    Failure::Connect,
                    self.error(Kind::NoEndpoint, "no connection".into(), Some(Box::new(cause))),
                ));
            }
        }
    }

    /// Counts the call as waiting for a connection (Envoy's `max_pending_requests`), once.
    fn wait_in_line(&mut self, pending: &mut Option<Permit>) -> Result<(), (Failure, Error)> {
        if pending.is_none() {
            let permit = self.upstream.live.breaker().acquire(Resource::PendingRequests).map_err(|over| {
                self.flag = "UO";
                (
                    Failure::Overloaded,
                    self.error(Kind::Overloaded, "the circuit breaker is open".into(), Some(Box::new(over))),
                )
            })?;
            *pending = Some(permit);
        }
        Ok(())
    }

    /// What an attempt ended in, by what the transport says.
    fn sent(&mut self, sent: Result<Response<RecvBody>, TransportError>) -> Attempt {
        match sent {
            Ok(response) => Attempt::Response(response),
            Err(error) => {
                let failure = Failure::of_transport(&error);
                self.flag = "UC";
                let (kind, message) = match error.kind() {
                    transport::Kind::RequestBody => (Kind::RequestBody, "the request was not sent whole"),
                    transport::Kind::InvalidRequest => (Kind::InvalidRequest, "the request cannot be sent"),
                    _ => (Kind::Transport, "the request failed"),
                };
                Attempt::Failed(failure, self.error(kind, message.into(), Some(Box::new(error))))
            }
        }
    }

    /// An attempt took longer than its own limit.
    fn elapsed(&mut self, limit: Duration) -> Attempt {
        let message = format!("the attempt had no response within its limit of {limit:?} (per_try_timeout)");
        self.flag = "UT";
        Attempt::Failed(Failure::PerTryTimeout, self.error(Kind::Timeout, message, None))
    }

    /// Tells outlier detection how an attempt that has no more to come ended. A response that goes on is judged at its end; a failure
    /// that says nothing about the endpoint is not counted, and lets go of it.
    fn judge(&mut self, attempt: &Attempt, outcome: &Outcome) {
        let Some(in_flight) = &mut self.in_flight else { return };
        let verdict = match (attempt, outcome) {
            (Attempt::Response(_), Outcome::Response(r)) => match r.grpc {
                Some(code) => Verdict::of_grpc(tonic::Code::from_i32(i32::try_from(code).unwrap_or(2))),
                None if self.grpc => return,
                None => Verdict::of_http(StatusCode::from_u16(r.status).unwrap_or(StatusCode::OK)),
            },
            (Attempt::Failed(_, error), Outcome::Failure(failure)) => match failure {
                Failure::Connect | Failure::Reset(_) | Failure::PerTryTimeout | Failure::Deadline => {
                    Verdict::LocalOrigin
                }
                // A graceful GOAWAY says nothing against the endpoint, a refused stream does.
                Failure::Refused if is_refused(error) => Verdict::LocalOrigin,
                _ => {
                    self.in_flight = None;
                    return;
                }
            },
            _ => return,
        };
        in_flight.record(verdict);
    }
}

impl Attempt {
    /// In words.
    fn ended(&self) -> String {
        match self {
            Self::Response(response) => match grpc_status(response.headers()) {
                Some(code) => format!("HTTP {}, grpc-status {code}", response.status().as_u16()),
                None => format!("HTTP {}", response.status().as_u16()),
            },
            Self::Failed(_, error) => error.reason(),
        }
    }
}

fn is_refused(error: &Error) -> bool {
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(transport) = error.downcast_ref::<TransportError>() {
            return transport.kind() == transport::Kind::RefusedStream;
        }
        next = error.source();
    }
    false
}
