//! `explain`: every decision about a request, before it is sent, while it is, and in the error when it fails.

use crate::support::{
    CLUSTER, GUARD, TARGET, World, assert_says,
    echo::{Echo, Way, get},
    greeter, hello, mesh_on, nobody, routes, rule, service, to,
};
use mesh_client::{Error, Explain, Explanation, Mesh};
use mesh_control::ControlPlane;
use std::error::Error as _;

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

#[tokio::test]
async fn in_the_error_of_a_request_that_failed() {
    let refusing = nobody();
    let yaml = service(&[("v1", refusing.addr())]);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap();
    let mesh = builder.explain_errors(true).build().await.unwrap();
    let status = hello(&mesh.channel(TARGET).unwrap()).await.unwrap_err();
    let trail = Explanation::of_error(&status).expect("the status was made of an error that has it");
    assert_says(&trail.to_string(), &[CLUSTER, "connect ", &refusing.addr().to_string(), "final: ", "error "]);
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
