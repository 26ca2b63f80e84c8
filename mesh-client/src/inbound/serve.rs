//! Serving connections on our own transport: which protocol they speak, and how they end.

use super::{
    ConnectionInfo, Guard, Inbound, InboundStream, Limits, Shared,
    accept::Fresh,
    connections::{Ending, Handle, Http1},
    farewell::Watched,
    listening::closed,
};
use crate::{
    BoxError,
    task::Task,
    transport::{LOOKS, PREFACE, RequestBody, Server, ServerConfig, serve_http1},
};
use bytes::{Buf, Bytes, BytesMut};
use http::{Request, Response};
use http_body::Body;
use std::{future, io, sync::Arc, time::Duration};
use tokio::{
    io::AsyncReadExt,
    time::{Instant, sleep, timeout},
};
use tower_service::Service;

/// Bytes that are asked for at first.
const FIRST: usize = 2 << 10;
/// The window of a stream before anything was said about it.
const MIN_WINDOW: u32 = 65_535;

/// As many as can be counted, and more than anybody wants.
const MAX_STREAMS: u32 = 1 << 20;
/// How often a connection is looked after, at most.
const MIN_STEP: Duration = Duration::from_millis(10);

/// What the first bytes of a connection say.
enum Spoken {
    /// HTTP/2; what came behind the preface.
    Http2(BytesMut),
    /// Anything else; all that came.
    Http1(BytesMut),
}

impl Inbound {
    /// Serves requests until [`shutdown`](Self::shutdown) is called: HTTP/2, and HTTP/1.1 on the same port, told apart by ALPN or the first
    /// bytes.
    ///
    /// `service` is any tower service: tonic's `Routes`, an axum `Router`, or your own. It is cloned for each connection, and polled
    /// where the connection is read first: one that is ready at once costs no task. Requests carry their
    /// [`ConnectionInfo`] and, where there is one, the client's [`PeerIdentity`](mesh_tls::PeerIdentity) in their extensions. A service that
    /// fails resets the stream (INTERNAL_ERROR).
    ///
    /// May be called more than once at a time: connections are shared out.
    ///
    /// # Errors
    /// The socket is broken, or was closed because nobody took connections any more. Errors of single connections are logged.
    ///
    /// # Cancel safety
    /// Dropping the future accepts no more, and closes the socket if nobody else takes connections; open connections are served on.
    pub async fn serve<S, B>(&self, service: S) -> io::Result<()>
    where
        S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        self.serve_with_shutdown(service, future::pending()).await
    }

    /// [`serve`](Self::serve), until `signal` is ready; then [`shutdown`](Self::shutdown).
    ///
    /// # Errors
    /// As for `serve`.
    pub async fn serve_with_shutdown<S, B>(&self, service: S, signal: impl Future<Output = ()>) -> io::Result<()>
    where
        S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<BoxError>,
        S::Future: Send + 'static,
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        let shared = &self.0;
        let Some(_accepting) = shared.listening.begin() else {
            return if shared.connections.is_stopping() { Ok(()) } else { Err(closed()) };
        };
        let accept = async move {
            loop {
                let fresh = shared.accept().await?;
                tokio::spawn(connection(Arc::clone(shared), fresh, service.clone()));
            }
        };
        let result = tokio::select! {
            // The socket closes when it stops.
            result = accept => if shared.connections.is_stopping() { Ok(()) } else { result },
            () = signal => Ok(()),
            () = shared.connections.stopping() => Ok(()),
        };
        self.shutdown().await;
        result
    }

    /// Tells the clients of all connections that are open, or about to be, to make new ones: what is in progress goes on, and is cut after
    /// [`Limits::drain_timeout`]. For after a change that new connections alone would feel, such as another mode of the acceptor.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn renew_connections(&self) {
        self.0.connections.renew();
    }

    /// Closes the listening socket at once, tells the clients of open ones to go elsewhere (GOAWAY in two steps, so that no request
    /// is lost), and waits until all is answered; what is not within [`Limits::drain_timeout`] is cut. Connections of
    /// [`incoming`](Self::incoming), which ends, are treated alike, and so are those of HTTP/1.1 that were upgraded to something else.
    pub async fn shutdown(&self) {
        let connections = &self.0.connections;
        connections.stop();
        self.0.listening.close();
        if timeout(self.0.limits.load().drain_timeout, connections.ended()).await.is_err() {
            tracing::warn!("requests were still open when the time to drain was over");
            connections.abort();
            connections.ended().await;
        }
    }
}

async fn connection<S, B>(shared: Arc<Shared>, fresh: Fresh, service: S)
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let beginning = shared.begin(fresh, |mut stream| async move {
        let spoken = listen(&mut stream).await;
        (stream, spoken)
    });
    let beginning = tokio::select! {
        biased;
        beginning = beginning => beginning,
        () = shared.connections.closed_to_the_silent() => return,
    };
    let (stream, spoken) = match beginning {
        Some((stream, Ok(spoken))) => (stream, spoken),
        Some((_, Err(error))) => return tracing::debug!(%error, "a connection ended before it spoke"),
        None => return,
    };
    let info = stream.info().clone();
    let service = Guard::of_connection(service, info.clone());
    match spoken {
        Spoken::Http2(read) => http2(&shared, stream, read, &info, service).await,
        Spoken::Http1(read) => http1(&shared, stream, read.freeze(), &info, service).await,
    }
}

