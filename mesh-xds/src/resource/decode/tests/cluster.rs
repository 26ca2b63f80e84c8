//! CDS (gRFC A27, A29, A32, A48, A50, A52, A82, A105).

mod balancing;
mod connections;
mod discovery;
mod health_check;
mod tls;

use super::*;
use crate::resource::{Cluster, Discovery, HttpProtocol, LbPolicy, StringPattern, TransportSocket, UpstreamTls};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{
                CircuitBreakers, Cluster as Proto, LoadBalancingPolicy, OutlierDetection,
                circuit_breakers::{Thresholds, thresholds::RetryBudget},
                cluster::{
                    ClusterDiscoveryType, CustomClusterType, DiscoveryType, EdsClusterConfig, LbConfig,
                    LbPolicy as ProtoPolicy, LeastRequestLbConfig, TransportSocketMatch,
                },
                load_balancing_policy::Policy,
            },
            core::v3::{
                HttpProtocolOptions as CommonOptions, SelfConfigSource, TransportSocket as Socket,
                TypedExtensionConfig, transport_socket::ConfigType,
            },
            endpoint::v3::{ClusterLoadAssignment, LocalityLbEndpoints},
        },
        extensions::{
            load_balancing_policies::{
                cluster_provided::v3::ClusterProvided, least_request::v3::LeastRequest, random::v3::Random,
                round_robin::v3::RoundRobin, wrr_locality::v3::WrrLocality,
            },
            transport_sockets::{
                raw_buffer::v3::RawBuffer,
                tls::v3::{
                    CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext, TlsCertificate,
                    TlsParameters, UpstreamTlsContext,
                    certificate_validation_context::SystemRootCerts,
                    common_tls_context::{
                        CertificateProviderInstance, CombinedCertificateValidationContext, ValidationContextType,
                    },
                },
            },
            upstreams::http::v3::{
                HttpProtocolOptions,
                http_protocol_options::{
                    ExplicitHttpConfig, UpstreamProtocolOptions, explicit_http_config::ProtocolConfig,
                },
            },
        },
        r#type::{
            matcher::v3::{StringMatcher, string_matcher::MatchPattern},
            v3::Percent,
        },
    },
    google::protobuf::BoolValue,
};

fn good() -> Proto {
    Proto {
        name: "c".into(),
        cluster_discovery_type: Some(ClusterDiscoveryType::Type(DiscoveryType::Eds as i32)),
        eds_cluster_config: Some(EdsClusterConfig { eds_config: Some(ads()), service_name: String::new() }),
        ..Proto::default()
    }
}

fn accepted(proto: &Proto) -> (Cluster, Vec<Note>) {
    match decode(ResourceType::Cluster, proto).unwrap() {
        (Resource::Cluster(cluster), notes) => (Cluster::clone(&cluster), notes),
        (other, _) => panic!("{other:?}"),
    }
}

fn with(change: impl FnOnce(&mut Proto)) -> Proto {
    let mut proto = good();
    change(&mut proto);
    proto
}

fn policies(list: Vec<Any>) -> Option<LoadBalancingPolicy> {
    let policy = |any| Policy {
        typed_extension_config: Some(TypedExtensionConfig { name: "lb".into(), typed_config: Some(any) }),
    };
    Some(LoadBalancingPolicy { policies: list.into_iter().map(policy).collect() })
}

fn nested(depth: usize) -> Any {
    match depth {
        0 => any(&RoundRobin::default()),
        _ => any(&WrrLocality { endpoint_picking_policy: policies(vec![nested(depth - 1)]) }),
    }
}

fn thresholds(change: impl FnOnce(&mut Thresholds)) -> Option<CircuitBreakers> {
    let mut thresholds = Thresholds::default();
    change(&mut thresholds);
    Some(CircuitBreakers { thresholds: vec![thresholds], ..CircuitBreakers::default() })
}

fn outlier(change: impl FnOnce(&mut OutlierDetection)) -> Option<OutlierDetection> {
    let mut outlier = OutlierDetection::default();
    change(&mut outlier);
    Some(outlier)
}

