//! Steps 1 to 4, 9 and 11: where requests go, and why.

use std::time::{Duration, Instant};

use bytes::Bytes;
use examples::backend::{Backend, Options};
use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use mesh_client::Explain;
use tower::{Service, ServiceExt};

use crate::traffic::{Traffic, burst, call};
use crate::world::{PATIENCE, World};
use examples::report::Report;

/// Calls of a measured split; the tolerance below is four standard deviations of it.
const CALLS: u64 = 2000;
const AT_ONCE: u64 = 32;

pub(crate) async fn first_request(world: &mut World, report: &mut Report, started: Instant) -> anyhow::Result<()> {
    report.step("First routed request");
    world.greeter.ready(PATIENCE).await?;
    let reply = call(&world.greeter, None).await?;
    let took = started.elapsed();
    report.table(&[("answered by", reply.backend), ("after start", format!("{} ms", took.as_millis()))]);
    report.claim(took < Duration::from_secs(2), "the first request is answered within 2 s of the start");
    Ok(())
}

pub(crate) async fn split(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("A 90/10 split between subsets");
    report.progress(format!("{CALLS} calls"));
    let tally = burst(&world.greeter, CALLS, AT_ONCE, None).await;
    report.table(&tally.rows());
    let v2 = tally.percent("v2");
    report.claim(tally.failed == 0, "no call failed");
    report.claim((7.3..=12.7).contains(&v2), format!("10 % go to v2 (seen {v2:.1} %)"));
    let (a, b) = (tally.of("v1-a"), tally.of("v1-b"));
    report.claim(a.abs_diff(b) * 10 <= a + b, "v1-a and v1-b share the rest evenly");
    Ok(())
}

pub(crate) async fn canary(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("x-canary: 1 goes to v2, every time");
    let tally = burst(&world.greeter, 200, 8, Some(("x-canary", "1"))).await;
    report.table(&tally.rows());
    report.claim(tally.of("v2") == 200, "200 of 200 calls were answered by v2");
    Ok(())
}

pub(crate) async fn live_edit(world: &mut World, report: &mut Report) -> anyhow::Result<()> {
    report.step("routes.yaml is edited to 50/50 under load");
    let mut traffic = Traffic::start(&world.greeter, 8, None);
    let applied = world.edit_and_wait("routes.yaml", |text| weights(&text, 50, 50)).await?;
    report.claim(applied.is_ok(), "the control plane took the edit");
    let (percent, tally) = until_split(world, report, 50.0).await;
    let during = traffic.stop().await;
    report.table(&tally.rows());
    report.claim((45.5..=54.5).contains(&percent), format!("half goes to v2, without a restart (seen {percent:.1} %)"));
    report.claim(tally.failed + during.failed == 0, format!("no call failed, of {} made meanwhile", during.answered()));
    Ok(())
}

/// Measures until v2's share is near `percent`, within [`PATIENCE`].
pub(crate) async fn until_split(world: &World, report: &mut Report, percent: f64) -> (f64, crate::traffic::Tally) {
    let end = tokio::time::Instant::now() + PATIENCE;
    loop {
        let tally = burst(&world.greeter, CALLS, AT_ONCE, None).await;
        let seen = tally.percent("v2");
        report.progress(format!("v2 gets {seen:.1} %"));
        if (seen - percent).abs() <= 4.5 || tokio::time::Instant::now() > end {
            return (seen, tally);
        }
    }
}

/// Sets the weights of v1 and v2 in the text of `routes.yaml`.
pub(crate) fn weights(text: &str, v1: u32, v2: u32) -> String {
    let mut next = [v1, v2].into_iter();
    let line = |line: &str| match line.split_once("weight: ") {
        Some((before, _)) => format!("{before}weight: {}\n", next.next().unwrap_or(0)),
        None => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

pub(crate) async fn plain_http(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("Plain HTTP/1.1 through mesh.layer() around a hyper client");
    let inner = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let mut client = tower::ServiceBuilder::new().layer(world.mesh.layer()).service(inner);
    let get = |uri: String| http::Request::get(uri).body(Empty::<Bytes>::new());

    let mut answered = 0;
    for n in 0..200 {
        // Every fourth request meets two 503 answers; the route allows three retries.
        world.reviews.state().fail_next(if n % 4 == 0 { 2 } else { 0 });
        let request = get(format!("http://reviews.default.svc.cluster.local:9080/reviews/{n}"))?;
        let response = client.ready().await.map_err(anyhow::Error::from_boxed)?.call(request).await;
        let response = response.map_err(anyhow::Error::from_boxed)?;
        answered += u32::from(response.status() == http::StatusCode::OK && response.body().is_mesh());
    }
    let failed = world.reviews.state().failed();

    let stranger = Backend::http("stranger", ([127, 0, 0, 1], 0).into(), Options::default()).await?;
    let request = get(format!("http://{}/", stranger.addr()))?;
    let response = client.ready().await.map_err(anyhow::Error::from_boxed)?.call(request).await;
    let response = response.map_err(anyhow::Error::from_boxed)?;
    report.table(&[
        ("reviews", format!("{answered} of 200 answered with 200; the backend failed {failed} requests")),
        ("unknown host", format!("{} {}", stranger.addr(), response.status())),
    ]);
    report.claim(answered == 200 && failed == 100, "the route's retries hid the backend's failures");
    let untouched = !response.body().is_mesh() && !response.headers().contains_key("x-traceparent");
    report.claim(
        response.status().is_success() && untouched,
        "a host that the mesh does not know went to the inner client untouched",
    );
    Ok(())
}

pub(crate) async fn explain(world: &World, report: &mut Report) -> anyhow::Result<()> {
    report.step("Why one request went where it went");
    let explain = Explain::default();
    let mut request = tonic::Request::new(HelloRequest { name: "why".to_owned(), count: 0 });
    request.extensions_mut().insert(explain.clone());
    let reply = GreeterClient::new(world.greeter.clone()).say_hello(request).await?.into_inner();
    report.text(&explain);
    let trail = explain.explanation();
    for subject in ["listener", "virtual host", "route", "cluster", "subset", "attempt", "peer", "config", "trace"] {
        if trail.get(subject).is_none() {
            report.claim(false, format!("the trail names the {subject}"));
        }
    }
    let trace = trail.get("trace").unwrap_or_default();
    report.table(&[("seen by the backend", reply.traceparent.clone())]);
    report.claim(trace.len() == 32 && reply.traceparent.contains(trace), "the backend saw the trace id of the trail");
    Ok(())
}
