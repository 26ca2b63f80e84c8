//! Failfast: calls wait for a connection so long and no longer, and those after them not at all.

use crate::support::{
    ANY, GUARD, TARGET, World, assert_says,
    code::{Local, fixed},
    echo::{Way, get},
    nobody, routes, rule, service, to, until,
};
use bytes::Bytes;
use mesh_client::{Mesh, MeshBuilder, policy::Policy};
use mesh_control::ControlPlane;
use std::time::Duration;
use tokio::{net::TcpListener, task::JoinSet};

#[tokio::test]
async fn calls_fail_at_once_after_one_has_waited_in_vain_until_an_endpoint_is_ready() {
    for way in Way::BOTH {
        let hole = TcpListener::bind(ANY).await.unwrap();
        // Refuses connections.
        let refusing = nobody();
        let closed = refusing.addr();
        let yaml = service(&[("hole", hole.local_addr().unwrap()), ("closed", closed)]);
        let yaml = yaml
            + &rule("{connectionPool: {tcp: {connectTimeout: 3000s}}}", &[])
            + &routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
        let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
        let mesh = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().failfast(Some(Duration::from_secs(1)));
        let mesh = mesh.build().await.unwrap();
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(GUARD).await.unwrap();
        let world = World { cp, mesh, channel };

        let error = way.send(&world.mesh, get("/x"), "").await.unwrap_err();
        assert_says(&error.to_string(), &["no endpoint was ready within 1s (failfast)"]);
        // Then the other one is tried.
        until("the other one has refused", async || {
            let error = way.send(&world.mesh, get("/x"), "").await.unwrap_err();
            error.to_string().contains("Connection refused")
        })
        .await;
        let refused = format!("connect to {closed}");
        // Each would wait as long.
        let calls = async {
            for _ in 0..50 {
                let error = way.send(&world.mesh, get("/x"), "").await.unwrap_err();
                assert_says(&error.to_string(), &["no endpoint is ready", "(failfast)", &refused]);
            }
        };
        tokio::time::timeout(GUARD, calls).await.expect("calls wait");
        assert_says(&world.explain(), &["fails fast"]);
        assert!(world.channel.load().is_idle());

        // The endpoint that said nothing answers after all.
        let mut server = JoinSet::new();
        server.spawn(async move {
            let (tcp, _) = hole.accept().await.unwrap();
            let mut h2: h2::server::Connection<_, Bytes> = h2::server::handshake(tcp).await.unwrap();
            while let Some(Ok((_, mut respond))) = h2.accept().await {
                respond.send_response(http::Response::new(()), true).unwrap();
            }
        });
        until("calls succeed again", async || way.send(&world.mesh, get("/x"), "").await.is_ok()).await;
        assert!(!world.explain().contains("fails fast"));
    }
}

#[tokio::test]
async fn a_wait_for_a_stream_has_the_same_limit() {
    for way in Way::BOTH {
        // One stream, which is never answered.
        let held = std::sync::Mutex::new(Vec::new());
        let server = crate::support::H2Server::limited(1, move |served| {
            held.lock().unwrap().push(served);
            crate::support::Then::GoOn
        })
        .await;
        let limit = |mesh: MeshBuilder| mesh.failfast(Some(Duration::from_millis(50)));
        let Local { mesh, channel } = Local::with(&fixed(&[server.addr()]), Policy::default(), limit).await;
        let first = tokio::spawn({
            let mesh = mesh.clone();
            async move { way.hello(&mesh).await }
        });
        until("the stream is taken", async || channel.load().streams == 1).await;
        let status = way.prompt(&mesh).await.unwrap_err();
        assert_says(status.message(), &["no endpoint was ready within 50ms (failfast)", &server.addr().to_string()]);
        first.abort();
        until("all is given back", async || channel.load().is_idle()).await;
    }
}