/// Reads until the protocol is known: at most as much as the client sends at once.
async fn listen(stream: &mut InboundStream) -> io::Result<Spoken> {
    let mut read = BytesMut::new();
    if stream.info().alpn() == Some(b"http/1.1") {
        return Ok(Spoken::Http1(read));
    }
    read.reserve(FIRST);
    loop {
        if stream.read_buf(&mut read).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let known = read.len().min(PREFACE.len());
        if read[..known] != PREFACE[..known] {
            return Ok(Spoken::Http1(read));
        }
        if known == PREFACE.len() {
            read.advance(known);
            return Ok(Spoken::Http2(read));
        }
    }
}

async fn http2<S, B>(shared: &Shared, stream: InboundStream, read: BytesMut, info: &ConnectionInfo, service: Guard<S>)
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let server = Server::new(stream, read, &config(info.limits()), service);
    let control = server.control();
    let _entry = shared.enter(info, Ending::Http2(control.clone()));
    let limits = info.limits().clone();
    // A task of its own: it has to do once in a while what the driver need not look at each time.
    let _mind = Task::spawn(async move { mind(&control, &limits).await });
    server.await;
}

/// Ends a connection that is too old, idle for too long, or whose client does not finish what it says.
async fn mind(control: &crate::transport::Control, limits: &Limits) {
    let born = Instant::now();
    let age = age(limits);
    let step = limits.header_timeout.min(limits.idle_timeout.unwrap_or(limits.header_timeout));
    let look = limits.stream_idle().map(|limit| limit / LOOKS);
    let step = step.min(age.unwrap_or(step)).min(look.unwrap_or(step)).max(MIN_STEP);
    let (mut requests, mut quiet_since) = (control.started(), born);
    let (mut unfinished, mut unfinished_since) = (control.unfinished(), born);
    loop {
        sleep(step).await;
        let now = Instant::now();
        let started = control.started();
        if started != requests || control.serving() > 0 {
            (requests, quiet_since) = (started, now);
            control.look();
        }
        let idle = limits.idle_timeout.is_some_and(|limit| now - quiet_since >= limit);
        if idle || age.is_some_and(|age| now - born >= age) {
            control.leave();
            sleep(limits.drain_timeout).await;
            return control.abort();
        }
        let before = std::mem::replace(&mut unfinished, control.unfinished());
        if unfinished.is_none() || unfinished != before {
            unfinished_since = now;
        } else if now - unfinished_since >= limits.header_timeout {
            tracing::debug!("a client did not finish what it said in time");
            return control.abort();
        }
    }
}

async fn http1<S, B>(shared: &Shared, mut stream: InboundStream, read: Bytes, info: &ConnectionInfo, service: Guard<S>)
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send + 'static,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let end = Arc::new(Http1::default());
    let entry = shared.enter(info, Ending::Http1(Arc::clone(&end)));
    let limits = info.limits();
    let mut config = config(limits);
    config.header_timeout = config.header_timeout.min(limits.idle_timeout.unwrap_or(config.header_timeout));
    if let Some(age) = age(limits) {
        stream.mind(grow_old(entry.handle(), age));
    }
    stream.watch(Watched::not_http2(), entry);
    let served = serve_http1(stream, read, &config, service, end.leave.notified());
    tokio::select! {
        () = served => {}
        () = end.abort.notified() => {}
    }
}

async fn grow_old(connection: Handle, age: Duration) {
    sleep(age).await;
    connection.drain(Duration::MAX);
}

/// [`mind`], where others speak on the connection: what goes on is known by what is read and written.
pub(super) async fn mind_foreign(info: ConnectionInfo, connection: Handle) {
    let (limits, farewell) = (info.limits(), info.farewell());
    let (born, age) = (Instant::now(), age(limits));
    let Some(step) = limits.idle_timeout.into_iter().chain(age).min() else { return };
    let (mut moves, mut quiet_since) = (farewell.moves(), born);
    loop {
        sleep(step.max(MIN_STEP)).await;
        let (now, moved) = (Instant::now(), farewell.moves());
        if moved != moves || farewell.is_serving() {
            (moves, quiet_since) = (moved, now);
        }
        let idle = limits.idle_timeout.is_some_and(|limit| now - quiet_since >= limit);
        if idle || age.is_some_and(|age| now - born >= age) {
            return connection.drain(Duration::MAX);
        }
    }
}

/// When a connection that begins now is too old.
pub(super) fn age(limits: &Limits) -> Option<Duration> {
    let share = 0.9 + 0.2 * fastrand::f64();
    // More than there is room for is never.
    let age = |age: Duration| Duration::try_from_secs_f64(age.as_secs_f64() * share).unwrap_or(Duration::MAX);
    limits.max_connection_age.map(age)
}

fn config(limits: &Limits) -> ServerConfig {
    ServerConfig {
        stream_window: limits.stream_window.max(MIN_WINDOW),
        connection_window: limits.connection_window,
        max_header_list_size: limits.max_header_bytes,
        max_header_bytes: limits.max_connection_header_bytes.max(limits.max_header_bytes),
        max_headers: limits.max_headers.max(1),
        notice: limits.drain_notice,
        max_concurrent_streams: limits.max_concurrent_streams.clamp(1, MAX_STREAMS),
        header_timeout: limits.header_timeout,
        stream_idle: limits.stream_idle(),
        keepalive: limits.keepalive,
    }
}
