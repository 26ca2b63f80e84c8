//! A greeter backend with switches: it can fail, answer late, be killed and come back, while it counts what it saw.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use http_body_util::Full;
use hyper::body::Incoming;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status, Streaming};

use crate::greeter::greeter_server::{Greeter, GreeterServer};
use crate::greeter::{HelloReply, HelloRequest};
use crate::server::{self, Accept, BoxError, Peer, Server};

/// How a backend starts. Each value but `accept` can be changed later by a switch.
#[derive(Clone)]
pub struct Options {
    /// The share of calls answered with UNAVAILABLE (over HTTP: 503), 0.0..=1.0.
    pub fail_rate: f64,
    /// How long each answer waits before it is sent.
    pub delay: Duration,
    /// The handshake of each connection: [`server::plain`], or TLS.
    pub accept: Accept,
}

/// A greeter on one address, served over gRPC unless it is a [`HttpBackend`]. Dropping it cuts every connection.
#[derive(Debug)]
pub struct Backend<S = Routes> {
    server: Server<S>,
    state: Arc<State>,
}

/// The same switches on a plain HTTP backend, which answers every path with `hello from NAME`.
pub type HttpBackend = Backend<HttpGreeter>;

/// What the service of a backend and its handle share.
#[derive(Debug)]
pub struct State {
    name: String,
    calls: AtomicU64,
    failed: AtomicU64,
    in_flight: AtomicU64,
    unavailable: AtomicBool,
    fail_next: AtomicU64,
    /// `f64` as bits.
    fail_rate: AtomicU64,
    delay_micros: AtomicU64,
}

/// The HTTP service of a [`HttpBackend`].
#[derive(Clone, Debug)]
pub struct HttpGreeter(Arc<State>);

#[derive(Clone, Debug)]
struct GreeterService(Arc<State>);

/// Counts a call as in flight until it is dropped.
struct InFlight(Arc<State>);

impl Default for Options {
    fn default() -> Self {
        Self { fail_rate: 0.0, delay: Duration::ZERO, accept: server::plain() }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("fail_rate", &self.fail_rate)
            .field("delay", &self.delay)
            .finish_non_exhaustive()
    }
}

impl Backend {
    /// Serves the greeter on `addr`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start(name: &str, addr: SocketAddr, options: Options) -> io::Result<Self> {
        Self::serve(name, addr, options, |state| Routes::new(GreeterServer::new(GreeterService(state)))).await
    }
}

impl HttpBackend {
    /// Serves HTTP/1.1 and HTTP/2 on `addr`; port 0 takes a free one.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn http(name: &str, addr: SocketAddr, options: Options) -> io::Result<Self> {
        Self::serve(name, addr, options, HttpGreeter).await
    }
}

impl<S, B> Backend<S>
where
    S: tower::Service<http::Request<Incoming>, Response = http::Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    async fn serve(
        name: &str,
        addr: SocketAddr,
        options: Options,
        service: impl FnOnce(Arc<State>) -> S,
    ) -> io::Result<Self> {
        let state = State::new(name, &options);
        Ok(Self { server: Server::start(addr, options.accept, service(Arc::clone(&state))).await?, state })
    }

    /// Closes the port and cuts every connection, calls in flight included.
    pub async fn kill(&mut self) {
        self.server.kill().await;
    }

    /// Listens again on the same address.
    ///
    /// # Errors
    /// The address was taken by another process meanwhile.
    pub async fn restart(&mut self) -> io::Result<()> {
        self.server.restart().await
    }

    /// The address served.
    pub fn addr(&self) -> SocketAddr {
        self.server.addr()
    }

    /// How many connections were accepted, over all restarts.
    pub fn connections(&self) -> u64 {
        self.server.connections()
    }

    /// The switches and counters, which outlive the handle.
    pub fn state(&self) -> &Arc<State> {
        &self.state
    }
}

impl State {
    fn new(name: &str, options: &Options) -> Arc<Self> {
        let state = Self {
            name: name.to_owned(),
            calls: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            unavailable: AtomicBool::new(false),
            fail_next: AtomicU64::new(0),
            fail_rate: AtomicU64::new(0),
            delay_micros: AtomicU64::new(0),
        };
        state.set_fail_rate(options.fail_rate);
        state.set_delay(options.delay);
        Arc::new(state)
    }

    /// The name that replies carry.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How many calls arrived, failed ones included.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// How many calls were failed on purpose.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// How many calls are being answered now.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Starts or stops answering every call with UNAVAILABLE.
    pub fn set_unavailable(&self, unavailable: bool) {
        self.unavailable.store(unavailable, Ordering::Relaxed);
    }

    /// The next `calls` calls fail.
    pub fn fail_next(&self, calls: u64) {
        self.fail_next.store(calls, Ordering::Relaxed);
    }

