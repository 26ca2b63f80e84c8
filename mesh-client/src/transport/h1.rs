//! HTTP/1.1 on hyper: one request at a time, the connection kept alive between them.

use super::{
    BoxError, Connection, Events, Kind, Lease, Origin, RecvBody, Shared, TransportConfig, TransportError, Wire, head,
    io::Stream,
};
use bytes::Bytes;
use http::{
    HeaderMap, Request, Response, Version,
    header::{CONNECTION, HeaderValue},
    request::Parts,
};
use http_body::{Body, Frame, SizeHint};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio::sync::Notify;

/// The sending side of one HTTP/1.1 connection.
pub(super) struct Client {
    /// `None` once shut.
    sender: Mutex<Option<SendRequest<RequestBody>>>,
    aborted: Notify,
}

/// A request body with its type erased; only one that is not all there at once is boxed.
pub(super) enum RequestBody {
    Empty,
    Full(Bytes),
    Stream(Pin<Box<dyn Body<Data = Bytes, Error = BoxError> + Send>>),
}

/// A body, and what was taken from it.
struct Resumed<B> {
    first: Option<Result<Frame<Bytes>, BoxError>>,
    second: Option<Result<Frame<Bytes>, BoxError>>,
    rest: B,
}

pub(super) async fn handshake(
    io: impl Stream,
    config: &TransportConfig,
    origin: Origin,
    events: Option<Arc<dyn Events>>,
) -> Result<Connection, TransportError> {
    let (sender, connection) = http1::Builder::new()
        .handshake::<_, RequestBody>(TokioIo::new(io))
        .await
        .map_err(|error| from_hyper(error, None))?;
    let client = Client { sender: Mutex::new(Some(sender)), aborted: Notify::new() };
    let shared = Arc::new(Shared::new(1, config, origin, events, Wire::H1(client)));
    let driven = Arc::clone(&shared);
    shared.runtime.spawn(async move {
        let _end = End(Arc::clone(&driven));
        tokio::select! {
            result = connection => if let Err(error) = result {
                tracing::debug!(%error, "connection ended");
            },
            () = driven.h1().aborted.notified() => {}
        }
    });
    Ok(Connection(shared))
}

/// Reports the end of the connection, however its task ends.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

/// Sends one request; see [`Lease::open`].
pub(super) async fn send<B>(mut lease: Lease, mut parts: Parts, body: B) -> Result<Response<RecvBody>, TransportError>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    head::http1(&mut parts, &lease.shared.origin)?;
    let mut body = Some(body);
    let body = poll_fn(|cx| Poll::Ready(RequestBody::take(body.take().expect("ready at the first poll"), cx))).await;
    let body = body.map_err(|error| TransportError::new(Kind::RequestBody).with_source(error))?;

    // Between two requests hyper's task has to come round once.
    let ready = poll_fn(|cx| match &mut *lease.shared.h1().sender() {
        Some(sender) => sender.poll_ready(cx).map_err(Some),
        None => Poll::Ready(Err(None)),
    });
    if let Err(error) = ready.await {
        lease.dirty = true;
        let failed = TransportError::new(Kind::NotSent);
        return Err(match error {
            Some(error) => failed.with_source(error),
            None => failed,
        });
    }
    lease.dirty = true;
    let sent = {
        let mut sender = lease.shared.h1().sender();
        let Some(sender) = &mut *sender else {
            return Err(TransportError::new(Kind::NotSent));
        };
        sender.try_send_request(Request::from_parts(parts, body))
    };
    match sent.await {
        Ok(response) => {
            let (parts, body) = response.into_parts();
            if !is_kept_alive(parts.version, &parts.headers) {
                lease.shared.close();
            }
            Ok(Response::from_parts(parts, RecvBody::h1(body, lease)))
        }
        Err(mut error) => {
            // hyper gives back what it did not write.
            let unsent = error.take_message().is_some();
            let error = error.into_error();
            Err(if unsent {
                TransportError::new(Kind::NotSent).with_source(error)
            } else {
                from_hyper(error, Some(&lease.shared))
            })
        }
    }
}

