//! Stateful sessions: callers stay with their endpoint.

use crate::{
    filters::{add_filter, edit_routes, packed, refused},
    support::{
        CLUSTER, TARGET, assert_says,
        echo::{Echo, Way, get, joined},
        edit, edit_cluster, mesh_on, routes, rule, service, to, until,
    },
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{HealthStatus, HealthStatusSet, TypedExtensionConfig},
            endpoint::v3::ClusterLoadAssignment,
        },
        extensions::{
            filters::http::stateful_session::v3::{
                StatefulSession, StatefulSessionPerRoute, stateful_session_per_route::Override,
            },
            http::stateful_session::{cookie::v3::CookieBasedSessionState, header::v3::HeaderBasedSessionState},
        },
        r#type::http::v3::Cookie,
    },
    google::protobuf::{Any, Duration as ProtoDuration},
};
use mesh_client::Explain;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::collections::HashSet;

fn session(config: Any) -> StatefulSession {
    let state = TypedExtensionConfig { name: "state".into(), typed_config: Some(config) };
    StatefulSession { session_state: Some(state), ..StatefulSession::default() }
}

fn cookie(path: &str) -> StatefulSession {
    let ttl = Some(ProtoDuration { seconds: 60, nanos: 0 });
    let cookie = Cookie { name: "stick".into(), ttl, path: path.into(), ..Cookie::default() };
    session(packed(&CookieBasedSessionState { cookie: Some(cookie) }))
}

async fn world(backends: &[Echo], http: &str, filter: &StatefulSession) -> ControlPlane {
    let names = ["v1", "v2", "v3"];
    let endpoints: Vec<_> = backends.iter().zip(names).map(|(backend, name)| (name, backend.addr())).collect();
    let yaml = service(&endpoints) + &routes(http) + &rule("{}", &names);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    add_filter(&cp, "session", packed(filter), false);
    cp
}

async fn three() -> [Echo; 3] {
    [Echo::start("v1").await, Echo::start("v2").await, Echo::start("v3").await]
}

#[tokio::test]
async fn a_cookie_keeps_callers_at_their_endpoint() {
    let backends = three().await;
    let cp =
        world(&backends, &format!("[{{name: all, route: [{{destination: {}}}]}}]", to("")), &cookie("/shop")).await;
    let mesh = mesh_on(&cp).await;
    for way in Way::BOTH {
        let first = way.send(&mesh, get("/shop/cart"), "").await.unwrap();
        let backend = joined(first.headers(), "x-backend");
        let set = joined(first.headers(), "set-cookie");
        assert!(set.starts_with("stick=\"") && set.ends_with("; Max-Age=60; Path=/shop; HttpOnly"), "{set}");
        let value = set.split(';').next().unwrap().to_owned();
        for _ in 0..6 {
            let explain = Explain::default();
            let mut request = get("/shop").header("cookie", format!("other=1; {value}"));
            request.extensions_mut().unwrap().insert(explain.clone());
            let again = way.send(&mesh, request, "").await.unwrap();
            assert_eq!(joined(again.headers(), "x-backend"), backend);
            assert_eq!(joined(again.headers(), "set-cookie"), "", "nothing has changed");
            assert_says(&explain.to_string(), &["session", "sticks to 127.0.0.1:"]);
        }
        let mut seen = HashSet::new();
        until("requests without the session come to all", async || {
            let elsewhere = way.send(&mesh, get("/").header("cookie", &value), "").await.unwrap();
            assert_eq!(joined(elsewhere.headers(), "set-cookie"), "", "not a path of the cookie");
            seen.insert(joined(elsewhere.headers(), "x-backend"));
            seen.len() == 3
        })
        .await;
    }
    // An endpoint that is gone: another one, and a new cookie. 127.0.0.1:1
    let request = get("/shop").header("cookie", "stick=\"MTI3LjAuMC4xOjE=\"");
    let moved = Way::Channel.send(&mesh, request, "").await.unwrap();
    assert!(joined(moved.headers(), "set-cookie").starts_with("stick="));
}

