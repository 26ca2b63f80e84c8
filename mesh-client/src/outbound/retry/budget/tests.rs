use super::*;
use mesh_xds::resource::RetryBudget as Configured;
use proptest::prelude::*;
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

fn take(budget: &Arc<RetryBudget>, active: u32) -> Vec<Permit> {
    std::iter::from_fn(|| budget.try_acquire(active)).take(10_000).collect()
}

#[test]
fn a_share_of_the_active_requests_but_never_less_than_the_minimum() {
    let budget = Arc::new(RetryBudget::percent(20.0, 3));
    for (active, allowed) in [(0, 3), (15, 3), (19, 3), (20, 4), (100, 20), (1_000, 200)] {
        assert_eq!(take(&budget, active).len(), allowed, "{active} active");
    }
    assert_eq!(budget.in_flight(), 0);
}

#[test]
fn a_fixed_budget_does_not_look_at_the_active_requests() {
    let budget = Arc::new(RetryBudget::fixed(3));
    assert_eq!(take(&budget, 0).len(), 3);
    assert_eq!(take(&budget, u32::MAX).len(), 3);
    assert!(take(&Arc::new(RetryBudget::fixed(0)), 100).is_empty());
}

#[test]
fn nonsense_percentages_are_clamped() {
    assert_eq!(take(&Arc::new(RetryBudget::percent(-5.0, 1)), 100).len(), 1);
    assert_eq!(take(&Arc::new(RetryBudget::percent(f64::NAN, 1)), 100).len(), 1);
    assert_eq!(take(&Arc::new(RetryBudget::percent(1e9, 1)), 100).len(), 100);
}

#[test]
fn a_changed_limit_holds_for_new_retries_and_keeps_the_count() {
    let breakers = |max_retries| Thresholds { max_retries, ..Thresholds::default() };
    let budget = Arc::new(RetryBudget::of(&breakers(4)));
    let mut held = take(&budget, 0);
    assert_eq!(held.len(), 4);
    budget.update(&breakers(2));
    held.truncate(2);
    assert!(budget.try_acquire(0).is_none());
    held.clear();
    assert_eq!(take(&budget, 0).len(), 2);
}

#[test]
fn max_retries_binds_only_envoy_and_a_budget_binds_both() {
    let acquire =
        |breakers: &Thresholds, profile| Arc::new(RetryBudget::of(breakers)).try_acquire_as(profile, 0).is_some();
    let none = Thresholds { max_retries: 0, ..Thresholds::default() };
    assert!(acquire(&none, Profile::Grpc));
    assert!(!acquire(&none, Profile::Envoy));
    let retry_budget = Some(Configured { percent: 20.0, min_concurrency: 0 });
    let budget = Thresholds { retry_budget, ..none };
    assert!(!acquire(&budget, Profile::Grpc));
    assert!(!acquire(&budget, Profile::Envoy));
}

#[test]
fn threads_never_overshoot_and_all_comes_back() {
    const MAX: u32 = 7;
    let budget = Arc::new(RetryBudget::percent(10.0, 2));
    let (inside, peak, admitted) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..5_000 {
                    let Some(permit) = budget.try_acquire(MAX * 10) else { continue };
                    peak.fetch_max(inside.fetch_add(1, SeqCst) + 1, SeqCst);
                    admitted.fetch_add(1, SeqCst);
                    std::thread::yield_now();
                    inside.fetch_sub(1, SeqCst);
                    drop(permit);
                }
            });
        }
    });
    assert!(peak.load(SeqCst) <= MAX, "{} at once", peak.load(SeqCst));
    assert!(admitted.load(SeqCst) >= MAX);
    assert_eq!(budget.in_flight(), 0);
}

proptest! {
    #[test]
    fn any_limit_survives_packing(share in 0..=1_000_000u32, min in any::<u32>(), envoy_only in any::<bool>()) {
        let limit = Limit { share, min, envoy_only };
        prop_assert_eq!(Limit::unpack(limit.pack()), limit);
    }

    #[test]
    fn any_sequence_stays_within_the_limit_of_its_moment(
        percent in 0.0..100.0f64,
        min in 0..5u32,
        steps in proptest::collection::vec(proptest::option::of(0..50u32), 0..200),
    ) {
        let budget = Arc::new(RetryBudget::percent(percent, min));
        let mut held = Vec::new();
        for step in steps {
            match step {
                Some(active) => {
                    let limit = (f64::from(active) * (percent * 10_000.0).round() / 1e6).floor().max(f64::from(min));
                    let permit = budget.try_acquire(active);
                    prop_assert_eq!(permit.is_some(), (held.len() as f64) < limit);
                    held.extend(permit);
                }
                None => drop(held.pop()),
            }
            prop_assert_eq!(budget.in_flight() as usize, held.len());
        }
    }
}

