//! A mesh in a network that fails at random: whatever happens, it keeps its promises, and when it stops all is well again.
//!
//! Each seed is a configuration, a load and a row of faults: links that part and heal, backends that crash (silently or not) and come back,
//! that are slow or fail, endpoints that leave and join, a control plane that is lost. Client, control plane and backends are the real
//! ones, on one runtime with paused time, over pipes in memory ([`mesh_client::dial`]). In every seed:
//!
//! - retries, as they reach the backends, stay within the budget, Envoy's, Linkerd's or gRPC's, and within those of their call;
//! - no call outlives its timeout;
//! - an endpoint gets no request once its removal is known, and no stream outlives the drain;
//! - after the faults every call succeeds, and every endpoint is used;
//! - at the end all counts are zero, and all connections closed.
//!
//! `MESH_SIM_SEED=7` runs one seed, and tells what happens; `MESH_SIM_SEEDS=5000` that many.

#![allow(clippy::unwrap_used, reason = "helpers of tests: a panic is the report")]
#![allow(clippy::print_stdout, reason = "what was played")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small numbers")]

mod backend;
mod ledger;
mod net;
mod plan;
mod resources;
mod world;

use plan::Plan;
use std::{
    cell::Cell,
    panic::{self, AssertUnwindSafe},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};
use world::Summary;

/// Of the usual run.
const SEEDS: u64 = 200;

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

#[test]
fn whatever_fails_promises_are_kept_and_all_is_well_when_it_stops() {
    match number("MESH_SIM_SEED") {
        Some(seed) => play(seed).unwrap_or_else(|wrong| panic!("{}", report(seed, &wrong))),
        None => play_all(number("MESH_SIM_SEEDS").unwrap_or(SEEDS)),
    };
}

#[test]
#[ignore = "takes minutes"]
fn thousands_of_seeds() {
    play_all(5_000);
}

fn play_all(seeds: u64) -> Summary {
    let next = AtomicU64::new(0);
    let failures = Mutex::new(Vec::new());
    let total = Mutex::new(Summary::default());
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    match play(seed) {
                        Ok(summary) => *total.lock().unwrap() += summary,
                        Err(wrong) => failures.lock().unwrap().push(report(seed, &wrong)),
                    }
                }
            });
        }
    });
    let (failures, total) = (failures.into_inner().unwrap(), total.into_inner().unwrap());
    println!("{seeds} seeds: {total:?}");
    assert!(failures.is_empty(), "{} of {seeds} seeds:\n{}", failures.len(), failures.join("\n"));
    assert!(total.retries > 0 && total.failed > 0, "nothing failed: {total:?}");
    total
}

fn play(seed: u64) -> Result<Summary, String> {
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            PANICS.set(PANICS.get() + 1);
            usual(info);
        }));
    });
    fastrand::seed(seed);
    PANICS.set(0);
    let played = panic::catch_unwind(AssertUnwindSafe(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(world::run(seed))
    }));
    match played {
        _ if PANICS.get() > 0 => Err("a panic, see above".to_owned()),
        Ok(result) => result,
        Err(_) => Err("a panic".to_owned()),
    }
}

fn report(seed: u64, wrong: &str) -> String {
    format!(
        "seed {seed}: {wrong}\n  alone: MESH_SIM_SEED={seed} cargo test --workspace --all-features --test simulation\n  {:?}",
        Plan::of(seed)
    )
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

impl std::ops::AddAssign for Summary {
    fn add_assign(&mut self, other: Self) {
        self.calls += other.calls;
        self.failed += other.failed;
        self.retries += other.retries;
    }
}
