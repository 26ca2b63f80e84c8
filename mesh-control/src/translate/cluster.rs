//! CDS: one cluster per target and subset, with everything a DestinationRule says.

#![allow(deprecated, reason = "the fields that Istio sets")]

use super::{Options, Target, ads, duration, endpoint, tls, uint32};
use crate::model::{
    Algorithm, ConnectionPool, ConsistentHash, HashKey, HashTable, LoadBalancer, OutlierDetection, Policy, Protocol,
    Resolution, Subset, TcpKeepalive, TrafficPolicy, Warmup,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{
                    self as pb, CircuitBreakers, UpstreamConnectionOptions,
                    circuit_breakers::{Thresholds, thresholds::RetryBudget},
                    cluster::{
                        ClusterDiscoveryType, CommonLbConfig, DiscoveryType, DnsLookupFamily, EdsClusterConfig,
                        LbConfig, LbPolicy, LeastRequestLbConfig, MaglevLbConfig, RingHashLbConfig, RoundRobinLbConfig,
                        SlowStartConfig,
                    },
                },
                core::v3::{
                    self as core, Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions, RuntimeDouble,
                },
            },
            extensions::upstreams::http::v3::{
                HttpProtocolOptions as UpstreamOptions,
                http_protocol_options::{
                    ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
                },
            },
            r#type::v3::Percent,
        },
        google::protobuf::{Any, UInt64Value},
    },
    util::pack_any,
};
use std::time::Duration;

const UPSTREAM_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

pub(super) use pb::Cluster;

pub(super) fn cluster(target: &Target<'_>, subset: Option<&Subset>, options: &Options) -> Cluster {
    let name = target.cluster_name(subset);
    let traffic = effective(target.policy, target.port.number.value, subset);
    let pool = traffic.connection_pool.as_ref();
    let http2 = target.port.protocol != Protocol::Http || pool.is_some_and(|p| p.upgrade_to_http2);
    let by_name = target.service.resolution != Resolution::Static;
    let discovery = match target.service.resolution {
        Resolution::Static => DiscoveryType::Eds,
        Resolution::Dns => DiscoveryType::StrictDns,
        Resolution::DnsRoundRobin => DiscoveryType::LogicalDns,
    };
    let eds = EdsClusterConfig { eds_config: Some(ads()), service_name: name.clone() };
    let (lb_policy, lb_config) = load_balancing(traffic.load_balancer.as_ref());
    let (transport_socket, transport_socket_matches) = match &traffic.tls {
        Some(said) => (tls::transport_socket(said, target, subset, http2, options), Vec::new()),
        None => tls::by_endpoints(target, subset, http2, options),
    };
    let keepalive = pool.and_then(|p| p.tcp_keepalive);
    Cluster {
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(discovery.into())),
        eds_cluster_config: (!by_name).then_some(eds),
        load_assignment: by_name.then(|| endpoint::assignment(target, subset, options)),
        // Istio's `dnsRefreshRate`, and what it sets beside it.
        dns_refresh_rate: by_name.then(|| duration(Duration::from_secs(60))),
        respect_dns_ttl: by_name,
        dns_jitter: by_name.then(|| duration(Duration::from_millis(100))),
        // Istio: V4_ONLY where the client has IPv4 addresses only, which is not known here.
        dns_lookup_family: if by_name { DnsLookupFamily::V4Preferred } else { DnsLookupFamily::Auto }.into(),
        lb_policy: lb_policy.into(),
        lb_config,
        connect_timeout: pool.and_then(|p| p.connect_timeout).map(duration),
        circuit_breakers: circuit_breakers(&traffic),
        outlier_detection: traffic.outlier_detection.as_ref().map(outlier_detection),
        common_lb_config: traffic.outlier_detection.as_ref().map(|o| CommonLbConfig {
            // Istio: no panic unless asked for.
            healthy_panic_threshold: Some(Percent { value: o.min_health_percent.unwrap_or(0).into() }),
            ..CommonLbConfig::default()
        }),
        upstream_connection_options: keepalive.map(|k| UpstreamConnectionOptions {
            tcp_keepalive: Some(tcp_keepalive(k)),
            ..UpstreamConnectionOptions::default()
        }),
        transport_socket,
        transport_socket_matches,
        typed_extension_protocol_options: [(UPSTREAM_OPTIONS.to_owned(), protocol_options(http2, pool))].into(),
        name,
        ..Cluster::default()
    }
}

