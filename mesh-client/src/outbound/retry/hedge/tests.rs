use super::*;
use crate::outbound::{
    retry::Condition,
    testing::{Script, Strict},
};
use http_body_util::Full;
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
