//! The inbound side over TLS: who calls is known, plaintext is taken where it may be, and a change is felt by open connections.

use crate::{
    mtls::control_plane,
    support::{
        GUARD, TARGET, hello,
        inbound::{Polite, Serving},
        mesh_on, rule, service, until,
    },
};
use examples::{
    greeter::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer},
    server::acceptor,
};
use mesh_client::{Inbound, MeshChannel, inbound::Limits};
use mesh_control::ControlPlane;
use mesh_tls::{Acceptor, Mode};
use std::{net::SocketAddr, time::Duration};
use tempfile::TempDir;
use tonic::{Request, service::Routes, transport::Endpoint};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// A greeter behind an inbound side with an identity, and a channel of a client that has one.
struct World {
    serving: Serving,
    acceptor: Acceptor,
    channel: MeshChannel,
    _cp: ControlPlane,
    _dir: TempDir,
}

impl World {
    async fn new(mode: Mode) -> Self {
        let (cp, dir) = control_plane().await;
        let acceptor = acceptor(&cp.ca().unwrap().ensure("default", "greeter").unwrap(), mode).unwrap();
        let mut limits = Limits::default();
        limits.drain_timeout = Duration::from_millis(500);
        let builder = Inbound::builder().acceptor(acceptor.clone()).limits(limits);
        let inbound = builder.bind("127.0.0.1:0").await.unwrap();
        let serving = Serving::of(inbound, Routes::new(GreeterServer::new(Polite)));
        let yaml = service(&[("one", serving.addr)]) + &rule("{tls: {mode: ISTIO_MUTUAL}}", &[]);
        cp.apply(&yaml).await.unwrap();
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        Self { serving, acceptor, channel, _cp: cp, _dir: dir }
    }
}

/// The peer that a caller in plaintext is, or why it was not served.
async fn plaintext(addr: SocketAddr) -> Result<String, String> {
    let endpoint = Endpoint::try_from(format!("http://{addr}")).unwrap().timeout(GUARD);
    let mut client = GreeterClient::new(endpoint.connect().await.map_err(|error| format!("{error:?}"))?);
    let reply = client.say_hello(Request::new(HelloRequest::default())).await.map_err(|status| status.to_string())?;
    Ok(reply.into_inner().peer)
}

#[tokio::test]
async fn a_handler_knows_its_caller_and_plaintext_is_refused_where_tls_is_required() {
    let world = World::new(Mode::Strict).await;
    assert_eq!(hello(&world.channel).await.unwrap().peer, CLIENT);
    plaintext(world.serving.addr).await.expect_err("TLS is required");
    assert_eq!(hello(&world.channel).await.unwrap().peer, CLIENT);
    world.serving.end().await;
}

#[tokio::test]
async fn tls_and_plaintext_of_both_versions_share_a_port_while_that_is_permitted() {
    let world = World::new(Mode::Permissive).await;
    assert_eq!(hello(&world.channel).await.unwrap().peer, CLIENT);
    assert_eq!(plaintext(world.serving.addr).await.unwrap(), "");
    let io = hyper_util::rt::TokioIo::new(tokio::net::TcpStream::connect(world.serving.addr).await.unwrap());
    let (mut http1, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("/").header("host", "x").body(http_body_util::Empty::<bytes::Bytes>::new());
    let response = http1.send_request(request.unwrap()).await.unwrap();
    assert_eq!(response.version(), http::Version::HTTP_11);

    world.acceptor.set_mode(Mode::Strict);
    plaintext(world.serving.addr).await.expect_err("no longer");
    drop(http1);
    world.serving.end().await;
}

#[tokio::test]
async fn connections_are_made_anew_without_a_failed_call_and_old_ones_are_gone() {
    let world = World::new(Mode::Permissive).await;
    let endpoint = Endpoint::try_from(format!("http://{}", world.serving.addr)).unwrap();
    let mut old = GreeterClient::new(endpoint.connect().await.unwrap());
    old.say_hello(HelloRequest::default()).await.unwrap();
    let (chat, outgoing) = tokio::sync::mpsc::channel::<HelloRequest>(1);
    let streaming = old.clone().chat(tokio_stream::wrappers::ReceiverStream::new(outgoing)).await.unwrap();
    world.acceptor.set_mode(Mode::Strict);
    world.serving.inbound.renew_connections();
    for _ in 0..200 {
        assert_eq!(hello(&world.channel).await.unwrap().peer, CLIENT);
    }
    until("who is not allowed any more is not served", async || old.say_hello(HelloRequest::default()).await.is_err())
        .await;
    let mut streaming = streaming.into_inner();
    let end = tokio::time::timeout(GUARD, streaming.message()).await.expect("it is cut in the end");
    assert!(end.is_err(), "{end:?}");
    drop(chat);
    world.serving.end().await;
}