/// RFC 9112 section 9.3.
fn is_kept_alive(version: Version, headers: &HeaderMap) -> bool {
    let has = |token: &str| {
        let lists = headers.get_all(CONNECTION).iter().filter_map(|value: &HeaderValue| value.to_str().ok());
        lists.flat_map(|list| list.split(',')).any(|word| word.trim().eq_ignore_ascii_case(token))
    };
    !has("close") && (version != Version::HTTP_10 || has("keep-alive"))
}

/// What hyper says of a request that may have been written, in our words.
pub(super) fn from_hyper(error: hyper::Error, shared: Option<&Shared>) -> TransportError {
    let kind = if let Some(&cause) = shared.and_then(|shared| shared.cause.get()) {
        cause
    } else if error.is_user() {
        Kind::RequestBody
    } else if error.is_canceled() || error.is_incomplete_message() || error.is_closed() {
        Kind::Closed
    } else if error.is_parse() {
        Kind::Protocol
    } else {
        Kind::Io
    };
    TransportError::new(kind).with_source(error)
}

impl Client {
    fn sender(&self) -> MutexGuard<'_, Option<SendRequest<RequestBody>>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Without a sender hyper closes.
    pub(super) fn shut(&self) {
        let sender = self.sender().take();
        drop(sender);
    }

    pub(super) fn abort(&self) {
        self.shut();
        self.aborted.notify_one();
    }
}

impl RequestBody {
    /// Looks at what the body has ready.
    fn take<B>(mut body: B, cx: &mut Context<'_>) -> Result<Self, BoxError>
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        if body.is_end_stream() {
            return Ok(Self::Empty);
        }
        let known = body.size_hint().exact();
        let first = match Pin::new(&mut body).poll_frame(cx) {
            Poll::Pending => return Ok(Self::boxed(None, None, body)),
            Poll::Ready(None) => return Ok(Self::Empty),
            Poll::Ready(Some(Err(error))) => return Err(error.into()),
            Poll::Ready(Some(Ok(frame))) => frame,
        };
        let data = match first.into_data() {
            Ok(data) => data,
            Err(frame) => return Ok(Self::boxed(Some(Ok(frame)), None, body)),
        };
        if body.is_end_stream() || known == Some(data.len() as u64) {
            return Ok(Self::Full(data));
        }
        match Pin::new(&mut body).poll_frame(cx) {
            Poll::Pending => Ok(Self::boxed(Some(Ok(Frame::data(data))), None, body)),
            Poll::Ready(None) => Ok(Self::Full(data)),
            Poll::Ready(Some(second)) => {
                Ok(Self::boxed(Some(Ok(Frame::data(data))), Some(second.map_err(Into::into)), body))
            }
        }
    }

    fn boxed<B>(
        first: Option<Result<Frame<Bytes>, BoxError>>,
        second: Option<Result<Frame<Bytes>, BoxError>>,
        rest: B,
    ) -> Self
    where
        B: Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        Self::Stream(Box::pin(Resumed { first, second, rest }))
    }
}

impl<B> Body for Resumed<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(frame) = self.first.take().or_else(|| self.second.take()) {
            return Poll::Ready(Some(frame));
        }
        Pin::new(&mut self.rest).poll_frame(cx).map_err(Into::into)
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.second.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let taken: u64 = [&self.first, &self.second]
            .into_iter()
            .filter_map(|frame| Some(frame.as_ref()?.as_ref().ok()?.data_ref()?.len() as u64))
            .sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(taken));
        }
        hint.set_lower(rest.lower().saturating_add(taken));
        hint
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Self::Empty => Poll::Ready(None),
            Self::Full(data) => {
                let data = std::mem::take(data);
                *self = Self::Empty;
                Poll::Ready(Some(Ok(Frame::data(data))))
            }
            Self::Stream(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(_) => false,
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(data) => SizeHint::with_exact(data.len() as u64),
            Self::Stream(body) => body.size_hint(),
        }
    }
}
