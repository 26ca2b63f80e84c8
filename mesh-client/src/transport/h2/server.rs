//! The server's side of a connection: one task, which reads, runs what it can at once, and writes.

use super::{
    driver::Alarm,
    exchange::{Exchange, Served},
    fault::Fault,
    frame, keepalive,
    outbox::Link,
    reader::Reader,
    request::{Accepted, Requests},
    wire::Wire,
};
use crate::transport::{
    BoxError, RequestBody, ServerConfig,
    io::{Activity, Io},
};
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Response};
use http_body::Body;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, SystemTime},
};
use tokio::{
    task::AbortHandle,
    time::{Instant, Sleep, sleep},
};
use tower_service::Service;

/// How long a connection may take to say goodbye.
const FAREWELL: Duration = Duration::from_secs(5);
/// How long its client may then take to close: what we did not read would cost it our last answer.
const LINGER: Duration = Duration::from_secs(1);

/// A handler that computes for so long before it first waits holds up the connection.
const LONG: Duration = Duration::from_micros(100);
/// And all that arrived together.
const BATCH: Duration = Duration::from_millis(1);
/// Requests that go round then.
const DETOUR: u32 = 256;

const RUNNING: u8 = 0;
const LEAVING: u8 = 1;
const ABORTED: u8 = 2;

/// What the driver of a connection and its requests share.
pub(in crate::transport) struct Conn {
    pub(in crate::transport) link: Link,
    pub(super) activity: Arc<Activity>,
    phase: AtomicU8,
    /// The driver is to look for requests whose clients owe something.
    look: AtomicBool,
}

/// Ends a connection from outside.
#[derive(Clone)]
pub(crate) struct Control(Arc<Conn>);

/// The future that drives a connection and serves its requests.
#[must_use = "nothing is served unless it is polled"]
pub(crate) struct Server<S, B>
where
    S: Service<Request<RequestBody>>,
{
    conn: Arc<Conn>,
    wire: Wire,
    runner: Runner<S, B>,
    yielded: bool,
    leaving: Option<Leaving>,
    notice: Duration,
    /// How long a client may owe something of a request.
    stream_idle: Option<Duration>,
    /// The watch over a silent client.
    keepalive: Option<AbortHandle>,
}

/// How far a goodbye has come.
enum Leaving {
    /// GOAWAY without a last stream was sent, with a PING: what crosses it is still served.
    Told { ping: Option<u32>, until: Pin<Box<Sleep>> },
    /// GOAWAY with the last stream.
    Final,
    /// All is answered.
    Closing { until: Pin<Box<Sleep>> },
    /// All is written; the client has to close.
    Lingering { until: Pin<Box<Sleep>> },
}

impl Conn {
    /// A request is over.
    pub(super) fn served(&self, header_bytes: u32) {
        if self.link.served(header_bytes) && self.phase.load(Ordering::SeqCst) != RUNNING {
            self.link.alarm.ring();
        }
    }

    /// The driver drops the connection.
    pub(super) fn abort(&self) {
        self.phase.store(ABORTED, Ordering::SeqCst);
        self.link.alarm.ring();
    }
}

impl Control {
    /// Says goodbye: what is in progress goes on, new requests are refused after a moment, then the connection closes.
    pub(crate) fn leave(&self) {
        self.0.phase.fetch_max(LEAVING, Ordering::SeqCst);
        self.0.link.alarm.ring();
    }

    /// Closes at once.
    pub(crate) fn abort(&self) {
        self.0.abort();
    }

    /// Looks for requests whose clients owe something, and ends those that have for too long: to be called now and then.
    pub(crate) fn look(&self) {
        self.0.look.store(true, Ordering::Relaxed);
        self.0.link.alarm.ring();
    }

    /// Requests in progress.
    pub(crate) fn serving(&self) -> u32 {
        self.0.link.serving()
    }

    /// Changes when a request begins.
    pub(crate) fn started(&self) -> u32 {
        self.0.link.started.load(Ordering::Relaxed)
    }

    /// What the client has begun to say and not finished: the same while it is the same, `None` if there is nothing.
    pub(crate) fn unfinished(&self) -> Option<(u32, u32)> {
        self.0.link.unfinished()
    }
}

