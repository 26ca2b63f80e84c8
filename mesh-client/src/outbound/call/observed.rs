//! A call that somebody watches: the same road, with an eye on what goes in and what comes out.

use super::{Call, Road, attempts::Attempt, begin};
use crate::{
    Error,
    body::MeshBody,
    channel::Core,
    error::BoxError,
    outbound::{
        narrate,
        retry::{Outcome as Judgement, grpc_from_http},
        timeout::is_grpc,
    },
    telemetry::{
        messages::Messages,
        metrics::Outcome,
        spans::CallSpan,
        watch::{Begun, Judged, Observers, Watch},
    },
    transport::Lease,
};
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::Instant;
use tracing::Span;

/// A call, and who watches it.
pub(crate) struct Observed {
    road: Road,
    watch: Arc<Watch>,
    /// What is logged meanwhile is in it.
    span: Option<Span>,
    /// It came to a response, whose body goes on watching, or to an error.
    answered: bool,
}

/// The body of a request that is watched. Not generic, so that the road is compiled once for all of them.
struct Sent {
    inner: UnsyncBoxBody<Bytes, BoxError>,
    messages: Option<Messages>,
    watch: Arc<Watch>,
}

/// The body of a response that is watched.
pub(crate) struct Received {
    inner: MeshBody,
    messages: Option<Messages>,
    watch: Arc<Watch>,
}

/// Begins a call that is watched.
pub(super) fn start<B>(core: &Arc<Core>, observers: &Arc<Observers>, request: Request<B>, started: Instant) -> Road
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let (mut head, body) = request.into_parts();
    let grpc = is_grpc(&head.headers);
    let start = |headers: &HeaderMap| {
        let routing = core.routing();
        let tracing = routing.as_ref().and_then(|routing| routing.snapshot.listener.http.tracing.as_ref());
        core.facts.settings.propagation.begin(headers, tracing)
    };
    let call = observers.spans.then(|| CallSpan::begin(&mut head, &core.facts.label, grpc, start)).flatten();
    let span = call.as_ref().map(|call| call.span().clone());
    let watch = Watch::new(observers.clone(), core.facts.clone(), &head, grpc, started, call);
    let messages = grpc.then(Messages::default);
    let body = Sent { inner: body.map_err(Into::into).boxed_unsync(), messages, watch: watch.clone() };
    let road = begin(core, Request::from_parts(head, body), started, Some(watch.clone()));
    Road::Observed(Box::new(Observed { road, watch, span, answered: false }))
}

impl Observed {
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Response<MeshBody>, Error>> {
        let polled = match &self.span {
            Some(span) => span.in_scope(|| self.road.poll(cx)),
            None => self.road.poll(cx),
        };
        let result = ready!(polled);
        self.span = None;
        self.answered = true;
        Poll::Ready(match result {
            Ok(response) => {
                self.watch.answered(&response);
                Ok(response.map(|body| body.observed(self.watch.clone())))
            }
            Err(error) => {
                self.watch.failed(&error);
                self.watch.end(true);
                Err(error)
            }
        })
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        if !self.answered {
            // What it held is judged first.
            self.road = Road::Refused(None);
            self.watch.end(false);
        }
    }
}

impl Received {
    /// Watches `inner`; a body without frames ends here.
    pub(crate) fn new(inner: MeshBody, watch: Arc<Watch>) -> Self {
        let messages = watch.is_grpc().then(Messages::default);
        if inner.is_end_stream() {
            watch.end(true);
        }
        Self { inner, messages, watch }
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    this.watch.received(data, this.messages.as_mut());
                } else if let Some(trailers) = frame.trailers_ref() {
                    this.watch.trailers(trailers);
                    this.watch.end(true);
                }
                // gRPC ends in trailers.
                if this.messages.is_none() && this.inner.is_end_stream() {
                    this.watch.end(true);
                }
            }
            Some(Err(error)) => {
                this.watch.failed(error);
                this.watch.end(true);
            }
            None => this.watch.end(true),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        // What it held is judged first. A body that came whole was reported already.
        self.inner.let_go();
        self.watch.end(false);
    }
}

impl Body for Sent {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
        {
            this.watch.sent(data, this.messages.as_mut());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl Call {
    /// Its end was judged.
    #[cold]
    pub(super) fn tell(&self, outcome: Outcome, took: Duration) {
        let Some(watch) = &self.chosen.watch else { return };
        let upstream = self.upstream();
        match watch.workload() {
            Some(workload) => upstream.metrics.record_workload(outcome, workload, took),
            None => upstream.metrics.record(outcome, took),
        }
        let (retries, transparent) = self.attempts.counts();
        watch.judged(&Judged {
            outcome,
            cluster: Some(&upstream.name),
            upstream: Some(upstream),
            endpoint: self.endpoint,
            attempts: self.attempts.number(),
            retries,
            transparent,
        });
    }

    /// Which endpoint was picked, and who it is.
    #[inline]
    pub(super) fn say_picked(&self, lease: &Lease) {
        if let (Some(explain), Some(in_flight)) = (&self.chosen.explain, &self.in_flight) {
            explain.add("pick", narrate::pick(in_flight.endpoint()));
            explain.add("peer", narrate::peer(lease.peer()));
            explain.sent_to(lease.peer());
        }
    }

    /// An attempt is about to be sent.
    #[inline]
    pub(super) fn tell_attempt(&self, lease: &Lease, headers: &mut HeaderMap) {
        if let Some(watch) = &self.chosen.watch {
            let placement = self.in_flight.as_ref().map(|in_flight| in_flight.endpoint().placement());
            let begun = Begun {
                number: self.attempts.number(),
                transparent: self.attempts.counts().1,
                endpoint: self.endpoint,
                placement: placement.as_deref(),
                cluster: &self.leaf().name,
                peer: lease.peer(),
            };
            watch.attempt(&begun, headers);
        }
    }

    /// An attempt ended, and others follow or are in flight.
    pub(super) fn tell_ended(&self, number: u32, attempt: &Attempt, outcome: &Judgement) {
        let Some(watch) = &self.chosen.watch else { return };
        match (attempt, outcome) {
            (Attempt::Failed(_, error), _) => {
                watch.attempt_ended(number, 0, i32::from(error.code()).unsigned_abs(), Some(&error.reason()));
            }
            (_, Judgement::Response(response)) => {
                let code = response.grpc.unwrap_or_else(|| grpc_from_http(response.status));
                watch.attempt_ended(number, response.status, code, None);
            }
            (_, Judgement::Failure(_)) => watch.attempt_ended(number, 0, 2, None),
        }
    }

    /// Of several attempts in flight this one is the caller's.
    pub(super) fn tell_winner(&self, number: u32) {
        if let Some(watch) = &self.chosen.watch {
            watch.won(number);
        }
    }
}
