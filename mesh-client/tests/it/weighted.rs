//! Weighted round robin (gRFC A58): endpoints that say how busy they are get requests by it, with each response or out of band.

use crate::support::{
    ANY, CLUSTER, World,
    echo::{Way, get},
    edit_cluster, service, until,
};
use base64::{Engine as _, engine::general_purpose::STANDARD_NO_PAD};
use bytes::Bytes;
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{LoadBalancingPolicy, cluster::PreconnectPolicy, load_balancing_policy::Policy},
                core::v3::TypedExtensionConfig,
            },
            extensions::load_balancing_policies::client_side_weighted_round_robin::v3::ClientSideWeightedRoundRobin,
        },
        google::protobuf::{BoolValue, DoubleValue, Duration as ProtoDuration},
    },
    util::pack_any,
};
use futures::{future::join_all, stream};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_control::ControlPlane;
use prost::Message;
use std::{
    collections::BTreeMap,
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::{net::TcpListener, task::JoinSet};

/// `xds.data.orca.v3.OrcaLoadReport`, what of it is reported here.
#[derive(Clone, PartialEq, Message)]
struct Report {
    #[prost(double, tag = "6")]
    rps_fractional: f64,
    #[prost(double, tag = "9")]
    application_utilization: f64,
}

/// How a server reports.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// In a trailer, as gRPC does.
    Trailer,
    /// In a header.
    Text,
    Json,
    /// In a stream of its own.
    OutOfBand,
}

/// A server that says how busy it is.
struct Server {
    addr: SocketAddr,
    /// Percent.
    utilization: Arc<AtomicU64>,
    /// Streams of reports that were asked for.
    streams: Arc<AtomicU64>,
    _task: JoinSet<()>,
}

type Body = BoxBody<Bytes, Infallible>;

fn answer(name: &'static str, utilization: f64, how: How) -> Response<Body> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let mut response = Response::builder().header("content-type", "application/grpc").header("x-backend", name);
    match how {
        How::Trailer => {
            let report = Report { rps_fractional: 100.0, application_utilization: utilization };
            let value = STANDARD_NO_PAD.encode(report.encode_to_vec());
            trailers.insert("endpoint-load-metrics-bin", value.parse().unwrap());
        }
        How::Text => {
            let value = format!("TEXT cpu_utilization={utilization},rps_fractional=100");
            response = response.header("endpoint-load-metrics", value);
        }
        How::Json => {
            let value = format!("JSON {{\"cpu_utilization\": {utilization}, \"rps_fractional\": 100}}");
            response = response.header("endpoint-load-metrics", value);
        }
        How::OutOfBand => {}
    }
    let frames = [Frame::data(Bytes::from_static(&[0; 5])), Frame::trailers(trailers)];
    response.body(StreamBody::new(stream::iter(frames.map(Ok::<_, Infallible>))).boxed()).unwrap()
}

/// A report every few milliseconds.
fn reports(utilization: Arc<AtomicU64>) -> Response<Body> {
    let frames = stream::unfold(utilization, |utilization| async {
        tokio::time::sleep(Duration::from_millis(5)).await;
        let application_utilization = utilization.load(SeqCst) as f64 / 100.0;
        let report = Report { rps_fractional: 100.0, application_utilization }.encode_to_vec();
        let mut framed = vec![0, 0, 0, 0, u8::try_from(report.len()).unwrap()];
        framed.extend(report);
        Some((Ok(Frame::data(Bytes::from(framed))), utilization))
    });
    let body = StreamBody::new(Box::pin(frames) as Pin<Box<dyn futures::Stream<Item = _> + Send + Sync>>);
    Response::builder().header("content-type", "application/grpc").body(body.boxed()).unwrap()
}

