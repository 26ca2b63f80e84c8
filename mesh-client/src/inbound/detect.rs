//! What a client begins with, looked at without taking it.

use super::chain_match::{Need, Spoken};
use mesh_tls::{ClientHello, FirstBytes};
use mesh_xds::resource::TransportProtocol;
use socket2::SockRef;
use std::{io, net::TcpStream as TcpLook, time::Duration};
use tokio::{io::Interest, net::TcpStream, time::timeout};

/// First byte of a TLS record with a handshake message, and first byte of its version.
const TLS_HANDSHAKE: [u8; 2] = [0x16, 0x03];
/// What a client of HTTP/2 begins with (RFC 9113 section 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// What is looked at at first: nearly every ClientHello.
const FIRST: usize = 2 << 10;
/// A ClientHello that is longer than this is none.
const MOST: usize = 64 << 10;

/// Waits for the first bytes of a connection, and leaves them where they are. A `limit` of zero is none. `None`: the client closed
/// it before it said anything.
///
/// # Errors
/// The socket is broken, or the client is too slow or says too much.
pub(super) async fn detect(socket: &TcpStream, need: Need, limit: Duration) -> io::Result<Option<Spoken>> {
    let looking = look(socket, need);
    if limit.is_zero() {
        return looking.await;
    }
    timeout(limit, looking).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

async fn look(socket: &TcpStream, need: Need) -> io::Result<Option<Spoken>> {
    let mut bytes = vec![0; FIRST];
    let mut length = socket.peek(&mut bytes).await?;
    let mut again = None;
    loop {
        if length == 0 {
            return Ok(None);
        }
        if let Some(spoken) = read(&bytes[..length], need) {
            return Ok(Some(spoken));
        }
        if length == bytes.len() {
            if length >= MOST {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "the first message is too long"));
            }
            bytes.resize(length * 2, 0);
        }
        let again = match &mut again {
            Some(again) => again,
            None => again.insert(TcpLook::from(SockRef::from(socket).try_clone()?)),
        };
        length = more(socket, again, &mut bytes, length).await?;
    }
}

/// Waits until there is more than was seen: what was seen stays, so the socket is readable all the time, and only who looked and says that there
/// was nothing is told of what comes next.
async fn more(socket: &TcpStream, again: &TcpLook, bytes: &mut [u8], seen: usize) -> io::Result<usize> {
    loop {
        let ready = socket.ready(Interest::READABLE).await?;
        let looked = socket.try_io(Interest::READABLE, || match again.peek(bytes)? {
            length if length > seen => Ok(length),
            _ if ready.is_read_closed() => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Err(io::ErrorKind::WouldBlock.into()),
        });
        match looked {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            looked => return looked,
        }
    }
}

/// `None`: these are too few to tell.
pub(super) fn read(bytes: &[u8], need: Need) -> Option<Spoken> {
    let plain = |protocol: &str| {
        let transport = Some(TransportProtocol::RawBuffer);
        Some(Spoken { transport, server_name: None, protocols: vec![protocol.to_owned()] })
    };
    if bytes.iter().zip(&TLS_HANDSHAKE).all(|(a, b)| a == b) {
        if bytes.len() < TLS_HANDSHAKE.len() {
            return None;
        }
        let tls = Spoken { transport: Some(TransportProtocol::Tls), ..Spoken::default() };
        if need < Need::Hello {
            return Some(tls);
        }
        return match ClientHello::read(bytes) {
            FirstBytes::Incomplete => None,
            FirstBytes::Hello(hello) => {
                let protocols = hello.alpn.iter().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
                Some(Spoken { server_name: hello.server_name, protocols, ..tls })
            }
            // The handshake will say what is wrong with it.
            FirstBytes::Other => Some(tls),
        };
    }
    if need < Need::Hello {
        return plain("");
    }
    let known = bytes.len().min(PREFACE.len());
    match bytes[..known] == PREFACE[..known] {
        true if known == PREFACE.len() => plain("h2c"),
        true => None,
        false => plain("http/1.1"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{io::AsyncWriteExt, net::TcpListener};

    #[test]
    fn as_much_is_read_as_is_needed() {
        let tls = |need| read(&[0x16, 0x03, 0x01, 0x00], need).map(|spoken| spoken.transport);
        assert_eq!(tls(Need::Transport), Some(Some(TransportProtocol::Tls)));
        assert_eq!(tls(Need::Hello), None, "the ClientHello is not whole");
        assert_eq!(read(&[0x16], Need::Transport), None);
        let plain = |text: &[u8], need| read(text, need).map(|spoken| spoken.protocols[0].clone());
        assert_eq!(plain(b"G", Need::Transport).as_deref(), Some(""));
        assert_eq!(plain(b"GET /", Need::Hello).as_deref(), Some("http/1.1"));
        assert_eq!(plain(b"PRI * HTTP/2", Need::Hello), None);
        assert_eq!(plain(PREFACE, Need::Hello).as_deref(), Some("h2c"));
        assert_eq!(read(b"PUT", Need::Transport).unwrap().transport, Some(TransportProtocol::RawBuffer));
    }

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        (client, listener.accept().await.unwrap().0)
    }

    #[tokio::test]
    async fn what_was_looked_at_is_still_there_and_slow_clients_are_given_up() {
        let (mut client, server) = pair().await;
        client.write_all(b"PRI * ").await.unwrap();
        let slow = detect(&server, Need::Hello, Duration::from_millis(20)).await;
        assert_eq!(slow.unwrap_err().kind(), io::ErrorKind::TimedOut);
        client.write_all(&PREFACE[6..]).await.unwrap();
        let spoken = detect(&server, Need::Hello, Duration::ZERO).await.unwrap().unwrap();
        assert_eq!(spoken.protocols, ["h2c"]);
        let mut left = [0; 24];
        assert_eq!(server.peek(&mut left).await.unwrap(), 24);
        assert_eq!(left[..], *PREFACE);
        let (client, server) = pair().await;
        drop(client);
        assert_eq!(detect(&server, Need::Transport, Duration::ZERO).await.unwrap(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn who_says_half_of_it_is_not_asked_again_and_again() {
        let (mut client, server) = pair().await;
        client.write_all(b"PRI ").await.unwrap();
        let mut looks = 0;
        let mut looking = std::pin::pin!(detect(&server, Need::Hello, Duration::from_secs(3600)));
        let slow = std::future::poll_fn(|cx| {
            looks += 1;
            looking.as_mut().poll(cx)
        });
        assert_eq!(slow.await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        assert!(looks < 20, "{looks} in an hour");

        // Byte by byte, and then no more.
        let (mut client, server) = pair().await;
        let said = async {
            for byte in &PREFACE[..20] {
                client.write_all(&[*byte]).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(client);
        };
        let (seen, ()) = tokio::join!(detect(&server, Need::Hello, Duration::ZERO), said);
        assert_eq!(seen.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
