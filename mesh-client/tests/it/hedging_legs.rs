//! What becomes of each of several attempts at the same time: its limits, its judgement, its body, its place in the line.

use crate::{
    hedging::{Answer, hedged_on_timeout, server},
    support::{
        GUARD, H2Server, HOUR, Served, TARGET, Then,
        echo::{Way, get},
        hello_with, rule, service, until,
    },
};
use bytes::{Bytes, BytesMut};
use http::Response;
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_client::{Mesh, MeshBuilder, MeshChannel, Profile};
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
use tokio_stream::{Stream, StreamExt, wrappers::UnboundedReceiverStream};
use tonic::Status;

const MS: fn(u64) -> Duration = Duration::from_millis;

/// One more attempt after `delay`; UNAVAILABLE is retried.
fn hedged(delay: Duration, change: impl FnOnce(&mut RetryPolicy)) -> Policy {
    let on = RetryOn { grpc_codes: 1 << 14, ..RetryOn::default() };
    let mut retry = RetryPolicy { on, num_retries: 1, avoid_previous_hosts: true, ..RetryPolicy::default() };
    change(&mut retry);
    Policy { retry: Some(Arc::new(retry)), hedge: Some(Hedge::After(delay)), ..Policy::default() }
}

async fn mesh(policy: Policy, change: impl FnOnce(MeshBuilder) -> MeshBuilder) -> Mesh {
    change(Mesh::builder().policy(policy)).build().await.unwrap()
}

async fn failure(policy: Policy) -> (Status, Duration) {
    let cluster = Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::fixed("any", Arc::default()) };
    let policy = Policy { cluster: Some(cluster), ..policy };
    let (server, counts) = server(&[Answer::Hold]).await;
    let mesh = mesh(policy, |mesh| mesh.profile(Profile::Envoy)).await;
    let channel = mesh.fixed_channel(&[server.addr()]).unwrap();
    let begun = tokio::time::Instant::now();
    let call = hello_with(&channel, |request| request.set_timeout(HOUR));
    let error = tokio::time::timeout(GUARD, call).await.expect("no limit ends the attempts").unwrap_err();
    assert_eq!(counts.seen.load(SeqCst), 2, "{error}");
    until("both are reset", async || counts.reset.load(SeqCst) == 2).await;
    (error, begun.elapsed())
}

#[tokio::test]
async fn the_limits_of_an_attempt_hold_for_each() {
    let (error, took) = failure(hedged(MS(100), |retry| retry.per_try_timeout = Some(MS(300)))).await;
    assert!(error.message().contains("limit of 300ms (per_try_timeout)"), "{error}");
    assert!(took >= MS(400), "the second has its own: {took:?}");
    let (error, took) = failure(hedged(MS(100), |retry| retry.per_try_idle_timeout = Some(MS(300)))).await;
    assert!(error.message().contains("300ms (per_try_idle_timeout"), "{error}");
    assert!(took >= MS(400), "the second has its own: {took:?}");
}

/// One that never answers beside one that does: how often the first is asked in 20 calls.
async fn asked(detection: &str) -> usize {
    let (silent, asked) = server(&[Answer::Hold]).await;
    let (good, _) = server(&[Answer::Now(200)]).await;
    let endpoints = service(&[("one", silent.addr()), ("one", good.addr())]) + &rule(detection, &["one"]);
    let (_cp, mesh) = hedged_on_timeout(&endpoints, None).await;
    // Clusters live as long as somebody has a channel to them.
    let _channel = mesh.channel(TARGET).unwrap();
    for _ in 0..20 {
        assert_eq!(Way::Channel.send(&mesh, get("/"), "").await.unwrap().status(), 200);
    }
    asked.seen.load(SeqCst)
}

#[tokio::test]
async fn silence_beyond_the_limit_counts_as_a_timeout_although_another_wins() {
    let detection = "{outlierDetection: {consecutive5xxErrors: 1, interval: 3000s, baseEjectionTime: 3000s, maxEjectionPercent: 100}}";
    assert_eq!(asked(detection).await, 1, "it is ejected");
}

#[tokio::test]
async fn an_attempt_that_loses_before_its_limit_counts_as_nothing() {
    let (slow, asked) = server(&[Answer::Hold]).await;
    let (good, _) = server(&[Answer::Ok(0)]).await;
    let detection = OutlierDetection { consecutive_5xx: Some(1), interval: HOUR, ..OutlierDetection::default() };
    let cluster = Cluster { outlier_detection: Some(Arc::new(detection)), ..Cluster::fixed("any", Arc::default()) };
    let mesh = mesh(Policy { cluster: Some(cluster), ..hedged(MS(30), |_| {}) }, |mesh| mesh).await;
    let channel = mesh.fixed_channel(&[slow.addr(), good.addr()]).unwrap();
    for _ in 0..20 {
        hello_with(&channel, |request| request.set_timeout(GUARD)).await.unwrap();
    }
    assert!(asked.seen.load(SeqCst) > 5, "it takes its turns: {}", asked.seen.load(SeqCst));
}

