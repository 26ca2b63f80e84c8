//! What the control plane of a simulated mesh serves.

use crate::plan::{Balancing, Budget, Outliers, Plan};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster, OutlierDetection,
                circuit_breakers::{Thresholds, thresholds::RetryBudget},
                cluster::{ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy},
            },
            core::v3::{
                Address, AggregatedConfigSource, ConfigSource, Http2ProtocolOptions, Locality, SocketAddress,
                address::Address as AddressKind, config_source::ConfigSourceSpecifier, socket_address::PortSpecifier,
            },
            endpoint::v3::{
                ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
            },
            listener::v3::{ApiListener, Listener},
            route::v3::{
                RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
                retry_policy::RetryBackOff,
                route::Action,
                route_action::{
                    ClusterSpecifier, HashPolicy, MaxStreamDuration,
                    hash_policy::{Header, PolicySpecifier},
                },
                route_match::PathSpecifier,
            },
        },
        extensions::{
            filters::{
                http::router::v3::Router,
                network::http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter::ConfigType,
                },
            },
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{
                    ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
                },
            },
        },
        r#type::v3::Percent,
    },
    google::protobuf::{Any, Duration as ProtoDuration, UInt32Value},
};
use envoy_types::util::pack_any;
use mesh_client::Profile;
use mesh_xds::server::ResourceSet;
use std::{net::SocketAddr, time::Duration};

/// The listener, the cluster and its endpoints.
pub(crate) const NAME: &str = "sim.test:80";

/// How long a unary call may take.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(3);

/// All of it.
pub(crate) fn all(plan: &Plan, endpoints: &[(SocketAddr, u32)]) -> ResourceSet {
    ResourceSet::new().listener(listener(plan)).cluster(cluster(plan)).endpoints(assignment(endpoints))
}

/// Endpoints with their priorities.
pub(crate) fn encoded(endpoints: &[(SocketAddr, u32)]) -> Any {
    pack_any(assignment(endpoints))
}

fn listener(plan: &Plan) -> Listener {
    let retry = RetryPolicy {
        retry_on: match plan.profile {
            Profile::Grpc => "unavailable,cancelled",
            Profile::Envoy => "5xx,reset,connect-failure,refused-stream",
        }
        .to_owned(),
        num_retries: number(plan.retries),
        retry_back_off: Some(RetryBackOff { base_interval: Some(time(25)), max_interval: Some(time(250)) }),
        per_try_timeout: plan.per_try.map(|_| time(700)),
        ..RetryPolicy::default()
    };
    let action = |limit: Option<ProtoDuration>, retry: Option<RetryPolicy>| RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(NAME.to_owned())),
        timeout: Some(limit.unwrap_or_default()),
        max_stream_duration: limit
            .map(|limit| MaxStreamDuration { max_stream_duration: Some(limit), ..MaxStreamDuration::default() }),
        retry_policy: retry,
        hash_policy: vec![HashPolicy {
            policy_specifier: Some(PolicySpecifier::Header(Header {
                header_name: "x-key".to_owned(),
                ..Header::default()
            })),
            terminal: false,
        }],
        ..RouteAction::default()
    };
    let route = |prefix: &str, action| Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix(prefix.to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::Route(action)),
        ..Route::default()
    };
    let millis = TIMEOUT.as_millis() as i64;
    let host = VirtualHost {
        name: "sim".to_owned(),
        domains: vec!["*".to_owned()],
        routes: vec![route("/stream", action(None, None)), route("/", action(Some(time(millis)), Some(retry)))],
        include_request_attempt_count: true,
        ..VirtualHost::default()
    };
    let manager = HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration {
            name: "sim".to_owned(),
            virtual_hosts: vec![host],
            ..RouteConfiguration::default()
        })),
        http_filters: vec![HttpFilter {
            name: "router".to_owned(),
            config_type: Some(ConfigType::TypedConfig(pack_any(Router::default()))),
            ..HttpFilter::default()
        }],
        ..HttpConnectionManager::default()
    };
    let api_listener = Some(ApiListener { api_listener: Some(pack_any(manager)) });
    Listener { name: NAME.to_owned(), api_listener, ..Listener::default() }
}