#[test]
fn bad_clusters_are_rejected() {
    rejects(
        ResourceType::Cluster,
        &good(),
        &[
            ("name", "empty", |c| c.name.clear()),
            ("type", "ORIGINAL_DST", |c| {
                c.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::OriginalDst as i32));
            }),
            ("type", "unknown", |c| c.cluster_discovery_type = Some(ClusterDiscoveryType::Type(77))),
            ("eds_cluster_config", "missing", |c| c.eds_cluster_config = None),
            ("eds_cluster_config.eds_config", "ads or self", |c| {
                c.eds_cluster_config.as_mut().unwrap().eds_config = Some(not_ads());
            }),
            ("eds_cluster_config.service_name", "xdstp", |c| c.name = "xdstp://a/x".into()),
            ("load_assignment", "missing", |c| {
                c.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32));
            }),
            ("lrs_server", "self", |c| c.lrs_server = Some(ads())),
            ("transport_socket_matches[0].transport_socket", "missing", |c| {
                c.transport_socket_matches = vec![TransportSocketMatch::default()];
            }),
            ("transport_socket_matcher", "not supported", |c| c.transport_socket_matcher = Some(Default::default())),
            ("connect_timeout", "greater than zero", |c| c.connect_timeout = seconds(0)),
            ("connect_timeout", "negative", |c| c.connect_timeout = seconds(-5)),
            ("lb_policy", "CLUSTER_PROVIDED is not supported", |c| c.lb_policy = ProtoPolicy::ClusterProvided as i32),
            ("lb_policy", "LOAD_BALANCING_POLICY_CONFIG", |c| {
                c.lb_policy = ProtoPolicy::LoadBalancingPolicyConfig as i32;
            }),
            ("lb_policy", "unknown policy 99", |c| c.lb_policy = 99),
            ("least_request_lb_config.choice_count", "below 2", |c| {
                c.lb_policy = ProtoPolicy::LeastRequest as i32;
                c.lb_config = Some(LbConfig::LeastRequestLbConfig(LeastRequestLbConfig {
                    choice_count: uint(1),
                    ..LeastRequestLbConfig::default()
                }));
            }),
            ("load_balancing_policy", "no supported policy among [envoy.extensions", |c| {
                c.load_balancing_policy = policies(vec![any(&ClusterProvided::default())]);
            }),
            ("load_balancing_policy", "no supported policy among []", |c| c.load_balancing_policy = policies(vec![])),
            ("load_balancing_policy.policies[0].choice_count", "below 2", |c| {
                c.load_balancing_policy =
                    policies(vec![any(&LeastRequest { choice_count: uint(0), ..LeastRequest::default() })]);
            }),
            ("load_balancing_policy.policies[0].endpoint_picking_policy", "missing", |c| {
                c.load_balancing_policy = policies(vec![any(&WrrLocality::default())]);
            }),
            ("circuit_breakers.thresholds[0].retry_budget.budget_percent", "between", |c| {
                c.circuit_breakers = thresholds(|t| {
                    t.retry_budget =
                        Some(RetryBudget { budget_percent: Some(Percent { value: 101.0 }), ..RetryBudget::default() });
                });
            }),
            ("circuit_breakers.per_host_thresholds[0].max_connections", "greater than zero", |c| {
                let thresholds = Thresholds { max_connections: uint(0), ..Thresholds::default() };
                c.circuit_breakers =
                    Some(CircuitBreakers { per_host_thresholds: vec![thresholds], ..CircuitBreakers::default() });
            }),
            ("outlier_detection.max_ejection_percent", "more than 100", |c| {
                c.outlier_detection = outlier(|o| o.max_ejection_percent = uint(101));
            }),
            ("outlier_detection.enforcing_success_rate", "more than 100", |c| {
                c.outlier_detection = outlier(|o| o.enforcing_success_rate = uint(101));
            }),
            ("outlier_detection.enforcing_failure_percentage", "more than 100", |c| {
                c.outlier_detection = outlier(|o| o.enforcing_failure_percentage = uint(101));
            }),
            ("outlier_detection.failure_percentage_threshold", "more than 100", |c| {
                c.outlier_detection = outlier(|o| o.failure_percentage_threshold = uint(101));
            }),
            ("outlier_detection.interval", "negative", |c| {
                c.outlier_detection = outlier(|o| o.interval = seconds(-1));
            }),
            ("outlier_detection.base_ejection_time", "negative", |c| {
                c.outlier_detection = outlier(|o| o.base_ejection_time = seconds(-1));
            }),
            ("outlier_detection.max_ejection_time", "not a valid duration", |c| {
                c.outlier_detection = outlier(|o| o.max_ejection_time = seconds(i64::MAX));
            }),
            ("transport_socket.typed_config", "missing", |c| c.transport_socket = Some(Socket::default())),
            ("transport_socket.typed_config", "unknown transport socket \"x.Y\"", |c| {
                c.transport_socket = Some(socket(unknown("x.Y")));
            }),
        ],
    );
}