#[tokio::test]
async fn a_header_keeps_callers_at_their_endpoint() {
    for way in Way::BOTH {
        let backends = three().await;
        let config = session(packed(&HeaderBasedSessionState { name: "x-session".into() }));
        let cp = world(&backends, &format!("[{{name: all, route: [{{destination: {}}}]}}]", to("")), &config).await;
        let mesh = mesh_on(&cp).await;
        let first = way.send(&mesh, get("/"), "").await.unwrap();
        let (backend, value) = (joined(first.headers(), "x-backend"), joined(first.headers(), "x-session"));
        for _ in 0..6 {
            let again = way.send(&mesh, get("/").header("x-session", &value), "").await.unwrap();
            assert_eq!(joined(again.headers(), "x-backend"), backend);
        }
        let off = StatefulSessionPerRoute { r#override: Some(Override::Disabled(true)) };
        edit_routes(&cp, |r| drop(r.virtual_hosts[0].typed_per_filter_config.insert("session".into(), packed(&off))));
        until("the route has no sessions", async || {
            let response = way.send(&mesh, get("/"), "").await.unwrap();
            joined(response.headers(), "x-session").is_empty()
        })
        .await;
    }
}

#[tokio::test]
async fn a_session_keeps_its_cluster_where_the_route_splits() {
    for way in Way::BOTH {
        let backends = three().await;
        let part = |name| format!("{{destination: {}, weight: 33}}", to(name));
        let http = format!(
            "[{{name: all, route: [{}, {}, {{destination: {}, weight: 34}}]}}]",
            part("v1"),
            part("v2"),
            to("v3")
        );
        let cp = world(&backends, &http, &cookie("")).await;
        let mesh = mesh_on(&cp).await;
        let mut seen = HashSet::new();
        for _ in 0..12 {
            let first = way.send(&mesh, get("/"), "").await.unwrap();
            let value = joined(first.headers(), "set-cookie").split(';').next().unwrap().to_owned();
            let backend = joined(first.headers(), "x-backend");
            for _ in 0..3 {
                let again = way.send(&mesh, get("/").header("cookie", &value), "").await.unwrap();
                assert_eq!(joined(again.headers(), "x-backend"), backend);
                assert_eq!(joined(again.headers(), "set-cookie"), "");
            }
            seen.insert(backend);
        }
        assert!(seen.len() > 1, "sessions begin anywhere: {seen:?} of {CLUSTER}");
    }
}

#[tokio::test]
async fn a_session_goes_on_at_an_endpoint_that_drains_where_the_cluster_says_so() {
    let backends = three().await;
    let cp = world(&backends, &format!("[{{name: all, route: [{{destination: {}}}]}}]", to("")), &cookie("")).await;
    let statuses = [HealthStatus::Unknown, HealthStatus::Healthy, HealthStatus::Draining].map(Into::into).to_vec();
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.common_lb_config.get_or_insert_default().override_host_status = Some(HealthStatusSet { statuses });
    });
    let mesh = mesh_on(&cp).await;
    let (_channel, _layer) = (mesh.channel(TARGET).unwrap(), mesh.layer());
    let first = Way::Channel.send(&mesh, get("/"), "").await.unwrap();
    let drains = joined(first.headers(), "x-backend");
    let value = joined(first.headers(), "set-cookie").split(';').next().unwrap().to_owned();
    let port = backends.iter().find(|backend| !backend.seen().is_empty()).unwrap().addr().port();
    edit::<ClusterLoadAssignment>(&cp, ResourceType::ClusterLoadAssignment, CLUSTER, |assignment| {
        let endpoints = assignment.endpoints.iter_mut().flat_map(|locality| &mut locality.lb_endpoints);
        let mut of_port = endpoints.filter(|endpoint| format!("{endpoint:?}").contains(&format!("PortValue({port})")));
        of_port.next().unwrap().health_status = HealthStatus::Draining.into();
        assert!(of_port.next().is_none());
    });
    until("callers without the session do not come any more", async || {
        Way::Channel.spread(&mesh, 9).await.keys().all(|backend| *backend != drains)
    })
    .await;
    // The mesh that had it before, and one that never did.
    for mesh in [mesh, mesh_on(&cp).await] {
        for way in Way::BOTH {
            for _ in 0..10 {
                let again = way.send(&mesh, get("/").header("cookie", &value), "").await.unwrap();
                assert_eq!(joined(again.headers(), "x-backend"), drains, "{way:?}");
                assert_eq!(joined(again.headers(), "set-cookie"), "", "nothing has changed");
                assert_ne!(way.backend(&mesh, get("/")).await, drains, "a caller without it, {way:?}");
            }
        }
    }
    // Where the cluster does not say so the session begins anew.
    edit_cluster(&cp, CLUSTER, |cluster| cluster.common_lb_config = None);
    let mesh = mesh_on(&cp).await;
    let moved = Way::Layer.send(&mesh, get("/").header("cookie", &value), "").await.unwrap();
    assert_ne!(joined(moved.headers(), "x-backend"), drains);
    assert!(joined(moved.headers(), "set-cookie").starts_with("stick="));
}

#[tokio::test]
async fn bad_sessions_are_refused_by_their_path() {
    let backends = three().await;
    let config = session(packed(&CookieBasedSessionState { cookie: Some(Cookie::default()) }));
    let cp = world(&backends, &format!("[{{route: [{{destination: {}}}]}}]", to("")), &config).await;
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    let said = refused(&mesh, "Listener").await;
    assert_says(&said, &["http_filters[1].typed_config.session_state.typed_config.cookie.name: must not be empty"]);
}
