//! Active health checks: an endpoint that fails them gets no requests, and comes back.

use crate::support::{
    ANY, CLUSTER, World, assert_says, assignment, echo::Way, edit_cluster, greeter, hello, http_backend, routes,
    service, to, until,
};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    HealthCheck as Proto, HealthStatus,
                    health_check::{
                        GrpcHealthCheck, HealthChecker as Checker, HttpHealthCheck, Payload, TcpHealthCheck,
                        payload::Payload as Content,
                    },
                },
                endpoint::v3::{ClusterLoadAssignment, endpoint::HealthCheckConfig, lb_endpoint::HostIdentifier},
            },
            r#type::v3::{CodecClientType, Int64Range},
        },
        google::protobuf::{Duration as ProtoDuration, UInt32Value},
    },
    util::pack_any,
};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_client::Mesh;
use mesh_control::ControlPlane;
use mesh_xds::{
    resource::{Cluster, HealthCheck},
    server::ResourceType,
    source::Policy,
};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU16, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    task::JoinSet,
};

/// Where an endpoint is asked how it is, on a port of its own: HTTP/1.1, HTTP/2 and gRPC. Counts what it is asked and by whom.
struct Clinic {
    addr: SocketAddr,
    status: Arc<AtomicU16>,
    asked: Arc<AtomicUsize>,
    connections: Arc<AtomicUsize>,
    last: Arc<Mutex<Option<http::request::Parts>>>,
    _task: JoinSet<()>,
}

impl Clinic {
    async fn start() -> Self {
        let listener = TcpListener::bind(ANY).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (status, asked) = (Arc::new(AtomicU16::new(200)), Arc::<AtomicUsize>::default());
        let (connections, last) =
            (Arc::<AtomicUsize>::default(), Arc::<Mutex<Option<http::request::Parts>>>::default());
        let mut task = JoinSet::new();
        let (now, count, seen, saw) = (status.clone(), asked.clone(), connections.clone(), last.clone());
        task.spawn(async move {
            let mut tasks = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                seen.fetch_add(1, SeqCst);
                let (now, count, saw) = (now.clone(), count.clone(), saw.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    count.fetch_add(1, SeqCst);
                    let grpc = request.headers().get("content-type").is_some_and(|value| value == "application/grpc");
                    *saw.lock().unwrap() = Some(request.into_parts().0);
                    let status = now.load(SeqCst);
                    async move { Ok::<_, Infallible>(answer(status, grpc)) }
                });
                tasks.spawn(async move {
                    // A connection that breaks is the client's business.
                    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tcp), service).await;
                });
            }
        });
        Self { addr, status, asked, connections, last, _task: task }
    }

    /// What it answers from now on: an HTTP status; of gRPC 200 is SERVING, 503 NOT_SERVING, any other UNIMPLEMENTED.
    fn set(&self, status: u16) {
        self.status.store(status, SeqCst);
    }

    fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    async fn asked_again(&self) {
        let before = self.asked();
        until("it is asked again", async || self.asked() >= before + 2).await;
    }
}

pub(crate) fn answer(status: u16, grpc: bool) -> Response<Full<Bytes>> {
    let response = Response::builder();
    if !grpc {
        let text = if status == 200 { "all is well" } else { "no" };
        return response.status(StatusCode::from_u16(status).unwrap()).body(Full::from(text)).unwrap();
    }
    let message: &[u8] = match status {
        200 => &[0, 0, 0, 0, 2, 8, 1],
        503 => &[0, 0, 0, 0, 2, 8, 2],
        _ => &[],
    };
    // As headers: hyper's simple bodies have no trailers, and a client has to take the status from either.
    let code = if message.is_empty() { "12" } else { "0" };
    let response = response.header("content-type", "application/grpc").header("grpc-status", code);
    response.body(Full::from(message)).unwrap()
}

fn millis(millis: i32) -> Option<ProtoDuration> {
    Some(ProtoDuration { seconds: 0, nanos: millis * 1_000_000 })
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// A check every 20 ms, with traffic and without.
pub(crate) fn check(checker: Checker) -> Proto {
    Proto {
        timeout: Some(ProtoDuration { seconds: 5, nanos: 0 }),
        interval: millis(20),
        no_traffic_interval: millis(20),
        unhealthy_threshold: number(2),
        healthy_threshold: number(2),
        health_checker: Some(checker),
        ..Proto::default()
    }
}

/// The greeter without retries, checked so: each endpoint at a place of its own, if one is given.
async fn checked(endpoints: &[SocketAddr], at: &[Option<SocketAddr>], check: Proto) -> ControlPlane {
    let named: Vec<_> = endpoints.iter().map(|address| ("v1", *address)).collect();
    let yaml =
        service(&named) + &routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(placed(endpoints, at)));
    edit_cluster(&cp, CLUSTER, |cluster| cluster.health_checks = vec![check]);
    cp
}

