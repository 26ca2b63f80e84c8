//! A request body that can be sent again: shares its bytes, copies nothing, keeps up to a cap.

use super::{
    fan::{Fan, MAX_FRAMES, Source},
    outgoing::Frames,
};
use crate::transport::BoxError;
use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use smallvec::SmallVec;
use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll, Waker},
};

/// What is kept for a replay by default: 64 KiB of data.
pub const DEFAULT_REPLAY_CAP: usize = 64 * 1024;

/// Keeps one request's body for further attempts. Dropping it means that there will be none: the body then stops keeping
/// what it sends.
pub(crate) struct Replay<B> {
    shared: Arc<Shared<B>>,
}

/// The body of one attempt. Yields what earlier attempts took from the inner body, then the live rest of it, and hands
/// both back when it is dropped.
///
/// While an earlier attempt's body is alive and holds the inner body, this one waits for it; the earlier one ends with
/// [`ReplayError::Superseded`] at its next poll.
pub struct ReplayBody<B> {
    shared: Arc<Shared<B>>,
    /// Number of the attempt.
    attempt: u32,
    state: Option<State<B>>,
    /// Frames of `state` already yielded.
    at: usize,
    trailers_sent: bool,
    /// Nothing was asked of it yet.
    fresh: bool,
    /// It was made although nothing is kept.
    dead: bool,
}

/// Why a body cannot be sent (again).
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReplayError {
    /// A newer attempt took the body over.
    #[error("a newer attempt took the request body over")]
    Superseded,
    /// The start of the body is no longer kept.
    #[error("the request body is longer than what is kept to send it again")]
    TooLong,
    /// The body that the caller gave failed, in this attempt or in an earlier one.
    #[error("the request body failed")]
    Failed,
}

struct Shared<B> {
    slot: Mutex<Slot<B>>,
    /// The newest attempt.
    attempt: AtomicU32,
    /// What is sent is kept. Never becomes true again.
    keep: AtomicBool,
}

/// Where an attempt leaves the state for the next one.
struct Slot<B> {
    state: Option<State<B>>,
    waiting: Option<Waker>,
}

struct State<B> {
    /// `None` when it ended or failed.
    inner: Option<B>,
    frames: Frames,
    /// Data in `frames`, in bytes.
    kept: usize,
    cap: usize,
    /// Something was sent that is not in `frames`.
    forgotten: bool,
    failed: bool,
    trailers: Option<HeaderMap>,
}

impl<B: Body<Data = Bytes> + Unpin> Replay<B> {
    /// Wraps `body`, and gives the body of the first attempt. `cap` is in bytes of data. One allocation.
    pub(crate) fn new(body: B, cap: usize) -> (Self, ReplayBody<B>) {
        Self::resumed(Some(body), Frames::new(), None, cap)
    }

    /// As [`new`](Self::new), of a body from which `frames` were taken already; `inner` is `None` at its end, before
    /// `trailers`. What is over the cap is sent, and not kept.
    pub(super) fn resumed(
        inner: Option<B>,
        frames: Frames,
        trailers: Option<HeaderMap>,
        cap: usize,
    ) -> (Self, ReplayBody<B>) {
        let kept = frames.iter().map(Bytes::len).sum();
        let state = State { inner, frames, kept, cap, forgotten: false, failed: false, trailers };
        let shared = Arc::new(Shared {
            slot: Mutex::new(Slot { state: None, waiting: None }),
            attempt: AtomicU32::new(1),
            keep: AtomicBool::new(kept <= cap),
        });
        let first = ReplayBody {
            shared: shared.clone(),
            attempt: 1,
            state: Some(state),
            at: 0,
            trailers_sent: false,
            fresh: true,
            dead: false,
        };
        (Self { shared }, first)
    }

    /// The body of the next attempt. Earlier ones are superseded. Fails when it is polled if the body is not
    /// [replayable](Self::is_replayable).
    pub(crate) fn again(&self) -> ReplayBody<B> {
        let attempt = self.shared.attempt.fetch_add(1, Ordering::AcqRel) + 1;
        let state = self.shared.lock().state.take();
        let dead = !self.is_replayable();
        ReplayBody { shared: self.shared.clone(), attempt, state, at: 0, trailers_sent: false, fresh: true, dead }
    }

    /// Whether all that was sent so far is kept, so that [`again`](Self::again) can send it.
    pub(crate) fn is_replayable(&self) -> bool {
        self.shared.keep.load(Ordering::Acquire)
    }
}

impl<B> Drop for Replay<B> {
    fn drop(&mut self) {
        self.shared.keep.store(false, Ordering::Release);
    }
}

impl<B> Shared<B> {
    fn lock(&self) -> std::sync::MutexGuard<'_, Slot<B>> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<B> ReplayBody<B> {
    /// The same body, for several attempts at the same time, if nothing was sent of it yet and all of it is kept so far.
    pub(super) fn fan(&mut self) -> Option<Fan<B>> {
        if !self.fresh || !self.shared.keep.load(Ordering::Acquire) {
            return None;
        }
        let State { inner, frames, kept, cap, failed, trailers, .. } = self.state.take()?;
        let frames = frames.into_vec();
        Some(Fan::new(Source { inner, frames, kept, cap, trailers, failed, alone: None, waiting: SmallVec::new() }))
    }

