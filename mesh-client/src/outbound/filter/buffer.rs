//! Buffer: requests are sent when their body is whole, and not if it is too large (Envoy's `buffer` filter).

use super::{Filter, FilterRequest, Reply, Step, Verdict};
use crate::error::BoxError;
use bytes::{Bytes, BytesMut};
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

/// Smaller frames are joined to pieces of this size: each holds on to the whole read that it came with, and costs more than its bytes.
const PIECE: usize = 64 << 10;

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
        let mut joined = BytesMut::new();
        while let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
            let frame = frame.map_err(Into::into)?;
            let small = match frame.data_ref() {
                None => None,
                Some(data) => {
                    whole.length += data.len() as u64;
                    if whole.length > limit {
                        return Ok(None);
                    }
                    Some(data).filter(|data| data.len() < PIECE)
                }
            };
            match small {
                // One frame alone is what most bodies are.
                Some(_) if whole.frames.is_empty() && joined.is_empty() => whole.frames.push_back(frame),
                Some(data) => joined.extend_from_slice(data),
                None => {
                    whole.push(&mut joined);
                    whole.frames.push_back(frame);
                }
            }
            if joined.len() >= PIECE {
                whole.push(&mut joined);
            }
        }
        whole.push(&mut joined);
        Ok(Some(whole))
    }

    fn push(&mut self, joined: &mut BytesMut) {
        if !joined.is_empty() {
            self.frames.push_back(Frame::data(std::mem::take(joined).freeze()));
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::StreamBody;

    #[tokio::test]
    async fn small_frames_are_joined_and_nothing_is_lost() {
        // Each byte is a part of a read of its own.
        let byte = |n: usize| Bytes::from(vec![u8::try_from(n % 251).unwrap(); 4096]).slice(7..8);
        let mut frames: Vec<_> = (0..200_000).map(|n| Frame::data(byte(n))).collect();
        frames.insert(100_000, Frame::data(Bytes::from(vec![9; PIECE])));
        frames.push(Frame::trailers(HeaderMap::from_iter([(header::AGE, "1".parse().unwrap())])));
        let sent: Vec<u8> = frames.iter().filter_map(Frame::data_ref).flatten().copied().collect();
        let body = |frames: Vec<Frame<Bytes>>| {
            StreamBody::new(futures::stream::iter(frames.into_iter().map(Ok::<_, Infallible>)))
        };
        let limit = sent.len() as u64;
        let mut whole = Buffered::read(body(frames), &HeaderMap::new(), limit).await.unwrap().unwrap();
        assert!(whole.frames.len() < 10, "{}", whole.frames.len());
        assert_eq!(whole.size_hint().exact(), Some(limit));
        let mut read = Vec::new();
        while let Some(frame) = whole.frames.pop_front() {
            match frame.into_data() {
                Ok(data) => read.extend_from_slice(&data),
                Err(trailers) => assert!(trailers.is_trailers() && whole.is_end_stream()),
            }
        }
        assert_eq!(read, sent);
        let one_more = (0..3).map(|_| Frame::data(Bytes::from_static(b"x"))).collect();
        assert!(Buffered::read(body(one_more), &HeaderMap::new(), 2).await.unwrap().is_none());
    }
}
