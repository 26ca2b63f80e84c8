//! A control plane that is late, or that serves what cannot be used.

use crate::support::{
    CLUSTER, GUARD, TARGET, World, assert_says, assignment, echo::Way, greeter, hello, mesh_on, nobody, prompt_hello,
    routes, rule, service, to, until,
};
use envoy_types::{
    pb::envoy::config::{cluster::v3::OutlierDetection, core::v3::HealthStatus},
    pb::google::protobuf::UInt32Value,
    util::pack_any,
};
use examples::backend::Backend;
use mesh_client::{Mesh, Profile};
use mesh_control::{ControlPlane, Event};
use mesh_xds::{
    Bootstrap,
    server::{Any, ResourceType},
    status::{ClientResourceStatus, ResourceStatus},
};
use prost::Message;
use std::time::Duration;
use tonic::Code;

const V1: &str = "outbound|50051|v1|greeter.default.svc.cluster.local";
const V2: &str = "outbound|50051|v2|greeter.default.svc.cluster.local";

/// A cluster as it is served, changed.
fn changed(
    cp: &ControlPlane,
    name: &str,
    change: impl FnOnce(&mut envoy_types::pb::envoy::config::cluster::v3::Cluster),
) -> Any {
    let resources = cp.cache().resources();
    let served = resources.get(ResourceType::Cluster, name).unwrap();
    let mut cluster = Message::decode(&*served.value).unwrap();
    change(&mut cluster);
    pack_any(cluster)
}

fn status_of(mesh: &Mesh, name: &str, kind: &str) -> Option<ResourceStatus> {
    let resources = mesh.status().unwrap().resources;
    resources.into_iter().find(|r| &*r.name == name && r.type_url.ends_with(kind))
}

/// A service of two versions; requests with `x-two: 1` go to the second, all others to the first.
fn v2_by_header(one: &Backend, two: &Backend) -> String {
    service(&[("v1", one.addr()), ("v2", two.addr())])
        + &routes(&format!(
            "[{{match: [{{headers: {{x-two: {{exact: \"1\"}}}}}}], route: [{{destination: {}}}]}}, {{route: [{{destination: {}}}]}}]",
            to("v2"),
            to("v1")
        ))
        + &rule("{}", &["v1", "v2"])
}

#[tokio::test]
async fn calls_wait_for_a_control_plane_that_is_late() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let port = nobody();
        let addr = port.addr();
        let mut bootstrap =
            Bootstrap::from_json(&mesh_control::bootstrap::Bootstrap::new(addr.to_string()).to_string()).unwrap();
        bootstrap.timing.backoff_base = Duration::from_millis(20);
        bootstrap.timing.backoff_max = Duration::from_millis(50);
        let mesh = Mesh::builder().bootstrap(bootstrap).build().await.unwrap();
        let channel = mesh.channel(TARGET).unwrap();

        let limit = Duration::from_millis(500);
        let status = way.hello_with(&mesh, |r| r.set_timeout(limit)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &[TARGET, &addr.to_string(), "within 500ms", "refused"]);
        let error = channel.ready(limit).await.unwrap_err();
        assert!(error.is_timeout() && error.is_local(), "{error:?}");
        assert_says(&error.to_string(), &[TARGET, &addr.to_string(), "within 500ms", "refused"]);

        let waiting = tokio::spawn({
            let mesh = mesh.clone();
            async move { way.hello_with(&mesh, |r| r.set_timeout(GUARD)).await }
        });
        let yaml = service(&[("one", backend.addr())]);
        let _cp = ControlPlane::builder().listen(addr).yaml(yaml).start().await.unwrap();
        assert_eq!(waiting.await.unwrap().unwrap().backend, "one");
        channel.ready(GUARD).await.unwrap();
    }
}

#[tokio::test]
async fn a_control_plane_that_accepts_and_says_nothing_is_named() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let bootstrap = mesh_control::bootstrap::Bootstrap::new(&*addr).to_string();
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    let error = channel.ready(Duration::from_millis(100)).await.unwrap_err().to_string();
    assert_says(&error, &[TARGET, &addr, "has not answered yet"]);
}

