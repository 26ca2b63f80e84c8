//! The global rate limit filter, against a rate limit service of ours.

use crate::{
    filters::{add_filter, anything, edit_routes, packed, plane, refused},
    filters_limits::by_plan,
    support::{
        TARGET, assert_says,
        echo::{Echo, Way, get, joined},
        mesh_on, until,
    },
};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{Cluster, cluster},
            core::v3::{
                Address, AggregatedConfigSource, ApiVersion, ConfigSource, GrpcService, HeaderValue, SocketAddress,
                address::Address as Kind,
                config_source::ConfigSourceSpecifier,
                grpc_service::{EnvoyGrpc, TargetSpecifier},
                socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
            ratelimit::v3::RateLimitServiceConfig,
            route::v3::route,
        },
        extensions::filters::http::ratelimit::v3::{RateLimit, RateLimitPerRoute},
        service::ratelimit::v3::{
            RateLimitRequest, RateLimitResponse,
            rate_limit_response::{Code as Verdict, DescriptorStatus, RateLimit as Limit},
            rate_limit_service_server::{RateLimitService, RateLimitServiceServer},
        },
    },
    google::protobuf::{Duration as ProtoDuration, UInt32Value},
};
use http::StatusCode;
use mesh_client::Explain;
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
};
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, Request, Response, Status};

/// A rate limit service with one counter for each value of the last entry.
#[derive(Clone, Default)]
pub(crate) struct Rls {
    /// Requests that each plan may make.
    limit: Arc<AtomicU32>,
    pub(crate) asked: Arc<Mutex<Vec<RateLimitRequest>>>,
}

#[tonic::async_trait]
impl RateLimitService for Rls {
    async fn should_rate_limit(
        &self,
        request: Request<RateLimitRequest>,
    ) -> Result<Response<RateLimitResponse>, Status> {
        let request = request.into_inner();
        let limit = self.limit.load(Ordering::Relaxed);
        let mut asked = self.asked.lock().unwrap();
        let before = asked.iter().filter(|earlier| earlier.descriptors == request.descriptors).count();
        asked.push(request);
        let before = u32::try_from(before).unwrap();
        let code = if before < limit { Verdict::Ok } else { Verdict::OverLimit };
        let header = |key: &str| HeaderValue { key: key.into(), value: "rls".into(), ..HeaderValue::default() };
        let status = DescriptorStatus {
            code: code.into(),
            current_limit: Some(Limit { requests_per_unit: limit, unit: 2, ..Limit::default() }),
            limit_remaining: limit.saturating_sub(before + 1),
            duration_until_reset: Some(ProtoDuration { seconds: 42, nanos: 0 }),
            ..DescriptorStatus::default()
        };
        Ok(Response::new(RateLimitResponse {
            overall_code: code.into(),
            statuses: vec![status],
            response_headers_to_add: vec![header("x-response")],
            request_headers_to_add: vec![header("x-request")],
            raw_body: if code == Verdict::Ok { Vec::new() } else { b"slow down".to_vec() },
            ..RateLimitResponse::default()
        }))
    }
}

impl Rls {
    pub(crate) async fn start(limit: u32) -> (Self, SocketAddr, JoinHandle<()>) {
        let service = Self::default();
        service.limit.store(limit, Ordering::Relaxed);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder().add_service(RateLimitServiceServer::new(service.clone()));
        let task = tokio::spawn(async move {
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.unwrap();
        });
        (service, addr, task)
    }
}

