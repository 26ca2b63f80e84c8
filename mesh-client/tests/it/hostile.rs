//! Upstreams that mean harm: calls fail in time, with a cause, and memory stays flat.

use crate::support::{
    GUARD, HOUR, World, assert_says,
    echo::Way,
    raw_h2::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, INITIAL_WINDOW_SIZE, MAX_CONCURRENT_STREAMS,
        RST_STREAM, RawH2, SETTINGS, field, frame, grpc_head,
    },
    routes, service, to, until,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::sync::Semaphore;
use tonic::{Code, Status};

/// What this process may grow by in a test, other tests beside it included. Every flood would take several times as much, if it
/// were kept.
const GROWTH: usize = 96 << 20;
/// What a flood comes to, in bytes on the wire, unless it is ended.
pub(crate) const FLOOD: usize = 32 << 20;

/// Bytes of memory in use.
fn resident() -> usize {
    // Pages, the second number.
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<usize>().ok()).unwrap_or(0) * 4096
}

/// Memory has not grown.
pub(crate) struct Flat(usize);

impl Flat {
    pub(crate) fn begin() -> Self {
        Self(resident())
    }

    #[track_caller]
    pub(crate) fn check(&self) {
        let growth = resident().saturating_sub(self.0);
        assert!(growth < GROWTH, "{} MiB more", growth >> 20);
    }
}

/// The greeter on this server, without retries.
async fn world(server: &RawH2) -> World {
    let once = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    World::new(&(service(&[("v1", server.addr())]) + &once)).await
}

/// A call with a deadline, which must fail within the time.
async fn fails_within(world: &World, way: Way, limit: Duration) -> Status {
    let call = way.hello_with(&world.mesh, |r| r.set_timeout(limit));
    let status = tokio::time::timeout(GUARD, call).await.expect("it does not end").unwrap_err();
    until("all is given back", async || world.channel.load().is_idle()).await;
    status
}

/// A call with a short deadline, which is to hold.
async fn fails(world: &World, way: Way) -> Status {
    fails_within(world, way, Duration::from_millis(500)).await
}

/// Answers a request with these bytes, and then with more and more of the others, until the client ends it. How many it wrote, is
/// counted.
async fn flooding(begin: fn(u32) -> Vec<u8>, more: fn(u32) -> Vec<u8>) -> (RawH2, Arc<AtomicUsize>) {
    let written = Arc::<AtomicUsize>::default();
    let count = written.clone();
    let server = RawH2::start(move |mut peer| {
        let count = count.clone();
        async move {
            peer.greet(&[]).await?;
            let stream = peer.request().await?;
            peer.write(&begin(stream)).await?;
            let more = more(stream);
            let chunk = more.repeat((64 << 10) / more.len() + 1);
            while count.load(SeqCst) < FLOOD {
                peer.write(&chunk).await?;
                count.fetch_add(chunk.len(), SeqCst);
            }
            // And reads nothing.
            std::future::pending().await
        }
    })
    .await;
    (server, written)
}

/// A flood that holds a call to its deadline only.
async fn is_held_to_its_deadline(begin: fn(u32) -> Vec<u8>, more: fn(u32) -> Vec<u8>) {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let (server, _) = flooding(begin, more).await;
        let status = fails(&world(&server).await, way).await;
        assert!(matches!(status.code(), Code::DeadlineExceeded | Code::Unavailable | Code::Internal), "{status}");
        assert_says(status.message(), &[&server.addr().to_string()]);
    }
    flat.check();
}

#[tokio::test]
async fn a_loop_of_resets_and_goaways_fails_each_call_and_keeps_nothing() {
    let flat = Flat::begin();
    let server = RawH2::start(|mut peer| async move {
        peer.greet(&[]).await?;
        let stream = peer.request().await?;
        // Envoy's CVE-2023-35945: RST_STREAM, and GOAWAY right behind it.
        let cancel = frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes());
        let away = frame(GOAWAY, 0, 0, &[&stream.to_be_bytes()[..], &0_u32.to_be_bytes()].concat());
        peer.write(&[cancel, away].concat()).await?;
        peer.silence().await
    })
    .await;
    let world = world(&server).await;
    for call in 0..200 {
        let status = fails_within(&world, Way::BOTH[call % 2], HOUR).await;
        assert!(matches!(status.code(), Code::Cancelled | Code::Unavailable), "{status}");
        assert_says(status.message(), &[&server.addr().to_string()]);
    }
    assert!(server.accepted() >= 200, "each connection serves one call");
    until("no connection is left", async || world.channel.load().connections == 0).await;
    flat.check();
}

#[tokio::test]
async fn a_flood_of_continuations_ends_the_connection() {
    let flat = Flat::begin();
    let head = |stream| frame(HEADERS, 0, stream, &grpc_head());
    for way in Way::BOTH {
        let more = |stream| frame(CONTINUATION, 0, stream, &field("x-more", "of this"));
        let (server, written) = flooding(head, more).await;
        let status = fails_within(&world(&server).await, way, HOUR).await;
        assert_says(status.message(), &[&server.addr().to_string()]);
        assert!(written.load(SeqCst) < FLOOD, "all of it was taken");
    }
    flat.check();
}

#[tokio::test]
async fn empty_data_without_end_holds_a_call_to_its_deadline_only() {
    let head = |stream| frame(HEADERS, END_HEADERS, stream, &grpc_head());
    is_held_to_its_deadline(head, |stream| frame(DATA, 0, stream, &[])).await;
}

