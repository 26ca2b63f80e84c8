//! Accepted connections: plaintext or TLS behind one type.

use super::Presented;
use crate::{PeerIdentity, Rewind, TlsVersion};
use pin_project::pin_project;
use rustls_pki_types::UnixTime;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_rustls::server::TlsStream;

/// An accepted connection.
#[pin_project]
#[derive(Debug)]
pub struct Accepted<IO> {
    #[pin]
    stream: Stream<IO>,
    peer: Option<PeerIdentity>,
    generation: u64,
    /// When it was accepted, since 1970.
    at: Duration,
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
        Self { stream: Stream::Plain(io), peer: None, generation: 0, at: Duration::ZERO }
    }

    pub(super) fn tls(stream: TlsStream<Rewind<IO>>, peer: Option<PeerIdentity>, generation: u64) -> Self {
        let at = Duration::from_secs(UnixTime::now().as_secs());
        Self { stream: Stream::Tls(Box::new(stream)), peer, generation, at }
    }

    /// Who the client is; `None` for plaintext, or without a client certificate.
    pub fn peer(&self) -> Option<&PeerIdentity> {
        self.peer.as_ref()
    }

    /// What the client showed; nothing for plaintext, or without a client certificate.
    pub fn presented(&self) -> Presented {
        let chain = match &self.stream {
            Stream::Plain(_) => None,
            Stream::Tls(stream) => stream.get_ref().1.peer_certificates(),
        };
        Presented { generation: self.generation, at: self.at, chain: chain.unwrap_or_default().to_vec() }
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
            Stream::Plain(io) => io.get_ref(),
            Stream::Tls(stream) => stream.get_ref().0.get_ref(),
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
