//! What a cluster says of its connections: `HttpProtocolOptions`, `upstream_connection_options`, `preconnect_policy`.

use super::{Decoder, Valid, tls::ServerName};
use crate::resource::{ConnectionOptions, Http2Keepalive, HttpProtocol, TcpKeepalive};
use envoy_types::pb::{
    envoy::{
        config::{
            cluster::v3::{Cluster as Proto, UpstreamConnectionOptions, cluster::PreconnectPolicy},
            core::v3::{
                Http1ProtocolOptions, Http2ProtocolOptions, HttpProtocolOptions as CommonOptions, KeepaliveSettings,
                UpstreamHttpProtocolOptions,
            },
        },
        extensions::upstreams::http::v3::{
            HttpProtocolOptions,
            http_protocol_options::{UpstreamProtocolOptions, explicit_http_config::ProtocolConfig},
        },
        r#type::v3::Percent,
    },
    google::protobuf::{DoubleValue, UInt32Value},
};
use std::time::Duration;

const HTTP_OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";
/// Envoy's, in percent.
const KEEPALIVE_JITTER: f64 = 15.0;
const WINDOWS: std::ops::RangeInclusive<u32> = 65_535..=(1 << 31) - 1;

/// All of it.
pub(super) struct ProtocolOptions {
    pub(super) protocol: Option<HttpProtocol>,
    pub(super) idle_timeout: Option<Duration>,
    pub(super) max_requests_per_connection: Option<u32>,
    pub(super) connections: ConnectionOptions,
    /// Of its TLS.
    pub(super) server_name: ServerName,
}

