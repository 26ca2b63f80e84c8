//! A server that says which of its connections answered.

use crate::{
    outbound::{
        cluster::Breaker,
        connect::{Connectivity, Connector, ConnectorSettings, Subchannel},
    },
    transport::{Lease, Protocol},
};
use bytes::Bytes;
use examples::port::Port;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_tls::Acceptor;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    runtime::Handle,
    sync::{Notify, Semaphore, watch},
    task::{AbortHandle, JoinSet},
};

/// A server that answers with the number of its connection; `/hold` waits to be let go.
pub(super) struct Server {
    pub(super) address: SocketAddr,
    pub(super) accepted: Arc<AtomicUsize>,
    pub(super) open: watch::Receiver<usize>,
    pub(super) hold: Arc<Notify>,
    pub(super) task: AbortHandle,
}

impl Server {
    /// On a port that the test keeps, so that it can come back there.
    pub(super) async fn at(port: &Port, protocol: Protocol, streams: u32) -> Self {
        Self::on(TcpListener::bind(port.addr()).await.expect("it is kept for that"), protocol, streams)
    }

    pub(super) async fn start(protocol: Protocol, streams: u32) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        Self::on(listener, protocol, streams)
    }

    /// HTTP/2 over TLS.
    pub(super) async fn tls(acceptor: Acceptor) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
        Self::run(listener, Protocol::Http2, 100, Some(acceptor))
    }

    pub(super) fn on(listener: TcpListener, protocol: Protocol, streams: u32) -> Self {
        Self::run(listener, protocol, streams, None)
    }

    fn run(listener: TcpListener, protocol: Protocol, streams: u32, acceptor: Option<Acceptor>) -> Self {
        let address = listener.local_addr().expect("address");
        let accepted = Arc::new(AtomicUsize::new(0));
        let (opened, open) = watch::channel(0);
        let hold = Arc::new(Notify::new());
        let (count, released) = (Arc::clone(&accepted), Arc::clone(&hold));
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (io, _) = tokio::select! {
                    accepted = listener.accept() => accepted.expect("accept"),
                    Some(_) = connections.join_next() => {
                        opened.send_modify(|open| *open -= 1);
                        continue;
                    }
                };
                let number = count.fetch_add(1, Ordering::SeqCst);
                opened.send_modify(|open| *open += 1);
                let released = Arc::clone(&released);
                let acceptor = acceptor.clone();
                connections.spawn(async move {
                    match acceptor {
                        None => serve(io, protocol, streams, number, released).await,
                        Some(acceptor) => {
                            if let Ok(io) = acceptor.accept(io).await {
                                serve(io, protocol, streams, number, released).await;
                            }
                        }
                    }
                });
            }
        })
        .abort_handle();
        Self { address, accepted, open, hold, task }
    }

    pub(super) async fn until_open(&mut self, count: usize) {
        within(self.open.wait_for(|open| *open == count)).await.expect("server");
    }
}

async fn serve<IO>(io: IO, protocol: Protocol, streams: u32, number: usize, released: Arc<Notify>)
where
    IO: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request: Request<Incoming>| {
        let released = Arc::clone(&released);
        async move {
            if request.uri().path() == "/hold" {
                released.notified().await;
            }
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(number.to_string()))))
        }
    });
    let io = TokioIo::new(io);
    // How a connection ends is the client's affair.
    let _ = match protocol {
        Protocol::Http1 => hyper::server::conn::http1::Builder::new().serve_connection(io, service).await,
        Protocol::Http2 => {
            let mut builder = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            builder.max_concurrent_streams(streams).serve_connection(io, service).await
        }
    };
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

pub(super) async fn within<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("hangs")
}

pub(super) fn connector(settings: ConnectorSettings, breaker: Option<Arc<Breaker>>) -> Arc<Connector> {
    Connector::new(settings, Arc::new(Semaphore::new(16)), breaker, Handle::current())
}

pub(super) async fn call(lease: Lease, path: &str) -> String {
    let request = Request::get(format!("http://x.test{path}")).body(Empty::<Bytes>::new()).expect("request");
    let response = within(lease.send(request)).await.expect("response");
    let body = within(response.into_body().collect()).await.expect("body").to_bytes();
    String::from_utf8(body.to_vec()).expect("a number")
}

/// An address where nobody listens, and that nobody else is given while the test keeps it.
pub(super) fn nobody() -> Port {
    Port::take(SocketAddr::from(([127, 0, 0, 1], 0))).expect("a free port")
}

pub(super) async fn until(subchannel: &Subchannel, connector: &Connector, state: Connectivity) {
    let mut changes = connector.subscribe();
    within(async {
        while subchannel.state() != state {
            changes.changed().await.expect("connector");
        }
    })
    .await;
}
