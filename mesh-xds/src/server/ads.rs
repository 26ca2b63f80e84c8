//! The ADS service on HTTP/2: one session per stream, driven by the response stream itself.

use super::{ResourceCache, session::Session};
use bytes::Bytes;
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    aggregated_discovery_service_server::{AggregatedDiscoveryService, AggregatedDiscoveryServiceServer},
};
use futures::{
    future::BoxFuture,
    stream::{self, BoxStream, StreamExt as _},
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, ToSocketAddrs},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tonic::{
    Request, Response, Status, Streaming,
    body::Body,
    codegen::{Body as HttpBody, Service, StdError, http},
    server::NamedService as _,
};

/// The largest discovery request taken: subscriptions of clients with very many names.
const MAX_REQUEST_BYTES: usize = 64 << 20;

/// Settings of an [`AdsServer`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ServerOptions {
    /// An idle connection is asked for a sign of life this often (HTTP/2 PING); default 30 s, `None` never.
    pub keepalive_interval: Option<Duration>,
    /// How long the answer may take before the connection is closed; default 20 s.
    pub keepalive_timeout: Duration,
}

/// A running ADS server. Dropping it cuts every connection at once.
#[derive(Debug)]
pub struct AdsServer {
    addr: SocketAddr,
    cache: ResourceCache,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

#[derive(Clone, Debug)]
struct Ads {
    cache: ResourceCache,
    peer: Option<SocketAddr>,
    stop: watch::Receiver<bool>,
}

/// A stream between two responses.
struct StreamState {
    id: u64,
    session: Session,
    inbound: Streaming<DiscoveryRequest>,
    ads: Ads,
    view: watch::Receiver<Arc<super::cache::View>>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self { keepalive_interval: Some(Duration::from_secs(30)), keepalive_timeout: Duration::from_secs(20) }
    }
}

impl AdsServer {
    /// Listens on `addr` and serves `cache`.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn bind(addr: impl ToSocketAddrs, cache: ResourceCache) -> io::Result<Self> {
        Self::start(TcpListener::bind(addr).await?, cache, ServerOptions::default())
    }

    /// Serves `cache` on a bound listener.
    ///
    /// # Errors
    /// The listener has no local address.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn start(listener: TcpListener, cache: ResourceCache, options: ServerOptions) -> io::Result<Self> {
        let addr = listener.local_addr()?;
        let (stop, mut stop_signal) = watch::channel(false);
        let served = cache.clone();
        let task = tokio::spawn(async move { serve(listener, served, options, stopped(&mut stop_signal)).await });
        Ok(Self { addr, cache, stop, task })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it serves.
    pub fn cache(&self) -> &ResourceCache {
        &self.cache
    }

    /// How many ADS streams are open on the cache: one per connected client.
    pub fn connections(&self) -> usize {
        self.cache.streams().borrow().len()
    }

    /// Stops accepting, ends every stream with UNAVAILABLE, waits until the connections are closed (at most 1 s, then
    /// they are cut). The port is free when this returns.
    pub async fn shutdown(mut self) {
        self.stop.send_replace(true);
        if let Err(error) = (&mut self.task).await
            && error.is_panic()
        {
            tracing::error!(%error, "xDS server task failed");
        }
    }
}

impl Drop for AdsServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves `cache` on `listener` until `shutdown` completes, then as [`AdsServer::shutdown`].
///
/// # Cancel safety
/// Dropping the future cuts every connection and frees the port.
pub async fn serve(
    listener: TcpListener,
    cache: ResourceCache,
    options: ServerOptions,
    shutdown: impl Future<Output = ()> + Send,
) {
    let (stop, stop_signal) = watch::channel(false);
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((tcp, peer)) => {
                    if let Err(error) = tcp.set_nodelay(true) {
                        tracing::debug!(%error, "TCP_NODELAY refused");
                    }
                    let ads = Ads { cache: cache.clone(), peer: Some(peer), stop: stop_signal.clone() };
                    connections.spawn(connection(tcp, ads, options.clone(), tower::service_fn(nothing)));
                }
                Err(error) => {
                    // Out of file descriptors, or the peer went away: neither ends the server.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
        }
    }
    drop(listener);
    stop.send_replace(true);
    let all = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(1), all).await.is_err() {
        connections.shutdown().await;
    }
}

