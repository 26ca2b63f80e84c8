//! The life of sockets and connections of a server: when the port is free, whom changes reach, what nobody waits for, and who is told.

use crate::{
    rotation::{CLIENT, Ca, SERVER, roots},
    support::{
        ANY, GUARD,
        inbound::{Echo, Seen, Serving, plain},
        nobody,
        raw_h2::frames,
        until,
    },
};
use examples::port::Port;
use futures::{StreamExt, poll};
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    Inbound, TlsRenewal,
    inbound::Limits,
    tls::{Acceptor, MemorySource, Mode, ServerSettings, default_provider},
};
use mesh_tls::{ClientSettings, ClientTls};
use std::{io, net::SocketAddr, pin::pin, sync::Arc, time::Duration};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    time::timeout,
};

const SHORT: Duration = Duration::from_millis(200);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = b"\0\0\0\x04\0\0\0\0\0";
const GOAWAY: u8 = 7;

async fn http2(addr: SocketAddr) -> SendRequest<Empty<bytes::Bytes>> {
    let io = TokioIo::new(TcpStream::connect(addr).await.unwrap());
    let (sender, connection) =
        hyper::client::conn::http2::Builder::new(TokioExecutor::new()).handshake(io).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(path: &str) -> Request<Empty<bytes::Bytes>> {
    Request::get(format!("http://x.test{path}")).body(Empty::new()).unwrap()
}

/// A port that nobody else is given when its server is gone, and an inbound side on it.
async fn kept() -> (Port, Inbound) {
    let port = nobody();
    let inbound = Inbound::builder().bind(port.addr()).await.expect("it is kept for that");
    (port, inbound)
}

/// Clients are refused, and somebody else may listen there.
async fn is_free(addr: SocketAddr) {
    let refused = TcpStream::connect(addr).await.expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let successor = TcpListener::bind(addr).await.expect("the port is free");
    TcpStream::connect(addr).await.unwrap();
    assert_eq!(successor.accept().await.unwrap().1.ip(), addr.ip());
}

#[tokio::test]
async fn the_port_is_free_while_connections_are_drained() {
    let ((_port, inbound), seen) = (kept().await, Arc::<Seen>::default());
    let serving = Serving::of(inbound, Echo(seen.clone()));
    let mut client = http2(serving.addr).await;
    let mut hanging = pin!(client.send_request(get("/hang")));
    assert!(poll!(&mut hanging).is_pending());
    until("the request is there", async || seen.running() == 1).await;
    {
        let mut ending = pin!(serving.inbound.shutdown());
        assert!(poll!(&mut ending).is_pending(), "a request is in progress");
        is_free(serving.addr).await;
        assert!(poll!(&mut ending).is_pending());
    }
    assert!(poll!(&mut hanging).is_pending(), "it is still served");
    serving.inbound.serve(Echo(seen)).await.expect("there is nothing more to serve");
}

#[tokio::test]
async fn the_port_is_free_when_nobody_takes_connections_any_more() {
    let (_port, inbound) = kept().await;
    let (addr, seen) = (inbound.local_addr(), Arc::<Seen>::default());
    let mut client = {
        let mut first = Box::pin(inbound.serve(Echo(seen.clone())));
        let mut second = Box::pin(inbound.serve(Echo(seen.clone())));
        assert!(poll!(&mut second).is_pending());
        let mut client = tokio::select! {
            client = http2(addr) => client,
            _ = &mut first => unreachable!("it serves"),
        };
        drop(first);
        tokio::select! {
            _ = http2(addr) => {}
            _ = &mut second => unreachable!("it serves"),
        }
        client.ready().await.unwrap();
        client
    };
    is_free(addr).await;
    let answer = timeout(GUARD, client.send_request(get("/"))).await.unwrap().expect("open connections are served on");
    answer.into_body().collect().await.unwrap();
    let late = inbound.serve(Echo(seen)).await.expect_err("it is closed");
    assert_eq!(late.kind(), io::ErrorKind::NotConnected);

    // The same for a server that is not ours.
    let (_port, inbound) = kept().await;
    let addr = inbound.local_addr();
    let mut incoming = inbound.incoming();
    let _client = TcpStream::connect(addr).await.unwrap();
    let _connection = incoming.next().await.unwrap().unwrap();
    drop(incoming);
    is_free(addr).await;
}

/// GET / of a path that never answers.
fn hanging() -> Vec<u8> {
    let block = b"\x83\x86\x44\x05/hang";
    let mut frame = vec![0, 0, 9, 1, 5, 0, 0, 0, 1];
    frame.extend_from_slice(block);
    frame
}

/// A server that takes plaintext and TLS, its acceptor, and a client that has said one byte of its preface.
async fn half_said() -> (Serving, Acceptor, Arc<Seen>, TcpStream) {
    let ca = Ca::new();
    let source = Arc::new(MemorySource::empty("server"));
    source.set(Some(ca.issue(SERVER)), Some(roots(&[&ca])));
    let mut settings = ServerSettings::mtls(source);
    settings.mode = Mode::Permissive;
    let acceptor = Acceptor::new(settings, default_provider()).unwrap();
    let limits = Limits::default().drain_timeout(SHORT);
    let inbound = Inbound::builder().limits(limits).acceptor(acceptor.clone()).bind(ANY).await.unwrap();
    let seen = Arc::<Seen>::default();
    let serving = Serving::of(inbound, Echo(seen.clone()));
    let mut half = TcpStream::connect(serving.addr).await.unwrap();
    half.set_nodelay(true).unwrap();
    half.write_all(&PREFACE[..1]).await.unwrap();
    // Who comes later is served: the first was looked at.
    for _ in 0..3 {
        http2(serving.addr).await.send_request(get("/")).await.unwrap();
    }
    (serving, acceptor, seen, half)
}

#[tokio::test]
async fn a_change_reaches_connections_that_are_not_open_yet() {
    // Each by itself: all are told to come again, or plaintext is not taken any more.
    for strict in [false, true] {
        let (serving, acceptor, seen, mut half) = half_said().await;
        if strict {
            acceptor.set_mode(Mode::Strict);
        } else {
            serving.inbound.renew_connections();
        }
        half.write_all(&PREFACE[1..]).await.unwrap();
        half.write_all(SETTINGS).await.unwrap();
        half.write_all(&hanging()).await.unwrap();
        let frames = frames(&mut half).await;
        assert!(frames.contains(&GOAWAY), "{frames:?}");
        until("its request is given up", async || seen.running() == 0).await;
    }
}

/// Connects over TLS.
async fn secured(addr: SocketAddr, source: &Arc<MemorySource>) -> SendRequest<Empty<bytes::Bytes>> {
    let mut settings = ClientSettings::mtls(source.clone());
    settings.alpn = vec![b"h2".to_vec()];
    let tls = ClientTls::new(settings, default_provider()).unwrap();
    let (stream, _) = tls.connect(TcpStream::connect(addr).await.unwrap(), None).await.unwrap();
    let (sender, connection) =
        hyper::client::conn::http2::Builder::new(TokioExecutor::new()).handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

#[tokio::test]
async fn clients_that_are_not_trusted_any_more_are_sent_away_and_others_stay() {
    for renewal in [TlsRenewal::Within(SHORT), TlsRenewal::KeepUntilMaxAge] {
        let (old, new) = (Ca::new(), Ca::new());
        let both = roots(&[&old, &new]);
        let source = |identity, roots| {
            let source = Arc::new(MemorySource::empty("test"));
            source.set(Some(identity), Some(roots));
            source
        };
        let server = source(old.issue(SERVER), both.clone());
        let acceptor = Acceptor::new(ServerSettings::mtls(server.clone()), default_provider()).unwrap();
        let builder = Inbound::builder().tls_renewal(renewal).acceptor(acceptor);
        let seen = Arc::<Seen>::default();
        let serving = Serving::of(builder.bind(ANY).await.unwrap(), Echo(seen.clone()));
        let mut bad = secured(serving.addr, &source(old.issue(CLIENT), both.clone())).await;
        let mut good = secured(serving.addr, &source(new.issue(CLIENT), both.clone())).await;
        let mut hanging = pin!(bad.send_request(get("/hang")));
        assert!(poll!(&mut hanging).is_pending());
        until("the request is there", async || seen.running() == 1).await;

        // Our own certificate alone changes nothing for anybody.
        server.set(Some(new.issue(SERVER)), Some(both.clone()));
        good.send_request(get("/")).await.unwrap();
        assert!(poll!(&mut hanging).is_pending());
        server.set(Some(new.issue(SERVER)), Some(roots(&[&new])));
        if renewal == TlsRenewal::KeepUntilMaxAge {
            for _ in 0..20 {
                good.send_request(get("/")).await.unwrap();
            }
            assert!(poll!(&mut hanging).is_pending());
            bad.send_request(get("/")).await.unwrap();
            continue;
        }
        let cut = async { timeout(GUARD, hanging).await.expect("long before the time to drain") };
        let calls = async {
            loop {
                good.send_request(get("/")).await.expect("no call of a good client fails");
            }
        };
        tokio::select! {
            cut = cut => drop(cut.expect_err("it is cut")),
            () = calls => {}
        }
        good.send_request(get("/")).await.unwrap();
    }
}

#[tokio::test]
async fn who_cannot_listen_is_told_where() {
    let taken = TcpListener::bind(ANY).await.unwrap();
    let addr = taken.local_addr().unwrap();
    let error = Inbound::builder().bind(addr).await.unwrap_err().to_string();
    assert!(error.contains(&addr.to_string()), "{error}");
}

#[tokio::test]
async fn a_service_that_only_one_thread_at_a_time_may_use_is_served() {
    let boxed = tower::util::BoxCloneService::new(Echo(Arc::default()));
    let serving = Serving::of(plain(Limits::default()).await, boxed);
    http2(serving.addr).await.send_request(get("/")).await.unwrap();
    serving.end().await;
}