impl Decoder<'_> {
    /// `typed_extension_protocol_options` win over the deprecated fields of the cluster.
    pub(super) fn protocol_options(&mut self, proto: &mut Proto) -> Valid<ProtocolOptions> {
        let mut options = ProtocolOptions {
            protocol: None,
            idle_timeout: None,
            max_requests_per_connection: proto.max_requests_per_connection.map(|value| value.value),
            connections: ConnectionOptions {
                close_on_health_failure: proto.close_connections_on_host_health_failure,
                ..ConnectionOptions::default()
            },
            server_name: ServerName::default(),
        };
        if let Some(named) = proto.upstream_http_protocol_options.take() {
            options.server_name = self.at("upstream_http_protocol_options", |cx| cx.upstream_name(&named))?;
        }
        if let Some(http2) = proto.http2_protocol_options.take() {
            options.protocol = Some(HttpProtocol::Http2);
            self.at("http2_protocol_options", |cx| cx.http2_options(http2, &mut options.connections))?;
        }
        if let Some(http1) = proto.http_protocol_options.take() {
            self.at("http_protocol_options", |cx| cx.http1_options(&http1))?;
        }
        if let Some(common) = proto.common_http_protocol_options.take() {
            self.at("common_http_protocol_options", |cx| cx.common_options(common, &mut options))?;
        }
        if let Some(any) = proto.typed_extension_protocol_options.remove(HTTP_OPTIONS) {
            self.at_key("typed_extension_protocol_options", HTTP_OPTIONS, |cx| {
                let typed: HttpProtocolOptions = cx.any(&any)?;
                cx.typed_options(typed, &mut options)
            })?;
        }
        for (name, _) in proto.typed_extension_protocol_options.drain() {
            self.note("typed_extension_protocol_options", format!("unknown \"{name}\", ignored"));
        }
        if let Some(upstream) = proto.upstream_connection_options.take() {
            self.at("upstream_connection_options", |cx| {
                cx.upstream_options(upstream, &mut options.connections);
                Ok(())
            })?;
        }
        if let Some(preconnect) = proto.preconnect_policy.take() {
            let ratios = self.at("preconnect_policy", |cx| cx.preconnect(&preconnect))?;
            (options.connections.preconnect_ratio, options.connections.predictive_preconnect_ratio) = ratios;
        }
        // Zero is Envoy's word for unlimited.
        options.max_requests_per_connection = options.max_requests_per_connection.filter(|max| *max > 0);
        Ok(options)
    }

    fn typed_options(&mut self, typed: HttpProtocolOptions, options: &mut ProtocolOptions) -> Valid<()> {
        self.ignored(&[
            ("http_filters", typed.http_filters.len() > 1),
            ("retry_policy", typed.retry_policy.is_some()),
            ("hash_policy", !typed.hash_policy.is_empty()),
            ("request_mirror_policies", !typed.request_mirror_policies.is_empty()),
            ("header_validation_config", typed.header_validation_config.is_some()),
            ("outlier_detection", typed.outlier_detection.is_some()),
        ]);
        if let Some(named) = typed.upstream_http_protocol_options {
            options.server_name = self.at("upstream_http_protocol_options", |cx| cx.upstream_name(&named))?;
        }
        match typed.upstream_protocol_options {
            Some(UpstreamProtocolOptions::ExplicitHttpConfig(config)) => {
                self.at("explicit_http_config", |cx| match config.protocol_config {
                    Some(ProtocolConfig::HttpProtocolOptions(http1)) => {
                        options.protocol = Some(HttpProtocol::Http1);
                        cx.at("http_protocol_options", |cx| cx.http1_options(&http1))
                    }
                    Some(ProtocolConfig::Http2ProtocolOptions(http2)) => {
                        options.protocol = Some(HttpProtocol::Http2);
                        cx.at("http2_protocol_options", |cx| cx.http2_options(http2, &mut options.connections))
                    }
                    Some(ProtocolConfig::Http3ProtocolOptions(_)) => {
                        cx.note("http3_protocol_options", "not supported, ignored");
                        Ok(())
                    }
                    None => Err(cx.invalid("has no protocol")),
                })?;
            }
            Some(UpstreamProtocolOptions::AutoConfig(config)) => {
                self.at("auto_config", |cx| {
                    cx.ignored(&[
                        ("http3_protocol_options", config.http3_protocol_options.is_some()),
                        ("alternate_protocols_cache_options", config.alternate_protocols_cache_options.is_some()),
                    ]);
                    cx.either((config.http_protocol_options, config.http2_protocol_options), options)
                })?;
            }
            Some(UpstreamProtocolOptions::UseDownstreamProtocolConfig(config)) => {
                self.at("use_downstream_protocol_config", |cx| {
                    cx.ignored(&[("http3_protocol_options", config.http3_protocol_options.is_some())]);
                    cx.either((config.http_protocol_options, config.http2_protocol_options), options)
                })?;
            }
            None => {}
        }
        match typed.common_http_protocol_options {
            Some(common) => self.at("common_http_protocol_options", |cx| cx.common_options(common, options)),
            None => Ok(()),
        }
    }

    /// What must be verified is verified, or refused.
    fn upstream_name(&mut self, proto: &UpstreamHttpProtocolOptions) -> Valid<ServerName> {
        let by_header = !proto.override_auto_sni_header.is_empty();
        if by_header && proto.auto_san_validation {
            return Err(self.invalid_at(
                "override_auto_sni_header",
                "not supported beside auto_san_validation: a connection is not of one request",
            ));
        }
        self.ignored(&[("override_auto_sni_header", by_header)]);
        Ok(ServerName { sent: proto.auto_sni && !by_header, verified: proto.auto_san_validation })
    }

    /// The protocol is negotiated: each has its options.
    fn either(
        &mut self,
        (http1, http2): (Option<Http1ProtocolOptions>, Option<Http2ProtocolOptions>),
        options: &mut ProtocolOptions,
    ) -> Valid<()> {
        options.protocol = None;
        if let Some(http1) = http1 {
            self.at("http_protocol_options", |cx| cx.http1_options(&http1))?;
        }
        match http2 {
            Some(http2) => self.at("http2_protocol_options", |cx| cx.http2_options(http2, &mut options.connections)),
            None => Ok(()),
        }
    }

    /// None has an effect. `allow_custom_methods` is not noted: every method is allowed.
    fn http1_options(&mut self, http1: &Http1ProtocolOptions) -> Valid<()> {
        self.ignored(&[
            ("allow_absolute_url", http1.allow_absolute_url.is_some()),
            ("accept_http_10", http1.accept_http_10),
            ("default_host_for_http_10", !http1.default_host_for_http_10.is_empty()),
            ("header_key_format", http1.header_key_format.is_some()),
            ("enable_trailers", http1.enable_trailers),
            ("allow_chunked_length", http1.allow_chunked_length),
            (
                "override_stream_error_on_invalid_http_message",
                http1.override_stream_error_on_invalid_http_message.is_some(),
            ),
            ("send_fully_qualified_url", http1.send_fully_qualified_url),
            ("ignore_http_11_upgrade", !http1.ignore_http_11_upgrade.is_empty()),
        ]);
        Ok(())
    }

    fn common_options(&mut self, common: CommonOptions, options: &mut ProtocolOptions) -> Valid<()> {
        options.idle_timeout = self.duration("idle_timeout", common.idle_timeout)?;
        if let Some(max) = common.max_requests_per_connection {
            options.max_requests_per_connection = Some(max.value);
        }
        let connections = &mut options.connections;
        // Zero is Envoy's word for no limit.
        connections.max_duration = self
            .duration("max_connection_duration", common.max_connection_duration)?
            .filter(|duration| !duration.is_zero());
        connections.max_duration_jitter =
            self.share("max_connection_duration_jitter", common.max_connection_duration_jitter.as_ref(), 0.0)?;
        self.ignored(&[
            ("max_stream_duration", common.max_stream_duration.is_some()),
            ("max_headers_count", common.max_headers_count.is_some()),
            ("max_response_headers_kb", common.max_response_headers_kb.is_some()),
            ("headers_with_underscores_action", common.headers_with_underscores_action != 0),
        ]);
        Ok(())
    }

    fn http2_options(&mut self, http2: Http2ProtocolOptions, connections: &mut ConnectionOptions) -> Valid<()> {
        if let Some(max) = http2.max_concurrent_streams {
            match max.value {
                0 => return Err(self.invalid_at("max_concurrent_streams", "must be greater than zero")),
                max => connections.max_concurrent_streams = Some(max),
            }
        }
        connections.stream_window = self.window("initial_stream_window_size", http2.initial_stream_window_size)?;
        connections.connection_window =
            self.window("initial_connection_window_size", http2.initial_connection_window_size)?;
        self.ignored(&[
            ("hpack_table_size", http2.hpack_table_size.is_some()),
            ("allow_connect", http2.allow_connect),
            ("allow_metadata", http2.allow_metadata),
            ("custom_settings_parameters", !http2.custom_settings_parameters.is_empty()),
            ("stream_error_on_invalid_http_messaging", http2.stream_error_on_invalid_http_messaging),
            (
                "override_stream_error_on_invalid_http_message",
                http2.override_stream_error_on_invalid_http_message.is_some(),
            ),
            ("max_metadata_size", http2.max_metadata_size.is_some()),
            ("enable_huffman_encoding", http2.enable_huffman_encoding.is_some()),
            ("max_header_field_size_kb", http2.max_header_field_size_kb.is_some()),
            ("disallow_obs_text", http2.disallow_obs_text.is_some()),
        ]);
        if let Some(keepalive) = http2.connection_keepalive {
            connections.http2_keepalive = self.at("connection_keepalive", |cx| cx.keepalive(keepalive))?;
        }
        Ok(())
    }

    fn window(&mut self, field: &'static str, size: Option<UInt32Value>) -> Valid<Option<u32>> {
        match size.map(|size| size.value) {
            Some(size) if !WINDOWS.contains(&size) => {
                Err(self.invalid_at(field, format!("{size} is not between 65535 and 2147483647")))
            }
            size => Ok(size),
        }
    }

    /// Without an interval no PING is sent by the clock.
    fn keepalive(&mut self, proto: KeepaliveSettings) -> Valid<Option<Http2Keepalive>> {
        self.ignored(&[("connection_idle_interval", proto.connection_idle_interval.is_some())]);
        let Some(timeout) = self.positive("timeout", proto.timeout)? else {
            return Err(self.invalid_at("timeout", "is missing"));
        };
        let jitter = self.share("interval_jitter", proto.interval_jitter.as_ref(), KEEPALIVE_JITTER)?;
        let interval = self.positive("interval", proto.interval)?;
        Ok(interval.map(|interval| Http2Keepalive { interval, timeout, jitter }))
    }

    fn upstream_options(&mut self, upstream: UpstreamConnectionOptions, connections: &mut ConnectionOptions) {
        self.ignored(&[
            (
                "set_local_interface_name_on_upstream_connections",
                upstream.set_local_interface_name_on_upstream_connections,
            ),
            ("happy_eyeballs_config", upstream.happy_eyeballs_config.is_some()),
        ]);
        let seconds = |value: Option<UInt32Value>| value.map(|value| Duration::from_secs(value.value.into()));
        connections.tcp_keepalive = upstream.tcp_keepalive.map(|keepalive| TcpKeepalive {
            probes: keepalive.keepalive_probes.map(|probes| probes.value),
            time: seconds(keepalive.keepalive_time),
            interval: seconds(keepalive.keepalive_interval),
        });
    }

    /// By endpoint, and of the whole cluster.
    fn preconnect(&mut self, policy: &PreconnectPolicy) -> Valid<(f64, f64)> {
        let ratio = |cx: &mut Self, field, value: Option<&DoubleValue>| match value.map_or(1.0, |value| value.value) {
            ratio if (1.0..=3.0).contains(&ratio) => Ok(ratio),
            other => Err(cx.invalid_at(field, format!("{other} is not between 1 and 3"))),
        };
        let predictive = ratio(self, "predictive_preconnect_ratio", policy.predictive_preconnect_ratio.as_ref())?;
        self.ignored(&[("preconnect_enabled_metadata", policy.preconnect_enabled_metadata.is_some())]);
        Ok((ratio(self, "per_upstream_preconnect_ratio", policy.per_upstream_preconnect_ratio.as_ref())?, predictive))
    }

    /// A percentage that need not be whole.
    pub(super) fn share(&mut self, field: &'static str, value: Option<&Percent>, default: f64) -> Valid<f64> {
        match value.map_or(default, |percent| percent.value) {
            percent if (0.0..=100.0).contains(&percent) => Ok(percent),
            other => Err(self.invalid_at(field, format!("{other} is not between 0 and 100"))),
        }
    }
}
