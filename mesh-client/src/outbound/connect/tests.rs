//! Subchannels against real servers on loopback.

mod support;
mod tls;

use super::{Backoff, ConnectError, Connectivity, ConnectorSettings, Dial, DialRef, Security, Subchannel};
use crate::{
    outbound::cluster::{Breaker, Resource},
    transport::Protocol,
};
use examples::port::Port;
use futures::{FutureExt, future::BoxFuture};
use mesh_xds::{
    ads::BoxedIo,
    resource::{CircuitBreakers, RoutingPriority, Thresholds},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use support::{Server, call, connector, nobody, until, within};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::{Instant, sleep},
};

#[tokio::test]
async fn connects_on_first_use_and_keeps_the_connection() {
    let server = Server::start(Protocol::Http2, 100).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, connector);
    assert_eq!(subchannel.state(), Connectivity::Idle);
    assert!(subchannel.ready().is_none());
    for _ in 0..3 {
        let lease = within(subchannel.acquire(RoutingPriority::Default)).await.expect("connected");
        assert_eq!(call(lease, "/").await, "0");
    }
    assert_eq!(subchannel.state(), Connectivity::Ready);
    assert!(subchannel.ready().is_some());
    assert_eq!(subchannel.in_flight(), 0);
}

#[tokio::test]
async fn one_attempt_serves_all_who_wait_and_outlives_those_who_left() {
    let server = Server::start(Protocol::Http2, 100).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, Arc::clone(&connector));
    assert!(subchannel.acquire(RoutingPriority::Default).now_or_never().is_none());
    assert_eq!(subchannel.state(), Connectivity::Connecting);
    let leases = within(futures::future::join_all((0..20).map(|_| subchannel.acquire(RoutingPriority::Default)))).await;
    assert!(leases.iter().all(Result::is_ok));
    assert_eq!(server.accepted.load(SeqCst), 1);
    assert_eq!(subchannel.in_flight(), 20);
    drop(leases);
    assert_eq!(subchannel.in_flight(), 0);
}

#[tokio::test]
async fn a_failed_attempt_is_the_error_until_the_next_one_succeeds_by_itself() {
    let port = nobody();
    let address = port.addr();
    let backoff = Backoff { base: Duration::from_millis(20), max: Duration::from_millis(50) };
    let connector = connector(ConnectorSettings { backoff, ..Default::default() }, None);
    let subchannel = Subchannel::new(address, Arc::clone(&connector));
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("refused");
    assert!(matches!(&*error, ConnectError::Tcp { address: named, .. } if *named == address), "{error:?}");
    assert_eq!(error.to_string(), format!("connect to {address}"));
    assert_eq!(subchannel.state(), Connectivity::TransientFailure);
    assert!(subchannel.last_error().is_some());

    let _server = Server::at(&port, Protocol::Http2, 100).await;
    until(&subchannel, &connector, Connectivity::Ready).await;
    assert!(subchannel.last_error().is_none());
    assert!(subchannel.ready().is_some());
}

#[tokio::test]
async fn in_backoff_acquire_fails_at_once_and_nothing_is_tried() {
    let port = nobody();
    let backoff = Backoff { base: Duration::from_secs(3600), max: Duration::from_secs(3600) };
    let connector = connector(ConnectorSettings { backoff, ..Default::default() }, None);
    let subchannel = Subchannel::new(port.addr(), connector);
    let first = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("refused");
    let second = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("in backoff");
    assert!(Arc::ptr_eq(&first, &second));
    assert_eq!(subchannel.state(), Connectivity::TransientFailure);
}

/// Refuses, after a while, and counts how often.
#[derive(Clone, Default)]
struct Refusing(Arc<AtomicUsize>);

impl Dial for Refusing {
    fn endpoint(&self, _: SocketAddr) -> BoxFuture<'static, std::io::Result<BoxedIo>> {
        self.0.fetch_add(1, SeqCst);
        Box::pin(async {
            sleep(Duration::from_millis(10)).await;
            Err(std::io::ErrorKind::ConnectionRefused.into())
        })
    }
}

#[tokio::test(start_paused = true)]
async fn attempts_that_fail_beside_each_other_are_one_failure() {
    let refusing = Refusing::default();
    let dial = Some(DialRef(Arc::new(refusing.clone())));
    let settings =
        ConnectorSettings { protocol: Protocol::Http1, max_connections_per_host: 100, dial, ..Default::default() };
    let subchannel = Subchannel::new("10.0.0.1:80".parse().expect("an address"), connector(settings, None));
    let waiting = (0..20).map(|_| subchannel.acquire(RoutingPriority::Default));
    assert!(futures::future::join_all(waiting).await.iter().all(Result::is_err));
    let (begun, tried) = (Instant::now(), refusing.0.load(SeqCst));
    assert!(tried > 10, "{tried} at once");
    while refusing.0.load(SeqCst) == tried {
        sleep(Duration::from_millis(10)).await;
    }
    assert!(begun.elapsed() < Duration::from_millis(1300), "again after {:?}", begun.elapsed());
}