#[tokio::test]
async fn a_bad_resource_is_refused_by_itself_and_its_last_good_version_stays() {
    let (one, two) = (greeter("v1").await, greeter("v2").await);
    let yaml = v2_by_header(&one, &two);
    let world = World::new(&yaml).await;
    assert_eq!(hello(&world.channel).await.unwrap().backend, "v1");
    let before = status_of(&world.mesh, V1, "Cluster").unwrap();
    assert_eq!(before.client_status, ClientResourceStatus::Acked);

    let mut events = world.cp.events();
    let mut resources = world.cp.cache().resources();
    let percent = Some(UInt32Value { value: 101 });
    let bad = changed(&world.cp, V1, |c| {
        c.outlier_detection = Some(OutlierDetection { max_ejection_percent: percent, ..OutlierDetection::default() });
    });
    let neighbour = changed(&world.cp, V2, |c| c.alt_stat_name = "changed".to_owned());
    resources.insert(ResourceType::Cluster, V1, bad);
    resources.insert(ResourceType::Cluster, V2, neighbour);
    let version = world.cp.cache().set(resources);

    let nack = loop {
        let event = tokio::time::timeout(GUARD, events.next()).await.expect("no NACK came").unwrap();
        if let Event::Nack(nack) = event {
            break nack;
        }
    };
    assert_eq!((nack.resource_type, nack.version), (ResourceType::Cluster, version));
    assert_says(&nack.detail, &[V1, "outlier_detection.max_ejection_percent", "100"]);
    assert!(!nack.detail.contains(V2), "{}", nack.detail);
    assert_says(&nack.detail.to_lowercase(), &["cluster"]);

    until("the refusal is in the status", async || {
        status_of(&world.mesh, V1, "Cluster").unwrap().client_status == ClientResourceStatus::Nacked
    })
    .await;
    let after = status_of(&world.mesh, V1, "Cluster").unwrap();
    assert_eq!(after.version, before.version, "the last good version is in force");
    let refused = after.error_state.unwrap();
    assert_says(&refused.details, &["outlier_detection.max_ejection_percent"]);
    assert_eq!(&*refused.version, version.to_string());
    let neighbour = status_of(&world.mesh, V2, "Cluster").unwrap();
    assert_eq!((neighbour.client_status, &*neighbour.version), (ClientResourceStatus::Acked, &*version.to_string()));
    for way in Way::BOTH {
        assert_eq!(way.hello(&world.mesh).await.unwrap().backend, "v1");
        assert_eq!(
            way.hello_with(&world.mesh, |r| drop(r.metadata_mut().insert("x-two", "1".parse().unwrap())))
                .await
                .unwrap()
                .backend,
            "v2"
        );
    }
}

#[tokio::test]
async fn a_resource_that_was_never_good_is_named_to_the_caller() {
    let backend = greeter("one").await;
    let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())])).start().await.unwrap();
    let bad = changed(&cp, CLUSTER, |c| c.eds_cluster_config = None);
    cp.cache().update(ResourceType::Cluster, CLUSTER, bad);
    for way in Way::BOTH {
        let status = way.prompt(&mesh_on(&cp).await).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[TARGET, CLUSTER, "rejected", "eds"]);
    }
}

#[tokio::test]
async fn a_listener_that_does_not_exist_fails_calls_at_once() {
    let cp = ControlPlane::builder().start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel("xds:///nobody.example:1").unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_says(
        status.message(),
        &["xds:///nobody.example:1", "not in the mesh", "does not exist", &cp.addr().to_string()],
    );
    let error = channel.ready(GUARD).await.unwrap_err();
    assert!(error.is_unavailable() && error.is_local());
    assert_says(&error.to_string(), &["xds:///nobody.example:1", "does not exist"]);
}

#[tokio::test]
async fn a_route_to_a_cluster_that_does_not_exist_fails_calls_at_once() {
    for way in Way::BOTH {
        let (one, two) = (greeter("v1").await, greeter("v2").await);
        let yaml = v2_by_header(&one, &two);
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        cp.cache().remove(ResourceType::Cluster, V2);
        let mesh = mesh_on(&cp).await;
        let call = way.hello_with(&mesh, |r| {
            r.set_timeout(crate::support::HOUR);
            r.metadata_mut().insert("x-two", "1".parse().unwrap());
        });
        let status = tokio::time::timeout(Duration::from_secs(10), call).await.expect("not promptly").unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[TARGET, V2, "does not exist"]);
        assert_eq!(way.hello(&mesh).await.unwrap().backend, "v1", "the other route serves");
    }
}

#[tokio::test]
async fn no_healthy_endpoint_fails_calls_at_once_until_there_is_one() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())])).start().await.unwrap();
        let serve = |assignment| cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(assignment));
        serve(assignment(&[], HealthStatus::Healthy));
        // Envoy would disregard health here.
        let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Grpc);
        let mesh = mesh.build().await.unwrap();
        let _channel = mesh.channel(TARGET).unwrap();
        let status = way.prompt(&mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[TARGET, CLUSTER, "no endpoints"]);

        serve(assignment(&[&[backend.addr()]], HealthStatus::Unhealthy));
        until("the unhealthy endpoint is known", async || {
            let status = way.prompt(&mesh).await.unwrap_err();
            assert_eq!(status.code(), Code::Unavailable);
            status.message().contains("none of its 1 endpoints is healthy")
        })
        .await;
        assert_eq!(backend.state().calls(), 0);
        serve(assignment(&[&[backend.addr()]], HealthStatus::Healthy));
        until("the healthy endpoint serves", async || way.hello(&mesh).await.is_ok()).await;
    }
}
