use super::*;
use crate::outbound::retry::{
    Condition, RetryBudget,
    classify::{Response, Signs},
};
use std::sync::Arc;

fn unavailable() -> Outcome {
    answered(Pushback::None)
}

fn answered(pushback: Pushback) -> Outcome {
    Outcome::Response(Response { status: 200, grpc: Some(14), pushback, signs: Signs::default() })
}

fn failed(failure: Failure) -> Outcome {
    Outcome::Failure(failure)
}

fn situation() -> Situation {
    Situation { replayable: true, now: Instant::now(), deadline: None, asked: None }
}

fn policy(retries: u32) -> Policy {
    Policy::grpc().max_retries(retries).back_off(Duration::from_millis(10), Duration::from_millis(100)).build()
}

/// Without a budget; the draw makes every delay exactly the interval.
fn next(attempts: &mut Attempts, policy: Option<&Policy>, outcome: &Outcome, situation: Situation) -> Decision {
    attempts.next(policy, outcome, situation, || Some(None), &mut |_| 200_000)
}

fn after(ms: u64) -> Decision {
    Decision::RetryAfter(Duration::from_millis(ms))
}

#[test]
fn retries_are_counted_and_their_delays_grow() {
    let (policy, mut attempts) = (policy(3), Attempts::default());
    for ms in [10, 20, 40] {
        assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), situation()), after(ms));
    }
    assert_eq!((attempts.number(), attempts.retries), (4, 3));
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), situation()), Decision::Return(Stop::Exhausted));
}

#[test]
fn success_and_other_failures_are_returned() {
    let (policy, mut attempts) = (policy(3), Attempts::default());
    let success =
        Outcome::Response(Response { status: 200, grpc: None, pushback: Pushback::None, signs: Signs::default() });
    let mut stop = |outcome| next(&mut attempts, Some(&policy), &outcome, situation());
    assert_eq!(stop(success), Decision::Return(Stop::NotRetriable));
    assert_eq!(stop(failed(Failure::Overloaded)), Decision::Return(Stop::NotRetriable));
    assert_eq!(stop(failed(Failure::Deadline)), Decision::Return(Stop::NotRetriable));
    assert_eq!(next(&mut attempts, None, &unavailable(), situation()), Decision::Return(Stop::NoPolicy));
    assert_eq!(attempts.number(), 1);
}

#[test]
fn pushback_sets_the_delay_and_restarts_the_sequence() {
    let (policy, mut attempts) = (policy(4), Attempts::default());
    let pushback = |ms| answered(Pushback::After(Duration::from_millis(ms)));
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), situation()), after(10));
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), situation()), after(20));
    assert_eq!(next(&mut attempts, Some(&policy), &pushback(777), situation()), after(777));
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), situation()), after(10));
    let stop = next(&mut attempts, Some(&policy), &answered(Pushback::Stop), situation());
    assert_eq!(stop, Decision::Return(Stop::Pushback));
}

#[test]
fn what_never_left_is_tried_again_at_once_without_a_policy_but_not_for_ever() {
    let mut attempts = Attempts::default();
    for _ in 0..MAX_NEVER_SENT {
        assert_eq!(next(&mut attempts, None, &failed(Failure::NeverSent), situation()), Decision::RetryNow);
    }
    assert_eq!(next(&mut attempts, None, &failed(Failure::NeverSent), situation()), Decision::Return(Stop::NoPolicy));
    assert_eq!((attempts.retries, attempts.transparent), (0, MAX_NEVER_SENT));
}

#[test]
fn a_refused_stream_is_tried_again_once_and_then_by_policy() {
    let (policy, mut attempts) = (policy(1), Attempts::default());
    let refused = failed(Failure::Refused);
    assert_eq!(next(&mut attempts, Some(&policy), &refused, situation()), Decision::RetryNow);
    assert_eq!(next(&mut attempts, Some(&policy), &refused, situation()), after(10));
    assert_eq!(next(&mut attempts, Some(&policy), &refused, situation()), Decision::Return(Stop::Exhausted));
    assert_eq!(attempts.number(), 3);
}

#[test]
fn a_body_that_is_gone_is_not_sent_again() {
    let (policy, mut attempts) = (policy(1), Attempts::default());
    let gone = Situation { replayable: false, ..situation() };
    for outcome in [unavailable(), failed(Failure::Refused), failed(Failure::NeverSent)] {
        let stop = next(&mut attempts, Some(&policy), &outcome, gone);
        assert_eq!(stop, Decision::Return(Stop::NotReplayable), "{outcome:?}");
    }
}

#[test]
fn an_attempt_that_would_start_after_the_deadline_is_not_made() {
    let (policy, mut attempts) = (policy(2), Attempts::default());
    let until = |ms| {
        let now = Instant::now();
        Situation { replayable: true, now, deadline: Some(now + Duration::from_millis(ms)), asked: None }
    };
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), until(10)), Decision::Return(Stop::Deadline));
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), until(11)), after(10));
    let refused = failed(Failure::Refused);
    assert_eq!(next(&mut attempts, Some(&policy), &refused, until(0)), Decision::Return(Stop::Deadline));
}