pub(crate) fn placed(endpoints: &[SocketAddr], at: &[Option<SocketAddr>]) -> ClusterLoadAssignment {
    let mut assignment = assignment(&[endpoints], HealthStatus::Unknown);
    for (endpoint, at) in assignment.endpoints[0].lb_endpoints.iter_mut().zip(at) {
        let Some(HostIdentifier::Endpoint(endpoint)) = &mut endpoint.host_identifier else { panic!("an endpoint") };
        endpoint.health_check_config =
            at.map(|at| HealthCheckConfig { port_value: at.port().into(), ..Default::default() });
    }
    assignment
}

/// Who answers, of 20 calls each way.
async fn answering(world: &World) -> Vec<String> {
    let [channel, layer] = Way::BOTH.map(|way| way.calls(&world.mesh, 20));
    let (channel, layer) = (channel.await, layer.await);
    match channel.keys().eq(layer.keys()) {
        true => channel.into_keys().collect(),
        false => vec![format!("the ways differ: {channel:?}, {layer:?}")],
    }
}

/// Two greeters; the second is checked at the clinic.
async fn with_patient(check: Proto) -> (World, Clinic, [examples::backend::Backend; 2]) {
    let (clinic, well) = (Clinic::start().await, Clinic::start().await);
    let backends = [greeter("one").await, greeter("two").await];
    let cp = checked(&[backends[0].addr(), backends[1].addr()], &[Some(well.addr), Some(clinic.addr)], check).await;
    let world = World::on(cp).await;
    // The first one stays well; its clinic is to live as long.
    std::mem::forget(well);
    (world, clinic, backends)
}

/// Of the configuration in force.
fn version(world: &World) -> String {
    let text = world.explain();
    text.lines().find(|line| line.starts_with("config")).expect("it says so").to_owned()
}

async fn out_and_back(checker: Checker, reason: &str) {
    let (world, clinic, _backends) = with_patient(check(checker)).await;
    until("both serve", async || answering(&world).await == ["one", "two"]).await;
    clinic.set(503);
    until("it is out", async || world.explain().contains("fails its health checks")).await;
    assert_says(&world.explain(), &[reason]);
    for _ in 0..5 {
        assert_eq!(answering(&world).await, ["one"]);
        clinic.asked_again().await;
    }
    clinic.set(200);
    until("it is back", async || answering(&world).await == ["one", "two"]).await;
    assert!(world.channel.load().is_idle());
}

#[tokio::test]
async fn an_endpoint_that_fails_its_http_check_gets_no_requests_and_comes_back() {
    for protocol in [CodecClientType::Http1, CodecClientType::Http2] {
        let http = HttpHealthCheck {
            path: "/healthz?full".into(),
            host: "clinic.example".into(),
            codec_client_type: protocol.into(),
            receive: vec![Payload { payload: Some(Content::Binary(b"well".to_vec())) }],
            ..HttpHealthCheck::default()
        };
        out_and_back(Checker::HttpHealthCheck(http), "HTTP 503").await;
    }
}

#[tokio::test]
async fn an_endpoint_that_fails_its_grpc_check_gets_no_requests_and_comes_back() {
    let grpc = GrpcHealthCheck { service_name: "helloworld.Greeter".into(), ..GrpcHealthCheck::default() };
    out_and_back(Checker::GrpcHealthCheck(grpc), "it is not SERVING").await;
}

#[tokio::test]
async fn http_checks_ask_as_they_are_told() {
    let http = HttpHealthCheck {
        path: "/healthz?full".into(),
        host: "clinic.example".into(),
        expected_statuses: vec![Int64Range { start: 200, end: 205 }],
        retriable_statuses: vec![Int64Range { start: 500, end: 501 }],
        ..HttpHealthCheck::default()
    };
    let slowly = Proto { unhealthy_threshold: number(100_000), ..check(Checker::HttpHealthCheck(http)) };
    let (world, clinic, _backends) = with_patient(slowly).await;
    until("it is asked", async || clinic.asked() > 3).await;
    let head = clinic.last.lock().unwrap().take().unwrap();
    assert_eq!((head.method.as_str(), head.uri.to_string()), ("GET", "/healthz?full".to_owned()));
    assert_eq!(head.headers["host"], "clinic.example");
    assert_eq!(clinic.connections.load(SeqCst), 1, "one connection serves all checks");
    // Expected, and retriable: far from the threshold.
    for status in [204, 500] {
        clinic.set(status);
        clinic.asked_again().await;
        assert!(!world.explain().contains("fails its health checks"), "{status}");
    }
    // Neither: that counts at once.
    clinic.set(404);
    until("it is out", async || world.explain().contains("fails its health checks: HTTP 404")).await;
}

