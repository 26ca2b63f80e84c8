//! Instructions of the pure parts of a request, counted by valgrind: the same on every machine, so that a change of some per cent is seen.
//!
//! `cargo bench -p benches` with valgrind and `gungraun-runner` (`cargo install gungraun-runner --version 0.20.0`). Each part is run a
//! thousand times, and fails when it takes more than its limit: a sixth above what was measured when it last changed.

#![allow(missing_docs, unused_qualifications, reason = "what the macros make has neither documents nor short names")]

use gungraun::{Callgrind, EventKind, prelude::*};
use mesh_client::{
    bench_api::{CountBench, PickBench, RouteBench, RoutePattern},
    retry::RetryBudget,
};
use mesh_xds::resource::{LbPolicy, Maglev, RingHash};
use std::{hint::black_box, sync::Arc, time::Duration};

/// Repetitions in one run.
const TIMES: usize = 1_000;

/// At most so many instructions for each repetition.
fn at_most(each: u64) -> LibraryBenchmarkConfig {
    let limit = (EventKind::Ir, each * TIMES as u64);
    let mut config = LibraryBenchmarkConfig::default();
    config.tool(Callgrind::default().hard_limits([limit]));
    config
}

fn pick_of_1000(policy: LbPolicy) -> PickBench {
    PickBench::new(policy, 1_000)
}

// What a bench was set up with comes back, so that its end is not counted.
#[library_benchmark]
#[bench::exact_path_of_10(args = (RoutePattern::Exact, 10), setup = RouteBench::new, config = at_most(950))]
#[bench::exact_path_of_5000(args = (RoutePattern::Exact, 5_000), setup = RouteBench::new, config = at_most(895))]
#[bench::prefix_of_10(args = (RoutePattern::Prefix, 10), setup = RouteBench::new, config = at_most(960))]
#[bench::prefix_of_5000(args = (RoutePattern::Prefix, 5_000), setup = RouteBench::new, config = at_most(1_350))]
fn route(routes: RouteBench) -> RouteBench {
    for turn in 0..TIMES {
        black_box(routes.find(turn));
    }
    routes
}

#[library_benchmark]
#[bench::round_robin(args = (LbPolicy::RoundRobin), setup = pick_of_1000, config = at_most(285))]
#[bench::least_request(args = (LbPolicy::least_request(2)), setup = pick_of_1000, config = at_most(385))]
#[bench::ring_hash(args = (LbPolicy::RingHash(RingHash::default())), setup = pick_of_1000, config = at_most(355))]
#[bench::maglev(args = (LbPolicy::Maglev(Maglev::default())), setup = pick_of_1000, config = at_most(320))]
fn pick(endpoints: PickBench) -> PickBench {
    for _ in 0..TIMES {
        black_box(endpoints.pick());
    }
    endpoints
}

// A call that begins, and a retry.
#[library_benchmark]
#[bench::share_of_the_active(args = (RetryBudget::percent(20.0, 3)), setup = Arc::new, config = at_most(126))]
#[bench::ratio(args = (RetryBudget::ratio(0.2, 10, Duration::from_secs(10))), setup = Arc::new, config = at_most(515))]
#[bench::throttle(args = (RetryBudget::throttle(100, 0.1)), setup = Arc::new, config = at_most(86))]
fn budget(budget: Arc<RetryBudget>) -> Arc<RetryBudget> {
    for _ in 0..TIMES {
        budget.call_begins();
        drop(black_box(budget.try_acquire(100)));
    }
    budget
}

// Taken and given back.
#[library_benchmark]
#[bench::of_a_cluster(args = (), setup = CountBench::new, config = at_most(40))]
fn breaker(counts: CountBench) -> CountBench {
    for _ in 0..TIMES {
        counts.admit();
    }
    counts
}

// With the count in flight.
#[library_benchmark]
#[bench::successes(args = (), setup = CountBench::new, config = at_most(137))]
fn outlier(counts: CountBench) -> CountBench {
    for _ in 0..TIMES {
        counts.outcome(false);
    }
    counts
}

#[library_benchmark]
#[bench::every_other_a_failure(args = (), setup = CountBench::new, config = at_most(150))]
fn outlier_failures(counts: CountBench) -> CountBench {
    for turn in 0..TIMES {
        counts.outcome(turn % 2 == 0);
    }
    counts
}

library_benchmark_group!(name = parts, benchmarks = [route, pick, budget, breaker, outlier, outlier_failures]);
main!(library_benchmark_groups = parts);
