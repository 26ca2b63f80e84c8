//! Copies of requests to another cluster: what it sees, and that callers never notice.

use crate::support::{
    CLUSTER, H2Server, TARGET, Then, World, assert_says,
    echo::{Echo, Way, get, joined},
    edit, mesh_on, routes, rule, service, to, until,
};
use bytes::Bytes;
use envoy_types::pb::{
    envoy::config::route::v3::{RouteConfiguration, route, route_action::RequestMirrorPolicy},
    google::protobuf::BoolValue,
};
use http_body::Frame;
use http_body_util::StreamBody;
use mesh_client::{BoxError, Mesh};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tower::Service;

/// The first backend is asked; the second gets copies as these fields of the route say.
fn mirrored(backends: [SocketAddr; 2], fields: &str, traffic: &str) -> String {
    let endpoints = [("v1", backends[0]), ("v2", backends[1])];
    service(&endpoints)
        + &routes(&format!("[{{route: [{{destination: {}}}], {fields}}}]", to("v1")))
        + &rule(traffic, &["v1", "v2"])
}

async fn echoes() -> [Echo; 2] {
    [Echo::start("v1").await, Echo::start("v2").await]
}

async fn copies(backend: &Echo, count: usize) {
    until(&format!("{count} copies"), async || backend.seen().len() == count).await;
}

/// Edits the mirrors of the only route.
fn edit_mirror(cp: &ControlPlane, change: impl FnOnce(&mut RequestMirrorPolicy)) {
    edit::<RouteConfiguration>(cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let Some(route::Action::Route(action)) = &mut config.virtual_hosts[0].routes[0].action else { panic!() };
        change(&mut action.request_mirror_policies[0]);
    });
}

#[tokio::test]
async fn one_answers_and_the_other_gets_a_copy() {
    let backends = echoes().await;
    let addrs = [backends[0].addr(), backends[1].addr()];
    let world = World::new(&mirrored(addrs, &format!("mirror: {}", to("v2")), "{}")).await;
    for (before, way) in Way::BOTH.into_iter().enumerate() {
        let request = get("/path?q=1").method("POST").header("x-one", "1");
        let response = way.send(&world.mesh, request, "hello").await.unwrap();
        assert_eq!(joined(response.headers(), "x-backend"), "v1", "{way:?}");
        copies(&backends[1], before + 1).await;
        let (seen, copy) = (backends[0].last(), backends[1].last());
        assert_eq!((copy.path(), copy.header("x-one").as_str(), &copy.body[..]), ("/path?q=1", "1", &b"hello"[..]));
        assert_eq!(copy.body, seen.body);
        assert_eq!(seen.authority(), "greeter.default.svc.cluster.local:50051");
        assert_eq!(copy.authority(), "greeter.default.svc.cluster.local-shadow:50051");
    }
    assert_eq!(backends[0].seen().len(), 2);
    assert_says(&world.explain(), &["mirror", "a copy to `outbound|50051|v2|", "of 100 % of the requests"]);
}

#[tokio::test]
async fn a_share_of_the_requests_is_copied() {
    let backends = echoes().await;
    let addrs = [backends[0].addr(), backends[1].addr()];
    for (percentage, expected) in [(0, 0..=0), (50, 60..=140)] {
        let fields = format!("mirrors: [{{destination: {}, percentage: {{value: {percentage}}}}}]", to("v2"));
        let world = World::new(&mirrored(addrs, &fields, "{}")).await;
        for call in 0..200 {
            assert_eq!(Way::BOTH[call % 2].backend(&world.mesh, get("/")).await, "v1");
        }
        // A copy is on its way when its request is answered: the last ones need a moment.
        until("the copies come", async || expected.contains(&backends[1].seen().len())).await;
    }
}

