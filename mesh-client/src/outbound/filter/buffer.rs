//! Buffer: requests are sent when their body is whole, and not if it is too large (Envoy's `buffer` filter).

use super::{Filter, FilterRequest, Reply, Step, Verdict};
use crate::error::BoxError;
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use std::{
    borrow::Cow,
    collections::VecDeque,
    convert::Infallible,
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
};

/// A compiled filter.
#[derive(Debug)]
pub(crate) struct Buffer(pub(super) u64);

/// A body that was read whole.
#[derive(Debug)]
pub(crate) struct Buffered {
    frames: VecDeque<Frame<Bytes>>,
    length: u64,
}

impl Buffered {
    /// Reads a body; `None`: it has more than `limit` bytes.
    ///
    /// # Errors
    /// The body's own.
    pub(crate) async fn read<B>(mut body: B, headers: &HeaderMap, limit: u64) -> Result<Option<Self>, BoxError>
    where
        B: Body<Data = Bytes> + Unpin,
        B::Error: Into<BoxError>,
    {
        if Self::announced(headers).max(body.size_hint().lower()) > limit {
            return Ok(None);
        }
        let mut whole = Self { frames: VecDeque::new(), length: 0 };
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let frame = frame.map_err(Into::into)?;
            if let Some(data) = frame.data_ref() {
                whole.length += data.len() as u64;
                if whole.length > limit {
                    return Ok(None);
                }
            }
            whole.frames.push_back(frame);
        }
        Ok(Some(whole))
    }

    /// How long the body is by its head; 0 where that does not say.
    pub(crate) fn announced(headers: &HeaderMap) -> u64 {
        let length = headers.get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
        length.unwrap_or(0)
    }

    /// The answer to a body that is too large.
    pub(crate) fn too_large() -> Reply {
        Reply::new(StatusCode::PAYLOAD_TOO_LARGE, "Payload Too Large").grpc_status(8)
    }
}

impl Body for Buffered {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let frame = self.frames.pop_front();
        if let Some(data) = frame.as_ref().and_then(Frame::data_ref) {
            self.length -= data.len() as u64;
        }
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.length)
    }
}

impl Filter for Buffer {
    fn request<'a>(&'a self, request: &'a mut FilterRequest<'_>) -> Step<'a> {
        request.buffer_body(self.0);
        Step::Now(Verdict::Pass)
    }

    fn describe(&self) -> Cow<'_, str> {
        format!("buffer: at most {} bytes", self.0).into()
    }
}
