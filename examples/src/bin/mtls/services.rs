//! The two services: a greeter, and a shop that greets through it.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use examples::greeter::greeter_client::GreeterClient;
use examples::greeter::greeter_server::Greeter;
use examples::greeter::{HelloReply, HelloRequest};
use futures::stream::{self, BoxStream, StreamExt};
use mesh_client::MeshChannel;
use mesh_tls::PeerIdentity;
use tonic::{Request, Response, Status, Streaming};

/// Who called a service.
#[derive(Clone, Debug, Default)]
pub(crate) struct Callers(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
    last: String,
    certificates: HashSet<Vec<u8>>,
}

impl Callers {
    /// The SPIFFE id of the last.
    pub(crate) fn last(&self) -> String {
        self.seen().last.clone()
    }

    /// Every certificate that was shown.
    pub(crate) fn certificates(&self) -> HashSet<Vec<u8>> {
        self.seen().certificates.clone()
    }

    fn note<T>(&self, request: &Request<T>) -> String {
        let Some(peer) = request.extensions().get::<PeerIdentity>() else { return String::new() };
        let id = peer.spiffe_id().map(ToString::to_string).unwrap_or_default();
        let mut seen = self.seen();
        seen.last.clone_from(&id);
        if !seen.certificates.contains(peer.certificate()) {
            seen.certificates.insert(peer.certificate().to_vec());
        }
        id
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A service: it greets, or lets another one greet.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) name: &'static str,
    pub(crate) callers: Callers,
    /// Who greets in its place.
    pub(crate) greeter: Option<MeshChannel>,
}

impl Service {
    async fn answer(&self, peer: String, request: HelloRequest) -> Result<HelloReply, Status> {
        if let Some(greeter) = &self.greeter {
            return Ok(GreeterClient::new(greeter.clone()).say_hello(request).await?.into_inner());
        }
        Ok(HelloReply {
            message: format!("hello {}, dear {peer}", request.name),
            backend: self.name.to_owned(),
            peer,
            ..HelloReply::default()
        })
    }
}

#[tonic::async_trait]
impl Greeter for Service {
    type SayHellosStream = BoxStream<'static, Result<HelloReply, Status>>;
    type ChatStream = BoxStream<'static, Result<HelloReply, Status>>;

    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let peer = self.callers.note(&request);
        Ok(Response::new(self.answer(peer, request.into_inner()).await?))
    }

    async fn say_hellos(&self, request: Request<HelloRequest>) -> Result<Response<Self::SayHellosStream>, Status> {
        let peer = self.callers.note(&request);
        let reply = self.answer(peer, request.into_inner()).await;
        Ok(Response::new(stream::iter([reply]).boxed()))
    }

    async fn chat(&self, _: Request<Streaming<HelloRequest>>) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("this service does not chat"))
    }
}
