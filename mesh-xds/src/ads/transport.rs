//! How the ADS connection gets its byte stream: a hook, so that TLS stays out of this crate.

use crate::bootstrap::{ChannelCreds, ServerAddress, ServerConfig};
use futures::future::BoxFuture;
use std::{fmt, io};
use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream to a control plane.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// An owned [`Io`].
pub type BoxedIo = Box<dyn Io>;

/// Opens connections to control planes.
pub trait Connect: Send + Sync + fmt::Debug {
    /// Opens one connection, ready for HTTP/2 (TLS done, if the server's `channel_creds` ask for it). The caller limits
    /// the time and drops the future when it is over.
    fn connect(&self, server: &ServerConfig) -> BoxFuture<'static, io::Result<BoxedIo>>;
}

/// TCP and Unix sockets without TLS. Refuses servers whose credentials are not `insecure`.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlaintextConnect;

impl Connect for PlaintextConnect {
    fn connect(&self, server: &ServerConfig) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let insecure = server.channel_creds == ChannelCreds::Insecure;
        let address = server.address.clone();
        Box::pin(async move {
            if !insecure {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "a plaintext connector cannot do TLS"));
            }
            connect_address(&address).await
        })
    }
}

/// Opens the transport below TLS.
///
/// # Errors
/// The name does not resolve, or the connection fails.
pub async fn connect_address(address: &ServerAddress) -> io::Result<BoxedIo> {
    match address {
        ServerAddress::Tcp { host, port } => {
            let stream = tokio::net::TcpStream::connect((host.as_str(), *port)).await?;
            stream.set_nodelay(true)?;
            Ok(Box::new(stream))
        }
        #[cfg(unix)]
        ServerAddress::Unix(path) => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
        #[cfg(not(unix))]
        ServerAddress::Unix(_) => Err(io::Error::new(io::ErrorKind::Unsupported, "no Unix sockets on this platform")),
    }
}