/// A subchannel in backoff, whose endpoint then comes up and is connected to by other means than its timer.
async fn recovered(port: &Port, backoff: Duration) -> (Server, Arc<super::Connector>, Arc<Subchannel>) {
    let address = port.addr();
    let backoff = Backoff { base: backoff, max: backoff };
    let connector = connector(ConnectorSettings { backoff, ..Default::default() }, None);
    let subchannel = Subchannel::new(address, Arc::clone(&connector));
    within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("refused");
    let mut server = Server::at(port, Protocol::Http2, 100).await;
    let opened = within(connector.open(address, subchannel.listener())).await.expect("connected");
    subchannel.add(opened, None, false);
    assert_eq!(subchannel.state(), Connectivity::Ready);
    server.until_open(1).await;
    (server, connector, subchannel)
}

#[tokio::test]
async fn a_connection_ends_the_backoff_of_the_attempts_before_it() {
    let port = nobody();
    let (server, connector, subchannel) = recovered(&port, Duration::from_secs(3600)).await;
    drop(server);
    until(&subchannel, &connector, Connectivity::Idle).await;
    let _server = Server::at(&port, Protocol::Http2, 100).await;
    assert_eq!(
        call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("connected at once"), "/").await,
        "0"
    );
}

#[tokio::test]
async fn a_backoff_that_is_over_does_not_shorten_the_next() {
    let backoff = Duration::from_millis(500);
    let port = nobody();
    let (server, connector, subchannel) = recovered(&port, backoff).await;
    // The first timer would end in the middle of the second backoff.
    sleep(backoff / 2).await;
    drop(server);
    until(&subchannel, &connector, Connectivity::Idle).await;
    within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("refused");
    let begun = Instant::now();
    let listener = TcpListener::bind(port.addr()).await.expect("it is kept for that");
    within(listener.accept()).await.expect("the next attempt");
    // Jitter is a fifth; some time passed between the failure and its sight.
    assert!(begun.elapsed() >= backoff * 7 / 10, "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_raised_stream_limit_wakes_all_who_wait() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(listener.local_addr().expect("address"), Arc::clone(&connector));
    let waiting: Vec<_> = (0..20)
        .map(|_| {
            let subchannel = Arc::clone(&subchannel);
            tokio::spawn(async move { subchannel.acquire(RoutingPriority::Default).await.expect("stream") })
        })
        .collect();
    let (io, _) = within(listener.accept()).await.expect("accept");
    let (mut read, mut write) = io.into_split();
    tokio::spawn(async move { while read.read(&mut [0; 1024]).await.is_ok_and(|count| count > 0) {} });
    // SETTINGS_MAX_CONCURRENT_STREAMS: 0, then 100.
    let settings = |limit: u8| [0, 0, 6, 4, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, limit];
    write.write_all(&settings(0)).await.expect("write");
    until(&subchannel, &connector, Connectivity::Ready).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    write.write_all(&settings(100)).await.expect("write");
    // All of them at once: none gives its stream back.
    let leases = within(futures::future::join_all(waiting)).await;
    assert!(leases.iter().all(Result::is_ok));
    assert_eq!(subchannel.in_flight(), 20);
}

#[tokio::test]
async fn the_wait_for_a_handshake_slot_is_bounded_and_says_so() {
    let server = Server::start(Protocol::Http2, 100).await;
    let settings = ConnectorSettings { connect_timeout: Duration::from_millis(50), ..Default::default() };
    let slots = Arc::new(tokio::sync::Semaphore::new(0));
    let connector = super::Connector::new(settings, slots, None, tokio::runtime::Handle::current());
    let error = within(Subchannel::new(server.address, connector).acquire(RoutingPriority::Default))
        .await
        .expect_err("no slot");
    assert!(error.to_string().ends_with("the wait for a handshake slot took longer than 50ms"), "{error}");
}

#[tokio::test]
async fn a_lost_connection_is_made_again_at_the_next_use() {
    let port = nobody();
    let mut server = Server::at(&port, Protocol::Http2, 100).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, Arc::clone(&connector));
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("connected"), "/").await, "0");
    server.until_open(1).await;
    drop(server);
    until(&subchannel, &connector, Connectivity::Idle).await;
    let server = Server::at(&port, Protocol::Http2, 100).await;
    assert_eq!(
        call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("connected again"), "/").await,
        "0"
    );
    assert_eq!(server.accepted.load(SeqCst), 1);
}

