//! Limits, GOAWAY, keepalive, drain.

use super::support::{Heard, collect, echo, idle, lease, origin, pair, pair_with, post, serve, within};
use crate::transport::{Connection, Keepalive, Kind, Protocol, TransportConfig};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Empty};
use std::{
    future::poll_fn,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Semaphore,
};

fn server() -> h2::server::Builder {
    h2::server::Builder::new()
}

fn get() -> Request<Empty<Bytes>> {
    Request::get("http://x.test/").body(Empty::new()).expect("request")
}

fn keepalive(while_idle: bool) -> Keepalive {
    let second = Duration::from_secs(1);
    Keepalive { interval: 10 * second, repeat: 60 * second, timeout: 5 * second, while_idle, ..Keepalive::default() }
}

#[tokio::test]
async fn the_peers_stream_limit_is_known_before_the_first_request_and_kept() {
    let (connection, server) = pair(TransportConfig::default(), server().max_concurrent_streams(2)).await;
    serve(server, echo);
    let first = lease(&connection);
    let second = lease(&connection);
    assert!(!connection.has_capacity() && connection.is_usable());
    assert!(connection.lease().is_none());
    drop(first);
    assert!(connection.has_capacity());
    let response = within(second.send(post("x"))).await.expect("response");
    assert_eq!(connection.in_flight(), 1, "a stream counts until its body ended");
    collect(response).await;
    assert_eq!(connection.in_flight(), 0);
}

#[tokio::test]
async fn whoever_waits_for_a_stream_hears_when_one_ends() {
    let heard = Arc::new(Heard::default());
    let events = Some(Arc::clone(&heard) as _);
    let (connection, server) = pair_with(TransportConfig::default(), server().max_concurrent_streams(1), events).await;
    serve(server, echo);
    let held = lease(&connection);
    drop(held);
    assert_eq!(heard.capacity.load(Ordering::SeqCst), 0, "nobody waits");
    let held = lease(&connection);
    connection.set_starved(true);
    drop(held);
    assert_eq!(heard.capacity.load(Ordering::SeqCst), 1);
}

#[tokio::test]
async fn a_limit_of_zero_holds_requests_until_it_is_raised() {
    let heard = Arc::new(Heard::default());
    let (client, mut io) = tokio::io::duplex(1 << 16);
    let config = TransportConfig::default();
    let events = Some(Arc::clone(&heard) as _);
    let connect = tokio::spawn(async move {
        Connection::handshake(client, Protocol::Http2, &config, origin(), events).await.expect("handshake")
    });
    let settings = |limit: u8| [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, limit];
    io.write_all(&settings(0)).await.expect("write");
    let connection = within(connect).await.expect("task");
    assert!(connection.is_usable() && !connection.has_capacity());
    connection.set_starved(true);
    io.write_all(&settings(5)).await.expect("write");
    within(heard.any.notified()).await;
    assert!(connection.has_capacity());
    assert_eq!((heard.raised.load(Ordering::SeqCst), heard.capacity.load(Ordering::SeqCst)), (1, 0));
}

#[tokio::test]
async fn a_peer_that_accepts_and_says_nothing_is_never_ready() {
    let (client, _io) = tokio::io::duplex(1 << 16);
    let config = TransportConfig::default();
    let handshake = Connection::handshake(client, Protocol::Http2, &config, origin(), None);
    let result = tokio::time::timeout(Duration::from_millis(50), handshake).await;
    assert!(result.is_err(), "no SETTINGS came");
}

#[tokio::test]
async fn goaway_fails_what_the_peer_did_not_take_and_finishes_the_rest() {
    let heard = Arc::new(Heard::default());
    let events = Some(Arc::clone(&heard) as _);
    let (connection, mut server) = pair_with(TransportConfig::default(), &server(), events).await;
    let first = tokio::spawn(lease(&connection).send(get()));
    let (_, mut respond) = within(server.accept()).await.expect("stream").expect("request");
    server.graceful_shutdown();
    tokio::spawn(async move { while server.accept().await.is_some() {} });
    within(heard.any.notified()).await;
    assert!(!connection.is_usable());
    assert!(connection.lease().is_none());
    assert_eq!(heard.unusable.load(Ordering::SeqCst), 1);
    let mut send = respond.send_response(Response::new(()), false).expect("open");
    send.send_data(Bytes::from("in time"), true).expect("send");
    let response = within(first).await.expect("task").expect("response");
    assert_eq!(within(collect(response)).await.0, "in time");
    within(connection.closed()).await;
}

