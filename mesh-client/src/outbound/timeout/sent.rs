//! When a request was sent in full, and how long its response may keep one waiting from then on.

use futures::task::AtomicWaker;
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::time::Sleep;

/// Whether the body of one attempt was read to its end by the transport, whichever task did it.
#[derive(Debug, Default)]
struct Sent {
    whole: AtomicBool,
    waker: AtomicWaker,
}

/// A request body that tells when it was read to its end.
#[pin_project]
#[derive(Debug)]
pub struct RequestBody<B> {
    #[pin]
    inner: B,
    sent: Arc<Sent>,
}

/// Waits for the response head, from when the request was sent.
#[derive(Debug)]
pub(crate) struct HeadTimer {
    limit: Duration,
    sent: Arc<Sent>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Sent {
    fn tell(&self) {
        self.whole.store(true, Ordering::Release);
        self.waker.wake();
    }

    fn poll(&self, cx: &Context<'_>) -> Poll<()> {
        if !self.whole.load(Ordering::Acquire) {
            self.waker.register(cx.waker());
            if !self.whole.load(Ordering::Acquire) {
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }
}

impl<B: Body> RequestBody<B> {
    /// With the timer for the response. A body that is empty is sent already.
    pub(crate) fn new(inner: B, limit: Duration) -> (Self, HeadTimer) {
        let sent = Arc::new(Sent { whole: AtomicBool::new(inner.is_end_stream()), waker: AtomicWaker::new() });
        (Self { inner, sent: sent.clone() }, HeadTimer { limit, sent, sleep: None })
    }
}

impl HeadTimer {
    /// Ready with the limit when it has passed since the request was sent in full.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Duration> {
        if self.sleep.is_none() {
            std::task::ready!(self.sent.poll(cx));
        }
        let limit = self.limit;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep(limit)));
        sleep.as_mut().poll(cx).map(|()| limit)
    }
}

impl<B: Body> Body for RequestBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let mut this = self.project();
        let frame = std::task::ready!(this.inner.as_mut().poll_frame(cx));
        let whole = match &frame {
            None => true,
            Some(Ok(frame)) => frame.is_trailers() || this.inner.is_end_stream(),
            Some(Err(_)) => false,
        };
        if whole {
            this.sent.tell();
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

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt, Empty, Full};
    use std::future::poll_fn;
    use tokio::time::Instant;

    #[tokio::test(start_paused = true)]
    async fn the_time_counts_from_the_end_of_the_body() {
        let limit = Duration::from_secs(2);
        let began = Instant::now();
        let (body, mut timer) = RequestBody::new(Full::new(Bytes::from_static(b"x")), limit);
        let wait = tokio::spawn(async move { poll_fn(|cx| timer.poll(cx)).await });
        tokio::time::sleep(Duration::from_secs(10)).await;
        assert!(!wait.is_finished());
        body.collect().await.unwrap();
        assert_eq!(wait.await.unwrap(), limit);
        assert_eq!(began.elapsed().as_secs(), 12);
    }

    #[tokio::test(start_paused = true)]
    async fn an_empty_body_is_sent_at_once() {
        let (_body, mut timer) = RequestBody::new(Empty::<Bytes>::new(), Duration::from_secs(2));
        let began = Instant::now();
        poll_fn(|cx| timer.poll(cx)).await;
        assert_eq!(began.elapsed().as_secs(), 2);
    }
}