#[tokio::test]
async fn authority_and_sampling_of_a_copy_are_as_configured() {
    for way in Way::BOTH {
        let backends = echoes().await;
        let yaml = mirrored([backends[0].addr(), backends[1].addr()], &format!("mirror: {}", to("v2")), "{}");
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        edit_mirror(&cp, |mirror| {
            mirror.disable_shadow_host_suffix_append = true;
            mirror.trace_sampled = Some(BoolValue { value: false });
        });
        let mesh = mesh_on(&cp).await;
        way.send(&mesh, get("/"), "").await.unwrap();
        copies(&backends[1], 1).await;
        let (seen, copy) = (backends[0].last(), backends[1].last());
        assert_eq!(copy.authority(), seen.authority());
        let (parent, copied) = (seen.header("traceparent"), copy.header("traceparent"));
        assert_eq!(parent.strip_suffix("-01"), copied.strip_suffix("-00"), "{parent} {copied}");
    }
}

#[tokio::test]
async fn a_mirror_that_hangs_or_fails_or_is_not_there_is_never_noticed() {
    let primary = Echo::start("v1").await;
    let held = Mutex::new(Vec::new());
    let seen = Arc::new(AtomicUsize::new(0));
    let count = seen.clone();
    // Never answers.
    let mirror = H2Server::start(move |served| {
        count.fetch_add(1, SeqCst);
        held.lock().unwrap().push(served);
        Then::GoOn
    })
    .await;
    let traffic = "{connectionPool: {http: {http2MaxRequests: 3}}}";
    let yaml = mirrored([primary.addr(), mirror.addr()], &format!("mirror: {}", to("v2")), traffic);
    let world = World::new(&yaml).await;
    for way in Way::BOTH {
        for _ in 0..5 {
            assert_eq!(way.backend(&world.mesh, get("/")).await, "v1");
        }
    }
    // Ten requests; as many copies as the mirrored cluster's own breaker lets in, and no more.
    until("three copies", async || seen.load(SeqCst) == 3).await;
    assert_eq!((primary.seen().len(), seen.load(SeqCst)), (10, 3));

    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    edit_mirror(&cp, |mirror| mirror.cluster = "nowhere".into());
    let mesh = mesh_on(&cp).await;
    assert_eq!(Way::Channel.backend(&mesh, get("/")).await, "v1");
}

/// A body that goes on for as long as its sender lives.
fn growing() -> (
    mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>,
    impl http_body::Body<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
) {
    let (sender, receiver) = mpsc::unbounded_channel();
    (sender, StreamBody::new(UnboundedReceiverStream::new(receiver)))
}

fn data(text: &'static str) -> Result<Frame<Bytes>, BoxError> {
    Ok(Frame::data(Bytes::from_static(text.as_bytes())))
}

#[tokio::test]
async fn a_copy_is_sent_when_the_body_is_complete_and_not_if_that_never_happens() {
    let backends = echoes().await;
    let yaml = mirrored([backends[0].addr(), backends[1].addr()], &format!("mirror: {}", to("v2")), "{}");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().max_replay_bytes(8).build().await.unwrap();
    for (before, way) in Way::BOTH.into_iter().enumerate() {
        let (sender, body) = growing();
        let feed = async {
            for text in ["one", "two"] {
                sender.send(data(text)).unwrap();
                tokio::task::yield_now().await;
            }
            drop(sender);
        };
        let (response, ()) = tokio::join!(way.send_body(&mesh, get("/").method("POST"), body), feed);
        response.unwrap();
        copies(&backends[1], before + 1).await;
        assert_eq!(backends[1].last().body, "onetwo");
    }
    // More than is held: no copy. The request goes on.
    let (sender, body) = growing();
    for text in ["123456789", "0"] {
        sender.send(data(text)).unwrap();
    }
    drop(sender);
    let response = Way::Channel.send_body(&mesh, get("/long").method("POST"), body).await.unwrap();
    assert_eq!(joined(response.headers(), "x-backend"), "v1");
    assert_eq!(backends[0].last().body, "1234567890");
    // The caller goes away in the middle.
    let (sender, body) = growing();
    sender.send(data("half")).unwrap();
    let request = get("/half").method("POST").body(body).unwrap();
    let call = mesh.channel(TARGET).unwrap().call(request);
    let given_up = tokio::time::timeout(std::time::Duration::from_millis(50), call).await;
    assert!(given_up.is_err(), "answered before the body was complete");
    drop(sender);
    // One more, so that what may come has come.
    Way::Channel.send(&mesh, get("/last"), "").await.unwrap();
    copies(&backends[1], 3).await;
    assert_eq!(backends[1].last().path(), "/last");
}
