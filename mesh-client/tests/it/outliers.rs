//! Which endpoints are held out for how they answer, and by whose rules.

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, Served, TARGET, Then, World,
    code::{Local, fixed},
    echo::{Way, get},
    edit_cluster, greeter, hello, hello_with, routes, rule, service, to, until,
};
use envoy_types::pb::{
    envoy::config::cluster::v3::OutlierDetection,
    google::protobuf::{BoolValue, Duration as ProtoDuration, UInt32Value},
};
use examples::greeter::HelloRequest;
use h2::Reason;
use http::{HeaderMap, HeaderValue};
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use mesh_xds::{
    resource::{Cluster, FailureAccrual, HttpProtocol, OutlierDetection as Detection},
    source::Policy,
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tonic::Code;

/// What one endpoint does with every request.
type Answer = fn(Served);

fn fine(served: Served) {
    served.ok();
}

fn status_500(served: Served) {
    served.status(500);
}

fn status_503(served: Served) {
    served.status(503);
}

fn reset(mut served: Served) {
    served.respond.send_reset(Reason::INTERNAL_ERROR);
}

/// Endpoints that answer so, without retries.
async fn endpoints(answers: &[Answer]) -> (Vec<H2Server>, String) {
    let mut servers = Vec::new();
    for answer in answers.iter().copied() {
        servers.push(
            H2Server::start(move |served| {
                answer(served);
                Then::GoOn
            })
            .await,
        );
    }
    let named: Vec<_> = servers.iter().map(|server| ("v1", server.addr())).collect();
    let yaml =
        service(&named) + &routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    (servers, yaml)
}

/// What is said of an endpoint.
fn said(explanation: &str, endpoint: SocketAddr) -> String {
    let line = explanation.lines().find(|line| line.contains(&endpoint.to_string()));
    line.unwrap_or_else(|| panic!("no {endpoint} in: {explanation}")).to_owned()
}

/// Sends requests until this endpoint is ejected.
async fn ejected(world: &World, way: Way, endpoint: SocketAddr) -> String {
    until("it is ejected", async || {
        let _ = way.send(&world.mesh, get("/x"), "").await;
        said(&world.explain(), endpoint).contains("ejected")
    })
    .await;
    said(&world.explain(), endpoint)
}

#[tokio::test]
async fn gateway_failures_in_a_row_eject_and_other_failures_do_not() {
    for way in Way::BOTH {
        let (servers, yaml) = endpoints(&[status_500, status_503, fine]).await;
        let detection = "{outlierDetection: {consecutive5xxErrors: 0, consecutiveGatewayErrors: 3, interval: 3000s, \
                         baseEjectionTime: 3000s, maxEjectionPercent: 100}}";
        let world = World::new(&(yaml + &rule(detection, &[]))).await;
        let line = ejected(&world, way, servers[1].addr()).await;
        assert!(line.contains("by consecutive_gateway_failure"), "{line}");
        for _ in 0..20 {
            way.send(&world.mesh, get("/x"), "").await.unwrap();
        }
        for server in [&servers[0], &servers[2]] {
            let line = said(&world.explain(), server.addr());
            assert!(!line.contains("ejected"), "{line}");
        }
    }
}

#[tokio::test]
async fn failures_to_get_an_answer_are_counted_apart_where_they_are_split() {
    for way in Way::BOTH {
        for (split, cause) in [(true, "consecutive_local_origin_failure"), (false, "consecutive_gateway_failure")] {
            let (servers, yaml) = endpoints(&[reset, status_503, fine]).await;
            // By what endpoints answer, none is ejected where local failures are apart.
            let gateway = if split { 0 } else { 3 };
            let detection = format!(
                "{{outlierDetection: {{consecutive5xxErrors: 0, consecutiveGatewayErrors: {gateway}, \
                 splitExternalLocalOriginErrors: {split}, consecutiveLocalOriginFailures: 3, interval: 3000s, \
                 baseEjectionTime: 3000s, maxEjectionPercent: 100}}}}"
            );
            let world = World::new(&(yaml + &rule(&detection, &[]))).await;
            let line = ejected(&world, way, servers[0].addr()).await;
            assert!(line.contains(&format!("by {cause}")), "{line}");
            if split {
                let line = said(&world.explain(), servers[1].addr());
                assert!(!line.contains("ejected"), "{line}");
            }
        }
    }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

fn long() -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds: 3000, nanos: 0 })
}

/// Calls at endpoints that fail always, by these rules, under this profile; how many are ejected, whichever way the calls go.
async fn ejected_of(count: usize, profile: Profile, detection: OutlierDetection) -> usize {
    let [one, other] = Way::BOTH.map(|way| ejected_by(way, count, profile, detection.clone()));
    let (one, other) = (one.await, other.await);
    assert_eq!(one, other);
    one
}