#[tokio::test]
async fn a_storm_of_interim_responses_holds_a_call_to_its_deadline_only() {
    let interim = |stream| frame(HEADERS, END_HEADERS, stream, &field(":status", "103"));
    is_held_to_its_deadline(interim, interim).await;
}

#[tokio::test]
async fn endless_settings_hold_a_call_to_its_deadline_only() {
    let churn = |_| {
        let window = |n: u32| frame(SETTINGS, 0, 0, &[&[0, 4][..], &(n * 1000).to_be_bytes()].concat());
        (0..64).flat_map(window).collect()
    };
    is_held_to_its_deadline(churn, churn).await;
}

#[tokio::test]
async fn a_server_that_allows_no_streams_holds_calls_to_their_deadline_until_it_does() {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let go = Arc::new(Semaphore::new(0));
        let gate = go.clone();
        let server = RawH2::start(move |mut peer| {
            let gate = gate.clone();
            async move {
                peer.greet(&[(MAX_CONCURRENT_STREAMS, 0)]).await?;
                gate.acquire().await.unwrap().forget();
                peer.settings(&[(MAX_CONCURRENT_STREAMS, 10)]).await?;
                let stream = peer.request().await?;
                // Lowered again while a stream is open: that one goes on.
                peer.settings(&[(MAX_CONCURRENT_STREAMS, 0)]).await?;
                peer.frame(HEADERS, END_HEADERS, stream, &grpc_head()).await?;
                peer.frame(DATA, 0, stream, &[0; 5]).await?;
                peer.frame(HEADERS, END_HEADERS | END_STREAM, stream, &field("grpc-status", "0")).await?;
                peer.silence().await
            }
        })
        .await;
        let world = world(&server).await;
        let status = fails(&world, way).await;
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["while waiting for a connection", &server.addr().to_string()]);
        let waiting = tokio::spawn({
            let mesh = world.mesh.clone();
            async move { way.hello_with(&mesh, |r| r.set_timeout(HOUR)).await }
        });
        until("a call waits", async || world.channel.load().pending == 1).await;
        go.add_permits(1);
        tokio::time::timeout(GUARD, waiting).await.expect("hangs").unwrap().unwrap();
        // What was lowered holds.
        let status = fails(&world, way).await;
        assert_says(status.message(), &["while waiting for a connection"]);
        assert_eq!(server.accepted(), 1);
    }
    flat.check();
}

#[tokio::test]
async fn a_window_of_zero_holds_a_call_to_its_deadline_only() {
    let flat = Flat::begin();
    let server = RawH2::start(|mut peer| async move {
        peer.greet(&[(INITIAL_WINDOW_SIZE, 0)]).await?;
        peer.silence().await
    })
    .await;
    let world = world(&server).await;
    for way in Way::BOTH {
        let status = fails(&world, way).await;
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["before the response began", &server.addr().to_string()]);
        assert_eq!(world.channel.load().streams, 0);
    }
    flat.check();
}

#[tokio::test]
async fn headers_that_never_end_hold_a_call_to_its_deadline_only() {
    let flat = Flat::begin();
    let server = RawH2::start(|mut peer| async move {
        peer.greet(&[]).await?;
        let stream = peer.request().await?;
        let head = grpc_head();
        peer.frame(HEADERS, 0, stream, &head[..1]).await?;
        for byte in &head[1..] {
            tokio::time::sleep(Duration::from_millis(100)).await;
            peer.frame(CONTINUATION, 0, stream, &[*byte]).await?;
        }
        peer.silence().await
    })
    .await;
    for way in Way::BOTH {
        let status = fails(&world(&server).await, way).await;
        assert_eq!(status.code(), Code::DeadlineExceeded);
        assert_says(status.message(), &["before the response began", &server.addr().to_string()]);
    }
    flat.check();
}

#[tokio::test]
async fn headers_that_are_too_large_are_refused() {
    let flat = Flat::begin();
    for way in Way::BOTH {
        let server = RawH2::start(|mut peer| async move {
            peer.greet(&[]).await?;
            loop {
                let stream = peer.request().await?;
                peer.frame(HEADERS, 0, stream, &grpc_head()).await?;
                // 160 KiB, in frames of 16 KiB at most.
                for n in 0..10 {
                    let field = field(&format!("x-large-{n}"), &"x".repeat(16_000));
                    let flags = if n == 9 { END_HEADERS } else { 0 };
                    peer.frame(CONTINUATION, flags, stream, &field).await?;
                }
            }
        })
        .await;
        let error = way.send(&world(&server).await.mesh, crate::support::echo::get("/x"), "").await.unwrap_err();
        assert_says(&error.to_string(), &["headers of more bytes than are taken", &server.addr().to_string()]);
    }
    flat.check();
}

#[tokio::test]
async fn data_behind_the_trailers_harms_no_other_call() {
    let flat = Flat::begin();
    let server = RawH2::start(|mut peer| async move {
        peer.greet(&[]).await?;
        loop {
            let stream = peer.request().await?;
            let head = frame(HEADERS, END_HEADERS, stream, &grpc_head());
            let trailers = frame(HEADERS, END_HEADERS | END_STREAM, stream, &field("grpc-status", "13"));
            peer.write(&[head, trailers, frame(DATA, END_STREAM, stream, &[0; 5])].concat()).await?;
        }
    })
    .await;
    let world = world(&server).await;
    for call in 0..20 {
        let status = fails_within(&world, Way::BOTH[call % 2], HOUR).await;
        assert!(matches!(status.code(), Code::Internal | Code::Unavailable), "{status}");
    }
    flat.check();
}
