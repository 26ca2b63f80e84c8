//! HTTP/2, both sides of RFC 9113.
//!
//! A call encodes its frames right into the bytes that are to be written, behind one lock ([`outbox`]). One task per connection, the
//! [`driver`], moves bytes: it writes what has gathered, and hands what arrives to the streams ([`reader`]), each with a lock of its
//! own, where their calls pick it up ([`stream`]). The server's side ([`server`]) hands on requests ([`request`]) in its task, and each
//! answers by the same outbox ([`exchange`]).

mod driver;
mod exchange;
mod fault;
mod floods;
mod frame;
mod hpack;
mod keepalive;
mod outbox;
mod queue;
mod reader;
mod request;
mod server;
mod stream;
mod upload;
mod wire;

use super::{
    BoxError, Connection, Events, Fate, Kind, Lease, Origin, RecvBody, Shared, TransportConfig, TransportError,
    Wire as Protocol, head,
    io::{Activity, Io},
};
use bytes::Bytes;
use driver::{Alarm, Driver, Engine, Quiet};
use fault::Fault;
pub(super) use fault::reset_reason;
use h2::Reason;
use http::{Response, request::Parts};
use outbox::Link;
use reader::Reader;
pub(super) use server::Conn;
pub(crate) use server::{Control, Server};
use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
};
pub(super) use stream::{Part, Stream};
pub(super) use upload::Upload;
use wire::Wire;

/// The first bytes of a client.
pub(crate) const PREFACE: &[u8] = frame::PREFACE;

/// One HTTP/2 connection.
pub(super) struct Client {
    engine: Arc<Engine>,
}

/// Sends the preface, waits for the peer's SETTINGS, and spawns the driver.
pub(super) async fn handshake(
    io: impl super::Stream,
    config: &TransportConfig,
    origin: Origin,
    events: Option<Arc<dyn Events>>,
) -> Result<Connection, TransportError> {
    let activity = Arc::new(Activity::default());
    let link = Link::client(
        Arc::new(Alarm::default()),
        config.stream_window,
        config.connection_window,
        config.max_header_list_size,
    );
    let reader = Reader::new(config.connection_window, config.max_header_list_size);
    let mut wire = Wire::new(Io::new(io, origin.tls, Arc::clone(&activity)), reader);
    poll_fn(|cx| match wire.poll(&link, cx) {
        Poll::Ready(fault) => Poll::Ready(Err(fault.into_error(None))),
        Poll::Pending if wire.is_settled() => Poll::Ready(Ok(())),
        Poll::Pending => Poll::Pending,
    })
    .await?;

    let limit = link.limit.load(Ordering::SeqCst);
    let engine = Arc::new(Engine::new(link, wire, activity));
    let shared = Arc::new(Shared::new(0, config, origin, events, Protocol::H2(Client { engine })));
    shared.set_limit(limit);
    shared.runtime.spawn(Driver::new(Arc::clone(&shared)));
    if let Some(config) = config.keepalive {
        shared.runtime.spawn(keepalive::run(Arc::clone(&shared), config));
    }
    Ok(Connection(shared))
}

/// One request on its way; see [`Lease::open`].
pub(super) struct Sending<B> {
    stage: Stage<B>,
    /// [`Activity::writes`] before the stream was opened.
    writes: u32,
    /// `None` once the response has it.
    lease: Option<Lease>,
}

enum Stage<B> {
    /// Boxed: most bodies are queued whole when the stream opens, and every call holds room for this.
    Open {
        stream: Arc<Stream>,
        upload: Option<Box<Upload<B>>>,
    },
    Failed(TransportError),
    Done,
}

impl<B> Sending<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    /// Opens the stream and hands over what the body has ready, so that headers and data leave in one write.
    pub(super) fn open(lease: Lease, head: Parts, body: B, cx: &mut Context<'_>) -> Self {
        let writes = lease.shared.h2().engine.activity.writes();
        let stage = open(&lease, head, Upload::new(body), cx).unwrap_or_else(Stage::Failed);
        Self { stage, writes, lease: Some(lease) }
    }
}

