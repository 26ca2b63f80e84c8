//! How connections are made and end.

use super::*;
use crate::resource::{ConnectionOptions, Http2Keepalive, TcpKeepalive};
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{
            UpstreamConnectionOptions,
            cluster::{CommonLbConfig, PreconnectPolicy},
        },
        core::v3::{Http1ProtocolOptions, Http2ProtocolOptions, KeepaliveSettings, TcpKeepalive as ProtoTcp},
    },
    envoy::extensions::upstreams::http::v3::http_protocol_options::AutoHttpConfig,
    google::protobuf::DoubleValue,
};

const KEY: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn options(common: CommonOptions, http2: Http2ProtocolOptions) -> Proto {
    let options = HttpProtocolOptions {
        common_http_protocol_options: Some(common),
        upstream_protocol_options: Some(UpstreamProtocolOptions::ExplicitHttpConfig(ExplicitHttpConfig {
            protocol_config: Some(ProtocolConfig::Http2ProtocolOptions(http2)),
        })),
        ..HttpProtocolOptions::default()
    };
    with(|c| drop(c.typed_extension_protocol_options.insert(KEY.into(), any(&options))))
}

fn http2(change: impl FnOnce(&mut Http2ProtocolOptions)) -> Proto {
    let mut http2 = Http2ProtocolOptions::default();
    change(&mut http2);
    options(CommonOptions::default(), http2)
}

fn ratio(per_upstream: f64) -> Option<PreconnectPolicy> {
    Some(PreconnectPolicy {
        per_upstream_preconnect_ratio: Some(DoubleValue { value: per_upstream }),
        ..PreconnectPolicy::default()
    })
}

#[test]
fn every_option_is_read() {
    let common = CommonOptions {
        max_connection_duration: seconds(60),
        max_connection_duration_jitter: Some(Percent { value: 20.0 }),
        ..CommonOptions::default()
    };
    let http2 = Http2ProtocolOptions {
        max_concurrent_streams: uint(7),
        initial_stream_window_size: uint(65_535),
        initial_connection_window_size: uint(1 << 20),
        connection_keepalive: Some(KeepaliveSettings {
            interval: seconds(9),
            timeout: seconds(2),
            ..KeepaliveSettings::default()
        }),
        ..Http2ProtocolOptions::default()
    };
    let mut proto = options(common, http2);
    proto.close_connections_on_host_health_failure = true;
    proto.preconnect_policy = ratio(1.5);
    proto.upstream_connection_options = Some(UpstreamConnectionOptions {
        tcp_keepalive: Some(ProtoTcp {
            keepalive_probes: uint(3),
            keepalive_time: uint(30),
            keepalive_interval: uint(5),
        }),
        ..UpstreamConnectionOptions::default()
    });
    let (cluster, notes) = accepted(&proto);
    assert!(notes.is_empty(), "{notes:?}");
    let second = Duration::from_secs(1);
    let expected = ConnectionOptions {
        max_duration: Some(60 * second),
        max_duration_jitter: 20.0,
        tcp_keepalive: Some(TcpKeepalive { probes: Some(3), time: Some(30 * second), interval: Some(5 * second) }),
        http2_keepalive: Some(Http2Keepalive { interval: 9 * second, timeout: 2 * second, jitter: 15.0 }),
        max_concurrent_streams: Some(7),
        stream_window: Some(65_535),
        connection_window: Some(1 << 20),
        preconnect_ratio: 1.5,
        predictive_preconnect_ratio: 1.0,
        close_on_health_failure: true,
    };
    assert_eq!(cluster.connections, expected);
    assert_eq!(accepted(&good()).0.connections, ConnectionOptions::default());
}

#[test]
fn wrong_options_are_refused_by_their_path() {
    let inside = |field: &str| format!("typed_extension_protocol_options[\"{KEY}\"].explicit_http_config.{field}");
    let keepalive = |settings| http2(|o| o.connection_keepalive = Some(settings));
    let cases = [
        (http2(|o| o.max_concurrent_streams = uint(0)), inside("http2_protocol_options.max_concurrent_streams")),
        (
            http2(|o| o.initial_stream_window_size = uint(1)),
            inside("http2_protocol_options.initial_stream_window_size"),
        ),
        (keepalive(KeepaliveSettings::default()), inside("http2_protocol_options.connection_keepalive.timeout")),
        (with(|c| c.preconnect_policy = ratio(0.5)), "preconnect_policy.per_upstream_preconnect_ratio".to_owned()),
        (with(|c| c.preconnect_policy = ratio(3.5)), "preconnect_policy.per_upstream_preconnect_ratio".to_owned()),
    ];
    for (proto, path) in cases {
        let Err(refused) = decode(ResourceType::Cluster, &proto) else { panic!("{path} was accepted") };
        assert_eq!(refused.path, path);
    }
}

