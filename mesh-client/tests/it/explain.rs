//! `explain`: every decision about a request, before it is sent, while it is, and in the error when it fails.

use crate::{
    hedging::{Answer, server},
    support::{
        ANY, CLUSTER, GUARD, HOUR, TARGET, World, assert_says,
        code::{Local, fixed},
        echo::{Echo, Way, get},
        greeter, hello, mesh_on, routes, rule, service, to, until,
    },
};
use mesh_client::{
    Error, Explain, Explanation, Mesh, MeshBuilder, Profile,
    filter::FractionalPercent,
    policy::{
        Cluster, ClusterLoadAssignment, DropOverload, Endpoint, Format, Hedge, HttpProtocol, LbPolicy, LbSettings,
        OutlierDetection, Policy, RetryOn, RetryPolicy, SlowStart, SubsetConfig, SubsetFallback, SubsetSelector, route,
    },
};
use mesh_control::ControlPlane;
use std::{collections::BTreeMap, error::Error as _, sync::Arc, time::Duration};

/// Everything that a route and a cluster can say in YAML.
fn everything() -> String {
    let route = "name: all, match: [{uri: {prefix: /}}], timeout: 30s, retries: {attempts: 2, retryOn: unavailable}, fault: {delay: \
                 {fixedDelay: 0.001s, percentage: {value: 100}}}";
    let mirror = format!("mirror: {}", to("v2"));
    let traffic = "{loadBalancer: {consistentHash: {httpHeaderName: x-user}}, outlierDetection: {consecutive5xxErrors: 3}, connectionPool: \
                   {http: {http2MaxRequests: 7}}}";
    routes(&format!("[{{{route}, {mirror}, route: [{{destination: {}}}]}}]", to("v1"))) + &rule(traffic, &["v1", "v2"])
}

#[tokio::test]
async fn before_a_request_is_sent() {
    let (one, two) = (greeter("one").await, greeter("two").await);
    let world = World::new(&(service(&[("v1", one.addr()), ("v2", two.addr())]) + &everything())).await;
    let request = http::Request::post(format!("http://{}/helloworld.Greeter/SayHello", &TARGET["xds:///".len()..]))
        .header("content-type", "application/grpc")
        .header("x-user", "ada")
        .body(())
        .unwrap();
    let trail = world.mesh.explain(&request.into_parts().0);
    for subject in ["target", "config", "listener", "virtual host", "route", "protocol"] {
        assert!(trail.get(subject).is_some(), "no {subject} in\n{trail}");
    }
    let says = |subject: &str, part: &str| {
        let text = trail.get(subject).unwrap_or_else(|| panic!("no {subject} in\n{trail}"));
        assert!(text.contains(part), "{subject} does not say `{part}`:\n{trail}");
    };
    says("retries", "at most 2");
    says("mirror", "|v2|");
    says("filters", "fault (delay)");
    says("cluster", "|v1|");
    says("subset", "`v1`");
    says("balancing", "ring hash");
    assert_eq!(trail.get("hash").map(str::len), Some(16), "{trail}");
    says("load", "max_requests 0 of 7");
    says("load", "priority 0");
    says("endpoint", &one.addr().to_string());
    assert_eq!((one.state().calls(), two.state().calls()), (0, 0), "nothing is sent");
}