/// The cluster `rls`.
fn serve_cluster(cp: &ControlPlane, addr: SocketAddr) {
    let specifier = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    let eds_config = Some(ConfigSource { config_source_specifier: Some(specifier), ..ConfigSource::default() });
    let eds = cluster::EdsClusterConfig { eds_config, ..cluster::EdsClusterConfig::default() };
    let discovery = cluster::ClusterDiscoveryType::Type(cluster::DiscoveryType::Eds.into());
    let cluster = Cluster {
        name: "rls".into(),
        cluster_discovery_type: Some(discovery),
        eds_cluster_config: Some(eds),
        ..Cluster::default()
    };
    cp.cache().update(ResourceType::Cluster, "rls", packed(&cluster));
    let port_specifier = Some(PortSpecifier::PortValue(addr.port().into()));
    let socket = SocketAddress { address: addr.ip().to_string(), port_specifier, ..SocketAddress::default() };
    let address = Some(Address { address: Some(Kind::SocketAddress(socket)) });
    let endpoint = LbEndpoint {
        host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() })),
        ..LbEndpoint::default()
    };
    let endpoints = ClusterLoadAssignment {
        cluster_name: "rls".into(),
        endpoints: vec![LocalityLbEndpoints {
            load_balancing_weight: Some(UInt32Value { value: 1 }),
            lb_endpoints: vec![endpoint],
            ..LocalityLbEndpoints::default()
        }],
        ..ClusterLoadAssignment::default()
    };
    cp.cache().update(ResourceType::ClusterLoadAssignment, "rls", packed(&endpoints));
}

pub(crate) fn config() -> RateLimit {
    let envoy = EnvoyGrpc { cluster_name: "rls".into(), ..EnvoyGrpc::default() };
    let grpc_service =
        Some(GrpcService { target_specifier: Some(TargetSpecifier::EnvoyGrpc(envoy)), ..GrpcService::default() });
    RateLimit {
        domain: "shop".into(),
        timeout: Some(ProtoDuration { seconds: 20, nanos: 0 }),
        rate_limit_service: Some(RateLimitServiceConfig { grpc_service, transport_api_version: ApiVersion::V3.into() }),
        enable_x_ratelimit_headers: 1,
        ..RateLimit::default()
    }
}

pub(crate) async fn limited(backend: &Echo, rls: SocketAddr, config: &RateLimit) -> ControlPlane {
    let cp = plane(&anything(), backend).await;
    serve_cluster(&cp, rls);
    edit_routes(&cp, |r| {
        let Some(route::Action::Route(action)) = &mut r.virtual_hosts[0].routes[0].action else { panic!() };
        action.rate_limits = vec![by_plan()];
    });
    add_filter(&cp, "limit", packed(config), false);
    cp
}

#[tokio::test]
async fn a_service_says_which_requests_go_on() {
    let backend = Echo::start("v1").await;
    let (rls, addr, _task) = Rls::start(2).await;
    let cp = limited(&backend, addr, &config()).await;
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    for way in Way::BOTH {
        let plan = format!("{way:?}");
        for left in ["1", "0"] {
            let ok = way.send(&mesh, get("/").header("x-plan", &plan), "").await.unwrap();
            assert_eq!((ok.status(), joined(ok.headers(), "x-response").as_str()), (StatusCode::OK, "rls"));
            assert_eq!(joined(ok.headers(), "x-ratelimit-limit"), "2, 2;w=60");
            assert_eq!(joined(ok.headers(), "x-ratelimit-remaining"), left);
            assert_eq!(joined(ok.headers(), "x-ratelimit-reset"), "42");
            assert_eq!(backend.last().header("x-request"), "rls");
        }
        let seen = backend.seen().len();
        let over = way.send(&mesh, get("/").header("x-plan", &plan), "").await.unwrap();
        assert_eq!((over.status(), &over.body()[..]), (StatusCode::TOO_MANY_REQUESTS, &b"slow down"[..]), "{way:?}");
        assert_eq!(joined(over.headers(), "x-envoy-ratelimited"), "true");
        assert_eq!(backend.seen().len(), seen);
    }
    let asked = rls.asked.lock().unwrap().pop().unwrap();
    assert_eq!(asked.domain, "shop");
    let entries: Vec<_> = asked.descriptors[0].entries.iter().map(|e| (e.key.as_str(), e.value.as_str())).collect();
    assert_eq!(entries, [("generic_key", "api"), ("plan", "Layer")]);

    // Without the header there is no descriptor, and no question.
    let asked = rls.asked.lock().unwrap().len();
    assert_eq!(Way::Channel.send(&mesh, get("/"), "").await.unwrap().status(), StatusCode::OK);
    assert_eq!(rls.asked.lock().unwrap().len(), asked);
}

