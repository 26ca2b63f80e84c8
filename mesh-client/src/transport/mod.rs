//! One connection, HTTP/2 or HTTP/1.1: to an endpoint, driven from the caller's own future; or of a client, driven by one task.

mod body;
mod config;
mod error;
mod fate;
mod h1;
mod h1_dues;
mod h1_server;
mod h2;
mod head;
mod io;
mod load;
mod overdue;
mod request_body;

pub use body::RecvBody;
pub use config::Keepalive;
pub(crate) use config::{Origin, Protocol, ServerConfig, TransportConfig};
pub use error::{Kind, TransportError};
pub(crate) use fate::Fate;
pub(crate) use h1_server::serve_http1;
pub(crate) use h2::{Control, PREFACE, Server};
pub(crate) use io::Stream;
pub(crate) use overdue::{LOOKS, is_told as is_told_overdue};
pub use request_body::{RequestBody, RequestBodyError};

use bytes::Bytes;
use http::{Request, Response, request::Parts};
use load::Load;
use mesh_tls::PeerIdentity;
use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    task::{Context, Poll},
};
use tokio::{runtime::Handle, sync::Notify};

/// Of one connection: HTTP/2 has identifiers for 2^30 streams.
const MAX_REQUESTS: u32 = 1_000_000_000;

/// Any error, boxed.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Counts a request that a server does not serve, whoever asks.
pub(crate) fn count_refused(reason: &'static str) {
    metrics::counter!("mesh_inbound_requests_refused_total", "reason" => reason).increment(1);
}

/// What the owner of a connection wants to hear of it. Called from any task; must not block.
pub(crate) trait Events: Send + Sync + 'static {
    /// A stream ended while [`Connection::set_starved`] was on: there is room for one.
    fn capacity(&self);

    /// The peer raised its limit while [`Connection::set_starved`] was on: there may be room for many.
    fn raised(&self);

    /// The connection takes no new streams any more.
    fn unusable(&self);
}

/// A handle of one connection, cheap to clone.
///
/// The connection does not end with its handles: whoever opened it calls [`drain`](Self::drain) in the end.
#[derive(Clone)]
pub(crate) struct Connection(Arc<Shared>);

/// One stream reserved on one connection.
///
/// It moves into the request's future and then into the response body, and is given back when the body ends or any of
/// them is dropped.
pub(crate) struct Lease {
    shared: Arc<Shared>,
    /// No other stream was in flight when this one was reserved.
    alone: bool,
    /// An HTTP/1.1 exchange has begun and not ended: the connection cannot be used again.
    dirty: bool,
}

/// The future of [`Lease::open`]. Small, because every call holds one.
#[must_use = "dropping it resets the stream"]
pub(crate) struct Sending<B>(Protocols<B>);

enum Protocols<B> {
    Http1(Pin<Box<dyn Future<Output = Result<Response<RecvBody>, TransportError>> + Send>>),
    Http2(h2::Sending<B>),
}

struct Shared {
    load: Load,
    /// Streams the peer allows; HTTP/1.1: 1.
    limit: AtomicU32,
    /// Streams we open at once, whatever the peer allows.
    cap: u32,
    /// Someone waits for a stream of this connection.
    starved: AtomicBool,
    ended: AtomicBool,
    ending: Notify,
    /// Why we closed it, if we did.
    cause: OnceLock<Kind>,
    events: Option<Arc<dyn Events>>,
    origin: Origin,
    max_requests: u32,
    runtime: Handle,
    wire: Wire,
}

enum Wire {
    H1(h1::Client),
    H2(h2::Client),
}

impl Connection {
    /// Speaks `protocol` over `io` and spawns the task that drives it.
    ///
    /// HTTP/2 is ready once the peer's SETTINGS arrived (as in gRPC: a peer that accepts and says nothing never is).
    ///
    /// # Errors
    ///
    /// The connection was closed, or does not speak the protocol.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future closes `io`. The caller bounds the time.
    pub(crate) async fn handshake(
        io: impl Stream,
        protocol: Protocol,
        config: &TransportConfig,
        origin: Origin,
        events: Option<Arc<dyn Events>>,
    ) -> Result<Self, TransportError> {
        tracing::debug!(authority = %origin.authority, tls = origin.tls, ?protocol, "connecting");
        let connection = match protocol {
            Protocol::Http1 => h1::handshake(io, config, origin, events).await?,
            Protocol::Http2 => h2::handshake(io, config, origin, events).await?,
        };
        tracing::debug!(streams = connection.0.limit.load(Ordering::SeqCst), "connected");
        Ok(connection)
    }