impl<S, B> Server<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
{
    /// Speaks HTTP/2 over `io`. `read` is what was read of it already, behind the client's preface.
    pub(crate) fn new(io: impl crate::transport::Stream, read: BytesMut, config: &ServerConfig, service: S) -> Self {
        let activity = Arc::new(Activity::default());
        let link = Link::server(Arc::new(Alarm::default()), config);
        let requests = Requests::new(config, Instant::now());
        let reader = Reader::server(config, requests);
        let wire = Wire::new(Io::new(io, false, Arc::clone(&activity)), reader).after(read);
        let conn = Conn { link, activity, phase: AtomicU8::new(RUNNING), look: AtomicBool::new(false) };
        let conn = Arc::new(conn);
        let keepalive =
            config.keepalive.map(|config| tokio::spawn(keepalive::of_server(Arc::clone(&conn), config)).abort_handle());
        Self {
            conn,
            wire,
            runner: Runner { service, place: None, detour: 0 },
            yielded: false,
            leaving: None,
            notice: config.notice,
            stream_idle: config.stream_idle,
            keepalive,
        }
    }

    pub(crate) fn control(&self) -> Control {
        Control(Arc::clone(&self.conn))
    }
}

/// Where requests begin, one after the other: one that is answered at once leaves the place free for the next.
struct Runner<S, B>
where
    S: Service<Request<RequestBody>>,
{
    service: S,
    place: Option<Pin<Box<Place<S, B>>>>,
    /// So many of the next requests begin in tasks of their own.
    detour: u32,
}

type Place<S, B> = Option<Exchange<S, B>>;

/// A request that was not answered at once.
struct Rest<S, B>(Pin<Box<Place<S, B>>>)
where
    S: Service<Request<RequestBody>>;

impl<S, B> Future for Rest<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>>,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        match self.0.as_mut().as_pin_mut() {
            Some(exchange) => exchange.poll(cx),
            None => Poll::Ready(()),
        }
    }
}

impl<S, B> Runner<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    /// Serves requests as far as each goes at once; the rest of it is a task of its own.
    fn serve_all(&mut self, conn: &Arc<Conn>, accepted: impl Iterator<Item = Accepted>, cx: &mut Context<'_>) {
        let begin = Instant::now();
        let mut before = begin;
        for accepted in accepted {
            if self.detour > 0 || before.duration_since(begin) > BATCH {
                self.detour = self.detour.saturating_sub(1);
                self.spawn(conn, accepted);
                continue;
            }
            self.serve(conn, accepted, cx);
            let now = Instant::now();
            if now.duration_since(before) > LONG {
                // Others wait behind it, and other threads may have nothing to do.
                self.detour = DETOUR;
            }
            before = now;
        }
    }

    /// Serves a request in a task of its own from its beginning.
    fn spawn(&mut self, conn: &Arc<Conn>, accepted: Accepted) {
        let (served, bodiless, request) = begin(conn, accepted);
        let fresh = self.service.clone();
        let service = std::mem::replace(&mut self.service, fresh);
        tokio::spawn(Exchange::waiting(served, bodiless, service, request));
    }

    fn serve(&mut self, conn: &Arc<Conn>, accepted: Accepted, cx: &mut Context<'_>) {
        let (served, bodiless, request) = begin(conn, accepted);
        let place = self.place.get_or_insert_with(|| Box::pin(None));
        let service = &mut self.service;
        let polled = catch_unwind(AssertUnwindSafe(|| {
            let exchange = match service.poll_ready(cx) {
                Poll::Ready(Ok(())) => Exchange::called(served, bodiless, service.call(request)),
                // Whoever was asked has a place in some line: it waits there, and a clone is asked next.
                Poll::Pending | Poll::Ready(Err(_)) => {
                    let fresh = service.clone();
                    Exchange::waiting(served, bodiless, std::mem::replace(service, fresh), request)
                }
            };
            place.set(Some(exchange));
            let poll = place.as_mut().as_pin_mut().map_or(Poll::Ready(()), |exchange| exchange.poll(cx));
            if poll.is_ready() {
                place.set(None);
            }
            poll
        }));
        match polled {
            Ok(Poll::Ready(())) => {}
            Ok(Poll::Pending) => {
                if let Some(place) = self.place.take() {
                    tokio::spawn(Rest(place));
                }
            }
            // A panic was told by its hook, and resets the stream as it is dropped; that may be one as well.
            Err(_) => _ = catch_unwind(AssertUnwindSafe(|| place.set(None))),
        }
    }
}

