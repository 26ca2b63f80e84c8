//! Services behind an inbound side.

use bytes::Bytes;
use examples::greeter::{
    HelloReply, HelloRequest,
    greeter_server::{Greeter, GreeterServer},
};
use futures::{StreamExt, stream::BoxStream};
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use mesh_client::{
    ConnectionInfo, Inbound,
    inbound::{Limits, RequestBody},
};
use mesh_tls::PeerIdentity;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};
use tokio::{
    sync::{Notify, oneshot},
    task::JoinHandle,
};
use tonic::{Status, Streaming, service::Routes};

/// A greeter that says who its caller is.
#[derive(Clone, Debug, Default)]
pub(crate) struct Polite;

#[tonic::async_trait]
impl Greeter for Polite {
    type SayHellosStream = BoxStream<'static, Result<HelloReply, Status>>;
    type ChatStream = BoxStream<'static, Result<HelloReply, Status>>;

    async fn say_hello(&self, request: tonic::Request<HelloRequest>) -> Result<tonic::Response<HelloReply>, Status> {
        let info = request.extensions().get::<ConnectionInfo>().expect("every request has it").clone();
        let peer = request.extensions().get::<PeerIdentity>();
        assert_eq!(peer.map(ToString::to_string), info.peer().map(ToString::to_string));
        assert_eq!(request.remote_addr(), Some(info.remote_addr()), "where tonic looks for it");
        let traceparent = request.metadata().get("traceparent").map_or("", |value| value.to_str().unwrap()).to_owned();
        let HelloRequest { name, .. } = request.into_inner();
        if name == "nobody" {
            return Err(Status::not_found("nobody is here"));
        }
        Ok(tonic::Response::new(HelloReply {
            message: format!("Hello {name}"),
            backend: info.local_addr().to_string(),
            peer: info.peer().map(ToString::to_string).unwrap_or_default(),
            traceparent,
            ..HelloReply::default()
        }))
    }

    async fn say_hellos(
        &self,
        request: tonic::Request<HelloRequest>,
    ) -> Result<tonic::Response<Self::SayHellosStream>, Status> {
        let HelloRequest { name, count } = request.into_inner();
        let replies =
            (0..count).map(move |i| Ok(HelloReply { message: format!("{i} {name}"), ..HelloReply::default() }));
        Ok(tonic::Response::new(futures::stream::iter(replies).boxed()))
    }

    async fn chat(
        &self,
        request: tonic::Request<Streaming<HelloRequest>>,
    ) -> Result<tonic::Response<Self::ChatStream>, Status> {
        let replies = request.into_inner().map(|message| {
            message.map(|HelloRequest { name, .. }| HelloReply { message: name, ..HelloReply::default() })
        });
        Ok(tonic::Response::new(replies.boxed()))
    }
}

/// An inbound side that is served.
pub(crate) struct Serving {
    pub(crate) inbound: Inbound,
    pub(crate) addr: SocketAddr,
    task: JoinHandle<()>,
}

impl Serving {
    pub(crate) async fn greeter() -> Self {
        Self::of(plain(Limits::default()).await, Routes::new(GreeterServer::new(Polite)))
    }

    pub(crate) async fn echo(limits: Limits) -> (Self, Arc<Seen>) {
        let seen = Arc::<Seen>::default();
        (Self::of(plain(limits).await, Echo(seen.clone())), seen)
    }

    pub(crate) fn of<S, B>(inbound: Inbound, service: S) -> Self
    where
        S: tower::Service<Request<RequestBody>, Response = Response<B>> + Clone + Send + 'static,
        S::Error: Into<mesh_client::BoxError>,
        S::Future: Send + 'static,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<mesh_client::BoxError>,
    {
        let (served, addr) = (inbound.clone(), inbound.local_addr());
        let task = tokio::spawn(async move { served.serve(service).await.expect("the socket works") });
        Self { inbound, addr, task }
    }

    /// Ends it, and waits until `serve` has returned.
    pub(crate) async fn end(mut self) {
        self.inbound.shutdown().await;
        (&mut self.task).await.expect("no panic");
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An inbound side without TLS.
pub(crate) async fn plain(limits: Limits) -> Inbound {
    Inbound::builder().limits(limits).bind(super::ANY).await.expect("a free port")
}

/// What an [`Echo`] saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) requests: AtomicUsize,
    pub(crate) running: AtomicUsize,
    pub(crate) changed: Notify,
}

impl Seen {
    pub(crate) fn running(&self) -> usize {
        self.running.load(Ordering::SeqCst)
    }

    pub(crate) fn requests(&self) -> usize {
        self.requests.load(Ordering::SeqCst)
    }
}

/// Counts as running while it lives.
pub(crate) struct Running(Arc<Seen>);

impl Running {
    pub(crate) fn of(seen: &Arc<Seen>) -> Self {
        seen.running.fetch_add(1, Ordering::SeqCst);
        Self(seen.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }
}

/// Sends back what it gets, frame by frame, trailers included. Of its paths, `/hang` never answers, `/panic` panics, `/status/N`
/// answers with that status and a body, `/deaf` answers without reading.
#[derive(Clone, Debug)]
pub(crate) struct Echo(pub(crate) Arc<Seen>);

type EchoBody = http_body_util::combinators::BoxBody<Bytes, mesh_client::BoxError>;

impl tower::Service<Request<RequestBody>> for Echo {
    type Response = Response<EchoBody>;
    type Error = Infallible;
    type Future = futures::future::BoxFuture<'static, Result<Response<EchoBody>, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<RequestBody>) -> Self::Future {
        self.0.requests.fetch_add(1, Ordering::SeqCst);
        let running = Running::of(&self.0);
        Box::pin(async move {
            let path = request.uri().path().to_owned();
            let method = request.method().to_string();
            let full = |text: &str| http_body_util::Full::new(Bytes::from(text.to_owned())).map_err(Into::into).boxed();
            let mut response = match path.split('/').nth(1).unwrap_or_default() {
                "hang" => {
                    let _running = running;
                    let (_never, ended) = oneshot::channel::<()>();
                    let _ = ended.await;
                    std::future::pending().await
                }
                "panic" => panic!("as it was told"),
                "deaf" => Response::new(full("deaf")),
                "status" => {
                    let mut response = Response::new(full("with a body"));
                    *response.status_mut() = path["/status/".len()..].parse().unwrap();
                    response
                }
                _ => {
                    let body = request.into_body();
                    let frames = futures::stream::unfold((body, running), |(mut body, running)| async {
                        let frame: Result<Frame<Bytes>, mesh_client::BoxError> =
                            body.frame().await?.map_err(Into::into);
                        Some((frame, (body, running)))
                    });
                    Response::new(BodyExt::boxed(StreamBody::new(SyncStream(frames.boxed().into()))))
                }
            };
            response.headers_mut().insert("x-method", method.parse().unwrap());
            response.headers_mut().insert("x-path", path.parse().unwrap());
            Ok(response)
        })
    }
}

type Frames = BoxStream<'static, Result<Frame<Bytes>, mesh_client::BoxError>>;

/// A stream that may be looked at from any thread: it is not looked at but polled.
struct SyncStream(sync_wrapper::SyncWrapper<Frames>);

impl futures::Stream for SyncStream {
    type Item = Result<Frame<Bytes>, mesh_client::BoxError>;

    fn poll_next(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.get_mut().poll_next_unpin(cx)
    }
}
