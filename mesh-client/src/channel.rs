//! `MeshChannel`: the `T` of any generated tonic client, and a tower service for plain HTTP.

use crate::{
    Error,
    body::MeshBody,
    error::{BoxError, Kind, Place},
    outbound::{
        call,
        cluster::ChannelLoad,
        resolve::{Facts, Resolver, State, Target},
    },
};
use bytes::Bytes;
use http::{Request, Response};
use http_body::Body;
use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tower_service::Service;

/// A channel to one target of the mesh. Cheap to clone; all clones share configuration, connections and counters.
///
/// It is always ready: what a request has to wait for depends on the request, so the waiting is in the response future, under the
/// request's own deadline (`grpc-timeout`, the route's timeout).
#[derive(Clone)]
pub struct MeshChannel {
    pub(crate) core: Arc<Core>,
}

/// What all clones of a channel share.
/// Aligned, so that the count of handles, which every call changes, is not on a cache line that every call reads.
#[repr(align(128))]
pub(crate) struct Core {
    pub(crate) target: Target,
    pub(crate) facts: Arc<Facts>,
    pub(crate) resolver: Resolver,
    /// The control plane's address, for errors.
    pub(crate) server: Arc<str>,
}

impl MeshChannel {
    /// Waits until the target has a complete configuration, at most `timeout`. No connection is made.
    ///
    /// # Errors
    /// The time is over, or the control plane does not know the target: the error names target, server and cause.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn ready(&self, timeout: Duration) -> Result<(), Error> {
        match tokio::time::timeout(timeout, self.core.resolver.settled()).await {
            Ok(State::Ready(_)) => Ok(()),
            Ok(State::Absent(cause)) => {
                Err(self.core.unresolved(Kind::Resolve, "the target is not in the mesh".into(), Some(cause)))
            }
            Ok(State::Pending(cause)) => {
                Err(self.core.unresolved(Kind::Resolve, "the mesh was shut down".into(), cause))
            }
            Err(_) => Err(self.core.not_configured_in(timeout)),
        }
    }

    /// What is in flight now, over all clusters of the configuration in force. For tests and dashboards: costs a pass over all
    /// endpoints.
    pub fn load(&self) -> ChannelLoad {
        let mut load = ChannelLoad::default();
        if let State::Ready(routing) = &**self.core.resolver.state() {
            for upstream in routing.upstreams() {
                load += upstream.live.load();
            }
        }
        load
    }

    /// The target, as given.
    pub fn target(&self) -> &str {
        &self.core.facts.label
    }

    /// Ready or absent, waiting so long, or as long as the mesh lets a request without a deadline wait.
    pub(crate) async fn settled(&self, limit: Option<Duration>) -> Result<State, Error> {
        if let settled @ (State::Ready(_) | State::Absent(_)) = &**self.core.resolver.state() {
            return Ok(settled.clone());
        }
        let timeout = limit.unwrap_or(self.core.facts.settings.resolve_timeout);
        match tokio::time::timeout(timeout, self.core.resolver.settled()).await {
            Ok(state) => Ok(state),
            Err(_) => Err(self.core.not_configured_in(timeout)),
        }
    }
}

impl Core {
    /// No configuration came within `waited`.
    pub(crate) fn not_configured_in(&self, waited: Duration) -> Error {
        let cause = match &**self.resolver.state() {
            State::Pending(cause) => cause.clone(),
            _ => None,
        };
        let message = match cause {
            Some(_) => format!("no configuration from {} within {waited:?}", self.server),
            None => format!("no configuration from {} within {waited:?}: it has not answered yet", self.server),
        };
        self.unresolved(Kind::Timeout, message, cause)
    }

    pub(crate) fn unresolved(
        &self,
        kind: Kind,
        message: String,
        cause: Option<Arc<mesh_xds::snapshot::ResourceError>>,
    ) -> Error {
        let place = Place { target: Some(self.facts.label.clone()), ..Place::default() };
        Error::new(kind, message, place, cause.map(|c| Box::new(c) as BoxError))
    }
}

impl fmt::Debug for MeshChannel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshChannel")
            .field("target", &self.core.facts.label)
            .field("state", &self.core.resolver)
            .finish()
    }
}

impl<B> Service<Request<B>> for MeshChannel
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<MeshBody>;
    type Error = Error;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> ResponseFuture {
        ResponseFuture(call::start(&self.core, request))
    }
}

/// The response future of [`MeshChannel`]. Dropping it resets the stream and gives back every permit and counter.
pub struct ResponseFuture(call::Road);

impl Future for ResponseFuture {
    type Output = Result<Response<MeshBody>, Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.poll(cx)
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}
