//! The request body of a call, for as many attempts as it takes. One that is complete at once, as that of a unary call is,
//! is a few shared frames and costs nothing; one that goes on later is kept by [`Replay`].

use super::{Fan, FanBody, Replay, ReplayBody};
use crate::{
    outbound::timeout::{HeadTimer, RequestBody},
    transport::BoxError,
};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use smallvec::SmallVec;
use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

pub(super) type Frames = SmallVec<[Bytes; 2]>;

/// Keeps the body for further attempts.
pub(crate) enum Kept<B> {
    /// All of it is there.
    Whole(Whole),
    /// It goes on, or is too long to be kept, or has trailers.
    Live(Replay<B>),
}

/// The body of one attempt.
pub(crate) enum Outgoing<B> {
    Whole(Whole),
    /// Boxed to keep the future of a unary call small.
    Live(Box<ReplayBody<B>>),
    /// One of several at the same time.
    Fan(FanBody<B>),
    /// Tells when it was sent.
    Told(Box<RequestBody<Self>>),
}

/// A complete body without trailers.
#[derive(Clone)]
pub(crate) struct Whole {
    frames: Frames,
    /// Frames already yielded.
    at: u32,
    /// The original said its length in advance.
    sized: bool,
}

impl<B> Kept<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// Takes what `body` has ready, and gives the body of the first attempt. `cap` is in bytes of data. Polls for the
    /// caller's task, which goes on polling the attempt's body.
    ///
    /// # Errors
    /// The body's own.
    pub(crate) fn new(mut body: B, cap: usize, cx: &mut Context<'_>) -> Result<(Self, Outgoing<B>), BoxError> {
        let sized = body.size_hint().exact().is_some();
        let (mut frames, mut length) = (Frames::new(), 0);
        while !body.is_end_stream() {
            match Pin::new(&mut body).poll_frame(cx) {
                Poll::Ready(None) => break,
                Poll::Ready(Some(Err(error))) => return Err(error.into()),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => {
                        length += data.len();
                        frames.push(data);
                        if length > cap || frames.len() == frames.inline_size() {
                            if body.is_end_stream() && length <= cap {
                                break;
                            }
                            return Ok(Self::live(Replay::resumed(Some(body), frames, None, cap)));
                        }
                    }
                    Err(frame) => {
                        let trailers = frame.into_trailers().ok();
                        return Ok(Self::live(Replay::resumed(None, frames, trailers, cap)));
                    }
                },
                Poll::Pending => return Ok(Self::live(Replay::resumed(Some(body), frames, None, cap))),
            }
        }
        let whole = Whole { frames, at: 0, sized };
        Ok((Self::Whole(whole.clone()), Outgoing::Whole(whole)))
    }

    fn live((replay, first): (Replay<B>, ReplayBody<B>)) -> (Self, Outgoing<B>) {
        (Self::Live(replay), Outgoing::Live(Box::new(first)))
    }

    /// The body of the next attempt; see [`Replay::again`].
    pub(crate) fn again(&self) -> Outgoing<B> {
        match self {
            Self::Whole(whole) => Outgoing::Whole(whole.clone()),
            Self::Live(replay) => Outgoing::Live(Box::new(replay.again())),
        }
    }

    /// Whether [`again`](Self::again) can send all of it.
    pub(crate) fn is_replayable(&self) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Live(replay) => replay.is_replayable(),
        }
    }
}

impl<B> Outgoing<B> {
    /// Lets further attempts send the body while this one, the first, does. `None`: it is whole, or not all of it is kept.
    pub(crate) fn fan(&mut self) -> Option<Fan<B>> {
        let Self::Live(body) = self else { return None };
        let fan = body.fan()?;
        *self = Self::Fan(fan.body(1));
        Some(fan)
    }
}

impl<B> Outgoing<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// With a timer that waits so long for the response, once this was sent in full.
    pub(crate) fn timed(self, limit: Duration) -> (Self, HeadTimer) {
        let (body, timer) = RequestBody::new(self, limit);
        (Self::Told(Box::new(body)), timer)
    }
}

