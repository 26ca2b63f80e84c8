//! Features that no other file shows: authorities, B3, the limit of an attempt.

use crate::support::{H2Server, TARGET, Then, World, greeter, hello, hello_with, mesh_on, routes, service, to, until};
use envoy_types::util::pack_any;
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

/// One route to the greeter, with these fields beside its destination.
fn route(fields: &str) -> String {
    routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("")))
}

#[tokio::test]
async fn b3_headers_go_on_to_the_backend() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let keep = Arc::clone(&seen);
    let server = H2Server::start(move |served| {
        keep.lock().unwrap().push(served.request.headers().get("b3").cloned());
        served.ok();
        Then::GoOn
    })
    .await;
    let world = World::new(&service(&[("one", server.addr())])).await;
    let sent = "80f198ee56343ba864fe8b2a57d3eff7-e457b5a2e4d86bd1-1";
    let call = hello_with(&world.channel, |r| drop(r.metadata_mut().insert("b3", sent.parse().unwrap())));
    call.await.unwrap();
    let seen = seen.lock().unwrap();
    let got = seen[0].as_ref().expect("no b3 header arrived").to_str().unwrap();
    assert!(got.starts_with("80f198ee56343ba864fe8b2a57d3eff7-") && got.ends_with("-1"), "{got}");
}

#[tokio::test]
async fn each_attempt_has_its_own_limit_under_the_envoy_profile() {
    let attempts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&attempts);
    let held = Mutex::new(Vec::new());
    let server = H2Server::start(move |served| {
        if count.fetch_add(1, SeqCst) == 0 {
            held.lock().unwrap().push(served); // never answered
        } else {
            served.ok();
        }
        Then::GoOn
    })
    .await;
    let retries = "retries: {attempts: 2, perTryTimeout: 100ms, retryOn: \"gateway-error,reset\", backoff: 1ms}";
    let yaml = service(&[("one", server.addr())]) + &route(retries);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy).build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    let call = hello_with(&channel, |r| r.set_timeout(crate::support::GUARD));
    call.await.unwrap();
    assert_eq!(attempts.load(SeqCst), 2);
}

#[tokio::test]
async fn a_target_with_an_authority_is_asked_of_its_own_control_plane() {
    let backend = greeter("one").await;
    let cp = ControlPlane::builder().yaml(service(&[("one", backend.addr())])).start().await.unwrap();
    let empty = ControlPlane::builder().start().await.unwrap();
    // The authority's listener has an xdstp name; what it refers to is asked of the default server.
    let name = "xdstp://team/envoy.config.listener.v3.Listener/greeter.default.svc.cluster.local:50051";
    let resources = cp.cache().resources();
    let listener = resources.get(ResourceType::Listener, "greeter.default.svc.cluster.local:50051").unwrap();
    let mut listener: envoy_types::pb::envoy::config::listener::v3::Listener =
        prost::Message::decode(&*listener.value).unwrap();
    listener.name = name.to_owned();
    empty.cache().update(ResourceType::Listener, name, pack_any(listener));
    let server = |cp: &ControlPlane| {
        format!(r#"[{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}]"#, cp.addr())
    };
    let json = format!(
        r#"{{"xds_servers": {}, "node": {{"id": "test"}}, "authorities": {{"team": {{"xds_servers": {}}}}}}}"#,
        server(&cp),
        server(&empty)
    );
    let mesh = Mesh::builder().bootstrap_json(&json).unwrap().build().await.unwrap();
    let channel = mesh.channel("xds://team/greeter.default.svc.cluster.local:50051").unwrap();
    until("the channel serves", async || hello(&channel).await.is_ok_and(|r| r.backend == "one")).await;
    // The same name without the authority is found nowhere but on the default server.
    let elsewhere = mesh_on(&empty).await.channel(TARGET).unwrap();
    hello_with(&elsewhere, |r| r.set_timeout(Duration::from_secs(20))).await.unwrap_err();
}