#[tokio::test]
async fn streams_above_the_last_one_of_a_goaway_were_not_processed() {
    let (client, mut io) = tokio::io::duplex(1 << 16);
    let config = TransportConfig::default();
    let connect =
        tokio::spawn(async move { Connection::handshake(client, Protocol::Http2, &config, origin(), None).await });
    io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.expect("SETTINGS");
    let connection = within(connect).await.expect("task").expect("handshake");
    let first = tokio::spawn(lease(&connection).send(get()));
    let second = tokio::spawn(lease(&connection).send(get()));
    // Both requests are on the wire when the GOAWAY (last stream 1, NO_ERROR) and the end of the connection come.
    let mut seen = Vec::new();
    while seen.windows(9).filter(|w| w[3] == 1 && w[4] == 5 && w[5..8] == [0, 0, 0]).count() < 2 {
        assert_ne!(within(io.read_buf(&mut seen)).await.expect("read"), 0);
    }
    io.write_all(&[0, 0, 8, 7, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]).await.expect("GOAWAY");
    let (first, second) = {
        let error = within(async { tokio::try_join!(second) }).await.expect("task").0.expect_err("above the last");
        drop(io);
        (within(first).await.expect("task").expect_err("cut"), error)
    };
    let (lost, unprocessed) = if first.is_unprocessed() { (second, first) } else { (first, second) };
    assert_eq!(unprocessed.kind(), Kind::GoAway);
    assert!(unprocessed.is_unprocessed());
    assert_eq!(lost.kind(), Kind::Closed);
    assert!(!lost.is_unprocessed());
    assert_eq!(connection.in_flight(), 0);
}

#[tokio::test]
async fn a_request_that_never_left_is_unprocessed() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    let lease = lease(&connection);
    drop(server);
    within(connection.closed()).await;
    let error = within(lease.send(get())).await.expect_err("closed");
    assert!(error.is_unprocessed(), "{error:?}");
}

#[tokio::test]
async fn a_drained_connection_finishes_its_streams_and_closes() {
    let (connection, mut server) = pair(TransportConfig::default(), &server()).await;
    let call = tokio::spawn(lease(&connection).send(get()));
    let (_, mut respond) = within(server.accept()).await.expect("stream").expect("request");
    connection.drain();
    assert!(!connection.is_usable() && connection.lease().is_none());
    respond.send_response(Response::new(()), true).expect("send");
    let serving = tokio::spawn(async move {
        let goodbye = server.accept().await;
        assert!(goodbye.is_none(), "a clean end");
    });
    within(call).await.expect("task").expect("response");
    within(connection.closed()).await;
    within(serving).await.expect("server");
}

#[tokio::test]
async fn an_idle_connection_drains_at_once_and_an_abort_cuts() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, echo);
    connection.drain();
    within(connection.closed()).await;

    let (connection, server) = pair(TransportConfig::default(), &h2::server::Builder::new()).await;
    serve(server, |_, respond| async move {
        let _open = respond;
        std::future::pending::<()>().await;
    });
    let call = tokio::spawn(lease(&connection).send(get()));
    tokio::task::yield_now().await;
    connection.abort(Kind::Closed);
    let error = within(call).await.expect("task").expect_err("cut");
    assert_eq!(error.kind(), Kind::Closed);
    within(connection.closed()).await;
}

#[tokio::test]
async fn a_connection_takes_only_so_many_requests() {
    let config = TransportConfig { max_requests: Some(2), ..Default::default() };
    let (connection, server) = pair(config, &server()).await;
    serve(server, echo);
    collect(within(lease(&connection).send(post("1"))).await.expect("response")).await;
    let last = lease(&connection);
    assert!(!connection.is_usable());
    collect(within(last.send(post("2"))).await.expect("response")).await;
    within(connection.closed()).await;
}