fn cluster(plan: &Plan) -> Cluster {
    let (max_retries, retry_budget) = match plan.budget {
        Budget::Percent(percent, min) => (
            None,
            Some(RetryBudget {
                budget_percent: Some(Percent { value: percent }),
                min_retry_concurrency: number(min),
                ..RetryBudget::default()
            }),
        ),
        Budget::Fixed(max) => (number(max), None),
        Budget::Ratio { .. } | Budget::Throttle { .. } => (number(1_000), None),
    };
    let thresholds = Thresholds { max_retries, retry_budget, ..Thresholds::default() };
    let mut cluster = Cluster {
        name: NAME.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads()), ..EdsClusterConfig::default() }),
        connect_timeout: Some(time(500)),
        lb_policy: match plan.balancing {
            Balancing::RoundRobin => LbPolicy::RoundRobin,
            Balancing::Random => LbPolicy::Random,
            Balancing::LeastRequest => LbPolicy::LeastRequest,
            Balancing::RingHash => LbPolicy::RingHash,
            Balancing::Maglev => LbPolicy::Maglev,
        }
        .into(),
        circuit_breakers: Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() }),
        outlier_detection: plan.outliers.map(outliers),
        ..Cluster::default()
    };
    if plan.http2 {
        let options = HttpProtocolOptions {
            upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
                protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions::default())),
            })),
            ..HttpProtocolOptions::default()
        };
        let name = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions".to_owned();
        cluster.typed_extension_protocol_options.insert(name, pack_any(options));
    }
    cluster
}

fn outliers(kind: Outliers) -> OutlierDetection {
    let common = OutlierDetection {
        interval: Some(time(500)),
        base_ejection_time: Some(time(1_000)),
        max_ejection_time: Some(time(3_000)),
        max_ejection_percent: number(60),
        enforcing_success_rate: number(0),
        ..OutlierDetection::default()
    };
    match kind {
        Outliers::Consecutive => OutlierDetection { consecutive_5xx: number(3), ..common },
        Outliers::SuccessRate => OutlierDetection {
            enforcing_success_rate: number(100),
            success_rate_minimum_hosts: number(2),
            success_rate_request_volume: number(3),
            ..common
        },
        Outliers::FailurePercentage => OutlierDetection {
            enforcing_failure_percentage: number(100),
            failure_percentage_threshold: number(40),
            failure_percentage_minimum_hosts: number(2),
            failure_percentage_request_volume: number(3),
            ..common
        },
    }
}

fn assignment(endpoints: &[(SocketAddr, u32)]) -> ClusterLoadAssignment {
    let endpoint = |address: &SocketAddr| {
        let socket = SocketAddress {
            address: address.ip().to_string(),
            port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
            ..SocketAddress::default()
        };
        let address = Some(Address { address: Some(AddressKind::SocketAddress(socket)) });
        LbEndpoint {
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() })),
            ..LbEndpoint::default()
        }
    };
    let locality = |priority: u32| LocalityLbEndpoints {
        locality: Some(Locality { zone: format!("zone-{priority}"), ..Locality::default() }),
        priority,
        load_balancing_weight: number(1),
        lb_endpoints: endpoints.iter().filter(|(_, p)| *p == priority).map(|(address, _)| endpoint(address)).collect(),
        ..LocalityLbEndpoints::default()
    };
    let last = endpoints.iter().map(|(_, priority)| *priority).max().unwrap_or(0);
    ClusterLoadAssignment {
        cluster_name: NAME.to_owned(),
        endpoints: (0..=last).map(locality).collect(),
        ..ClusterLoadAssignment::default()
    }
}

fn ads() -> ConfigSource {
    let ads = ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    ConfigSource { config_source_specifier: Some(ads), ..ConfigSource::default() }
}

fn time(millis: i64) -> ProtoDuration {
    ProtoDuration { seconds: millis / 1000, nanos: (millis % 1000) as i32 * 1_000_000 }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}
