//! axum's own server on the connections of an [`Inbound`](super::Inbound): `axum::serve`.

use super::{ConnectionInfo, Guard, GuardFuture, InboundLayer, InboundStream, Incoming, ResponseBody};
use crate::BoxError;
use axum::{
    body::Body,
    extract::{Request, connect_info::Connected},
    response::Response,
    serve::{IncomingStream, Listener},
};
use bytes::Bytes;
use futures::StreamExt as _;
use pin_project::pin_project;
use std::{
    convert::Infallible,
    fmt,
    future::{self, Ready},
    io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tower_layer::Layer;
use tower_service::Service;

/// Puts the policy of each connection in front of a service: what `axum::serve` takes beside [`Incoming`]. Of
/// [`InboundLayer::into_make_service`].
#[derive(Clone, Debug)]
pub struct MakeGuard<S>(S);

/// A service of axum behind the policy of one connection.
#[derive(Clone, Debug)]
pub struct Guarded<S>(Guard<S>);

/// The future of [`Guarded`].
#[pin_project]
pub struct GuardedFuture<S>(#[pin] GuardFuture<S, Body>)
where
    S: Service<Request>;

impl InboundLayer {
    /// `service`, an axum `Router` or another service of its kind, behind the policy of each connection: for `axum::serve` with
    /// [`Inbound::incoming`](super::Inbound::incoming).
    ///
    /// Requests carry their [`ConnectionInfo`] and, where there is one, the client's `PeerIdentity` in their extensions. The policy comes before
    /// the routes of the router. axum's server knows of [`Inbound::shutdown`](super::Inbound::shutdown) by its signal:
    ///
    /// ```no_run
    /// # async fn run(acceptor: mesh_tls::Acceptor) -> Result<(), Box<dyn std::error::Error>> {
    /// use axum::{Extension, Router, routing::get};
    /// use mesh_client::{inbound::{Inbound, Rbac, Rule}, tls::PeerIdentity};
    ///
    /// let shop = Rbac::allow().rule("web", Rule::new().namespace("web"));
    /// let inbound = Inbound::builder().acceptor(acceptor).authorize(shop).bind("0.0.0.0:8080").await?;
    /// let router = Router::new().route("/", get(async |Extension(peer): Extension<PeerIdentity>| format!("Hello {peer}")));
    ///
    /// let stop = inbound.clone();
    /// axum::serve(inbound.incoming(), inbound.layer().into_make_service(router))
    ///     .with_graceful_shutdown(async move {
    ///         let _ = tokio::signal::ctrl_c().await;
    ///         stop.shutdown().await;
    ///     })
    ///     .await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn into_make_service<S>(self, service: S) -> MakeGuard<S> {
        MakeGuard(service)
    }
}

impl Listener for Incoming {
    type Io = InboundStream;
    type Addr = SocketAddr;

    /// Waits for ever once the socket is closed.
    async fn accept(&mut self) -> (InboundStream, SocketAddr) {
        match self.next().await {
            Some(Ok(stream)) => {
                let from = stream.info().remote_addr();
                (stream, from)
            }
            Some(Err(_)) | None => future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.listens_on())
    }
}

/// For `Router::into_make_service_with_connect_info`: the policy is then asked where the router has [`Inbound::layer`](super::Inbound::layer).
impl Connected<IncomingStream<'_, Incoming>> for ConnectionInfo {
    fn connect_info(stream: IncomingStream<'_, Incoming>) -> Self {
        stream.io().info().clone()
    }
}

impl<S: Clone> Service<IncomingStream<'_, Incoming>> for MakeGuard<S> {
    type Response = Guarded<S>;
    type Error = Infallible;
    type Future = Ready<Result<Guarded<S>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, stream: IncomingStream<'_, Incoming>) -> Self::Future {
        future::ready(Ok(Guarded(stream.io().layer().layer(self.0.clone()))))
    }
}

impl<S, B> Service<Request> for Guarded<S>
where
    S: Service<Request, Response = http::Response<B>> + Clone,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response;
    type Error = S::Error;
    type Future = GuardedFuture<S>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, request: Request) -> GuardedFuture<S> {
        GuardedFuture(self.0.call(request))
    }
}

impl<S, B> Future for GuardedFuture<S>
where
    S: Service<Request, Response = http::Response<B>>,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Output = Result<Response, S::Error>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response: http::Response<ResponseBody<B>> = ready!(self.project().0.poll(cx))?;
        Poll::Ready(Ok(response.map(Body::new)))
    }
}

impl<S: Service<Request>> fmt::Debug for GuardedFuture<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedFuture").finish_non_exhaustive()
    }
}