#[test]
fn what_is_not_honoured_of_connections_is_noted() {
    let mut proto = with(|c| {
        c.preconnect_policy = ratio(1.0);
        c.upstream_connection_options = Some(UpstreamConnectionOptions {
            set_local_interface_name_on_upstream_connections: true,
            ..UpstreamConnectionOptions::default()
        });
    });
    proto.preconnect_policy.as_mut().unwrap().predictive_preconnect_ratio = Some(DoubleValue { value: 2.0 });
    let (cluster, notes) = accepted(&proto);
    assert_eq!(note_paths(&notes), ["upstream_connection_options.set_local_interface_name_on_upstream_connections"]);
    let ratios = (cluster.connections.preconnect_ratio, cluster.connections.predictive_preconnect_ratio);
    assert_eq!(ratios, (1.0, 2.0));
}

#[test]
fn every_field_without_effect_is_noted_by_its_path() {
    let yes = || Some(BoolValue { value: true });
    let http1 = Http1ProtocolOptions {
        accept_http_10: true,
        header_key_format: Some(Default::default()),
        enable_trailers: true,
        send_fully_qualified_url: true,
        allow_custom_methods: true,
        ..Http1ProtocolOptions::default()
    };
    let http2 = Http2ProtocolOptions {
        stream_error_on_invalid_http_messaging: true,
        override_stream_error_on_invalid_http_message: yes(),
        max_metadata_size: Some(Default::default()),
        enable_huffman_encoding: yes(),
        max_header_field_size_kb: uint(64),
        disallow_obs_text: yes(),
        ..Http2ProtocolOptions::default()
    };
    let typed = HttpProtocolOptions {
        outlier_detection: Some(Default::default()),
        upstream_protocol_options: Some(UpstreamProtocolOptions::AutoConfig(AutoHttpConfig {
            http_protocol_options: Some(http1.clone()),
            http2_protocol_options: Some(http2),
            http3_protocol_options: Some(Default::default()),
            ..AutoHttpConfig::default()
        })),
        ..HttpProtocolOptions::default()
    };
    let (_, notes) = accepted(&with(|c| drop(c.typed_extension_protocol_options.insert(KEY.into(), any(&typed)))));
    let paths = note_paths(&notes);
    let inside =
        |path: &&str| path.strip_prefix(&format!("typed_extension_protocol_options[\"{KEY}\"].")).unwrap().to_owned();
    assert_eq!(
        paths.iter().map(inside).collect::<Vec<_>>(),
        [
            "outlier_detection",
            "auto_config.http3_protocol_options",
            "auto_config.http_protocol_options.accept_http_10",
            "auto_config.http_protocol_options.header_key_format",
            "auto_config.http_protocol_options.enable_trailers",
            "auto_config.http_protocol_options.send_fully_qualified_url",
            "auto_config.http2_protocol_options.stream_error_on_invalid_http_messaging",
            "auto_config.http2_protocol_options.override_stream_error_on_invalid_http_message",
            "auto_config.http2_protocol_options.max_metadata_size",
            "auto_config.http2_protocol_options.enable_huffman_encoding",
            "auto_config.http2_protocol_options.max_header_field_size_kb",
            "auto_config.http2_protocol_options.disallow_obs_text",
        ]
    );

    let high = Thresholds { priority: 1, max_connections: uint(9), ..Thresholds::default() };
    let more = Thresholds { max_connections: uint(2), max_requests: uint(7), ..Thresholds::default() };
    let (cluster, notes) = accepted(&with(|c| {
        c.common_lb_config = Some(CommonLbConfig { update_merge_window: seconds(3), ..CommonLbConfig::default() });
        let mut breakers = thresholds(|t| {
            t.retry_budget = Some(RetryBudget { budget_interval: seconds(1), ..RetryBudget::default() });
        });
        breakers.as_mut().unwrap().per_host_thresholds = vec![high, more];
        c.circuit_breakers = breakers;
        c.http_protocol_options = Some(http1);
        c.queuing_policies = Some(Default::default());
        c.stats_matcher = Some(Default::default());
        c.protocol_selection = 1;
        c.per_connection_buffer_high_watermark_timeout = seconds(1);
    }));
    assert_eq!(
        note_paths(&notes),
        [
            "common_lb_config.update_merge_window",
            "circuit_breakers.thresholds[0].retry_budget.budget_interval",
            "circuit_breakers.per_host_thresholds[0].priority",
            "circuit_breakers.per_host_thresholds[1].max_requests",
            "http_protocol_options.accept_http_10",
            "http_protocol_options.header_key_format",
            "http_protocol_options.enable_trailers",
            "http_protocol_options.send_fully_qualified_url",
            "queuing_policies",
            "stats_matcher",
            "protocol_selection",
            "per_connection_buffer_high_watermark_timeout",
        ]
    );
    assert_eq!(cluster.circuit_breakers.max_connections_per_host, Some(2));
    let none = CommonLbConfig { update_merge_window: seconds(0), ..CommonLbConfig::default() };
    assert_eq!(accepted(&with(|c| c.common_lb_config = Some(none))).1, []);
}