async fn ejected_by(way: Way, count: usize, profile: Profile, detection: OutlierDetection) -> usize {
    let (_servers, yaml) = endpoints(&vec![status_503 as Answer; count]).await;
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| cluster.outlier_detection = Some(detection));
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    let world = World { cp, mesh, channel };
    for _ in 0..30 * count {
        way.hello(&world.mesh).await.unwrap_err();
    }
    world.explain().matches("ejected for").count()
}

#[tokio::test]
async fn the_share_of_the_ejected_is_limited_as_the_profile_says() {
    let detection = |percent, always| OutlierDetection {
        consecutive_5xx: number(2),
        interval: long(),
        base_ejection_time: long(),
        max_ejection_percent: number(percent),
        always_eject_one_host: Some(BoolValue { value: always }),
        ..OutlierDetection::default()
    };
    assert_eq!(ejected_of(4, Profile::Grpc, detection(10, false)).await, 1, "gRPC lets one go at any percentage");
    assert_eq!(ejected_of(4, Profile::Envoy, detection(10, false)).await, 0, "one of four would be too many");
    assert_eq!(ejected_of(4, Profile::Envoy, detection(10, true)).await, 1);
    assert_eq!(ejected_of(4, Profile::Envoy, detection(50, false)).await, 2);
    assert_eq!(ejected_of(4, Profile::Grpc, detection(0, false)).await, 0);
}

#[tokio::test]
async fn what_is_not_enforced_ejects_nobody() {
    let detection = OutlierDetection {
        consecutive_5xx: number(2),
        enforcing_consecutive_5xx: number(0),
        interval: long(),
        base_ejection_time: long(),
        max_ejection_percent: number(100),
        ..OutlierDetection::default()
    };
    assert_eq!(ejected_of(2, Profile::Grpc, detection).await, 0);
}

#[tokio::test]
async fn an_endpoint_that_fails_too_large_a_part_of_its_requests_is_ejected() {
    let (servers, yaml) = endpoints(&[status_503, fine, fine]).await;
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.outlier_detection = Some(OutlierDetection {
            consecutive_5xx: number(0),
            consecutive_gateway_failure: number(0),
            enforcing_success_rate: number(0),
            enforcing_failure_percentage: number(100),
            failure_percentage_threshold: number(90),
            failure_percentage_minimum_hosts: number(3),
            failure_percentage_request_volume: number(5),
            // Time for so many requests, however slow the machine is.
            interval: Some(ProtoDuration { seconds: 2, nanos: 0 }),
            base_ejection_time: long(),
            ..OutlierDetection::default()
        });
    });
    let mut world = World::on(cp).await;
    for way in Way::BOTH {
        let line = ejected(&world, way, servers[0].addr()).await;
        assert!(line.contains("by failure_percentage"), "{line}");
        for _ in 0..20 {
            way.hello(&world.mesh).await.unwrap();
        }
        // Another one, that knows nothing of it.
        world = World::on(world.cp).await;
    }
}

/// A response that ends badly after its first message.
async fn stream(way: Way, mesh: &Mesh) -> Result<(), tonic::Status> {
    let request = HelloRequest { name: "all".to_owned(), count: 3 };
    let mut replies = way.client(mesh).say_hellos(request).await?.into_inner();
    while replies.message().await?.is_some() {}
    Ok(())
}