#[tokio::test]
async fn limits_of_virtual_hosts_and_domains_of_routes_count() {
    for way in Way::BOTH {
        let backend = Echo::start("v1").await;
        let (rls, addr, _task) = Rls::start(0).await;
        let cp = limited(&backend, addr, &RateLimit { rate_limited_as_resource_exhausted: true, ..config() }).await;
        let of_host = {
            use envoy_types::pb::envoy::config::route::v3::{RateLimit, rate_limit::action};
            let fixed = action::GenericKey { descriptor_value: "host".into(), ..action::GenericKey::default() };
            let fixed = crate::filters_limits::action(action::ActionSpecifier::GenericKey(fixed));
            RateLimit { actions: vec![fixed], ..RateLimit::default() }
        };
        let of_route = RateLimitPerRoute { vh_rate_limits: 1, domain: "other".into(), ..RateLimitPerRoute::default() };
        edit_routes(&cp, |r| {
            r.virtual_hosts[0].rate_limits = vec![of_host];
            r.virtual_hosts[0].typed_per_filter_config.insert("limit".into(), packed(&of_route));
        });
        let mesh = mesh_on(&cp).await;
        let status = way.hello(&mesh).await.unwrap_err();
        assert_eq!((status.code(), status.message()), (Code::ResourceExhausted, "slow down"));
        let asked = rls.asked.lock().unwrap().pop().unwrap();
        assert_eq!((asked.domain.as_str(), asked.descriptors.len()), ("other", 1));
        assert_eq!(asked.descriptors[0].entries[0].value, "host");
    }
}

#[tokio::test]
async fn without_an_answer_requests_go_on_unless_the_filter_denies() {
    let backend = Echo::start("v1").await;
    let (_, addr, task) = Rls::start(1).await;
    task.abort();
    let _ = task.await;
    let cp = limited(&backend, addr, &config()).await;
    let mesh = mesh_on(&cp).await;
    let channel = mesh.channel(TARGET).unwrap();
    let explain = Explain::default();
    let mut request = get("/").header("x-plan", "a");
    request.extensions_mut().unwrap().insert(explain.clone());
    assert_eq!(Way::Channel.send(&mesh, request, "").await.unwrap().status(), StatusCode::OK);
    assert_says(&explain.to_string(), &["rate limit", "cluster `rls` did not say, goes on: Unavailable"]);
    // A service that hangs: the filter's own timeout.
    let hole = TcpListener::bind("127.0.0.1:0").await.unwrap();
    serve_cluster(&cp, hole.local_addr().unwrap());
    let timeout = Some(ProtoDuration { seconds: 0, nanos: 10_000_000 });
    add_filter(&cp, "limit", packed(&RateLimit { failure_mode_deny: true, timeout, ..config() }), false);
    until("it denies", async || {
        let request = get("/").header("x-plan", "a");
        Way::Layer.send(&mesh, request, "").await.unwrap().status() == StatusCode::INTERNAL_SERVER_ERROR
    })
    .await;
    // And one that comes back, under another address.
    let (_rls, addr, _task) = Rls::start(1_000_000).await;
    serve_cluster(&cp, addr);
    add_filter(&cp, "limit", packed(&RateLimit { failure_mode_deny: true, ..config() }), false);
    until("it is asked again", async || {
        let request = get("/").header("x-plan", "a");
        Way::Channel.send(&mesh, request, "").await.unwrap().status() == StatusCode::OK
    })
    .await;
    drop(channel);
}

#[tokio::test]
async fn bad_services_are_refused_by_their_path() {
    let backend = Echo::start("v1").await;
    let cp = plane(&anything(), &backend).await;
    let mesh = mesh_on(&cp).await;
    let _channel = mesh.channel(TARGET).unwrap();
    add_filter(&cp, "limit", packed(&RateLimit { rate_limit_service: None, ..config() }), false);
    assert_says(&refused(&mesh, "Listener").await, &["http_filters[1].typed_config.rate_limit_service: is missing"]);
}
