//! What becomes of each of several attempts at the same time: its limits, its judgement, its body, its place in the line.

use crate::{
    hedging::{Answer, hedged_on_timeout, server},
    support::{
        ANY, GUARD, H2Server, HOUR, Served, TARGET, Then,
        code::{Local, fixed},
        echo::{Way, get},
        rule, service, until,
        way::Failed,
    },
};
use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_client::{MeshBuilder, Profile};
use mesh_xds::{
    resource::{Cluster, Hedge, HttpProtocol, LbPolicy, OutlierDetection, PeakEwma, RetryOn, RetryPolicy},
    source::Policy,
};
use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{sync::mpsc, task::JoinHandle};
use tokio_stream::{StreamExt, wrappers::UnboundedReceiverStream};
use tonic::Status;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// One more attempt after `delay`; UNAVAILABLE is retried.
pub(crate) fn hedged(delay: Duration, change: impl FnOnce(&mut RetryPolicy)) -> Policy {
    let on = RetryOn { grpc_codes: 1 << 14, ..RetryOn::default() };
    let mut retry = RetryPolicy { on, num_retries: 1, avoid_previous_hosts: true, ..RetryPolicy::default() };
    change(&mut retry);
    Policy { hedge: Some(Hedge::After(delay)), ..Policy::default().with_retry(retry) }
}

/// The target's own cluster, changed.
pub(crate) fn cluster(change: impl FnOnce(&mut Cluster)) -> Cluster {
    let mut cluster = Cluster::fixed("any", Arc::default());
    change(&mut cluster);
    cluster
}

async fn failure(way: Way, policy: Policy) -> (Status, Duration) {
    let policy = policy.with_target(cluster(|cluster| cluster.http_protocol = Some(HttpProtocol::Http2)));
    let (server, counts) = server(&[Answer::Hold]).await;
    let code = Local::with(&fixed(&[server.addr()]), policy, |mesh| mesh.profile(Profile::Envoy)).await;
    let begun = tokio::time::Instant::now();
    let call = way.hello_with(&code.mesh, |request| request.set_timeout(HOUR));
    let error = tokio::time::timeout(GUARD, call).await.expect("no limit ends the attempts").unwrap_err();
    assert_eq!(counts.seen.load(SeqCst), 2, "{way:?}: {error}");
    until("both are reset", async || counts.reset.load(SeqCst) == 2).await;
    (error, begun.elapsed())
}

#[tokio::test]
async fn the_limits_of_an_attempt_hold_for_each() {
    type Change = fn(&mut RetryPolicy);
    let limits: [(&str, Change); 2] = [
        ("limit of 300ms (per_try_timeout)", |retry| retry.per_try_timeout = Some(MS(300))),
        ("300ms (per_try_idle_timeout", |retry| retry.per_try_idle_timeout = Some(MS(300))),
    ];
    for ((said, limit), way) in limits.into_iter().flat_map(|limit| Way::BOTH.map(|way| (limit, way))) {
        let (error, took) = failure(way, hedged(MS(100), limit)).await;
        assert!(error.message().contains(said), "{way:?}: {error}");
        assert!(took >= MS(400), "the second has its own: {took:?}");
    }
}

/// One that never answers beside one that does: how often the first is asked in 20 calls.
async fn asked(way: Way, detection: &str) -> usize {
    let (silent, asked) = server(&[Answer::Hold]).await;
    let (good, _) = server(&[Answer::Now(200)]).await;
    let endpoints = service(&[("one", silent.addr()), ("one", good.addr())]) + &rule(detection, &["one"]);
    let (_cp, mesh) = hedged_on_timeout(&endpoints, None).await;
    // Clusters live as long as somebody has a channel to them.
    let _channel = mesh.channel(TARGET).unwrap();
    for _ in 0..20 {
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().status(), 200);
    }
    asked.seen.load(SeqCst)
}

