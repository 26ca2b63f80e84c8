use super::*;
use http::HeaderValue;

fn response(status: u16, pairs: &[(&'static str, &'static str)], grpc: bool) -> Response {
    let headers: HeaderMap = {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    };
    match Outcome::of_response(StatusCode::from_u16(status).unwrap(), &headers, grpc) {
        Outcome::Response(response) => response,
        Outcome::Failure(failure) => panic!("{failure:?}"),
    }
}

#[test]
fn only_a_head_that_ends_the_grpc_call_has_a_code() {
    assert_eq!(response(200, &[], true).grpc, None);
    assert_eq!(response(200, &[("grpc-status", "14")], true).grpc, Some(14));
    assert_eq!(response(200, &[("grpc-status", "0")], true).grpc, Some(0));
    assert_eq!(response(200, &[("grpc-status", "x")], true).grpc, Some(2));
    assert_eq!(response(503, &[], true).grpc, Some(14));
    assert_eq!(response(404, &[], true).grpc, Some(12));
    assert_eq!(response(503, &[("grpc-status", "13")], true).grpc, Some(13));
    assert_eq!(response(503, &[("grpc-status", "13")], false).grpc, None, "not a gRPC call");
}

#[test]
fn pushback_is_read_of_trailers_only_answers() {
    let pushback = |values: &[&'static str]| {
        let mut pairs = vec![("grpc-status", "14")];
        pairs.extend(values.iter().map(|v| ("grpc-retry-pushback-ms", *v)));
        response(200, &pairs, true).pushback
    };
    assert_eq!(pushback(&[]), Pushback::None);
    assert_eq!(pushback(&["0"]), Pushback::After(Duration::ZERO));
    assert_eq!(pushback(&["250"]), Pushback::After(Duration::from_millis(250)));
    for stop in ["-1", "", "1.5", "soon", "99999999999"] {
        assert_eq!(pushback(&[stop]), Pushback::Stop, "{stop:?}");
    }
    assert_eq!(pushback(&["1", "2"]), Pushback::Stop);
    assert_eq!(response(200, &[("grpc-retry-pushback-ms", "5")], true).pushback, Pushback::None);
}

#[test]
fn transport_errors_say_whether_the_request_can_have_been_seen() {
    let of = |kind| Failure::of_transport(&TransportError::new(kind));
    assert_eq!(of(Kind::NotSent), Failure::NeverSent);
    assert_eq!(of(Kind::GoAway), Failure::Refused);
    assert_eq!(of(Kind::RefusedStream), Failure::Refused);
    assert_eq!(of(Kind::Reset(Reason::CANCEL)), Failure::Reset(Some(Reason::CANCEL)));
    assert_eq!(of(Kind::Closed), Failure::Reset(None));
    assert_eq!(of(Kind::KeepaliveTimeout), Failure::Reset(None));
    assert_eq!(of(Kind::RequestBody), Failure::Local);
    for kind in [Kind::Io, Kind::Closed, Kind::KeepaliveTimeout] {
        let unsent = TransportError::new(kind).unprocessed();
        assert_eq!(Failure::of_transport(&unsent), Failure::NeverSent, "{kind:?}");
    }
}

#[derive(Debug, thiserror::Error)]
#[error("client error")]
struct Wrapped(#[source] crate::transport::BoxError);

#[test]
fn errors_of_other_clients_are_read_through_their_sources() {
    let of = |error: crate::transport::BoxError| match Outcome::of_error(&Wrapped(error)) {
        Outcome::Failure(failure) => failure,
        Outcome::Response(_) => panic!(),
    };
    let io = |kind: std::io::ErrorKind| of(std::io::Error::from(kind).into());
    assert_eq!(io(std::io::ErrorKind::ConnectionRefused), Failure::Connect);
    assert_eq!(io(std::io::ErrorKind::ConnectionReset), Failure::Reset(None));
    assert_eq!(of(h2::Error::from(Reason::REFUSED_STREAM).into()), Failure::Refused);
    assert_eq!(of("anything".into()), Failure::Reset(None));
    assert_eq!(of(super::super::ReplayError::TooLong.into()), Failure::Local);
    assert_eq!(of(super::super::PerTryElapsed::new(Duration::ZERO, 1).into()), Failure::PerTryTimeout);
}

#[test]
fn status_maps_agree_where_both_know_a_status() {
    for code in [7, 12, 14, 16] {
        let http = http_from_grpc(code);
        assert!(grpc_from_http(http) == code || code == 12, "{code} -> {http}");
    }
    assert_eq!(http_from_grpc(77), 500);
    assert_eq!(grpc_from_http(418), 2);
    assert_eq!(grpc_from_reset(None), 14);
    assert_eq!(grpc_from_reset(Some(Reason::CANCEL)), 1);
    assert_eq!(grpc_from_reset(Some(Reason::ENHANCE_YOUR_CALM)), 8);
    assert_eq!(grpc_from_reset(Some(Reason::INTERNAL_ERROR)), 13);
}
