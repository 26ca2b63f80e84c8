//! What a client says first, before anything is decided about it.

use rustls::server::Acceptor;

/// What is read of a ClientHello.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// SNI, in lower case.
    pub server_name: Option<String>,
    /// Protocols offered by ALPN, in the client's order.
    pub alpn: Vec<Vec<u8>>,
}

/// How far the first bytes of a connection are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FirstBytes {
    /// Too few to tell.
    Incomplete,
    /// A whole ClientHello.
    Hello(ClientHello),
    /// Not TLS, or broken TLS.
    Other,
}

impl ClientHello {
    /// Reads the first bytes of a connection. The handshake starts from the same bytes afterwards: this neither answers nor
    /// decides anything.
    pub fn read(bytes: &[u8]) -> FirstBytes {
        let mut acceptor = Acceptor::default();
        let mut rest = bytes;
        loop {
            match acceptor.accept() {
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    let alpn = hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect();
                    let server_name = hello.server_name().map(str::to_ascii_lowercase);
                    return FirstBytes::Hello(Self { server_name, alpn });
                }
                Ok(None) => {}
                Err(_) => return FirstBytes::Other,
            }
            match acceptor.read_tls(&mut rest) {
                Ok(1..) => {}
                Ok(0) => return FirstBytes::Incomplete,
                Err(_) => return FirstBytes::Other,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use std::sync::Arc;

    fn hello(name: &str) -> Vec<u8> {
        let mut config = ClientConfig::builder_with_provider(crate::default_provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = vec![b"istio-h2".to_vec(), b"h2".to_vec()];
        let mut client = ClientConnection::new(Arc::new(config), name.to_owned().try_into().unwrap()).unwrap();
        let mut out = Vec::new();
        client.write_tls(&mut out).unwrap();
        out
    }

    #[test]
    fn a_client_hello_is_known_once_it_is_whole() {
        let bytes = hello("Reviews.example.com");
        for end in 0..bytes.len() {
            assert_eq!(ClientHello::read(&bytes[..end]), FirstBytes::Incomplete, "{end} bytes");
        }
        let expected = ClientHello {
            server_name: Some("reviews.example.com".into()),
            alpn: vec![b"istio-h2".to_vec(), b"h2".to_vec()],
        };
        assert_eq!(ClientHello::read(&bytes), FirstBytes::Hello(expected));
    }

    #[test]
    fn plaintext_is_something_else() {
        for text in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &[0xff; 64]] {
            assert_eq!(ClientHello::read(text), FirstBytes::Other);
        }
        assert_eq!(ClientHello::read(b""), FirstBytes::Incomplete);
    }
}
