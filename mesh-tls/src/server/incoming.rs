//! Concurrent accepting, for servers that take a stream of connections.

use super::{Accepted, Acceptor};
use crate::TlsError;
use futures::Stream;
use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, Sleep},
};

/// Handshakes at the same time, unless said otherwise.
const MAX_HANDSHAKES: usize = 1024;
/// Pause after an accept error that will not go away by itself, such as no file descriptors left.
const PAUSE: Duration = Duration::from_millis(100);

/// Connections of a listener, each after its handshake, in the order in which they get ready: for
/// `serve_with_incoming` of tonic. Never ends.
///
/// Handshakes run in tasks of the current runtime, so a slow client holds up nobody. When too many are under way,
/// new connections wait in the listener's backlog. A connection that fails is logged (target `mesh_tls`) and forgotten.
pub struct Incoming {
    acceptor: Acceptor,
    listener: TcpListener,
    handshakes: JoinSet<(SocketAddr, Result<Accepted<TcpStream>, TlsError>)>,
    max_handshakes: usize,
    pause: Pin<Box<Sleep>>,
}

impl Incoming {
    pub(super) fn new(acceptor: Acceptor, listener: TcpListener) -> Self {
        Self {
            acceptor,
            listener,
            handshakes: JoinSet::new(),
            max_handshakes: MAX_HANDSHAKES,
            pause: Box::pin(tokio::time::sleep(Duration::ZERO)),
        }
    }

    /// Limits the handshakes that run at the same time (at least 1). Default 1024.
    #[must_use]
    pub fn max_handshakes(mut self, limit: usize) -> Self {
        self.max_handshakes = limit.max(1);
        self
    }

    /// The address of the listener.
    ///
    /// # Errors
    /// The operating system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    fn start_handshakes(&mut self, cx: &mut Context<'_>) {
        while self.handshakes.len() < self.max_handshakes && self.pause.as_mut().poll(cx).is_ready() {
            match self.listener.poll_accept(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok((stream, peer))) => {
                    // without it small frames wait for acknowledgements; a failure only costs speed
                    let _ = stream.set_nodelay(true);
                    let acceptor = self.acceptor.clone();
                    self.handshakes.spawn(async move { (peer, acceptor.accept(stream).await) });
                }
                Poll::Ready(Err(error)) if is_of_one_connection(&error) => {}
                Poll::Ready(Err(error)) => {
                    tracing::warn!(%error, "connections cannot be accepted");
                    self.pause.as_mut().reset(Instant::now() + PAUSE);
                }
            }
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Accepted<TcpStream>>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            self.start_handshakes(cx);
            match self.handshakes.poll_join_next(cx) {
                Poll::Ready(Some(Ok((_, Ok(accepted))))) => return Poll::Ready(Some(Ok(accepted))),
                Poll::Ready(Some(Ok((_, Err(TlsError::Closed(_)))))) => {} // health checks do that
                Poll::Ready(Some(Ok((peer, Err(error))))) => {
                    tracing::warn!(%peer, %error, "connection was not accepted")
                }
                Poll::Ready(Some(Err(error))) => tracing::error!(%error, "handshake task failed"),
                Poll::Ready(None) | Poll::Pending => return Poll::Pending,
            }
        }
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as K;
    matches!(error.kind(), K::ConnectionAborted | K::ConnectionReset | K::ConnectionRefused | K::Interrupted)
}

impl fmt::Debug for Incoming {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Incoming")
            .field("listener", &self.listener)
            .field("handshakes", &self.handshakes.len())
            .finish_non_exhaustive()
    }
}
