//! HTTP/2, straight on the `h2` crate.

mod driver;
mod keepalive;
mod upload;

use super::{
    BoxError, Connection, Events, Fate, Kind, Lease, Origin, RecvBody, Shared, TransportConfig, TransportError, Wire,
    head,
    io::{Activity, Io, Stream},
};
use bytes::Bytes;
use driver::{Driver, Engine, Quiet};
use h2::{
    SendStream,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::{Request, Response, request::Parts};
use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
pub(super) use upload::Upload;

/// The stream limit before the peer's SETTINGS: a value no peer can send.
const UNSETTLED: usize = usize::MAX - 1;
/// Streams we reset are remembered this long, so that frames which crossed the RST_STREAM are ignored, not errors.
const RESET_MEMORY: Duration = Duration::from_secs(10);
const RESET_MEMORY_STREAMS: usize = 4096;
/// Stream errors of the peer in the life of a connection, after which it is closed.
const MAX_STREAM_ERRORS: usize = 65_536;
/// Bytes of bookkeeping for DATA frames that wait to be read. h2's default, half the connection window, closes the
/// connection on a slow reader of 10,000 tiny messages; the stream window already bounds their number.
const FRAME_OVERHEAD: usize = 256 << 20;

/// The sending side of one HTTP/2 connection.
pub(super) struct Client {
    /// `None` once shut.
    sender: Mutex<Option<SendRequest<Bytes>>>,
    engine: Arc<Engine>,
}

/// Sends the preface, waits for the peer's SETTINGS, and spawns the driver.
pub(super) async fn handshake(
    io: impl Stream,
    config: &TransportConfig,
    origin: Origin,
    events: Option<Arc<dyn Events>>,
) -> Result<Connection, TransportError> {
    let activity = Arc::new(Activity::default());
    let (sender, mut connection) = Builder::new()
        .initial_window_size(config.stream_window)
        .initial_connection_window_size(config.connection_window)
        .max_header_list_size(config.max_header_list_size)
        .enable_push(false)
        .initial_max_send_streams(UNSETTLED)
        .max_concurrent_reset_streams(RESET_MEMORY_STREAMS)
        .reset_stream_duration(RESET_MEMORY)
        .max_local_error_reset_streams(Some(MAX_STREAM_ERRORS))
        .data_frame_budget(FRAME_OVERHEAD)
        .handshake::<_, Bytes>(Io::new(io, Arc::clone(&activity)))
        .await
        .map_err(|error| from_h2(error, None))?;
    poll_fn(|cx| match Pin::new(&mut connection).poll(cx) {
        Poll::Ready(Ok(())) => Poll::Ready(Err(TransportError::new(Kind::Closed))),
        Poll::Ready(Err(error)) => Poll::Ready(Err(from_h2(error, None))),
        Poll::Pending if connection.max_concurrent_send_streams() == UNSETTLED => Poll::Pending,
        Poll::Pending => Poll::Ready(Ok(())),
    })
    .await?;

    let pings = config.keepalive.zip(connection.ping_pong());
    let probe = sender.clone();
    let limit = connection.max_concurrent_send_streams();
    let engine = Arc::new(Engine::new(connection, activity));
    let client = Client { sender: Mutex::new(Some(sender)), engine: Arc::clone(&engine) };
    let shared = Arc::new(Shared::new(0, config, origin, events, Wire::H2(client)));
    shared.set_limit(limit);
    shared.runtime.spawn(Driver::new(Arc::clone(&shared), probe));
    if let Some((config, pings)) = pings {
        shared.runtime.spawn(keepalive::run(Arc::clone(&shared), pings, config));
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
        response: ResponseFuture,
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
        let Stage::Open { response, upload } = &mut this.stage else {
            let Stage::Failed(error) = std::mem::replace(&mut this.stage, Stage::Done) else {
                unreachable!("not polled again once it is ready")
            };
            return Poll::Ready(Err(error));
        };
        if let Some(sending) = upload {
            match sending.poll(cx) {
                Poll::Ready(Ok(())) => *upload = None,
                Poll::Ready(Err(error)) => {
                    return Poll::Ready(Err(TransportError::new(Kind::RequestBody).with_source(error)));
                }
                Poll::Pending => {}
            }
        }
        let received = ready!(Pin::new(response).poll(cx));
        let upload = upload.take();
        this.stage = Stage::Done;
        let lease = this.lease.take().expect("not polled again once it is ready");
        let (parts, stream) = received
            .map_err(|error| {
                let error = from_h2(error, Some(&lease.shared));
                // Nothing was written since the stream was queued: it never left.
                if lease.shared.h2().engine.activity.writes() == this.writes { error.unprocessed() } else { error }
            })?
            .into_parts();
        let body = RecvBody::h2(stream, &parts.headers, lease, upload);
        Poll::Ready(Ok(Response::from_parts(parts, body)))
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
    // With nothing else in flight, the driver's work is done here and now, without a task switch. With requests in
    // flight that would break up the driver's batches.
    let _quiet = lease.alone.then(|| Quiet::new(&client.engine));
    // From here on it ends before the quiet does.
    let mut upload = upload;
    let (response, stream) = client.send(lease, head, !has_body)?;
    if !has_body {
        return Ok(Stage::Open { response, upload: None });
    }
    upload.start(stream);
    let upload = match upload.poll(cx) {
        Poll::Ready(result) => result.map(|()| None).map_err(body_failed)?,
        Poll::Pending => Some(Box::new(upload)),
    };
    Ok(Stage::Open { response, upload })
}

impl Client {
    /// Queues the head of a request.
    fn send(
        &self,
        lease: &Lease,
        head: Request<()>,
        ends: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), TransportError> {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(shared) = &mut *sender else {
            return Err(TransportError::new(Kind::NotSent));
        };
        let (sent, refused) = if lease.roomy {
            let sent = shared.send_request(head, ends);
            // The peer lowered its limit just now: a stream of ours waits for room, and no other may before it has some.
            let refused = sent.is_err() && shared.poll_ready(&mut Context::from_waker(Waker::noop())).is_pending();
            if refused {
                *shared = shared.clone();
            }
            (sent, refused)
        } else {
            // A sender takes nothing more while a stream of its own waits: near the limit each stream has its own. Otherwise it would
            // be two more locks of what all streams share.
            let mut own = shared.clone();
            drop(sender);
            (own.send_request(head, ends), false)
        };
        sent.map_err(|error| {
            if error.is_go_away() && error.is_remote() {
                lease.shared.close();
            }
            match from_h2(error, Some(&lease.shared)) {
                _ if refused => TransportError::new(Kind::NotSent),
                // Sent again, it would fail again.
                error if error.kind() == Kind::InvalidRequest => error,
                error => error.unprocessed(),
            }
        })
    }

    fn take_sender(&self) -> Option<SendRequest<Bytes>> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Without a sender h2 says GOAWAY and closes.
    pub(super) fn shut(&self) {
        drop(self.take_sender());
        self.engine.shut();
    }

    /// What was heard of the connection's end.
    pub(super) fn fate(&self) -> Option<Fate> {
        self.engine.fate.get().copied()
    }

    pub(super) fn abort(&self) {
        drop(self.take_sender());
        self.engine.abort();
    }
}

/// What h2 says, in our words. A GOAWAY error of the peer reaches only the streams it will not process.
pub(super) fn from_h2(error: h2::Error, shared: Option<&Shared>) -> TransportError {
    let cause = shared.and_then(|shared| shared.cause.get());
    let kind = match error.reason() {
        _ if error.is_io() => match cause {
            Some(&cause) => cause,
            None if error.get_io().is_some_and(|io| io.kind() == std::io::ErrorKind::BrokenPipe) => Kind::Closed,
            None => Kind::Io,
        },
        Some(_) if error.is_go_away() => match cause {
            Some(&cause) => cause,
            None if error.is_remote() => Kind::GoAway,
            None => Kind::Protocol,
        },
        Some(h2::Reason::REFUSED_STREAM) if error.is_remote() => Kind::RefusedStream,
        Some(reason) if error.is_remote() => Kind::Reset(reason),
        Some(_) => Kind::Protocol,
        None => Kind::InvalidRequest,
    };
    TransportError::new(kind).with_source(error)
}

/// Whether a connection with this sender takes new streams.
///
/// # Errors
/// It does not; and what was heard of its end.
fn is_open(sender: &mut SendRequest<Bytes>) -> Result<(), Option<Fate>> {
    match sender.poll_ready(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(Ok(())) => Ok(()),
        Poll::Ready(Err(error)) => Err(Some(Fate::of(&error))),
        Poll::Pending => Err(None),
    }
}
