//! Messages in a row and large bodies, beside bare hyper, in turns.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use benches::client::Kind;
use benches::load::{Load, Shape};
use benches::report::median;
use benches::worker::{self, Flavor, Internal, Role, Worker};
use benches::xds::ControlPlane;
use clap::Parser;

/// Measure streams: server streaming of messages of 1 KiB, and bodies of 1 MiB down and up, over loopback, three backends, each client in
/// a process of its own, all in turns. Printed are medians over the rounds, and the ratios to bare hyper HTTP/2 within a round.
#[derive(Debug, Parser)]
#[command(name = "streams", version)]
struct Options {
    /// Measured time of each turn, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,
    /// Turns of each client in each shape.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Calls in flight.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 8])]
    concurrency: Vec<usize>,
    /// Exit with status 1 when the mesh has a lower throughput than bare hyper anywhere. Without it the status is 0.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

/// Messages of one streaming call.
const MESSAGES: usize = 1_000;
const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const KINDS: [Kind; 3] = [Kind::Hyper, Kind::Bare, Kind::Mesh];

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    if !(0.05..=60.0).contains(&options.seconds) || !(1..=100).contains(&options.rounds) {
        bail!("--seconds is between 0.05 and 60, and --rounds between 1 and 100");
    }
    if options.concurrency.is_empty() || options.concurrency.iter().any(|calls| !(1..=1_000).contains(calls)) {
        bail!("--concurrency is between 1 and 1000");
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(run(&options))
}

async fn run(options: &Options) -> Result<ExitCode> {
    let (server, addresses) = Worker::server(3).await?;
    let control_plane = ControlPlane::start(&[&addresses]).await?;
    let mut clients = Vec::new();
    for kind in KINDS {
        let (addresses, control_plane) = (addresses.clone(), control_plane.address());
        let role = Role::Client { kind, flavor: Flavor::MultiThread, addresses, control_plane };
        clients.push(Worker::client(&role).await.with_context(|| kind.name())?);
    }
    let shapes = [
        ("1,000 messages of 1 KiB, down", Shape::Down { messages: MESSAGES, size: KIB }, 64, MESSAGES * KIB),
        ("a body of 1 MiB, down", Shape::Down { messages: 1, size: MIB }, 64, MIB),
        ("a body of 1 MiB, up", Shape::Up, MIB, MIB),
    ];
    let mut out = std::io::stdout();
    let mut met = true;
    for (name, shape, payload, bytes) in shapes {
        for concurrency in options.concurrency.iter().copied() {
            writeln!(out, "{name}, c={concurrency}")?;
            writeln!(out, "  {:<32} {:>10} {:>12} {:>12} {:>12}", "", "MB/s", "CPU us/call", "throughput", "CPU")?;
            let mut turns = vec![Vec::new(); KINDS.len()];
            for round in 0..options.rounds {
                for turn in 0..KINDS.len() {
                    let which = (turn + round) % KINDS.len();
                    let run_ms = u64::try_from(Duration::from_secs_f64(options.seconds).as_millis())?;
                    let load =
                        Load { payload, shape, concurrency, warm_ms: (run_ms / 8).max(50), run_ms, counted_calls: 0 };
                    turns[which].push(clients[which].run(&load).await?);
                }
            }
            for (kind, measured) in KINDS.into_iter().zip(&turns) {
                let of = |value: &dyn Fn(usize) -> f64| median((0..options.rounds).map(value).collect());
                let throughput = of(&|round| measured[round].rps / turns[0][round].rps);
                let rate = of(&|round| measured[round].rps * bytes as f64 / 1e6);
                let cpu = of(&|round| measured[round].cpu_us);
                let of_cpu = of(&|round| measured[round].cpu_us / turns[0][round].cpu_us);
                writeln!(out, "  {:<32} {rate:>10.0} {cpu:>12.0} {throughput:>12.2} {of_cpu:>12.2}", kind.title())?;
                if kind == Kind::Mesh {
                    let holds = throughput >= 1.0;
                    met &= holds;
                    writeln!(out, "{}  mesh: no less than bare hyper", if holds { "PASS" } else { "FAIL" })?;
                }
            }
        }
    }
    for client in clients {
        client.stop().await?;
    }
    control_plane.stop().await;
    server.stop().await?;
    Ok(if met || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