#[test]
fn policies_are_nested_at_most_sixteen_deep() {
    let proto = |depth| with(|c| c.load_balancing_policy = policies(vec![nested(depth)]));
    assert_eq!(accepted(&proto(15)).0.lb_policy, LbPolicy::RoundRobin);
    let error = decode(ResourceType::Cluster, &proto(16)).unwrap_err();
    assert!(error.reason.contains("16 deep"), "{error}");
}

#[test]
fn the_first_supported_policy_wins_over_the_legacy_field() {
    for (list, expected) in [
        (
            vec![any(&ClusterProvided::default()), any(&Random::default()), any(&RoundRobin::default())],
            LbPolicy::Random,
        ),
        (vec![nested(1)], LbPolicy::RoundRobin),
        (vec![any(&LeastRequest::default())], LbPolicy::least_request(2)),
        (vec![any(&LeastRequest { choice_count: uint(50), ..LeastRequest::default() })], LbPolicy::least_request(10)),
    ] {
        let proto = with(|c| {
            c.lb_policy = ProtoPolicy::Maglev as i32;
            c.load_balancing_policy = policies(list);
        });
        assert_eq!(accepted(&proto).0.lb_policy, expected);
    }
}

#[test]
fn legacy_policies_are_taken() {
    for (proto_policy, expected) in [
        (ProtoPolicy::RoundRobin, LbPolicy::RoundRobin),
        (ProtoPolicy::Random, LbPolicy::Random),
        (ProtoPolicy::LeastRequest, LbPolicy::least_request(2)),
    ] {
        assert_eq!(accepted(&with(|c| c.lb_policy = proto_policy as i32)).0.lb_policy, expected);
    }
}

#[test]
fn a_plain_eds_cluster_has_every_default() {
    let (cluster, notes) = accepted(&good());
    let expected = Cluster {
        discovery: Discovery::Eds { service_name: "c".into() },
        ..Cluster::fixed("c", std::sync::Arc::default())
    };
    assert_eq!(cluster, expected);
    assert_eq!(notes, []);
    let named = with(|c| c.eds_cluster_config.as_mut().unwrap().service_name = "s".into());
    assert_eq!(accepted(&named).0.discovery, Discovery::Eds { service_name: "s".into() });
    let own = ConfigSource {
        config_source_specifier: Some(ConfigSourceSpecifier::Self_(SelfConfigSource::default())),
        ..ConfigSource::default()
    };
    accepted(&with(|c| c.eds_cluster_config.as_mut().unwrap().eds_config = Some(own)));
}

#[test]
fn a_static_cluster_carries_its_endpoints_and_needs_no_locality_weight() {
    let proto = with(|c| {
        c.cluster_discovery_type = Some(ClusterDiscoveryType::Type(DiscoveryType::Static as i32));
        c.load_assignment = Some(ClusterLoadAssignment {
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: vec![endpoint::endpoint("10.0.0.1", 80)],
                ..LocalityLbEndpoints::default()
            }],
            ..ClusterLoadAssignment::default()
        });
    });
    let Discovery::Static(endpoints) = accepted(&proto).0.discovery else { panic!() };
    assert_eq!((&*endpoints.name, endpoints.priorities[0][0].weight), ("c", 1));
}

#[test]
fn thresholds_are_read_by_priority() {
    let high = Thresholds { priority: 1, max_requests: uint(1), ..Thresholds::default() };
    let default = Thresholds {
        max_connections: uint(2),
        max_pending_requests: uint(3),
        max_requests: uint(0),
        max_retries: uint(5),
        retry_budget: Some(RetryBudget::default()),
        ..Thresholds::default()
    };
    let per_host = Thresholds { max_connections: uint(100), ..Thresholds::default() };
    let proto = with(|c| {
        c.circuit_breakers =
            Some(CircuitBreakers { thresholds: vec![high, default], per_host_thresholds: vec![per_host] });
    });
    let breakers = accepted(&proto).0.circuit_breakers;
    let of = breakers.default;
    assert_eq!((of.max_connections, of.max_pending_requests, of.max_requests, of.max_retries), (2, 3, 0, 5));
    assert_eq!(breakers.max_connections_per_host, Some(100));
    let of_high = crate::resource::Thresholds { max_requests: 1, ..Default::default() };
    assert_eq!(breakers.at(crate::resource::RoutingPriority::High), &of_high);
    let budget = of.retry_budget.unwrap();
    assert!((budget.percent - 20.0).abs() < f64::EPSILON && budget.min_concurrency == 3);
}

