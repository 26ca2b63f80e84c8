//! Every interleaving with up to three preemptions, and every value that a relaxed load may see, of a few threads on the counts of the request path: retry budgets,
//! circuit breakers, outlier detection, token buckets, streams of a connection.
//!
//! The files are those of `mesh-client`, included by their paths; only what they call `crate::atomic` is loom's here. That makes this a
//! program rather than a test, which would include their tests too. Run it with `cargo run --manifest-path loom/Cargo.toml`.

#![allow(dead_code, unreachable_pub, reason = "of each file only what counts is modelled")]

/// What the files find under these names in `mesh-client`.
extern crate self as mesh_xds;
extern crate self as tokio;

pub mod time {
    pub use std::time::Instant;
}

pub mod resource {
    /// As in `mesh-xds`.
    #[derive(Clone, Copy)]
    pub struct TokenBucket {
        pub max_tokens: u32,
        pub tokens_per_fill: u32,
        pub fill_interval: std::time::Duration,
    }
}

mod atomic {
    pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
}

#[path = "../../mesh-client/src/outbound/filter/bucket.rs"]
mod bucket;
#[path = "../../mesh-client/src/transport/load.rs"]
mod load;
#[path = "../../mesh-client/src/outbound/retry/budget/ratio.rs"]
mod ratio;
#[path = "../../mesh-client/src/outbound/cluster/rotation.rs"]
mod rotation;
#[path = "../../mesh-client/src/outbound/slots.rs"]
mod slots;
#[path = "../../mesh-client/src/outbound/cluster/outlier/tally.rs"]
mod tally;
#[path = "../../mesh-client/src/outbound/retry/budget/throttle.rs"]
mod throttle;

use loom::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    thread,
};
use resource::TokenBucket;
use rotation::{Place, Rotation};
use std::{
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
    time::{Duration, Instant},
};

/// A thread is stopped in the middle so often at most: more finds the same, and takes for ever.
const PREEMPTIONS: usize = 3;

