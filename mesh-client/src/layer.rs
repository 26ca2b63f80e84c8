//! The layer for hyper clients: hosts the mesh knows are routed, all others go to the inner client untouched.

use crate::{
    BoxError, Mesh,
    body::MeshBody,
    channel::MeshChannel,
    outbound::{
        resolve::State,
        timeout::{is_grpc, parse_grpc_timeout},
    },
};
use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{Request, Response, header, uri::Authority};
use http_body::{Body, Frame, SizeHint};
use pin_project::pin_project;
use std::{
    collections::HashMap,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tower_layer::Layer;
use tower_service::Service;

/// At most this many hosts are remembered. When another one comes, hosts that the control plane does not know are forgotten (and
/// asked for again when they return), then any that no request is using.
const MAX_HOSTS: usize = 1024;

/// Wraps any HTTP client so that its requests are routed by the mesh.
///
/// A request for `http://HOST[:PORT]` whose host the mesh was [built with](crate::MeshBuilder::host), or the control plane knows (a
/// Listener named `HOST:PORT`, port 80 when absent, by the bootstrap's name template), is routed, balanced, retried and secured like a call on a [`MeshChannel`], over the mesh's own
/// connections. Every other request (unknown host, `https`, no host) goes to the inner client as it came. The first request
/// to a host waits until the control plane has answered, at most its `grpc-timeout`, or without one
/// [`MeshBuilder::resolve_timeout`](crate::MeshBuilder::resolve_timeout);
/// when it has not, the request fails: sent past the mesh, it could leave without the identity and the policy it must have.
/// The timeouts and retry rules are those of [`Profile::Envoy`](crate::Profile::Envoy) unless the mesh was built with another profile.
#[derive(Clone, Debug)]
pub struct MeshLayer {
    hosts: Arc<Hosts>,
}

/// The service made by [`MeshLayer`].
#[derive(Clone, Debug)]
pub struct MeshService<S> {
    hosts: Arc<Hosts>,
    inner: S,
}

/// One channel per host that was asked for.
struct Hosts {
    mesh: Mesh,
    known: ArcSwap<HashMap<Authority, MeshChannel>>,
}

impl MeshLayer {
    pub(crate) fn new(mesh: Mesh) -> Self {
        Self { hosts: Arc::new(Hosts { mesh, known: ArcSwap::default() }) }
    }
}

impl<S> Layer<S> for MeshLayer {
    type Service = MeshService<S>;

    fn layer(&self, inner: S) -> MeshService<S> {
        MeshService { hosts: self.hosts.clone(), inner }
    }
}

impl<S> MeshService<S> {
    /// The inner client.
    pub fn get_ref(&self) -> &S {
        &self.inner
    }

    /// Takes the inner client out.
    pub fn into_inner(self) -> S {
        self.inner
    }
}

impl Hosts {
    /// The channel of the request's host, made on first use. `None`: nothing for the mesh.
    fn channel<B>(&self, request: &Request<B>) -> Option<MeshChannel> {
        let uri = request.uri();
        if uri.scheme().is_some_and(|s| *s != http::uri::Scheme::HTTP) || self.mesh.knows_no_host() {
            return None;
        }
        match uri.authority() {
            Some(authority) => self.channel_for(authority),
            None => self.channel_for(&request.headers().get(header::HOST)?.to_str().ok()?.parse().ok()?),
        }
    }

    fn channel_for(&self, authority: &Authority) -> Option<MeshChannel> {
        if let Some(channel) = self.known.load().get(authority) {
            return Some(channel.clone());
        }
        if authority.as_str().contains('@') {
            return None;
        }
        let port = authority.port_u16().unwrap_or(80);
        let target = self.mesh.target_of(format!("{}:{port}", authority.host()))?;
        let channel = self.mesh.http_channel(target).ok()?;
        self.known.rcu(|known| {
            let mut known = HashMap::clone(known);
            if known.len() >= MAX_HOSTS {
                known.retain(|_, channel| !matches!(**channel.core.resolver.state(), State::Absent(_)));
            }
            if known.len() >= MAX_HOSTS {
                // One count is of the map in force, one of this copy.
                known.retain(|_, channel| Arc::strong_count(&channel.core) > 2);
            }
            known.entry(authority.clone()).or_insert_with(|| channel.clone());
            known
        });
        self.known.load().get(authority).cloned().or(Some(channel))
    }
}

impl fmt::Debug for Hosts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.known.load().keys()).finish()
    }
}

impl<S, B, R> Service<Request<B>> for MeshService<S>
where
    S: Service<Request<B>, Response = Response<R>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<LayerBody<R>>;
    type Error = BoxError;
    type Future = LayerFuture<R>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> LayerFuture<R> {
        let Some(mut channel) = self.hosts.channel(&request) else {
            let response = self.inner.call(request);
            return LayerFuture(Box::pin(async move { inner_response(response.await) }));
        };
        // The service that was polled ready goes into the future; a clone that was not takes its place.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        LayerFuture(Box::pin(async move {
            let headers = request.headers();
            let limit = if is_grpc(headers) { headers.get("grpc-timeout").and_then(parse_grpc_timeout) } else { None };
            if let State::Absent(_) = channel.settled(limit).await? {
                return inner_response(inner.call(request).await);
            }
            let response = channel.call(request).await?;
            Ok(response.map(|body| LayerBody { kind: BodyKind::Mesh(body) }))
        }))
    }
}

fn inner_response<R, E: Into<BoxError>>(result: Result<Response<R>, E>) -> Result<Response<LayerBody<R>>, BoxError> {
    result.map(|r| r.map(|body| LayerBody { kind: BodyKind::Inner(body) })).map_err(Into::into)
}

/// The response future of [`MeshService`]. Dropping it gives up the request.
pub struct LayerFuture<R>(Pin<Box<dyn Future<Output = LayerResult<R>> + Send>>);

type LayerResult<R> = Result<Response<LayerBody<R>>, BoxError>;

impl<R> Future for LayerFuture<R> {
    type Output = LayerResult<R>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(cx)
    }
}

impl<R> fmt::Debug for LayerFuture<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerFuture").finish_non_exhaustive()
    }
}

/// A response body from the mesh or from the inner client.
#[pin_project]
#[derive(Debug)]
pub struct LayerBody<R> {
    #[pin]
    kind: BodyKind<R>,
}

#[pin_project(project = BodyProjection)]
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "boxing it would cost an allocation per request")]
enum BodyKind<R> {
    Mesh(#[pin] MeshBody),
    Inner(#[pin] R),
}

impl<R> LayerBody<R> {
    /// Whether the mesh served the request (and not the inner client).
    pub fn is_mesh(&self) -> bool {
        matches!(self.kind, BodyKind::Mesh(_))
    }
}

impl<R> Body for LayerBody<R>
where
    R: Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().kind.project() {
            BodyProjection::Mesh(body) => body.poll_frame(cx).map_err(Into::into),
            BodyProjection::Inner(body) => body.poll_frame(cx).map_err(Into::into),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.kind {
            BodyKind::Mesh(body) => body.is_end_stream(),
            BodyKind::Inner(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.kind {
            BodyKind::Mesh(body) => body.size_hint(),
            BodyKind::Inner(body) => body.size_hint(),
        }
    }
}
