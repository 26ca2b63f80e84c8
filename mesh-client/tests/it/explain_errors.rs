//! `explain` in the error of a call that failed: all that was decided about it, whichever way it went.

use crate::{
    aggregates::{aggregate, leaf_with},
    hedging::{Answer, server},
    hedging_legs::{cluster, hedged},
    support::{
        CLUSTER, GUARD, TARGET, assert_says, assignment,
        code::{Local, fixed},
        echo::{Echo, Way, get},
        nobody, routes, rule, service, to, until,
    },
};
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{CircuitBreakers, Cluster, circuit_breakers::Thresholds},
        core::v3::HealthStatus,
    },
    google::protobuf::UInt32Value,
};
use mesh_client::{Explain, Explanation, Mesh, MeshBuilder, Profile};
use mesh_control::ControlPlane;
use mesh_xds::resource::HttpProtocol;
use std::{net::SocketAddr, sync::atomic::Ordering::SeqCst, time::Duration};

const MS: fn(u64) -> Duration = Duration::from_millis;

/// A mesh by these rules, whose errors tell how they came about, and what its layer keeps.
async fn telling(cp: &ControlPlane, profile: Profile) -> (Mesh, mesh_client::MeshChannel) {
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile).explain_errors(true);
    let mesh = builder.build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    (mesh, channel)
}

/// What the error of a request tells, over HTTP and of a generated client alike.
async fn trail(way: Way, mesh: &Mesh) -> Explanation {
    let error = way.send(mesh, get("/x"), "").await.expect_err("it cannot be served");
    Explanation::of_error(&*error).unwrap_or_else(|| panic!("nothing in {error}"))
}

/// All that is said about `subject`.
fn about<'a>(trail: &'a Explanation, subject: &str) -> Vec<&'a str> {
    trail.steps.iter().filter(|step| step.subject == subject).map(|step| step.text.as_str()).collect()
}

/// The step about this endpoint.
fn endpoint(trail: &Explanation, addr: SocketAddr) -> String {
    let addr = addr.to_string();
    about(trail, "endpoint").into_iter().find(|text| text.starts_with(&addr)).unwrap_or_default().to_owned()
}

#[tokio::test]
async fn the_limits_and_the_retries_of_a_call() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Hold]).await;
        let retries = "{attempts: 2, perTryTimeout: 50ms, retryOn: \"5xx\", backoff: 1ms}";
        let http = format!("[{{route: [{{destination: {}}}], timeout: 60s, retries: {retries}}}]", to(""));
        let yaml = service(&[("one", server.addr())]) + &routes(&http);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let (mesh, _channel) = telling(&cp, Profile::Envoy).await;
        let http = trail(way, &mesh).await;
        let status = way.hello(&mesh).await.unwrap_err();
        let grpc = Explanation::of_error(&status).expect("the status was made of an error that has it");
        assert_eq!(counts.seen.load(SeqCst), 6, "{way:?}");
        for trail in [&http, &grpc] {
            assert_says(trail.get("timeout").unwrap(), &["60s", "the route's timeout"]);
            assert_says(trail.get("retries").unwrap(), &["at most 2", "each attempt within 50ms"]);
            assert_says(trail.get("breaker").unwrap(), &["closed: max_requests"]);
            let attempts = about(trail, "attempt");
            let [first, second, third] = attempts[..] else { panic!("{way:?}: three attempts in\n{trail}") };
            assert_says(first, &["1 at", &server.addr().to_string(), "50ms", "retried after"]);
            assert_says(second, &["2 at", "retried after"]);
            assert_says(third, &["3 at", "final: "]);
            assert_eq!(about(trail, "pick").len(), 3, "{trail}");
            let last = trail.steps.last().expect("there are steps");
            assert_eq!(last.subject, "error", "{trail}");
            assert_says(&last.text, &["per_try_timeout"]);
        }
    }
}

#[tokio::test]
async fn the_attempts_of_a_call_side_by_side() {
    for way in Way::BOTH {
        let (server, counts) = server(&[Answer::Hold]).await;
        let policy = hedged(MS(50), |retry| retry.per_try_timeout = Some(MS(300)));
        let policy = policy.with_target(cluster(|cluster| cluster.http_protocol = Some(HttpProtocol::Http2)));
        let envoy = |mesh: MeshBuilder| mesh.profile(Profile::Envoy).explain_errors(true);
        let local = Local::with(&fixed(&[server.addr()]), policy, envoy).await;
        let trail = trail(way, &local.mesh).await;
        assert_eq!(counts.seen.load(SeqCst), 2, "{way:?}");
        let said = about(&trail, "hedge");
        assert_eq!(
            said[..2],
            ["another request after each 50ms", "attempt 2 starts beside those in flight"],
            "{trail}"
        );
        assert_says(
            &about(&trail, "attempt").join("\n"),
            &["1: ", "left to the attempts beside it", "2 at", "final: "],
        );
        assert_says(trail.get("error").unwrap(), &["per_try_timeout"]);
    }
}

