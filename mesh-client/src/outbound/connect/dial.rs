//! Byte streams that the application opens itself, in place of TCP sockets of the system.

use futures::future::BoxFuture;
use mesh_xds::{
    ads::{BoxedIo, connect_address},
    bootstrap::ServerAddress,
};
use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
};

/// Opens the byte streams of a mesh, in place of TCP sockets of the system: a tunnel, a network that is simulated
/// ([`MeshBuilder::dial`](crate::MeshBuilder::dial)). TLS and HTTP run over what it opens, as configured.
///
/// The caller bounds the time, and drops the future when it is over. Options of sockets (TCP keepalive and user timeout) are the
/// implementation's own concern.
pub trait Dial: Send + Sync + 'static {
    /// To an endpoint of a cluster.
    fn endpoint(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>>;

    /// To a control plane. By default over a socket of the system.
    fn control_plane(&self, address: &ServerAddress) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let address = address.clone();
        Box::pin(async move { connect_address(&address).await })
    }
}

/// Of one mesh.
#[derive(Clone)]
pub(crate) struct DialRef(pub(crate) Arc<dyn Dial>);

/// What a connection to an endpoint runs over.
pub(super) enum Socket {
    Tcp(TcpStream),
    Dialed(BoxedIo),
}

/// Does the same with either.
macro_rules! either {
    ($socket:expr, $io:ident => $body:expr) => {
        match $socket.get_mut() {
            Socket::Tcp(tcp) => {
                let $io = Pin::new(tcp);
                $body
            }
            Socket::Dialed(io) => {
                let $io = Pin::new(io);
                $body
            }
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        either!(self, io => io.poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(tcp) => tcp.is_write_vectored(),
            Self::Dialed(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, io => io.poll_shutdown(cx))
    }
}

impl fmt::Debug for DialRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dial")
    }
}
