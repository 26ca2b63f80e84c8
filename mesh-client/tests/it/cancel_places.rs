//! A caller that gives up in places of their own: at the rate limit service, beside a mirror, in the line for a stream.

use crate::{
    filters_service::{config, limited},
    support::{
        GUARD, H2Server, HOUR, Served, TARGET, World,
        code::Local,
        echo::{Echo, Way, get},
        mesh_on, routes, rule, service, to, until,
    },
};
use envoy_types::pb::{
    envoy::extensions::filters::http::ratelimit::v3::RateLimit, google::protobuf::Duration as ProtoDuration,
};
use h2::Reason;
use mesh_client::policy::Policy;
use std::{
    future::poll_fn,
    sync::{Arc, Mutex},
};

/// Calls until `reached`, and drops the call. It must not end before.
async fn drop_when(what: &str, call: impl Future, reached: impl AsyncFnMut() -> bool) {
    tokio::select! {
        biased;
        () = until(what, reached) => {}
        _ = call => panic!("the call ended before: {what}"),
    }
}

/// The only request that is held was cancelled; takes it out.
async fn assert_cancelled(held: &Arc<Mutex<Vec<Served>>>) {
    let mut served = held.lock().unwrap().pop().unwrap();
    assert!(held.lock().unwrap().is_empty());
    let told = poll_fn(|cx| served.respond.poll_reset(cx));
    assert_eq!(tokio::time::timeout(GUARD, told).await.expect("never told").unwrap(), Reason::CANCEL);
}

#[tokio::test]
async fn while_the_rate_limit_service_is_asked() {
    let backend = Echo::start("v1").await;
    let (rls, held) = H2Server::holding(u32::MAX).await;
    let timeout = Some(ProtoDuration { seconds: 3600, nanos: 0 });
    let cp = limited(&backend, rls.addr(), &RateLimit { timeout, ..config() }).await;
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    channel.ready(GUARD).await.unwrap();
    for way in Way::BOTH {
        for _ in 0..3 {
            let call = way.send(&mesh, get("/").header("x-plan", "a"), "");
            drop_when("the service is asked", call, async || held.lock().unwrap().len() == 1).await;
            assert!(channel.load().is_idle(), "{way:?}: {:?}", channel.load());
            assert_cancelled(&held).await;
        }
        // What asks nothing goes on.
        assert_eq!(way.backend(&mesh, get("/free")).await, "v1");
    }
    assert_eq!(backend.seen().len(), 2, "nothing of the others was sent");
}

#[tokio::test]
async fn while_a_copy_is_on_its_way_too() {
    let (primary, held) = H2Server::holding(u32::MAX).await;
    let mirror = Echo::start("v2").await;
    let http = format!("[{{route: [{{destination: {}}}], mirror: {}}}]", to("v1"), to("v2"));
    let limits = "{connectionPool: {http: {http2MaxRequests: 1}}}";
    let yaml =
        service(&[("v1", primary.addr()), ("v2", mirror.addr())]) + &routes(&http) + &rule(limits, &["v1", "v2"]);
    let world = World::new(&yaml).await;
    let mut copies = 0;
    for way in Way::BOTH {
        // One request at once: each could not go on if one before had kept its place.
        for _ in 0..3 {
            copies += 1;
            let call = way.send(&world.mesh, get("/").method("POST"), "hello");
            let both = async || held.lock().unwrap().len() == 1 && mirror.seen().len() == copies;
            drop_when("both have it", call, both).await;
            assert_cancelled(&held).await;
            until("nothing is left", async || world.channel.load().is_idle()).await;
        }
    }
    assert_eq!(mirror.last().body, "hello");
}

#[tokio::test]
async fn while_all_streams_of_the_connection_are_taken() {
    for way in Way::BOTH {
        let (server, held) = H2Server::holding(1).await;
        let Local { mesh, channel } = Local::new(&[server.addr()], Policy::default()).await;
        let first = tokio::spawn({
            let mesh = mesh.clone();
            async move { way.hello_with(&mesh, |r| r.set_timeout(HOUR)).await }
        });
        until("the only stream is taken", async || held.lock().unwrap().len() == 1).await;
        let before = channel.load();
        for _ in 0..10 {
            let call = way.hello_with(&mesh, |r| r.set_timeout(HOUR));
            drop_when("a call waits in the line", call, async || channel.load().pending == before.pending + 1).await;
            assert_eq!(channel.load(), before, "the one in flight is all there is");
        }
        // Nobody is left in the line before the next.
        let next = tokio::spawn({
            let mesh = mesh.clone();
            async move { way.hello(&mesh).await }
        });
        until("the next one waits", async || channel.load().pending == before.pending + 1).await;
        for call in [first, next] {
            until("it has the stream", async || held.lock().unwrap().len() == 1).await;
            held.lock().unwrap().pop().unwrap().ok();
            tokio::time::timeout(GUARD, call).await.expect("hangs").unwrap().unwrap();
        }
        until("nothing is left", async || channel.load().is_idle()).await;
        assert_eq!(server.accepted(), 1);
    }
}
