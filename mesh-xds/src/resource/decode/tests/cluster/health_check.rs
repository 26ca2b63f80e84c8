//! Active health checks.

use super::*;
use crate::resource::{HealthCheck as Decoded, HealthChecker};
use envoy_types::pb::envoy::{
    config::core::v3::{
        HeaderValue, HeaderValueOption, HealthCheck, RequestMethod,
        health_check::{
            CustomHealthCheck, GrpcHealthCheck, HealthChecker as Checker, HttpHealthCheck, Payload, TcpHealthCheck,
            payload::Payload as Content,
        },
    },
    r#type::v3::{CodecClientType, Int64Range},
};

fn check(checker: Checker) -> HealthCheck {
    HealthCheck {
        timeout: seconds(1),
        interval: seconds(5),
        unhealthy_threshold: uint(3),
        healthy_threshold: uint(2),
        health_checker: Some(checker),
        ..HealthCheck::default()
    }
}

fn http(path: &str) -> HttpHealthCheck {
    HttpHealthCheck { path: path.into(), ..HttpHealthCheck::default() }
}

fn checked(check: HealthCheck) -> Proto {
    with(|c| c.health_checks = vec![check])
}

fn text(text: &str) -> Payload {
    Payload { payload: Some(Content::Text(text.into())) }
}

fn decoded(check: HealthCheck) -> Decoded {
    let (cluster, notes) = accepted(&checked(check));
    assert!(notes.is_empty(), "{notes:?}");
    Decoded::clone(&cluster.health_check.expect("a check"))
}

#[test]
fn defaults_are_those_of_envoy() {
    assert_eq!(decoded(check(Checker::HttpHealthCheck(http("/healthz")))), Decoded::http("/healthz"));
    assert_eq!(decoded(check(Checker::GrpcHealthCheck(GrpcHealthCheck::default()))), Decoded::grpc(""));
    assert_eq!(decoded(check(Checker::TcpHealthCheck(TcpHealthCheck::default()))), Decoded::tcp());
    assert_eq!(accepted(&good()).0.health_check, None);
}

#[test]
fn http_checks_are_read_whole() {
    let header = HeaderValue { key: "x-check".into(), value: "yes".into(), ..HeaderValue::default() };
    let proto = HttpHealthCheck {
        host: "h".into(),
        method: RequestMethod::Head.into(),
        codec_client_type: CodecClientType::Http2.into(),
        request_headers_to_add: vec![HeaderValueOption { header: Some(header), ..HeaderValueOption::default() }],
        expected_statuses: vec![Int64Range { start: 200, end: 300 }],
        retriable_statuses: vec![Int64Range { start: 503, end: 504 }],
        receive: vec![text("6f6B")],
        ..http("/x?y")
    };
    let HealthChecker::Http(http) = decoded(check(Checker::HttpHealthCheck(proto))).checker else { panic!() };
    assert_eq!((http.host.as_deref(), http.path.as_str(), http.method), (Some("h"), "/x?y", http::Method::HEAD));
    assert!(http.http2 && http.headers[0].1 == "yes");
    assert_eq!((http.expected_statuses[0].clone(), http.retriable_statuses[0].clone()), (200..300, 503..504));
    assert_eq!(http.receive, [b"ok".to_vec()]);
}

#[test]
fn wrong_checks_are_refused_by_their_path() {
    let good = || check(Checker::HttpHealthCheck(http("/")));
    let statuses = |start, end| {
        check(Checker::HttpHealthCheck(HttpHealthCheck {
            expected_statuses: vec![Int64Range { start, end }],
            ..http("/")
        }))
    };
    let tcp = TcpHealthCheck { receive: vec![text("abc")], ..TcpHealthCheck::default() };
    let cases = [
        (HealthCheck { timeout: None, ..good() }, "timeout"),
        (HealthCheck { interval: seconds(0), ..good() }, "interval"),
        (HealthCheck { unhealthy_threshold: None, ..good() }, "unhealthy_threshold"),
        (HealthCheck { healthy_threshold: uint(0), ..good() }, "healthy_threshold"),
        (HealthCheck { alt_port: uint(70_000), ..good() }, "alt_port"),
        (check(Checker::HttpHealthCheck(http("healthz"))), "http_health_check.path"),
        (statuses(99, 200), "http_health_check.expected_statuses"),
        (statuses(300, 300), "http_health_check.expected_statuses"),
        (check(Checker::TcpHealthCheck(tcp)), "tcp_health_check.receive[0]"),
    ];
    for (check, path) in cases {
        let refused = decode(ResourceType::Cluster, &checked(check)).expect_err("refused");
        assert_eq!(refused.path, format!("health_checks[0].{path}"));
    }
    let two = with(|c| c.health_checks = vec![good(), good()]);
    assert_eq!(decode(ResourceType::Cluster, &two).expect_err("refused").path, "health_checks");
}

#[test]
fn a_custom_check_is_noted() {
    let custom = CustomHealthCheck { name: "envoy.health_checkers.redis".into(), ..CustomHealthCheck::default() };
    let (cluster, notes) = accepted(&checked(check(Checker::CustomHealthCheck(custom))));
    assert_eq!(cluster.health_check, None);
    assert_eq!(note_paths(&notes), ["health_checks[0].custom_health_check"]);
}