fn load_balancing(said: Option<&LoadBalancer>) -> (LbPolicy, Option<LbConfig>) {
    let slow_start = said.and_then(|said| said.warmup).map(slow_start);
    match said.and_then(|said| said.algorithm.as_ref()) {
        None | Some(Algorithm::RoundRobin) => {
            let config = |config| LbConfig::RoundRobinLbConfig(RoundRobinLbConfig { slow_start_config: Some(config) });
            (LbPolicy::RoundRobin, slow_start.map(config))
        }
        Some(Algorithm::LeastRequest) => {
            let config = |config| {
                let config =
                    LeastRequestLbConfig { slow_start_config: Some(config), ..LeastRequestLbConfig::default() };
                LbConfig::LeastRequestLbConfig(config)
            };
            (LbPolicy::LeastRequest, slow_start.map(config))
        }
        Some(Algorithm::Random) => (LbPolicy::Random, None),
        Some(Algorithm::Hash(ConsistentHash { table: HashTable::Ring(minimum), .. })) => {
            let minimum_ring_size = minimum.map(|value| UInt64Value { value });
            let config = RingHashLbConfig { minimum_ring_size, ..RingHashLbConfig::default() };
            (LbPolicy::RingHash, Some(LbConfig::RingHashLbConfig(config)))
        }
        Some(Algorithm::Hash(ConsistentHash { table: HashTable::Maglev(size), .. })) => {
            let config = MaglevLbConfig { table_size: size.map(|value| UInt64Value { value }) };
            (LbPolicy::Maglev, Some(LbConfig::MaglevLbConfig(config)))
        }
    }
}

fn slow_start(warmup: Warmup) -> SlowStartConfig {
    SlowStartConfig {
        slow_start_window: Some(duration(warmup.duration)),
        aggression: warmup
            .aggression
            .map(|value| RuntimeDouble { default_value: value, runtime_key: "slow_start.aggression".to_owned() }),
        min_weight_percent: warmup.minimum_percent.map(|value| Percent { value }),
    }
}

/// What a request to this cluster is hashed by.
pub(super) fn hash_key(policy: Option<&Policy>, port: u16, subset: Option<&str>) -> Option<HashKey> {
    let subset = policy?.subsets.iter().find(|own| Some(own.name.value.as_str()) == subset);
    match effective(policy, port, subset).load_balancer?.algorithm? {
        Algorithm::Hash(hash) => hash.key,
        Algorithm::RoundRobin | Algorithm::LeastRequest | Algorithm::Random => None,
    }
}

/// Istio's merge: a subset's part replaces the policy's; a setting for the port replaces all parts, said or not.
pub(super) fn effective(policy: Option<&Policy>, port: u16, subset: Option<&Subset>) -> TrafficPolicy {
    let Some(policy) = policy else { return TrafficPolicy::default() };
    let base = for_port(&policy.traffic, port);
    let Some(subset) = subset else { return base };
    if let Some(port) = subset.traffic.ports.get(&port) {
        return port.clone();
    }
    let over = subset.traffic.clone();
    TrafficPolicy {
        load_balancer: over.load_balancer.or(base.load_balancer),
        connection_pool: over.connection_pool.or(base.connection_pool),
        outlier_detection: over.outlier_detection.or(base.outlier_detection),
        tls: over.tls.or(base.tls),
        retry_budget: over.retry_budget.or(base.retry_budget),
        ports: over.ports,
    }
}

fn for_port(traffic: &TrafficPolicy, port: u16) -> TrafficPolicy {
    traffic.ports.get(&port).unwrap_or(traffic).clone()
}

