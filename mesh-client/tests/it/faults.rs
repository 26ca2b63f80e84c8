//! Endpoints that misbehave: refused connections, black holes, cut responses, GOAWAY and REFUSED_STREAM storms.

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, Then, World, assert_says, code::Local, echo::Way, greeter, hello,
    hello_with, mesh_on, prompt_hello, routes, service, to, until,
};
use examples::greeter::HelloRequest;
use futures::{StreamExt, stream};
use h2::Reason;
use mesh_client::{Keepalive, Mesh, policy::Policy};
use mesh_control::ControlPlane;
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpListener, sync::Notify};
use tonic::Code;

/// A retry policy for what fails without a response.
fn retried(conditions: &str) -> String {
    routes(&format!(
        "[{{route: [{{destination: {}}}], retries: {{attempts: 3, retryOn: \"{conditions}\", backoff: 1ms}}}}]",
        to("")
    ))
}

/// Calls with their number in the metadata, `concurrency` at a time, by turns either way, without a retry policy; all must succeed.
async fn storm(server: &H2Server, calls: usize, concurrency: usize) {
    let once = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let world = &World::new(&(service(&[("one", server.addr())]) + &once)).await;
    let all = stream::iter(0..calls).map(|n| async move {
        let call = Way::BOTH[n % 2]
            .hello_with(&world.mesh, |r| drop(r.metadata_mut().insert("x-call", n.to_string().parse().unwrap())));
        call.await.unwrap_or_else(|status| panic!("call {n}: {status}"));
    });
    let all = all.buffer_unordered(concurrency).collect::<Vec<_>>();
    tokio::time::timeout(GUARD, all).await.expect("a call hangs");
    assert!(world.channel.load().is_idle(), "{:?}", world.channel.load());
}

/// How a call with an hour's deadline ends, which is far sooner.

#[tokio::test]
async fn endpoints_that_refuse_connections_fail_calls_at_once() {
    let (mut one, mut two) = (greeter("one").await, greeter("two").await);
    one.kill().await;
    two.kill().await;
    let world = World::new(&service(&[("one", one.addr()), ("two", two.addr())])).await;
    for way in Way::BOTH {
        let status = way.prompt(&world.mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[TARGET, CLUSTER, "127.0.0.1:", "refused"]);
    }
    assert!(world.channel.load().is_idle());
    one.restart().await.unwrap();
    until("the endpoint that came back serves", async || hello(&world.channel).await.is_ok()).await;
}

#[tokio::test]
async fn a_black_hole_holds_a_call_until_its_deadline_and_no_longer() {
    for way in Way::BOTH {
        let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let Local { mesh, channel } = Local::new(&[hole.local_addr().unwrap()], Policy::default()).await;
        let call = way.hello_with(&mesh, |r| r.set_timeout(Duration::from_millis(100)));
        let status = tokio::time::timeout(GUARD, call).await.expect("hangs").unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(
            status.message(),
            &[
                "deadline of 100ms exceeded while waiting for a connection",
                "grpc-timeout",
                &hole.local_addr().unwrap().to_string(),
            ],
        );
        assert!(channel.load().is_idle(), "{:?}", channel.load());
    }
}

#[tokio::test]
async fn a_black_hole_is_given_up_after_the_connect_timeout() {
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = hole.local_addr().unwrap();
    let rule = crate::support::rule("{connectionPool: {tcp: {connectTimeout: 50ms}}}", &[]);
    let world = World::new(&(service(&[("hole", addr)]) + &rule)).await;
    for way in Way::BOTH {
        let status = way.prompt(&world.mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &[CLUSTER, &addr.to_string(), "HTTP handshake took longer than 50ms"]);
    }
}