impl<B> Future for Sending<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<RecvBody>, TransportError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = &mut *self;
        let Some(shared) = this.lease.as_ref().map(|lease| &lease.shared) else {
            unreachable!("not polled again once it is ready")
        };
        let client = shared.h2();
        let received = match &mut this.stage {
            Stage::Open { stream, upload } => {
                if let Some(sending) = upload {
                    match sending.poll(client.link(), cx) {
                        Poll::Ready(Ok(())) => *upload = None,
                        Poll::Ready(Err(error)) => {
                            client.link().abandon(stream);
                            this.stage = Stage::Done;
                            return Poll::Ready(Err(TransportError::new(Kind::RequestBody).with_source(error)));
                        }
                        Poll::Pending => {}
                    }
                }
                ready!(stream.lock().poll_head(cx.waker()))
            }
            Stage::Failed(_) | Stage::Done => Err(Fault::Cancelled),
        };
        let stage = std::mem::replace(&mut this.stage, Stage::Done);
        match (received, stage) {
            (_, Stage::Failed(error)) => Poll::Ready(Err(error)),
            (Err(fault), _) => {
                let error = fault.into_error(Some(shared));
                // Nothing was written since the stream was queued: it never left.
                let never_left = client.engine.activity.writes() == this.writes;
                Poll::Ready(Err(if never_left { error.unprocessed() } else { error }))
            }
            (Ok((status, headers, ended)), stage) => {
                let Stage::Open { stream, upload } = stage else { unreachable!("only an open stream has a response") };
                let lease = this.lease.take().expect("looked at above");
                let body = RecvBody::h2(stream, &headers, ended, lease, upload);
                let mut response = Response::new(body);
                *response.status_mut() = status;
                *response.headers_mut() = headers;
                *response.version_mut() = http::Version::HTTP_2;
                Poll::Ready(Ok(response))
            }
        }
    }
}

impl<B> Drop for Sending<B> {
    fn drop(&mut self) {
        if let (Stage::Open { stream, .. }, Some(lease)) = (&self.stage, &self.lease) {
            let link = lease.shared.h2().link();
            link.reset(stream, Reason::CANCEL, Fault::Cancelled);
            link.abandon(stream);
        }
    }
}

fn open<B>(lease: &Lease, head: Parts, mut upload: Upload<B>, cx: &mut Context<'_>) -> Result<Stage<B>, TransportError>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    let body_failed = |error| TransportError::new(Kind::RequestBody).with_source(error);
    let head = head::http2(head, upload.length(), &lease.shared.origin)?;
    let has_body = upload.prime(cx).map_err(body_failed)?;
    let client = lease.shared.h2();
    // The peer lowered its limit since the stream was reserved.
    if lease.shared.load.snapshot().in_flight() > lease.shared.limit.load(Ordering::SeqCst) {
        return Err(TransportError::new(Kind::NotSent));
    }
    // With nothing else in flight, the driver's work is done here and now, without a task switch. With requests in
    // flight that would break up the driver's batches.
    let _quiet = lease.alone.then(|| Quiet::new(&client.engine));
    // From here on it ends before the quiet does.
    let mut upload = upload;
    let (chunk, last) = if has_body { upload.first() } else { (None, true) };
    let stream = client.link().open(&head, chunk, last).map_err(|fault| {
        if matches!(fault, Fault::GoAway(..)) {
            lease.shared.close();
        }
        fault.into_error(Some(&lease.shared)).unprocessed()
    })?;
    if !has_body || upload.start(&stream) {
        return Ok(Stage::Open { stream, upload: None });
    }
    let upload = match upload.poll(client.link(), cx) {
        Poll::Ready(Ok(())) => None,
        Poll::Ready(Err(error)) => {
            client.link().abandon(&stream);
            return Err(body_failed(error));
        }
        Poll::Pending => Some(Box::new(upload)),
    };
    Ok(Stage::Open { stream, upload })
}

impl Client {
    pub(super) fn link(&self) -> &Link {
        &self.engine.link
    }

    /// Nothing is in flight: says goodbye and closes.
    pub(super) fn shut(&self) {
        self.engine.shut();
    }

    /// What was heard of the connection's end.
    pub(super) fn fate(&self) -> Option<Fate> {
        self.engine.fate.get().copied()
    }

    pub(super) fn abort(&self) {
        self.engine.abort();
    }
}
