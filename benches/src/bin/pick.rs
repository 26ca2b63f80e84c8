//! Measures one load balancing decision: nanoseconds per pick, by policy and number of endpoints.

use std::hint::black_box;
use std::io::Write;
use std::process::ExitCode;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use anyhow::{Result, bail};
use benches::report::median;
use clap::Parser;
use mesh_client::bench_api::{ApplyBench, PickBench};
use mesh_xds::resource::{LbPolicy, Maglev, PeakEwma, RingHash, WeightedRoundRobin};
use tokio::time::Instant;

/// Measure the pick alone: the pointer load, the policy's choice, and the handle of the endpoint. And how long it takes to build the
/// picker anew when one endpoint changes.
#[derive(Debug, Parser)]
#[command(name = "pick", version)]
struct Options {
    /// Numbers of endpoints.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [3, 100, 10_000])]
    endpoints: Vec<usize>,
    /// Numbers of endpoints of which the pickers are built, after one has changed.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1_000, 10_000])]
    built: Vec<usize>,
    /// Time for each policy and number of endpoints, in seconds; it is cut in nine parts, of which the median counts.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,
    /// Exit with status 1 when a policy is not flat: ten thousand endpoints cost over three times as much as three.
    /// Without it the status is 0.
    #[arg(long)]
    check: bool,
}

/// Parts of the time, of which the median counts.
const PARTS: u32 = 9;
/// Picks between two looks at the clock.
const BATCH: u32 = 1_000;
/// Nanoseconds that a pick may cost at the last number of endpoints.
const MOST: f64 = 50.0;
/// What the most endpoints may cost over what the fewest cost, memory that is out of the cache included.
const FLAT: f64 = 3.0;

/// Entries of the ring: a few for each endpoint.
const RING: u64 = 65_536;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if !(0.01..=60.0).contains(&options.seconds) {
        bail!("--seconds is between 0.01 and 60, not {}", options.seconds);
    }
    if options.endpoints.is_empty() || options.endpoints.iter().any(|count| !(1..=1_000_000).contains(count)) {
        bail!("--endpoints are between 1 and 1000000");
    }
    if options.built.iter().any(|count| !(1..=1_000_000).contains(count)) {
        bail!("--built are between 1 and 1000000");
    }
    let part = Duration::from_secs_f64(options.seconds) / PARTS;
    let reported = WeightedRoundRobin { blackout: Duration::ZERO, ..WeightedRoundRobin::default() };
    let policies = [
        ("round robin", LbPolicy::RoundRobin),
        ("random", LbPolicy::Random),
        ("least request", LbPolicy::least_request(2)),
        ("least request, 10 choices", LbPolicy::least_request(10)),
        ("ring hash", LbPolicy::RingHash(RingHash { min_size: RING, ..RingHash::default() })),
        ("maglev", LbPolicy::Maglev(Maglev::default())),
        ("weighted round robin, reports", LbPolicy::WeightedRoundRobin(Arc::new(reported))),
        ("pick first", LbPolicy::PickFirst { shuffle: false }),
        ("peak ewma", LbPolicy::PeakEwma(PeakEwma::default())),
    ];
    let mut out = std::io::stdout();
    let mut flat = true;
    let mut slow = Vec::new();
    for threads in [1, 2] {
        write!(out, "{:<36}", format!("ns per pick, threads={threads}"))?;
        for count in &options.endpoints {
            write!(out, " {:>10}", format!("n={count}"))?;
        }
        writeln!(out)?;
        for (name, policy) in &policies {
            write!(out, "  {name:<34}")?;
            let mut costs = Vec::new();
            for count in &options.endpoints {
                let bench = PickBench::new(policy.clone(), *count);
                let cost = median((0..PARTS).map(|_| run(&bench, threads, part)).collect());
                write!(out, " {cost:>10.1}")?;
                costs.push(cost);
            }
            writeln!(out)?;
            if threads == 1 && costs[costs.len() - 1] > FLAT * costs[0] {
                flat = false;
            }
            if threads == 1 && costs[costs.len() - 1] > MOST {
                slow.push(name.to_owned());
            }
        }
    }
    build(&mut out, &policies, &options.built)?;
    writeln!(out, "{} flat from the first to the last number of endpoints", if flat { "PASS" } else { "FAIL" })?;
    let met = if slow.is_empty() { "PASS".to_owned() } else { format!("FAIL ({})", slow.join(", ")) };
    writeln!(out, "{met} at most {MOST} ns at the last number of endpoints, with one thread")?;
    Ok(if flat && slow.is_empty() || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// How long each policy takes to use an assignment in which one endpoint is another, in milliseconds.
fn build(out: &mut impl Write, policies: &[(&str, LbPolicy)], counts: &[usize]) -> Result<()> {
    write!(out, "{:<36}", "ms to build, one endpoint changed")?;
    for count in counts {
        write!(out, " {:>10}", format!("n={count}"))?;
    }
    writeln!(out)?;
    for (name, policy) in policies {
        write!(out, "  {name:<34}")?;
        for count in counts {
            let mut bench = ApplyBench::new(policy.clone(), *count);
            let times = (0..PARTS).map(|_| {
                let next = bench.next_assignment();
                let start = Instant::now();
                bench.apply(next);
                start.elapsed().as_secs_f64() * 1e3
            });
            write!(out, " {:>10.3}", median(times.collect()))?;
        }
        writeln!(out)?;
    }
    Ok(())
}

/// Picks on `threads` threads for `time` and returns the nanoseconds of a thread per pick.
fn run(bench: &PickBench, threads: usize, time: Duration) -> f64 {
    let barrier = Barrier::new(threads);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    barrier.wait();
                    let (start, mut picks) = (Instant::now(), 0_u32);
                    loop {
                        for _ in 0..BATCH {
                            black_box(bench.pick());
                        }
                        picks += BATCH;
                        let elapsed = start.elapsed();
                        if elapsed >= time {
                            return elapsed.as_secs_f64() * 1e9 / f64::from(picks);
                        }
                    }
                })
            })
            .collect();
        median(workers.into_iter().filter_map(|worker| worker.join().ok()).collect())
    })
}