#[test]
fn outlier_detection_has_envoys_defaults_and_zero_turns_a_counter_off() {
    let (cluster, _) = accepted(&with(|c| c.outlier_detection = outlier(|_| {})));
    assert_eq!(cluster.outlier_detection.as_deref(), Some(&crate::resource::OutlierDetection::default()));
    let (cluster, _) = accepted(&with(|c| {
        c.outlier_detection = outlier(|o| {
            o.consecutive_5xx = uint(0);
            o.consecutive_gateway_failure = uint(3);
            o.base_ejection_time = seconds(400);
            o.max_ejection_time_jitter = seconds(7);
            o.always_eject_one_host = Some(BoolValue { value: true });
            o.split_external_local_origin_errors = true;
            o.consecutive_local_origin_failure = uint(2);
            o.enforcing_local_origin_success_rate = uint(0);
            o.enforcing_failure_percentage_local_origin = uint(9);
            o.successful_active_health_check_uneject_host = Some(BoolValue { value: false });
        });
    }));
    let outlier = cluster.outlier_detection.unwrap();
    assert_eq!((outlier.consecutive_5xx, outlier.consecutive_gateway_failure), (None, Some(3)));
    assert_eq!(outlier.max_ejection_time, Duration::from_secs(400), "not below the base");
    assert_eq!(outlier.max_ejection_time_jitter, Duration::from_secs(7));
    assert!(outlier.always_eject_one_host && outlier.split_local_origin && !outlier.health_check_unejects);
    assert_eq!(outlier.consecutive_local_origin_failure, Some(2));
    let enforced = (
        outlier.enforcing_consecutive_local_origin_failure,
        outlier.enforcing_local_origin_success_rate,
        outlier.enforcing_failure_percentage_local_origin,
    );
    assert_eq!(enforced, (100, 0, 9));
}

#[test]
fn http_options_say_protocol_and_limits() {
    let options = |config| HttpProtocolOptions {
        common_http_protocol_options: Some(CommonOptions {
            idle_timeout: seconds(9),
            max_requests_per_connection: uint(8),
            ..CommonOptions::default()
        }),
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(config),
        })),
        ..HttpProtocolOptions::default()
    };
    let key = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
    for (config, expected) in [
        (ProtocolConfig::HttpProtocolOptions(Default::default()), HttpProtocol::Http1),
        (ProtocolConfig::Http2ProtocolOptions(Default::default()), HttpProtocol::Http2),
    ] {
        let proto = with(|c| {
            c.typed_extension_protocol_options.insert(key.into(), any(&options(config)));
        });
        let (cluster, _) = accepted(&proto);
        assert_eq!(cluster.http_protocol, Some(expected));
        assert_eq!(cluster.idle_timeout, Duration::from_secs(9));
        assert_eq!(cluster.max_requests_per_connection, Some(8));
    }
    let legacy = with(|c| c.http2_protocol_options = Some(Default::default()));
    assert_eq!(accepted(&legacy).0.http_protocol, Some(HttpProtocol::Http2));
}

fn socket(config: Any) -> Socket {
    Socket { name: "tls".into(), config_type: Some(ConfigType::TypedConfig(config)) }
}

fn instance(name: &str) -> Option<CertificateProviderPluginInstance> {
    Some(CertificateProviderPluginInstance { instance_name: name.into(), certificate_name: "cert".into() })
}

fn validation() -> CertificateValidationContext {
    CertificateValidationContext {
        ca_certificate_provider_instance: instance("default"),
        match_subject_alt_names: vec![StringMatcher {
            match_pattern: Some(MatchPattern::Exact("spiffe://a/b".into())),
            ignore_case: false,
        }],
        ..CertificateValidationContext::default()
    }
}

/// A TLS cluster made of two contexts.
fn tls(common: CommonTlsContext, validation: CertificateValidationContext) -> Proto {
    let common = CommonTlsContext {
        validation_context_type: Some(ValidationContextType::ValidationContext(validation)),
        ..common
    };
    let context = UpstreamTlsContext { common_tls_context: Some(common), sni: "sni".into(), ..Default::default() };
    with(|c| c.transport_socket = Some(socket(any(&context))))
}

fn identity() -> CommonTlsContext {
    CommonTlsContext { tls_certificate_provider_instance: instance("default"), ..CommonTlsContext::default() }
}

fn upstream(proto: &Proto) -> UpstreamTls {
    match accepted(proto).0.transport_socket {
        TransportSocket::Tls(tls) => UpstreamTls::clone(&tls),
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_not_honoured_is_noted() {
    let proto = with(|c| {
        c.filters = vec![Default::default()];
        c.upstream_bind_config = Some(Default::default());
        c.outlier_detection = outlier(|o| o.detect_degraded_hosts = Some(BoolValue { value: true }));
    });
    assert_eq!(
        note_paths(&accepted(&proto).1),
        ["outlier_detection.detect_degraded_hosts", "upstream_bind_config", "filters"]
    );
}
