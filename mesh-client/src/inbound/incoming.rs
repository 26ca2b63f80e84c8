//! Connections for a server that is not ours.

use super::{
    Inbound, InboundStream, connections::Ending, farewell::Watched, listening::Accepting, serve::mind_foreign,
};
use crate::task::Task;
use futures::Stream;
use std::{
    future, io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tokio::{sync::mpsc, task::JoinSet};

/// Connections of an [`Inbound`], each after its handshake, in the order in which they get ready: for `serve_with_incoming` of
/// tonic's own server (feature `tonic-server`), and for `axum::serve` (feature `axum`, with `InboundLayer::into_make_service`). Ends with the socket, and with
/// [`Inbound::shutdown`].
///
/// The policy is in [`Inbound::layer`], for servers that put the [`ConnectionInfo`](super::ConnectionInfo) into the extensions of requests, as tonic's does, or else in
/// [`InboundStream::layer`]; without that, only TLS and the limits of connections and handshakes hold. Handshakes run in tasks of the
/// current runtime. A connection that fails is logged and forgotten. Dropped, it takes no more, and the socket closes if nobody else takes connections; those it gave
/// live on.
///
/// A connection that has to end (its filter chain is gone, it is idle or too old, [`Inbound::renew_connections`], `shutdown`) ends well whatever
/// server speaks on it: a client of HTTP/2 is told by a GOAWAY, and the server reads the end of the connection once no request is in
/// progress that came to the layer. Requests that begin more than a second after the GOAWAY are answered with 503 (gRPC: UNAVAILABLE), and
/// [`Limits::drain_timeout`](super::Limits::drain_timeout) cuts what is left.
#[derive(Debug)]
pub struct Incoming {
    ready: mpsc::Receiver<InboundStream>,
    #[cfg(feature = "axum")]
    addr: std::net::SocketAddr,
    _task: Task,
    /// The socket closes with the last of them. `None`: it is closed.
    _accepting: Option<Accepting>,
}

impl Incoming {
    pub(super) fn new(inbound: Inbound) -> Self {
        let (give, ready) = mpsc::channel(1);
        let _accepting = inbound.0.listening.begin();
        #[cfg(feature = "axum")]
        let addr = inbound.local_addr();
        let task = Task::spawn(async move {
            let mut handshakes = JoinSet::new();
            loop {
                tokio::select! {
                    fresh = inbound.0.accept() => {
                        let fresh = match fresh {
                            Ok(fresh) => fresh,
                            Err(_) if inbound.0.connections.is_stopping() => return,
                            Err(error) => return tracing::error!(%error, "the listening socket is broken"),
                        };
                        let (shared, give) = (Arc::clone(&inbound.0), give.clone());
                        handshakes.spawn(async move {
                            if let Some(mut stream) = shared.begin(fresh, future::ready).await {
                                let entry = shared.enter(stream.info(), Ending::Foreign);
                                stream.mind(mind_foreign(stream.info().clone(), entry.handle()));
                                stream.watch(Watched::default(), entry);
                                // Fails when nobody takes connections any more.
                                let _ = give.send(stream).await;
                            }
                        });
                    }
                    () = inbound.0.connections.stopping() => return,
                    Some(ended) = handshakes.join_next() => if let Err(error) = ended {
                        tracing::error!(%error, "handshake task failed");
                    },
                }
            }
        });
        Self {
            ready,
            #[cfg(feature = "axum")]
            addr,
            _task: task,
            _accepting,
        }
    }

    #[cfg(feature = "axum")]
    pub(super) fn listens_on(&self) -> std::net::SocketAddr {
        self.addr
    }
}

impl Stream for Incoming {
    type Item = io::Result<InboundStream>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.ready.poll_recv(cx).map(|stream| stream.map(Ok))
    }
}
