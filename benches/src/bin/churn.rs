//! Latency while endpoints come and go, beside that of a quiet mesh.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use benches::client::Kind;
use benches::load::{Load, Measured, Shape};
use benches::report::median;
use benches::worker::{self, Flavor, Internal, Role, Worker};
use benches::xds::{self, ControlPlane};
use clap::Parser;
use tokio::time::{MissedTickBehavior, interval};

/// Measure what changes of the endpoints cost those who call: latency and throughput of a closed loop over a cluster of many endpoints,
/// while nothing changes and while endpoints are replaced all the time, in turns. Ratios are taken within a round. The client is a
/// process of its own; the control plane is in this one.
#[derive(Debug, Parser)]
#[command(name = "churn", version)]
struct Options {
    /// Endpoints of the cluster; each is a listening socket of the server's process.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    endpoints: usize,
    /// Assignments in each second, each with another endpoint.
    #[arg(long, value_name = "N", default_value_t = 100)]
    changes: u32,
    /// Calls in flight.
    #[arg(long, value_name = "N", default_value_t = 32)]
    concurrency: usize,
    /// Measured time of each turn, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2.0)]
    seconds: f64,
    /// Turns, quiet and not.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Exit with status 1 when the p99 under churn is over 1.3 times the quiet one. Without it the status is 0.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

/// What the p99 may become.
const ALLOWED: f64 = 1.3;
/// Listening sockets that take the places of others.
const SPARES: usize = 50;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    if !(1..=20_000).contains(&options.endpoints) || !(1..=1_000).contains(&options.changes) {
        bail!("--endpoints is between 1 and 20000 and --changes between 1 and 1000");
    }
    if !(0.1..=60.0).contains(&options.seconds) || !(1..=100).contains(&options.rounds) || options.concurrency == 0 {
        bail!("--seconds is between 0.1 and 60, --rounds between 1 and 100, and --concurrency at least 1");
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(run(&options))
}

async fn run(options: &Options) -> Result<ExitCode> {
    let (server, addresses) = Worker::server(options.endpoints + SPARES).await?;
    let mut current = addresses[..options.endpoints].to_vec();
    let mut spares = addresses[options.endpoints..].to_vec();
    let control_plane = ControlPlane::start(&[&current]).await?;
    let flavor = Flavor::MultiThread;
    let role =
        Role::Client { kind: Kind::Mesh, flavor, addresses: addresses.clone(), control_plane: control_plane.address() };
    let mut client = Worker::client(&role).await?;
    let run_ms = u64::try_from(Duration::from_secs_f64(options.seconds).as_millis())?;
    let load = Load {
        payload: 64,
        shape: Shape::Echo,
        concurrency: options.concurrency,
        warm_ms: 300,
        run_ms,
        counted_calls: 0,
    };
    // Until every endpoint is connected, connecting is what would be measured.
    let connect = Load { warm_ms: 50, run_ms: 3_000, ..load };
    client.run(&connect).await?;

    let (mut quiet, mut busy, mut made) = (Vec::new(), Vec::new(), 0);
    for _ in 0..options.rounds {
        quiet.push(client.run(&load).await?);
        let mut ticks = interval(Duration::from_secs(1) / options.changes);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let measured = client.run(&load);
        tokio::pin!(measured);
        let measured = loop {
            tokio::select! {
                measured = &mut measured => break measured?,
                _ = ticks.tick() => {
                    let (at, spare) = (fastrand::usize(..current.len()), fastrand::usize(..spares.len()));
                    std::mem::swap(&mut current[at], &mut spares[spare]);
                    control_plane.set_endpoints(xds::encode(&[&current]));
                    made += 1;
                }
            }
        };
        busy.push(measured);
    }
    client.stop().await?;
    control_plane.stop().await;
    server.stop().await?;

    let mut out = std::io::stdout();
    let turn = options.seconds + 0.3;
    let rate = f64::from(made) / (turn * options.rounds as f64);
    writeln!(out, "{} endpoints, c={}, {rate:.0} changes per second", options.endpoints, options.concurrency)?;
    writeln!(out, "  {:<12} {:>10} {:>10} {:>10}", "median of", "quiet", "churn", "ratio")?;
    let mut row = |name: &str, of: fn(&Measured) -> f64| -> Result<f64> {
        let ratio = median(quiet.iter().zip(&busy).map(|(quiet, busy)| of(busy) / of(quiet)).collect());
        let value = |turns: &[Measured]| median(turns.iter().map(of).collect());
        writeln!(out, "  {name:<12} {:>10.1} {:>10.1} {ratio:>10.2}", value(&quiet), value(&busy))?;
        Ok(ratio)
    };
    row("rps", |m| m.rps)?;
    row("p50 us", |m| m.p50_us)?;
    let p99 = row("p99 us", |m| m.p99_us)?;
    row("CPU us/call", |m| m.cpu_us)?;
    let holds = p99 <= ALLOWED;
    writeln!(out, "{}  mesh: p99 under churn within {ALLOWED} of the quiet one", if holds { "PASS" } else { "FAIL" })?;
    Ok(if holds || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