/// A request, its place among those in progress, and whether its answer has no body.
fn begin(conn: &Arc<Conn>, accepted: Accepted) -> (Served, bool, Request<RequestBody>) {
    let Accepted { head, stream, ended, header_bytes } = accepted;
    let bodiless = head.method == Method::HEAD;
    let body = if ended { RequestBody::empty() } else { RequestBody::h2(conn, &stream, &head) };
    (Served::new(conn, stream, header_bytes), bodiless, Request::from_parts(head, body))
}

impl<S, B> Unpin for Server<S, B> where S: Service<Request<RequestBody>> {}

impl<S, B> Future for Server<S, B>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let Self { conn, wire, runner, yielded, leaving, notice, stream_idle, .. } = &mut *self;
        // Once woken, let the scheduler go round: what else arrives and is answered meanwhile leaves in the same write.
        if !*yielded && conn.link.serving() > 0 {
            *yielded = true;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        *yielded = false;
        conn.link.alarm.wakes(cx.waker());
        match conn.phase.load(Ordering::SeqCst) {
            RUNNING => {}
            LEAVING => {
                if Leaving::poll(leaving, *notice, conn, wire, cx).is_ready() {
                    return Poll::Ready(());
                }
            }
            _ => return Poll::Ready(()),
        }
        if conn.look.load(Ordering::Relaxed) {
            conn.look.store(false, Ordering::Relaxed);
            if let Some(limit) = *stream_idle {
                wire.end_overdue(limit, Instant::now());
            }
        }
        let serve = |reader: &mut Reader, cx: &mut Context<'_>| {
            if reader.has_accepted() {
                conn.link.attend(SystemTime::now());
                runner.serve_all(conn, reader.accepted(), cx);
            }
        };
        match wire.poll_with(&conn.link, cx, serve) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(fault) => {
                tracing::debug!(%fault, "connection ended");
                wire.fail(&conn.link, &fault);
                Poll::Ready(())
            }
        }
    }
}

impl<S, B> Drop for Server<S, B>
where
    S: Service<Request<RequestBody>>,
{
    fn drop(&mut self) {
        if let Some(keepalive) = &self.keepalive {
            keepalive.abort();
        }
        self.wire.fail(&self.conn.link, &Fault::Closed);
    }
}

impl Leaving {
    /// Goes on with the goodbye. Ready: it took too long.
    fn poll(
        leaving: &mut Option<Self>,
        notice: Duration,
        conn: &Conn,
        wire: &mut Wire,
        cx: &mut Context<'_>,
    ) -> Poll<()> {
        loop {
            let next = match leaving {
                None => {
                    // Above any stream there is: what is on its way to us is still taken (RFC 9113 section 6.8).
                    conn.link.say_goodbye(frame::MAX);
                    Self::Told { ping: conn.link.ping(), until: Box::pin(sleep(notice)) }
                }
                Some(Self::Told { ping, until }) => {
                    let answered = ping.is_none_or(|ping| conn.link.has_pong(ping));
                    if !answered && until.as_mut().poll(cx).is_pending() {
                        return Poll::Pending;
                    }
                    conn.link.say_goodbye(wire.stop());
                    Self::Final
                }
                Some(Self::Final) => {
                    if conn.link.serving() > 0 {
                        return Poll::Pending;
                    }
                    conn.link.close();
                    Self::Closing { until: Box::pin(sleep(FAREWELL)) }
                }
                Some(Self::Closing { .. }) if wire.is_shut() => Self::Lingering { until: Box::pin(sleep(LINGER)) },
                Some(Self::Closing { until } | Self::Lingering { until }) => return until.as_mut().poll(cx),
            };
            *leaving = Some(next);
        }
    }
}