/// What one thread does: a call that begins, an attempt that ends (badly or not), a retry that is wanted, one that is over.
#[derive(Clone, Copy, Debug)]
enum Step {
    Begins,
    Ends { failed: bool },
    Wants,
    GivesBack,
}

fn threads() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let step = prop_oneof![
        2 => Just(Step::Begins),
        2 => any::<bool>().prop_map(|failed| Step::Ends { failed }),
        4 => Just(Step::Wants),
        2 => Just(Step::GivesBack),
    ];
    proptest::collection::vec(proptest::collection::vec(step, 0..60), 2..6)
}

/// What threads that play at the same time have seen.
#[derive(Default)]
struct Seen {
    begun: AtomicU32,
    succeeded: AtomicU32,
    failed: AtomicU32,
    retries: AtomicU32,
    held: AtomicU32,
    /// The most that were held at once.
    peak: AtomicU32,
}

/// Plays all threads at once. What speaks for a retry is noted before the budget hears of it, and what speaks against one after it: what
/// is noted allows what was given. `check` gets the failures that were noted when a retry was asked for.
fn play(budget: &Arc<RetryBudget>, active: u32, threads: &[Vec<Step>], check: impl Fn(&Seen, u32) + Sync) -> Seen {
    let (seen, check) = (Seen::default(), &check);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let begin = std::sync::Barrier::new(threads.len());
    std::thread::scope(|scope| {
        for steps in threads {
            let (seen, begin, handle) = (&seen, &begin, runtime.handle());
            scope.spawn(move || {
                let _inside = handle.enter();
                let mut held = Vec::new();
                begin.wait();
                for step in steps {
                    match step {
                        Step::Begins => {
                            seen.begun.fetch_add(1, SeqCst);
                            budget.call_begins();
                        }
                        Step::Ends { failed: true } => {
                            budget.attempt_ended(true);
                            seen.failed.fetch_add(1, SeqCst);
                        }
                        Step::Ends { failed: false } => {
                            seen.succeeded.fetch_add(1, SeqCst);
                            budget.attempt_ended(false);
                        }
                        Step::Wants => {
                            let failed = seen.failed.load(SeqCst);
                            let Some(permit) = budget.try_acquire(active) else { continue };
                            held.push(permit);
                            seen.retries.fetch_add(1, SeqCst);
                            seen.peak.fetch_max(seen.held.fetch_add(1, SeqCst) + 1, SeqCst);
                            check(seen, failed);
                        }
                        Step::GivesBack => {
                            if let Some(permit) = held.pop() {
                                seen.held.fetch_sub(1, SeqCst);
                                drop(permit);
                            }
                        }
                    }
                }
                seen.held.fetch_sub(u32::try_from(held.len()).unwrap(), SeqCst);
            });
        }
    });
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_threads_hold_more_than_a_share(percent in 0.0..100.0f64, min in 0..4u32, active in 0..40u32, threads in threads()) {
        let budget = Arc::new(RetryBudget::percent(percent, min));
        let limit = Limit::percent(percent, min).max(active);
        let seen = play(&budget, active, &threads, |_, _| {});
        prop_assert!(seen.peak.load(SeqCst) <= limit, "{} of {limit}", seen.peak.load(SeqCst));
        prop_assert_eq!(budget.in_flight(), 0);
        prop_assert_eq!(take(&budget, active).len(), limit as usize, "all came back");
    }

    #[test]
    fn no_threads_take_more_than_calls_paid_for(hundredths in 0..150u32, min in 0..2u32, threads in threads()) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let inside = runtime.enter();
        // One window is longer than the test.
        let budget = Arc::new(RetryBudget::ratio(f64::from(hundredths) / 100.0, min, Duration::from_secs(30)));
        drop(inside);
        play(&budget, 0, &threads, |seen, _| {
            let (retries, begun) = (seen.retries.load(SeqCst), seen.begun.load(SeqCst));
            assert!(retries * 100 <= begun * hundredths + min * 3000, "{retries} retries of {begun} calls");
        });
    }

    #[test]
    fn no_threads_retry_while_too_much_fails(tokens in 1..12u32, thousandths in 0..1_500u32, threads in threads()) {
        let budget = Arc::new(RetryBudget::throttle(tokens, f64::from(thousandths) / 1000.0));
        play(&budget, 0, &threads, |seen, failed| {
            // At most: as if all failures had come first.
            let succeeded = seen.succeeded.load(SeqCst);
            let count = tokens.saturating_sub(failed) * 1000 + succeeded * thousandths;
            assert!(count * 2 > tokens * 1000, "{failed} failures, {succeeded} successes");
        });
    }
}
