//! Streams on which nothing moves: `idle_timeout` of the route, `per_try_idle_timeout` of the retry policy.

use crate::support::{
    CLUSTER, GUARD, H2Server, TARGET, Then, assert_says,
    echo::{Way, get},
    edit, routes, service, to,
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::config::route::v3::{RouteAction, RouteConfiguration, route},
    google::protobuf::Duration as ProtoDuration,
};
use http::Response;
use http_body_util::{BodyExt, Full};
use mesh_client::{Error, Mesh, Profile};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tower::ServiceExt;

/// A mesh by these rules whose only route was edited so.
async fn mesh(addr: SocketAddr, profile: Profile, change: impl FnOnce(&mut RouteAction)) -> (ControlPlane, Mesh) {
    let http =
        format!("[{{route: [{{destination: {}}}], retries: {{attempts: 2, retryOn: reset, backoff: 1ms}}}}]", to(""));
    let cp = ControlPlane::builder().yaml(service(&[("one", addr)]) + &routes(&http)).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[0].action else { panic!() };
        change(action);
    });
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(profile).build().await.unwrap();
    (cp, mesh)
}

fn millis(millis: i32) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds: 0, nanos: millis * 1_000_000 })
}

/// Sends a head and then `pieces` bytes, one every 50 ms; then nothing more, or the end.
fn trickle(pieces: usize, ends: bool) -> impl Fn(crate::support::Served) -> Then + Send + Sync + 'static {
    move |mut served| {
        tokio::spawn(async move {
            let mut body = served.respond.send_response(Response::new(()), false).unwrap();
            for _ in 0..pieces {
                tokio::time::sleep(Duration::from_millis(50)).await;
                body.send_data(Bytes::from_static(b"."), false).unwrap();
            }
            if ends {
                body.send_data(Bytes::new(), true).unwrap();
            }
            tokio::time::sleep(GUARD).await;
        });
        Then::GoOn
    }
}

#[tokio::test]
async fn a_stream_that_moves_lives_and_one_that_stands_still_is_ended() {
    // 500 ms of trickle under a limit of 300 ms.
    let lively = H2Server::start(trickle(10, true)).await;
    let (_cp, mesh) = mesh(lively.addr(), Profile::Envoy, |action| action.idle_timeout = millis(300)).await;
    for way in Way::BOTH {
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().body().len(), 10, "{way:?}");
    }
    let dying = H2Server::start(trickle(1, false)).await;
    let (_cp, mesh) = self::mesh(dying.addr(), Profile::Envoy, |action| action.idle_timeout = millis(200)).await;
    for way in Way::BOTH {
        let error = way.send(&mesh, get("/"), "").await.unwrap_err().to_string();
        assert_says(&error, &["nothing moved on the stream for 200ms", "idle_timeout", "attempt 1", CLUSTER]);
    }
}

#[tokio::test]
async fn waiting_for_the_head_of_the_response_is_standing_still_and_not_retried() {
    for way in Way::BOTH {
        let (held, seen) = (Mutex::new(Vec::new()), Arc::new(AtomicUsize::new(0)));
        let count = seen.clone();
        let server = H2Server::start(move |served| {
            count.fetch_add(1, SeqCst);
            held.lock().unwrap().push(served);
            Then::GoOn
        })
        .await;
        let (_cp, mesh) = mesh(server.addr(), Profile::Envoy, |action| action.idle_timeout = millis(100)).await;
        let error = way.send(&mesh, get("/"), "").await.unwrap_err();
        let error = error.downcast_ref::<Error>().expect("the mesh's own");
        assert!(error.is_timeout(), "{error}");
        assert_says(&error.to_string(), &["nothing moved on the stream for 100ms"]);
        assert_eq!(seen.load(SeqCst), 1);
        assert_eq!(mesh.channel(TARGET).unwrap().load().requests, 0);
    }
}

#[tokio::test]
async fn an_attempt_that_stands_still_is_given_up_for_the_next() {
    let (held, seen) = (Mutex::new(Vec::new()), Arc::new(AtomicUsize::new(0)));
    let count = seen.clone();
    let server = H2Server::start(move |served| {
        match count.fetch_add(1, SeqCst) {
            0 => held.lock().unwrap().push(served),
            _ => served.status(200),
        }
        Then::GoOn
    })
    .await;
    let idle = |action: &mut RouteAction| {
        action.retry_policy.as_mut().unwrap().per_try_idle_timeout = millis(100);
    };
    let (_cp, mesh) = mesh(server.addr(), Profile::Envoy, idle).await;
    assert_eq!(Way::Layer.send(&mesh, get("/"), "").await.unwrap().status(), 200);
    assert_eq!(seen.load(SeqCst), 2);
    // It holds for the body too, where nothing can be retried any more.
    let dying = H2Server::start(trickle(1, false)).await;
    let (_cp, mesh) = self::mesh(dying.addr(), Profile::Envoy, idle).await;
    let request = get("/").body(Full::<Bytes>::default()).unwrap();
    let response = mesh.channel(TARGET).unwrap().oneshot(request).await.unwrap();
    let error = response.into_body().collect().await.unwrap_err();
    assert_says(&error.to_string(), &["for 100ms", "per_try_idle_timeout"]);
}

#[tokio::test]
async fn grpc_knows_no_idle_timeout() {
    let server = H2Server::start(trickle(6, true)).await;
    let (_cp, mesh) = mesh(server.addr(), Profile::Grpc, |action| action.idle_timeout = millis(20)).await;
    assert_eq!(Way::Channel.send(&mesh, get("/"), "").await.unwrap().body().len(), 6);
}

#[tokio::test]
async fn a_delay_before_the_stream_is_not_standing_still() {
    let server = H2Server::start(|served| {
        served.status(200);
        Then::GoOn
    })
    .await;
    let fault = "fault: {delay: {percentage: {value: 100}, fixedDelay: 600ms}}";
    let http = format!("[{{{fault}, route: [{{destination: {}}}]}}]", to(""));
    let cp = ControlPlane::builder().yaml(service(&[("one", server.addr())]) + &routes(&http)).start().await.unwrap();
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[0].action else { panic!() };
        action.idle_timeout = millis(400);
    });
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy).build().await.unwrap();
    for way in Way::BOTH {
        let begun = tokio::time::Instant::now();
        assert_eq!(way.send(&mesh, get("/"), "").await.unwrap().status(), 200, "{way:?}");
        assert!(begun.elapsed() >= Duration::from_millis(600), "{:?}", begun.elapsed());
    }
}
