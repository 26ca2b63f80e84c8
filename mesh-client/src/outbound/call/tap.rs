//! The request body of a call that somebody else watches: who sends copies, who waits for it to stand still.

use super::mirror::Copies;
use crate::{error::BoxError, outbound::timeout::Idle};
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, combinators::UnsyncBoxBody};
use smallvec::SmallVec;
use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::time::Instant;

/// A body whose frames are seen on their way.
pub(super) struct Tapped {
    inner: UnsyncBoxBody<Bytes, BoxError>,
    idle: Option<Arc<Idle>>,
    copies: Option<Box<Copies>>,
}

/// Pieces of one body, at most.
const MAX_FRAMES: usize = 1024;

/// Pieces of a body, shared with whoever else sends them.
#[derive(Clone, Default)]
pub(super) struct Frames {
    frames: SmallVec<[Bytes; 2]>,
    length: usize,
}

/// The body of a copy.
pub(super) struct Copied {
    frames: smallvec::IntoIter<[Bytes; 2]>,
    left: usize,
    trailers: Option<HeaderMap>,
}

impl Tapped {
    pub(super) fn new<B>(body: B, idle: Option<Arc<Idle>>, copies: Option<Copies>) -> Self
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let inner = body.map_err(Into::into).boxed_unsync();
        let mut tapped = Self { inner, idle, copies: copies.map(Box::new) };
        if tapped.inner.is_end_stream() {
            tapped.complete(None);
        }
        tapped
    }

    fn complete(&mut self, trailers: Option<HeaderMap>) {
        if let Some(copies) = self.copies.take() {
            copies.send(trailers);
        }
    }
}

impl Body for Tapped {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let frame = ready!(Pin::new(&mut this.inner).poll_frame(cx));
        if let Some(idle) = &this.idle {
            idle.moved(Instant::now());
        }
        match &frame {
            Some(Ok(frame)) => {
                if let (Some(data), Some(copies)) = (frame.data_ref(), &mut this.copies)
                    && !copies.data(data)
                {
                    this.copies = None;
                }
                if frame.is_trailers() || this.inner.is_end_stream() {
                    this.complete(frame.trailers_ref().cloned());
                }
            }
            Some(Err(_)) => this.copies = None,
            None => this.complete(None),
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

impl Frames {
    /// In bytes.
    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// No more pieces are kept, however small.
    pub(super) fn is_full(&self) -> bool {
        self.frames.len() >= MAX_FRAMES
    }

    pub(super) fn push(&mut self, data: Bytes) {
        self.length += data.len();
        self.frames.push(data);
    }
}

impl Copied {
    pub(super) fn new(Frames { frames, length }: Frames, trailers: Option<HeaderMap>) -> Self {
        Self { frames: frames.into_iter(), left: length, trailers }
    }
}

impl Body for Copied {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if let Some(data) = self.frames.next() {
            self.left -= data.len();
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        Poll::Ready(self.trailers.take().map(|trailers| Ok(Frame::trailers(trailers))))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.len() == 0 && self.trailers.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}
