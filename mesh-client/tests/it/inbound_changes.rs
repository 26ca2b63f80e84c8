//! What becomes of open connections and their requests when the configuration of a server changes, whoever serves them.

use crate::{
    inbound_serve::tonic_client,
    inbound_xds::{Pair, Porter, chain, chain_with, mutual},
    support::{ANY, GUARD, TARGET, hello, inbound::Serving, mesh_on, prompt_hello, raw_h2::frames, until},
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{CidrRange, DataSource, Http2ProtocolOptions, HttpProtocolOptions, data_source::Specifier},
            listener::v3::FilterChain,
            route::v3::RouteConfiguration,
        },
        extensions::{
            filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier,
            transport_sockets::tls::v3::TlsCertificate,
        },
    },
    google::protobuf::{Duration as ProtoDuration, UInt32Value},
};
use examples::greeter::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer};
use http::{Request, Response, StatusCode};
use http_body_util::Empty;
use hyper_util::rt::TokioIo;
use mesh_client::{
    Inbound, MeshChannel,
    inbound::{Limits, RequestBody},
};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    task::JoinHandle,
    time::{Instant, timeout},
};
use tonic::{Code, service::Routes, transport::Server};

const SHORT: Duration = Duration::from_millis(200);

async fn own(inbound: Inbound) {
    inbound.serve(Routes::new(GreeterServer::new(Porter))).await.unwrap();
}

/// Its connections come from here.
fn from(mut chain: FilterChain, address: &str, bits: u32) -> FilterChain {
    let range = CidrRange { address_prefix: address.into(), prefix_len: Some(UInt32Value { value: bits }) };
    chain.filter_chain_match.as_mut().unwrap().source_prefix_ranges.push(range);
    chain
}

async fn connection(channel: &MeshChannel) -> String {
    hello(channel).await.unwrap().backend
}

/// Waits until the server serves as this many configurations said.
async fn configured(pair: &Pair, configurations: usize) {
    let served = || pair.told.lock().unwrap().iter().filter(|serving| serving.is_serving()).count();
    until("the update is in force", async || served() == configurations).await;
}

#[tokio::test]
async fn a_connection_that_another_chain_takes_now_leaves_and_others_stay() {
    let pair = Pair::serving(own).await;
    let channel = pair.channel("{}").await;
    let all = || chain("all", "", None);
    pair.serve(pair.listener(vec![all()]));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let first = connection(&channel).await;

    pair.serve(pair.listener(vec![all(), from(chain("others", "", None), "10.0.0.0", 8)]));
    configured(&pair, 2).await;
    for _ in 0..5 {
        assert_eq!(connection(&channel).await, first, "a chain for others is nothing to it");
    }
    // Its own chain is still there, and another one is more specific.
    pair.serve(pair.listener(vec![all(), from(chain("near", "", None), "127.0.0.0", 8)]));
    until("it moves to the chain that takes it", async || connection(&channel).await != first).await;

    // The same chain takes it for another reason.
    let second = connection(&channel).await;
    pair.serve(pair.listener(vec![all(), from(chain("near", "", None), "127.0.0.1", 32)]));
    configured(&pair, 4).await;
    for _ in 0..5 {
        assert_eq!(connection(&channel).await, second);
    }
    // Its chain is there, and does not take it any more.
    pair.serve(pair.listener(vec![all(), from(chain("near", "", None), "127.9.9.9", 32)]));
    until("it moves back", async || connection(&channel).await != second).await;
}