#[tokio::test]
async fn grows_to_its_cap_when_streams_run_out_then_waits_for_one() {
    let server = Server::start(Protocol::Http2, 2).await;
    let settings = ConnectorSettings { max_connections_per_host: 2, ..Default::default() };
    let connector = connector(settings, None);
    let subchannel = Subchannel::new(server.address, connector);
    let mut leases = Vec::new();
    for _ in 0..4 {
        leases.push(within(subchannel.acquire(RoutingPriority::Default)).await.expect("stream"));
    }
    assert_eq!(server.accepted.load(SeqCst), 2);
    assert!(subchannel.ready().is_none());
    let waiting = {
        let subchannel = Arc::clone(&subchannel);
        tokio::spawn(async move { subchannel.acquire(RoutingPriority::Default).await })
    };
    let cancelled = tokio::time::timeout(Duration::from_millis(20), subchannel.acquire(RoutingPriority::Default)).await;
    assert!(cancelled.is_err(), "all streams are taken");
    assert!(!waiting.is_finished());
    leases.pop();
    let lease = within(waiting).await.expect("task").expect("stream");
    assert_eq!(server.accepted.load(SeqCst), 2);
    leases.push(lease);
    leases.clear();
    assert_eq!(subchannel.in_flight(), 0);
}

#[tokio::test]
async fn http1_uses_a_connection_per_request_and_uses_it_again() {
    let server = Server::start(Protocol::Http1, 0).await;
    let settings = ConnectorSettings { protocol: Protocol::Http1, max_connections_per_host: 3, ..Default::default() };
    let connector = connector(settings, None);
    let subchannel = Subchannel::new(server.address, connector);
    let leases = within(futures::future::join_all((0..3).map(|_| subchannel.acquire(RoutingPriority::Default)))).await;
    assert_eq!(server.accepted.load(SeqCst), 3);
    let mut answers = Vec::new();
    for lease in leases {
        answers.push(call(lease.expect("lease"), "/").await);
    }
    answers.sort();
    assert_eq!(answers, ["0", "1", "2"]);

    // Ten more than there are connections: all are served, none is opened.
    let calls = (0..13)
        .map(|_| async { call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await });
    assert_eq!(within(futures::future::join_all(calls)).await.len(), 13);
    assert_eq!(server.accepted.load(SeqCst), 3);
}

#[tokio::test]
async fn connections_count_against_max_connections_and_come_back() {
    let server = Server::start(Protocol::Http1, 0).await;
    let default = Thresholds { max_connections: 2, ..Default::default() };
    let limits = CircuitBreakers { default, ..Default::default() };
    let breaker = Breaker::new(&"c".into(), &limits);
    let settings = ConnectorSettings { protocol: Protocol::Http1, max_connections_per_host: 100, ..Default::default() };
    let connector = connector(settings, Some(Arc::clone(&breaker)));
    let subchannel = Subchannel::new(server.address, connector);
    let first = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    let second = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    assert_eq!(breaker.in_use(RoutingPriority::Default, Resource::Connections), 2);
    let third = tokio::time::timeout(Duration::from_millis(20), subchannel.acquire(RoutingPriority::Default)).await;
    assert!(third.is_err(), "waits for one of the two");
    drop((first, second));
    let third = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    assert_eq!(call(third, "/").await.len(), 1);
    drop(subchannel);
    within(async {
        while breaker.in_use(RoutingPriority::Default, Resource::Connections) != 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_always_gets_one_connection() {
    let server = Server::start(Protocol::Http2, 100).await;
    let default = Thresholds { max_connections: 0, ..Default::default() };
    let breaker = Breaker::new(&"c".into(), &CircuitBreakers { default, ..Default::default() });
    let connector = connector(ConnectorSettings::default(), Some(breaker));
    let subchannel = Subchannel::new(server.address, connector);
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await, "0");
}

#[tokio::test]
async fn a_removed_endpoint_finishes_its_calls_and_closes() {
    let mut server = Server::start(Protocol::Http2, 100).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, connector);
    let lease = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    let held = tokio::spawn(async move { call(lease, "/hold").await });
    server.until_open(1).await;
    let waiting = {
        let subchannel = Arc::clone(&subchannel);
        tokio::spawn(async move {
            let _first = subchannel.acquire(RoutingPriority::Default).await?;
            subchannel.acquire(RoutingPriority::Default).await.map(drop)
        })
    };
    let _ = within(waiting).await.expect("task");
    subchannel.drain();
    subchannel.drain();
    assert!(subchannel.ready().is_none());
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("removed");
    assert!(matches!(&*error, ConnectError::Removed { .. }));
    server.hold.notify_waiters();
    server.hold.notify_one();
    assert_eq!(within(held).await.expect("task"), "0");
    server.until_open(0).await;
}

#[tokio::test]
async fn who_waits_for_a_removed_endpoint_is_told() {
    let server = Server::start(Protocol::Http2, 1).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, connector);
    let _held = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    let mut waiting = Box::pin(subchannel.acquire(RoutingPriority::Default));
    assert!(tokio::time::timeout(Duration::from_millis(10), waiting.as_mut()).await.is_err());
    subchannel.drain();
    assert!(within(waiting).await.is_err());
}

