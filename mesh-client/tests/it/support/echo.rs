//! An HTTP server, version 1.1 and 2, that remembers what it was asked; and the two ways into a mesh.

use super::{ANY, GUARD, TARGET};
use bytes::Bytes;
use examples::port::Port;
use http::{HeaderMap, HeaderValue, Request, Response, Uri};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_client::{BoxError, Mesh, MeshChannel};
use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use tokio::{net::TcpListener, task::JoinSet};
use tower::{Layer, ServiceExt};

/// Serves until dropped. Answers with its name, as the body and as `x-backend`.
pub(crate) struct Echo {
    addr: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinSet<()>,
}

/// One request that came.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) uri: Uri,
    pub(crate) headers: HeaderMap,
    /// What of it could be read.
    pub(crate) body: Bytes,
}

/// How a request comes into the mesh.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// A `MeshChannel`.
    Channel,
    /// `mesh.layer()`.
    Layer,
}

impl Echo {
    pub(crate) async fn start(name: &'static str) -> Self {
        Self::on(name, TcpListener::bind(ANY).await.unwrap())
    }

    /// With this listener.
    pub(crate) fn on(name: &'static str, listener: TcpListener) -> Self {
        let addr = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let log = seen.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let log = log.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let log = log.clone();
                    async move {
                        let (head, body) = request.into_parts();
                        // What cannot be read is not the test's concern.
                        let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
                        log.lock().unwrap().push(Seen { uri: head.uri, headers: head.headers, body });
                        let mut response = Response::new(Full::new(Bytes::from(name)));
                        response.headers_mut().insert("x-backend", HeaderValue::from_static(name));
                        response.headers_mut().insert("server", HeaderValue::from_static("echo"));
                        Ok::<_, Infallible>(response)
                    }
                });
                connections.spawn(async move {
                    // A connection that breaks is the client's business.
                    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tcp), service).await;
                });
            }
        });
        Self { addr, seen, task }
    }

    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Cuts every connection, and closes the port; nobody else is given it while the test keeps it.
    pub(crate) async fn kill(mut self) -> Port {
        self.task.shutdown().await;
        Port::take(self.addr).expect("it was ours")
    }

    /// All requests so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// The last request.
    pub(crate) fn last(&self) -> Seen {
        self.seen().pop().expect("nothing came")
    }
}

impl Seen {
    /// `:authority` or `host`.
    pub(crate) fn authority(&self) -> String {
        let host = || self.headers.get("host").and_then(|host| host.to_str().ok().map(str::to_owned));
        self.uri.authority().map(ToString::to_string).or_else(host).unwrap_or_default()
    }

    /// Path and query.
    pub(crate) fn path(&self) -> &str {
        self.uri.path_and_query().map_or("", |path| path.as_str())
    }

    /// All values of a header, joined.
    pub(crate) fn header(&self, name: &str) -> String {
        joined(&self.headers, name)
    }
}

/// All values of a header, joined.
pub(crate) fn joined(headers: &HeaderMap, name: &str) -> String {
    headers.get_all(name).iter().map(|value| value.to_str().unwrap()).collect::<Vec<_>>().join(",")
}

/// A request for the greeter's host.
pub(crate) fn get(path: &str) -> http::request::Builder {
    Request::get(format!("http://{}{path}", &TARGET["xds:///".len()..]))
}

impl Way {
    pub(crate) const BOTH: [Self; 2] = [Self::Channel, Self::Layer];

    /// A channel to the greeter, from the control plane or from code.
    pub(crate) fn open(mesh: &Mesh) -> MeshChannel {
        match mesh.status() {
            Some(_) => mesh.channel(TARGET).unwrap(),
            None => mesh.channel(&super::code::host_target()).unwrap(),
        }
    }

    /// Sends a request for the greeter's host, and reads its answer.
    pub(crate) async fn send(
        self,
        mesh: &Mesh,
        request: http::request::Builder,
        body: &'static str,
    ) -> Result<Response<Bytes>, BoxError> {
        self.send_body(mesh, request, Full::from(body)).await
    }

    /// The same with any body.
    pub(crate) async fn send_body<B>(
        self,
        mesh: &Mesh,
        request: http::request::Builder,
        body: B,
    ) -> Result<Response<Bytes>, BoxError>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<BoxError>,
    {
        let request = request.body(body).unwrap();
        let call = async {
            match self {
                Self::Channel => {
                    let (head, body) = Self::open(mesh).oneshot(request).await?.into_parts();
                    Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
                }
                Self::Layer => {
                    let inner = tower::service_fn(|_: Request<B>| async {
                        Err::<Response<Full<Bytes>>, BoxError>("not for the inner client".into())
                    });
                    let (head, body) = mesh.layer().layer(inner).oneshot(request).await?.into_parts();
                    Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
                }
            }
        };
        tokio::time::timeout(GUARD, call).await.expect("hangs")
    }

    /// The greeter that answers a call with these headers.
    pub(crate) async fn greeter(self, mesh: &Mesh, headers: &[(&str, &str)]) -> String {
        let request = get("/helloworld.Greeter/SayHello").method("POST").header("content-type", "application/grpc");
        let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
        // One empty message.
        let response = self.send(mesh, request, "\0\0\0\0\0").await.unwrap();
        let reply: examples::greeter::HelloReply = prost::Message::decode(&response.body()[5..]).unwrap();
        reply.backend
    }

    /// Who answered so many requests; errors by their text.
    pub(crate) async fn spread(self, mesh: &Mesh, count: usize) -> BTreeMap<String, usize> {
        let mut seen = BTreeMap::new();
        for _ in 0..count {
            *seen.entry(self.backend(mesh, get("/x")).await).or_insert(0) += 1;
        }
        seen
    }

    /// The backend that answers a request, or the error.
    pub(crate) async fn backend(self, mesh: &Mesh, request: http::request::Builder) -> String {
        match self.send(mesh, request, "").await {
            Ok(response) => joined(response.headers(), "x-backend"),
            Err(error) => error.to_string(),
        }
    }
}