    /// Open: no GOAWAY, not draining.
    pub(crate) fn is_usable(&self) -> bool {
        !self.0.load.snapshot().is_closed()
    }

    /// Usable, and fewer streams in flight than the peer allows now (HTTP/1.1: idle).
    pub(crate) fn has_capacity(&self) -> bool {
        let now = self.0.load.snapshot();
        !now.is_closed() && now.in_flight() < self.0.limit.load(Ordering::SeqCst)
    }

    /// Streams that can be opened now; 0 when it is not usable.
    pub(crate) fn room(&self) -> u32 {
        let now = self.0.load.snapshot();
        if now.is_closed() { 0 } else { self.0.limit.load(Ordering::SeqCst).saturating_sub(now.in_flight()) }
    }

    /// Streams in flight: reserved, and not yet ended.
    pub(crate) fn in_flight(&self) -> u32 {
        self.0.load.snapshot().in_flight()
    }

    /// Streams reserved so far, wrapping.
    pub(crate) fn started(&self) -> u32 {
        self.0.load.snapshot().started()
    }

    /// Reserves a stream, if there is capacity.
    pub(crate) fn lease(&self) -> Option<Lease> {
        let shared = &self.0;
        let limit = shared.limit.load(Ordering::SeqCst);
        let now = shared.load.try_start(limit)?;
        let lease = Lease { shared: Arc::clone(shared), alone: now.in_flight() == 1, dirty: false };
        if now.started() == shared.max_requests {
            shared.close();
        }
        Some(lease)
    }

    /// While on, [`Events::capacity`] and [`Events::raised`] are called whenever streams become free.
    pub(crate) fn set_starved(&self, starved: bool) {
        self.0.starved.store(starved, Ordering::SeqCst);
    }

    /// Takes no new stream, and closes when the last one ends.
    pub(crate) fn drain(&self) {
        self.0.close();
    }

    /// Closes now; streams in flight fail for this reason.
    pub(crate) fn abort(&self, reason: Kind) {
        self.0.abort(reason);
    }

    /// Why it ended, once it has.
    pub(crate) fn fate(&self) -> Fate {
        let own = match &self.0.wire {
            Wire::H1(_) => None,
            Wire::H2(client) => client.fate(),
        };
        match self.0.cause.get() {
            Some(Kind::KeepaliveTimeout) => Fate::Silent,
            Some(_) => Fate::Cut,
            None if self.started() >= self.0.max_requests => Fate::Requests,
            None => own.unwrap_or(Fate::Unknown),
        }
    }

    /// Waits until the connection is closed and its task is over.
    pub(crate) async fn closed(&self) {
        self.0.closed().await;
    }

    /// True for handles of the same connection.
    pub(crate) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Lease {
    /// Who the peer is, over TLS.
    pub(crate) fn peer(&self) -> Option<&PeerIdentity> {
        self.shared.origin.peer.as_ref()
    }

    /// Sends a request: what can leave at once does. The future waits for the response headers.
    ///
    /// Headers and the first frame of the body leave in one write. A body that is not at its end when the response
    /// headers arrive goes on being sent by a task of its own, until its end, a reset, or the end or drop of the response
    /// body: what a peer that answered in full has not read, it does not want (RFC 9113 section 8.1).
    /// A unary call spawns and boxes nothing. The body is polled for the caller's task, which goes on polling the future.
    ///
    /// # Errors
    ///
    /// Those of the future: see [`Kind`]; [`TransportError::is_unprocessed`] says when the request may be sent again.
    ///
    /// # Cancel safety
    ///
    /// Dropping the future resets the stream (HTTP/1.1: closes the connection) and gives the stream back.
    pub(crate) fn open<B>(self, head: Parts, body: B, cx: &mut Context<'_>) -> Sending<B>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        match self.shared.wire {
            Wire::H1(_) => Sending(Protocols::Http1(Box::pin(h1::send(self, head, body)))),
            Wire::H2(_) => Sending(Protocols::Http2(h2::Sending::open(self, head, body, cx))),
        }
    }

