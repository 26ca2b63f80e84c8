//! A listener whose handshakes run side by side.

use crate::support::*;
use futures::StreamExt;
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
};

#[tokio::test]
async fn a_silent_client_holds_up_nobody() {
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let mut incoming = server.incoming(TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = incoming.local_addr().unwrap();
    let mut silent = Vec::new();
    for _ in 0..8 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    let mut garbage = TcpStream::connect(address).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    drop(TcpStream::connect(address).await.unwrap());
    let connect = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        client.connect(tcp, None).await.unwrap().0
    };
    let (mut near, far) = tokio::join!(connect, incoming.next());
    let mut far = far.unwrap().unwrap();
    assert_eq!(far.peer().unwrap().to_string(), ALICE);
    echo(&mut near, &mut far).await;
}

#[tokio::test]
async fn handshakes_are_bounded_and_go_on_when_one_ends() {
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut incoming = server.incoming(listener).max_handshakes(1);
    let address = incoming.local_addr().unwrap();
    let silent = TcpStream::connect(address).await.unwrap();
    // the silent one takes the only place
    assert!(futures::poll!(incoming.next()).is_pending());
    let connect = tokio::spawn(async move {
        let tcp = TcpStream::connect(address).await.unwrap();
        client.connect(tcp, None).await.unwrap().0
    });
    tokio::task::yield_now().await;
    assert!(futures::poll!(incoming.next()).is_pending());
    drop(silent);
    let mut far = incoming.next().await.unwrap().unwrap();
    echo(&mut connect.await.unwrap(), &mut far).await;
}

#[cfg(feature = "tonic")]
#[tokio::test]
async fn tonic_is_told_the_peer() {
    use tonic::transport::server::Connected;
    let ca = Ca::new("ca");
    let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
    let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
    let mut incoming = server.incoming(TcpListener::bind("127.0.0.1:0").await.unwrap());
    let address = incoming.local_addr().unwrap();
    let connect = async {
        let tcp = TcpStream::connect(address).await.unwrap();
        client.connect(tcp, None).await.unwrap().0
    };
    let (near, far) = tokio::join!(connect, incoming.next());
    let info = far.unwrap().unwrap().connect_info();
    assert!(info.tls);
    assert_eq!(info.peer.unwrap().spiffe_id().unwrap().to_string(), ALICE);
    assert_eq!(info.transport.remote_addr(), Some(near.get_ref().local_addr().unwrap()));
}
