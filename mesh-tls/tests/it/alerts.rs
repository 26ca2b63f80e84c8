//! Refusals that arrive after the handshake, over real sockets.

use crate::support::*;
use mesh_tls::{ClientSettings, Roots, describe_alert};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

/// A client that writes much, reads late, and is refused meanwhile still learns why.
#[tokio::test]
async fn a_refused_client_learns_why_even_when_it_writes_first() {
    let ca = Ca::new("ca");
    let identity = source(&ca.svid(BOB), ca.roots());
    let server = mtls_server(&identity);
    let anonymous = client(ClientSettings::new(Roots::Source(identity)));
    for round in 0..20 {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = server.clone();
        let refused = tokio::spawn(async move { server.accept(listener.accept().await.unwrap().0).await.err() });
        let tcp = TcpStream::connect(address).await.unwrap();
        let (mut stream, _) = anonymous.connect(tcp, None).await.unwrap();
        let request = vec![b'x'; 16 * 1024];
        let error = loop {
            let wrote = async { stream.write_all(&request).await }.await;
            match wrote {
                Err(error) => break error,
                Ok(()) if round % 2 == 0 => {
                    let mut byte = [0];
                    break stream.read_exact(&mut byte).await.unwrap_err();
                }
                Ok(()) => {}
            }
        };
        let told = describe_alert(&error).unwrap_or_else(|| panic!("round {round}: {error:?}"));
        assert_eq!(told, "the server refused us: it requires a client certificate and we presented none");
        assert_eq!(error.to_string(), told, "the I/O error says it by itself");
        drop(stream);
        assert!(refused.await.unwrap().unwrap().is_refused());
    }
}

/// A server outside of this crate: rustls as it comes.
#[tokio::test]
async fn alerts_of_other_servers_are_described() {
    let ca = Ca::new("ca");
    let pair = ca.svid(BOB);
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls_pki_types::pem::PemObject::from_pem_slice(Ca::new("theirs").pem().as_bytes()).unwrap()).unwrap();
    let verifier =
        rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider()).build().unwrap();
    let config = rustls::ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![rustls_pki_types::pem::PemObject::from_pem_slice(pair.chain.as_bytes()).unwrap()],
            rustls_pki_types::pem::PemObject::from_pem_slice(pair.key.as_bytes()).unwrap(),
        )
        .unwrap();
    let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (near, _far) = tokio::join!(client.connect(near, None), acceptor.accept(far));
    let error = near.unwrap().0.read_u8().await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the server refused our certificate spiffe://td/alice: it does not trust the certificate authority that signed it (unknown_ca)"
    );
}

/// Clients that look at nothing but their write would else see a broken pipe: what they send is taken for a moment.
#[tokio::test]
async fn a_refused_client_of_another_make_may_finish_its_write() {
    let ca = Ca::new("ca");
    let pair = ca.issue(|params| {
        params.subject_alt_names = vec![rcgen::SanType::DnsName("bob.example".try_into().unwrap())];
    });
    let server = mtls_server(&source(&pair, ca.roots()));
    let mut roots = rustls::RootCertStore::empty();
    roots.add(rustls_pki_types::pem::PemObject::from_pem_slice(ca.pem().as_bytes()).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
    // a small pipe: the write is not over before the server has refused
    let (near, far) = tokio::io::duplex(1024);
    let client = async {
        let mut stream = connector.connect("bob.example".try_into().unwrap(), near).await.unwrap();
        stream.write_all(&[b'x'; 32 * 1024]).await.unwrap();
        stream.flush().await.unwrap();
        stream.read_u8().await.unwrap_err()
    };
    let (error, refused) = tokio::join!(client, async { server.accept(far).await.map(drop) });
    assert!(describe_alert(&error).unwrap().contains("requires a client certificate"), "{error}");
    assert!(refused.unwrap_err().is_refused());
}
