use super::*;
use http::HeaderValue;
use mesh_xds::resource::{ClusterSpecifier, MaxStreamDuration};

const S: fn(u64) -> Duration = Duration::from_secs;

fn forward(timeout: Option<u64>, max: Option<u64>, header_max: Option<u64>) -> Forward {
    Forward {
        timeout: timeout.map(S),
        max_stream_duration: MaxStreamDuration {
            max_stream_duration: max.map(S),
            grpc_timeout_header_max: header_max.map(S),
            ..MaxStreamDuration::default()
        },
        ..Forward::to(ClusterSpecifier::Cluster("c".into()))
    }
}

fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
    pairs.iter().map(|(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v))).collect()
}

fn limit(rules: &Rules, pairs: &[(&'static str, &'static str)]) -> Option<(u64, Source)> {
    let now = Instant::now();
    rules.deadline(now, &headers(pairs)).map(|d| {
        assert_eq!(d.at, now + d.limit);
        (d.limit.as_secs(), d.source)
    })
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");

#[test]
fn grpc_takes_the_first_of_header_max_route_and_listener_and_zero_is_none() {
    let config =
        |forward: Forward, listener: Option<u64>| limit(&Rules::compile(&forward, listener.map(S), Profile::Grpc), &[]);
    assert_eq!(config(forward(Some(1), None, None), None), None, "RouteAction.timeout is ignored");
    assert_eq!(config(forward(None, Some(5), Some(9)), Some(2)), Some((9, Source::GrpcTimeoutHeaderMax)));
    assert_eq!(config(forward(None, Some(5), None), Some(2)), Some((5, Source::RouteMaxStreamDuration)));
    assert_eq!(config(forward(None, None, None), Some(2)), Some((2, Source::ListenerMaxStreamDuration)));
    assert_eq!(config(forward(None, Some(5), Some(0)), Some(2)), None);
    assert_eq!(config(forward(None, Some(0), None), Some(2)), None);
}

#[test]
fn the_callers_deadline_holds_when_it_is_shorter() {
    let rules = Rules::compile(&forward(None, Some(5), None), None, Profile::Grpc);
    assert_eq!(limit(&rules, &[("grpc-timeout", "3S")]), Some((3, Source::GrpcTimeout)));
    assert_eq!(limit(&rules, &[("grpc-timeout", "1H")]), Some((5, Source::RouteMaxStreamDuration)));
    assert_eq!(limit(&rules, &[("grpc-timeout", "soon")]), Some((5, Source::RouteMaxStreamDuration)));
    assert_eq!(limit(&Rules::default(), &[("grpc-timeout", "3S")]), Some((3, Source::GrpcTimeout)));
    assert_eq!(limit(&Rules::default(), &[]), None);
}

#[test]
fn envoy_has_a_route_timeout_of_15_seconds_unless_told_otherwise() {
    let config = |forward: Forward, pairs: &[_]| limit(&Rules::compile(&forward, None, Profile::Envoy), pairs);
    assert_eq!(config(forward(None, None, None), &[]), Some((15, Source::Route)));
    assert_eq!(config(forward(Some(0), None, None), &[]), None);
    assert_eq!(config(forward(Some(7), Some(3), None), &[]), Some((3, Source::RouteMaxStreamDuration)));
    assert_eq!(config(forward(Some(0), Some(3), Some(9)), &[]), Some((3, Source::RouteMaxStreamDuration)));
    assert_eq!(config(forward(Some(0), Some(3), Some(9)), &[GRPC]), Some((9, Source::GrpcTimeoutHeaderMax)));
    assert_eq!(config(forward(Some(7), None, None), &[GRPC, ("grpc-timeout", "2S")]), Some((2, Source::GrpcTimeout)));
    assert_eq!(config(forward(Some(7), None, None), &[("grpc-timeout", "2S")]), Some((7, Source::Route)), "not gRPC");
}

#[test]
fn a_deadline_beyond_time_itself_is_none() {
    let rules = Rules::fixed(Duration::MAX);
    assert_eq!(rules.deadline(Instant::now(), &HeaderMap::new()), None);
}

#[test]
fn content_types_of_grpc_are_known() {
    for (value, grpc) in [
        ("application/grpc", true),
        ("application/grpc+proto", true),
        ("application/grpc;x=y", true),
        ("application/grpc-web", false),
        ("application/json", false),
    ] {
        assert_eq!(is_grpc(&headers(&[("content-type", value)])), grpc, "{value}");
    }
}

#[test]
fn the_server_is_told_what_is_left() {
    let now = Instant::now();
    let deadline = Deadline { at: now + S(10), limit: S(10), source: Source::GrpcTimeout };
    let written = |said: Option<&'static str>, per_try: Option<u64>, after: Duration| {
        let mut map = said.map_or_else(HeaderMap::new, |said| headers(&[("grpc-timeout", said)]));
        write_grpc_timeout(&mut map, Some(&deadline), per_try.map(S), now + after);
        map[GRPC_TIMEOUT].to_str().unwrap().to_owned()
    };
    assert_eq!(written(Some("10S"), None, Duration::from_micros(80)), "10S", "as good as new: kept");
    assert_eq!(written(Some("10S"), None, S(4)), "6000000u", "a retry has less");
    assert_eq!(written(Some("10S"), Some(2), S(1)), "2000000u", "an attempt has its own limit");
    assert_eq!(written(None, None, S(0)), "10000000u");
    assert_eq!(written(Some("9S"), None, S(0)), "10000000u");
    assert_eq!(written(Some("10S"), None, S(11)), "0n");
}

