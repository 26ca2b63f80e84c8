//! The response body of both protocols.

use super::{
    BoxError, Lease, TransportError, h1,
    h2::{Part, Stream, Upload},
};
use crate::headers::find;
use bytes::Bytes;
use http::{HeaderMap, header::CONTENT_LENGTH};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::sync::oneshot;

/// The body of a response. It is the flow control: once the window is full, the peer sends what was read.
///
/// Dropped before its end it resets the stream (HTTP/1.1: closes the connection).
pub struct RecvBody(Inner);

enum Inner {
    Ended,
    H1 { body: Incoming, lease: Lease },
    H2(H2),
}

struct H2 {
    stream: Arc<Stream>,
    lease: Guard,
    /// Bytes to come, where `content-length` said.
    length: Option<u64>,
    /// Tells the rest of the request that the response is complete; dropped, that nobody reads it.
    upload: Option<oneshot::Sender<()>>,
    /// The first frame, looked at ahead of the body.
    early: Option<Early>,
}

enum Early {
    Data(Bytes),
    /// Boxed: rare, and every call holds room for it.
    Trailers(Box<HeaderMap>),
}

/// The stream counts until both its directions ended.
enum Guard {
    Own(Lease),
    Shared(Arc<Lease>),
}

impl RecvBody {
    /// `ended`: nothing follows the head.
    pub(super) fn h2<B>(
        stream: Arc<Stream>,
        headers: &HeaderMap,
        ended: bool,
        lease: Lease,
        upload: Option<Box<Upload<B>>>,
    ) -> Self
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let length = find(headers, &CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        if ended {
            if let Some(upload) = upload {
                upload.end(lease.shared.h2().link());
            }
            return Self(Inner::Ended);
        }
        let Some(upload) = upload else {
            return Self(Inner::H2(H2 { stream, lease: Guard::Own(lease), length, upload: None, early: None }));
        };
        // Its own task only here: the caller need not read the response for the request to go on.
        let lease = Arc::new(lease);
        let runtime = lease.shared.runtime.clone();
        let held = Arc::clone(&lease);
        let (tell, response) = oneshot::channel();
        runtime.spawn(async move {
            upload.finish(held.shared.h2().link(), response).await;
            drop(held);
        });
        Self(Inner::H2(H2 { stream, lease: Guard::Shared(lease), length, upload: Some(tell), early: None }))
    }

    /// The trailers, if they are there already and no data is before them: a response that ends without a message. Does not wait.
    pub(crate) fn look_for_trailers(&mut self, cx: &mut Context<'_>) {
        let Inner::H2(body) = &mut self.0 else { return };
        if body.early.is_some() {
            return;
        }
        // What is taken here the reader need not ask the connection for. An error is said again.
        if let Poll::Ready(Some(Ok(part))) = body.poll_part(cx) {
            body.early = Some(match part {
                Part::Data(data) => Early::Data(data),
                Part::Trailers(trailers) => Early::Trailers(Box::new(trailers)),
            });
        }
    }

    /// What [`look_for_trailers`](Self::look_for_trailers) found.
    pub(crate) fn early_trailers(&self) -> Option<&HeaderMap> {
        match &self.0 {
            Inner::H2(H2 { early: Some(Early::Trailers(trailers)), .. }) => Some(trailers),
            _ => None,
        }
    }

    /// Whether nothing of it is left to read, as far as is known without a look at the connection.
    pub(crate) fn has_ended(&self) -> bool {
        matches!(self.0, Inner::Ended)
    }

    pub(super) fn h1(body: Incoming, mut lease: Lease) -> Self {
        if body.is_end_stream() {
            lease.dirty = false;
            return Self(Inner::Ended);
        }
        Self(Inner::H1 { body, lease })
    }
}

impl H2 {
    fn poll_part(&self, cx: &Context<'_>) -> Poll<Option<Result<Part, TransportError>>> {
        let shared = &self.lease.get().shared;
        let part = ready!(shared.h2().link().poll_part(&self.stream, cx));
        Poll::Ready(part.map(|part| part.map_err(|fault| fault.into_error(Some(shared)).after_headers())))
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        let part = match self.early.take() {
            Some(Early::Data(data)) => Some(Ok(Part::Data(data))),
            Some(Early::Trailers(trailers)) => Some(Ok(Part::Trailers(*trailers))),
            None => ready!(self.poll_part(cx)),
        };
        if !matches!(part, Some(Err(_) | Ok(Part::Data(_)))) {
            self.complete();
        }
        Poll::Ready(part.map(|part| {
            part.map(|part| match part {
                Part::Data(data) => {
                    if let Some(length) = &mut self.length {
                        *length = length.saturating_sub(data.len() as u64);
                    }
                    Frame::data(data)
                }
                Part::Trailers(trailers) => Frame::trailers(trailers),
            })
        }))
    }

    /// The response was read to its end: the rest of the request is of no use.
    fn complete(&mut self) {
        if let Some(upload) = self.upload.take() {
            // Fails if it was all sent.
            let _ = upload.send(());
        }
    }
}

impl Drop for H2 {
    fn drop(&mut self) {
        if self.upload.is_some() && self.stream.is_read() {
            self.complete();
        }
        self.lease.get().shared.h2().link().abandon(&self.stream);
    }
}

impl Guard {
    fn get(&self) -> &Lease {
        match self {
            Self::Own(lease) => lease,
            Self::Shared(lease) => lease,
        }
    }
}

impl Body for RecvBody {
    type Data = Bytes;
    type Error = TransportError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        let frame = match &mut self.0 {
            Inner::Ended => return Poll::Ready(None),
            Inner::H2(body) => ready!(body.poll_frame(cx)),
            Inner::H1 { body, lease } => {
                let frame = ready!(Pin::new(&mut *body).poll_frame(cx));
                if body.is_end_stream() || frame.is_none() {
                    lease.dirty = false;
                }
                frame.map(|frame| frame.map_err(|error| h1::from_hyper(error, Some(&lease.shared)).after_headers()))
            }
        };
        let ended = match &frame {
            Some(Ok(frame)) if frame.is_data() => match &self.0 {
                Inner::H1 { lease, .. } => !lease.dirty,
                // Who sees the end may not poll again, and the upload waits for it.
                Inner::H2(body) => body.upload.is_some() && body.stream.is_read(),
                Inner::Ended => false,
            },
            _ => true,
        };
        if ended {
            self.0 = Inner::Ended;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Ended => true,
            Inner::H1 { body, .. } => body.is_end_stream(),
            Inner::H2(body) => body.early.is_none() && body.stream.is_read(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Ended => SizeHint::with_exact(0),
            Inner::H1 { body, .. } => body.size_hint(),
            Inner::H2(body) => body.length.map_or_else(SizeHint::default, SizeHint::with_exact),
        }
    }
}

impl fmt::Debug for RecvBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.0 {
            Inner::Ended => "ended",
            Inner::H1 { .. } => "http/1.1",
            Inner::H2(_) => "http/2",
        };
        f.debug_tuple("RecvBody").field(&state).finish()
    }
}