#[tokio::test]
async fn while_a_request_is_sent() {
    for way in Way::BOTH {
        let (one, two) = (greeter("one").await, greeter("two").await);
        let world = World::new(&(service(&[("v1", one.addr()), ("v2", two.addr())]) + &everything())).await;
        one.state().fail_next(1);
        let explain = Explain::default();
        way.hello_with(&world.mesh, |request| {
            request.metadata_mut().insert("x-user", "ada".parse().unwrap());
            request.extensions_mut().insert(explain.clone());
        })
        .await
        .unwrap();
        let trail = explain.explanation();
        let all = |subject: &str| {
            trail.steps.iter().filter(|s| s.subject == subject).map(|s| s.text.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(all("fault"), ["delayed by 1ms"], "{trail}");
        assert_says(all("retries")[0], &["at most 2"]);
        assert_says(all("breaker")[0], &["closed: max_requests", "of 7"]);
        assert_says(all("load")[0], &["priority 0", "max_requests 1 of 7", "0 retries in flight"]);
        assert_says(all("wait")[0], &["for a connection to", &one.addr().to_string()]);
        assert_eq!((all("balancing"), all("hash")[0].len()), (vec!["ring hash"], 16), "{trail}");
        assert_says(all("mirror")[0], &["|v2|"]);
        let picks = all("pick");
        assert_eq!(picks.len(), 2, "{trail}");
        picks.iter().for_each(|pick| assert_says(pick, &[&one.addr().to_string(), "priority 0"]));
        let [first, second] = all("attempt")[..] else { panic!("two attempts in\n{trail}") };
        assert_says(first, &["grpc-status 14", "retried after"]);
        assert_says(second, &["2 at", "HTTP 200"]);
        assert_eq!(all("peer").len(), 2);
    }
}

/// What code can say beyond that, with an endpoint that is ejected, an aggregate and shares of what is dropped.
#[tokio::test]
async fn every_decision_is_told_before_and_in_the_error() {
    let (bad, _) = server(&[Answer::Now(503)]).await;
    let nobody = std::net::TcpListener::bind(ANY).unwrap().local_addr().unwrap();
    let subsets = SubsetConfig {
        fallback: SubsetFallback::Any,
        default_subset: BTreeMap::new(),
        selectors: vec![SubsetSelector { keys: vec!["version".into()], single_host: false, fallback: None }],
        panic_mode_any: false,
    };
    let lb = LbSettings {
        slow_start: Some(SlowStart { window: HOUR, aggression: 1.0, min_weight: 10.0 }),
        subsets: Some(Arc::new(subsets)),
        panic_threshold: 0.0,
        ..LbSettings::default()
    };
    let outlier =
        OutlierDetection { consecutive_5xx: Some(1), max_ejection_percent: 50, ..OutlierDetection::default() };
    let endpoints = [bad.addr(), nobody].map(Endpoint::new).to_vec();
    let drops = vec![DropOverload { category: "spare".into(), percentage: FractionalPercent(0) }];
    let assignment = ClusterLoadAssignment { drops, ..ClusterLoadAssignment::of("leaf", endpoints) };
    let leaf = Cluster {
        lb_policy: LbPolicy::least_request(3),
        lb,
        outlier_detection: Some(Arc::new(outlier)),
        http_protocol: Some(HttpProtocol::Http2),
        ..Cluster::fixed("leaf", Arc::new(assignment))
    };
    let on = RetryOn { http_5xx: true, connect_failure: true, ..RetryOn::default() };
    let retry = RetryPolicy {
        on,
        per_try_timeout: Some(Duration::from_secs(7)),
        per_try_idle_timeout: Some(Duration::from_secs(6)),
        ..RetryPolicy::default()
    };
    let route = route::prefix("/")
        .named("all")
        .to("both")
        .timeout(Duration::from_secs(9))
        .idle_timeout(Duration::from_secs(8))
        .retry(retry)
        .hedge(Hedge::PerTryTimeout)
        .rewrite_prefix("/v2/")
        .mirror("leaf", 0.0)
        .set_header(http::HeaderName::from_static("x-made"), Format::literal("here"));
    let policy = Policy::default()
        .with_route(route::exact("/never").to("leaf"))
        .with_route(route)
        .with_cluster(leaf)
        .with_cluster(Cluster::aggregate("both", ["leaf"]));
    for way in Way::BOTH {
        let change = |mesh: MeshBuilder| {
            mesh.profile(Profile::Envoy).explain_errors(true).response_headers_timeout(Duration::from_secs(5))
        };
        let local = Local::with(&fixed(&[nobody]), policy.clone(), change).await;
        let mut error = None;
        until("a request fails for want of a connection", async || {
            error = way.send(&local.mesh, get("/x"), "").await.err();
            error.is_some()
        })
        .await;
        let before = local.mesh.explain(&get("/x").body(()).unwrap().into_parts().0).to_string();
        let error = error.unwrap();
        let after = Explanation::of_error(&*error).expect("all errors have it").to_string();
        for trail in [&before, &after] {
            assert_says(
                trail,
                &[
                    "host:///greeter.default.svc.cluster.local:50051",
                    "the path is not \"/never\"",
                    "`all`",
                    "9s (the route's timeout",
                    "8s without a movement",
                    "5s from the end of a request to its answer",
                    "at most 1, each attempt within 7s, none without a movement for 6s",
                    "another request when the limit of an attempt passes",
                    "`leaf` of the aggregate `both`",
                    "least request of 3 draws, new endpoints get less for 3600s, subsets by version",
                    "max_requests",
                    "retries in flight",
                    &bad.addr().to_string(),
                ],
            );
        }
        assert_says(
            &before,
            &[
                "HTTP/2 in plaintext, connections within 5s",
                "ejected for 30s at first, at most 50 %",
                "0 % are dropped, category spare",
                "mirror",
                &nobody.to_string(),
                "refused",
            ],
        );
        assert_says(&after, &["/x to /v2/x", "attempt", "final: ", "error "]);
    }
}

#[tokio::test]
async fn in_the_error_of_a_request_that_failed() {
    let refusing = tokio::net::TcpListener::bind(ANY).await.unwrap().local_addr().unwrap();
    let yaml = service(&[("v1", refusing)]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
    let mesh = builder.explain_errors(true).build().await.unwrap();
    let status = hello(&mesh.channel(TARGET).unwrap()).await.unwrap_err();
    let trail = Explanation::of_error(&status).expect("the status was made of an error that has it");
    assert_says(&trail.to_string(), &[CLUSTER, "connect ", &refusing.to_string(), "final: ", "error "]);
    assert!(status.source().is_some());

    let plain = mesh_on(&cp).await.channel(TARGET).unwrap();
    plain.ready(GUARD).await.unwrap();
    let status = hello(&plain).await.unwrap_err();
    assert!(Explanation::of_error(&status).is_none(), "nobody asked");

    // A breaker that is open, over HTTP.
    let backend = Echo::start("v1").await;
    let limits = "{connectionPool: {http: {http2MaxRequests: 0}}}";
    let cp = ControlPlane::builder()
        .yaml(service(&[("v1", backend.addr())]) + &rule(limits, &["v1"]))
        .start()
        .await
        .unwrap();
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        let error = way.send(&mesh, get("/").extension(Explain::default()), "").await.unwrap_err();
        let error = error.downcast_ref::<Error>().expect("the mesh's own");
        let trail = error.explanation().expect("the request asked for it");
        assert_says(trail.get("breaker").unwrap(), &["open: max_requests limit of 0 reached"]);
        assert_says(trail.get("error").unwrap(), &["the circuit breaker is open"]);
    }
}
