//! Istio's `localityLbSetting`, from YAML: requests stay near their client, and go to the next nearest when nobody there can take them.

use crate::support::{
    GUARD, TARGET, assert_says,
    echo::{Echo, Way, get},
    rule, service, until,
};
use futures::future::join_all;
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;

const NAMES: [&str; 3] = ["near", "next", "far"];
const ZONES: [&str; 3] = ["r1/z1", "r1/z2", "r2/z1"];

/// Three servers, each in a locality of its own, under this traffic policy.
async fn started(traffic: &str) -> (ControlPlane, Vec<Echo>) {
    let backends = join_all(NAMES.iter().map(|name| Echo::start(name))).await;
    let control = ControlPlane::builder().yaml(yaml(&backends, traffic)).start().await.unwrap();
    (control, backends)
}

fn yaml(backends: &[Echo], traffic: &str) -> String {
    let endpoints: Vec<_> = backends.iter().map(|backend| ("v1", backend.addr())).collect();
    let mut yaml = service(&endpoints);
    for (backend, zone) in backends.iter().zip(ZONES) {
        let port = format!("{{grpc: {}}}", backend.addr().port());
        yaml = yaml.replace(&port, &format!("{port}, locality: {zone}"));
    }
    yaml + &rule(traffic, &[])
}

/// A mesh whose node says that it is there.
async fn mesh_in(cp: &ControlPlane, region: &str, zone: &str, profile: Profile) -> Mesh {
    let mut bootstrap: serde_json::Value = serde_json::from_str(&cp.bootstrap()).unwrap();
    bootstrap["node"]["locality"] = serde_json::json!({"region": region, "zone": zone, "sub_zone": ""});
    let builder = Mesh::builder().bootstrap_json(&bootstrap.to_string()).unwrap().profile(profile);
    let mesh = builder.build().await.unwrap();
    mesh.channel(TARGET).unwrap().ready(GUARD).await.unwrap();
    mesh
}

async fn names(mesh: &Mesh, way: Way) -> String {
    way.spread(mesh, 30).await.into_keys().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn requests_stay_near_and_fail_over_to_the_next_nearest() {
    let (cp, mut backends) = started("{outlierDetection: {}}").await;
    for (region, zone, expected) in
        [("r1", "z1", "near"), ("r1", "z2", "next"), ("r2", "z1", "far"), ("r9", "z9", "far near next")]
    {
        for profile in [Profile::Grpc, Profile::Envoy] {
            let mesh = mesh_in(&cp, region, zone, profile).await;
            for way in Way::BOTH {
                assert_eq!(names(&mesh, way).await, expected, "{region}/{zone} {profile:?} {way:?}");
            }
        }
    }
    let mesh = mesh_in(&cp, "r1", "z1", Profile::Grpc).await;
    assert_eq!(names(&mesh, Way::Channel).await, "near");
    let _near = backends.remove(0).kill().await;
    until("next", async || names(&mesh, Way::Channel).await == "next").await;
    let _next = backends.remove(0).kill().await;
    until("far", async || names(&mesh, Way::Layer).await == "far").await;
}

#[tokio::test]
async fn the_setting_of_a_rule_takes_effect_when_it_changes() {
    let (cp, backends) = started("{}").await;
    let mesh = mesh_in(&cp, "r1", "z1", Profile::Grpc).await;
    let all = "far near next";
    assert_eq!(names(&mesh, Way::Channel).await, all, "nobody would notice an outlier");
    let apply = async |traffic: &str| {
        cp.apply(&yaml(&backends, traffic)).await.unwrap();
    };
    let becomes = async |traffic: &str, expected: &str| {
        apply(traffic).await;
        for way in Way::BOTH {
            until(expected, async || names(&mesh, way).await == expected).await;
        }
    };
    becomes("{outlierDetection: {}}", "near").await;
    becomes("{outlierDetection: {}, loadBalancer: {localityLbSetting: {enabled: false}}}", all).await;
    becomes("{loadBalancer: {localityLbSetting: {distribute: [{from: r2, to: {r2: 100}}]}}}", all).await;
    becomes("{loadBalancer: {localityLbSetting: {distribute: [{from: r1/z1, to: {r2: 100}}]}}}", "far").await;
    apply("{loadBalancer: {localityLbSetting: {distribute: [{from: r1/z1, to: {r1/z1: 80, r2: 20}}]}}}").await;
    until("both", async || names(&mesh, Way::Channel).await == "far near").await;
    let seen = Way::Channel.spread(&mesh, 1000).await;
    assert!((740..=860).contains(&seen["near"]) && seen.len() == 2, "{seen:?}");
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    let text = mesh.explain(&get("/x").body(()).unwrap().into_parts().0).to_string();
    assert_says(&text, &["in r1/z1/", "in r2/z1/"]);
}