#[test]
fn without_a_limit_the_header_is_not_touched() {
    let mut map = HeaderMap::new();
    write_grpc_timeout(&mut map, None, None, Instant::now());
    assert!(map.is_empty());
}

#[test]
fn the_offset_is_taken_off_the_callers_timeout_unless_nothing_would_be_left() {
    let mut forward = forward(Some(0), None, Some(0));
    forward.max_stream_duration.grpc_timeout_header_offset = Some(S(2));
    let grpc = |timeout| [("content-type", "application/grpc"), ("grpc-timeout", timeout)];
    let envoy = Rules::compile(&forward, None, Profile::Envoy);
    assert_eq!(limit(&envoy, &grpc("5S")), Some((3, Source::GrpcTimeout)));
    assert_eq!(limit(&envoy, &grpc("2S")), Some((2, Source::GrpcTimeout)));
    let grpc_profile = Rules::compile(&forward, None, Profile::Grpc);
    assert_eq!(limit(&grpc_profile, &grpc("5S")), Some((5, Source::GrpcTimeout)));
}

#[test]
fn a_server_has_the_callers_limit_and_those_that_are_said() {
    let caller = ("grpc-timeout", "3S");
    let server = |route: Option<&Forward>, listener: Option<u64>, pairs: &[(&'static str, &'static str)]| {
        limit(&Rules::of_server(route, listener.map(S)), pairs)
    };
    assert_eq!(server(None, None, &[]), None);
    assert_eq!(server(None, None, &[caller]), None, "not of gRPC");
    assert_eq!(server(None, None, &[GRPC, caller]), Some((3, Source::GrpcTimeout)));
    assert_eq!(server(Some(&forward(None, None, None)), None, &[GRPC]), None, "nothing by default");
    assert_eq!(
        server(Some(&forward(None, None, Some(2))), None, &[GRPC, caller]),
        Some((2, Source::GrpcTimeoutHeaderMax))
    );
    assert_eq!(server(Some(&forward(None, Some(2), None)), None, &[]), Some((2, Source::RouteMaxStreamDuration)));
    assert_eq!(server(Some(&forward(Some(0), None, None)), Some(4), &[]), Some((4, Source::ListenerMaxStreamDuration)));
    assert_eq!(server(Some(&forward(Some(1), None, None)), Some(4), &[]), Some((1, Source::Route)));
}
