//! Connections and requests that a server refuses: what is counted and logged of them.

use crate::{
    rotation::{CLIENT, Ca, SERVER, roots},
    support::{
        ANY, GUARD,
        inbound::{Echo, Seen, Serving},
        until,
    },
};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    Inbound,
    inbound::{InboundBuilder, Limits},
    tls::{Acceptor, MemorySource, ServerSettings, default_provider},
};
use mesh_tls::{ClientSettings, ClientTls};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    time::{Instant, timeout},
};
use tracing::{Level, Subscriber};
use tracing_subscriber::{Layer, Registry, layer::Context, layer::SubscriberExt};

/// Adds up what was counted since it was asked last.
fn counted(snapshotter: &Snapshotter, totals: &mut Vec<(String, u64)>) {
    for (key, _, _, value) in snapshotter.snapshot().into_vec() {
        let DebugValue::Counter(count) = value else { continue };
        let Some(reason) = key.key().labels().find(|label| label.key() == "reason") else { continue };
        let name = format!("{} {}", key.key().name(), reason.value());
        match totals.iter_mut().find(|(known, _)| *known == name) {
            Some((_, total)) => *total += count,
            None => totals.push((name, count)),
        }
    }
}

/// Waits until exactly so many are counted.
async fn is_counted(snapshotter: &Snapshotter, name: &str, expected: u64) {
    let mut totals = Vec::new();
    let total =
        |totals: &[(String, u64)]| totals.iter().find(|(known, _)| known == name).map_or(0, |(_, total)| *total);
    until(name, async || {
        counted(snapshotter, &mut totals);
        total(&totals) >= expected
    })
    .await;
    assert_eq!(total(&totals), expected, "{name}");
}

/// Counts the lines that operators see.
#[derive(Clone, Default)]
struct Lines(Arc<AtomicU64>);

impl<S: Subscriber> Layer<S> for Lines {
    fn on_event(&self, event: &tracing::Event<'_>, _: Context<'_, S>) {
        if *event.metadata().level() <= Level::WARN && event.metadata().target().contains("inbound") {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn says(addr: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(addr).await.unwrap();
    // It may be refused before.
    let _ = socket.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(GUARD, socket.read_to_end(&mut answer)).await.expect("it is closed");
    answer
}

fn secured(ca: &Ca, limits: Limits) -> InboundBuilder {
    let source = Arc::new(MemorySource::empty("server"));
    source.set(Some(ca.issue(SERVER)), Some(roots(&[ca])));
    let acceptor = Acceptor::new(ServerSettings::mtls(source), default_provider()).unwrap();
    Inbound::builder().acceptor(acceptor).limits(limits)
}

#[tokio::test]
async fn a_flood_is_counted_and_costs_the_log_few_lines() {
    const FLOOD: u64 = 300;
    let recorder = DebuggingRecorder::new();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let lines = Lines::default();
    let _guard = tracing::subscriber::set_default(Registry::default().with(lines.clone()));
    let inbound = secured(&Ca::new(), Limits::default()).bind(ANY).await.unwrap();
    let serving = Serving::of(inbound, Echo(Arc::<Seen>::default()));
    let begin = Instant::now();
    for _ in 0..FLOOD {
        says(serving.addr, b"GET / HTTP/1.1\r\n\r\n").await;
    }
    is_counted(&recorder.snapshotter(), "mesh_inbound_connections_refused_total handshake", FLOOD).await;
    let (told, most) = (lines.0.load(Ordering::SeqCst), begin.elapsed().as_secs() / 5 + 1);
    assert!((1..=most).contains(&told), "{told} lines");
}

#[tokio::test]
async fn a_client_that_ends_no_handshake_keeps_out_itself_alone() {
    let ca = Ca::new();
    let long = Limits::default().handshake_timeout(GUARD * 2);
    let inbound = secured(&ca, long.max_handshakes(4).max_handshakes_per_address(3)).bind(ANY).await.unwrap();
    let serving = Serving::of(inbound, Echo(Arc::<Seen>::default()));
    let connect = async |from: &str| {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{from}:0").parse().unwrap()).unwrap();
        socket.connect(serving.addr).await.unwrap()
    };
    let mut slow = Vec::new();
    for _ in 0..20 {
        let mut socket = connect("127.0.0.1").await;
        socket.write_all(b"\x16\x03\x01").await.unwrap();
        slow.push(socket);
    }
    let source = Arc::new(MemorySource::empty("client"));
    source.set(Some(ca.issue(CLIENT)), Some(roots(&[&ca])));
    let mut settings = ClientSettings::mtls(source);
    settings.alpn = vec![b"h2".to_vec()];
    let tls = ClientTls::new(settings, default_provider()).unwrap();
    let call = async |from: &str| {
        let (stream, _) = tls.connect(connect(from).await, None).await.unwrap();
        let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut client, connection) = builder.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post("http://x.test/").body(Full::new(Bytes::from_static(b"fine"))).unwrap();
        client.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes()
    };
    for _ in 0..3 {
        assert_eq!(timeout(GUARD, call("127.0.0.2")).await.expect("others have a place"), "fine");
    }
    // Behind its own, until they are gone.
    let own = call("127.0.0.1");
    let mut own = std::pin::pin!(own);
    let others = async {
        for _ in 0..3 {
            timeout(GUARD, call("127.0.0.2")).await.unwrap();
        }
    };
    tokio::select! {
        _ = &mut own => panic!("its places are taken"),
        () = others => {}
    }
    drop(slow);
    assert_eq!(timeout(GUARD, own).await.expect("there is room"), "fine");
}

#[tokio::test]
async fn what_is_refused_is_counted_by_its_reason() {
    let recorder = DebuggingRecorder::new();
    let _recorder = metrics::set_default_local_recorder(&recorder);
    let snapshotter = recorder.snapshotter();
    let none = Serving::echo(Limits::default().max_connections(0)).await.0;
    says(none.addr, b"").await;
    is_counted(&snapshotter, "mesh_inbound_connections_refused_total limit", 1).await;

    let silent = Serving::echo(Limits::default().handshake_timeout(Duration::from_millis(50))).await.0;
    says(silent.addr, b"").await;
    is_counted(&snapshotter, "mesh_inbound_connections_refused_total timeout", 1).await;

    let small = Serving::echo(Limits::default().max_headers(3)).await.0;
    let call = async |request: Request<Full<Bytes>>| {
        let io = TokioIo::new(TcpStream::connect(small.addr).await.unwrap());
        let (mut client, connection) =
            hyper::client::conn::http2::Builder::new(TokioExecutor::new()).handshake(io).await.unwrap();
        tokio::spawn(connection);
        client.send_request(request).await.unwrap().status()
    };
    let mut many = Request::get("http://x.test/").body(Full::default()).unwrap();
    assert_eq!(call(many.clone()).await, 200);
    for n in 0..9 {
        let name: http::HeaderName = format!("x-{n}").parse().unwrap();
        many.headers_mut().insert(name, "v".parse().unwrap());
    }
    assert_eq!(call(many).await, 431);
    is_counted(&snapshotter, "mesh_inbound_requests_refused_total headers", 1).await;
    says(small.addr, b"GET http://a/ HTTP/1.1\r\nhost: b\r\nconnection: close\r\n\r\n").await;
    is_counted(&snapshotter, "mesh_inbound_requests_refused_total malformed", 1).await;
}
