//! From the listening socket to a connection whose peer is known.

use super::{
    ConnectionInfo, InboundLayer, Shared,
    chain_match::{Facts, Need, Spoken},
    config::Security,
    connection::Tls,
    connections::{Counted, Ending, Entry},
    detect::detect,
    farewell::Watched,
};
use crate::{outbound::connect::TlsRenewal, task::Task};
use mesh_tls::{Accepted, Mode, TlsError};
use pin_project::pin_project;
use std::{
    fmt,
    io::{self, IoSlice},
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
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
    /// What others speak on it is looked at, so that it can end well.
    watched: Option<Box<Watched>>,
    /// It lives as long as whoever has the stream.
    entry: Option<Entry>,
    /// What minds it, until it ended.
    mind: Option<Task>,
    _open: Open,
    _counted: Counted,
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
    counted: Counted,
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
    /// The socket does not listen, or not any more.
    ///
    /// # Cancel safety
    /// No connection is lost.
    pub(super) async fn accept(&self) -> io::Result<Fresh> {
        loop {
            match self.listening.accept().await {
                Ok((socket, remote)) => {
                    let Some(open) = Open::count(&self.open, self.limits.load().max_connections) else {
                        self.refusals.connection("limit", remote, &"too many connections");
                        continue;
                    };
                    self.limits.load().tcp_options().apply(&socket);
                    let counted = self.connections.count();
                    return Ok(Fresh { socket, remote, open, counted });
                }
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::NotConnected) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::warn!(%error, "connections cannot be accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// [`secure`](Self::secure), and what has to come `then`, within the time for handshakes.
    pub(super) async fn begin<T, F: Future<Output = T>>(
        &self,
        fresh: Fresh,
        then: impl FnOnce(InboundStream) -> F,
    ) -> Option<T> {
        let (limit, remote) = (self.limits.load().handshake_timeout, fresh.remote);
        let beginning = timeout(limit, async { Some(then(self.secure(fresh).await?).await) });
        beginning.await.unwrap_or_else(|_| {
            self.refusals.connection("timeout", remote, &format_args!("not ready within {limit:?}"));
            None
        })
    }

    /// Finds the filter chain of a connection, and secures it as that says. Whoever is refused is logged here.
    ///
    /// Waits for the client as long as it likes.
    pub(super) async fn secure(&self, fresh: Fresh) -> Option<InboundStream> {
        let Fresh { socket, remote, open, counted } = fresh;
        let local = socket.local_addr().unwrap_or(self.local);
        let config = self.config.load_full();
        let need = config.need();
        let spoken = match need {
            Need::Addresses => Spoken::default(),
            need => {
                let limit = config.detection_timeout.unwrap_or_else(|| self.limits.load().handshake_timeout);
                match detect(&socket, need, limit).await {
                    Ok(Some(spoken)) => spoken,
                    // Health checks do that.
                    Ok(None) => return None,
                    Err(error) => {
                        self.refusals.connection("detection", remote, &error);
                        return None;
                    }
                }
            }
        };
        let facts = Facts { remote, local, spoken };
        let Some(chain) = config.choose(&facts).cloned() else {
            self.refusals.connection("chain", remote, &format_args!("no filter chain takes a connection to {local}"));
            return None;
        };
        match self.secure_as(socket, remote.ip(), &chain.security).await {
            Ok((socket, tls)) => {
                let info = ConnectionInfo::new(facts, need == Need::Hello, tls, chain, counted.epoch());
                let (watched, entry, mind) = (None, None, None);
                Some(InboundStream { socket, info, watched, entry, mind, _open: open, _counted: counted })
            }
            // Health checks do that.
            Err(TlsError::Closed(_)) => None,
            Err(error) => {
                self.refusals.connection("handshake", remote, &error);
                None
            }
        }
    }

    async fn secure_as(
        &self,
        socket: TcpStream,
        remote: IpAddr,
        security: &Security,
    ) -> Result<(Socket, Option<Tls>), TlsError> {
        let acceptor = match security {
            Security::Plaintext => return Ok((Socket::Plain(socket), None)),
            Security::Tls(acceptor) => acceptor,
            Security::Refused(reason) => return Err(TlsError::Settings(reason.to_string())),
        };
        // Certificates that never come are the handshake's error.
        let limit = self.limits.load().handshake_timeout;
        let _ = timeout(limit, acceptor.ready()).await;
        // Who says nothing takes no place among the handshakes; an error is told by the handshake.
        let _ = socket.peek(&mut [0]).await;
        let handshakes = self.handshakes.load_full();
        let accepted = acceptor.accept_in(handshakes.place(remote).await, socket).await?;
        let tls = accepted.is_tls().then(|| Tls {
            presented: accepted.presented(),
            peer: accepted.peer().cloned(),
            sni: accepted.server_name().map(Into::into),
            alpn: accepted.alpn().map(Into::into),
        });
        Ok((Socket::Accepted(accepted), tls))
    }

    /// Registers a connection that is served, so that it can be told to end. One that was accepted under what does not hold any more (the
    /// configuration, the mode, or all of it) has to leave at once.
    pub(super) fn enter(&self, info: &ConnectionInfo, ending: Ending) -> Entry {
        let entry = self.connections.enter(info.clone(), ending);
        let in_clear =
            || !info.is_tls() && info.chain().acceptor().is_some_and(|acceptor| acceptor.mode() == Mode::Strict);
        if info.epoch() != self.connections.epoch() || in_clear() || !self.config.load().keeps(info) {
            entry.handle().drain(Duration::MAX);
        } else if let TlsRenewal::Within(bound) = self.renewal
            && !info.is_trusted()
        {
            entry.handle().drain(bound);
        }
        entry
    }
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

    /// The policy of this connection as a layer, for servers that do not put its [`info`](Self::info) into the extensions of requests, such as
    /// hyper's, over which axum serves.
    pub fn layer(&self) -> InboundLayer {
        InboundLayer::of_connection(self.info.clone())
    }
}

#[cfg(feature = "tonic-server")]
impl tonic::transport::server::Connected for InboundStream {
    type ConnectInfo = ConnectionInfo;

    fn connect_info(&self) -> ConnectionInfo {
        self.info.clone()
    }
}

impl InboundStream {
    /// Others speak on it, and may hand it on: its entry goes along.
    pub(super) fn watch(&mut self, watched: Watched, entry: Entry) {
        self.watched = Some(Box::new(watched));
        self.entry = Some(entry);
    }

    /// Minds it as long as it lives.
    pub(super) fn mind(&mut self, minding: impl Future<Output = ()> + Send + 'static) {
        self.mind = Some(Task::spawn(minding));
    }
}

impl AsyncRead for InboundStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut this = self.project();
        let Some(watched) = this.watched else { return this.socket.poll_read(cx, buf) };
        let farewell = this.info.farewell();
        if let Poll::Ready(end) = watched.poll_before_read(farewell, this.socket.as_mut(), cx) {
            return Poll::Ready(end);
        }
        let before = buf.filled().len();
        ready!(this.socket.poll_read(cx, buf))?;
        watched.read(farewell, &buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for InboundStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if self.watched.is_some() {
            return self.poll_write_vectored(cx, &[IoSlice::new(buf)]);
        }
        self.project().socket.poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut this = self.project();
        let Some(watched) = this.watched else { return this.socket.poll_write_vectored(cx, bufs) };
        let farewell = this.info.farewell();
        ready!(watched.poll_before_write(farewell, this.socket.as_mut(), cx))?;
        let written = ready!(this.socket.poll_write_vectored(cx, bufs))?;
        watched.wrote(farewell, bufs, written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().socket.poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().socket.poll_shutdown(cx)
    }
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.project() {
            SocketProjection::Plain(io) => io.poll_read(cx, buf),
            SocketProjection::Accepted(io) => io.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.project() {
            SocketProjection::Plain(io) => io.poll_write(cx, buf),
            SocketProjection::Accepted(io) => io.poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.project() {
            SocketProjection::Plain(io) => io.poll_write_vectored(cx, bufs),
            SocketProjection::Accepted(io) => io.poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(io) => io.is_write_vectored(),
            Self::Accepted(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project() {
            SocketProjection::Plain(io) => io.poll_flush(cx),
            SocketProjection::Accepted(io) => io.poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.project() {
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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use crate::inbound::{Inbound, Limits};
    use socket2::SockRef;
    use std::time::Duration;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn sockets_of_clients_have_the_options_of_the_limits() {
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let own = Limits::default().tcp_user_timeout(seconds(7)).tcp_keepalive(seconds(8));
        for (limits, user, keepalive) in [(Limits::default(), seconds(120), 60), (own, seconds(7), 8)] {
            let inbound = Inbound::builder().limits(limits).bind("127.0.0.1:0").await.unwrap();
            let _client = TcpStream::connect(inbound.local_addr()).await.unwrap();
            let fresh = inbound.0.accept().await.unwrap();
            let socket = SockRef::from(&fresh.socket);
            assert_eq!(socket.tcp_user_timeout().unwrap(), user);
            assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(keepalive));
        }
    }
}