#[tokio::test]
async fn the_endpoints_that_are_held_out() {
    let none = format!("[{{route: [{{destination: {}}}], timeout: 0.2s, retries: {{attempts: 0}}}}]", to(""));
    for way in Way::BOTH {
        // One that is ejected, and one that never answers.
        let ((failing, _), (silent, _)) = (server(&[Answer::Now(503)]).await, server(&[Answer::Hold]).await);
        let outlier = "{outlierDetection: {consecutive5xxErrors: 1, splitExternalLocalOriginErrors: true, consecutiveLocalOriginFailures: \
                       1000, interval: 3000s, baseEjectionTime: 3000s, maxEjectionPercent: 100}}";
        let yaml = service(&[("one", failing.addr()), ("two", silent.addr())]) + &routes(&none) + &rule(outlier, &[]);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let (mesh, _channel) = telling(&cp, Profile::Grpc).await;
        let ejected = async || {
            let error = way.send(&mesh, get("/x"), "").await.err()?;
            Explanation::of_error(&*error).filter(|trail| endpoint(trail, failing.addr()).contains("ejected"))
        };
        until("it is ejected", async || ejected().await.is_some()).await;
        let trail = trail(way, &mesh).await;
        assert_says(&endpoint(&trail, failing.addr()), &["ejected for", "by consecutive_5xx"]);
        assert_eq!(endpoint(&trail, silent.addr()), "", "it is picked:\n{trail}");
        assert_says(trail.get("pick").unwrap(), &[&silent.addr().to_string()]);
        assert_says(trail.get("error").unwrap(), &["deadline of 200ms exceeded"]);

        // One that lately could not be connected to.
        let refusing = nobody();
        cp.apply(&(service(&[("one", refusing.addr())]) + &routes(&none))).await.unwrap();
        until("it is tried", async || {
            let trail = self::trail(way, &mesh).await;
            endpoint(&trail, refusing.addr()).contains("last error")
        })
        .await;
        let trail = self::trail(way, &mesh).await;
        assert_says(&endpoint(&trail, refusing.addr()), &["TransientFailure", "last error: ", "refused"]);
        assert_says(trail.get("error").unwrap(), &["can be reached"]);
    }
}

#[tokio::test]
async fn the_health_that_the_control_plane_says() {
    for way in Way::BOTH {
        let backend = Echo::start("a").await;
        let cp = ControlPlane::builder().yaml(service(&[("v1", backend.addr())])).start().await.unwrap();
        leaf_with(&cp, CLUSTER, assignment(&[&[backend.addr()]], HealthStatus::Unhealthy), |_| {});
        let (mesh, _channel) = telling(&cp, Profile::Grpc).await;
        let trail = trail(way, &mesh).await;
        assert_says(&endpoint(&trail, backend.addr()), &["Unhealthy says the control plane"]);
        assert_says(trail.get("load").unwrap(), &["no endpoint can be used"]);
        assert_says(trail.get("error").unwrap(), &["none of its 1 endpoints is healthy"]);
    }
}

#[tokio::test]
async fn the_leaf_that_a_call_falls_back_to() {
    let closed = |cluster: &mut Cluster| {
        let thresholds = Thresholds { max_requests: Some(UInt32Value { value: 0 }), ..Thresholds::default() };
        cluster.circuit_breakers = Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() });
    };
    for way in Way::BOTH {
        let (silent, _) = server(&[Answer::Hold]).await;
        let none = format!("[{{route: [{{destination: {}}}], timeout: 0.2s}}]", to(""));
        let yaml = service(&[("v1", silent.addr())]) + &routes(&none);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let sick = assignment(&[&[silent.addr()]], HealthStatus::Unhealthy);
        let well = assignment(&[&[silent.addr()]], HealthStatus::Healthy);
        leaf_with(&cp, "first", sick.clone(), |_| {});
        leaf_with(&cp, "second", well.clone(), |_| {});
        aggregate(&cp, CLUSTER, &["first", "second"]);
        // Asked for by the request, and not by the mesh.
        let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Grpc);
        let mesh = builder.build().await.unwrap();
        let _channel = mesh.channel(TARGET).unwrap();
        let explained = async || {
            let error = way.send(&mesh, get("/x").extension(Explain::default()), "").await.unwrap_err();
            Explanation::of_error(&*error).expect("the request asked for it")
        };
        let trail = explained().await;
        let leaf = trail.get("leaf").unwrap_or_else(|| panic!("{way:?}: no leaf in\n{trail}"));
        assert_says(leaf, &["`second` of the aggregate", CLUSTER]);
        assert_says(trail.get("error").unwrap(), &["deadline of 200ms exceeded"]);
        // Its own limits hold.
        leaf_with(&cp, "second", well, closed);
        until("its breaker is open", async || {
            explained().await.get("breaker").is_some_and(|text| text.starts_with("open"))
        })
        .await;
    }
}