/// Completes when the server is told to stop, or is gone.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Serves `cache` on one byte stream, HTTP/2 without TLS, until it ends: for a server with listeners of its own.
///
/// # Cancel safety
/// Dropping the future cuts the connection.
pub async fn serve_connection(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    cache: ResourceCache,
    options: ServerOptions,
) {
    serve_connection_with(io, cache, options, tower::service_fn(nothing)).await;
}

/// The same, with other gRPC services beside ADS: they are called for every path that is not of ADS.
///
/// # Cancel safety
/// Dropping the future cuts the connection.
pub async fn serve_connection_with<S>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    cache: ResourceCache,
    options: ServerOptions,
    others: S,
) where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    // Kept to the end: without it the connection would be told to stop.
    let (_never, stop) = watch::channel(false);
    connection(io, Ads { cache, peer: None, stop }, options, others).await;
}

/// ADS, and what is served beside it.
#[derive(Clone)]
struct Services<S> {
    ads: AggregatedDiscoveryServiceServer<Ads>,
    others: S,
}

impl<S, B> Service<http::Request<B>> for Services<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<StdError>,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let request = request.map(Body::new);
        let service = request.uri().path().trim_start_matches('/').split('/').next();
        if service == Some(AggregatedDiscoveryServiceServer::<Ads>::NAME) {
            self.ads.call(request)
        } else {
            Box::pin(self.others.call(request))
        }
    }
}

async fn nothing(_: http::Request<Body>) -> Result<http::Response<Body>, Infallible> {
    Ok(Status::unimplemented("there is no such service here").into_http())
}

async fn connection<S>(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ads: Ads,
    options: ServerOptions,
    others: S,
) where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send + 'static,
{
    let mut stop = ads.stop.clone();
    let peer = ads.peer;
    let ads = AggregatedDiscoveryServiceServer::new(ads)
        .max_decoding_message_size(MAX_REQUEST_BYTES)
        .max_encoding_message_size(usize::MAX);
    let service = Services { ads, others };
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(options.keepalive_interval)
        .keep_alive_timeout(options.keepalive_timeout);
    let connection = builder.serve_connection(TokioIo::new(io), TowerToHyperService::new(service));
    tokio::pin!(connection);
    let served = tokio::select! {
        served = &mut connection => served,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(?peer, error, "connection ended");
    }
}

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = BoxStream<'static, Result<DiscoveryResponse, Status>>;
    type DeltaAggregatedResourcesStream = BoxStream<'static, Result<DeltaDiscoveryResponse, Status>>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let state = StreamState {
            id: self.cache.next_stream(),
            session: Session::default(),
            inbound: request.into_inner(),
            ads: self.clone(),
            view: self.cache.watch(),
        };
        state.report();
        let responses = stream::unfold(Some(state), |state| async move {
            let mut state = state?;
            match state.next().await? {
                Ok(response) => Some((Ok(response), Some(state))),
                Err(status) => Some((Err(status), None)),
            }
        });
        Ok(Response::new(responses.boxed()))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("this control plane speaks the state-of-the-world form of ADS"))
    }
}

impl StreamState {
    /// Waits for the next response; `None` ends the stream.
    async fn next(&mut self) -> Option<Result<DiscoveryResponse, Status>> {
        loop {
            let view = self.view.borrow_and_update().clone();
            let response = self.session.next(&view);
            self.report();
            if let Some(response) = response {
                return Some(Ok(response));
            }
            tokio::select! {
                biased;
                () = stopped(&mut self.ads.stop) => {
                    return Some(Err(Status::unavailable("the control plane is shutting down")));
                }
                request = self.inbound.message() => match request {
                    Ok(Some(request)) => {
                        if let Some(nack) = self.session.on_request(request) {
                            self.ads.cache.registry().nack(nack);
                        }
                    }
                    Ok(None) => return None,
                    Err(status) => {
                        tracing::debug!(peer = ?self.ads.peer, %status, "stream broken");
                        return None;
                    }
                },
                changed = self.view.changed() => {
                    // `self.ads.cache` holds the sender.
                    changed.ok()?;
                }
            }
        }
    }

    fn report(&self) {
        let mut status = self.session.status();
        status.peer = self.ads.peer;
        self.ads.cache.registry().update(self.id, status);
    }
}

impl Drop for StreamState {
    fn drop(&mut self) {
        self.ads.cache.registry().remove(self.id);
    }
}

#[cfg(test)]
mod tests;
