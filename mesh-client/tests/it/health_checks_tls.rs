//! Active health checks of endpoints that are spoken to over TLS: with the cluster's certificates, server name and protocols.

use crate::{
    health_checks::{answer, check, placed},
    mtls::{config, control_plane, mutual_greeter},
    support::{ANY, CLUSTER, World, edit_cluster, hello, until},
};
use envoy_types::{
    pb::{
        envoy::{
            config::core::v3::health_check::{
                GrpcHealthCheck, HealthChecker as Checker, HttpHealthCheck, TcpHealthCheck,
            },
            r#type::v3::CodecClientType,
        },
        google::protobuf::BoolValue,
    },
    util::pack_any,
};
use http::Request;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_tls::{Acceptor, Mode};
use mesh_xds::server::ResourceType;
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, Ordering::SeqCst},
    },
};
use tokio::{net::TcpListener, task::JoinSet};

/// What a checker said when it connected: the server name and the protocol.
type Met = Arc<Mutex<Vec<(Option<String>, Option<String>)>>>;

/// Where endpoints are asked over TLS how they are; 0: it hangs up.
async fn clinic(acceptor: Acceptor) -> (SocketAddr, Arc<AtomicU16>, Met, JoinSet<()>) {
    let listener = TcpListener::bind(ANY).await.unwrap();
    let (address, status, met) = (listener.local_addr().unwrap(), Arc::new(AtomicU16::new(200)), Met::default());
    let (now, meets, mut task) = (status.clone(), met.clone(), JoinSet::new());
    task.spawn(async move {
        let mut tasks = JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let (now, meets, acceptor) = (now.clone(), meets.clone(), acceptor.clone());
            tasks.spawn(async move {
                if now.load(SeqCst) == 0 {
                    return;
                }
                let Ok(tls) = acceptor.accept(tcp).await else { return };
                let alpn = tls.alpn().map(|alpn| String::from_utf8_lossy(alpn).into_owned());
                meets.lock().unwrap().push((tls.server_name().map(str::to_owned), alpn));
                let service = service_fn(move |request: Request<Incoming>| {
                    let grpc = request.headers().get("content-type").is_some_and(|value| value == "application/grpc");
                    let status = now.load(SeqCst);
                    async move { Ok::<_, Infallible>(answer(status, grpc)) }
                });
                // A connection that breaks is the client's business.
                let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tls), service).await;
            });
        }
    });
    (address, status, met, task)
}

#[tokio::test]
async fn checks_are_made_over_the_clusters_tls() {
    let http = |codec: CodecClientType| {
        let path = "/healthz".into();
        Checker::HttpHealthCheck(HttpHealthCheck { path, codec_client_type: codec.into(), ..Default::default() })
    };
    let checkers = [
        (http(CodecClientType::Http2), 503),
        (http(CodecClientType::Http1), 503),
        (Checker::GrpcHealthCheck(GrpcHealthCheck::default()), 503),
        (Checker::TcpHealthCheck(TcpHealthCheck::default()), 0),
    ];
    for (checker, ill) in checkers {
        let (cp, _dir) = control_plane().await;
        let (backend, acceptor) = mutual_greeter(&cp, Mode::Strict).await;
        let (address, status, met, _clinic) = clinic(acceptor).await;
        cp.apply(&config(&backend, "{tls: {mode: ISTIO_MUTUAL, sni: greeter.mesh}}")).await.unwrap();
        let placed = placed(&[backend.addr()], &[Some(address)]);
        cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(placed));
        let mut check = check(checker);
        check.reuse_connection = Some(BoolValue { value: false });
        let name = format!("{check:?}");
        edit_cluster(&cp, CLUSTER, |cluster| cluster.health_checks = vec![check]);
        let world = World::on(cp).await;
        until(&name, async || met.lock().unwrap().len() > 2).await;
        assert_eq!(met.lock().unwrap()[0], (Some("greeter.mesh".to_owned()), Some("h2".to_owned())), "{name}");
        assert!(!world.explain().contains("fails its health checks"), "{name}: {}", world.explain());
        hello(&world.channel).await.unwrap();
        status.store(ill, SeqCst);
        until(&name, async || world.explain().contains("fails its health checks")).await;
        status.store(200, SeqCst);
        until(&name, async || !world.explain().contains("fails its health checks")).await;
        hello(&world.channel).await.unwrap();
    }
}

#[tokio::test]
async fn an_endpoint_whose_certificate_is_another_ones_fails_its_checks() {
    let (cp, _dir) = control_plane().await;
    let (backend, acceptor) = mutual_greeter(&cp, Mode::Strict).await;
    let (address, _, _, _clinic) = clinic(acceptor).await;
    let other = "spiffe://cluster.local/ns/default/sa/other";
    let traffic = format!("{{tls: {{mode: ISTIO_MUTUAL, subjectAltNames: [\"{other}\"]}}}}");
    cp.apply(&config(&backend, &traffic)).await.unwrap();
    cp.cache().update(
        ResourceType::ClusterLoadAssignment,
        CLUSTER,
        pack_any(placed(&[backend.addr()], &[Some(address)])),
    );
    edit_cluster(&cp, CLUSTER, |cluster| {
        cluster.health_checks = vec![check(Checker::GrpcHealthCheck(GrpcHealthCheck::default()))];
    });
    let world = World::on(cp).await;
    until("it fails", async || world.explain().contains("fails its health checks")).await;
    assert!(world.explain().contains(other), "{}", world.explain());
}