    fn is_superseded(&self) -> bool {
        self.shared.attempt.load(Ordering::Acquire) != self.attempt
    }

    /// Leaves the state for a newer attempt, if there is one or may be one.
    fn hand_back(&mut self) {
        if let Some(state) = self.state.take()
            && (self.shared.keep.load(Ordering::Acquire) || self.is_superseded())
        {
            let waiting = {
                let mut slot = self.shared.lock();
                slot.state = Some(state);
                slot.waiting.take()
            };
            if let Some(waker) = waiting {
                waker.wake();
            }
        }
    }

    /// Takes the state over from the attempt before, once that is gone.
    fn claim(&mut self, cx: &Context<'_>) -> Poll<()> {
        if self.state.is_none() {
            let mut slot = self.shared.lock();
            self.state = slot.state.take();
            if self.state.is_none() {
                slot.waiting = Some(cx.waker().clone());
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }
}

impl<B> Drop for ReplayBody<B> {
    fn drop(&mut self) {
        self.hand_back();
    }
}

impl<B> State<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// The next frame of the inner body, kept when `keep` still says so.
    fn poll_live(&mut self, keep: &AtomicBool, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(inner) = self.inner.as_mut() else { return Poll::Ready(None) };
        let polled = std::task::ready!(Pin::new(&mut *inner).poll_frame(cx));
        let ended = inner.is_end_stream();
        let frame = match polled {
            Some(Ok(frame)) => frame,
            Some(Err(error)) => {
                keep.store(false, Ordering::Release);
                self.inner = None;
                self.failed = true;
                return Poll::Ready(Some(Err(error.into())));
            }
            None => {
                self.inner = None;
                return Poll::Ready(None);
            }
        };
        if let Some(data) = frame.data_ref() {
            if keep.load(Ordering::Acquire) {
                let fits = self.kept + data.len() <= self.cap && self.frames.len() < MAX_FRAMES;
                if fits && !data.is_empty() {
                    self.kept += data.len();
                    self.frames.push(data.clone());
                } else if !fits {
                    keep.store(false, Ordering::Release);
                }
            }
            if !keep.load(Ordering::Acquire) && !self.forgotten {
                self.forgotten = true;
                self.frames = Frames::new();
            }
        } else if let Some(trailers) = frame.trailers_ref() {
            self.trailers = Some(trailers.clone());
        }
        if ended || frame.is_trailers() {
            self.inner = None;
        }
        Poll::Ready(Some(Ok(frame)))
    }
}

impl<B> Body for ReplayBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let this = &mut *self;
        if this.is_superseded() {
            this.hand_back();
            return Poll::Ready(Some(Err(ReplayError::Superseded.into())));
        }
        if this.dead {
            return Poll::Ready(Some(Err(ReplayError::TooLong.into())));
        }
        std::task::ready!(this.claim(cx));
        let Some(state) = this.state.as_mut() else { return Poll::Pending };
        if std::mem::take(&mut this.fresh) && state.forgotten {
            return Poll::Ready(Some(Err(ReplayError::TooLong.into())));
        }
        if let Some(data) = state.frames.get(this.at) {
            this.at += 1;
            return Poll::Ready(Some(Ok(Frame::data(data.clone()))));
        }
        if state.failed {
            return Poll::Ready(Some(Err(ReplayError::Failed.into())));
        }
        if state.inner.is_none() {
            let trailers = state.trailers.as_ref().filter(|_| !this.trailers_sent).cloned();
            this.trailers_sent = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = std::task::ready!(state.poll_live(&this.shared.keep, cx));
        this.at = state.frames.len();
        this.trailers_sent |= matches!(&frame, Some(Ok(frame)) if frame.is_trailers());
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.state.as_ref().is_some_and(|state| {
            let rest_is_empty = match &state.inner {
                Some(inner) => inner.is_end_stream(),
                None => !state.failed && (state.trailers.is_none() || self.trailers_sent),
            };
            let complete = !(self.dead || (self.fresh && state.forgotten));
            complete && rest_is_empty && self.at >= state.frames.len()
        })
    }

    fn size_hint(&self) -> SizeHint {
        let Some(state) = &self.state else { return SizeHint::default() };
        let kept: u64 = state.frames.iter().skip(self.at).map(|data| data.len() as u64).sum();
        with_kept(kept, state.inner.as_ref())
    }
}

/// Of what is kept and the rest, which is empty when it ended.
pub(super) fn with_kept<B: Body>(kept: u64, rest: Option<&B>) -> SizeHint {
    let mut hint = rest.map_or_else(|| SizeHint::with_exact(0), Body::size_hint);
    if let Some(upper) = hint.upper() {
        hint.set_upper(upper.saturating_add(kept));
    }
    hint.set_lower(hint.lower().saturating_add(kept));
    hint
}

impl<B> fmt::Debug for Replay<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replay").field("keep", &self.shared.keep).finish_non_exhaustive()
    }
}

impl<B> fmt::Debug for ReplayBody<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplayBody").field("attempt", &self.attempt).field("at", &self.at).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
