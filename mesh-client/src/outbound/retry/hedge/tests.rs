use super::*;
use crate::outbound::{
    retry::Condition,
    testing::{Script, Strict},
};
use http_body_util::Full;
use std::sync::atomic::{AtomicU32, Ordering};
use tower::ServiceExt;

const S: fn(u64) -> Duration = Duration::from_secs;

fn request(body: &'static str) -> Request<Full<Bytes>> {
    Request::post("http://upstream/").body(Full::from(body)).unwrap()
}

fn layer(retries: u32) -> HedgeLayer {
    HedgeLayer::new(Policy::http().on(Condition::Http5xx).max_retries(retries).build(), S(1))
}

fn answer(grpc: &str, pushback: Option<&str>) -> Response<Full<Bytes>> {
    let mut head = Response::builder().header("grpc-status", grpc);
    if let Some(pushback) = pushback {
        head = head.header("grpc-retry-pushback-ms", pushback);
    }
    head.body(Full::default()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_first_good_answer_wins_however_many_are_silent() {
    let script = Script::default();
    script.push_silence().push_silence().push_status(200);
    let begun = Instant::now();
    let response = layer(4).layer(Strict::new(&script)).oneshot(request("hello")).await.unwrap();
    assert_eq!((response.status().as_u16(), begun.elapsed()), (200, S(2)));
    let bodies: Vec<_> = script.seen().into_iter().map(|(_, body)| body).collect();
    assert_eq!(bodies, ["hello", "hello", "hello"]);
}

#[tokio::test(start_paused = true)]
async fn a_bad_answer_starts_the_next_attempt_at_once_and_the_last_one_is_given() {
    let script = Script::default();
    script.push_status(500).push_status(501).push_status(502);
    let begun = Instant::now();
    let response = layer(2).layer(Strict::new(&script)).oneshot(request("")).await.unwrap();
    assert_eq!((response.status().as_u16(), script.calls(), begun.elapsed()), (502, 3, S(0)));
}

#[tokio::test(start_paused = true)]
async fn the_server_delays_the_next_attempt_or_forbids_it() {
    let policy = || Policy::grpc().max_retries(3).build();
    for (pushback, calls, took) in [("5000", 2, S(5)), ("-1", 1, S(0))] {
        let script = Script::default();
        script.push(answer("14", Some(pushback))).push(answer("0", None));
        let mut request = request("");
        request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        let begun = Instant::now();
        HedgeLayer::new(policy(), S(1)).layer(Strict::new(&script)).oneshot(request).await.unwrap();
        assert_eq!((script.calls(), begun.elapsed()), (calls, took), "{pushback}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_budget_pays_and_gets_back() {
    let script = Script::default();
    for _ in 0..4 {
        script.push_silence();
    }
    let layer = layer(5).budget(RetryBudget::fixed(1));
    let client = layer.layer(Strict::new(&script));
    for calls in [2, 4] {
        let call = client.clone().oneshot(request(""));
        assert!(tokio::time::timeout(S(60), call).await.is_err());
        assert_eq!(script.calls(), calls);
        assert_eq!(layer.shared.active.load(Ordering::SeqCst), 0);
        assert_eq!(layer.shared.budget.as_ref().unwrap().in_flight(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_over_the_cap_is_sent_once() {
    let script = Script::default();
    script.push_silence();
    let call = layer(5).replay_cap(2).layer(Strict::new(&script)).oneshot(request("long"));
    assert!(tokio::time::timeout(S(60), call).await.is_err());
    assert_eq!(script.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_delay_before_an_attempt_that_is_not_allowed_ends_in_the_last_answer() {
    let script = Script::default();
    script.push(answer("14", Some("5000")));
    let mut request = request("");
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    let layer = HedgeLayer::new(Policy::grpc().max_retries(3).build(), S(1)).budget(RetryBudget::fixed(0));
    let call = layer.layer(Strict::new(&script)).oneshot(request.clone());
    let response = tokio::time::timeout(S(60), call).await.expect("hangs").unwrap();
    assert_eq!((response.headers()["grpc-status"].to_str().unwrap(), script.calls()), ("14", 1));
    // All retries used up.
    let script = Script::default();
    script.push(answer("14", None)).push(answer("14", Some("5000")));
    let layer = HedgeLayer::new(Policy::grpc().max_retries(1).build(), S(1));
    let begun = Instant::now();
    let call = layer.layer(Strict::new(&script)).oneshot(request);
    let response = tokio::time::timeout(S(60), call).await.expect("hangs").unwrap();
    assert_eq!((response.headers()["grpc-status"].to_str().unwrap(), script.calls()), ("14", 2));
    assert_eq!(begun.elapsed(), S(0));
}

/// Answers after 3 s the first time, and fails after that.
fn failing_beside(
    failure: fn() -> BoxError,
) -> impl Clone + Service<Request<HedgeBody<Full<Bytes>>>, Response = Response<()>, Error = BoxError> {
    let calls = Arc::new(AtomicU32::new(0));
    tower::service_fn(move |_: Request<HedgeBody<Full<Bytes>>>| {
        let number = calls.fetch_add(1, Ordering::SeqCst);
        async move {
            if number > 0 {
                return Err(failure());
            }
            tokio::time::sleep(S(3)).await;
            Ok(Response::new(()))
        }
    })
}

#[tokio::test(start_paused = true)]
async fn a_failure_that_is_not_retried_leaves_the_attempts_beside_it_alone() {
    let policy = || Policy::http().on(Condition::Status(http::StatusCode::BAD_GATEWAY)).max_retries(1).build();
    let client = HedgeLayer::new(policy(), S(1)).layer(failing_beside(|| "lost".into()));
    assert_eq!(client.oneshot(request("")).await.unwrap().status(), 200);
    let script = Script::default();
    script.push_error("lost");
    let error = HedgeLayer::new(policy(), S(1)).layer(Strict::new(&script)).oneshot(request("")).await.unwrap_err();
    assert_eq!((error.to_string().as_str(), script.calls()), ("lost", 1));
}

#[tokio::test(start_paused = true)]
async fn requests_that_the_policy_leaves_out_are_sent_once() {
    let name = http::HeaderName::from_static("x-again");
    let policy = Policy::http().on(Condition::Http5xx).max_retries(2).only_with_header(&name).build();
    for (with, calls) in [(false, 1), (true, 3)] {
        let script = Script::default();
        script.push_silence().push_silence().push_silence();
        let mut request = request("");
        if with {
            request.headers_mut().insert(&name, "1".parse().unwrap());
        }
        let call = HedgeLayer::new(policy.clone(), S(1)).layer(Strict::new(&script)).oneshot(request);
        assert!(tokio::time::timeout(S(60), call).await.is_err());
        assert_eq!(script.calls(), calls);
    }
}
