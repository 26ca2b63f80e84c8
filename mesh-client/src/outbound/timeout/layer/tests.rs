use super::*;
use crate::outbound::testing::{Script, Strict};
use bytes::Bytes;
use http::HeaderValue;
use http_body_util::{BodyExt, Full, StreamBody};
use std::convert::Infallible;
use tower::ServiceExt;

fn request() -> Request<Full<Bytes>> {
    Request::new(Full::from("x"))
}

fn layer() -> TimeoutLayer {
    TimeoutLayer::new(Duration::from_secs(2))
}

#[tokio::test(start_paused = true)]
async fn a_call_without_an_answer_ends_at_its_deadline() {
    let script = Script::default();
    script.push_silence();
    let start = Instant::now();
    let error = layer().layer(Strict::new(&script)).oneshot(request()).await.unwrap_err();
    assert_eq!(start.elapsed().as_secs(), 2);
    assert_eq!(error.downcast::<Elapsed>().unwrap().limit(), Duration::from_secs(2));
}

#[tokio::test(start_paused = true)]
async fn an_answer_in_time_is_passed_on() {
    let response = layer().layer(Strict::new(&Script::default())).oneshot(request()).await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "done");
}

#[tokio::test(start_paused = true)]
async fn a_body_that_never_ends_is_cut_at_the_deadline() {
    let tick = |n: u64| async move {
        tokio::time::sleep(Duration::from_millis(900)).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from("."))), n + 1))
    };
    let client = layer().layer(tower::service_fn(|_: Request<()>| async move {
        Ok::<_, Infallible>(Response::new(StreamBody::new(Box::pin(futures::stream::unfold(0, tick)))))
    }));
    let mut body = client.oneshot(Request::new(())).await.unwrap().into_body();
    assert!(body.frame().await.unwrap().is_ok());
    assert!(body.frame().await.unwrap().is_ok());
    assert!(body.frame().await.unwrap().unwrap_err().is::<Elapsed>());
}

#[tokio::test(start_paused = true)]
async fn a_body_that_always_has_more_does_not_outlive_the_deadline() {
    let client = layer().layer(tower::service_fn(|_: Request<()>| async {
        let frame = || Ok::<_, Infallible>(Frame::data(Bytes::from(".")));
        Ok::<_, Infallible>(Response::new(StreamBody::new(futures::stream::repeat_with(frame))))
    }));
    let mut body = client.oneshot(Request::new(())).await.unwrap().into_body();
    assert!(body.frame().await.unwrap().is_ok());
    tokio::time::advance(Duration::from_secs(2)).await;
    assert!(body.frame().await.unwrap().is_err());
}

#[tokio::test(start_paused = true)]
async fn a_grpc_callers_shorter_deadline_holds_and_the_server_is_told() {
    let call = |timeout: Option<&'static str>| async move {
        let script = Script::default();
        let mut call = request();
        call.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
        if let Some(timeout) = timeout {
            call.headers_mut().insert("grpc-timeout", HeaderValue::from_static(timeout));
        }
        layer().layer(Strict::new(&script)).oneshot(call).await.unwrap();
        script.seen()[0].0["grpc-timeout"].to_str().unwrap().to_owned()
    };
    assert_eq!(call(Some("500m")).await, "500m");
    assert_eq!(call(Some("1H")).await, "2000000u");
    assert_eq!(call(None).await, "2000000u");
}

#[tokio::test]
async fn plain_http_is_told_nothing() {
    let script = Script::default();
    layer().layer(Strict::new(&script)).oneshot(request()).await.unwrap();
    assert!(script.seen()[0].0.is_empty());
}
