//! What happens to requests on their way: timeouts, retries, budgets, breakers, ejections and injected faults.

use crate::support::{
    CLUSTER, GUARD, HOUR, TARGET, World, assert_says,
    echo::{Way, get},
    greeter, hello, routes, rule, service, to, until,
};
use bytes::Bytes;
use http_body_util::Full;
use mesh_client::Error;
use std::time::Duration;
use tonic::Code;
use tower::ServiceExt;

/// One route to the greeter, with these fields beside its destination.
fn route(fields: &str) -> String {
    routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")))
}

const NO_RETRY: &str = "retries: {attempts: 0}";

/// How a call with an hour's deadline fails, which is far sooner.

#[tokio::test]
async fn an_endpoint_that_fails_is_ejected_and_comes_back() {
    let (good, bad) = (greeter("good").await, greeter("bad").await);
    let outlier = "{outlierDetection: {consecutive5xxErrors: 3, interval: 50ms, baseEjectionTime: 300ms, maxEjectionPercent: 50}}";
    let yaml = service(&[("good", good.addr()), ("bad", bad.addr())]) + &route(NO_RETRY) + &rule(outlier, &[]);
    for way in Way::BOTH {
        let world = World::new(&yaml).await;
        let failed = bad.state().failed();
        bad.state().set_unavailable(true);
        until("the bad endpoint is ejected", async || {
            let _ = way.hello(&world.mesh).await;
            world.explain().contains("ejected for")
        })
        .await;
        assert!(bad.state().failed() >= failed + 3, "{} failures", bad.state().failed() - failed);
        let before = bad.state().calls();
        for _ in 0..10 {
            // While it is out for sure, all goes to the other one.
            let reply = way.hello(&world.mesh).await;
            if !world.explain().contains("ejected for") {
                break;
            }
            assert_eq!(reply.unwrap().backend, "good");
            assert_eq!(bad.state().calls(), before);
        }
        bad.state().set_unavailable(false);
        let healed = async || way.hello(&world.mesh).await.is_ok_and(|reply| reply.backend == "bad");
        until("the endpoint that healed serves", healed).await;
        assert!(world.channel.load().is_idle());
    }
}

#[tokio::test]
async fn retries_hide_a_failing_endpoint() {
    let (good, bad) = (greeter("good").await, greeter("bad").await);
    bad.state().set_unavailable(true);
    let retries = "retries: {attempts: 2, retryOn: unavailable, backoff: 1ms}";
    let world = World::new(&(service(&[("good", good.addr()), ("bad", bad.addr())]) + &route(retries))).await;
    for way in Way::BOTH {
        let before = bad.state().failed();
        assert_eq!(way.calls(&world.mesh, 50).await, [("good".to_owned(), 50)].into());
        let retried = bad.state().failed() - before;
        assert!(retried >= 20, "{way:?}: {retried} retries of 50 calls");
    }
    let replies = futures::future::join_all((0..50).map(|_| hello(&world.channel))).await;
    let told: u32 = replies.iter().map(|reply| reply.as_ref().unwrap().previous_attempts).sum();
    assert!(told >= 20, "the backend is told of {told}");
}

#[tokio::test]
async fn max_requests_refuses_the_next_one_at_once() {
    let backend = greeter("one").await;
    let limits = "{connectionPool: {http: {http2MaxRequests: 1}}}";
    let world = World::new(&(service(&[("one", backend.addr())]) + &rule(limits, &[]))).await;
    backend.state().set_delay(HOUR);
    let held = tokio::spawn({
        let channel = world.channel.clone();
        async move { hello(&channel).await }
    });
    until("the first call is in flight", async || backend.state().in_flight() == 1).await;

    for way in Way::BOTH {
        let status = way.prompt(&world.mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[TARGET, CLUSTER, "circuit breaker is open", "limit of 1 reached"]);
    }
    let request = http::Request::post("/helloworld.Greeter/SayHello").body(Full::<Bytes>::default()).unwrap();
    let error: Error = world.channel.clone().oneshot(request).await.unwrap_err();
    assert!(error.is_overloaded() && error.is_local() && error.is_unavailable() && !error.is_timeout(), "{error:?}");
    assert_eq!((error.http_status().as_u16(), error.cluster()), (503, Some(CLUSTER)));
    assert_eq!(error.to_response().headers()["x-envoy-overloaded"], "true");
    assert_eq!(backend.state().calls(), 1, "nothing was sent");

    held.abort();
    until("the permit is back", async || world.channel.load().is_idle()).await;
    backend.state().set_delay(Duration::ZERO);
    hello(&world.channel).await.unwrap();
}

#[tokio::test]
async fn max_pending_requests_limits_who_waits_for_a_connection() {
    let hole = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let limits = "{connectionPool: {http: {http1MaxPendingRequests: 2}}}";
    let world = World::new(&(service(&[("one", hole.local_addr().unwrap())]) + &rule(limits, &[]))).await;
    let in_line = Way::BOTH.map(|way| {
        let mesh = world.mesh.clone();
        tokio::spawn(async move { way.hello(&mesh).await })
    });
    until("two calls are in line", async || world.channel.load().pending == 2).await;
    for way in Way::BOTH {
        let status = way.prompt(&world.mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[CLUSTER, "circuit breaker is open", "max_pending_requests limit of 2 reached"]);
    }
    in_line.iter().for_each(tokio::task::JoinHandle::abort);
    until("the line is empty", async || world.channel.load().is_idle()).await;
}

