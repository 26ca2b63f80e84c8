//! Istio's control plane serves the client.

use std::time::Duration;

use interop::istiod::Istiod;
use interop::{ccore, report};
use mesh_client::Mesh;

use crate::common::{Backends, assert_share, call, listed};

const YAML: &str = include_str!("../../istiod/testdata/greeter.yaml");
/// Guards against a wait that never ends.
const READY: Duration = Duration::from_secs(30);
const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";

/// Shows that istiod, the YAML and the backends are sound, whatever our client does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn istiod_serves_a_ccore_client() {
    let backends = Backends::start_apart().await;
    let mut istiod = Istiod::start(&backends.written_into(YAML)).await.unwrap();
    let bootstrap = istiod.bootstrap();

    // C-core refuses the v2 cluster (LEAST_REQUEST) and fails the calls drawn to it: what is left is v1.
    let split = ccore::call(TARGET, &bootstrap, 200, &[]).await.unwrap();
    assert_eq!(split.answered_by("v1"), split.ended_with("OK"), "{split:?}");
    assert_share(split.answered_by("v1"), split.total(), 0.8);

    let canary = ccore::call(TARGET, &bootstrap, 10, &[("x-canary", "1")]).await.unwrap();
    assert_eq!(canary.ended_with("OK"), 0, "{canary:?}");

    let fault = ccore::call(TARGET, &bootstrap, 20, &[("x-fault", "abort")]).await.unwrap();
    assert_eq!(fault.ended_with("UNAVAILABLE"), 20, "{fault:?}");
    istiod.running().unwrap();

    let path = "istiod -> C-core (reference)";
    report::row(path, "80/20 split", &format!("{}; refuses the rest", listed(&split.backends)));
    report::row(path, "canary header, LEAST_REQUEST subset", &format!("refused: {}", listed(&canary.codes)));
    report::row(path, "injected fault", &listed(&fault.details));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn the_client_obeys_istiod() {
    let mut backends = Backends::start_apart().await;
    let yaml = backends.written_into(YAML);
    let mut istiod = Istiod::start(&yaml).await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&istiod.bootstrap()).unwrap().build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(READY).await.unwrap();

    let split = call(channel.clone(), 1000, &[]).await;
    assert_eq!(split.ended_with("OK"), 1000, "{split:?}");
    assert_share(split.answered_by("v2"), 1000, 0.2);

    // The canary's subset has `loadBalancer: LEAST_REQUEST`, which C-core refuses.
    let canary = call(channel.clone(), 50, &[("x-canary", "1")]).await;
    assert_eq!(canary.answered_by("v2"), 50, "{canary:?}");

    let fault = call(channel.clone(), 20, &[("x-fault", "abort")]).await;
    assert_eq!(fault.ended_with("UNAVAILABLE"), 20, "{fault:?}");
    assert_eq!(backends.calls(), 1050, "an injected fault reaches no backend");

    assert_eq!(istiod.acknowledged().await.unwrap(), 4, "Listener, RouteConfiguration, Cluster, ClusterLoadAssignment");

    istiod.apply(&yaml.replace("weight: 80", "weight: 50").replace("weight: 20", "weight: 50")).unwrap();
    let followed = tokio::time::timeout(READY, async {
        loop {
            let split = call(channel.clone(), 200, &[]).await;
            assert_eq!(split.ended_with("OK"), 200, "{split:?}");
            // 35 % is beyond five standard deviations of 20 %.
            if split.answered_by("v2") > 70 {
                break;
            }
        }
    });
    followed.await.expect("the split follows an edit");
    let edited = call(channel.clone(), 400, &[]).await;
    assert_eq!(edited.ended_with("OK"), 400, "{edited:?}");
    assert_share(edited.answered_by("v2"), 400, 0.5);

    // The client's node is in r1/z1 and the host has outlier detection: istiod ranks the localities of v1, and r1/z2 is second.
    assert_eq!(split.answered_by("v1-b"), 0, "{split:?}");
    backends.kill("v1-a").await;
    let failed_over = call(channel.clone(), 200, &[]).await;
    assert_eq!(failed_over.ended_with("OK"), 200, "{failed_over:?}");
    assert_eq!(failed_over.answered_by("v1-b"), failed_over.answered_by("v1"), "{failed_over:?}");
    istiod.running().unwrap();

    let path = "istiod -> mesh-client";
    report::row(path, "80/20 split", &listed(&split.backends));
    report::row(path, "canary header, LEAST_REQUEST subset", &listed(&canary.backends));
    report::row(path, "injected fault", &listed(&fault.details));
    report::row(path, "edited to 50/50", &listed(&edited.backends));
    report::row(path, "locality failover when v1-a dies", &listed(&failed_over.backends));
    report::row(path, "istiod's own assertions", "held; every resource it sent was acknowledged");
}
