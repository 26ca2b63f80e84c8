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
