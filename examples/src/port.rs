//! A port that is kept while nobody listens on it.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// An address of this machine at which connections are refused and that nobody else is given, as port 0 or for a connection of their own,
/// until it is dropped. What a server that is down looks like.
///
/// On Linux somebody who knows the address can listen on it meanwhile, and again.
#[derive(Debug)]
pub struct Port {
    socket: TcpSocket,
    addr: SocketAddr,
}

impl Port {
    /// Takes `addr`; port 0 takes a free one.
    ///
    /// # Errors
    /// It is not an address of this machine, or somebody else's.
    pub fn take(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        // Connections of a server that was here before linger.
        #[cfg(unix)]
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        let addr = socket.local_addr()?;
        Ok(Self { socket, addr })
    }

    /// The address, with the port that was chosen.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Listens there from now on.
    ///
    /// # Errors
    /// Somebody else does.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn listen(self) -> io::Result<TcpListener> {
        self.socket.listen(1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn a_port_is_kept_until_it_is_listened_on() {
        let port = Port::take("127.0.0.1:0".parse().unwrap()).unwrap();
        let addr = port.addr();
        let refused = TcpStream::connect(addr).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
        let listener = port.listen().unwrap();
        TcpStream::connect(addr).await.unwrap();
        assert_eq!(listener.local_addr().unwrap(), addr);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn servers_come_and_go_on_a_port_that_is_kept() {
        let port = Port::take("127.0.0.1:0".parse().unwrap()).unwrap();
        for _ in 0..3 {
            let listener = TcpListener::bind(port.addr()).await.unwrap();
            TcpStream::connect(port.addr()).await.unwrap();
            drop(listener);
            assert_eq!(TcpStream::connect(port.addr()).await.unwrap_err().kind(), ErrorKind::ConnectionRefused);
        }
    }
}
