use super::*;
use crate::outbound::testing::{Script, Strict};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use tower::{Layer, Service, ServiceExt};

fn request() -> Request<Full<Bytes>> {
    Request::new(Full::default())
}

async fn ready(client: &mut CircuitBreaker<Strict>) -> &mut CircuitBreaker<Strict> {
    ServiceExt::<Request<Full<Bytes>>>::ready(client).await.unwrap()
}

#[tokio::test]
async fn the_request_over_the_limit_is_refused_at_once_and_never_reaches_the_service() {
    let script = Script::default();
    let layer = CircuitBreakerLayer::new(Limits::max_requests(2));
    let mut client = layer.layer(Strict::new(&script));
    let first = ready(&mut client).await.call(request());
    let _second = ready(&mut client).await.call(request());
    let refused = ready(&mut client).await.call(request()).await.unwrap_err();
    assert_eq!(refused.downcast::<Overloaded>().unwrap().to_string(), "max_requests limit of 2 reached");
    assert_eq!(script.calls(), 2);
    drop(first);
    ready(&mut client).await.call(request()).await.unwrap();
}

#[tokio::test]
async fn a_request_counts_until_its_body_ended_or_was_dropped() {
    let script = Script::default();
    let layer = CircuitBreakerLayer::new(Limits::max_requests(10));
    let client = layer.layer(Strict::new(&script));
    let mut ended = client.clone().oneshot(request()).await.unwrap();
    let dropped = client.clone().oneshot(request()).await.unwrap();
    assert_eq!(layer.in_flight(), 2);
    while ended.body_mut().frame().await.is_some() {}
    assert_eq!(layer.in_flight(), 1);
    drop(dropped);
    assert_eq!(layer.in_flight(), 0);
    script.push_error("cut");
    client.oneshot(request()).await.unwrap_err();
    assert_eq!(layer.in_flight(), 0);
}