fn main() {
    // Retry budgets of Envoy's kind, circuit breakers, active faults.
    model("slots never pass their limit and all come back", || {
        let slots = Arc::new(slots::Slots::new());
        let inside = Arc::new(AtomicU32::new(0));
        let refused = all(3, {
            let slots = slots.clone();
            move |_| {
                if slots.take(2).is_none() {
                    return true;
                }
                assert!(inside.fetch_add(1, SeqCst) < 2);
                inside.fetch_sub(1, SeqCst);
                slots.give_back();
                false
            }
        });
        assert!(refused.iter().filter(|refused| **refused).count() <= 1, "two of three always have room");
        assert_eq!(slots.in_use(), 0);
    });
    model("a limit that changes admits no more than the greater one", || {
        let slots = Arc::new(slots::Slots::new());
        let taken = all(3, {
            let slots = slots.clone();
            move |thread| slots.take(if thread == 0 { 1 } else { 2 }).is_some()
        });
        let taken = taken.iter().filter(|taken| **taken).count();
        assert_eq!((slots.in_use(), taken), (2, 2));
    });
    // gRPC's throttle.
    model("a throttle loses no count", || {
        let throttle = Arc::new(throttle::Throttle::new(4, 0.5));
        throttle.count(true);
        throttle.count(true);
        all(3, {
            let throttle = throttle.clone();
            move |thread| throttle.count(thread == 0)
        });
        // Two of four, less one, and twice a half more, in any order: two, which is half.
        assert!(!throttle.allows());
        throttle.count(false);
        assert!(throttle.allows());
    });
    // Linkerd's budget.
    model("a ratio gives out no more than was paid in", || {
        let now = Instant::now();
        let ratio = Arc::new(ratio::Ratio::new(1.0, 0, Duration::from_secs(10), now));
        let taken = all(3, {
            let ratio = ratio.clone();
            move |thread| {
                if thread == 0 {
                    ratio.deposit(now);
                    false
                } else {
                    ratio.withdraw(now)
                }
            }
        });
        let taken = taken.iter().filter(|taken| **taken).count() + usize::from(ratio.withdraw(now));
        assert_eq!(taken, 1, "what was paid in is there, once");
    });
    model("a thread that is overtaken by the next window takes nothing twice", || {
        let now = Instant::now();
        let ttl = Duration::from_secs(10);
        let ratio = Arc::new(ratio::Ratio::new(1.0, 0, ttl, now));
        ratio.deposit(now);
        let taken = all(3, {
            let ratio = ratio.clone();
            move |thread| ratio.withdraw(if thread == 0 { now + ttl } else { now })
        });
        assert!(taken.iter().filter(|taken| **taken).count() <= 1);
    });
    // Outlier detection.
    model("one request at a time is the probe of an endpoint on probation", || {
        let rotation = Arc::new(Rotation::new());
        rotation.set(Place::Out);
        rotation.set(Place::Probation);
        let probes = Arc::new(AtomicU32::new(0));
        let probed = all(3, {
            let (rotation, probes) = (rotation.clone(), probes.clone());
            move |_| {
                if !rotation.admits() {
                    return false;
                }
                let probe = rotation.begins();
                if probe {
                    assert_eq!(probes.fetch_add(1, SeqCst), 0, "two probes at once");
                    probes.fetch_sub(1, SeqCst);
                    rotation.given_up();
                }
                probe
            }
        });
        assert!(probed.iter().any(|probed| *probed), "somebody is let in");
        assert!(rotation.is_on_probation() && rotation.is_open(), "and others after them");
    });
    model("a probe that is given up does not undo what was decided", || {
        let rotation = Arc::new(Rotation::new());
        rotation.set(Place::Out);
        rotation.set(Place::Probation);
        let writer = {
            let rotation = rotation.clone();
            thread::spawn(move || rotation.set(Place::Out))
        };
        if rotation.admits() && rotation.begins() {
            rotation.given_up();
        }
        assert!(writer.join().unwrap(), "it was not out before");
        assert!(rotation.is_out());
    });
    model("an interval counts each request once", || {
        let interval = Arc::new(tally::Interval::default());
        let counting = {
            let interval = interval.clone();
            thread::spawn(move || all(2, move |thread| interval.count(thread == 0)))
        };
        let (first, second) = (interval.take(), interval.take());
        counting.join().unwrap();
        let last = interval.take();
        assert_eq!(first.failures + second.failures + last.failures, 1);
        assert_eq!(first.successes + second.successes + last.successes, 1);
    });
    model("as many failures as the threshold complete a row", || {
        let row = Arc::new(tally::Row::default());
        let complete = all(3, move |_| row.completes(3));
        assert!(complete.iter().any(|complete| *complete));
    });
    model("fewer failures than the threshold complete none", || {
        let row = Arc::new(tally::Row::default());
        let complete = all(3, move |thread| {
            if thread == 0 {
                row.clear();
                false
            } else {
                row.completes(3)
            }
        });
        assert!(!complete.iter().any(|complete| *complete));
    });
    // Rate limits.
    model("a bucket gives each token once", || {
        let now = Instant::now();
        let config = TokenBucket { max_tokens: 2, tokens_per_fill: 1, fill_interval: Duration::from_secs(1) };
        let bucket = Arc::new(bucket::Bucket::new(config, now));
        let taken = all(3, {
            let bucket = bucket.clone();
            move |_| bucket.take(1, now)
        });
        assert_eq!(taken.iter().filter(|taken| **taken).count(), 2);
        assert_eq!(bucket.tokens(now), 0);
    });
    // Streams of a connection.
    model("one of those who close a connection and end its streams finds it empty", || {
        let load = Arc::new(load::Load::default());
        load.try_start(9).unwrap();
        let empty = all(3, {
            let load = load.clone();
            move |thread| match thread {
                0 => {
                    let before = load.close();
                    !before.is_closed() && before.in_flight() == 0
                }
                1 => {
                    let now = load.finish();
                    now.is_closed() && now.in_flight() == 0
                }
                _ => load.try_start(9).is_some_and(|_| {
                    let now = load.finish();
                    now.is_closed() && now.in_flight() == 0
                }),
            }
        });
        assert_eq!(empty.iter().filter(|empty| **empty).count(), 1, "it says goodbye once");
        assert!(load.try_start(9).is_none());
    });
    model("a connection never carries more streams than it may", || {
        let load = Arc::new(load::Load::default());
        all(3, {
            let load = load.clone();
            move |_| {
                if let Some(now) = load.try_start(2) {
                    assert!(now.in_flight() <= 2);
                    load.finish();
                }
            }
        });
        assert_eq!(load.snapshot().in_flight(), 0);
    });
}

/// Runs `check` in all interleavings, and says how many there were.
fn model(name: &str, check: impl Fn() + Sync + Send + 'static) {
    let begun = Instant::now();
    let count = std::sync::Arc::new(AtomicUsize::new(0));
    let counted = count.clone();
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.check(move || {
        counted.fetch_add(1, Relaxed);
        check();
    });
    println!("{:>8} interleavings in {:>6.2?}: {name}", count.load(Relaxed), begun.elapsed());
}

/// What so many threads return, the caller's included.
fn all<T: 'static>(threads: usize, run: impl Fn(usize) -> T + 'static) -> Vec<T> {
    let run = Arc::new(run);
    let others: Vec<_> = (1..threads)
        .map(|thread| {
            let run = run.clone();
            thread::spawn(move || run(thread))
        })
        .collect();
    let mut results = vec![run(0)];
    results.extend(others.into_iter().map(|other| other.join().unwrap()));
    results
}
