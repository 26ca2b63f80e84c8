use super::*;
use http::HeaderValue;
use http_body_util::{BodyExt, Empty, Full};
use proptest::prelude::*;
use std::{collections::VecDeque, task::ready};
use tokio::sync::mpsc;
use tokio_test::{assert_pending, assert_ready, task};

/// A live body: frames arrive through a channel, an `Err` fails it. Knows its end only when it is reached.
struct Live(mpsc::UnboundedReceiver<Result<Frame<Bytes>, &'static str>>);

impl Body for Live {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(ready!(self.0.poll_recv(cx)).map(|frame| frame.map_err(Into::into)))
    }
}

/// Frames known in advance, with an exact size and a known end.
struct Fixed(VecDeque<Frame<Bytes>>);

impl Body for Fixed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Poll::Ready(self.0.pop_front().map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum())
    }
}

type Sender = mpsc::UnboundedSender<Result<Frame<Bytes>, &'static str>>;

fn live(cap: usize) -> (Sender, Replay<Live>, ReplayBody<Live>) {
    let (send, receive) = mpsc::unbounded_channel();
    let (replay, first) = Replay::new(Live(receive), cap);
    (send, replay, first)
}

fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

fn trailers() -> HeaderMap {
    HeaderMap::from_iter([(http::header::ETAG, HeaderValue::from_static("t"))])
}

/// One frame, in words.
async fn frame<B>(body: &mut ReplayBody<B>) -> String
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    match body.frame().await {
        None => "end".into(),
        Some(Err(error)) => format!("error: {error}"),
        Some(Ok(frame)) if frame.is_trailers() => "trailers".into(),
        Some(Ok(frame)) => String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap(),
    }
}

async fn rest<B>(body: &mut ReplayBody<B>) -> Vec<String>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let mut frames = vec![frame(body).await];
    while !frames.last().unwrap().starts_with("e") {
        frames.push(frame(body).await);
    }
    frames
}

#[tokio::test]
async fn a_dropped_attempt_is_continued_with_what_was_sent_and_then_the_live_rest() {
    let (send, replay, mut first) = live(100);
    for text in ["one", "two", "three"] {
        send.send(data(text)).unwrap();
    }
    assert_eq!(frame(&mut first).await, "one");
    assert_eq!(frame(&mut first).await, "two");
    drop(first);
    let mut second = replay.again();
    assert_eq!(frame(&mut second).await, "one");
    drop(second);
    let mut third = replay.again();
    send.send(Ok(Frame::trailers(trailers()))).unwrap();
    assert_eq!(rest(&mut third).await, ["one", "two", "three", "trailers", "end"]);
    drop(third);
    assert_eq!(rest(&mut replay.again()).await, ["one", "two", "three", "trailers", "end"]);
    assert!(replay.is_replayable());
}

#[tokio::test]
async fn bytes_are_shared_not_copied() {
    let bytes = Bytes::from(vec![7; 1000]);
    let (replay, mut first) = Replay::new(Full::new(bytes.clone()), 2000);
    let sent = first.frame().await.unwrap().unwrap().into_data().unwrap();
    drop(first);
    let again = replay.again().frame().await.unwrap().unwrap().into_data().unwrap();
    assert_eq!(sent.as_ptr(), bytes.as_ptr());
    assert_eq!(again.as_ptr(), bytes.as_ptr());
}

#[tokio::test]
async fn the_end_rides_on_the_last_frame_in_every_attempt() {
    let (replay, mut first) = Replay::new(Full::new(Bytes::from_static(b"all")), 10);
    assert_eq!(first.size_hint().exact(), Some(3));
    for _ in 0..2 {
        assert!(!first.is_end_stream());
        assert_eq!(frame(&mut first).await, "all");
        assert!(first.is_end_stream());
        assert_eq!(first.size_hint().exact(), Some(0));
        drop(first);
        first = replay.again();
        assert_eq!(first.size_hint().exact(), Some(3));
    }
}

#[tokio::test]
async fn an_empty_body_ends_before_it_begins() {
    let (replay, first) = Replay::new(Empty::<Bytes>::new(), 10);
    assert!(first.is_end_stream());
    drop(first);
    assert!(replay.again().is_end_stream());
}

#[tokio::test]
async fn past_the_cap_the_body_goes_on_and_is_not_replayable() {
    let (send, replay, mut first) = live(5);
    for text in ["123", "456", "789"] {
        send.send(data(text)).unwrap();
    }
    drop(send);
    assert_eq!(frame(&mut first).await, "123");
    assert!(replay.is_replayable());
    assert_eq!(rest(&mut first).await, ["456", "789", "end"]);
    assert!(!replay.is_replayable());
    drop(first);
    let mut again = replay.again();
    assert!(!again.is_end_stream());
    assert_eq!(frame(&mut again).await, "error: the request body is longer than what is kept to send it again");
}