#[test]
fn a_retry_holds_its_share_of_the_budget_until_the_next_decision_or_drop() {
    let (policy, budget) = (policy(3), Arc::new(RetryBudget::fixed(1)));
    let retry = |attempts: &mut Attempts, outcome: &Outcome| {
        attempts.next(Some(&policy), outcome, situation(), || budget.try_acquire(0).map(Some), &mut |_| 200_000)
    };
    let (mut first, mut second) = (Attempts::default(), Attempts::default());
    assert_eq!(retry(&mut first, &unavailable()), after(10));
    assert_eq!(retry(&mut second, &unavailable()), Decision::Return(Stop::Budget));
    assert_eq!(retry(&mut first, &unavailable()), after(20), "its own share comes back first");
    assert_eq!(budget.in_flight(), 1);
    assert_eq!(retry(&mut first, &failed(Failure::NeverSent)), Decision::RetryNow);
    assert_eq!(budget.in_flight(), 1, "what is sent anew is the same retry");
    let success =
        Outcome::Response(Response { status: 200, grpc: None, pushback: Pushback::None, signs: Signs::default() });
    retry(&mut first, &success);
    assert_eq!(budget.in_flight(), 0);
    assert_eq!(retry(&mut second, &unavailable()), after(10));
    drop(second);
    assert_eq!(budget.in_flight(), 0);
}

#[test]
fn the_budget_is_not_asked_for_what_is_not_retried() {
    let (policy, mut attempts) = (policy(0), Attempts::default());
    let decision =
        attempts.next(Some(&policy), &unavailable(), situation(), || panic!("asked"), &mut |_| panic!("drawn"));
    assert_eq!(decision, Decision::Return(Stop::Exhausted));
}

#[test]
fn a_retry_says_so_in_its_headers() {
    let mut attempts = Attempts::default();
    let header = |attempts: &Attempts, profile| {
        let mut headers = HeaderMap::new();
        attempts.write_header(&mut headers, profile);
        headers.into_iter().map(|(n, v)| format!("{}: {}", n.unwrap(), v.to_str().unwrap())).collect::<Vec<_>>()
    };
    next(&mut attempts, None, &failed(Failure::NeverSent), situation());
    assert!(header(&attempts, Profile::Grpc).is_empty(), "a transparent retry is no retry");
    let policy = Policy::http().on(Condition::Reset).max_retries(20).build();
    let reset = failed(Failure::Reset(None));
    next(&mut attempts, Some(&policy), &reset, situation());
    assert_eq!(header(&attempts, Profile::Grpc), ["grpc-previous-rpc-attempts: 1"]);
    assert_eq!(header(&attempts, Profile::Envoy), ["x-envoy-attempt-count: 2"]);
    for _ in 0..10 {
        next(&mut attempts, Some(&policy), &reset, situation());
    }
    assert_eq!(header(&attempts, Profile::Grpc), ["grpc-previous-rpc-attempts: 11"]);
}

#[test]
fn a_reset_header_sets_the_least_delay_and_jitter_adds_up_to_half() {
    let policy = Policy::http().on(Condition::Http5xx).max_retries(2).build();
    let signs = Signs { reset: Some(Duration::from_secs(4)), ..Signs::default() };
    let outcome = Outcome::Response(Response { status: 503, grpc: None, pushback: Pushback::None, signs });
    for (draw, seconds) in [(0u32, 4), (u32::MAX, 6)] {
        let mut rng = |bound: u32| draw.min(bound - 1);
        let decision = Attempts::default().next(Some(&policy), &outcome, situation(), || Some(None), &mut rng);
        assert_eq!(decision, Decision::RetryAfter(Duration::from_secs(seconds)));
    }
}

#[test]
fn a_hook_overrules_the_conditions_and_nothing_else() {
    let policy = policy(1);
    let asked = |asked| Situation { asked: Some(asked), ..situation() };
    let mut attempts = Attempts::default();
    assert_eq!(next(&mut attempts, Some(&policy), &unavailable(), asked(false)), Decision::Return(Stop::Hook));
    let success =
        Outcome::Response(Response { status: 200, grpc: None, pushback: Pushback::None, signs: Signs::default() });
    assert_eq!(next(&mut attempts, Some(&policy), &success, asked(true)), after(10));
    assert_eq!(next(&mut attempts, Some(&policy), &success, asked(true)), Decision::Return(Stop::Exhausted));
}

#[test]
fn hedges_are_counted_and_paid_for_as_retries() {
    let (policy, mut attempts) = (policy(2), Attempts::default());
    assert!(attempts.hedge(&policy, situation(), || Some(None)).is_ok());
    assert_eq!(attempts.hedge(&policy, situation(), || None).unwrap_err(), Stop::Budget);
    let long = Situation { replayable: false, ..situation() };
    assert_eq!(attempts.hedge(&policy, long, || Some(None)).unwrap_err(), Stop::NotReplayable);
    assert!(attempts.hedge(&policy, situation(), || Some(None)).is_ok());
    assert_eq!(attempts.hedge(&policy, situation(), || Some(None)).unwrap_err(), Stop::Exhausted);
    assert_eq!(attempts.number(), 3);
}