fn circuit_breakers(traffic: &TrafficPolicy) -> Option<CircuitBreakers> {
    let pool = traffic.connection_pool.clone().unwrap_or_default();
    if traffic.connection_pool.is_none() && traffic.retry_budget.is_none() {
        return None;
    }
    // Istio: a limit that is not said is none (2^32-1).
    let limit = |limit: Option<u32>| Some(uint32(limit.unwrap_or(u32::MAX)));
    let thresholds = Thresholds {
        max_connections: limit(pool.max_connections),
        max_pending_requests: limit(pool.max_pending_requests),
        max_requests: limit(pool.max_requests),
        max_retries: limit(pool.max_retries),
        retry_budget: traffic.retry_budget.map(|budget| RetryBudget {
            budget_percent: Some(Percent { value: budget.percent }),
            min_retry_concurrency: Some(uint32(budget.min_concurrency)),
            ..RetryBudget::default()
        }),
        ..Thresholds::default()
    };
    Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() })
}

fn outlier_detection(outlier: &OutlierDetection) -> pb::OutlierDetection {
    // Istio: a count of 0 turns the detector off, any other is enforced always.
    let enforcing = |count: Option<u32>| count.map(|n| uint32(if n == 0 { 0 } else { 100 }));
    // 0 is no legal count in Envoy.
    let count = |count: Option<u32>| count.filter(|n| *n > 0).map(uint32);
    pb::OutlierDetection {
        consecutive_5xx: count(outlier.consecutive_5xx),
        enforcing_consecutive_5xx: enforcing(outlier.consecutive_5xx),
        consecutive_gateway_failure: count(outlier.consecutive_gateway),
        enforcing_consecutive_gateway_failure: enforcing(outlier.consecutive_gateway),
        split_external_local_origin_errors: outlier.split_local,
        consecutive_local_origin_failure: count(outlier.consecutive_local.filter(|_| outlier.split_local)),
        enforcing_consecutive_local_origin_failure: enforcing(
            outlier.consecutive_local.filter(|_| outlier.split_local),
        ),
        enforcing_success_rate: Some(uint32(0)),
        enforcing_local_origin_success_rate: outlier.split_local.then(|| uint32(0)),
        interval: outlier.interval.map(duration),
        base_ejection_time: outlier.base_ejection_time.map(duration),
        max_ejection_percent: outlier.max_ejection_percent.map(uint32),
        ..pb::OutlierDetection::default()
    }
}

fn tcp_keepalive(keepalive: TcpKeepalive) -> core::TcpKeepalive {
    let seconds = |d: Duration| uint32(u32::try_from(d.as_secs().max(1)).unwrap_or(u32::MAX));
    core::TcpKeepalive {
        keepalive_probes: keepalive.probes.map(uint32),
        keepalive_time: keepalive.time.map(seconds),
        keepalive_interval: keepalive.interval.map(seconds),
    }
}

fn protocol_options(http2: bool, pool: Option<&ConnectionPool>) -> Any {
    let protocol = if http2 {
        ProtocolConfig::Http2ProtocolOptions(Http2ProtocolOptions {
            max_concurrent_streams: pool.and_then(|p| p.max_concurrent_streams).map(uint32),
            ..Http2ProtocolOptions::default()
        })
    } else {
        ProtocolConfig::HttpProtocolOptions(Http1ProtocolOptions::default())
    };
    let common = pool.map(|pool| HttpProtocolOptions {
        idle_timeout: pool.idle_timeout.map(duration),
        max_connection_duration: pool.max_connection_duration.map(duration),
        max_requests_per_connection: pool.max_requests_per_connection.filter(|n| *n > 0).map(uint32),
        ..HttpProtocolOptions::default()
    });
    pack_any(UpstreamOptions {
        common_http_protocol_options: common.filter(|c| *c != HttpProtocolOptions::default()),
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(protocol),
        })),
        ..UpstreamOptions::default()
    })
}
