//! A request body that several attempts read at the same time, each at its own speed: what one of them took from the caller is kept
//! for the others, up to a cap.

use super::ReplayError;
use crate::transport::BoxError;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use smallvec::SmallVec;
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker, ready},
};

/// More frames than this are not kept, however short they are.
pub(super) const MAX_FRAMES: usize = 1024;

/// Makes the bodies of attempts.
pub(crate) struct Fan<B>(Arc<Mutex<Source<B>>>);

/// The body of one attempt. One that falls behind when the cap is reached fails with [`ReplayError::TooLong`].
pub(crate) struct FanBody<B> {
    source: Arc<Mutex<Source<B>>>,
    attempt: u32,
    /// Frames already yielded, of those that are kept.
    at: usize,
    trailers_sent: bool,
}

/// What the caller gave, as far as it is known.
pub(super) struct Source<B> {
    /// `None` when it ended or failed.
    pub(super) inner: Option<B>,
    pub(super) frames: Vec<Bytes>,
    /// Bytes in `frames`.
    pub(super) kept: usize,
    pub(super) cap: usize,
    pub(super) trailers: Option<HeaderMap>,
    pub(super) failed: bool,
    /// Nothing is kept any more: only this attempt goes on.
    pub(super) alone: Option<u32>,
    /// Attempts that wait for the caller, and who wakes them.
    pub(super) waiting: SmallVec<[(u32, Waker); 2]>,
}

impl<B> Fan<B> {
    pub(super) fn new(source: Source<B>) -> Self {
        Self(Arc::new(Mutex::new(source)))
    }

    /// The body of one more attempt, from the start.
    pub(crate) fn body(&self, attempt: u32) -> FanBody<B> {
        FanBody { source: self.0.clone(), attempt, at: 0, trailers_sent: false }
    }

    /// Whether one more attempt can send all of it.
    pub(crate) fn is_kept(&self) -> bool {
        let source = locked(&self.0);
        source.alone.is_none() && !source.failed
    }

    /// This attempt has won: nothing is kept for others from here on.
    pub(crate) fn settle(&self, attempt: u32) {
        let woken = {
            let mut source = locked(&self.0);
            source.alone = Some(attempt);
            std::mem::take(&mut source.waiting)
        };
        wake(woken);
    }
}

impl<B> Source<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// The next frame from the caller, for an attempt that has had all that is kept.
    fn poll_inner(
        &mut self,
        attempt: u32,
        at: &mut usize,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(inner) = self.inner.as_mut() else { return Poll::Ready(None) };
        let polled = ready!(Pin::new(&mut *inner).poll_frame(cx));
        let ended = inner.is_end_stream();
        match &polled {
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref() {
                    let fits = self.kept + data.len() <= self.cap && self.frames.len() < MAX_FRAMES;
                    if self.alone.is_none() && fits {
                        self.kept += data.len();
                        self.frames.push(data.clone());
                        *at = self.frames.len();
                    } else {
                        self.alone = Some(attempt);
                        (self.frames, *at) = (Vec::new(), 0);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.trailers = Some(trailers.clone());
                }
                if ended || frame.is_trailers() {
                    self.inner = None;
                }
            }
            Some(Err(_)) => (self.inner, self.failed) = (None, true),
            None => self.inner = None,
        }
        Poll::Ready(polled.map(|polled| polled.map_err(Into::into)))
    }
}

impl<B> Body for FanBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Self { source, attempt, at, trailers_sent } = &mut *self;
        let mut source = locked(source);
        if source.alone.is_some_and(|alone| alone != *attempt) {
            return Poll::Ready(Some(Err(ReplayError::TooLong.into())));
        }
        if let Some(data) = source.frames.get(*at) {
            *at += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        if source.failed {
            return Poll::Ready(Some(Err(ReplayError::Failed.into())));
        }
        if source.inner.is_none() {
            let trailers = source.trailers.clone().filter(|_| !std::mem::replace(trailers_sent, true));
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let polled = source.poll_inner(*attempt, at, cx);
        source.waiting.retain(|(waiting, _)| *waiting != *attempt);
        if polled.is_pending() {
            source.waiting.push((*attempt, cx.waker().clone()));
            return Poll::Pending;
        }
        *trailers_sent |= matches!(&polled, Poll::Ready(Some(Ok(frame))) if frame.is_trailers());
        let woken = std::mem::take(&mut source.waiting);
        drop(source);
        wake(woken);
        polled
    }

    fn is_end_stream(&self) -> bool {
        let source = locked(&self.source);
        let rest_is_empty = match &source.inner {
            Some(inner) => inner.is_end_stream(),
            None => !source.failed && (source.trailers.is_none() || self.trailers_sent),
        };
        rest_is_empty && self.at >= source.frames.len() && source.alone.is_none_or(|alone| alone == self.attempt)
    }

    fn size_hint(&self) -> SizeHint {
        let source = locked(&self.source);
        let kept: u64 = source.frames.iter().skip(self.at).map(|data| data.len() as u64).sum();
        super::replay::with_kept(kept, source.inner.as_ref())
    }
}

