//! Istio's control plane serves the client.

use interop::istiod::Istiod;
use interop::{ccore, report};

use crate::common::{Backends, assert_share};

const YAML: &str = include_str!("../../istiod/testdata/greeter.yaml");
const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";

/// Shows that istiod, the YAML and the backends are sound, whatever our client does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn istiod_serves_a_ccore_client() {
    let backends = Backends::start().await;
    let mut istiod = Istiod::start(&backends.written_into(YAML)).await.unwrap();
    let bootstrap = istiod.bootstrap();

    // C-core refuses the v2 cluster (LEAST_REQUEST) and fails the calls drawn to it, after their retries: what is left is v1.
    let plain = ccore::call(TARGET, &bootstrap, 100, &[]).await.unwrap();
    assert_eq!(plain.answered_by("v1"), plain.ended_with("OK"), "{plain:?}");
    assert_share(plain.answered_by("v1"), plain.total(), 0.8);

    let fault = ccore::call(TARGET, &bootstrap, 20, &[("x-fault", "abort")]).await.unwrap();
    assert_eq!(fault.ended_with("UNAVAILABLE"), 20, "{fault:?}");
    assert_eq!(fault.details["Fault injected"], 20, "{fault:?}");
    istiod.running().unwrap();
    report::row("istiod", "istiod -> C-core (reference)", "80/20 split", &format!("{:?}", plain.backends));
}