impl<B> Body for Outgoing<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Self::Live(body) => Pin::new(body).poll_frame(cx),
            Self::Fan(body) => Pin::new(body).poll_frame(cx),
            Self::Told(body) => Pin::new(&mut **body).poll_frame(cx),
            Self::Whole(whole) => {
                let frame = whole.frames.get_mut(whole.at as usize).map(std::mem::take);
                whole.at += 1;
                Poll::Ready(frame.map(|data| Ok(Frame::data(data))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Live(body) => body.is_end_stream(),
            Self::Fan(body) => body.is_end_stream(),
            Self::Told(body) => body.is_end_stream(),
            Self::Whole(whole) => whole.at as usize >= whole.frames.len(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Live(body) => body.size_hint(),
            Self::Fan(body) => body.size_hint(),
            Self::Told(body) => body.size_hint(),
            Self::Whole(Whole { sized: false, .. }) => SizeHint::default(),
            Self::Whole(whole) => {
                SizeHint::with_exact(whole.frames.iter().skip(whole.at as usize).map(|data| data.len() as u64).sum())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::outbound::retry::ReplayError;
    use http::HeaderMap;
    use http_body_util::{BodyExt, Full, StreamBody};
    use std::{collections::VecDeque, convert::Infallible, task::Waker};

    type Step = Poll<Option<Result<Frame<Bytes>, BoxError>>>;

    /// Answers each poll with the next step, and ends after the last.
    struct Script(VecDeque<Step>);

    impl Body for Script {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Step {
            cx.waker().wake_by_ref();
            self.0.pop_front().unwrap_or(Poll::Ready(None))
        }
    }

    fn script(steps: impl IntoIterator<Item = Step>) -> Script {
        Script(steps.into_iter().collect())
    }

    fn data(text: &'static str) -> Step {
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(text.as_bytes())))))
    }

    fn kept<B>(body: B, cap: usize) -> (Kept<B>, Outgoing<B>)
    where
        B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
    {
        Kept::new(body, cap, &mut Context::from_waker(Waker::noop())).expect("the body does not fail")
    }

    async fn text<B>(body: Outgoing<B>) -> String
    where
        B: Body<Data = Bytes, Error: Into<BoxError>> + Unpin,
    {
        String::from_utf8(body.collect().await.expect("the body does not fail").to_bytes().into()).expect("text")
    }

    #[tokio::test]
    async fn a_complete_body_is_sent_as_often_as_asked() {
        let (kept, first) = kept(Full::new(Bytes::from_static(b"hello")), 100);
        assert!(matches!(kept, Kept::Whole(_)));
        assert_eq!((first.size_hint().exact(), first.is_end_stream()), (Some(5), false));
        assert_eq!(text(first).await, "hello");
        assert!(kept.is_replayable());
        assert_eq!(text(kept.again()).await, "hello");
        assert_eq!(text(kept.again()).await, "hello");
    }

    #[tokio::test]
    async fn a_body_that_did_not_say_its_length_still_does_not() {
        let (kept, first) = kept(script([data("a"), data(""), Poll::Ready(None)]), 100);
        assert!(matches!(kept, Kept::Whole(_)));
        assert_eq!(first.size_hint().exact(), None);
        assert_eq!(text(first).await, "a");
    }

    #[tokio::test]
    async fn an_empty_body_ends_at_once() {
        let (kept, first) = kept(http_body_util::Empty::<Bytes>::new(), 100);
        assert!(first.is_end_stream() && kept.again().is_end_stream());
        assert_eq!(first.size_hint().exact(), Some(0));
    }

    #[tokio::test]
    async fn a_body_that_goes_on_later_is_replayed_from_its_start() {
        let (kept, first) = kept(script([data("a"), Poll::Pending, data("b"), data("c"), data("d")]), 100);
        assert!(matches!(kept, Kept::Live(_)));
        assert_eq!(text(first).await, "abcd");
        assert!(kept.is_replayable());
        assert_eq!(text(kept.again()).await, "abcd");
    }

    #[tokio::test]
    async fn a_body_over_the_cap_is_sent_once() {
        for steps in [vec![data("abc")], vec![data("ab"), data("c"), Poll::Pending, data("d")]] {
            let whole: usize = steps.iter().filter(|step| step.is_ready()).count();
            let (kept, first) = kept(script(steps), 2);
            assert!(!kept.is_replayable());
            assert_eq!(text(first).await.len(), if whole == 1 { 3 } else { 4 });
            let error = kept.again().collect().await.expect_err("nothing is kept");
            assert_eq!(error.downcast_ref(), Some(&ReplayError::TooLong));
        }
    }

    #[tokio::test]
    async fn trailers_are_sent_again() {
        let trailers = HeaderMap::from_iter([(http::header::ETAG, http::HeaderValue::from_static("1"))]);
        let frames = [Frame::data(Bytes::from_static(b"a")), Frame::trailers(trailers.clone())];
        let frames = frames.map(Ok::<_, Infallible>);
        let (kept, first) = kept(StreamBody::new(futures::stream::iter(frames)), 100);
        assert_eq!(first.collect().await.expect("no failure").trailers(), Some(&trailers));
        assert_eq!(kept.again().collect().await.expect("no failure").trailers(), Some(&trailers));
    }

    #[test]
    fn a_body_that_fails_at_once_fails_the_call() {
        let body = script([data("a"), Poll::Ready(Some(Err("broken".into())))]);
        let result = Kept::new(body, 100, &mut Context::from_waker(Waker::noop()));
        assert_eq!(result.err().map(|error| error.to_string()).as_deref(), Some("broken"));
    }
}