#[tokio::test]
async fn dropping_the_subchannel_closes_its_connections() {
    let mut server = Server::start(Protocol::Http2, 100).await;
    let connector = connector(ConnectorSettings::default(), None);
    let subchannel = Subchannel::new(server.address, connector);
    drop(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"));
    server.until_open(1).await;
    drop(subchannel);
    server.until_open(0).await;
}

#[tokio::test]
async fn an_idle_connection_is_closed_after_its_time() {
    let mut server = Server::start(Protocol::Http2, 100).await;
    let settings = ConnectorSettings { idle_timeout: Duration::from_millis(40), ..Default::default() };
    let connector = connector(settings, None);
    let subchannel = Subchannel::new(server.address, Arc::clone(&connector));
    let lease = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
    server.until_open(1).await;
    // In use it stays, however long.
    sleep(Duration::from_millis(120)).await;
    assert_eq!(subchannel.state(), Connectivity::Ready);
    drop(lease);
    until(&subchannel, &connector, Connectivity::Idle).await;
    server.until_open(0).await;
    assert_eq!(call(within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease"), "/").await, "1");
}

#[tokio::test]
async fn an_endpoint_that_accepts_and_says_nothing_times_out() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address");
    let settings = ConnectorSettings { connect_timeout: Duration::from_millis(50), ..Default::default() };
    let subchannel = Subchannel::new(address, connector(settings, None));
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("silence");
    assert!(matches!(&*error, ConnectError::Timeout { stage: "the HTTP handshake", .. }), "{error}");
    assert_eq!(subchannel.state(), Connectivity::TransientFailure);
}

#[tokio::test]
async fn a_server_of_another_protocol_is_an_error_with_its_cause() {
    let server = Server::start(Protocol::Http1, 0).await;
    let subchannel = Subchannel::new(server.address, connector(ConnectorSettings::default(), None));
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("HTTP/1.1 server");
    assert!(matches!(&*error, ConnectError::Http { .. }), "{error:?}");
    assert!(std::error::Error::source(&*error).is_some());
}

#[tokio::test]
async fn an_unused_subchannel_is_small() {
    // Ten thousand of them: with its Arc, well below the 300 bytes allowed.
    assert!(size_of::<Subchannel>() <= 128, "{} bytes", size_of::<Subchannel>());
}

#[tokio::test]
async fn tls_that_cannot_be_set_up_is_the_error_and_never_plaintext() {
    let server = Server::start(Protocol::Http2, 100).await;
    let cause = Arc::from(crate::transport::BoxError::from("provider instance `x` is not in the bootstrap"));
    let settings = ConnectorSettings { security: Security::Broken(cause), ..Default::default() };
    let subchannel = Subchannel::new(server.address, connector(settings, None));
    let error = within(subchannel.acquire(RoutingPriority::Default)).await.expect_err("broken");
    assert!(std::error::Error::source(&*error).expect("cause").to_string().contains("not in the bootstrap"));
    assert_eq!(server.accepted.load(SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_on_few_streams_are_all_served() {
    for protocol in [Protocol::Http2, Protocol::Http1] {
        let server = Server::start(protocol, 3).await;
        let settings = ConnectorSettings { protocol, max_connections_per_host: 3, ..Default::default() };
        for _ in 0..5 {
            let subchannel = Subchannel::new(server.address, connector(settings.clone(), None));
            let callers = (0..30).map(|caller| {
                let subchannel = Arc::clone(&subchannel);
                tokio::spawn(async move {
                    for turn in 0..10 {
                        let lease = within(subchannel.acquire(RoutingPriority::Default)).await.expect("lease");
                        if (caller + turn) % 4 == 0 {
                            drop(lease);
                        } else {
                            call(lease, "/").await;
                        }
                    }
                })
            });
            for caller in callers.collect::<Vec<_>>() {
                caller.await.expect("served");
            }
            assert_eq!(subchannel.in_flight(), 0);
        }
    }
}