#[tokio::test]
async fn keepalive_notices_a_peer_that_went_silent() {
    let silent = H2Server::start(|_| Then::Freeze).await;
    let good = greeter("good").await;
    let keepalive =
        Keepalive { interval: Duration::from_secs(1), timeout: Duration::from_millis(200), ..Keepalive::default() };
    let mesh = Mesh::builder().keepalive(Some(keepalive)).build().await.unwrap();
    let channel = mesh.fixed_channel(&[silent.addr()]).unwrap();
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    assert_says(status.message(), &["keepalive PING", &silent.addr().to_string()]);
    assert!(channel.load().is_idle());

    let yaml = service(&[("silent", silent.addr()), ("good", good.addr())]) + &retried("unavailable,reset");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().keepalive(Some(keepalive));
    let mesh = builder.build().await.unwrap();
    let _channel = mesh.channel(TARGET).unwrap();
    for call in 0..8 {
        assert_eq!(Way::BOTH[call % 2].prompt(&mesh).await.unwrap().backend, "good");
    }
}

#[tokio::test]
async fn without_keepalive_a_silent_peer_costs_the_deadline() {
    let silent = H2Server::start(|_| Then::Freeze).await;
    let mesh = Mesh::builder().keepalive(None).build().await.unwrap();
    let channel = mesh.fixed_channel(&[silent.addr()]).unwrap();
    let status = hello_with(&channel, |r| r.set_timeout(Duration::from_millis(300))).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert_says(status.message(), &["deadline of 300ms exceeded before the response began"]);
    assert!(channel.load().is_idle());
}

#[tokio::test]
async fn a_response_that_is_reset_fails_through_its_body() {
    for way in Way::BOTH {
        let reset = Arc::new(Notify::new());
        let now = reset.clone();
        let server = H2Server::start(move |mut served| {
            let now = now.clone();
            tokio::spawn(async move {
                let mut body = served.begin();
                now.notified().await;
                body.send_reset(Reason::INTERNAL_ERROR);
            });
            Then::GoOn
        })
        .await;
        let Local { mesh, channel } = Local::new(&[server.addr()], Policy::default()).await;
        let request = HelloRequest { name: "all".to_owned(), count: 2 };
        let mut replies = way.client(&mesh).say_hellos(request).await.unwrap().into_inner();
        replies.next().await.unwrap().unwrap();
        reset.notify_one();
        let status = replies.next().await.unwrap().unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert_says(status.message(), &["the response was cut off: stream reset", &server.addr().to_string()]);
        assert!(channel.load().is_idle(), "{:?}", channel.load());
    }
}

#[tokio::test]
async fn a_connection_that_is_cut_in_a_response_fails_through_its_body() {
    for way in Way::BOTH {
        let mut backend = greeter("one").await;
        let Local { mesh, channel } = Local::new(&[backend.addr()], Policy::default()).await;
        let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
        let mut replies = way.client(&mesh).say_hellos(request).await.unwrap().into_inner();
        assert_eq!(replies.next().await.unwrap().unwrap().backend, "one");
        let load = channel.load();
        assert_eq!((load.requests, load.attempts, load.streams, load.connections), (1, 1, 1, 1));
        backend.kill().await;
        let rest = async {
            loop {
                if let Err(status) = replies.next().await.expect("an error comes before the end") {
                    return status;
                }
            }
        };
        let status = tokio::time::timeout(GUARD, rest).await.expect("hangs");
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &["the response was cut off", &backend.addr().to_string()]);
        assert!(channel.load().is_idle(), "{:?}", channel.load());
        until("the connection is gone", async || channel.load().connections == 0).await;
    }
}

#[tokio::test]
async fn a_goaway_storm_fails_no_call() {
    let connections = Arc::new(AtomicU32::new(0));
    let seen = connections.clone();
    let server = H2Server::start(move |served| {
        let number = served.number;
        seen.fetch_max(u32::try_from(served.connection).unwrap(), Ordering::Relaxed);
        served.ok();
        if number % 3 == 2 { Then::GoAway } else { Then::GoOn }
    })
    .await;
    storm(&server, 300, 8).await;
    assert!(connections.load(Ordering::Relaxed) >= 10, "{connections:?}");
}

#[tokio::test]
async fn refused_streams_are_sent_again_without_a_policy() {
    let refused = Mutex::new(HashSet::new());
    let server = H2Server::start(move |mut served| {
        let call = served.request.headers()["x-call"].clone();
        if refused.lock().unwrap().insert(call) {
            served.respond.send_reset(Reason::REFUSED_STREAM);
        } else {
            served.ok();
        }
        Then::GoOn
    })
    .await;
    storm(&server, 200, 8).await;
}

