//! Accepted connections: plaintext or TLS behind one type.

use crate::{PeerIdentity, TlsVersion};
use pin_project::pin_project;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

/// How many bytes tell TLS from plaintext.
const PEEK: usize = 2;

/// An accepted connection.
#[pin_project]
#[derive(Debug)]
pub struct Accepted<IO> {
    #[pin]
    stream: Stream<IO>,
    peer: Option<PeerIdentity>,
}

#[pin_project(project = StreamProjection)]
#[derive(Debug)]
enum Stream<IO> {
    Plain(#[pin] Rewind<IO>),
    Tls(#[pin] Box<TlsStream<Rewind<IO>>>),
}

/// What is known about a connection: a request extension in tonic servers.
#[derive(Clone, Debug)]
pub struct ConnectInfo<I> {
    /// That of the transport, for example `tonic::transport::server::TcpConnectInfo`.
    pub transport: I,
    /// Who the client is; `None` for plaintext, or without a client certificate.
    pub peer: Option<PeerIdentity>,
    /// Whether the connection is encrypted.
    pub tls: bool,
}

impl<IO> Accepted<IO> {
    pub(super) fn plain(io: Rewind<IO>) -> Self {
        Self { stream: Stream::Plain(io), peer: None }
    }

    pub(super) fn tls(stream: TlsStream<Rewind<IO>>, peer: Option<PeerIdentity>) -> Self {
        Self { stream: Stream::Tls(Box::new(stream)), peer }
    }

    /// Who the client is; `None` for plaintext, or without a client certificate.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.peer.as_ref()
    }

    /// Whether the connection is encrypted.
    pub fn is_tls(&self) -> bool {
        matches!(self.stream, Stream::Tls(_))
    }

    /// The negotiated ALPN protocol.
    pub fn alpn(&self) -> Option<&[u8]> {
        match &self.stream {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => stream.get_ref().1.alpn_protocol(),
        }
    }

    /// The negotiated version of TLS.
    pub fn version(&self) -> Option<TlsVersion> {
        match &self.stream {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => TlsVersion::negotiated(stream.get_ref().1),
        }
    }

    /// The server name that the client sent.
    pub fn server_name(&self) -> Option<&str> {
        match &self.stream {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => stream.get_ref().1.server_name(),
        }
    }

    /// The transport below.
    pub fn get_ref(&self) -> &IO {
        match &self.stream {
            Stream::Plain(io) => &io.io,
            Stream::Tls(stream) => &stream.get_ref().0.io,
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncRead for Accepted<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.project().stream.project() {
            StreamProjection::Plain(io) => io.poll_read(cx, buf),
            StreamProjection::Tls(io) => io.poll_read(cx, buf),
        }
    }
}

impl<IO: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Accepted<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.project().stream.project() {
            StreamProjection::Plain(io) => io.poll_write(cx, buf),
            StreamProjection::Tls(io) => io.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.project().stream.project() {
            StreamProjection::Plain(io) => io.poll_write_vectored(cx, bufs),
            StreamProjection::Tls(io) => io.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(io) => io.is_write_vectored(),
            Stream::Tls(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().stream.project() {
            StreamProjection::Plain(io) => io.poll_flush(cx),
            StreamProjection::Tls(io) => io.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project().stream.project() {
            StreamProjection::Plain(io) => io.poll_shutdown(cx),
            StreamProjection::Tls(io) => io.poll_shutdown(cx),
        }
    }
}

#[cfg(feature = "tonic")]
impl<IO: tonic::transport::server::Connected> tonic::transport::server::Connected for Accepted<IO> {
    type ConnectInfo = ConnectInfo<IO::ConnectInfo>;

    fn connect_info(&self) -> Self::ConnectInfo {
        ConnectInfo { transport: self.get_ref().connect_info(), peer: self.peer.clone(), tls: self.is_tls() }
    }
}

/// A transport whose first bytes were looked at, and are read again.
#[pin_project]
#[derive(Debug)]
pub(super) struct Rewind<IO> {
    #[pin]
    io: IO,
    bytes: [u8; PEEK],
    /// Range of `bytes` not yet read again.
    from: usize,
    to: usize,
}

impl<IO> Rewind<IO> {
    pub(super) fn new(io: IO) -> Self {
        Self { io, bytes: [0; PEEK], from: 0, to: 0 }
    }
}

impl<IO: AsyncRead + Unpin> Rewind<IO> {
    /// The first bytes that arrive; empty at the end of input. To be called once, before any read.
    pub(super) async fn peek(&mut self) -> io::Result<&[u8]> {
        self.to = self.io.read(&mut self.bytes).await?;
        Ok(&self.bytes[..self.to])
    }
}

impl<IO: AsyncRead> AsyncRead for Rewind<IO> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.project();
        if this.from < this.to && buf.remaining() > 0 {
            let until = (*this.to).min(*this.from + buf.remaining());
            buf.put_slice(&this.bytes[*this.from..until]);
            *this.from = until;
            return Poll::Ready(Ok(()));
        }
        this.io.poll_read(cx, buf)
    }
}

impl<IO: AsyncWrite> AsyncWrite for Rewind<IO> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.project().io.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().io.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().io.poll_shutdown(cx)
    }
}
