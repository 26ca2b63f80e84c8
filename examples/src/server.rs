//! A server whose connections can be cut: what a backend that crashes and comes back looks like to its clients.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::BoxFuture;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use mesh_tls::{FileSource, FileSourceConfig, ServerSettings};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use crate::port::Port;

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// A byte stream that carries HTTP.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Stream for T {}

/// A connection after its handshake.
pub struct Accepted {
    /// Where requests are read from and responses written to.
    pub stream: Box<dyn Stream>,
    /// The identity the other side proved; each request carries it as an extension.
    pub peer: Option<Peer>,
}

/// The identity a caller proved in the handshake of its connection, an extension of every request on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer(pub String);

/// Turns an accepted TCP connection into a byte stream, with TLS or without.
pub type Accept = Arc<dyn Fn(TcpStream) -> BoxFuture<'static, io::Result<Accepted>> + Send + Sync>;

/// Accepts connections as they are, without TLS.
#[must_use]
pub fn plain() -> Accept {
    Arc::new(|tcp| Box::pin(async move { Ok(Accepted { stream: Box::new(tcp), peer: None }) }))
}

/// Accepts connections over TLS, as the acceptor is set. The peer is the caller's SPIFFE id.
#[must_use]
pub fn tls(acceptor: mesh_tls::Acceptor) -> Accept {
    Arc::new(move |tcp| {
        let acceptor = acceptor.clone();
        Box::pin(async move {
            let stream = acceptor.accept(tcp).await.map_err(io::Error::other)?;
            let peer = stream.peer().and_then(|peer| peer.spiffe_id()).map(|id| Peer(id.to_string()));
            Ok(Accepted { stream: Box::new(stream), peer })
        })
    })
}

/// An acceptor with the identity that `mesh-control serve --ca` keeps in `dir`: `cert.pem`, `key.pem` and `ca.pem`. The files
/// are read again every second, so that a renewed certificate is used at once. Callers over TLS need a certificate with one
/// SPIFFE id.
///
/// # Errors
/// A file is missing or wrong; the error names it.
///
/// # Panics
/// Outside a tokio runtime.
pub fn acceptor(dir: &Path, mode: mesh_tls::Mode) -> anyhow::Result<mesh_tls::Acceptor> {
    let provider = mesh_tls::default_provider();
    let config = FileSourceConfig {
        certificate_file: Some(dir.join("cert.pem")),
        private_key_file: Some(dir.join("key.pem")),
        ca_certificate_file: Some(dir.join("ca.pem")),
        refresh_interval: Duration::from_secs(1),
        ..FileSourceConfig::new("server", Arc::clone(&provider))
    };
    let source = Arc::new(FileSource::new(config, &tokio::runtime::Handle::current())?);
    let settings = ServerSettings { mode, ..ServerSettings::mtls(source) };
    Ok(mesh_tls::Acceptor::new(settings, provider)?)
}

/// A server of HTTP/1.1 and HTTP/2 on one address. Dropping it cuts every connection.
pub struct Server<S> {
    addr: SocketAddr,
    service: S,
    accept: Accept,
    connections: Arc<AtomicU64>,
    running: Option<Running>,
    /// The port while it is closed.
    kept: Option<Port>,
}

#[derive(Debug)]
struct Running {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Option<Port>>,
}

impl<S, B> Server<S>
where
    S: tower::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    /// Listens on `addr` and serves `service` on every connection. Port 0 takes a free one, which is kept over a restart.
    ///
    /// # Errors
    /// The address cannot be bound.
    pub async fn start(addr: SocketAddr, accept: Accept, service: S) -> io::Result<Self> {
        let mut server = Self { addr, service, accept, connections: Arc::default(), running: None, kept: None };
        server.restart().await?;
        Ok(server)
    }

    /// Closes the port, which nobody else is given, and cuts every connection in the middle of whatever it carries. Does nothing when already
    /// done.
    pub async fn kill(&mut self) {
        if let Some(Running { stop, task }) = self.running.take() {
            drop(stop);
            // The task ends by itself; it only fails when a runtime shuts down around it.
            self.kept = task.await.ok().flatten();
        }
    }

    /// Listens again on the same address, after cutting what is still connected.
    ///
    /// # Errors
    /// The address was taken by another process meanwhile.
    pub async fn restart(&mut self) -> io::Result<()> {
        self.kill().await;
        let listener = match self.kept.take() {
            Some(port) => port.listen()?,
            None => TcpListener::bind(self.addr).await?,
        };
        self.addr = listener.local_addr()?;
        let (stop, stopped) = oneshot::channel();
        let serving =
            serve(listener, Arc::clone(&self.accept), self.service.clone(), Arc::clone(&self.connections), stopped);
        self.running = Some(Running { stop, task: tokio::spawn(serving) });
        Ok(())
    }
}

impl<S> Server<S> {
    /// The address served, with the port that was chosen.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Whether the port is open.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// How many connections were accepted since the start, over all restarts.
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }
}

impl<S> Drop for Server<S> {
    fn drop(&mut self) {
        if let Some(Running { task, .. }) = self.running.take() {
            task.abort();
        }
    }
}

impl fmt::Debug for Accepted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Accepted").field("peer", &self.peer).finish_non_exhaustive()
    }
}

impl<S> fmt::Debug for Server<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("addr", &self.addr).field("running", &self.is_running()).finish_non_exhaustive()
    }
}

async fn serve<S, B>(
    listener: TcpListener,
    accept: Accept,
    service: S,
    accepted: Arc<AtomicU64>,
    mut stopped: oneshot::Receiver<()>,
) -> Option<Port>
where
    S: tower::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut stopped => break,
            Some(_ended) = connections.join_next() => {}
            incoming = listener.accept() => {
                let Ok((tcp, _from)) = incoming else { continue };
                accepted.fetch_add(1, Ordering::Relaxed);
                connections.spawn(serve_connection(tcp, Arc::clone(&accept), service.clone()));
            }
        }
    }
    let addr = listener.local_addr();
    drop(listener);
    let kept = addr.and_then(Port::take).ok();
    connections.shutdown().await;
    kept
}

async fn serve_connection<S, B>(tcp: TcpStream, accept: Accept, service: S)
where
    S: tower::Service<Request<Incoming>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<BoxError>,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<BoxError>,
{
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY was refused");
    }
    let Accepted { stream, peer } = match accept(tcp).await {
        Ok(accepted) => accepted,
        Err(error) => {
            tracing::info!(%error, "a caller was refused");
            return;
        }
    };
    let service = tower::util::MapRequest::new(service, move |mut request: Request<Incoming>| {
        if let Some(peer) = &peer {
            request.extensions_mut().insert(peer.clone());
        }
        request
    });
    let connection = auto::Builder::new(TokioExecutor::new());
    let connection = connection.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    if let Err(error) = connection.await {
        tracing::debug!(%error, "a connection ended");
    }
}
