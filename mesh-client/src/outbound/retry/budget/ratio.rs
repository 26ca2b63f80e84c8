//! Linkerd's budget: retries for a share of the calls, over a sliding window, in one word.

use crate::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::time::Instant;

/// Units of a retry: the ratio counts in hundredths.
const RETRY: i64 = 100;

/// Of the word: 12 bits the window's number, then 26 bits each of what this window and the one before have left, signed.
const FIELD: u32 = 26;
const FIELD_MAX: i64 = (1 << (FIELD - 1)) - 1;
const FIELD_MIN: i64 = -(1 << (FIELD - 1));
const WINDOWS: u64 = 1 << 12;

/// What is left of a window of `ttl` is what its calls paid in, less the retries taken out. What the window before left counts for the
/// share of it that lies within `ttl`: it fades out.
#[derive(Debug)]
pub(super) struct Ratio {
    word: AtomicU64,
    began: Instant,
    ttl: Duration,
    /// Units that each call pays in.
    deposit: i64,
    /// Units that are there in any case.
    reserve: i64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Windows {
    number: u64,
    current: i64,
    previous: i64,
}

impl Ratio {
    pub(super) fn new(ratio: f64, min_per_second: u32, ttl: Duration, now: Instant) -> Self {
        let ttl = ttl.clamp(Duration::from_millis(1), Duration::from_secs(3600));
        #[allow(clippy::cast_possible_truncation, reason = "clamped to 0..=100_000; what is no number becomes 0")]
        let deposit = (ratio.clamp(0.0, 1000.0) * RETRY as f64).round() as i64;
        #[allow(clippy::cast_possible_truncation, reason = "clamped to what a field holds")]
        let reserve = (f64::from(min_per_second) * ttl.as_secs_f64() * RETRY as f64).min(FIELD_MAX as f64) as i64;
        Self { word: AtomicU64::new(0), began: now, ttl, deposit, reserve }
    }

    pub(super) fn fresh(&self, now: Instant) -> Self {
        let &Self { ttl, deposit, reserve, .. } = self;
        Self { word: AtomicU64::new(0), began: now, ttl, deposit, reserve }
    }

    /// A call began.
    pub(super) fn deposit(&self, now: Instant) {
        let paid =
            |windows: Windows, _| Some(Windows { current: (windows.current + self.deposit).min(FIELD_MAX), ..windows });
        self.change(now, paid);
    }

    /// Takes a retry out, if there is one.
    pub(super) fn withdraw(&self, now: Instant) -> bool {
        self.change(now, |windows, balance| {
            let left = windows.current - RETRY;
            (balance >= RETRY && left >= FIELD_MIN).then_some(Windows { current: left, ..windows })
        })
    }

    /// `change` gets the windows and the balance of this moment. False: it wants none.
    fn change(&self, now: Instant, change: impl Fn(Windows, i64) -> Option<Windows>) -> bool {
        let since = now.saturating_duration_since(self.began).as_nanos();
        let ttl = self.ttl.as_nanos();
        // At most 1_000_000: the share of the window before that is still within the ttl.
        let within = i64::try_from(1_000_000 - since % ttl * 1_000_000 / ttl).unwrap_or(0);
        let number = u64::try_from(since / ttl % u128::from(WINDOWS)).unwrap_or(0);
        let update = |word: u64| {
            let windows = Windows::unpack(word).at(number);
            let balance = self.reserve + windows.current + windows.previous * within / 1_000_000;
            change(windows, balance).map(Windows::pack)
        };
        self.word.fetch_update(Relaxed, Relaxed, update).is_ok()
    }
}

impl Windows {
    /// Moved on to the window of this number. A thread that was overtaken counts in the newer one.
    fn at(self, number: u64) -> Self {
        match number.wrapping_sub(self.number) % WINDOWS {
            0 => self,
            1 => Self { number, current: 0, previous: self.current },
            // No further behind than threads fall: after an idle spell the number may lie anywhere.
            back if back > WINDOWS - 8 => self,
            _ => Self { number, current: 0, previous: 0 },
        }
    }

    #[allow(clippy::cast_sign_loss, reason = "the fields are masked")]
    fn pack(self) -> u64 {
        let mask = (1u64 << FIELD) - 1;
        self.number << (2 * FIELD) | (self.current as u64 & mask) << FIELD | (self.previous as u64 & mask)
    }

