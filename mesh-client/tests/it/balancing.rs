//! Who gets the requests: localities by weight, and endpoints that fail far more often than the others not at all.

use crate::support::{
    CLUSTER, TARGET, World, assignment, echo::Way, edit_cluster, greeter, mesh_on, routes, service, to, until,
};
use envoy_types::{
    pb::{
        envoy::config::{
            cluster::v3::OutlierDetection,
            core::v3::{HealthStatus, Locality},
        },
        google::protobuf::{Duration, UInt32Value},
    },
    util::pack_any,
};
use examples::backend::Backend;
use futures::{StreamExt, future::join_all, stream};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::collections::BTreeMap;

/// Greeters of these names.
async fn greeters(names: &[&str]) -> Vec<Backend> {
    join_all(names.iter().map(|name| greeter(name))).await
}

/// The greeter's service over all of them, without retries.
fn over(backends: &[Backend]) -> String {
    let endpoints: Vec<_> = backends.iter().map(|backend| ("v1", backend.addr())).collect();
    service(&endpoints) + &routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")))
}

/// Who answered `calls` calls, by name, either way by turns; calls that failed are not in it.
async fn spread(mesh: &Mesh, calls: usize) -> BTreeMap<String, u32> {
    let replies = stream::iter(0..calls).map(|call| Way::BOTH[call % 2].hello(mesh)).buffer_unordered(8);
    replies
        .filter_map(|reply| async move { reply.ok().map(|reply| reply.backend) })
        .fold(BTreeMap::new(), |mut seen, backend| async move {
            *seen.entry(backend).or_default() += 1;
            seen
        })
        .await
}

#[tokio::test]
async fn localities_get_requests_by_their_weight() {
    // One endpoint in the locality of weight 3, two in that of weight 1.
    let backends = greeters(&["near", "far-1", "far-2"]).await;
    let cp = ControlPlane::builder().yaml(over(&backends)).start().await.unwrap();
    let far = [backends[1].addr(), backends[2].addr()];
    let serve = |weights: [u32; 2]| {
        let mut served = assignment(&[&[backends[0].addr()], &far], HealthStatus::Healthy);
        for (locality, (zone, weight)) in served.endpoints.iter_mut().zip([("near", weights[0]), ("far", weights[1])]) {
            locality.locality = Some(Locality { zone: zone.to_owned(), ..Locality::default() });
            locality.priority = 0;
            locality.load_balancing_weight = Some(UInt32Value { value: weight });
        }
        cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(served));
    };
    serve([3, 1]);
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    until("all are connected", async || spread(&mesh, 32).await.len() == 3).await;
    let seen = spread(&mesh, 800).await;
    // Six standard deviations, if it were a draw.
    assert!((526..=674).contains(&seen["near"]), "{seen:?}");
    let apart = seen["far-1"].abs_diff(seen["far-2"]);
    assert!(apart <= 20, "the locality's share is shared alike: {seen:?}");

    serve([1, 9]);
    until("the new weights hold", async || {
        let seen = spread(&mesh, 100).await;
        seen.get("near").is_none_or(|near| *near < 30)
    })
    .await;
    let seen = spread(&mesh, 800).await;
    assert!((29..=131).contains(seen.get("near").unwrap_or(&0)), "{seen:?}");
}

#[tokio::test]
async fn an_endpoint_whose_success_rate_is_far_below_the_others_is_ejected() {
    let backends = greeters(&["a", "b", "c", "d", "bad"]).await;
    let cp = ControlPlane::builder().yaml(over(&backends)).start().await.unwrap();
    let number = |value| Some(UInt32Value { value });
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.outlier_detection = Some(OutlierDetection {
            interval: Some(Duration { seconds: 0, nanos: 200_000_000 }),
            base_ejection_time: Some(Duration { seconds: 3000, nanos: 0 }),
            // Nothing but the success rate can eject.
            consecutive_5xx: number(0),
            consecutive_gateway_failure: number(0),
            enforcing_failure_percentage: number(0),
            enforcing_success_rate: number(100),
            success_rate_minimum_hosts: number(5),
            success_rate_request_volume: number(10),
            // One of five that always fails is two deviations off: the default of 1.9 leaves little room.
            success_rate_stdev_factor: number(1000),
            ..OutlierDetection::default()
        });
    });
    let world = World::on(cp).await;
    // All fail a little: the one that fails no more than the others stays.
    for backend in &backends {
        backend.state().set_fail_rate(0.2);
    }
    backends[4].state().set_fail_rate(0.95);
    until("the bad endpoint is ejected", async || {
        spread(&world.mesh, 50).await;
        world.explain().contains("ejected for")
    })
    .await;
    let before = backends[4].state().calls();
    let seen = spread(&world.mesh, 100).await;
    assert_eq!((seen.get("bad"), backends[4].state().calls()), (None, before), "{seen:?}");
    assert_eq!(seen.len(), 4, "all others serve: {seen:?}");
}