    /// Sets the share of calls that fail, 0.0..=1.0.
    pub fn set_fail_rate(&self, rate: f64) {
        self.fail_rate.store(rate.clamp(0.0, 1.0).to_bits(), Ordering::Relaxed);
    }

    /// Sets how long each answer waits.
    pub fn set_delay(&self, delay: Duration) {
        self.delay_micros.store(u64::try_from(delay.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn arrive(self: &Arc<Self>) -> InFlight {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Waits as told, then says whether this call is to be answered.
    async fn admit(&self) -> bool {
        let delay = Duration::from_micros(self.delay_micros.load(Ordering::Relaxed));
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let rate = f64::from_bits(self.fail_rate.load(Ordering::Relaxed));
        let counted = self.fail_next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
        let fails = counted || self.unavailable.load(Ordering::Relaxed) || (rate > 0.0 && fastrand::f64() < rate);
        if fails {
            self.failed.fetch_add(1, Ordering::Relaxed);
        }
        !fails
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a reply repeats of the request that it answers.
#[derive(Clone)]
struct Seen {
    traceparent: String,
    peer: String,
    previous_attempts: u32,
}

impl Seen {
    fn of<T>(request: &Request<T>) -> Self {
        let header =
            |name: &str| request.metadata().get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
        Self {
            traceparent: header("traceparent").to_owned(),
            peer: request.extensions().get::<Peer>().map(|peer| peer.0.clone()).unwrap_or_default(),
            previous_attempts: header("grpc-previous-rpc-attempts").parse().unwrap_or_default(),
        }
    }

    fn reply(&self, state: &State, greeted: &str) -> HelloReply {
        HelloReply {
            message: format!("Hello {greeted}"),
            backend: state.name.clone(),
            traceparent: self.traceparent.clone(),
            peer: self.peer.clone(),
            previous_attempts: self.previous_attempts,
        }
    }
}

impl GreeterService {
    async fn admit(&self) -> Result<(), Status> {
        if self.0.admit().await {
            return Ok(());
        }
        Err(Status::new(Code::Unavailable, format!("{} was told to fail", self.0.name)))
    }
}

#[tonic::async_trait]
impl Greeter for GreeterService {
    type SayHellosStream = BoxStream<'static, Result<HelloReply, Status>>;
    type ChatStream = BoxStream<'static, Result<HelloReply, Status>>;

    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let _in_flight = self.0.arrive();
        self.admit().await?;
        let seen = Seen::of(&request);
        Ok(Response::new(seen.reply(&self.0, &request.get_ref().name)))
    }

    async fn say_hellos(&self, request: Request<HelloRequest>) -> Result<Response<Self::SayHellosStream>, Status> {
        let in_flight = self.0.arrive();
        self.admit().await?;
        let seen = Seen::of(&request);
        let HelloRequest { name, count } = request.into_inner();
        let count = if count == 0 { 3 } else { count };
        let replies = futures::stream::iter(0..count).map(move |_| Ok(seen.reply(&in_flight.0, &name)));
        Ok(Response::new(replies.boxed()))
    }

    async fn chat(&self, request: Request<Streaming<HelloRequest>>) -> Result<Response<Self::ChatStream>, Status> {
        let in_flight = self.0.arrive();
        self.admit().await?;
        let seen = Seen::of(&request);
        let replies = request
            .into_inner()
            .map(move |message| message.map(|HelloRequest { name, .. }| seen.reply(&in_flight.0, &name)));
        Ok(Response::new(replies.boxed()))
    }
}

impl tower::Service<http::Request<Incoming>> for HttpGreeter {
    type Response = http::Response<Full<Bytes>>;
    type Error = std::convert::Infallible;
    type Future = futures::future::BoxFuture<'static, Result<Self::Response, Self::Error>>;

    fn poll_ready(&mut self, _cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Incoming>) -> Self::Future {
        let state = Arc::clone(&self.0);
        Box::pin(async move {
            let in_flight = state.arrive();
            let state = &in_flight.0;
            let admitted = state.admit().await;
            let text = if admitted {
                format!("hello from {} at {}\n", state.name, request.uri().path())
            } else {
                format!("{} was told to fail\n", state.name)
            };
            let mut response = http::Response::new(Full::new(Bytes::from(text)));
            if !admitted {
                *response.status_mut() = http::StatusCode::SERVICE_UNAVAILABLE;
            }
            if let Ok(name) = http::HeaderValue::from_str(&state.name) {
                response.headers_mut().insert("x-backend", name);
            }
            if let Some(parent) = request.headers().get("traceparent") {
                response.headers_mut().insert("x-traceparent", parent.clone());
            }
            Ok(response)
        })
    }
}

#[cfg(test)]
mod tests;
