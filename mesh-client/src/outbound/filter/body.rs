//! The body of a response that filters watch.

use super::{Watching, hook::Ended};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep};

/// A body that filters watch, and may slow down.
#[pin_project]
pub(crate) struct Filtered<B: Body> {
    #[pin]
    body: B,
    watching: Watching,
    /// Data that was read, and may not all go on yet.
    waiting: Bytes,
    /// When more of it may.
    sleep: Option<Pin<Box<Sleep>>>,
    deadline: Option<Instant>,
    /// Ends the body when its deadline passed.
    expire: fn(Pin<&mut B>) -> Option<B::Error>,
}

impl<B: Body<Data = Bytes>> Filtered<B> {
    /// Watches `body`; a body without frames ends here. `expire` is asked at the deadline, while data waits.
    pub(crate) fn new(
        body: B,
        mut watching: Watching,
        deadline: Option<Instant>,
        expire: fn(Pin<&mut B>) -> Option<B::Error>,
    ) -> Self {
        if body.is_end_stream() {
            watching.ended(Ended::Complete);
        }
        Self { body, watching, waiting: Bytes::new(), sleep: None, deadline, expire }
    }

    pub(crate) fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        loop {
            if !self.waiting.is_empty() {
                return Poll::Ready(Some(ready!(self.as_mut().poll_waiting(cx)).map(Frame::data)));
            }
            let this = self.as_mut().project();
            let frame = match ready!(this.body.poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    let expired = this.deadline.is_some_and(|deadline| deadline <= Instant::now());
                    this.watching.ended(if expired { Ended::TimedOut } else { Ended::Failed });
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    this.watching.ended(Ended::Complete);
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(data) if !data.is_empty() => *this.waiting = data,
                Ok(_) => {}
                Err(frame) => {
                    let trailers = match frame.into_trailers() {
                        Ok(mut trailers) => {
                            this.watching.trailers(&mut trailers);
                            Frame::trailers(trailers)
                        }
                        Err(frame) => frame,
                    };
                    this.watching.ended(Ended::Complete);
                    return Poll::Ready(Some(Ok(trailers)));
                }
            }
        }
    }

    /// Data, as much as may go on.
    fn poll_waiting(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<Bytes, B::Error>> {
        let mut this = self.project();
        loop {
            if let Some(sleep) = this.sleep {
                ready!(sleep.as_mut().poll(cx));
                *this.sleep = None;
            }
            let now = Instant::now();
            if this.deadline.is_some_and(|deadline| deadline <= now)
                && let Some(error) = (this.expire)(this.body.as_mut())
            {
                this.waiting.clear();
                this.watching.ended(Ended::TimedOut);
                return Poll::Ready(Err(error));
            }
            match this.watching.throttle(this.waiting.len(), now) {
                Ok(length) => {
                    let data = this.waiting.split_to(length.clamp(1, this.waiting.len()));
                    if this.waiting.is_empty() && this.body.is_end_stream() {
                        this.watching.ended(Ended::Complete);
                    }
                    return Poll::Ready(Ok(data));
                }
                Err(at) => {
                    let at = this.deadline.filter(|deadline| *deadline > now).map_or(at, |deadline| deadline.min(at));
                    *this.sleep = Some(Box::pin(tokio::time::sleep_until(at)));
                }
            }
        }
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.waiting.is_empty() && self.body.is_end_stream()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        let (waiting, rest) = (self.waiting.len() as u64, self.body.size_hint());
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(waiting));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(waiting));
        }
        hint
    }
}
