//! A caller that gives up at any await: every permit, counter and share of the budget comes back, at once.

use crate::support::{
    CLUSTER, GUARD, H2Server, HOUR, TARGET, Then, World,
    code::Local,
    echo::{Way, get},
    edit, greeter, http_backend, routes, rule, service, to, until,
};
use envoy_types::pb::{
    envoy::{config::route::v3::RouteConfiguration, extensions::filters::http::fault::v3::HttpFault},
    google::protobuf::UInt32Value,
};
use examples::greeter::HelloRequest;
use futures::StreamExt;
use mesh_client::{ChannelLoad, Explain, Mesh, MeshChannel, policy::Policy};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use prost::Message;
use std::{future::poll_fn, pin::pin, sync::Arc, task::Poll, time::Duration};
use tokio::net::TcpListener;

/// Polls `future` `polls` times, whether it was woken or not, with a turn for all other tasks between; then drops it. True if it
/// was done before.
async fn drop_after<F: Future>(polls: usize, future: F) -> bool {
    let mut future = pin!(future);
    for _ in 0..polls {
        if poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx).is_ready())).await {
            return true;
        }
        tokio::task::yield_now().await;
    }
    false
}

/// Polls `future`, dropped when `reached` holds of the channel's load. It must not end before.
async fn drop_when(channel: &MeshChannel, future: impl Future, reached: impl Fn(ChannelLoad) -> bool) {
    tokio::select! {
        biased;
        () = until("the call is where it is to be dropped", async || reached(channel.load())) => {}
        _ = future => panic!("the call ended"),
    }
}

#[track_caller]
fn assert_idle(channel: &MeshChannel, when: &str) {
    assert!(channel.load().is_idle(), "dropped {when}: {:?}", channel.load());
}

/// Drops calls after every number of polls up to `most`.
async fn drop_everywhere(way: Way, mesh: &Mesh, channel: &MeshChannel, most: usize, when: &str) {
    for polls in 1..=most {
        drop_after(polls, way.hello_with(mesh, |r| r.set_timeout(HOUR))).await;
        assert_idle(channel, &format!("{when}, after {polls} polls, {way:?}"));
    }
}

#[tokio::test]
async fn while_it_waits_for_the_configuration() {
    for way in Way::BOTH {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bootstrap = mesh_control::bootstrap::Bootstrap::new(silent.local_addr().unwrap().to_string()).to_string();
        let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().build().await.unwrap();
        drop_everywhere(way, &mesh, &mesh.channel(TARGET).unwrap(), 10, "without a configuration").await;
    }
}

#[tokio::test]
async fn while_it_connects() {
    for way in Way::BOTH {
        let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let Local { mesh, channel } = Local::new(&[hole.local_addr().unwrap()], Policy::default()).await;
        drop_everywhere(way, &mesh, &channel, 10, "connecting").await;
        let in_line = |load: ChannelLoad| (load.requests, load.pending, load.attempts) == (1, 1, 1);
        drop_when(&channel, way.hello_with(&mesh, |r| r.set_timeout(HOUR)), in_line).await;
        assert_idle(&channel, "connecting");
    }
}

#[tokio::test]
async fn while_it_is_delayed_by_a_fault() {
    let backend = greeter("one").await;
    let delay = "fault: {delay: {percentage: {value: 100}, fixedDelay: 3000s}}";
    let yaml =
        service(&[("one", backend.addr())]) + &routes(&format!("[{{route: [{{destination: {}}}], {delay}}}]", to("")));
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    // One at a time is delayed, all others pass.
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        for any in config.virtual_hosts[0].routes[0].typed_per_filter_config.values_mut() {
            let mut fault = HttpFault::decode(&*any.value).unwrap();
            fault.max_active_faults = Some(UInt32Value { value: 1 });
            any.value = fault.encode_to_vec();
        }
    });
    let World { mesh, channel, cp: _cp } = World::on(cp).await;
    for way in Way::BOTH {
        let send = |explain: &Explain| {
            let request = get("/helloworld.Greeter/SayHello").method("POST").header("content-type", "application/grpc");
            let (request, mesh) = (request.extension(explain.clone()), mesh.clone());
            // One empty message.
            async move { way.send(&mesh, request, "\0\0\0\0\0").await.unwrap().status() }
        };
        let delayed = |explain: &Explain| explain.explanation().get("fault").is_some_and(|f| f.contains("delayed"));
        for again in 0..3 {
            let explain = Explain::default();
            let mut call = Box::pin(send(&explain));
            tokio::select! {
                biased;
                () = until("the call is delayed", async || delayed(&explain)) => {}
                status = &mut call => panic!("the call ended with {status}, {way:?}, {again}: {explain:?}"),
            }
            let before = backend.state().calls();
            let second = Explain::default();
            assert_eq!(send(&second).await, 200);
            assert!(!delayed(&second) && backend.state().calls() == before + 1, "one is delayed at a time");
            drop(call);
            assert_idle(&channel, "in an injected delay");
            assert_eq!(backend.state().calls(), before + 1, "nothing was sent");
        }
    }
}

