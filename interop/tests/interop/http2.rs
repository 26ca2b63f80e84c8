//! Our HTTP/2 and that of others: C-core's server, and Envoy's codec in front of a backend.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use futures::stream::{self, StreamExt, TryStreamExt};
use interop::envoy::Envoy;
use interop::{ccore, report};
use mesh_client::{Mesh, MeshChannel};
use mesh_control::ControlPlane;
use tonic::Code;

use crate::common::Backends;

const SERVICES: &str = include_str!("../../../examples/mesh/services.yaml");
const SERVICE: &str = "http://greeter.default.svc.cluster.local:50051";
const ROUTE: &str = "outbound|50051||greeter.default.svc.cluster.local";
const ANY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// A generous bound for each part.
const GUARD: Duration = Duration::from_secs(60);

type Client = GreeterClient<MeshChannel>;

fn hello(name: &str, count: u32) -> HelloRequest {
    HelloRequest { name: name.to_owned(), count }
}

/// A client of the server at `addr`, for the service of this origin.
async fn client(addr: SocketAddr) -> (Mesh, Client) {
    let mesh = Mesh::builder().build().await.unwrap();
    let channel = mesh.fixed_channel(&[addr]).unwrap();
    (mesh, GreeterClient::with_origin(channel, SERVICE.parse().unwrap()))
}

/// Fails, by name, what hangs.
async fn within<T>(what: &str, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(GUARD, work).await.unwrap_or_else(|_| panic!("{what} hangs"))
}

/// All that HTTP/2 does for gRPC, one after another on few connections.
async fn exercise(client: Client) {
    within("small calls", small_calls(&client)).await;
    within("large messages", large_messages(&client)).await;
    within("a long stream", long_stream(client.clone())).await;
    within("a conversation", conversation(client.clone())).await;
    within("streams that are given up", given_up(client)).await;
}

/// Many at once: more than one connection's streams with most servers.
async fn small_calls(client: &Client) {
    let calls = (0..2000).map(|number| {
        let mut client = client.clone();
        async move {
            let name = format!("caller {number}");
            let reply = client.say_hello(hello(&name, 0)).await?.into_inner();
            assert!(reply.message.contains(&name), "the answer to another call: {}", reply.message);
            Ok::<_, tonic::Status>(())
        }
    });
    stream::iter(calls).buffer_unordered(200).try_collect::<Vec<_>>().await.unwrap();
}

/// Beyond every window, both ways, three at once.
async fn large_messages(client: &Client) {
    let large = "x".repeat(3 << 20);
    let calls = (0..3).map(|_| {
        let (mut client, large) = (client.clone(), large.clone());
        async move { client.say_hello(hello(&large, 0)).await.unwrap().into_inner().message.len() }
    });
    for length in futures::future::join_all(calls).await {
        assert!(length >= large.len(), "{length} bytes came back");
    }
}

async fn long_stream(mut client: Client) {
    let replies = client.say_hellos(hello("stream", 3000)).await.unwrap().into_inner();
    assert_eq!(replies.map(Result::unwrap).count().await, 3000);
}

/// One message at a time.
async fn conversation(mut client: Client) {
    let (say, words) = tokio::sync::mpsc::channel(1);
    let words = tokio_stream::wrappers::ReceiverStream::new(words);
    // Some servers say nothing before they heard something.
    say.send(hello("word 0", 0)).await.unwrap();
    let mut answers = client.chat(words).await.unwrap().into_inner();
    for number in 0..100 {
        let word = format!("word {number}");
        if number > 0 {
            say.send(hello(&word, 0)).await.unwrap();
        }
        assert!(answers.message().await.unwrap().expect("an answer").message.contains(&word));
    }
    drop(say);
    assert!(answers.message().await.unwrap().is_none());
}

/// At once and in the middle: that harms nobody.
async fn given_up(mut client: Client) {
    for number in 0..200 {
        let mut replies = client.say_hellos(hello("given up", 100)).await.unwrap().into_inner();
        for _ in 0..number % 3 {
            replies.message().await.unwrap();
        }
        drop(replies);
    }
    client.say_hello(hello("still there", 0)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn our_http2_serves_calls_to_ccore() {
    let mut server = ccore::Server::start().await.unwrap();
    let (mesh, mut client) = client(server.addr()).await;
    exercise(client.clone()).await;
    // A response that is trailers alone.
    let status = client.say_hello(hello("nobody", 0)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains("nobody is there"), "{status}");
    server.running().unwrap();
    drop(mesh);
    report::row("mesh -> C-core server", "HTTP/2", "2000 calls, 3 MiB both ways, streams, cancels");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn our_http2_serves_calls_to_envoy() {
    let backends = Backends::start_together().await;
    let control = ControlPlane::builder().yaml(backends.written_into(SERVICES)).listen(ANY).start().await.unwrap();
    let mut envoy = Envoy::start(control.addr(), ROUTE).await.unwrap();
    let (mesh, client) = client(envoy.listener()).await;
    exercise(client).await;
    envoy.running().unwrap();
    // What Envoy counts as a client's fault.
    for suffix in ["http2.rx_messaging_error", "http2.inbound_empty_frames_flood", "downstream_cx_protocol_error"] {
        assert_eq!(envoy.counter(suffix).await.unwrap(), 0, "{suffix}");
    }
    drop(mesh);
    report::row("mesh -> Envoy", "HTTP/2", "2000 calls, 3 MiB both ways, streams, cancels");
}
