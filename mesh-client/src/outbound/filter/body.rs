//! The body of a response that filters watch.

use super::{Watching, hook::Ended};
use crate::{Error, body::MeshBody};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::time::{Instant, Sleep};

/// A body that filters watch, and may slow down.
pub(crate) struct Filtered {
    body: MeshBody,
    watching: Watching,
    /// Data that was read, and may not all go on yet.
    waiting: Bytes,
    /// When more of it may.
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Filtered {
    /// Watches `body`; a body without frames ends here.
    pub(crate) fn new(body: MeshBody, mut watching: Watching) -> Self {
        if body.is_end_stream() {
            watching.ended(Ended::Complete);
        }
        Self { body, watching, waiting: Bytes::new(), sleep: None }
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        loop {
            if !self.waiting.is_empty() {
                return Poll::Ready(Some(ready!(self.poll_waiting(cx)).map(Frame::data)));
            }
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) => return Poll::Ready(Some(Err(self.failed(error)))),
                None => {
                    self.watching.ended(Ended::Complete);
                    return Poll::Ready(None);
                }
            };
            match frame.into_data() {
                Ok(data) if !data.is_empty() => self.waiting = data,
                Ok(_) => {}
                Err(frame) => {
                    let frame = frame.into_trailers().map_or_else(
                        |frame| frame,
                        |mut trailers| {
                            self.watching.trailers(&mut trailers);
                            self.watching.ended(Ended::Complete);
                            Frame::trailers(trailers)
                        },
                    );
                    return Poll::Ready(Some(Ok(frame)));
                }
            }
        }
    }

    /// Data, as much as may go on.
    fn poll_waiting(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Error>> {
        loop {
            if let Some(sleep) = &mut self.sleep {
                ready!(sleep.as_mut().poll(cx));
                self.sleep = None;
            }
            if let Some(error) = self.body.expired() {
                return Poll::Ready(Err(self.failed(error)));
            }
            match self.watching.throttle(self.waiting.len(), Instant::now()) {
                Ok(length) => {
                    let data = self.waiting.split_to(length.clamp(1, self.waiting.len()));
                    if self.waiting.is_empty() && self.body.is_end_stream() {
                        self.watching.ended(Ended::Complete);
                    }
                    return Poll::Ready(Ok(data));
                }
                Err(at) => {
                    let at = self.body.deadline().map_or(at, |deadline| deadline.min(at));
                    self.sleep = Some(Box::pin(tokio::time::sleep_until(at)));
                }
            }
        }
    }

    fn failed(&mut self, error: Error) -> Error {
        self.waiting.clear();
        self.watching.ended(if error.is_timeout() { Ended::TimedOut } else { Ended::Failed });
        error
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