#[tokio::test]
async fn silence_beyond_the_limit_counts_as_a_timeout_although_another_wins() {
    let detection = "{outlierDetection: {consecutive5xxErrors: 1, interval: 3000s, baseEjectionTime: 3000s, maxEjectionPercent: 100}}";
    for way in Way::BOTH {
        assert_eq!(asked(way, detection).await, 1, "{way:?}: it is ejected");
    }
}

/// The same from code, with attempts beside each other after `delay`.
async fn asked_beside(way: Way, delay: Duration, change: impl FnOnce(&mut Cluster)) -> usize {
    let (slow, asked) = server(&[Answer::Hold]).await;
    let (good, _) = server(&[Answer::Ok(0)]).await;
    let policy = hedged(delay, |_| {}).with_target(cluster(change));
    let code = Local::new(&[slow.addr(), good.addr()], policy).await;
    for _ in 0..20 {
        way.hello_with(&code.mesh, |request| request.set_timeout(GUARD)).await.unwrap();
    }
    asked.seen.load(SeqCst)
}

#[tokio::test]
async fn an_attempt_that_loses_before_its_limit_counts_as_nothing() {
    let detection = OutlierDetection { consecutive_5xx: Some(1), interval: HOUR, ..OutlierDetection::default() };
    for way in Way::BOTH {
        let detection = Some(Arc::new(detection.clone()));
        let asked = asked_beside(way, MS(30), |cluster| cluster.outlier_detection = detection).await;
        assert!(asked > 5, "{way:?}: it takes its turns: {asked}");
    }
}

#[tokio::test]
async fn an_attempt_that_waits_for_its_connection_is_hedged_too() {
    for way in Way::BOTH {
        // Takes connections and says nothing on them.
        let hole = tokio::net::TcpListener::bind(ANY).await.unwrap();
        let (good, asked) = server(&[Answer::Ok(0)]).await;
        let target = cluster(|cluster| cluster.connect_timeout = HOUR);
        let addresses = [hole.local_addr().unwrap(), good.addr()];
        let code = Local::new(&addresses, hedged(MS(30), |_| {}).with_target(target)).await;
        for _ in 0..10 {
            let call = way.hello_with(&code.mesh, |request| request.set_timeout(HOUR));
            tokio::time::timeout(GUARD, call).await.expect("it waits for the connection").unwrap();
        }
        assert_eq!(asked.seen.load(SeqCst), 10, "{way:?}: nothing is sent twice");
    }
}

#[tokio::test]
async fn peak_ewma_learns_from_an_attempt_that_loses() {
    // Who has not answered yet is as good as can be, and nothing is forgotten.
    let config = PeakEwma { default_rtt: Duration::ZERO, decay: HOUR, ..PeakEwma::default() };
    for way in Way::BOTH {
        let asked = asked_beside(way, MS(100), |cluster| cluster.lb_policy = LbPolicy::PeakEwma(config)).await;
        assert_eq!(asked, 1, "{way:?}: it is known to take 100 ms or more");
    }
}

/// Reads whole bodies: of the first request without an answer to it, unless `all` are answered.
async fn reader(all: bool) -> (H2Server, Arc<AtomicUsize>, Arc<Mutex<Vec<BytesMut>>>) {
    let (seen, bodies) = (Arc::<AtomicUsize>::default(), Arc::<Mutex<Vec<BytesMut>>>::default());
    let (count, read) = (seen.clone(), bodies.clone());
    let server = H2Server::start(move |Served { request, mut respond, .. }| {
        let number = count.fetch_add(1, SeqCst);
        read.lock().unwrap().push(BytesMut::new());
        let read = read.clone();
        tokio::spawn(async move {
            let mut body = request.into_body();
            while let Some(Ok(data)) = body.data().await {
                read.lock().unwrap()[number].extend_from_slice(&data);
            }
            if all || number > 0 {
                // Nobody may wait any more.
                let _ = respond.send_response(Response::new(()), true);
            } else {
                std::future::pending().await
            }
        });
        Then::GoOn
    })
    .await;
    (server, seen, bodies)
}

type Given = Result<Frame<Bytes>, Infallible>;