#[tokio::test]
async fn peak_ewma_learns_from_an_attempt_that_loses() {
    let (slow, asked) = server(&[Answer::Hold]).await;
    let (good, _) = server(&[Answer::Ok(0)]).await;
    // Who has not answered yet is as good as can be, and nothing is forgotten.
    let config = PeakEwma { default_rtt: Duration::ZERO, decay: HOUR, ..PeakEwma::default() };
    let cluster = Cluster { lb_policy: LbPolicy::PeakEwma(config), ..Cluster::fixed("any", Arc::default()) };
    let policy = Policy { cluster: Some(cluster), ..hedged(MS(100), |_| {}) };
    let mesh = mesh(policy, |mesh| mesh).await;
    let channel = mesh.fixed_channel(&[slow.addr(), good.addr()]).unwrap();
    for _ in 0..20 {
        hello_with(&channel, |request| request.set_timeout(GUARD)).await.unwrap();
    }
    assert_eq!(asked.seen.load(SeqCst), 1, "it is known to take 100 ms or more");
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

/// A body that goes on as long as the sender lives.
fn body() -> (mpsc::UnboundedSender<&'static str>, StreamBody<impl Stream<Item = Given> + Send + Unpin + 'static>) {
    let (send, receive) = mpsc::unbounded_channel();
    let frame = |text: &'static str| Ok(Frame::data(Bytes::from_static(text.as_bytes())));
    (send, StreamBody::new(UnboundedReceiverStream::new(receive).map(frame)))
}

fn post(
    channel: &MeshChannel,
    body: impl http_body::Body<Data = Bytes, Error = Infallible> + Send + Unpin + 'static,
) -> JoinHandle<u16> {
    let (request, channel) = (get("/").method("POST").body(body).unwrap(), channel.clone());
    tokio::spawn(async move {
        let sent = tokio::time::timeout(GUARD, tower::ServiceExt::oneshot(channel, request)).await;
        sent.expect("hangs").unwrap().status().as_u16()
    })
}

#[tokio::test]
async fn a_request_that_goes_on_is_read_by_every_attempt() {
    let (server, seen, bodies) = reader(false).await;
    let mesh = mesh(hedged(MS(50), |_| {}), |mesh| mesh).await;
    let channel = mesh.fixed_channel(&[server.addr()]).unwrap();
    let (send, body) = body();
    send.send("one").unwrap();
    let call = post(&channel, body);
    until("there are two attempts", async || seen.load(SeqCst) == 2).await;
    send.send(" two").unwrap();
    until("both read on", async || bodies.lock().unwrap().iter().all(|body| body == "one two")).await;
    send.send(" three").unwrap();
    drop(send);
    assert_eq!(call.await.unwrap(), 200);
    assert_eq!(bodies.lock().unwrap()[1], "one two three");
    until("all is given back", async || channel.load().is_idle()).await;
}

#[tokio::test]
async fn beyond_what_is_kept_one_attempt_goes_on_alone() {
    let (server, seen, bodies) = reader(true).await;
    let mesh = mesh(hedged(MS(50), |_| {}), |mesh| mesh.max_replay_bytes(5)).await;
    let channel = mesh.fixed_channel(&[server.addr()]).unwrap();
    let (send, body) = body();
    send.send("one").unwrap();
    let call = post(&channel, body);
    until("there are two attempts", async || seen.load(SeqCst) == 2).await;
    send.send(" two").unwrap();
    send.send(" three").unwrap();
    drop(send);
    assert_eq!(call.await.unwrap(), 200);
    let whole = bodies.lock().unwrap().iter().filter(|body| *body == "one two three").count();
    assert_eq!((whole, seen.load(SeqCst)), (1, 2));
    until("all is given back", async || channel.load().is_idle()).await;
}

#[tokio::test]
async fn an_attempt_that_waits_keeps_its_place_in_the_line_when_another_ends() {
    // One stream at a time.
    let (server, held) = H2Server::holding(1).await;
    let mesh = mesh(hedged(MS(50), |_| {}), |mesh| mesh).await;
    let channel = mesh.fixed_channel(&[server.addr()]).unwrap();
    let call = |name: &'static str| {
        let channel = channel.clone();
        let dress = move |request: &mut tonic::Request<_>| {
            request.set_timeout(HOUR);
            request.metadata_mut().insert("x-call", name.parse().unwrap());
        };
        tokio::spawn(async move { hello_with(&channel, dress).await })
    };
    let first = call("first");
    until("it has the stream", async || held.lock().unwrap().len() == 1).await;
    until("its second attempt waits for the stream", async || channel.load().pending == 1).await;
    let second = call("second");
    until("the next call waits behind it", async || channel.load().pending >= 2).await;
    held.lock().unwrap()[0].respond.send_reset(h2::Reason::INTERNAL_ERROR);
    until("somebody has the stream", async || held.lock().unwrap().len() == 2).await;
    assert_eq!(held.lock().unwrap()[1].request.headers()["x-call"], "first", "who waits longest");
    for call in [first, second] {
        call.abort();
        assert!(call.await.is_err());
    }
    until("all is given back", async || channel.load().is_idle()).await;
}
