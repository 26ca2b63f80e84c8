//! Active health checks.

use super::{Decoder, Valid, wire::Fields};
use crate::resource::{
    EndpointHealthCheck, GrpcHealthCheck, HealthCheck, HealthChecker, HttpHealthCheck, TcpHealthCheck,
};
use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            HeaderValueOption, HealthCheck as Proto, RequestMethod,
            health_check::{
                GrpcHealthCheck as ProtoGrpc, HealthChecker as ProtoChecker, HttpHealthCheck as ProtoHttp, Payload,
                TcpHealthCheck as ProtoTcp, payload::Payload as Content,
            },
        },
        r#type::v3::{CodecClientType, Int64Range},
    },
    google::protobuf::UInt32Value,
};
use http::{HeaderName, HeaderValue, Method};
use std::{ops::Range, sync::Arc, time::Duration};

/// Envoy's default, in bytes.
const RESPONSE_BUFFER: u64 = 1024;

impl Decoder<'_> {
    /// Envoy takes one check per cluster.
    pub(super) fn health_checks(&mut self, protos: Vec<Proto>) -> Valid<Option<Arc<HealthCheck>>> {
        if protos.len() > 1 {
            return Err(self.invalid_at("health_checks", "more than one is not supported"));
        }
        match protos.into_iter().next() {
            None => Ok(None),
            Some(proto) => self.at_index("health_checks", 0, |cx| cx.health_check(proto)),
        }
    }

    fn health_check(&mut self, proto: Proto) -> Valid<Option<Arc<HealthCheck>>> {
        let required = |cx: &mut Self, field, value| match cx.positive(field, value)? {
            Some(duration) => Ok(duration),
            None => Err(cx.invalid_at(field, "is missing")),
        };
        let threshold = |cx: &mut Self, field, value: Option<UInt32Value>| match value.map(|value| value.value) {
            Some(0) => Err(cx.invalid_at(field, "must be greater than zero")),
            Some(threshold) => Ok(threshold),
            None => Err(cx.invalid_at(field, "is missing")),
        };
        self.ignored(&[
            ("event_log_path", !proto.event_log_path.is_empty()),
            ("event_logger", !proto.event_logger.is_empty()),
            ("event_service", proto.event_service.is_some()),
            ("tls_options", proto.tls_options.is_some()),
            ("transport_socket_match_criteria", proto.transport_socket_match_criteria.is_some()),
        ]);
        let timeout = required(self, "timeout", proto.timeout)?;
        let interval = required(self, "interval", proto.interval)?;
        let unhealthy_threshold = threshold(self, "unhealthy_threshold", proto.unhealthy_threshold)?;
        let healthy_threshold = threshold(self, "healthy_threshold", proto.healthy_threshold)?;
        let alt_port = match proto.alt_port.map(|port| u16::try_from(port.value)) {
            Some(Err(_)) => return Err(self.invalid_at("alt_port", "is out of range")),
            port => port.and_then(Result::ok).filter(|port| *port != 0),
        };
        let checker = match proto.health_checker {
            Some(ProtoChecker::HttpHealthCheck(http)) => {
                HealthChecker::Http(self.at("http_health_check", |cx| cx.http_health_check(http))?)
            }
            Some(ProtoChecker::GrpcHealthCheck(grpc)) => {
                HealthChecker::Grpc(self.at("grpc_health_check", |cx| cx.grpc_health_check(grpc))?)
            }
            Some(ProtoChecker::TcpHealthCheck(tcp)) => {
                HealthChecker::Tcp(self.at("tcp_health_check", |cx| cx.tcp_health_check(tcp))?)
            }
            Some(ProtoChecker::CustomHealthCheck(custom)) => {
                self.note("custom_health_check", format!("\"{}\" is not supported, ignored", custom.name));
                return Ok(None);
            }
            None => return Err(self.invalid("has no health_checker")),
        };
        Ok(Some(Arc::new(HealthCheck {
            initial_jitter: self.duration("initial_jitter", proto.initial_jitter)?.unwrap_or_default(),
            interval_jitter: self.duration("interval_jitter", proto.interval_jitter)?.unwrap_or_default(),
            interval_jitter_percent: proto.interval_jitter_percent,
            alt_port,
            reuse_connection: proto.reuse_connection.is_none_or(|reuse| reuse.value),
            no_traffic_interval: self
                .positive("no_traffic_interval", proto.no_traffic_interval)?
                .unwrap_or(Duration::from_secs(60)),
            no_traffic_healthy_interval: self
                .positive("no_traffic_healthy_interval", proto.no_traffic_healthy_interval)?,
            unhealthy_interval: self.positive("unhealthy_interval", proto.unhealthy_interval)?,
            unhealthy_edge_interval: self.positive("unhealthy_edge_interval", proto.unhealthy_edge_interval)?,
            healthy_edge_interval: self.positive("healthy_edge_interval", proto.healthy_edge_interval)?,
            always_log_failures: proto.always_log_health_check_failures,
            always_log_successes: proto.always_log_health_check_success,
            timeout,
            interval,
            unhealthy_threshold,
            healthy_threshold,
            ..HealthCheck::new(checker)
        })))
    }

    fn http_health_check(&mut self, proto: ProtoHttp) -> Valid<HttpHealthCheck> {
        self.ignored(&[("send", proto.send.is_some())]);
        if !proto.path.starts_with('/') || proto.path.parse::<http::uri::PathAndQuery>().is_err() {
            return Err(self.invalid_at("path", format!("\"{}\" is no path", proto.path)));
        }
        let method = match RequestMethod::try_from(proto.method) {
            Ok(RequestMethod::MethodUnspecified | RequestMethod::Get) => Method::GET,
            Ok(RequestMethod::Connect) | Err(_) => return Err(self.invalid_at("method", "not supported")),
            Ok(RequestMethod::Head) => Method::HEAD,
            Ok(RequestMethod::Post) => Method::POST,
            Ok(RequestMethod::Put) => Method::PUT,
            Ok(RequestMethod::Delete) => Method::DELETE,
            Ok(RequestMethod::Options) => Method::OPTIONS,
            Ok(RequestMethod::Trace) => Method::TRACE,
            Ok(RequestMethod::Patch) => Method::PATCH,
        };
        let http2 = match CodecClientType::try_from(proto.codec_client_type) {
            Ok(CodecClientType::Http1) => false,
            Ok(CodecClientType::Http2) => true,
            _ => return Err(self.invalid_at("codec_client_type", "not supported: HTTP1 and HTTP2 are")),
        };
        let service_name = match proto.service_name_matcher {
            Some(matcher) => Some(self.at("service_name_matcher", |cx| cx.string_matcher(matcher))?),
            None => None,
        };
        // What is added is removed again where both are asked for, as in Envoy.
        let mut headers = self.headers_to_add("request_headers_to_add", proto.request_headers_to_add)?;
        headers.retain(|(name, _)| {
            !proto.request_headers_to_remove.iter().any(|gone| gone.eq_ignore_ascii_case(name.as_str()))
        });
        Ok(HttpHealthCheck {
            host: (!proto.host.is_empty()).then_some(proto.host),
            path: proto.path,
            method,
            headers,
            expected_statuses: self.statuses("expected_statuses", &proto.expected_statuses)?,
            retriable_statuses: self.statuses("retriable_statuses", &proto.retriable_statuses)?,
            http2,
            service_name,
            receive: self.payloads("receive", proto.receive)?,
            response_buffer_size: proto.response_buffer_size.map_or(RESPONSE_BUFFER, |size| size.value),
        })
    }

    fn grpc_health_check(&mut self, proto: ProtoGrpc) -> Valid<GrpcHealthCheck> {
        Ok(GrpcHealthCheck {
            service: proto.service_name,
            authority: (!proto.authority.is_empty()).then_some(proto.authority),
            metadata: self.headers_to_add("initial_metadata", proto.initial_metadata)?,
        })
    }

    fn tcp_health_check(&mut self, proto: ProtoTcp) -> Valid<TcpHealthCheck> {
        self.ignored(&[("proxy_protocol_config", proto.proxy_protocol_config.is_some())]);
        let send = self.payloads("send", proto.send.into_iter().collect())?;
        Ok(TcpHealthCheck {
            send: send.into_iter().next().unwrap_or_default(),
            receive: self.payloads("receive", proto.receive)?,
        })
    }

    /// `text` is hexadecimal, as in Envoy.
    fn payloads(&mut self, field: &'static str, payloads: Vec<Payload>) -> Valid<Vec<Vec<u8>>> {
        let mut decoded = Vec::with_capacity(payloads.len());
        for (index, payload) in payloads.into_iter().enumerate() {
            let content = match payload.payload {
                Some(Content::Text(text)) => hexadecimal(&text),
                Some(Content::Binary(bytes)) => Some(bytes),
                None => None,
            };
            match content.filter(|content| !content.is_empty()) {
                Some(content) => decoded.push(content),
                None => return self.at_index(field, index, |cx| Err(cx.invalid("is no hexadecimal text, or empty"))),
            }
        }
        Ok(decoded)
    }

    fn statuses(&mut self, field: &'static str, ranges: &[Int64Range]) -> Valid<Vec<Range<u16>>> {
        let range = |range: &Int64Range| {
            let (start, end) = (u16::try_from(range.start).ok()?, u16::try_from(range.end).ok()?);
            (start >= 100 && end <= 600 && start < end).then_some(start..end)
        };
        match ranges.iter().map(range).collect() {
            Some(ranges) => Ok(ranges),
            None => Err(self.invalid_at(field, "must be half-open ranges within 100..600")),
        }
    }

    fn headers_to_add(
        &mut self,
        field: &'static str,
        options: Vec<HeaderValueOption>,
    ) -> Valid<Vec<(HeaderName, HeaderValue)>> {
        let mut headers = Vec::with_capacity(options.len());
        for (index, option) in options.into_iter().enumerate() {
            let header = option.header.unwrap_or_default();
            let value = if header.raw_value.is_empty() { header.value.into_bytes() } else { header.raw_value };
            match (HeaderName::from_bytes(header.key.as_bytes()), HeaderValue::from_bytes(&value)) {
                (Ok(name), Ok(value)) => headers.push((name, value)),
                _ => return self.at_index(field, index, |cx| Err(cx.invalid_at("header", "is no legal header"))),
            }
        }
        Ok(headers)
    }

    /// `Endpoint.health_check_config`, from the wire.
    pub(super) fn endpoint_health_check(&mut self, body: &[u8]) -> Valid<Option<Arc<EndpointHealthCheck>>> {
        let mut config = EndpointHealthCheck::default();
        for field in Fields::of(body) {
            match self.wire(field)? {
                (1, value) => {
                    let port = self.wire(value.uint32())?;
                    match u16::try_from(port) {
                        Ok(port) => config.port = Some(port).filter(|port| *port != 0),
                        Err(_) => return Err(self.invalid_at("port_value", format!("{port} is out of range"))),
                    }
                }
                (2, value) => config.hostname = self.wire(value.text())?.into(),
                (3, value) => {
                    let body = self.wire(value.bytes())?;
                    config.address = Some(self.address(body)?);
                }
                (4, value) => config.disabled = self.wire(value.uint32())? != 0,
                _ => {}
            }
        }
        Ok((config != EndpointHealthCheck::default()).then(|| Arc::new(config)))
    }
}

fn hexadecimal(text: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> = text.chars().map(|c| u8::try_from(c.to_digit(16)?).ok()).collect();
    let digits = digits.filter(|digits| digits.len() % 2 == 0)?;
    Some(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}