    fn unpack(word: u64) -> Self {
        // Shifted to the top and back, so that the sign comes along.
        let field = |shift: u32| (word << (64 - FIELD - shift)).cast_signed() >> (64 - FIELD);
        Self { number: word >> (2 * FIELD), current: field(FIELD), previous: field(0) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};

    fn taken(ratio: &Ratio, now: Instant) -> usize {
        (0..100_000).take_while(|_| ratio.withdraw(now)).count()
    }

    #[tokio::test(start_paused = true)]
    async fn calls_pay_for_retries_and_the_reserve_is_there_in_any_case() {
        let now = Instant::now();
        let ratio = Ratio::new(0.2, 1, Duration::from_secs(10), now);
        assert_eq!(taken(&ratio, now), 10, "the reserve of ten seconds");
        (0..100).for_each(|_| ratio.deposit(now));
        assert_eq!(taken(&ratio, now), 20);
        let later = now + Duration::from_secs(20);
        assert_eq!(taken(&ratio, later), 10, "debts are forgotten too");
        let none = Ratio::new(f64::NAN, 0, Duration::ZERO, now);
        none.deposit(now);
        assert_eq!(taken(&none, now), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_used_fades_out_within_the_window_after() {
        let now = Instant::now();
        for (seconds, expected) in
            [(0, 100), (9, 100), (10, 100), (15, 50), (19, 10), (20, 0), (1_000, 0), (21_000, 0), (40_000, 0)]
        {
            let ratio = Ratio::new(1.0, 0, Duration::from_secs(10), now);
            (0..100).for_each(|_| ratio.deposit(now));
            assert_eq!(taken(&ratio, now + Duration::from_secs(seconds)), expected, "after {seconds} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn threads_never_take_more_than_there_is() {
        let now = Instant::now();
        let ratio = Ratio::new(0.5, 3, Duration::from_secs(1), now);
        let (calls, retries) = (AtomicU32::new(0), AtomicU32::new(0));
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let (ratio, calls, retries) = (&ratio, &calls, &retries);
                scope.spawn(move || {
                    for turn in 0..5_000 {
                        if (turn + thread) % 4 == 0 {
                            // Counted first: a retry is never seen before the call that paid for it.
                            calls.fetch_add(1, SeqCst);
                            ratio.deposit(now);
                        } else if ratio.withdraw(now) {
                            let taken = retries.fetch_add(1, SeqCst) + 1;
                            assert!(taken <= calls.load(SeqCst) / 2 + 4, "{taken} of {}", calls.load(SeqCst));
                        }
                    }
                });
            }
        });
        // What the last calls paid for, nobody may have taken.
        while ratio.withdraw(now) {
            retries.fetch_add(1, SeqCst);
        }
        assert_eq!(retries.load(SeqCst), calls.load(SeqCst) / 2 + 3);
    }

    proptest! {
        #[test]
        fn any_word_survives_packing(number in 0..WINDOWS, current in FIELD_MIN..=FIELD_MAX, previous in FIELD_MIN..=FIELD_MAX) {
            let windows = Windows { number, current, previous };
            prop_assert_eq!(Windows::unpack(windows.pack()), windows);
        }

        #[test]
        fn over_any_time_retries_stay_within_calls_and_reserves(
            hundredths in 0..200u32,
            min in 0..5u32,
            steps in proptest::collection::vec((0..3_000u64, any::<bool>()), 0..300),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
            let _inside = runtime.enter();
            let began = Instant::now();
            let ratio = Ratio::new(f64::from(hundredths) / 100.0, min, Duration::from_secs(2), began);
            let (mut now, mut calls, mut retries) = (began, 0u32, 0u32);
            for (wait, begins) in steps {
                now += Duration::from_millis(wait);
                if begins {
                    calls += 1;
                    ratio.deposit(now);
                } else if ratio.withdraw(now) {
                    retries += 1;
                }
            }
            let windows = now.duration_since(began).as_secs() / 2 + 1;
            let paid = u64::from(calls * hundredths) / 100 + windows * u64::from(min) * 2;
            prop_assert!(u64::from(retries) <= paid, "{retries} retries, {paid} paid");
        }
    }
}