impl Server {
    async fn start(name: &'static str, percent: u64, how: How) -> Self {
        let listener = TcpListener::bind(ANY).await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (utilization, streams) = (Arc::new(AtomicU64::new(percent)), Arc::new(AtomicU64::new(0)));
        let shared = (utilization.clone(), streams.clone());
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let (utilization, streams) = shared.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let response = if request.uri().path() == "/xds.service.orca.v3.OpenRcaService/StreamCoreMetrics" {
                        streams.fetch_add(1, SeqCst);
                        reports(utilization.clone())
                    } else {
                        answer(name, utilization.load(SeqCst) as f64 / 100.0, how)
                    };
                    async move { Ok::<_, Infallible>(response) }
                });
                connections.spawn(async move {
                    // A connection that breaks is the client's business.
                    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(tcp), service).await;
                });
            }
        });
        Self { addr, utilization, streams, _task: task }
    }
}

async fn world(servers: &[Server], how: How) -> World {
    let endpoints: Vec<_> = servers.iter().map(|server| ("v1", server.addr)).collect();
    let cp = ControlPlane::builder().yaml(service(&endpoints)).start().await.unwrap();
    edit_cluster(&cp, CLUSTER, |cluster| {
        let config = ClientSideWeightedRoundRobin {
            enable_oob_load_report: Some(BoolValue { value: how == How::OutOfBand }),
            blackout_period: Some(ProtoDuration::default()),
            // The least there is.
            weight_update_period: Some(ProtoDuration { seconds: 0, nanos: 1 }),
            ..ClientSideWeightedRoundRobin::default()
        };
        let config = TypedExtensionConfig { name: "wrr".into(), typed_config: Some(pack_any(config)) };
        let policies = vec![Policy { typed_extension_config: Some(config) }];
        cluster.load_balancing_policy = Some(LoadBalancingPolicy { policies });
        // Connections that are made ahead, at every request, do not put the weights off.
        let predictive_preconnect_ratio = Some(DoubleValue { value: 1.5 });
        cluster.preconnect_policy =
            Some(PreconnectPolicy { predictive_preconnect_ratio, ..PreconnectPolicy::default() });
    });
    World::on(cp).await
}

/// Who answered 200 requests.
async fn spread(world: &World, way: Way) -> BTreeMap<String, u32> {
    let mut seen = BTreeMap::new();
    for _ in 0..200 {
        let request = get("/x").header("content-type", "application/grpc").header("te", "trailers");
        *seen.entry(way.backend(&world.mesh, request).await).or_insert(0) += 1;
    }
    seen
}

fn is_near(seen: &BTreeMap<String, u32>, shares: [u32; 3]) -> bool {
    ["a", "b", "c"].iter().zip(shares).all(|(name, share)| seen.get(*name).unwrap_or(&0).abs_diff(share) <= 8)
}

#[tokio::test]
async fn endpoints_that_are_less_busy_get_more() {
    for (how, way) in [
        (How::Trailer, Way::Channel),
        (How::Trailer, Way::Layer),
        (How::Text, Way::Channel),
        (How::Json, Way::Layer),
        (How::OutOfBand, Way::Channel),
    ] {
        let servers =
            join_all([("a", 20), ("b", 20), ("c", 80)].map(|(name, busy)| Server::start(name, busy, how))).await;
        let world = world(&servers, how).await;
        // By 1/0.2, 1/0.2 and 1/0.8: 4 to 4 to 1.
        until("requests go by the load", async || is_near(&spread(&world, way).await, [89, 89, 22])).await;
        servers[0].utilization.store(80, SeqCst);
        servers[2].utilization.store(20, SeqCst);
        until("they follow the load", async || is_near(&spread(&world, way).await, [22, 89, 89])).await;
        let streams: Vec<_> = servers.iter().map(|server| server.streams.load(SeqCst)).collect();
        assert_eq!(streams, if how == How::OutOfBand { [1; 3] } else { [0; 3] }, "{how:?}");
    }
}

#[tokio::test]
async fn without_reports_it_is_round_robin() {
    for way in Way::BOTH {
        let servers = join_all(["a", "b", "c"].map(|name| Server::start(name, 0, How::Trailer))).await;
        let world = world(&servers, How::Trailer).await;
        let seen = spread(&world, way).await;
        assert!(is_near(&seen, [67, 67, 66]), "a report without utilization is none: {seen:?}");
    }
}