#[tokio::test(start_paused = true)]
async fn a_black_hole_is_noticed_by_keepalive() {
    let keepalive = keepalive(false);
    let config = TransportConfig { keepalive: Some(keepalive), ..Default::default() };
    let (connection, server) = pair(config, &server()).await;
    // The server stops being polled: bytes go in, nothing comes out.
    let begun = tokio::time::Instant::now();
    let error = lease(&connection).send(get()).await.expect_err("silence");
    assert_eq!(error.kind(), Kind::KeepaliveTimeout);
    assert!(!error.is_unprocessed());
    let took = begun.elapsed();
    assert!(took >= Duration::from_secs(15) && took <= Duration::from_secs(21), "{took:?}");
    assert!(!connection.is_usable());
    connection.closed().await;
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_answers_pings_is_left_alone_and_an_idle_one_is_not_pinged() {
    let keepalive = keepalive(false);
    let config = TransportConfig { keepalive: Some(keepalive), ..Default::default() };
    let (idle, silent) = pair(config.clone(), &server()).await;
    let (connection, alive) = pair(config, &server()).await;
    serve(alive, |_, mut respond| async move {
        tokio::time::sleep(Duration::from_secs(600)).await;
        respond.send_response(Response::new(()), true).expect("send");
    });
    let response = lease(&connection).send(get()).await.expect("ten silent minutes, but PINGs are answered");
    assert_eq!(response.status(), 200);
    assert!(idle.is_usable());
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn pings_into_a_lasting_silence_are_few() {
    let config = TransportConfig { keepalive: Some(keepalive(false)), ..Default::default() };
    let (client, mut io) = tokio::io::duplex(1 << 16);
    let connect = Connection::handshake(client, Protocol::Http2, &config, origin(), None);
    let pings = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counted = Arc::clone(&pings);
    tokio::spawn(async move {
        io.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.expect("SETTINGS");
        io.read_exact(&mut [0; 24]).await.expect("preface");
        loop {
            let mut head = [0; 9];
            if io.read_exact(&mut head).await.is_err() {
                return;
            }
            let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
            io.read_exact(&mut payload).await.expect("payload");
            if head[3] == 6 && head[4] == 0 {
                counted.fetch_add(1, Ordering::SeqCst);
                let answer = [&[0, 0, 8, 6, 1, 0, 0, 0, 0], payload.as_slice()].concat();
                io.write_all(&answer).await.expect("PONG");
            }
        }
    });
    let connection = connect.await.expect("handshake");
    let call = tokio::time::timeout(Duration::from_secs(195), lease(&connection).send(get())).await;
    assert!(call.is_err(), "no answer comes, and the peer lives");
    // At 10 to 15 s, then every 60 s.
    let pings = pings.load(Ordering::SeqCst);
    assert!((3..=4).contains(&pings), "{pings}");
    assert!(connection.is_usable());
}

#[tokio::test(start_paused = true)]
async fn an_idle_black_hole_is_noticed_when_asked_to() {
    let keepalive = keepalive(true);
    let config = TransportConfig { keepalive: Some(keepalive), ..Default::default() };
    let (connection, server) = pair(config, &server()).await;
    tokio::time::timeout(Duration::from_secs(30), connection.closed()).await.expect("noticed");
    drop(server);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_under_a_ping_was_not_silent() {
    // Whether the PING or the connection is heard of first is chance.
    for _ in 0..30 {
        let config = TransportConfig { keepalive: Some(keepalive(false)), ..Default::default() };
        let (connection, mut server) = pair(config, &server()).await;
        let call = tokio::spawn(lease(&connection).send(get()));
        let (_, mut respond) = server.accept().await.expect("stream").expect("request");
        let _open = respond.send_response(Response::new(()), false).expect("open");
        // The headers leave; then the server is as good as dead.
        let ended = poll_fn(|cx| std::task::Poll::Ready(server.poll_closed(cx).is_ready())).await;
        assert!(!ended);
        let mut body = call.await.expect("task").expect("headers").into_body();
        // After the PING (10 to 15 s), before its time is over.
        tokio::time::sleep(Duration::from_millis(15_500)).await;
        assert!(connection.is_usable());
        drop(server);
        connection.closed().await;
        tokio::task::yield_now().await;
        let error = body.frame().await.expect("an error, not an end").expect_err("cut");
        assert_eq!(error.kind(), Kind::Closed);
    }
}

#[tokio::test(start_paused = true)]
async fn an_interval_of_zero_is_a_second() {
    let second = Duration::from_secs(1);
    let keepalive = Keepalive {
        interval: Duration::ZERO,
        repeat: Duration::ZERO,
        timeout: second,
        while_idle: true,
        ..Keepalive::default()
    };
    let config = TransportConfig { keepalive: Some(keepalive), ..Default::default() };
    let (connection, server) = pair(config, &server()).await;
    let begun = tokio::time::Instant::now();
    connection.closed().await;
    let took = begun.elapsed();
    assert!(took >= 2 * second && took <= 4 * second, "{took:?}");
    drop(server);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_calls_resets_and_cancels_leaves_nothing_behind() {
    let (connection, server) = pair(TransportConfig::default(), server().max_concurrent_streams(64)).await;
    serve(server, |request, mut respond| async move {
        match fastrand::u8(..8) {
            0 => respond.send_reset(h2::Reason::REFUSED_STREAM),
            1 => respond.send_reset(h2::Reason::INTERNAL_ERROR),
            2 => drop(respond),
            _ => echo(request, respond).await,
        }
    });
    let room = Arc::new(Semaphore::new(64));
    let calls: Vec<_> = (0..4000u32)
        .map(|i| {
            let (connection, room) = (connection.clone(), Arc::clone(&room));
            tokio::spawn(async move {
                let _room = room.acquire_owned().await.expect("open");
                let Some(lease) = connection.lease() else { return };
                let call = async {
                    let response = lease.send(post(vec![1; fastrand::usize(..3000)])).await.ok()?;
                    response.into_body().collect().await.ok()
                };
                if i % 5 == 0 {
                    let mut call = Box::pin(call);
                    let polls = fastrand::u8(..6);
                    for _ in 0..polls {
                        if poll_fn(|cx| std::task::Poll::Ready(Pin::new(&mut call).poll(cx).is_ready())).await {
                            break;
                        }
                        tokio::task::yield_now().await;
                    }
                } else {
                    call.await;
                }
            })
        })
        .collect();
    for call in calls {
        within(call).await.expect("task");
    }
    idle(&connection).await;
    assert!(connection.is_usable());
    let response = within(lease(&connection).send(post("fine"))).await;
    if let Ok(response) = response {
        collect(response).await;
    }
    connection.drain();
    within(connection.closed()).await;
}
