use super::*;
use crate::outbound::{
    cluster::{CircuitBreakerLayer, Limits},
    retry::{Condition, Outcome, ReplayError},
    testing::{Script, Strict},
    timeout::TimeoutLayer,
};
use http::{HeaderValue, StatusCode};
use http_body_util::{BodyExt, Full};
use proptest::prelude::*;
use std::{sync::atomic::Ordering, time::Duration};
use tower::{ServiceBuilder, ServiceExt};

type Sent = Full<Bytes>;

fn request(body: &'static str) -> Request<Sent> {
    Request::post("http://upstream/").body(Full::from(body)).unwrap()
}

fn policy() -> Policy {
    Policy::http().on(Condition::Http5xx).max_retries(3).build()
}

fn bodies(script: &Script) -> Vec<Bytes> {
    script.seen().into_iter().map(|(_, body)| body).collect()
}

#[tokio::test(start_paused = true)]
async fn a_failing_answer_is_retried_with_the_same_body_until_it_succeeds() {
    let script = Script::default();
    script.push_status(503).push_error("connection reset").push_status(200);
    let response = RetryLayer::new(policy()).layer(Strict::new(&script)).oneshot(request("hello")).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(bodies(&script), ["hello", "hello", "hello"]);
    let counts: Vec<_> = script.seen().iter().map(|(h, _)| h.get("x-envoy-attempt-count").cloned()).collect();
    assert_eq!(counts, [None, Some(HeaderValue::from_static("2")), Some(HeaderValue::from_static("3"))]);
}

#[tokio::test(start_paused = true)]
async fn the_last_answer_or_error_is_the_callers() {
    let script = Script::default();
    for status in [500, 501, 502, 503] {
        script.push_status(status);
    }
    let client = RetryLayer::new(policy()).layer(Strict::new(&script));
    assert_eq!(client.clone().oneshot(request("")).await.unwrap().status(), 503);
    for n in 0..4 {
        script.push_error(format!("cut {n}"));
    }
    assert_eq!(client.oneshot(request("")).await.unwrap_err().to_string(), "cut 3");
    assert_eq!(script.calls(), 8);
}

#[tokio::test]
async fn what_the_policy_does_not_retry_is_passed_on() {
    let script = Script::default();
    script.push_status(404);
    let client = RetryLayer::new(policy()).layer(Strict::new(&script));
    let response = client.oneshot(request("x")).await.unwrap();
    assert_eq!((response.status(), script.calls()), (StatusCode::NOT_FOUND, 1));
}

#[tokio::test(start_paused = true)]
async fn a_grpc_call_is_retried_by_its_status_and_told_the_time_that_is_left() {
    let script = Script::default();
    let trailers_only = |pushback: &str| {
        Response::builder().header("grpc-status", "14").header("grpc-retry-pushback-ms", pushback).body(Full::default())
    };
    script.push(trailers_only("4000").unwrap()).push_status(200);
    let mut call = request("x");
    call.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    call.headers_mut().insert("grpc-timeout", HeaderValue::from_static("10S"));
    let start = Instant::now();
    RetryLayer::new(Policy::grpc().build()).layer(Strict::new(&script)).oneshot(call).await.unwrap();
    assert_eq!(start.elapsed().as_secs(), 4, "the server's delay");
    let seen = script.seen();
    assert_eq!(seen[0].0["grpc-timeout"], "10S");
    assert!(!seen[0].0.contains_key("grpc-previous-rpc-attempts"));
    let left = crate::outbound::timeout::parse_grpc_timeout(&seen[1].0["grpc-timeout"]).unwrap();
    assert!((5_990..=6_010).contains(&left.as_millis()), "{left:?}");
    assert_eq!(seen[1].0["grpc-previous-rpc-attempts"], "1");
}

#[tokio::test(start_paused = true)]
async fn a_grpc_call_is_not_retried_when_the_server_forbids_it() {
    let script = Script::default();
    let stop = Response::builder().header("grpc-status", "14").header("grpc-retry-pushback-ms", "-1");
    script.push(stop.body(Full::default()).unwrap());
    let mut call = request("x");
    call.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    let response = RetryLayer::new(Policy::grpc().build()).layer(Strict::new(&script)).oneshot(call).await.unwrap();
    assert_eq!((response.headers()["grpc-status"].as_bytes(), script.calls()), (&b"14"[..], 1));
}

#[tokio::test(start_paused = true)]
async fn an_attempt_that_never_answers_ends_at_its_limit() {
    let script = Script::default();
    script.push_silence().push_silence().push_status(200);
    let policy = Policy::http().on(Condition::Reset).max_retries(2).per_try_timeout(Duration::from_secs(1)).build();
    let client = RetryLayer::new(policy).layer(Strict::new(&script));
    let start = Instant::now();
    client.clone().oneshot(request("x")).await.unwrap();
    assert_eq!((start.elapsed().as_secs(), script.calls()), (2, 3));
    for _ in 0..3 {
        script.push_silence();
    }
    let error = client.oneshot(request("x")).await.unwrap_err();
    assert_eq!(error.to_string(), "attempt 3 had no response within its limit of 1s (per_try_timeout)");
}

