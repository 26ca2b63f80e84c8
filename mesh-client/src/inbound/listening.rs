//! The listening socket, and when it closes.

use std::{
    future::poll_fn,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::Poll,
};
use tokio::net::{TcpListener, TcpStream};

/// A listening socket that closes at once when it is told to, whoever waits for connections.
///
/// The kernel goes on to take connections as long as it is open: clients would wait for an answer that does not come, where they could try
/// elsewhere at once.
pub(super) struct Listening {
    /// `None`: it is closed.
    socket: Mutex<Option<TcpListener>>,
    /// The socket wakes one who waits: they do by turns.
    turn: tokio::sync::Mutex<()>,
    /// How many take connections.
    acceptors: AtomicUsize,
}

/// Takes connections. The socket closes when the last that did is dropped.
#[derive(Debug)]
pub(super) struct Accepting(Arc<Listening>);

impl Listening {
    pub(super) fn new(socket: TcpListener) -> Self {
        Self { socket: Mutex::new(Some(socket)), turn: tokio::sync::Mutex::default(), acceptors: AtomicUsize::new(0) }
    }

    fn socket(&self) -> MutexGuard<'_, Option<TcpListener>> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `None`: it is closed.
    pub(super) fn begin(self: &Arc<Self>) -> Option<Accepting> {
        self.acceptors.fetch_add(1, Ordering::SeqCst);
        let accepting = Accepting(Arc::clone(self));
        let open = self.socket().is_some();
        open.then_some(accepting)
    }

    /// # Errors
    /// The system's; NotConnected: it is closed.
    ///
    /// # Cancel safety
    /// No connection is lost.
    pub(super) async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let _turn = self.turn.lock().await;
        poll_fn(|cx| match &*self.socket() {
            Some(socket) => socket.poll_accept(cx),
            None => Poll::Ready(Err(closed())),
        })
        .await
    }

    /// Connections are refused from now on, and others may listen on the port.
    pub(super) fn close(&self) {
        let socket = self.socket().take();
        drop(socket);
    }
}

/// What who comes too late is told.
pub(super) fn closed() -> io::Error {
    io::Error::new(io::ErrorKind::NotConnected, "the listening socket is closed")
}

impl Drop for Accepting {
    fn drop(&mut self) {
        if self.0.acceptors.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.close();
        }
    }
}

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listening").field("open", &self.socket().is_some()).finish_non_exhaustive()
    }
}
