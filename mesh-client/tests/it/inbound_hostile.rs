//! Clients that mean harm, or are broken: each costs little, is gone in time, and others are served meanwhile.

use crate::support::{
    GUARD,
    inbound::{Echo, Seen, Serving},
    plain_mesh, until,
};
use bytes::Bytes;
use examples::{
    greeter::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer},
    server::acceptor,
};
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{Inbound, inbound::Limits};
use mesh_tls::Mode;
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    runtime::Handle,
    time::timeout,
};
use tonic::service::Routes;

const SHORT: Duration = Duration::from_millis(200);
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

fn limits(set: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits::default();
    set(&mut limits);
    limits
}

/// A call of its own connection, which must succeed.
async fn is_served(addr: SocketAddr) {
    let call = async {
        let io = TokioIo::new(TcpStream::connect(addr).await?);
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut sender, connection) = builder.handshake(io).await?;
        tokio::spawn(connection);
        let request = Request::post("http://x.test/").body(Full::new(Bytes::from_static(b"fine")))?;
        Ok::<_, mesh_client::BoxError>(sender.send_request(request).await?.into_body().collect().await?.to_bytes())
    };
    let answer = timeout(GUARD, call).await.expect("it does not hang");
    assert_eq!(answer.expect("others are served"), "fine");
}

/// A connection on which `bytes` were sent.
async fn saying(addr: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    socket.write_all(bytes).await.unwrap();
    socket
}

/// Reads until the server closes.
async fn is_closed(socket: &mut TcpStream) {
    let closed = timeout(GUARD, async {
        let mut buffer = [0; 1024];
        while matches!(socket.read(&mut buffer).await, Ok(1..)) {}
    });
    closed.await.expect("the server closes");
}

#[tokio::test]
async fn connections_that_say_nothing_or_half_of_it_are_closed_in_time() {
    let limits = limits(|limits| limits.handshake_timeout = SHORT);
    let (serving, _) = Serving::echo(limits).await;
    is_served(serving.addr).await;
    let before = Handle::current().metrics().num_alive_tasks();
    let mut silent = Vec::new();
    for i in 0..40 {
        silent.push(saying(serving.addr, &PREFACE[..i % 3 * 5]).await);
    }
    is_served(serving.addr).await;
    for socket in &mut silent {
        is_closed(socket).await;
    }
    until("all tasks are gone", async || Handle::current().metrics().num_alive_tasks() <= before + 4).await;
    serving.end().await;
}

#[tokio::test]
async fn silent_connections_hold_up_neither_others_nor_the_end() {
    let (cp, _dir) = crate::mtls::control_plane().await;
    let acceptor = acceptor(&cp.ca().unwrap().ensure("default", "greeter").unwrap(), Mode::Permissive).unwrap();
    let limits = limits(|limits| {
        limits.handshake_timeout = 100 * GUARD;
        limits.max_handshakes = 1;
    });
    let builder = Inbound::builder().limits(limits.clone());
    for builder in [builder, Inbound::builder().limits(limits).acceptor(acceptor)] {
        let serving = Serving::of(builder.bind("127.0.0.1:0").await.unwrap(), Echo(Arc::<Seen>::default()));
        let mut silent = Vec::new();
        for _ in 0..10 {
            silent.push(saying(serving.addr, b"").await);
        }
        is_served(serving.addr).await;
        serving.end().await;
        for socket in &mut silent {
            is_closed(socket).await;
        }
    }
}

#[tokio::test]
async fn an_old_connection_is_cut_after_the_time_to_drain_whatever_the_version() {
    let limits = limits(|limits| {
        limits.max_connection_age = Some(SHORT);
        limits.drain_timeout = SHORT;
    });
    let (serving, seen) = Serving::echo(limits).await;
    let mut http2 = saying(serving.addr, &[PREFACE, b"\0\0\x09\x01\x05\0\0\0\x01\x83\x86\x04\x05/hang"].concat()).await;
    let mut http1 = saying(serving.addr, b"GET /hang HTTP/1.1\r\nhost: x\r\n\r\n").await;
    is_closed(&mut http2).await;
    is_closed(&mut http1).await;
    until("no handler is left", async || seen.running() == 0).await;
    assert_eq!(seen.requests(), 2);
    serving.end().await;
}

#[tokio::test]
async fn a_small_window_is_not_enforced_before_the_client_knows_it() {
    let (serving, _) = Serving::echo(limits(|limits| limits.stream_window = 1)).await;
    is_served(serving.addr).await;
    serving.end().await;
}

#[tokio::test]
async fn tls_handshakes_that_never_go_on_are_closed_in_time() {
    let (cp, _dir) = crate::mtls::control_plane().await;
    let acceptor = acceptor(&cp.ca().unwrap().ensure("default", "greeter").unwrap(), Mode::Permissive).unwrap();
    let limits = limits(|limits| limits.handshake_timeout = SHORT);
    let inbound = Inbound::builder().acceptor(acceptor).limits(limits).bind("127.0.0.1:0").await.unwrap();
    let serving = Serving::of(inbound, Echo(Arc::<Seen>::default()));
    let mut half = Vec::new();
    for bytes in [&b"\x16"[..], b"\x16\x03\x01\x02\x00", b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"] {
        half.push(saying(serving.addr, bytes).await);
    }
    is_served(serving.addr).await;
    for socket in &mut half {
        is_closed(socket).await;
    }
    serving.end().await;
}

