//! Measures one route lookup: nanoseconds per request, by the kind of match and the number of routes.

use std::hint::black_box;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use benches::report::median;
use clap::Parser;
use mesh_client::bench_api::{RouteBench, RoutePattern};
use tokio::time::Instant;

/// Measure how long it takes to find the route of a request.
#[derive(Debug, Parser)]
#[command(name = "routes", version)]
struct Options {
    /// Numbers of routes.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [100, 1_000, 5_000])]
    routes: Vec<usize>,
    /// Time for each kind and number, in seconds; it is cut in nine parts, of which the median counts.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,
    /// Exit with status 1 when five thousand routes cost over three times as much as a hundred. Without it the status is 0.
    #[arg(long)]
    check: bool,
}

/// Parts of the time, of which the median counts.
const PARTS: u32 = 9;
/// Lookups between two looks at the clock.
const BATCH: u32 = 1_000;
/// What the most routes may cost over what the fewest cost.
const FLAT: f64 = 3.0;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if !(0.01..=60.0).contains(&options.seconds) {
        bail!("--seconds is between 0.01 and 60, not {}", options.seconds);
    }
    if options.routes.is_empty() || options.routes.iter().any(|count| !(1..=1_000_000).contains(count)) {
        bail!("--routes are between 1 and 1000000");
    }
    let part = Duration::from_secs_f64(options.seconds) / PARTS;
    let mut out = std::io::stdout();
    write!(out, "{:<16}", "ns per lookup")?;
    for count in &options.routes {
        write!(out, " {:>10}", format!("n={count}"))?;
    }
    writeln!(out)?;
    let mut flat = true;
    for (name, pattern) in [("exact paths", RoutePattern::Exact), ("prefixes", RoutePattern::Prefix)] {
        write!(out, "  {name:<14}")?;
        let mut costs = Vec::new();
        for count in &options.routes {
            let bench = RouteBench::new(pattern, *count);
            let cost = median((0..PARTS).map(|_| run(&bench, part)).collect::<Result<_>>()?);
            write!(out, " {cost:>10.1}")?;
            costs.push(cost);
        }
        writeln!(out)?;
        flat &= costs[costs.len() - 1] <= FLAT * costs[0];
    }
    writeln!(out, "{} flat from the first to the last number of routes", if flat { "PASS" } else { "FAIL" })?;
    Ok(if flat || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Looks routes up for `time`, and returns the nanoseconds of each.
fn run(bench: &RouteBench, time: Duration) -> Result<f64> {
    let (start, mut lookups, mut found) = (Instant::now(), 0_u32, 0_u32);
    loop {
        for turn in 0..BATCH as usize {
            found += u32::from(black_box(bench.find(turn)));
        }
        lookups += BATCH;
        let elapsed = start.elapsed();
        if elapsed >= time {
            if found != lookups {
                bail!("{} lookups found another route", lookups - found);
            }
            return Ok(elapsed.as_secs_f64() * 1e9 / f64::from(lookups));
        }
    }
}
