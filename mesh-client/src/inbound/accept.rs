//! From the listening socket to a connection whose peer is known.

use super::{
    Chain, ConnectionInfo, Shared,
    chain_match::{Facts, Need, Spoken},
    connection::{Inner, Tls},
    detect::detect,
    seen::Seen,
};
use mesh_tls::{Accepted, TlsError};
use pin_project::pin_project;
use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Semaphore,
    time::{sleep, timeout},
};

/// Pause after an accept error that will not go away by itself, such as no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// A connection of an [`Inbound`](super::Inbound), its peer verified: what [`Inbound::incoming`](super::Inbound::incoming) gives.
#[pin_project]
pub struct InboundStream {
    #[pin]
    socket: Socket,
    info: ConnectionInfo,
    _open: Open,
}

#[pin_project(project = SocketProjection)]
enum Socket {
    Plain(#[pin] TcpStream),
    Accepted(#[pin] Accepted<TcpStream>),
}

/// A connection just accepted, that nobody has spoken on.
pub(super) struct Fresh {
    socket: TcpStream,
    remote: SocketAddr,
    open: Open,
}

/// One of the connections that are open.
pub(super) struct Open(Arc<AtomicUsize>);

impl Open {
    /// `None`: there are too many.
    fn count(open: &Arc<AtomicUsize>, limit: usize) -> Option<Self> {
        let counted = Self(Arc::clone(open));
        (open.fetch_add(1, Ordering::Relaxed) < limit).then_some(counted)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// The next connection within the limits.
    ///
    /// # Errors
    /// The socket does not listen.
    ///
    /// # Cancel safety
    /// No connection is lost.
    pub(super) async fn accept(&self) -> io::Result<Fresh> {
        loop {
            match self.listener.accept().await {
                Ok((socket, remote)) => {
                    let Some(open) = Open::count(&self.open, self.limits.max_connections) else {
                        tracing::debug!(%remote, "too many connections");
                        continue;
                    };
                    // Without it small frames wait for acknowledgements; a failure only costs speed.
                    let _ = socket.set_nodelay(true);
                    return Ok(Fresh { socket, remote, open });
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => return Err(error),
                Err(error) => {
                    tracing::warn!(%error, "connections cannot be accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Finds the filter chain of a connection, and secures it as that says. Whoever is refused is logged here.
    ///
    /// Waits for the client as long as it likes.
    pub(super) async fn secure(&self, fresh: Fresh) -> Option<InboundStream> {
        let Fresh { socket, remote, open } = fresh;
        let local = socket.local_addr().unwrap_or(self.local);
        let config = self.config.load_full();
        let spoken = match config.need() {
            Need::Addresses => Spoken::default(),
            need => {
                let limit = config.detection_timeout.unwrap_or(self.limits.handshake_timeout);
                match detect(&socket, need, limit).await {
                    Ok(Some(spoken)) => spoken,
                    // Health checks do that.
                    Ok(None) => return None,
                    Err(error) => {
                        tracing::debug!(%remote, %error, "a connection did not say what it is");
                        return None;
                    }
                }
            }
        };
        let facts = Facts { remote, local, spoken };
        let Some(chain) = config.choose(&facts).cloned() else {
            tracing::debug!(%remote, %local, "no filter chain takes the connection");
            return None;
        };
        match secure(socket, &chain, self.limits.handshake_timeout, &self.handshakes).await {
            Ok((socket, tls)) => {
                let info = ConnectionInfo::new(Inner { remote, local, tls, chain, seen: Seen::default() });
                Some(InboundStream { socket, info, _open: open })
            }
            // Health checks do that.
            Err(TlsError::Closed(_)) => None,
            Err(error) => {
                tracing::warn!(%remote, %error, "connection was not accepted");
                None
            }
        }
    }
}

async fn secure(
    socket: TcpStream,
    chain: &Chain,
    limit: Duration,
    handshakes: &Semaphore,
) -> Result<(Socket, Option<Tls>), TlsError> {
    let Some(acceptor) = &chain.tls else { return Ok((Socket::Plain(socket), None)) };
    // Certificates that never come are the handshake's error.
    let _ = timeout(limit, acceptor.ready()).await;
    // Who says nothing takes no place among the handshakes; an error is told by the handshake.
    let _ = socket.peek(&mut [0]).await;
    let place = handshakes.acquire().await.expect("the semaphore is never closed");
    let accepted = acceptor.accept(socket).await?;
    drop(place);
    let tls = accepted.is_tls().then(|| Tls {
        peer: accepted.peer().cloned(),
        sni: accepted.server_name().map(Into::into),
        alpn: accepted.alpn().map(Into::into),
    });
    Ok((Socket::Accepted(accepted), tls))
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionAborted | K::ConnectionReset | K::ConnectionRefused | K::Interrupted)
}

impl InboundStream {
    /// Who is at the other end.
    pub fn info(&self) -> &ConnectionInfo {
        &self.info
    }
}

#[cfg(feature = "tonic-server")]
impl tonic::transport::server::Connected for InboundStream {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl AsyncRead for InboundStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.project().socket.project() {
            SocketProjection::Plain(io) => io.poll_read(cx, buf),
            SocketProjection::Accepted(io) => io.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for InboundStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.project().socket.project() {
            SocketProjection::Plain(io) => io.poll_write(cx, buf),
            SocketProjection::Accepted(io) => io.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.project().socket.project() {
            SocketProjection::Plain(io) => io.poll_write_vectored(cx, bufs),
            SocketProjection::Accepted(io) => io.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.socket {
            Socket::Plain(io) => io.is_write_vectored(),
            Socket::Accepted(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().socket.project() {
            SocketProjection::Plain(io) => io.poll_flush(cx),
            SocketProjection::Accepted(io) => io.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().socket.project() {
            SocketProjection::Plain(io) => io.poll_shutdown(cx),
            SocketProjection::Accepted(io) => io.poll_shutdown(cx),
        }
    }
}

impl fmt::Debug for InboundStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboundStream").field("info", &self.info).finish_non_exhaustive()
    }
}
