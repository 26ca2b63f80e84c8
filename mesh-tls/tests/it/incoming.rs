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
mod in_tonic {
    use super::*;
    use hyper_util::rt::TokioIo;
    use mesh_tls::ConnectInfo;
    use std::{
        convert::Infallible,
        future::{Ready, ready},
        task::{Context, Poll},
    };
    use tonic::{
        body::Body,
        server::NamedService,
        transport::{Endpoint, Server, server::TcpConnectInfo},
    };
    use tower::Service;

    /// Answers with the caller's identity and port, as tonic knows them.
    #[derive(Clone)]
    struct WhoAmI;

    impl NamedService for WhoAmI {
        const NAME: &'static str = "test.WhoAmI";
    }

    impl Service<http::Request<Body>> for WhoAmI {
        type Response = http::Response<Body>;
        type Error = Infallible;
        type Future = Ready<Result<Self::Response, Infallible>>;

        fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, request: http::Request<Body>) -> Self::Future {
            let info = request.extensions().get::<ConnectInfo<TcpConnectInfo>>().unwrap();
            let response = http::Response::builder()
                .header("x-peer", info.peer.as_ref().unwrap().to_string())
                .header("x-port", info.transport.remote_addr().unwrap().port());
            ready(Ok(response.body(Body::empty()).unwrap()))
        }
    }

    #[tokio::test]
    async fn services_of_a_tonic_server_see_the_peer() {
        let ca = Ca::new("ca");
        let client = mtls_client(&source(&ca.svid(ALICE), ca.roots()));
        let server = mtls_server(&source(&ca.svid(BOB), ca.roots()));
        let incoming = server.incoming(TcpListener::bind("127.0.0.1:0").await.unwrap());
        let address = incoming.local_addr().unwrap();
        let serving = tokio::spawn(Server::builder().add_service(WhoAmI).serve_with_incoming(incoming));
        let connector = tower::service_fn(move |_: http::Uri| {
            let client = client.clone();
            async move {
                let tcp = TcpStream::connect(address).await?;
                client.connect(tcp, None).await.map(|(stream, _)| TokioIo::new(stream)).map_err(std::io::Error::other)
            }
        });
        let endpoint = Endpoint::from_static("http://bob");
        let mut channel = endpoint.connect_with_connector(connector).await.unwrap();
        let request = http::Request::get("http://bob/test.WhoAmI/Ask").body(Body::empty()).unwrap();
        std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
        let response = channel.call(request).await.unwrap();
        assert_eq!(response.headers()["x-peer"], ALICE);
        assert!(response.headers().contains_key("x-port"));
        serving.abort();
    }
}
