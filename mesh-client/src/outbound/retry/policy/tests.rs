use super::*;
use crate::outbound::retry::classify::{Pushback, Signs};
use h2::Reason;
use tonic::Code;

fn answer(status: u16, grpc: Option<u32>) -> Outcome {
    Outcome::Response(Response { status, grpc, pushback: Pushback::None, signs: Signs::default() })
}

const FAILURES: [Failure; 10] = [
    Failure::Connect,
    Failure::NeverSent,
    Failure::Refused,
    Failure::Reset(None),
    Failure::Reset(Some(Reason::CANCEL)),
    Failure::PerTryTimeout,
    Failure::NoEndpoint,
    Failure::Overloaded,
    Failure::Deadline,
    Failure::Local,
];

/// The failures of [`FAILURES`] that are retried, by position.
fn retried(policy: &Policy) -> Vec<usize> {
    (0..FAILURES.len()).filter(|n| policy.retries(&Outcome::Failure(FAILURES[*n]))).collect()
}

#[test]
fn grpc_retries_by_the_code_a_failure_becomes() {
    assert_eq!(retried(&Policy::grpc().build()), [0, 1, 2, 3, 6], "UNAVAILABLE");
    assert_eq!(retried(&Policy::grpc().on(Condition::Grpc(Code::Cancelled)).build()), [4]);
    assert_eq!(retried(&Policy::grpc().on(Condition::Grpc(Code::DeadlineExceeded)).build()), [5]);
    let policy = Policy::grpc().build();
    assert!(policy.retries(&answer(200, Some(14))));
    assert!(policy.retries(&answer(503, Some(14))));
    assert!(!policy.retries(&answer(200, Some(13))));
    assert!(!policy.retries(&answer(200, None)));
}

#[test]
fn envoy_retries_by_condition() {
    let on = |condition| Policy::http().on(condition).build();
    assert_eq!(retried(&on(Condition::ConnectFailure)), [0]);
    assert_eq!(retried(&on(Condition::RefusedStream)), [2]);
    assert_eq!(retried(&on(Condition::ResetBeforeRequest)), [0, 1]);
    for silent in [Condition::Reset, Condition::Http5xx, Condition::GatewayError] {
        assert_eq!(retried(&on(silent)), [0, 1, 2, 3, 4, 5], "{silent:?}");
    }
    assert!(retried(&on(Condition::Retriable4xx)).is_empty());
    let statuses = |condition| {
        let policy = on(condition);
        (200..600).filter(|status| policy.retries(&answer(*status, None))).collect::<Vec<_>>()
    };
    assert_eq!(statuses(Condition::Http5xx), (500..600).collect::<Vec<_>>());
    assert_eq!(statuses(Condition::GatewayError), [502, 503, 504]);
    assert_eq!(statuses(Condition::Retriable4xx), [409]);
    assert_eq!(statuses(Condition::Status(http::StatusCode::TOO_MANY_REQUESTS)), [429]);
    assert!(statuses(Condition::Reset).is_empty());
    let policy = on(Condition::Grpc(Code::ResourceExhausted));
    assert!(policy.retries(&answer(200, Some(8))));
    assert!(!policy.retries(&answer(200, Some(14))));
}

#[test]
fn defaults_hold_until_the_first_condition_is_given() {
    assert!(Policy::http().build().retries(&answer(503, None)));
    assert!(!Policy::http().on(Condition::Reset).build().retries(&answer(503, None)));
    let both = Policy::http().on(Condition::Reset).on(Condition::Retriable4xx).build();
    assert!(both.retries(&answer(409, None)) && both.retries(&Outcome::Failure(Failure::Reset(None))));
}

#[test]
fn a_grpc_policy_ignores_what_grpc_does_not_know() {
    let configured = RetryPolicy {
        on: RetryOn { grpc_codes: 1 << 14, http_5xx: true, connect_failure: true, ..RetryOn::default() },
        num_retries: 10,
        per_try_timeout: Some(Duration::from_secs(1)),
        avoid_previous_hosts: true,
        ..RetryPolicy::default()
    };
    let grpc = Policy::compile(&configured, Profile::Grpc).unwrap();
    assert_eq!((grpc.max_retries(), grpc.per_try_timeout()), (4, None));
    assert!(!grpc.retries(&answer(500, Some(13))));
    let envoy = Policy::compile(&configured, Profile::Envoy).unwrap();
    assert_eq!((envoy.max_retries(), envoy.per_try_timeout()), (10, Some(Duration::from_secs(1))));
    assert!(envoy.retries(&answer(500, Some(13))));
}

/// Delays of the first six retries with the lowest and the highest draw, in ms.
fn delays(policy: &Policy) -> Vec<(f64, f64)> {
    let ms = |d: Duration| (d.as_secs_f64() * 100_000.0).round() / 100.0;
    let delay = |n, low: bool| ms(policy.delay(n, &mut |bound| if low { 0 } else { bound - 1 }));
    (0..6).map(|n| (delay(n, true), delay(n, false))).collect()
}

#[test]
fn grpc_delays_double_up_to_the_longest_and_vary_by_a_fifth() {
    let policy = Policy::grpc().back_off(Duration::from_millis(100), Duration::from_millis(1000)).build();
    let expected = [(80.0, 120.0), (160.0, 240.0), (320.0, 480.0), (640.0, 960.0), (800.0, 1200.0), (800.0, 1200.0)];
    assert_eq!(delays(&policy), expected);
}

#[test]
fn envoy_delays_are_drawn_below_a_doubling_interval() {
    let policy = Policy::http().build();
    let expected = [(0.0, 25.0), (0.0, 50.0), (0.0, 100.0), (0.0, 200.0), (0.0, 250.0), (0.0, 250.0)];
    assert_eq!(delays(&policy), expected);
}

#[test]
fn no_sequence_of_delays_overflows() {
    let policy = Policy::grpc().back_off(Duration::from_secs(1), Duration::MAX).build();
    for n in [31, 32, 33, 1000, u32::MAX] {
        assert!(policy.delay(n, &mut |_| 0) >= Duration::from_secs(1), "{n}");
    }
    let zero = Policy::http().back_off(Duration::ZERO, Duration::ZERO).build();
    assert!(zero.delay(0, &mut |bound| bound - 1) < Duration::from_millis(1), "at least 1 ms of interval");
}
