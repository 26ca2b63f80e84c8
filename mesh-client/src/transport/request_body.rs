//! The request body that a server reads, of both protocols.

use super::{
    TransportError, h1,
    h1_dues::Dues,
    h2::{Conn, Part, Stream},
};
use crate::headers::find;
use bytes::Bytes;
use http::{
    header::{CONTENT_LENGTH, EXPECT},
    request,
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::BoxBody;
use hyper::body::Incoming;
use std::{
    convert::Infallible,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

/// The body of a request, as a service of [`Inbound::serve`](crate::Inbound::serve) reads it. It is the flow control: once the window is
/// full, the client sends what was read.
///
/// What is not read when it is dropped is thrown away, and the client may stop sending it once it has its answer.
pub struct RequestBody(Inner);

/// Why a request's body broke off.
#[derive(Debug, thiserror::Error)]
#[error("the request's body broke off: {0}")]
pub struct RequestBodyError(#[source] TransportError);

enum Inner {
    Ended,
    H1(H1),
    H2(H2),
    /// It was read before.
    Whole(BoxBody<Bytes, Infallible>),
}

struct H1 {
    body: Incoming,
    dues: Arc<Dues>,
}

struct H2 {
    conn: Arc<Conn>,
    stream: Arc<Stream>,
    /// Bytes to come, where `content-length` said.
    length: Option<u64>,
    /// The client waits to be asked for it.
    expects: bool,
    /// It was read to its end.
    read: bool,
}

impl RequestBody {
    pub(super) fn empty() -> Self {
        Self(Inner::Ended)
    }

    /// One that was read before.
    pub(crate) fn whole(body: impl Body<Data = Bytes, Error = Infallible> + Send + Sync + 'static) -> Self {
        Self(if body.is_end_stream() { Inner::Ended } else { Inner::Whole(BoxBody::new(body)) })
    }

    pub(super) fn h1(body: Incoming, dues: &Arc<Dues>) -> Self {
        Self(if body.is_end_stream() { Inner::Ended } else { Inner::H1(H1 { body, dues: Arc::clone(dues) }) })
    }

    pub(super) fn h2(conn: &Arc<Conn>, stream: &Arc<Stream>, head: &request::Parts) -> Self {
        let length = find(&head.headers, &CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        let expects =
            find(&head.headers, &EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
        Self(Inner::H2(H2 { conn: Arc::clone(conn), stream: Arc::clone(stream), length, expects, read: false }))
    }
}

impl H2 {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, TransportError>>> {
        let part = match self.conn.link.poll_part(&self.stream, cx) {
            Poll::Ready(part) => part,
            Poll::Pending => {
                if std::mem::take(&mut self.expects) {
                    self.conn.link.ask(&self.stream);
                }
                return Poll::Pending;
            }
        };
        self.read = !matches!(part, Some(Ok(Part::Data(_))));
        Poll::Ready(part.map(|part| match part {
            Ok(Part::Data(data)) => {
                self.expects = false;
                if let Some(length) = &mut self.length {
                    *length = length.saturating_sub(data.len() as u64);
                }
                Ok(Frame::data(data))
            }
            Ok(Part::Trailers(trailers)) => Ok(Frame::trailers(trailers)),
            Err(fault) => Err(fault.into_error(None).after_headers()),
        }))
    }
}

impl Drop for H1 {
    fn drop(&mut self) {
        self.dues.awaits_body(false);
    }
}

impl Drop for H2 {
    fn drop(&mut self) {
        if !self.read {
            self.conn.link.ignore(&self.stream);
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = RequestBodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, RequestBodyError>>> {
        let frame = match &mut self.0 {
            Inner::Ended => None,
            Inner::H1(H1 { body, dues }) => {
                let frame = Pin::new(body).poll_frame(cx);
                dues.awaits_body(frame.is_pending());
                ready!(frame).map(|frame| frame.map_err(|error| h1::from_hyper(error, None)))
            }
            Inner::H2(body) => ready!(body.poll_frame(cx)),
            Inner::Whole(body) => {
                ready!(Pin::new(body).poll_frame(cx)).map(|frame| frame.map_err(|never| match never {}))
            }
        };
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            self.0 = Inner::Ended;
        }
        Poll::Ready(frame.map(|frame| frame.map_err(RequestBodyError)))
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Ended => true,
            Inner::H1(H1 { body, .. }) => body.is_end_stream(),
            Inner::H2(body) => body.stream.is_read(),
            Inner::Whole(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Ended => SizeHint::with_exact(0),
            Inner::H1(H1 { body, .. }) => body.size_hint(),
            Inner::H2(body) => body.length.map_or_else(SizeHint::default, SizeHint::with_exact),
            Inner::Whole(body) => body.size_hint(),
        }
    }
}

impl fmt::Debug for RequestBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match &self.0 {
            Inner::Ended => "ended",
            Inner::H1(_) => "http/1.1",
            Inner::H2(_) => "http/2",
            Inner::Whole(_) => "whole",
        };
        f.debug_tuple("RequestBody").field(&state).finish()
    }
}
