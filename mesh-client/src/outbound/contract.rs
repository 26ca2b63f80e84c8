//! Every layer keeps the contract of `poll_ready`: driven in any order around a service that panics when it is misused.

use super::{
    cluster::{CircuitBreakerLayer, Limits},
    filter::{FaultLayer, Filter, FilterLayer, FilterRequest, RateLimitLayer, Step as Decision, Verdict},
    pick::{LoadBalanceLayer, ServiceList},
    retry::{Condition, HedgeLayer, Policy, RetryBudget, RetryLayer},
    testing::{Script, Strict},
    timeout::TimeoutLayer,
};
use crate::{
    BoxError,
    trace::{ScopeLayer, TracePropagationLayer},
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use mesh_xds::resource::{Denominator, FaultConfig, FaultDelay, FractionalPercent, OutlierDetection};
use proptest::prelude::*;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};
use tower::{Layer, Service};

/// One step of whoever uses a service. Services and futures are chosen by a number.
#[derive(Clone, Copy, Debug)]
enum Step {
    PollReady(usize),
    /// If it was ready when last polled.
    Call(usize),
    Clone(usize),
    DropService(usize),
    PollFuture(usize),
    DropFuture(usize),
    /// Milliseconds.
    Wait(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0..4usize).prop_map(Step::PollReady),
        3 => (0..4usize).prop_map(Step::Call),
        1 => (0..4usize).prop_map(Step::Clone),
        1 => (0..4usize).prop_map(Step::DropService),
        4 => (0..8usize).prop_map(Step::PollFuture),
        1 => (0..8usize).prop_map(Step::DropFuture),
        1 => (0..200u64).prop_map(Step::Wait),
    ]
}

/// What the service answers.
#[derive(Clone, Copy, Debug)]
enum Answer {
    Status(u16),
    Error,
    Silence,
}

fn answer() -> impl Strategy<Value = Answer> {
    prop_oneof![
        prop_oneof![Just(200u16), Just(503)].prop_map(Answer::Status),
        Just(Answer::Error),
        Just(Answer::Silence),
    ]
}

/// Uses a service as any legal user may.
async fn drive<S, R>(service: S, steps: &[Step])
where
    S: Service<Request<Full<Bytes>>, Response = Response<R>, Error: Into<BoxError>> + Clone,
{
    let mut cx = Context::from_waker(Waker::noop());
    let mut services = vec![(service, false)];
    let mut futures: Vec<Pin<Box<S::Future>>> = Vec::new();
    for step in steps {
        match *step {
            Step::PollReady(i) => {
                let count = services.len();
                let (service, ready) = &mut services[i % count];
                *ready |= matches!(service.poll_ready(&mut cx), Poll::Ready(Ok(())));
            }
            Step::Call(i) => {
                let count = services.len();
                let (service, ready) = &mut services[i % count];
                if std::mem::take(ready) {
                    futures.push(Box::pin(service.call(Request::new(Full::from("body")))));
                }
            }
            Step::Clone(i) => {
                let clone = services[i % services.len()].0.clone();
                services.push((clone, false));
            }
            Step::DropService(i) if services.len() > 1 => drop(services.remove(i % services.len())),
            Step::PollFuture(i) if !futures.is_empty() => {
                let i = i % futures.len();
                if futures[i].as_mut().poll(&mut cx).is_ready() {
                    drop(futures.remove(i));
                }
            }
            Step::DropFuture(i) if !futures.is_empty() => drop(futures.remove(i % futures.len())),
            Step::Wait(millis) => tokio::time::sleep(Duration::from_millis(millis)).await,
            Step::DropService(_) | Step::PollFuture(_) | Step::DropFuture(_) => {}
        }
    }
}

fn policy() -> Policy {
    let back_off = Duration::from_millis(20);
    let policy = Policy::http().on(Condition::Http5xx).max_retries(3).per_try_timeout(Duration::from_millis(100));
    policy.back_off(back_off, back_off).build()
}

#[test]
fn no_layer_calls_what_was_not_polled_ready() {
    let steps = proptest::collection::vec(step(), 0..60);
    let answers = proptest::collection::vec(answer(), 0..20);
    proptest!(ProptestConfig::with_cases(64), |(steps in steps, answers in answers, pending in 0..3usize)| {
        let inner = || {
            let script = Script::default();
            script.pending_first(pending);
            for answer in &answers {
                match answer {
                    Answer::Status(status) => script.push_status(*status),
                    Answer::Error => script.push_error("cut"),
                    Answer::Silence => script.push_silence(),
                };
            }
            Strict::new(&script)
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        runtime.expect("a runtime").block_on(drive_all(inner, &steps));
    });
}

/// Takes its time.
struct Slow;

impl Filter for Slow {
    fn request<'a>(&'a self, _: &'a mut FilterRequest<'_>) -> Decision<'a> {
        Decision::Later(Box::pin(async {
            tokio::time::sleep(Duration::from_millis(30)).await;
            Verdict::Pass
        }))
    }
}

/// Each layer, and several around each other.
async fn drive_all(inner: impl Fn() -> Strict, steps: &[Step]) {
    let budget = || RetryBudget::percent(50.0, 2);
    let millis = Duration::from_millis;
    drive(RetryLayer::new(policy()).budget(budget()).layer(inner()), steps).await;
    drive(HedgeLayer::new(policy(), millis(50)).budget(budget()).layer(inner()), steps).await;
    drive(TimeoutLayer::new(millis(150)).layer(inner()), steps).await;
    drive(TimeoutLayer::headers(millis(150)).layer(inner()), steps).await;
    drive(CircuitBreakerLayer::new(Limits::max_requests(3)).layer(inner()), steps).await;
    drive(TracePropagationLayer::new().layer(inner()), steps).await;
    // Without a context, and with one.
    drive(ScopeLayer::new().layer(inner()), steps).await;
    drive(TracePropagationLayer::new().layer(ScopeLayer::new().layer(inner())), steps).await;
    drive(FilterLayer::new(Arc::new(Slow)).layer(inner()), steps).await;
    drive(RateLimitLayer::new(20, Duration::from_secs(1)).burst(2).layer(inner()), steps).await;
    let (percentage, denominator) = (FractionalPercent(500_000), Denominator::Hundred);
    let delay = Some(FaultDelay { fixed: Some(millis(30)), percentage, denominator });
    drive(FaultLayer::new(&FaultConfig { delay, ..FaultConfig::default() }).layer(inner()), steps).await;
    drive(LoadBalanceLayer::random().layer(ServiceList::new([inner(), inner()])), steps).await;
    let outliers = OutlierDetection {
        interval: millis(50),
        base_ejection_time: millis(100),
        consecutive_5xx: Some(1),
        max_ejection_percent: 100,
        ..OutlierDetection::default()
    };
    let ejecting = LoadBalanceLayer::round_robin().outlier_detection(outliers);
    drive(ejecting.layer(ServiceList::new([inner(), inner()])), steps).await;
    let balanced = LoadBalanceLayer::round_robin().layer(ServiceList::new([inner(), inner()]));
    drive(RetryLayer::new(policy()).layer(TimeoutLayer::new(millis(400)).layer(balanced)), steps).await;
}