#[tokio::test]
async fn connections_above_the_limit_are_closed_at_once() {
    let (serving, _) = Serving::echo(limits(|limits| limits.max_connections = 3)).await;
    let mut first = Vec::new();
    for _ in 0..3 {
        let mut socket = saying(serving.addr, PREFACE).await;
        socket.read_u8().await.expect("it is served");
        first.push(socket);
    }
    is_closed(&mut saying(serving.addr, b"").await).await;
    first.pop();
    until("there is room again", async || {
        let mut socket = saying(serving.addr, PREFACE).await;
        socket.read_u8().await.is_ok()
    })
    .await;
    serving.end().await;
}

#[tokio::test]
async fn heads_that_never_end_are_cut_whatever_the_version() {
    let (serving, _) = Serving::echo(limits(|limits| limits.header_timeout = SHORT)).await;
    let open = b"\0\0\x03\x01\0\0\0\0\x01\x83\x86\x84";
    let mut http2 = saying(serving.addr, &[PREFACE, open].concat()).await;
    let mut http1 = saying(serving.addr, b"GET / HTTP/1.1\r\nhost: x\r\nx-slow: ").await;
    let mut unsettled = saying(serving.addr, &PREFACE[..24]).await;
    let mut partial = saying(serving.addr, &[PREFACE, b"\0\0\x08\x06\0\0\0\0\0half"].concat()).await;
    is_served(serving.addr).await;
    for socket in [&mut http2, &mut http1, &mut unsettled, &mut partial] {
        is_closed(socket).await;
    }
    is_served(serving.addr).await;
    serving.end().await;
}

#[tokio::test]
async fn an_idle_connection_is_told_to_go_away_and_a_busy_one_is_not() {
    let (serving, seen) = Serving::echo(limits(|limits| limits.idle_timeout = Some(SHORT))).await;
    let io = TokioIo::new(TcpStream::connect(serving.addr).await.unwrap());
    let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (mut busy, connection) = builder.handshake(io).await.unwrap();
    tokio::spawn(connection);
    let request = Request::post("http://x.test/hang").body(Full::new(Bytes::new())).unwrap();
    let call = tokio::spawn(busy.send_request(request));
    until("it is busy", async || seen.running() == 1).await;
    is_closed(&mut saying(serving.addr, PREFACE).await).await;
    assert!(!call.is_finished() && seen.running() == 1);
    call.abort();
    until("it is idle, and closed", async || busy.is_closed()).await;
    serving.end().await;
}

#[tokio::test]
async fn connections_that_grow_old_are_made_anew_without_a_failed_call() {
    let limits = limits(|limits| limits.max_connection_age = Some(SHORT / 2));
    let serving = Serving::of(
        crate::support::inbound::plain(limits).await,
        Routes::new(GreeterServer::new(crate::support::inbound::Polite)),
    );
    let channel = plain_mesh().await.fixed_channel(&[serving.addr]).unwrap();
    let mut client = GreeterClient::new(channel);
    let until = tokio::time::Instant::now() + 10 * SHORT;
    let mut calls = 0;
    while tokio::time::Instant::now() < until {
        client.say_hello(HelloRequest::default()).await.expect("no call fails");
        calls += 1;
    }
    assert!(calls > 10, "{calls}");
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rapid_resets_run_no_more_handlers_than_streams_may_be_open_and_end() {
    let (serving, seen) = Serving::echo(limits(|limits| limits.max_concurrent_streams = 16)).await;
    let attacker = async {
        let (mut read, mut write) = saying(serving.addr, PREFACE).await.into_split();
        let (stop, mut stopped) = tokio::sync::watch::channel(());
        let sending = async {
            let mut most = 0;
            for stream in (1u32..60_000).step_by(2) {
                let number = stream.to_be_bytes();
                // POST http /hang, all of it; and CANCEL.
                let open = [&b"\0\0\x09\x01\x05"[..], &number, b"\x83\x86\x04\x05/hang"].concat();
                let reset = [&b"\0\0\x04\x03\0"[..], &number, b"\0\0\0\x08"].concat();
                let both = [open, reset].concat();
                tokio::select! {
                    sent = write.write_all(&both) => if sent.is_err() { break },
                    _ = stopped.changed() => break,
                }
                most = most.max(seen.running());
            }
            most
        };
        let receiving = async {
            let mut all = Vec::new();
            let _ = read.read_to_end(&mut all).await;
            drop(stop);
            all
        };
        timeout(GUARD, async { tokio::join!(sending, receiving) }).await.expect("it is thrown out")
    };
    let honest = async {
        for _ in 0..20 {
            is_served(serving.addr).await;
        }
    };
    let ((most, all), ()) = tokio::join!(attacker, honest);
    assert!(most <= 16 + 1, "{most} handlers at once");
    // What was still on its way may have cost it the reason.
    if let Some(goaway) = all.windows(17).rev().find(|bytes| bytes[..9] == *b"\0\0\x08\x07\0\0\0\0\0") {
        assert_eq!(goaway[13..], [0, 0, 0, 11], "ENHANCE_YOUR_CALM");
    }
    until("no handler is left", async || seen.running() == 0).await;
    serving.end().await;
}