#[tokio::test]
async fn streams_count_by_how_they_end() {
    let by_trailers: Answer = |mut served| {
        let mut body = served.begin();
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", HeaderValue::from_static("14"));
        body.send_trailers(trailers).unwrap();
    };
    let cut: Answer = |mut served| served.begin().send_reset(Reason::INTERNAL_ERROR);
    let cases = [(by_trailers, Code::Unavailable), (cut, Code::Internal)];
    for ((bad, code), way) in cases.into_iter().flat_map(|case| Way::BOTH.map(|way| (case, way))) {
        let (servers, yaml) = endpoints(&[bad, fine]).await;
        let detection = "{outlierDetection: {consecutive5xxErrors: 2, interval: 3000s, baseEjectionTime: 3000s, \
                         maxEjectionPercent: 100}}";
        let world = World::new(&(yaml + &rule(detection, &[]))).await;
        let mut failed = 0;
        while !said(&world.explain(), servers[0].addr()).contains("ejected") {
            if let Err(status) = stream(way, &world.mesh).await {
                failed += 1;
                assert_eq!(status.code(), code, "{status}");
            }
            assert!(failed <= 2, "it goes on after {failed} streams ended badly");
        }
        assert_eq!(failed, 2);
        for _ in 0..10 {
            stream(way, &world.mesh).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_deadline_after_the_response_began_counts_by_grpcs_rules_only() {
    for (profile, counts) in [(Profile::Grpc, true), (Profile::Envoy, false)] {
        for way in Way::BOTH {
            let kept = Mutex::new(Vec::new());
            let server = H2Server::start(move |mut served| {
                let body = served.begin();
                kept.lock().unwrap().push((body, served));
                Then::GoOn
            })
            .await;
            let detection = Detection {
                consecutive_5xx: Some(1),
                max_ejection_percent: 100,
                interval: HOUR,
                ..Detection::default()
            };
            let mut cluster = Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::of("own", []) };
            cluster.outlier_detection = Some(Arc::new(detection));
            let policy = Policy::default().with_target(cluster);
            let code = Local::with(&fixed(&[server.addr()]), policy, |mesh| mesh.profile(profile)).await;
            let mut request = tonic::Request::new(HelloRequest { name: "all".to_owned(), count: 3 });
            request.set_timeout(Duration::from_millis(200));
            let mut replies = way.client(&code.mesh).say_hellos(request).await.unwrap().into_inner();
            let error = loop {
                match replies.message().await {
                    Ok(reply) => assert!(reply.is_some(), "the stream goes on"),
                    Err(error) => break error,
                }
            };
            assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
            let explained = code.mesh.explain(&get("/x").body(()).unwrap().into_parts().0).to_string();
            assert_eq!(
                said(&explained, server.addr()).contains("ejected"),
                counts,
                "{profile:?}, {way:?}: {explained}"
            );
        }
    }
}

#[tokio::test]
async fn without_a_panic_threshold_nobody_who_is_ejected_is_asked() {
    for way in Way::BOTH {
        let (servers, _) = endpoints(&[status_500, status_500]).await;
        let detection = Detection {
            consecutive_5xx: Some(1),
            max_ejection_percent: 100,
            base_ejection_time: HOUR,
            max_ejection_time: HOUR,
            ..Detection::default()
        };
        let mut cluster = Cluster { http_protocol: Some(HttpProtocol::Http2), ..Cluster::of("own", []) };
        cluster.outlier_detection = Some(Arc::new(detection));
        cluster.lb.panic_threshold = 0.0;
        let policy = Policy::default().with_target(cluster);
        let addresses = [servers[0].addr(), servers[1].addr()];
        let code = Local::with(&fixed(&addresses), policy, |mesh| mesh.profile(Profile::Envoy)).await;
        for _ in 0..2 {
            assert_eq!(way.send(&code.mesh, get("/x"), "").await.unwrap().status(), 500, "{way:?}");
        }
        for _ in 0..5 {
            let error = way.send(&code.mesh, get("/x"), "").await.unwrap_err();
            assert!(error.to_string().contains("no endpoint"), "{way:?}: {error:?}");
        }
    }
}

#[tokio::test]
async fn failure_accrual_probes_with_single_requests() {
    let (good, bad) = (greeter("good").await, greeter("bad").await);
    let pause = Duration::from_millis(200);
    let accrual = FailureAccrual { max_failures: 3, min_pause: pause, max_pause: pause, jitter: 0.0 };
    let cluster = Cluster {
        outlier_detection: Some(Arc::new(Detection::accrual(accrual))),
        ..Cluster::fixed("any", Arc::default())
    };
    let policy = Policy { cluster: Some(cluster), ..Policy::default() };
    let mesh = Mesh::builder().policy(policy).build().await.unwrap();
    let channel = mesh.fixed_channel(&[good.addr(), bad.addr()]).unwrap();

    bad.state().set_unavailable(true);
    until("it has failed so often", async || {
        let _ = hello(&channel).await;
        bad.state().failed() == 3
    })
    .await;
    // The next one that goes there is a probe, and stays.
    bad.state().set_unavailable(false);
    bad.state().set_delay(HOUR);
    let mut probes = tokio::task::JoinSet::new();
    until("it is probed", async || {
        let channel = channel.clone();
        probes.spawn(async move { hello_with(&channel, |r| r.set_timeout(HOUR)).await });
        bad.state().in_flight() == 1
    })
    .await;
    let calls: Vec<_> = (0..50).map(|_| hello(&channel)).collect();
    for reply in futures::future::join_all(calls).await {
        assert_eq!(reply.unwrap().backend, "good", "one request at a time");
    }
    assert_eq!(bad.state().in_flight(), 1);
    // A probe that is given up decides nothing: the next one does.
    probes.shutdown().await;
    bad.state().set_delay(Duration::ZERO);
    until("it is back", async || hello(&channel).await.unwrap().backend == "bad").await;
    until("it gets its share", async || {
        let calls: Vec<_> = (0..20).map(|_| hello(&channel)).collect();
        let replies = futures::future::join_all(calls).await;
        replies.into_iter().filter(|reply| reply.as_ref().unwrap().backend == "bad").count() >= 8
    })
    .await;
}
