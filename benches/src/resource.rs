//! The xDS resources of the measured mesh: one listener, one route with a retry policy, one cluster with outlier
//! detection and circuit breakers, and its endpoints.

use std::net::SocketAddr;

use envoy_types::pb::envoy::config::cluster::v3::circuit_breakers::Thresholds;
use envoy_types::pb::envoy::config::cluster::v3::cluster::{
    ClusterDiscoveryType, DiscoveryType, EdsClusterConfig, LbPolicy,
};
use envoy_types::pb::envoy::config::cluster::v3::{CircuitBreakers, Cluster, OutlierDetection};
use envoy_types::pb::envoy::config::core::v3::{
    Address, AggregatedConfigSource, ConfigSource, Locality, SocketAddress, address, config_source, socket_address,
};
use envoy_types::pb::envoy::config::endpoint::v3::lb_endpoint::HostIdentifier;
use envoy_types::pb::envoy::config::endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints};
use envoy_types::pb::envoy::config::listener::v3::{ApiListener, Listener};
use envoy_types::pb::envoy::config::route::v3::retry_policy::RetryBackOff;
use envoy_types::pb::envoy::config::route::v3::route::Action;
use envoy_types::pb::envoy::config::route::v3::route_action::ClusterSpecifier;
use envoy_types::pb::envoy::config::route::v3::route_match::PathSpecifier;
use envoy_types::pb::envoy::config::route::v3::{
    RetryPolicy, Route, RouteAction, RouteConfiguration, RouteMatch, VirtualHost,
};
use envoy_types::pb::envoy::extensions::filters::http::router::v3::Router;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::http_connection_manager::RouteSpecifier;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3::{
    HttpConnectionManager, HttpFilter, Rds, http_filter,
};
use envoy_types::pb::google::protobuf::{Any, Duration, UInt32Value};
use mesh_xds::server::ResourceSet;
use prost::{Message, Name};

/// The listener, which is also the host of the target.
pub const LISTENER: &str = "echo.bench.svc.cluster.local:50051";
/// The target clients dial.
pub const TARGET: &str = "xds:///echo.bench.svc.cluster.local:50051";

const ROUTES: &str = "echo-routes";
/// The cluster, which is also the name of its endpoints.
pub const CLUSTER: &str = "outbound|50051||echo.bench.svc.cluster.local";

/// The message as control planes send it.
#[must_use]
pub fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: format!("type.googleapis.com/{}", M::full_name()), value: message.encode_to_vec() }
}

fn ads() -> ConfigSource {
    let ads = config_source::ConfigSourceSpecifier::Ads(AggregatedConfigSource {});
    ConfigSource { config_source_specifier: Some(ads), resource_api_version: 2, ..Default::default() }
}

fn millis(millis: i32) -> Duration {
    Duration { seconds: i64::from(millis / 1000), nanos: millis % 1000 * 1_000_000 }
}

fn number(value: u32) -> Option<UInt32Value> {
    Some(UInt32Value { value })
}

/// Everything a client needs to call `endpoints`: listener, route, cluster, endpoints, in this order.
#[must_use]
pub fn all(priorities: &[&[SocketAddr]]) -> ResourceSet {
    ResourceSet::new().listener(listener()).route(routes()).cluster(cluster()).endpoints(assignment(priorities))
}

fn listener() -> Listener {
    let manager = HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::Rds(Rds {
            config_source: Some(ads()),
            route_config_name: ROUTES.to_owned(),
        })),
        http_filters: vec![HttpFilter {
            name: "router".to_owned(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&Router::default()))),
            ..Default::default()
        }],
        ..Default::default()
    };
    let api_listener = Some(ApiListener { api_listener: Some(any(&manager)) });
    Listener { name: LISTENER.to_owned(), api_listener, ..Default::default() }
}

/// One route for all paths, with the retry policy and the disabled timeout that Istio puts on every route.
fn routes() -> RouteConfiguration {
    let retry_policy = RetryPolicy {
        retry_on: "connect-failure,refused-stream,unavailable,cancelled".to_owned(),
        num_retries: number(2),
        retry_back_off: Some(RetryBackOff { base_interval: Some(millis(25)), max_interval: Some(millis(250)) }),
        ..Default::default()
    };
    let action = RouteAction {
        cluster_specifier: Some(ClusterSpecifier::Cluster(CLUSTER.to_owned())),
        timeout: Some(millis(0)),
        retry_policy: Some(retry_policy),
        ..Default::default()
    };
    let route = Route {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".to_owned())), ..Default::default() }),
        action: Some(Action::Route(action)),
        ..Default::default()
    };
    let host = VirtualHost {
        name: "echo".to_owned(),
        domains: vec![LISTENER.to_owned(), "*".to_owned()],
        routes: vec![route],
        ..Default::default()
    };
    RouteConfiguration { name: ROUTES.to_owned(), virtual_hosts: vec![host], ..Default::default() }
}

/// Round robin, with outlier detection by consecutive failures and by success rate, and breakers that never trip here.
fn cluster() -> Cluster {
    let thresholds = Thresholds {
        max_connections: number(1_000_000),
        max_pending_requests: number(1_000_000),
        max_requests: number(1_000_000),
        max_retries: number(1_000_000),
        ..Default::default()
    };
    Cluster {
        name: CLUSTER.to_owned(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds.into())),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads()), ..Default::default() }),
        lb_policy: LbPolicy::RoundRobin.into(),
        circuit_breakers: Some(CircuitBreakers { thresholds: vec![thresholds], ..Default::default() }),
        outlier_detection: Some(OutlierDetection {
            consecutive_5xx: number(5),
            interval: Some(millis(1_000)),
            base_ejection_time: Some(millis(1_000)),
            max_ejection_percent: number(50),
            enforcing_consecutive_5xx: number(100),
            enforcing_success_rate: number(100),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// The endpoints, by priority from the first slice on; one locality each.
#[must_use]
pub fn assignment(priorities: &[&[SocketAddr]]) -> ClusterLoadAssignment {
    let locality = |(priority, endpoints): (u32, &&[SocketAddr])| LocalityLbEndpoints {
        locality: Some(Locality { region: "bench".to_owned(), zone: format!("z{priority}"), ..Default::default() }),
        lb_endpoints: endpoints.iter().map(|address| endpoint(*address)).collect(),
        load_balancing_weight: number(1),
        priority,
        ..Default::default()
    };
    ClusterLoadAssignment {
        cluster_name: CLUSTER.to_owned(),
        endpoints: (0..).zip(priorities).map(locality).collect(),
        ..Default::default()
    }
}

fn endpoint(address: SocketAddr) -> LbEndpoint {
    let socket = SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(socket_address::PortSpecifier::PortValue(u32::from(address.port()))),
        ..Default::default()
    };
    let address = Some(Address { address: Some(address::Address::SocketAddress(socket)) });
    let endpoint = Endpoint { address, ..Default::default() };
    LbEndpoint { host_identifier: Some(HostIdentifier::Endpoint(endpoint)), ..Default::default() }
}
