//! Greetings over either way into the mesh.

use super::{TARGET, echo::Way};
use bytes::Bytes;
use examples::greeter::{HelloReply, HelloRequest, greeter_client::GreeterClient};
use mesh_client::{BoxError, Mesh};
use std::collections::BTreeMap;
use tonic::{Status, body::Body};
use tower::{Layer, Service, ServiceExt, service_fn, util::BoxCloneSyncService};

/// What a generated client stands on, whichever way it goes.
pub(crate) type Wire = BoxCloneSyncService<http::Request<Body>, http::Response<Body>, Failed>;

/// What a request failed with.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Failed(#[source] pub(crate) BoxError);

fn wire<S, B>(service: S) -> Wire
where
    S: Service<http::Request<Body>, Response = http::Response<B>> + Clone + Send + Sync + 'static,
    S::Error: Into<BoxError>,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let sealed = service.map_response(|response: http::Response<B>| response.map(Body::new));
    Wire::new(sealed.map_err(|error: S::Error| Failed(error.into())))
}

impl Way {
    /// Requests for the greeter's host.
    pub(crate) fn wire(self, mesh: &Mesh) -> Wire {
        match self {
            Self::Channel => wire(Self::open(mesh)),
            Self::Layer => wire(mesh.layer().layer(service_fn(|_: http::Request<Body>| async {
                Err::<http::Response<Body>, BoxError>("not for the inner client".into())
            }))),
        }
    }

    /// A client of the greeter.
    pub(crate) fn client(self, mesh: &Mesh) -> GreeterClient<Wire> {
        GreeterClient::with_origin(self.wire(mesh), format!("http://{}", &TARGET["xds:///".len()..]).parse().unwrap())
    }

    /// One call.
    pub(crate) async fn hello(self, mesh: &Mesh) -> Result<HelloReply, Status> {
        self.hello_with(mesh, |_| {}).await
    }

    /// One call whose request is dressed up first.
    pub(crate) async fn hello_with(
        self,
        mesh: &Mesh,
        dress: impl FnOnce(&mut tonic::Request<HelloRequest>),
    ) -> Result<HelloReply, Status> {
        let mut request = tonic::Request::new(HelloRequest { name: "test".to_owned(), count: 0 });
        dress(&mut request);
        self.client(mesh).say_hello(request).await.map(tonic::Response::into_inner)
    }

    /// One call with an hour's deadline that must end far sooner.
    pub(crate) async fn prompt(self, mesh: &Mesh) -> Result<HelloReply, Status> {
        let call = self.hello_with(mesh, |request| request.set_timeout(super::HOUR));
        tokio::time::timeout(super::GUARD, call).await.expect("did not end promptly")
    }

    /// A request in a task of its own: its status, once its response began.
    pub(crate) fn spawn(
        self,
        mesh: &Mesh,
        request: http::request::Builder,
        body: Body,
    ) -> tokio::task::JoinHandle<Result<u16, Failed>> {
        let (wire, request) = (self.wire(mesh), request.body(body).unwrap());
        tokio::spawn(async move { Ok(wire.oneshot(request).await?.status().as_u16()) })
    }

    /// Who answered so many calls, one after the other; errors by their text.
    pub(crate) async fn calls(self, mesh: &Mesh, count: usize) -> BTreeMap<String, u32> {
        let (mut seen, mut client) = (BTreeMap::new(), self.client(mesh));
        for _ in 0..count {
            let reply = client.say_hello(HelloRequest { name: "test".to_owned(), count: 0 }).await;
            let who = reply.map_or_else(|status| status.to_string(), |reply| reply.into_inner().backend);
            *seen.entry(who).or_insert(0) += 1;
        }
        seen
    }
}
