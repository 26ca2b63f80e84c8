//! The transport with no policy: what the project's own measurements compare the whole with. Not part of the public
//! interface: may change at any time.

pub use crate::transport::{Kind, RecvBody, TransportError};

use crate::transport::{Connection, Origin, Protocol, TransportConfig};
use bytes::Bytes;
use http::{Request, Response, uri::Authority};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::net::TcpStream;

/// One HTTP/2 connection to each of some addresses, used in turn. Clones share the connections.
#[derive(Clone, Debug)]
pub struct Bare(Arc<Connections>);

#[derive(Debug)]
struct Connections {
    all: Box<[Connection]>,
    next: AtomicUsize,
}

impl Bare {
    /// Connects to each address.
    ///
    /// # Errors
    ///
    /// One does not accept, or does not speak HTTP/2.
    pub async fn connect(addresses: &[SocketAddr]) -> Result<Self, TransportError> {
        let mut all = Vec::with_capacity(addresses.len());
        for address in addresses {
            let socket = TcpStream::connect(address).await?;
            socket.set_nodelay(true)?;
            let authority = Authority::try_from(address.to_string()).expect("an address is an authority");
            let origin = Origin { authority, tls: false, peer: None };
            let config = TransportConfig::default();
            all.push(Connection::handshake(socket, Protocol::Http2, &config, origin, None).await?);
        }
        Ok(Self(Arc::new(Connections { all: all.into(), next: AtomicUsize::new(0) })))
    }

    /// Sends `request` on the connection whose turn it is, and waits for the response headers.
    ///
    /// # Errors
    ///
    /// The connection is closed or has no stream to give, or the request failed.
    pub async fn call<B>(&self, request: Request<B>) -> Result<Response<RecvBody>, TransportError>
    where
        B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
        B::Error: Into<crate::transport::BoxError>,
    {
        let turn = self.0.next.fetch_add(1, Ordering::Relaxed) % self.0.all.len();
        let lease = self.0.all[turn].lease().ok_or_else(|| TransportError::new(Kind::NotSent))?;
        lease.send(request).await
    }
}

impl Drop for Connections {
    fn drop(&mut self) {
        self.all.iter().for_each(Connection::drain);
    }
}
