//! Instructions of the pure parts of a request, counted by valgrind: the same on every machine, so that a change of some per cent is seen.

use std::hint::black_box;
use std::io::Write;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, Subcommand};
use mesh_client::bench_api::{CountBench, PickBench, RouteBench, RoutePattern};
use mesh_client::retry::RetryBudget;
use mesh_xds::resource::{LbPolicy, Maglev, RingHash};
use std::time::Duration;

/// Count the instructions of the pure parts of a request: matching, picking, budgets, outlier detection. Each part runs twice under
/// `valgrind --tool=callgrind`, once with more repetitions; the difference is what is printed. Needs valgrind.
#[derive(Debug, Parser)]
#[command(name = "instructions", version)]
struct Options {
    /// Only parts whose names contain this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    only: String,
    /// Exit with status 1 when a part takes more instructions than its limit. Without it the status is 0.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Debug, Subcommand)]
enum Internal {
    /// Run one part, for valgrind to look at.
    #[command(hide = true)]
    Part { name: String, times: usize },
}

/// Repetitions of the shorter run, and how many more the longer one has.
const SHORT: usize = 1_000;
const MORE: usize = 10_000;

/// Makes a part ready, and gives what runs it once.
type Part = fn() -> Box<dyn Fn(usize)>;

/// Names, the most instructions allowed (a sixth above what was measured when the part last changed), and the parts.
const PARTS: [(&str, f64, Part); 13] = [
    ("match: exact path, 10 routes", 980.0, || route(RoutePattern::Exact, 10)),
    ("match: exact path, 5,000 routes", 930.0, || route(RoutePattern::Exact, 5_000)),
    ("match: prefix, 10 routes", 990.0, || route(RoutePattern::Prefix, 10)),
    ("match: prefix, 5,000 routes", 1380.0, || route(RoutePattern::Prefix, 5_000)),
    ("pick: round robin of 1,000", 330.0, || pick(LbPolicy::RoundRobin)),
    ("pick: least request of 1,000", 445.0, || pick(LbPolicy::least_request(2))),
    ("pick: ring hash of 1,000", 355.0, || pick(LbPolicy::RingHash(RingHash::default()))),
    ("pick: maglev of 1,000", 320.0, || pick(LbPolicy::Maglev(Maglev::default()))),
    ("budget: share of the active", 105.0, || budget(RetryBudget::percent(20.0, 3))),
    ("budget: ratio", 510.0, || budget(RetryBudget::ratio(0.2, 10, Duration::from_secs(10)))),
    ("breaker: taken and given back", 45.0, || {
        let bench = CountBench::new();
        Box::new(move |_| bench.admit())
    }),
    ("outlier: a success", 145.0, || {
        let bench = CountBench::new();
        Box::new(move |_| bench.outcome(false))
    }),
    ("outlier: a failure among successes", 160.0, || {
        let bench = CountBench::new();
        Box::new(move |turn| bench.outcome(turn % 2 == 0))
    }),
];

fn route(pattern: RoutePattern, n: usize) -> Box<dyn Fn(usize)> {
    let bench = RouteBench::new(pattern, n);
    Box::new(move |turn| {
        black_box(bench.find(turn));
    })
}

fn pick(policy: LbPolicy) -> Box<dyn Fn(usize)> {
    let bench = PickBench::new(policy, 1_000);
    Box::new(move |_| {
        black_box(bench.pick());
    })
}

fn budget(budget: RetryBudget) -> Box<dyn Fn(usize)> {
    let budget = Arc::new(budget);
    Box::new(move |_| {
        budget.call_begins();
        drop(black_box(budget.try_acquire(100)));
    })
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Part { name, times }) = &options.command {
        let (_, _, part) = PARTS.iter().find(|(other, ..)| other == name).context("no such part")?;
        let part = part();
        (0..*times).for_each(part);
        return Ok(ExitCode::SUCCESS);
    }
    let mut out = std::io::stdout();
    writeln!(out, "{:<40} {:>14} {:>10}", "", "instructions", "at most")?;
    let (mut met, mut counted) = (true, 0);
    for (name, limit, _) in PARTS.iter().filter(|(name, ..)| name.contains(&options.only)) {
        let each = (collected(name, SHORT + MORE)? - collected(name, SHORT)?) / MORE as f64;
        let holds = each <= *limit;
        met &= holds;
        counted += 1;
        writeln!(out, "{name:<40} {each:>14.1} {limit:>10.0}  {}", if holds { "PASS" } else { "FAIL" })?;
    }
    if counted == 0 {
        bail!("no part's name contains {:?}", options.only);
    }
    Ok(if met || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Instructions of a whole process.
fn collected(part: &str, times: usize) -> Result<f64> {
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--callgrind-out-file=/dev/null"]).arg(std::env::current_exe()?).args([
        "part",
        part,
        &times.to_string(),
    ]);
    let ended = command.output().context("valgrind cannot be started: is it installed?")?;
    let said = String::from_utf8_lossy(&ended.stderr);
    ensure!(ended.status.success(), "valgrind ended with {}:\n{said}", ended.status);
    let line = said.lines().find_map(|line| line.split_once("Collected :")).context("valgrind collected nothing")?;
    Ok(line.1.trim().parse()?)
}