#[tokio::test]
async fn the_timeout_of_the_route_holds_and_is_named() {
    let backend = greeter("slow").await;
    backend.state().set_delay(HOUR);
    let world = World::new(&(service(&[("one", backend.addr())]) + &route("timeout: 100ms"))).await;
    // gRPC knows no other limit of a route (gRFC A31).
    for (way, whose) in Way::BOTH.into_iter().zip(["max_stream_duration", "the route's timeout"]) {
        let call = tokio::time::timeout(GUARD, way.hello(&world.mesh));
        let status = call.await.expect("the timeout does not hold").unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["deadline of 100ms exceeded", whose, CLUSTER]);
        let status = way.hello_with(&world.mesh, |r| r.set_timeout(Duration::from_millis(30))).await.unwrap_err();
        assert_says(status.message(), &["deadline of 30ms exceeded", "grpc-timeout"]);
    }
    assert!(world.channel.load().is_idle());
}

#[tokio::test]
async fn an_exhausted_budget_stops_retries() {
    let backend = greeter("failing").await;
    backend.state().set_unavailable(true);
    let retries = "retries: {attempts: 5, retryOn: unavailable, backoff: 3000s}";
    let budget = "{retryBudget: {percent: 0, minRetryConcurrency: 1}}";
    let yaml = service(&[("one", backend.addr())]) + &route(retries) + &rule(budget, &[]);
    let world = World::new(&yaml).await;
    // The only share of the budget, held in the backoff.
    let held = tokio::spawn({
        let channel = world.channel.clone();
        async move { hello(&channel).await }
    });
    until("the first call backs off", async || world.channel.load().retries == 1).await;
    for way in Way::BOTH {
        let before = backend.state().calls();
        let explain = mesh_client::Explain::default();
        let call = way.hello_with(&world.mesh, |r| {
            r.set_timeout(HOUR);
            r.extensions_mut().insert(explain.clone());
        });
        let status = tokio::time::timeout(GUARD, call).await.expect("waits for a retry").unwrap_err();
        assert_eq!((status.code(), backend.state().calls() - before), (Code::Unavailable, 1));
        assert_says(&explain.explanation().to_string(), &["the cluster's retry budget is used up"]);
    }
    held.abort();
    until("the budget is back", async || world.channel.load().is_idle()).await;
}

#[tokio::test]
async fn faults_are_injected_as_the_virtual_service_says() {
    let backend = greeter("one").await;
    let service = service(&[("one", backend.addr())]);
    let abort = "fault: {abort: {percentage: {value: 100}, grpcStatus: PERMISSION_DENIED}}";
    let world = World::new(&(service.clone() + &route(abort))).await;
    for way in Way::BOTH {
        let status = way.hello(&world.mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_says(status.message(), &["Fault injected"]);
        assert_eq!(backend.state().calls(), 0);
    }

    let delay = "fault: {delay: {percentage: {value: 100}, fixedDelay: 200ms}}";
    let world = World::new(&(service.clone() + &route(delay))).await;
    for way in Way::BOTH {
        let begun = tokio::time::Instant::now();
        way.hello(&world.mesh).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(200), "{:?}", begun.elapsed());
        let status = way.hello_with(&world.mesh, |r| r.set_timeout(Duration::from_millis(20))).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["deadline of 20ms exceeded", "injected delay of 200ms"]);
    }

    let half = "fault: {abort: {percentage: {value: 50}, grpcStatus: ABORTED}}";
    let world = World::new(&(service + &route(half))).await;
    for way in Way::BOTH {
        let mut aborted = 0;
        for _ in 0..400 {
            if let Err(status) = way.hello(&world.mesh).await {
                assert_eq!(status.code(), Code::Aborted);
                aborted += 1;
            }
        }
        // Six standard deviations.
        assert!((140..=260).contains(&aborted), "{way:?}: {aborted} of 400");
    }
}

#[tokio::test]
async fn a_grpc_mesh_retries_more_than_the_clusters_default_at_once() {
    const CALLS: u32 = 10;
    let backend = greeter("failing").await;
    backend.state().set_unavailable(true);
    // No budget is configured: `max_retries` of 3 is Envoy's default, and no rule of gRPC's (gRFC A44).
    let retries = "retries: {attempts: 5, retryOn: unavailable, backoff: 3000s}";
    let world = World::new(&(service(&[("one", backend.addr())]) + &route(retries))).await;
    let mut held = tokio::task::JoinSet::new();
    for _ in 0..CALLS {
        let channel = world.channel.clone();
        held.spawn(async move { hello(&channel).await });
    }
    until("all back off at once", async || world.channel.load().retries == CALLS).await;
    held.shutdown().await;
    until("all is given back", async || world.channel.load().is_idle()).await;
}

#[tokio::test]
async fn a_callers_own_failing_stream_is_not_held_against_the_endpoint() {
    let backends = [greeter("a").await, greeter("b").await];
    let outlier = "{outlierDetection: {consecutive5xxErrors: 2, interval: 3000s, baseEjectionTime: 3000s, maxEjectionPercent: 100}}";
    let yaml =
        service(&[("a", backends[0].addr()), ("b", backends[1].addr())]) + &route(NO_RETRY) + &rule(outlier, &[]);
    let world = World::new(&yaml).await;
    for call in 0..40 {
        let broken = futures::stream::iter([Ok(http_body::Frame::data(Bytes::from_static(b"\0"))), Err("broken")]);
        let body = http_body_util::StreamBody::new(broken);
        let request = get("/helloworld.Greeter/Chat").method("POST").header("content-type", "application/grpc");
        // The answer may begin before the stream breaks; then its body fails.
        let _ = Way::BOTH[call % 2].send_body(&world.mesh, request, body).await;
    }
    assert!(!world.explain().contains("ejected"), "{}", world.explain());
    hello(&world.channel).await.unwrap();
}
