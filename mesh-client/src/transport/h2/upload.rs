//! The request body on its way into an HTTP/2 stream, under the peer's flow control.

use crate::transport::BoxError;
use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;
use http_body::Body;
use std::{
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::oneshot;

/// Bytes of a body that are queued without waiting for the peer's window.
const HEAD_START: usize = 64 << 10;

/// A request body. Never more than two of its chunks, or [`HEAD_START`], are held.
pub(in crate::transport) struct Upload<B> {
    body: B,
    /// `None` until the stream is open.
    stream: Option<SendStream<Bytes>>,
    /// The chunk to send next. It waits for what follows it, to carry END_STREAM if it is the last.
    chunk: Option<Bytes>,
    after: Option<After>,
    /// The first chunk is queued whatever its size: the caller holds it in memory anyway.
    begun: bool,
    head_start: usize,
    /// Capacity was asked for and is waited for.
    reserved: bool,
}

/// What follows the chunk in hand.
enum After {
    End,
    Data(Bytes),
    /// Boxed: rare, and every call holds room for one.
    Trailers(Box<HeaderMap>),
    Failed(BoxError),
}

impl<B> Upload<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    pub(super) fn new(body: B) -> Self {
        Self { body, stream: None, chunk: None, after: None, begun: false, head_start: HEAD_START, reserved: false }
    }

    /// Takes what the body has ready, before the stream is open. False: the request has no body.
    pub(super) fn prime(&mut self, cx: &mut Context<'_>) -> Result<bool, BoxError> {
        if self.body.is_end_stream() {
            return Ok(false);
        }
        self.look_ahead(cx);
        match self.after.take() {
            Some(After::End) if self.chunk.is_none() => Ok(false),
            Some(After::Failed(error)) if self.chunk.is_none() => Err(error),
            after => {
                self.after = after;
                Ok(true)
            }
        }
    }

    /// The length of the body, if that is known.
    pub(super) fn length(&self) -> Option<u64> {
        self.body.size_hint().exact()
    }

    pub(super) fn start(&mut self, stream: SendStream<Bytes>) {
        self.stream = Some(stream);
    }

    /// Ready when all is queued, or the peer wants no more of it (what that means, the response says).
    ///
    /// # Errors
    ///
    /// The body's own; the stream is then reset.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        loop {
            self.look_ahead(cx);
            let Some(stream) = &mut self.stream else { return Poll::Ready(Ok(())) };
            if let Some(chunk) = &self.chunk {
                if !self.begun || chunk.len() <= self.head_start {
                    self.begun = true;
                    self.head_start = self.head_start.saturating_sub(chunk.len());
                } else {
                    if !std::mem::replace(&mut self.reserved, true) {
                        stream.reserve_capacity(1);
                    }
                    while stream.capacity() == 0 {
                        match stream.poll_capacity(cx) {
                            Poll::Ready(Some(Ok(_))) => {}
                            Poll::Ready(_) => return Poll::Ready(Ok(())),
                            Poll::Pending => return Poll::Pending,
                        }
                    }
                    self.reserved = false;
                }
                let chunk = self.chunk.take().unwrap_or_default();
                let end = matches!(self.after, Some(After::End));
                if stream.send_data(chunk, end).is_err() || end {
                    return Poll::Ready(Ok(()));
                }
            }
            match self.after.take() {
                None => return Poll::Pending,
                Some(After::Data(data)) => self.chunk = Some(data),
                Some(After::End) => {
                    // An error means that the stream is closed already.
                    let _ = stream.send_data(Bytes::new(), true);
                    return Poll::Ready(Ok(()));
                }
                Some(After::Trailers(trailers)) => {
                    let _ = stream.send_trailers(*trailers);
                    return Poll::Ready(Ok(()));
                }
                Some(After::Failed(error)) => {
                    stream.send_reset(Reason::CANCEL);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Polls the body until it is known what follows the chunk in hand, or it has nothing ready.
    fn look_ahead(&mut self, cx: &mut Context<'_>) {
        while self.after.is_none() {
            if self.chunk.is_some() && self.body.is_end_stream() {
                self.after = Some(After::End);
                return;
            }
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return,
                Poll::Ready(None) => {
                    self.after = Some(After::End);
                    return;
                }
                Poll::Ready(Some(Err(error))) => {
                    self.after = Some(After::Failed(error.into()));
                    return;
                }
                Poll::Ready(Some(Ok(frame))) => frame,
            };
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) if self.chunk.is_none() => self.chunk = Some(data),
                Ok(data) => self.after = Some(After::Data(data)),
                Err(frame) => {
                    self.after = frame.into_trailers().ok().map(|trailers| After::Trailers(Box::new(trailers)))
                }
            }
        }
    }

    /// Ends the upload of a stream whose response is complete. RFC 9113 section 8.1 lets the client stop then; NO_ERROR
    /// says that nothing failed.
    pub(in crate::transport) fn end(mut self) {
        if let Some(stream) = &mut self.stream {
            stream.send_reset(Reason::NO_ERROR);
        }
    }

    /// The rest of the upload as a task of its own: also ends when the peer resets the stream, and with its response.
    ///
    /// `response` is told when the response is complete, and closed when its body is dropped before.
    pub(in crate::transport) async fn finish(mut self, mut response: oneshot::Receiver<()>) {
        let complete = std::future::poll_fn(|cx| {
            if let Poll::Ready(told) = Pin::new(&mut response).poll(cx) {
                return Poll::Ready(told.is_ok());
            }
            if let Poll::Ready(result) = self.poll(cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "request body failed after the response headers");
                }
                return Poll::Ready(false);
            }
            // Only a wake-up: the response body reports the reset.
            match self.stream.as_mut().map(|stream| stream.poll_reset(cx)) {
                None | Some(Poll::Ready(_)) => Poll::Ready(false),
                Some(Poll::Pending) => Poll::Pending,
            }
        })
        .await;
        if complete {
            self.end();
        }
    }
}