impl<B> Drop for FanBody<B> {
    /// The caller's body may know only this one's waker: the others are to look for themselves.
    fn drop(&mut self) {
        let woken = std::mem::take(&mut locked(&self.source).waiting);
        wake(woken.into_iter().filter(|(attempt, _)| *attempt != self.attempt).collect());
    }
}

/// Whether an attempt ended because it could not send all of its request, which another one goes on with alone.
pub(crate) fn is_behind(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut chain = std::iter::successors(Some(error), |error| error.source());
    chain.any(|error| error.downcast_ref() == Some(&ReplayError::TooLong))
}

fn locked<B>(source: &Mutex<Source<B>>) -> MutexGuard<'_, Source<B>> {
    source.lock().unwrap_or_else(PoisonError::into_inner)
}

fn wake(waiting: SmallVec<[(u32, Waker); 2]>) {
    for (_, waker) in waiting {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::channel::mpsc;
    use futures::{FutureExt, StreamExt};
    use http_body_util::{BodyExt, StreamBody};
    use std::convert::Infallible;

    type Given = StreamBody<futures::stream::BoxStream<'static, Result<Frame<Bytes>, Infallible>>>;

    fn fan(cap: usize) -> (mpsc::UnboundedSender<&'static str>, Fan<Given>) {
        let (give, given) = mpsc::unbounded::<&'static str>();
        let frames = given.map(|text| Ok(Frame::data(Bytes::from_static(text.as_bytes())))).boxed();
        let source = Source {
            inner: Some(StreamBody::new(frames)),
            frames: Vec::new(),
            kept: 0,
            cap,
            trailers: None,
            failed: false,
            alone: None,
            waiting: SmallVec::new(),
        };
        (give, Fan::new(source))
    }

    /// `None`: nothing yet.
    fn next(body: &mut FanBody<Given>) -> Option<Result<Bytes, ReplayError>> {
        let frame = body.frame().now_or_never()?.expect("it goes on");
        Some(match frame {
            Ok(frame) => Ok(frame.into_data().expect("data")),
            Err(error) => Err(*error.downcast_ref().expect("of the replay")),
        })
    }

    #[test]
    fn each_attempt_reads_all_at_its_own_speed() {
        let (give, fan) = fan(100);
        let (mut one, mut two) = (fan.body(1), fan.body(2));
        give.unbounded_send("a").unwrap();
        assert_eq!(next(&mut one), Some(Ok("a".into())));
        assert_eq!(next(&mut one), None);
        give.unbounded_send("b").unwrap();
        assert_eq!(next(&mut two), Some(Ok("a".into())));
        assert_eq!(next(&mut two), Some(Ok("b".into())));
        assert_eq!(next(&mut one), Some(Ok("b".into())));
        assert!(fan.is_kept());
        drop(give);
        assert!(one.frame().now_or_never().unwrap().is_none() && two.frame().now_or_never().unwrap().is_none());
        let mut late = fan.body(3);
        assert_eq!((next(&mut late), next(&mut late)), (Some(Ok("a".into())), Some(Ok("b".into()))));
        assert!(late.is_end_stream());
    }

    #[tokio::test]
    async fn one_that_waits_goes_on_when_the_other_gives_up() {
        let (give, fan) = fan(100);
        let (mut one, mut two) = (fan.body(1), fan.body(2));
        assert_eq!(next(&mut one), None);
        // The caller's body knows the second one's waker alone, from here on.
        let waits = tokio::spawn(async move { one.frame().await.unwrap().unwrap().into_data().unwrap() });
        tokio::task::yield_now().await;
        assert_eq!(next(&mut two), None);
        drop(two);
        tokio::task::yield_now().await;
        give.unbounded_send("a").unwrap();
        assert_eq!(waits.await.unwrap(), "a");
    }

    #[test]
    fn over_the_cap_the_first_goes_on_alone() {
        let (give, fan) = fan(3);
        let (mut one, mut two) = (fan.body(1), fan.body(2));
        for text in ["ab", "cd", "ef"] {
            give.unbounded_send(text).unwrap();
        }
        assert_eq!(next(&mut one), Some(Ok("ab".into())));
        assert!(fan.is_kept());
        assert_eq!(next(&mut one), Some(Ok("cd".into())));
        assert!(!fan.is_kept());
        assert_eq!(next(&mut two), Some(Err(ReplayError::TooLong)));
        assert_eq!(next(&mut one), Some(Ok("ef".into())));
    }

    #[test]
    fn the_winner_reads_what_is_kept_and_then_the_rest() {
        let (give, fan) = fan(100);
        let (mut one, mut two) = (fan.body(1), fan.body(2));
        give.unbounded_send("a").unwrap();
        assert_eq!(next(&mut one), Some(Ok("a".into())));
        fan.settle(2);
        assert_eq!(next(&mut one), Some(Err(ReplayError::TooLong)));
        give.unbounded_send("b").unwrap();
        assert_eq!((next(&mut two), next(&mut two)), (Some(Ok("a".into())), Some(Ok("b".into()))));
    }
}