#[tokio::test]
async fn a_default_chain_and_one_for_all_connections_are_two_whatever_their_names() {
    let pair = Pair::serving(own).await;
    let channel = pair.channel("{}").await;
    let default = |name: &str| {
        let mut listener = pair.listener(vec![from(chain("others", "", None), "10.0.0.0", 8)]);
        listener.default_filter_chain = Some(chain(name, "", None));
        listener
    };
    pair.serve(default("one"));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let first = connection(&channel).await;
    let mut both = default("one");
    both.filter_chains.push(chain_with("one", "", None, without_routes));
    pair.serve(both);
    until("the chain for all decides", async || {
        hello(&channel).await.is_err_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    pair.serve(default("one"));
    until("and then the default again", async || hello(&channel).await.is_ok()).await;
    assert_ne!(connection(&channel).await, first);
}

/// No request finds a way.
fn without_routes(
    manager: &mut envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::HttpConnectionManager,
) {
    manager.route_specifier = Some(RouteSpecifier::RouteConfig(RouteConfiguration::default()));
}

/// Calls all the time, one after the other; how many, and how many failed.
fn calling(channel: &MeshChannel) -> (Arc<AtomicBool>, JoinHandle<(usize, Vec<tonic::Status>)>) {
    let stop = Arc::<AtomicBool>::default();
    let (channel, stopped) = (channel.clone(), stop.clone());
    let calls = tokio::spawn(async move {
        let (mut calls, mut failed) = (0, Vec::new());
        while !stopped.load(Ordering::SeqCst) {
            calls += 1;
            failed.extend(hello(&channel).await.err());
        }
        (calls, failed)
    });
    (stop, calls)
}

#[tokio::test]
async fn connections_of_tonics_own_server_are_drained_without_a_failed_call() {
    let pair = Pair::new().await;
    let channel = pair.channel("{}").await;
    pair.serve(pair.listener(vec![chain("0", "", None)]));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let (stop, calls) = calling(&channel);
    for round in 1..4 {
        let before = connection(&channel).await;
        pair.serve(pair.listener(vec![chain(&round.to_string(), "", None)]));
        until("there is another connection", async || connection(&channel).await != before).await;
    }
    stop.store(true, Ordering::SeqCst);
    let (made, failed) = calls.await.unwrap();
    assert!(made > 10 && failed.is_empty(), "{made}: {failed:?}");
}

/// Tonic's own server, over connections of an inbound side.
async fn foreign(set: impl FnOnce(&mut Limits)) -> (Inbound, SocketAddr, JoinHandle<()>) {
    let mut limits = Limits::default();
    (limits.drain_notice, limits.drain_timeout) = (Duration::from_millis(20), GUARD);
    set(&mut limits);
    let inbound = Inbound::builder().limits(limits).bind(ANY).await.unwrap();
    let server = Server::builder().accept_http1(true).layer(inbound.layer()).add_service(GreeterServer::new(Porter));
    let (incoming, addr) = (inbound.incoming(), inbound.local_addr());
    let served = tokio::spawn(async move { server.serve_with_incoming(incoming).await.unwrap() });
    (inbound, addr, served)
}

/// A client that has connected and asks nothing.
async fn silent(addr: SocketAddr) -> TcpStream {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    // SETTINGS, and their acknowledgement.
    let mut both = [0; 9];
    socket.read_exact(&mut both).await.unwrap();
    let length = usize::from(both[2]);
    socket.read_exact(&mut vec![0; length]).await.unwrap();
    socket
}

#[tokio::test]
async fn a_foreign_servers_client_is_told_to_go_and_cut_when_it_stays() {
    const GOAWAY: u8 = 7;
    let (inbound, addr, served) = foreign(|limits| limits.drain_timeout = SHORT).await;
    let mut socket = silent(addr).await;
    inbound.renew_connections();
    assert!(frames(&mut socket).await.contains(&GOAWAY));
    // One that is idle for too long, or too old, goes the same way.
    for set in [(|limits: &mut Limits| limits.idle_timeout = Some(SHORT)) as fn(&mut Limits), |limits| {
        limits.max_connection_age = Some(SHORT)
    }] {
        let (_inbound, addr, _) = foreign(|limits| {
            limits.drain_timeout = SHORT;
            set(limits);
        })
        .await;
        assert!(frames(&mut silent(addr).await).await.contains(&GOAWAY));
    }
    // The server is told the end of all.
    inbound.shutdown().await;
    timeout(GUARD, served).await.expect("the stream of connections ends").unwrap();
}

#[tokio::test]
async fn nothing_is_left_of_a_connection_that_went_when_it_was_told() {
    let mut limits = Limits::default();
    (limits.drain_notice, limits.drain_timeout) = (Duration::from_millis(20), SHORT);
    let inbound = Inbound::builder().limits(limits).bind(ANY).await.unwrap();
    // Without the layer nobody knows what is in progress.
    let server = Server::builder().add_service(GreeterServer::new(Porter));
    let (incoming, addr) = (inbound.incoming(), inbound.local_addr());
    tokio::spawn(server.serve_with_incoming(incoming));
    drop(silent(addr).await);
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    // Those that accept, and the server.
    until("it begins with nothing", async || alive() <= 2).await;
    let socket = silent(addr).await;
    inbound.renew_connections();
    drop(socket);
    until("it ends with nothing", async || alive() <= 2).await;
}

#[tokio::test]
async fn an_idle_connection_of_a_foreign_server_reads_its_end_and_a_busy_one_is_served_first() {
    let (inbound, addr, _served) = foreign(|_| {}).await;
    let mut socket = TcpStream::connect(addr).await.unwrap();
    socket.write_all(b"GET /nothing HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
    let mut answer = [0; 12];
    timeout(GUARD, socket.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"HTTP/1.1 200");
    inbound.renew_connections();
    timeout(GUARD, socket.read_to_end(&mut Vec::new())).await.expect("long before the time to drain").unwrap();

    // A call that is in progress all the while ends well.
    let (inbound, addr, _served) = {
        let mut limits = Limits::default();
        (limits.drain_notice, limits.drain_timeout) = (Duration::from_millis(20), GUARD);
        let inbound = Inbound::builder().limits(limits).bind(ANY).await.unwrap();
        let polite = GreeterServer::new(crate::support::inbound::Polite);
        let server = Server::builder().layer(inbound.layer()).add_service(polite);
        let (incoming, addr) = (inbound.incoming(), inbound.local_addr());
        (inbound, addr, tokio::spawn(server.serve_with_incoming(incoming)))
    };
    let mut client = tonic_client(addr).await;
    let (send, receive) = tokio::sync::mpsc::channel(1);
    let mut replies = client.chat(tokio_stream::wrappers::ReceiverStream::new(receive)).await.unwrap().into_inner();
    let request = |name: &str| HelloRequest { name: name.into(), count: 0 };
    send.send(request("before")).await.unwrap();
    assert_eq!(replies.message().await.unwrap().unwrap().message, "before");
    inbound.renew_connections();
    // Longer than the notice and the silence after which an idle one would end.
    tokio::time::sleep(Duration::from_millis(800)).await;
    send.send(request("after")).await.unwrap();
    assert_eq!(timeout(GUARD, replies.message()).await.unwrap().unwrap().unwrap().message, "after");
    drop(send);
    assert!(timeout(GUARD, replies.message()).await.unwrap().unwrap().is_none());
    timeout(GUARD, inbound.shutdown()).await.expect("nothing is left that would have to be cut");
}

#[tokio::test]
async fn an_upgraded_connection_is_waited_for_and_cut() {
    let mut limits = Limits::default();
    limits.drain_timeout = SHORT;
    let inbound = Inbound::builder().limits(limits).bind(ANY).await.unwrap();
    let upgraded = Arc::new(AtomicUsize::new(0));
    let counts = upgraded.clone();
    let service = tower::service_fn(move |mut request: Request<RequestBody>| {
        let counts = counts.clone();
        async move {
            let upgrade = hyper::upgrade::on(&mut request);
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                counts.fetch_add(1, Ordering::SeqCst);
                let mut buffer = [0; 64];
                while let Ok(read @ 1..) = io.read(&mut buffer).await {
                    io.write_all(&buffer[..read]).await.unwrap();
                }
                counts.fetch_sub(1, Ordering::SeqCst);
            });
            let response = Response::builder().status(StatusCode::SWITCHING_PROTOCOLS).header("upgrade", "echo");
            Ok::<_, Infallible>(response.header("connection", "upgrade").body(Empty::<Bytes>::new()).unwrap())
        }
    });
    let serving = Serving::of(inbound, service);
    let mut socket = TcpStream::connect(serving.addr).await.unwrap();
    socket.write_all(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(GUARD, socket.read_u8()).await.unwrap().unwrap());
    }
    socket.write_all(b"what").await.unwrap();
    let mut echo = [0; 4];
    socket.read_exact(&mut echo).await.unwrap();
    assert_eq!((&echo, upgraded.load(Ordering::SeqCst)), (b"what", 1));
    let begin = Instant::now();
    timeout(GUARD, serving.end()).await.expect("it is cut");
    assert!(begin.elapsed() >= SHORT, "it is waited for");
    until("who had it hears of that", async || upgraded.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test]
async fn a_chain_whose_tls_cannot_be_made_holds_up_no_other() {
    let pair = Pair::serving(own).await;
    let channel = pair.channel("{}").await;
    let bad = || {
        let text = || {
            let specifier = Some(Specifier::InlineString("no certificate".into()));
            Some(DataSource { specifier, ..DataSource::default() })
        };
        let mut tls = mutual("default");
        let common = tls.common_tls_context.as_mut().unwrap();
        common.tls_certificate_provider_instance = None;
        let certificate =
            TlsCertificate { certificate_chain: text(), private_key: text(), ..TlsCertificate::default() };
        common.tls_certificates.push(certificate);
        chain("mutual", "tls", Some(tls))
    };
    pair.serve(pair.listener(vec![bad(), chain("plain", "raw_buffer", None)]));
    until("the other chain serves", async || hello(&channel).await.is_ok()).await;
    let said = pair.inbound.serving().to_string();
    assert!(["but", "\"mutual\""].iter().all(|part| said.contains(part)), "{said}");
    // And its policy changes.
    pair.serve(pair.listener(vec![bad(), chain_with("plain", "raw_buffer", None, without_routes)]));
    until("the new policy holds", async || {
        hello(&channel).await.is_err_and(|status| status.code() == Code::Unavailable)
    })
    .await;
    // One that was good before goes on to be secured as it was.
    let mutual_channel = pair.channel("{tls: {mode: ISTIO_MUTUAL}}").await;
    pair.serve(
        pair.listener(vec![chain("mutual", "tls", Some(mutual("default"))), chain("plain", "raw_buffer", None)]),
    );
    until("all is well", async || !pair.inbound.serving().to_string().contains("but")).await;
    until("mutual TLS serves", async || hello(&mutual_channel).await.is_ok()).await;
    pair.serve(pair.listener(vec![bad(), chain("plain", "raw_buffer", None)]));
    until("it is said", async || pair.inbound.serving().to_string().contains("\"mutual\"")).await;
    prompt_hello(&mutual_channel).await.unwrap();
    let fresh = mesh_on(&pair.cp).await.channel(TARGET).unwrap();
    until("new connections too", async || hello(&fresh).await.is_ok()).await;
}

#[tokio::test]
async fn limits_of_a_filter_chain_are_in_force() {
    let pair = Pair::serving(own).await;
    let channel = pair.channel("{}").await;
    let limited = chain_with("limited", "", None, |manager| {
        manager.max_request_headers_kb = Some(UInt32Value { value: 1 });
        manager.http2_protocol_options = Some(Http2ProtocolOptions {
            max_concurrent_streams: Some(UInt32Value { value: 3 }),
            ..Http2ProtocolOptions::default()
        });
        manager.common_http_protocol_options = Some(HttpProtocolOptions {
            max_connection_duration: Some(ProtoDuration { seconds: 0, nanos: 300_000_000 }),
            max_headers_count: Some(UInt32Value { value: 12 }),
            ..HttpProtocolOptions::default()
        });
    });
    pair.serve(pair.listener(vec![limited]));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let first = connection(&channel).await;
    let mut client = GreeterClient::new(channel.clone());
    let mut call = async |headers: usize, length: usize| {
        let mut request = tonic::Request::new(HelloRequest::default());
        for n in 0..headers {
            let name: tonic::metadata::MetadataKey<_> = format!("x-{n}").parse().unwrap();
            request.metadata_mut().insert(name, "v".repeat(length).parse().unwrap());
        }
        client.say_hello(request).await.map(|_| ())
    };
    call(1, 10).await.unwrap();
    call(1, 2000).await.expect_err("more than a KiB of headers");
    call(20, 1).await.expect_err("more than 12 headers");
    until("the connection grows old", async || connection(&channel).await != first).await;
    let mut socket = TcpStream::connect(pair.inbound.local_addr()).await.unwrap();
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let mut settings = [0; 27];
    timeout(GUARD, socket.read_exact(&mut settings)).await.unwrap().unwrap();
    assert!(settings[9..].chunks(6).any(|setting| setting == [0, 3, 0, 0, 0, 3]), "{settings:?}");
}