#[tokio::test]
async fn connections_are_not_reused_where_the_check_says_so() {
    let http = HttpHealthCheck { path: "/".into(), ..HttpHealthCheck::default() };
    let reuse = Some(envoy_types::pb::google::protobuf::BoolValue { value: false });
    let (_world, clinic, _backends) =
        with_patient(Proto { reuse_connection: reuse, ..check(Checker::HttpHealthCheck(http)) }).await;
    until("it is asked", async || clinic.asked() > 3).await;
    assert!(clinic.connections.load(SeqCst) >= clinic.asked());
}

#[tokio::test]
async fn an_endpoint_that_fails_its_tcp_check_gets_no_requests_and_comes_back() {
    // Answers PING with PONG, or with something else.
    let listener = TcpListener::bind(ANY).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let well = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let says = well.clone();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut tcp, _)) = listener.accept().await {
            let says = says.clone();
            connections.spawn(async move {
                let mut ping = [0; 4];
                while tcp.read_exact(&mut ping).await.is_ok() && &ping == b"PING" {
                    if !says.load(SeqCst) {
                        return;
                    }
                    tcp.write_all(b"+PONG\r\n").await.unwrap();
                }
            });
        }
    });
    let payload = |text: &str| Payload { payload: Some(Content::Text(text.into())) };
    let tcp = TcpHealthCheck {
        // PING, PONG
        send: Some(payload("50494e47")),
        receive: vec![payload("504f4e47")],
        ..TcpHealthCheck::default()
    };
    let backends = [greeter("one").await, greeter("two").await];
    let endpoints = [backends[0].addr(), backends[1].addr()];
    // The first one is not checked: it speaks no such thing.
    let cp = checked(&endpoints, &[None, Some(addr)], check(Checker::TcpHealthCheck(tcp))).await;
    let mut served = placed(&endpoints, &[None, Some(addr)]);
    let Some(HostIdentifier::Endpoint(first)) = &mut served.endpoints[0].lb_endpoints[0].host_identifier else {
        panic!()
    };
    first.health_check_config = Some(HealthCheckConfig { disable_active_health_check: true, ..Default::default() });
    cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(served));
    let world = World::on(cp).await;
    until("both serve", async || answering(&world).await == ["one", "two"]).await;
    well.store(false, SeqCst);
    until("it is out", async || world.explain().contains("fails its health checks: it closed the connection")).await;
    assert_eq!(answering(&world).await, ["one"]);
    well.store(true, SeqCst);
    until("it is back", async || answering(&world).await == ["one", "two"]).await;
}

#[tokio::test]
async fn an_endpoint_that_says_nothing_is_out_after_the_timeout_and_joins_only_after_a_check() {
    let http = HttpHealthCheck { path: "/".into(), ..HttpHealthCheck::default() };
    let check = Proto { timeout: millis(50), ..check(Checker::HttpHealthCheck(http)) };
    let (well, hole) = (Clinic::start().await, TcpListener::bind(ANY).await.unwrap());
    let backends = [greeter("one").await, greeter("two").await];
    let both = [backends[0].addr(), backends[1].addr()];
    let at = [Some(well.addr), Some(hole.local_addr().unwrap())];
    let world = World::on(checked(&both[..1], &at[..1], check).await).await;
    until("it serves", async || answering(&world).await == ["one"] && well.asked() > 1).await;
    // One that joins is not used before it was checked.
    world.cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(placed(&both, &at)));
    until("it has joined", async || world.explain().contains(&both[1].to_string())).await;
    until("it is out", async || world.explain().contains("fails its health checks: no answer within 50ms")).await;
    assert_eq!(answering(&world).await, ["one"]);
    assert_eq!(backends[1].state().calls(), 0, "it never got a request");
}

