//! The request body on its way into an HTTP/2 stream, under the peer's flow control.

use super::{
    fault::Fault,
    outbox::{Link, Sent, Tail, poll_sent},
    stream::Stream,
};
use crate::transport::BoxError;
use bytes::Bytes;
use h2::Reason;
use http::HeaderMap;
use http_body::Body;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::sync::oneshot;

/// A request body. Never more than two of its chunks are held.
pub(in crate::transport) struct Upload<B> {
    body: B,
    progress: Progress,
}

/// How far a body is sent.
pub(super) struct Progress {
    /// `None` until the stream is open.
    stream: Option<Arc<Stream>>,
    /// The chunk to send next. It waits for what follows it, to carry END_STREAM if it is the last.
    chunk: Option<Bytes>,
    after: Option<After>,
    /// What the peer hears when the body fails.
    failure: Reason,
}

/// How an upload ended.
enum End {
    /// All is queued, or the peer wants no more of it.
    Sent,
    /// The response is complete without it.
    Answered,
    /// Nobody is there any more.
    Abandoned,
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
        let progress = Progress { stream: None, chunk: None, after: None, failure: Reason::CANCEL };
        Self { body, progress }
    }

    /// Takes what the body has ready, before the stream is open. False: the request has no body.
    pub(super) fn prime(&mut self, cx: &mut Context<'_>) -> Result<bool, BoxError> {
        if self.body.is_end_stream() {
            return Ok(false);
        }
        self.progress.look_ahead(&mut self.body, cx);
        match self.progress.after.take() {
            Some(After::End) if self.progress.chunk.is_none() => Ok(false),
            Some(After::Failed(error)) if self.progress.chunk.is_none() => Err(error),
            after => {
                self.progress.after = after;
                Ok(true)
            }
        }
    }

    /// The length of the body, if that is known.
    pub(super) fn length(&self) -> Option<u64> {
        self.body.size_hint().exact()
    }

    /// What can go with the head of the request, and whether nothing follows it.
    pub(super) fn first(&mut self) -> (Option<&mut Bytes>, bool) {
        (self.progress.chunk.as_mut(), matches!(self.progress.after, Some(After::End)))
    }

    /// The stream is open, and took what it could of [`first`](Self::first). True: that was all.
    pub(super) fn start(&mut self, stream: &Arc<Stream>) -> bool {
        let progress = &mut self.progress;
        progress.stream = Some(Arc::clone(stream));
        if progress.chunk.as_ref().is_some_and(Bytes::is_empty) {
            progress.chunk = None;
            return matches!(progress.after, Some(After::End));
        }
        false
    }

    /// Ready when all is queued, or the peer wants no more of it (what that means, the response says).
    ///
    /// # Errors
    ///
    /// The body's own; the stream is then reset.
    pub(super) fn poll(&mut self, link: &Link, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.progress.poll(&mut self.body, link, cx)
    }

    /// Ends the upload of a stream whose response is complete. RFC 9113 section 8.1 lets the client stop then; NO_ERROR
    /// says that nothing failed.
    pub(in crate::transport) fn end(&self, link: &Link) {
        if let Some(stream) = &self.progress.stream {
            link.reset(stream, Reason::NO_ERROR, Fault::Cancelled);
        }
    }

    /// The rest of the upload as a task of its own: also ends when the peer resets the stream, and with its response.
    ///
    /// `response` is told when the response is complete, and closed when its body is dropped before.
    pub(in crate::transport) async fn finish(mut self, link: &Link, mut response: oneshot::Receiver<()>) {
        let end = std::future::poll_fn(|cx| {
            if let Poll::Ready(told) = Pin::new(&mut response).poll(cx) {
                return Poll::Ready(if told.is_ok() { End::Answered } else { End::Abandoned });
            }
            if let Poll::Ready(result) = self.poll(link, cx) {
                if let Err(error) = result {
                    tracing::debug!(%error, "request body failed after the response headers");
                }
                return Poll::Ready(End::Sent);
            }
            // Only a wake-up: the response body reports the reset.
            self.progress.stream.as_ref().map_or(Poll::Ready(()), |stream| poll_sent(stream, cx)).map(|()| End::Sent)
        })
        .await;
        match (end, &self.progress.stream) {
            (End::Answered, _) => self.end(link),
            (End::Abandoned, Some(stream)) => link.reset(stream, Reason::CANCEL, Fault::Cancelled),
            _ => {}
        }
    }
}

impl Progress {
    /// Of the answer on a stream.
    pub(super) fn of(stream: Arc<Stream>) -> Self {
        Self { stream: Some(stream), chunk: None, after: None, failure: Reason::INTERNAL_ERROR }
    }

    /// What can go with the head of an answer.
    pub(super) fn parts(&mut self) -> (Option<&mut Bytes>, Tail<'_>) {
        let tail = match &self.after {
            Some(After::End) => Tail::End,
            Some(After::Trailers(trailers)) => Tail::Trailers(trailers),
            Some(After::Data(_) | After::Failed(_)) | None => Tail::More,
        };
        (self.chunk.as_mut(), tail)
    }

    /// The head is sent, with what it could take of the chunk.
    pub(super) fn begun(&mut self) {
        if self.chunk.as_ref().is_some_and(Bytes::is_empty) {
            self.chunk = None;
        }
    }

    /// Ready when all is queued, or the peer wants no more of it.
    ///
    /// # Errors
    ///
    /// The body's own; the stream is then reset.
    pub(super) fn poll<B>(&mut self, body: &mut B, link: &Link, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        loop {
            self.look_ahead(body, cx);
            let Some(stream) = &self.stream else { return Poll::Ready(Ok(())) };
            if matches!(self.after, Some(After::Failed(_))) {
                // Also while what came before it waits for room.
                self.chunk = None;
            }
            if let Some(chunk) = &mut self.chunk {
                let last = matches!(self.after, Some(After::End));
                match link.send(stream, chunk, last, cx) {
                    Sent::Blocked => return Poll::Pending,
                    Sent::All if !last => self.chunk = None,
                    Sent::All | Sent::Closed => return Poll::Ready(Ok(())),
                }
            }
            match self.after.take() {
                None => return Poll::Pending,
                Some(After::Data(data)) => self.chunk = Some(data),
                Some(After::End) => {
                    link.finish(stream, None);
                    return Poll::Ready(Ok(()));
                }
                Some(After::Trailers(trailers)) => {
                    link.finish(stream, Some(&trailers));
                    return Poll::Ready(Ok(()));
                }
                Some(After::Failed(error)) => {
                    link.reset(stream, self.failure, Fault::Cancelled);
                    return Poll::Ready(Err(error));
                }
            }
        }
    }

    /// Polls the body until it is known what follows the chunk in hand, or it has nothing ready.
    pub(super) fn look_ahead<B>(&mut self, body: &mut B, cx: &mut Context<'_>)
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        while self.after.is_none() {
            if self.chunk.is_some() && body.is_end_stream() {
                self.after = Some(After::End);
                return;
            }
            let frame = match Pin::new(&mut *body).poll_frame(cx) {
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
}
