//! The response body of a mesh call: carries everything that counts the call, and gives it back at its end.

use crate::{
    Error,
    error::{BoxError, Kind},
    outbound::{
        call::{Finished, Held, Received},
        filter::{Filtered, Watching},
        timeout::{Idle, IdleTimer},
    },
    telemetry::watch::Watch as CallWatch,
    transport::{RecvBody, TransportError},
};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::{
    fmt,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::time::{Instant, Sleep};

/// The body of a response that came through the mesh.
///
/// The call counts (circuit breakers, load, outlier detection, metrics) until this body ends, fails or is dropped. The call's
/// deadline holds for the body too. Frames are handed on as they arrive; what is not read is held back by flow control.
pub struct MeshBody(State);

#[allow(clippy::large_enum_variant, reason = "boxing it would cost an allocation per call")]
enum State {
    Live(Live),
    /// An answer made here, by a route or a filter.
    Local(Bytes),
    /// Filters watch it.
    Filtered(Box<Filtered<MeshBody>>),
    /// The mesh has somebody who watches calls.
    Observed(Box<Received>),
    Done,
}

struct Live {
    body: RecvBody,
    /// What began as the future of the call.
    held: Box<dyn Held>,
    /// Made when the body first has to wait: a unary answer is there at once as a rule.
    timer: Option<Pin<Box<Sleep>>>,
    /// A data frame was read.
    read: bool,
    /// Ends a body on which nothing moves; only where there is a limit.
    watch: Option<Box<Watch>>,
}

struct Watch {
    idle: Arc<Idle>,
    timer: IdleTimer,
}

impl MeshBody {
    pub(crate) fn live(body: RecvBody, held: Box<dyn Held>) -> Self {
        Self(State::Live(Live { body, held, timer: None, read: false, watch: None }))
    }

    /// The same, ended when nothing moves for too long.
    pub(crate) fn ending_idle(mut self, idle: Arc<Idle>) -> Self {
        idle.moved(Instant::now());
        if let (State::Live(live), Some(timer)) = (&mut self.0, idle.of_body()) {
            live.watch = Some(Box::new(Watch { idle, timer }));
        }
        self
    }

    pub(crate) fn local(body: Bytes) -> Self {
        Self(State::Local(body))
    }

    /// The same, watched by filters.
    pub(crate) fn watched(self, watching: Watching) -> Self {
        let deadline = self.deadline();
        Self(State::Filtered(Box::new(Filtered::new(self, watching, deadline, |body| body.get_mut().expired()))))
    }

    /// The same, watched to its end.
    pub(crate) fn observed(self, watch: Arc<CallWatch>) -> Self {
        Self(State::Observed(Box::new(Received::new(self, watch))))
    }

    /// Gives back everything it holds.
    pub(crate) fn let_go(&mut self) {
        self.0 = State::Done;
    }

    /// The endpoint that answers.
    pub(crate) fn endpoint(&self) -> Option<SocketAddr> {
        match &self.0 {
            State::Live(live) => live.held.call().endpoint(),
            _ => None,
        }
    }

    /// When the call ends at the latest.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.0 {
            State::Live(live) => live.held.call().deadline().map(|deadline| deadline.at),
            _ => None,
        }
    }

    /// Ends the call if its deadline passed.
    pub(crate) fn expired(&mut self) -> Option<Error> {
        let State::Live(live) = &mut self.0 else { return None };
        let call = live.held.call();
        let deadline = call.deadline().filter(|deadline| deadline.at <= Instant::now())?;
        let error = call.timed_out(deadline);
        live.held.call_mut().finish(Finished::TimedOut);
        self.0 = State::Done;
        Some(error)
    }
}

impl Live {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            if let Some(watch) = &self.watch {
                watch.idle.moved(Instant::now());
            }
            // A body that always has data must end too: from the second data frame on the clock is looked at.
            let data = frame.as_ref().is_some_and(|f| f.as_ref().is_ok_and(Frame::is_data));
            if data
                && std::mem::replace(&mut self.read, true)
                && let Some(deadline) = self.held.call().deadline().filter(|d| d.at <= Instant::now())
            {
                return Poll::Ready(Some(Err(self.held.call().timed_out(deadline))));
            }
            return Poll::Ready(frame.map(|f| f.map_err(|e| self.failed(e))));
        }
        if let Some(Watch { idle, timer }) = self.watch.as_deref_mut()
            && let Poll::Ready(still) = timer.poll(idle, cx)
        {
            return Poll::Ready(Some(Err(self.held.call().stood_still(still))));
        }
        let Some(deadline) = self.held.call().deadline() else { return Poll::Pending };
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.at)));
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Some(Err(self.held.call().timed_out(deadline)))),
            Poll::Pending => Poll::Pending,
        }
    }

    fn failed(&mut self, error: TransportError) -> Error {
        self.held.call_mut().broke(&error);
        self.held.call().error(Kind::Transport, "the response was cut off".into(), Some(Box::new(error) as BoxError))
    }
}

impl Body for MeshBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let live = match &mut self.0 {
            State::Live(live) => live,
            State::Local(bytes) => {
                let bytes = std::mem::take(bytes);
                self.0 = State::Done;
                return Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))));
            }
            State::Filtered(filtered) => return Pin::new(&mut **filtered).poll_frame(cx),
            State::Observed(observed) => return Pin::new(&mut **observed).poll_frame(cx),
            State::Done => return Poll::Ready(None),
        };
        let Poll::Ready(frame) = live.poll_frame(cx) else { return Poll::Pending };
        let finished = match &frame {
            Some(Ok(frame)) => match frame.trailers_ref() {
                Some(trailers) => Some(Finished::Trailers(trailers)),
                // gRPC ends in trailers: a look at the connection tells nothing.
                None if !live.held.call().is_grpc() && live.body.is_end_stream() => Some(Finished::End),
                None => None,
            },
            Some(Err(error)) => Some(Finished::by(error)),
            None => Some(Finished::End),
        };
        if let Some(finished) = finished {
            live.held.call_mut().finish(finished);
            self.0 = State::Done;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            State::Live(live) => live.body.is_end_stream(),
            State::Local(bytes) => bytes.is_empty(),
            State::Filtered(filtered) => filtered.is_end_stream(),
            State::Observed(observed) => observed.is_end_stream(),
            State::Done => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            State::Live(live) => live.body.size_hint(),
            State::Local(bytes) => SizeHint::with_exact(bytes.len() as u64),
            State::Filtered(filtered) => filtered.size_hint(),
            State::Observed(observed) => observed.size_hint(),
            State::Done => SizeHint::with_exact(0),
        }
    }
}

impl fmt::Debug for MeshBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Live(_) => "MeshBody(live)",
            State::Local(_) => "MeshBody(local)",
            State::Filtered(_) => "MeshBody(filtered)",
            State::Observed(_) => "MeshBody(observed)",
            State::Done => "MeshBody(done)",
        })
    }
}
