//! How connections are made and end.

use super::*;
use crate::resource::{ConnectionOptions, Http2Keepalive, TcpKeepalive};
use envoy_types::pb::{
    envoy::config::{
        cluster::v3::{UpstreamConnectionOptions, cluster::PreconnectPolicy},
        core::v3::{Http2ProtocolOptions, KeepaliveSettings, TcpKeepalive as ProtoTcp},
    },
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