    /// [`open`](Self::open), when the future is first polled.
    pub(crate) async fn send<B>(self, request: Request<B>) -> Result<Response<RecvBody>, TransportError>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let (head, body) = request.into_parts();
        let mut unsent = Some((self, head, body));
        let opened = poll_fn(|cx| {
            let (lease, head, body) = unsent.take().expect("polled once: it is ready at once");
            Poll::Ready(lease.open(head, body, cx))
        });
        opened.await.await
    }
}

impl<B> Future for Sending<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response<RecvBody>, TransportError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut self.0 {
            Protocols::Http1(sending) => sending.as_mut().poll(cx),
            Protocols::Http2(sending) => Pin::new(sending).poll(cx),
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.dirty {
            self.shared.close();
        }
        let now = self.shared.load.finish();
        if now.is_closed() {
            if now.in_flight() == 0 {
                self.shared.wire.shut();
            }
        } else if self.shared.starved.load(Ordering::SeqCst)
            && let Some(events) = &self.shared.events
        {
            events.capacity();
        }
    }
}

impl Shared {
    fn new(limit: u32, config: &TransportConfig, origin: Origin, events: Option<Arc<dyn Events>>, wire: Wire) -> Self {
        Self {
            load: Load::default(),
            limit: AtomicU32::new(limit),
            cap: config.max_concurrent_streams.unwrap_or(u32::MAX),
            starved: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            ending: Notify::new(),
            cause: OnceLock::new(),
            events,
            origin,
            max_requests: config.max_requests.map_or(MAX_REQUESTS, |max| max.clamp(1, MAX_REQUESTS)),
            runtime: Handle::current(),
            wire,
        }
    }

    /// Takes no new stream from now on.
    fn close(&self) {
        let before = self.load.close();
        if before.is_closed() {
            return;
        }
        if before.in_flight() == 0 {
            self.wire.shut();
        }
        if let Some(events) = &self.events {
            events.unusable();
        }
    }

    /// Closes at once, for a reason that streams in flight report.
    fn abort(&self, kind: Kind) {
        // The first reason counts.
        let _ = self.cause.set(kind);
        self.close();
        self.wire.abort();
    }

    fn set_limit(&self, limit: u32) {
        let limit = limit.min(i32::MAX as u32).min(self.cap);
        if self.limit.swap(limit, Ordering::SeqCst) < limit
            && self.starved.load(Ordering::SeqCst)
            && let Some(events) = &self.events
        {
            events.raised();
        }
    }

    /// The task that drove the connection is over.
    fn end(&self) {
        self.close();
        self.ended.store(true, Ordering::SeqCst);
        self.ending.notify_waiters();
    }

    async fn closed(&self) {
        let mut ending = std::pin::pin!(self.ending.notified());
        ending.as_mut().enable();
        if !self.ended.load(Ordering::SeqCst) {
            ending.await;
        }
    }

    fn h1(&self) -> &h1::Client {
        match &self.wire {
            Wire::H1(client) => client,
            Wire::H2(_) => unreachable!("the caller matched on the protocol"),
        }
    }

    fn h2(&self) -> &h2::Client {
        match &self.wire {
            Wire::H2(client) => client,
            Wire::H1(_) => unreachable!("the caller matched on the protocol"),
        }
    }
}

impl Wire {
    /// Nothing is in flight and nothing will be: say goodbye and close.
    fn shut(&self) {
        match self {
            Self::H1(client) => client.shut(),
            Self::H2(client) => client.shut(),
        }
    }

    fn abort(&self) {
        match self {
            Self::H1(client) => client.abort(),
            Self::H2(client) => client.abort(),
        }
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("in_flight", &self.in_flight())
            .field("usable", &self.is_usable())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("alone", &self.alone).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