#[tokio::test]
async fn while_it_waits_for_the_response() {
    for way in Way::BOTH {
        let backend = greeter("slow").await;
        backend.state().set_delay(HOUR);
        let Local { mesh, channel } = Local::new(&[backend.addr()], Policy::default()).await;
        drop_everywhere(way, &mesh, &channel, 30, "waiting for the response").await;
        let in_flight = |load: ChannelLoad| (load.requests, load.pending, load.attempts, load.streams) == (1, 0, 1, 1);
        drop_when(&channel, way.hello_with(&mesh, |r| r.set_timeout(HOUR)), in_flight).await;
        assert_idle(&channel, "waiting for the response");
        until("the server was told", async || backend.state().in_flight() == 0).await;
        backend.state().set_delay(Duration::ZERO);
        way.hello(&mesh).await.unwrap();
    }
}

#[tokio::test]
async fn while_it_backs_off() {
    for way in Way::BOTH {
        let backend = greeter("failing").await;
        backend.state().set_unavailable(true);
        let retries = format!(
            "[{{route: [{{destination: {}}}], retries: {{attempts: 3, retryOn: unavailable, backoff: 3000s}}}}]",
            to("")
        );
        let world = World::new(&(service(&[("one", backend.addr())]) + &routes(&retries))).await;
        let channel = &world.channel;
        drop_everywhere(way, &world.mesh, channel, 30, "backing off").await;
        drop_when(channel, way.hello(&world.mesh), |load| load.retries == 1).await;
        assert_idle(channel, "backing off");
    }
}

#[tokio::test]
async fn while_it_sends_its_body() {
    for way in Way::BOTH {
        // The window of the server's stream is full: it reads nothing.
        let server = H2Server::start(|served| {
            std::mem::forget(served);
            Then::GoOn
        })
        .await;
        let Local { mesh, channel } = Local::new(&[server.addr()], Policy::default()).await;
        let call = || {
            let request = HelloRequest { name: "x".repeat(1 << 20), count: 0 };
            let mut client = way.client(&mesh);
            async move { client.say_hello(request).await }
        };
        for polls in 1..=20 {
            assert!(!drop_after(polls, call()).await);
            assert_idle(&channel, &format!("sending, after {polls} polls"));
        }
        drop_when(&channel, call(), |load| load.streams == 1).await;
        assert_idle(&channel, "sending");
    }
}

#[tokio::test]
async fn while_the_body_of_the_response_is_read() {
    for way in Way::BOTH {
        let backend = greeter("one").await;
        let Local { mesh, channel } = Local::new(&[backend.addr()], Policy::default()).await;
        for messages in [0, 1, 2, 7, 1000] {
            let request = HelloRequest { name: "all".to_owned(), count: u32::MAX };
            let replies = way.client(&mesh).say_hellos(request).await.unwrap().into_inner();
            let load = channel.load();
            assert_eq!((load.requests, load.attempts, load.streams), (1, 1, 1), "{load:?}");
            let mut some = replies.take(messages);
            while let Some(reply) = some.next().await {
                reply.unwrap();
            }
            drop(some);
            assert_idle(&channel, &format!("after {messages} messages"));
        }
        until("the server was told", async || backend.state().in_flight() == 0).await;
        assert_eq!(backend.connections(), 1, "the connection is kept");
    }
}

#[tokio::test]
async fn over_http_1_1() {
    for way in Way::BOTH {
        let backend = http_backend("slow").await;
        backend.state().set_delay(HOUR);
        let yaml = service(&[("one", backend.addr())]).replace("GRPC", "HTTP");
        let world = World::new(&yaml).await;
        let channel = &world.channel;
        let call = || way.send(&world.mesh, get("/"), "");
        for polls in 1..=30 {
            assert!(!drop_after(polls, call()).await);
            assert_idle(channel, &format!("HTTP/1.1, after {polls} polls"));
        }
        drop_when(channel, call(), |load| load.streams == 1).await;
        assert_idle(channel, "HTTP/1.1");
        // What is left are connections that cannot be used again.
        until("they are closed", async || channel.load().connections == 0 && backend.state().in_flight() == 0).await;
        backend.state().set_delay(Duration::ZERO);
        assert_eq!(call().await.unwrap().status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_times_at_random() {
    let (one, two) = (greeter("one").await, greeter("two").await);
    one.state().set_fail_rate(0.3);
    two.state().set_delay(Duration::from_millis(2));
    let limits = "{connectionPool: {http: {http2MaxRequests: 64}}}";
    let retries = format!(
        "[{{route: [{{destination: {}}}], retries: {{attempts: 3, retryOn: unavailable, backoff: 2ms}}}}]",
        to("")
    );
    let yaml = service(&[("one", one.addr()), ("two", two.addr())]) + &routes(&retries) + &rule(limits, &[]);
    let world = Arc::new(World::new(&yaml).await);
    let workers: Vec<_> = (0..16)
        .map(|worker| {
            let world = world.clone();
            tokio::spawn(async move {
                for _ in 0..150 {
                    let patience = Duration::from_micros(fastrand::u64(0..8000));
                    // Cancelled or not, and however it ended: only what is left counts.
                    let _ = tokio::time::timeout(patience, Way::BOTH[worker % 2].hello(&world.mesh)).await;
                }
            })
        })
        .collect();
    for worker in workers {
        tokio::time::timeout(GUARD, worker).await.expect("hangs").unwrap();
    }
    assert_idle(&world.channel, "at random");
    Way::Channel.hello(&world.mesh).await.unwrap();
}