#[tokio::test]
async fn a_server_that_refuses_every_stream_is_named() {
    for way in Way::BOTH {
        let attempts = Arc::new(AtomicU32::new(0));
        let seen = attempts.clone();
        let server = H2Server::start(move |mut served| {
            seen.fetch_add(1, Ordering::Relaxed);
            served.respond.send_reset(Reason::REFUSED_STREAM);
            Then::GoOn
        })
        .await;
        let Local { mesh, channel } = Local::new(&[server.addr()], Policy::default()).await;
        let status = way.prompt(&mesh).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_says(status.message(), &["peer refused the stream", &server.addr().to_string(), "attempt 2"]);
        assert_eq!(attempts.load(Ordering::Relaxed), 2, "one transparent retry, no more (gRFC A6)");
        assert!(channel.load().is_idle());
    }
}

#[tokio::test]
async fn a_connection_cut_before_the_response_is_retried_by_policy_only() {
    for way in Way::BOTH {
        // `unavailable` is what gRPC calls it, `reset` what Envoy does.
        for (conditions, succeeds) in [("unavailable,reset", true), ("internal", false)] {
            let server = H2Server::start(|served| {
                if served.connection == 0 {
                    return Then::Cut;
                }
                served.ok();
                Then::GoOn
            })
            .await;
            let world = World::new(&(service(&[("one", server.addr())]) + &retried(conditions))).await;
            match way.prompt(&world.mesh).await {
                Ok(_) => assert!(succeeds, "{way:?}"),
                Err(status) => assert_eq!((status.code(), succeeds), (Code::Unavailable, false), "{way:?}: {status}"),
            }
        }
    }
}

#[tokio::test]
async fn a_body_over_the_replay_cap_goes_on_and_is_not_retried() {
    let backend = greeter("one").await;
    let yaml = service(&[("one", backend.addr())]) + &retried("unavailable");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().max_replay_bytes(1024);
    let mesh = builder.build().await.unwrap();
    let channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        backend.state().set_unavailable(false);
        let call = async |length: usize| {
            let before = backend.state().calls();
            let request = HelloRequest { name: "x".repeat(length), count: 0 };
            let result = way.client(&mesh).say_hello(request).await;
            (result.map(|r| r.into_inner().message.len()), backend.state().calls() - before)
        };
        assert_eq!(call(100_000).await.0.unwrap(), 100_006, "a large body passes");
        backend.state().set_unavailable(true);
        let (small, attempts) = call(512).await;
        assert_eq!((small.unwrap_err().code(), attempts), (Code::Unavailable, 4));
        let (large, attempts) = call(4096).await;
        assert_eq!((large.unwrap_err().code(), attempts), (Code::Unavailable, 1));
        assert!(channel.load().is_idle());
    }
}

#[tokio::test]
async fn removed_endpoints_are_drained_without_a_failed_call() {
    for way in Way::BOTH {
        let (old, new) = (greeter("old").await, greeter("new").await);
        let cp = ControlPlane::builder().yaml(service(&[("old", old.addr())])).start().await.unwrap();
        let mesh = mesh_on(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        old.state().set_delay(Duration::from_millis(500));
        let slow: Vec<_> = (0..10)
            .map(|_| {
                let mesh = mesh.clone();
                tokio::spawn(async move { way.hello_with(&mesh, |r| r.set_timeout(HOUR)).await })
            })
            .collect();
        until("the calls are in flight", async || old.state().in_flight() == 10).await;
        cp.apply(&service(&[("new", new.addr())])).await.unwrap();
        until("new calls go to the new endpoint", async || {
            new.state().calls() > 0 || way.hello_with(&mesh, |r| r.set_timeout(Duration::from_millis(50))).await.is_ok()
        })
        .await;
        for call in slow {
            assert_eq!(call.await.unwrap().unwrap().backend, "old");
        }
        assert!(channel.load().is_idle());
        until("only the connection to the new endpoint is left", async || channel.load().connections == 1).await;
        assert_eq!(way.hello(&mesh).await.unwrap().backend, "new");
    }
}