#[tokio::test]
async fn a_first_frame_over_the_cap_goes_on_too() {
    let (send, replay, mut first) = live(2);
    send.send(data("123")).unwrap();
    send.send(data("4")).unwrap();
    drop(send);
    assert_eq!(rest(&mut first).await, ["123", "4", "end"]);
    assert!(!replay.is_replayable());
}

#[tokio::test]
async fn exactly_the_cap_is_kept() {
    let (replay, mut first) = Replay::new(Full::new(Bytes::from_static(b"12345")), 5);
    assert_eq!(frame(&mut first).await, "12345");
    assert!(replay.is_replayable());
}

#[tokio::test]
async fn many_tiny_frames_do_not_grow_without_bound() {
    let (send, replay, mut first) = live(usize::MAX);
    for _ in 0..=MAX_FRAMES {
        send.send(data("x")).unwrap();
        frame(&mut first).await;
    }
    assert!(!replay.is_replayable());
    send.send(data("y")).unwrap();
    assert_eq!(frame(&mut first).await, "y");
}

#[tokio::test]
async fn a_failed_body_is_reported_and_never_sent_again() {
    let (send, replay, mut first) = live(100);
    send.send(data("one")).unwrap();
    send.send(Err("disk")).unwrap();
    assert_eq!(rest(&mut first).await, ["one", "error: disk"]);
    assert!(!replay.is_replayable());
    assert!(!first.is_end_stream());
    assert_eq!(frame(&mut first).await, "error: the request body failed");
}

#[tokio::test]
async fn a_newer_attempt_waits_for_the_body_and_the_older_one_ends() {
    let (send, replay, mut first) = live(100);
    send.send(data("one")).unwrap();
    send.send(data("two")).unwrap();
    assert_eq!(frame(&mut first).await, "one");
    let mut second = replay.again();
    {
        let mut waiting = task::spawn(second.frame());
        assert_pending!(waiting.poll());
        assert_eq!(frame(&mut first).await, "error: a newer attempt took the request body over");
        assert!(waiting.is_woken());
        let frame = assert_ready!(waiting.poll()).unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "one");
    }
    assert_eq!(frame(&mut second).await, "two");
}

#[tokio::test]
async fn a_waiting_attempt_gets_the_body_even_when_the_call_is_committed_meanwhile() {
    let (send, replay, mut first) = live(100);
    send.send(data("one")).unwrap();
    drop(send);
    assert_eq!(frame(&mut first).await, "one");
    let mut second = replay.again();
    let mut waiting = task::spawn(second.frame());
    assert_pending!(waiting.poll());
    drop(replay);
    drop(first);
    assert!(waiting.is_woken());
    assert!(assert_ready!(waiting.poll()).unwrap().is_ok());
}

#[tokio::test]
async fn a_committed_body_keeps_nothing() {
    let (send, replay, mut first) = live(100);
    let kept = Bytes::from(vec![1; 10]);
    send.send(Ok(Frame::data(kept.clone()))).unwrap();
    first.frame().await;
    assert!(!kept.is_unique(), "kept for a retry");
    drop(replay);
    send.send(data("x")).unwrap();
    assert_eq!(frame(&mut first).await, "x");
    assert!(kept.is_unique(), "forgotten");
}

proptest! {
    #[test]
    fn any_interleaving_of_attempts_sends_the_whole_body_in_the_last(
        sizes in proptest::collection::vec(0..40usize, 0..8),
        with_trailers in any::<bool>(),
        reads in proptest::collection::vec(0..10usize, 0..5),
        cap in 0..200usize,
    ) {
        let body: Vec<Bytes> = (0u8..).zip(&sizes).map(|(n, len)| Bytes::from(vec![n; *len])).collect();
        let mut frames: VecDeque<_> = body.iter().cloned().map(Frame::data).collect();
        if with_trailers {
            frames.push_back(Frame::trailers(trailers()));
        }
        let total: usize = sizes.iter().sum();
        let (replay, mut attempt) = Replay::new(Fixed(frames), cap);
        let mut cx = Context::from_waker(Waker::noop());
        for reads in reads {
            for _ in 0..reads {
                let hint = attempt.size_hint().exact();
                prop_assert!(hint.is_some());
                let _ = Pin::new(&mut attempt).poll_frame(&mut cx);
            }
            drop(attempt);
            if !replay.is_replayable() {
                prop_assert!(total > cap);
                return Ok(());
            }
            attempt = replay.again();
        }
        let (mut sent, mut trailed) = (Vec::new(), false);
        prop_assert_eq!(attempt.size_hint().exact(), Some(total as u64));
        while !attempt.is_end_stream() {
            match Pin::new(&mut attempt).poll_frame(&mut cx) {
                Poll::Ready(Some(Ok(frame))) if frame.is_trailers() => trailed = true,
                Poll::Ready(Some(Ok(frame))) => sent.extend_from_slice(&frame.into_data().unwrap()),
                Poll::Ready(None) => break,
                other => prop_assert!(false, "{:?}", other),
            }
        }
        prop_assert_eq!(sent, body.concat());
        prop_assert_eq!(trailed, with_trailers);
        prop_assert_eq!(replay.is_replayable(), total <= cap);
    }
}