#[tokio::test]
async fn a_check_that_passes_ends_an_ejection() {
    let http = HttpHealthCheck { path: "/".into(), ..HttpHealthCheck::default() };
    let (world, clinic, backends) = with_patient(check(Checker::HttpHealthCheck(http))).await;
    until("both serve", async || answering(&world).await == ["one", "two"]).await;
    for (unejects, back) in [(false, false), (true, true)] {
        let before = version(&world);
        edit_cluster(&world.cp, CLUSTER, |cluster| {
            cluster.outlier_detection = Some(envoy_types::pb::envoy::config::cluster::v3::OutlierDetection {
                consecutive_5xx: number(3),
                interval: Some(ProtoDuration { seconds: 3000, nanos: 0 }),
                base_ejection_time: Some(ProtoDuration { seconds: 3000, nanos: 0 }),
                max_ejection_percent: number(50),
                successful_active_health_check_uneject_host: Some(envoy_types::pb::google::protobuf::BoolValue {
                    value: unejects,
                }),
                ..Default::default()
            });
        });
        until("it is in force", async || version(&world) != before).await;
        if !back {
            backends[1].state().set_unavailable(true);
            until("it is ejected", async || {
                let _ = hello(&world.channel).await;
                world.explain().contains("by consecutive_5xx")
            })
            .await;
            backends[1].state().set_unavailable(false);
            clinic.asked_again().await;
            assert_says(&world.explain(), &["by consecutive_5xx"]);
        } else {
            until("it is back", async || answering(&world).await == ["one", "two"]).await;
        }
    }
}

#[tokio::test]
async fn an_endpoint_that_left_stays_while_it_is_well_unless_the_cluster_says_otherwise() {
    for ignore in [false, true] {
        let http = HttpHealthCheck { path: "/".into(), ..HttpHealthCheck::default() };
        let (world, clinic, backends) = with_patient(check(Checker::HttpHealthCheck(http))).await;
        until("both serve", async || answering(&world).await == ["one", "two"] && clinic.asked() > 1).await;
        if ignore {
            let before = version(&world);
            edit_cluster(&world.cp, CLUSTER, |cluster| cluster.ignore_health_on_host_removal = true);
            until("it is in force", async || version(&world) != before).await;
        }
        let before = version(&world);
        let mut left = placed(&[backends[0].addr()], &[None]);
        let endpoint = &mut left.endpoints[0].lb_endpoints[0];
        let Some(HostIdentifier::Endpoint(first)) = &mut endpoint.host_identifier else { panic!("an endpoint") };
        first.health_check_config = Some(HealthCheckConfig { disable_active_health_check: true, ..Default::default() });
        world.cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(left));
        until("it is in force", async || version(&world) != before).await;
        if !ignore {
            assert_eq!(answering(&world).await, ["one", "two"], "it is well");
            clinic.set(503);
        }
        until("it is gone", async || !world.explain().contains(&backends[1].addr().to_string())).await;
        assert_eq!(answering(&world).await, ["one"]);
    }
}

#[tokio::test]
async fn checks_can_be_made_from_code_and_end_with_the_channel() {
    let (good, bad) = (http_backend("good").await, http_backend("bad").await);
    let check = HealthCheck::http("/healthz").interval(Duration::from_millis(20)).thresholds(1, 1);
    let check = check.no_traffic_interval(Duration::from_millis(20));
    let cluster = Cluster { health_check: Some(Arc::new(check)), ..Cluster::fixed("any", Arc::default()) };
    let policy = Policy { cluster: Some(cluster), ..Policy::default() };
    let mesh = Mesh::builder().policy(policy).profile(mesh_client::Profile::Envoy).build().await.unwrap();
    let channel = mesh.fixed_channel(&[good.addr(), bad.addr()]).unwrap();
    let ask = async || {
        let request = Request::get("http://any/x").body(Full::<Bytes>::default()).unwrap();
        let response = tower::ServiceExt::oneshot(channel.clone(), request).await.unwrap();
        let text = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
        String::from_utf8(text.to_vec()).unwrap()
    };
    bad.state().set_unavailable(true);
    let all_good = async || {
        for _ in 0..20 {
            if !ask().await.contains("good") {
                return false;
            }
        }
        true
    };
    until("it is out", all_good).await;
    bad.state().set_unavailable(false);
    until("it is back", async || ask().await.contains("bad")).await;
    drop(channel);
    drop(mesh);
    // What was under way may still come; then there is silence.
    until("no check is made any more", async || {
        let before = bad.state().calls();
        tokio::time::sleep(Duration::from_millis(200)).await;
        bad.state().calls() == before
    })
    .await;
}