#[tokio::test(start_paused = true)]
async fn a_body_over_the_cap_is_sent_once() {
    let script = Script::default();
    script.push_status(503);
    let layer = RetryLayer::new(policy()).replay_cap(4);
    let response = layer.layer(Strict::new(&script)).oneshot(request("12345")).await.unwrap();
    assert_eq!((response.status().as_u16(), bodies(&script)), (503, vec![Bytes::from("12345")]));
}

#[tokio::test(start_paused = true)]
async fn an_answer_that_came_before_the_body_was_read_is_retried_with_all_of_it() {
    let script = Script::default();
    script.push_early(Response::builder().status(503).body(Full::default()).unwrap());
    RetryLayer::new(policy()).layer(Strict::new(&script)).oneshot(request("whole")).await.unwrap();
    assert_eq!(bodies(&script), ["whole"]);
}

#[tokio::test]
async fn a_body_that_fails_is_reported_and_not_retried() {
    let script = Script::default();
    let stream = futures::stream::iter([Ok(http_body::Frame::data(Bytes::from("a"))), Err("disk")]);
    let request = Request::new(http_body_util::StreamBody::new(stream));
    let client = RetryLayer::new(policy()).layer(Strict::new(&script));
    assert_eq!(client.oneshot(request).await.unwrap_err().to_string(), "disk");
    assert_eq!(script.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_budget_bounds_retries_and_comes_back_when_calls_are_dropped() {
    let script = Script::default();
    let layer = RetryLayer::new(policy()).budget(RetryBudget::fixed(1));
    let client = layer.layer(Strict::new(&script));
    for _ in 0..3 {
        script.push_status(503);
    }
    let mut first = tokio_test::task::spawn(client.clone().oneshot(request("1")));
    tokio_test::assert_pending!(first.poll(), "waits for its delay");
    assert_eq!(client.clone().oneshot(request("2")).await.unwrap().status(), 503, "no budget left");
    let budget = layer.shared.budget.clone().unwrap();
    assert_eq!((budget.in_flight(), layer.shared.active.load(Ordering::SeqCst)), (1, 1));
    drop(first);
    assert_eq!((budget.in_flight(), layer.shared.active.load(Ordering::SeqCst)), (0, 0));
    client.oneshot(request("3")).await.unwrap();
    assert_eq!(script.calls(), 4, "the third call was retried");
    assert_eq!(budget.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_local_limit_and_a_passed_deadline_are_never_retried() {
    let script = Script::default();
    let limited = CircuitBreakerLayer::new(Limits::max_requests(0));
    let client = ServiceBuilder::new().layer(RetryLayer::new(policy())).layer(limited).service(Strict::new(&script));
    client.oneshot(request("x")).await.unwrap_err();
    assert_eq!(script.calls(), 0);
    script.push_silence();
    let deadline = TimeoutLayer::new(Duration::from_secs(1));
    let client = ServiceBuilder::new().layer(RetryLayer::new(policy())).layer(deadline).service(Strict::new(&script));
    let error = client.oneshot(request("x")).await.unwrap_err();
    assert_eq!(error.to_string(), "deadline of 1s exceeded (set by the timeout layer)");
    assert_eq!(script.calls(), 1);
}

#[test]
fn replay_errors_of_an_attempt_are_our_own() {
    let outcome = Outcome::of_error(&ReplayError::Superseded);
    assert!(!policy().retries(&outcome));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// [`Strict`] panics when it is called unready or when a clone of it is: this drives every path of the layer.
    #[test]
    fn the_contract_of_tower_is_kept_and_every_attempt_is_counted(
        answers in proptest::collection::vec(prop_oneof![Just(200u16), Just(404), Just(503), Just(0)], 0..12),
        pending in 0..3usize,
        retries in 0..4u32,
        calls in 1..4usize,
    ) {
        let script = Script::default();
        script.pending_first(pending);
        for status in &answers {
            match status {
                0 => script.push_error("reset"),
                status => script.push_status(*status),
            };
        }
        let mut answers = answers.into_iter().chain(std::iter::repeat(200));
        let policy = Policy::http().on(Condition::Http5xx).max_retries(retries).build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let mut client = RetryLayer::new(policy).layer(Strict::new(&script));
            let mut expected = 0;
            for _ in 0..calls {
                let ready = ServiceExt::<Request<Sent>>::ready(&mut client).await.unwrap();
                let result = ready.call(request("body")).await;
                let mut last = 503;
                for _ in 0..=retries {
                    last = answers.next().unwrap();
                    expected += 1;
                    if last != 503 && last != 0 {
                        break;
                    }
                }
                match result {
                    Ok(response) => {
                        assert_eq!(response.status().as_u16(), last);
                        response.into_body().collect().await.unwrap();
                    }
                    Err(_) => assert_eq!(last, 0),
                }
                assert_eq!(script.calls(), expected);
            }
            assert!(bodies(&script).iter().all(|body| body == "body"));
        });
    }
}