/// A request that goes on, and the two attempts that it is sent in.
struct Upload {
    seen: Arc<AtomicUsize>,
    bodies: Arc<Mutex<Vec<BytesMut>>>,
    code: Local,
    /// The body goes on as long as this lives.
    send: mpsc::UnboundedSender<&'static str>,
    call: JoinHandle<Result<u16, Failed>>,
    _server: H2Server,
}

/// Its body begins with "one". `all`: every attempt is answered at its end, not only those after the first.
async fn upload(way: Way, all: bool, change: impl FnOnce(MeshBuilder) -> MeshBuilder) -> Upload {
    let (server, seen, bodies) = reader(all).await;
    let code = Local::with(&fixed(&[server.addr()]), hedged(MS(50), |_| {}), change).await;
    let (send, receive) = mpsc::unbounded_channel();
    let frame = |text: &'static str| Given::Ok(Frame::data(Bytes::from_static(text.as_bytes())));
    let body = StreamBody::new(UnboundedReceiverStream::new(receive).map(frame));
    send.send("one").unwrap();
    let call = way.spawn(&code.mesh, get("/").method("POST"), tonic::body::Body::new(body));
    until("there are two attempts", async || seen.load(SeqCst) == 2).await;
    Upload { seen, bodies, code, send, call, _server: server }
}

#[tokio::test]
async fn a_request_that_goes_on_is_read_by_every_attempt() {
    for way in Way::BOTH {
        let Upload { bodies, code, send, call, .. } = &mut upload(way, false, |mesh| mesh).await;
        send.send(" two").unwrap();
        until("both read on", async || bodies.lock().unwrap().iter().all(|body| body == "one two")).await;
        send.send(" three").unwrap();
        drop(std::mem::replace(send, mpsc::unbounded_channel().0));
        assert_eq!(call.await.unwrap().unwrap(), 200, "{way:?}");
        assert_eq!(bodies.lock().unwrap()[1], "one two three");
        code.until_idle().await;
    }
}

#[tokio::test]
async fn beyond_what_is_kept_one_attempt_goes_on_alone() {
    for way in Way::BOTH {
        let Upload { seen, bodies, code, send, call, .. } =
            &mut upload(way, true, |mesh| mesh.max_replay_bytes(5)).await;
        send.send(" two").unwrap();
        send.send(" three").unwrap();
        drop(std::mem::replace(send, mpsc::unbounded_channel().0));
        assert_eq!(call.await.unwrap().unwrap(), 200, "{way:?}");
        let whole = bodies.lock().unwrap().iter().filter(|body| *body == "one two three").count();
        assert_eq!((whole, seen.load(SeqCst)), (1, 2), "{way:?}");
        code.until_idle().await;
    }
}

#[tokio::test]
async fn an_attempt_that_waits_keeps_its_place_in_the_line_when_another_ends() {
    for way in Way::BOTH {
        // One stream at a time.
        let (server, held) = H2Server::holding(1).await;
        let code = Local::new(&[server.addr()], hedged(MS(50), |_| {})).await;
        let call = |name: &'static str| {
            let mesh = code.mesh.clone();
            let dress = move |request: &mut tonic::Request<_>| {
                request.set_timeout(HOUR);
                request.metadata_mut().insert("x-call", name.parse().unwrap());
            };
            tokio::spawn(async move { way.hello_with(&mesh, dress).await })
        };
        let first = call("first");
        until("it has the stream", async || held.lock().unwrap().len() == 1).await;
        until("its second attempt waits for the stream", async || code.channel.load().pending == 1).await;
        let second = call("second");
        until("the next call waits behind it", async || code.channel.load().pending >= 2).await;
        held.lock().unwrap()[0].respond.send_reset(h2::Reason::INTERNAL_ERROR);
        until("somebody has the stream", async || held.lock().unwrap().len() == 2).await;
        assert_eq!(held.lock().unwrap()[1].request.headers()["x-call"], "first", "{way:?}: who waits longest");
        for call in [first, second] {
            call.abort();
            assert!(call.await.is_err());
        }
        code.until_idle().await;
    }
}
