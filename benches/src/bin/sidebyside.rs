//! Runs every client in turns against the same backends and prints one table.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use benches::client::Kind;
use benches::envoy;
use benches::report;
use benches::suite::{self, Cell, Extent, Plan};
use benches::worker::{self, Internal};
use clap::Parser;

/// Measure mesh beside its peers: unary gRPC echo over loopback, closed loop, the server in a process of its own, each
/// client in a process of its own, and all clients in turns, so that noise hits all alike.
///
/// Printed are medians over the rounds: calls per second (rps), latency (p50, p99), CPU time of the client's process per
/// call, blocks allocated per call (counted in a run of their own), and the ratios to the reference, which is bare hyper
/// HTTP/2 with one connection per backend and round robin. Ratios are taken within a round. Absolute values move with
/// the machine; ratios hardly do.
#[derive(Debug, Parser)]
#[command(name = "sidebyside", version)]
struct Options {
    /// Measure only c=1, 32 and 256 with 64 bytes, 3 backends and the multi-threaded runtime, in under a minute.
    #[arg(long, conflicts_with = "full")]
    quick: bool,
    /// Measure every combination of c=1,8,32,256, payload=64,16384, backends=3,30 and runtime=multi,current (about
    /// half an hour).
    #[arg(long)]
    full: bool,
    /// Measured time of each turn, in seconds [default: 0.5, with --quick 0.25].
    #[arg(long, value_name = "SECONDS")]
    seconds: Option<f64>,
    /// Turns of each client in each cell [default: 7, with --quick 5].
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// Keep only what matches: c=N, payload=BYTES, backends=N, runtime=multi|current, client=NAME. May be repeated or
    /// separated by commas; values of one key are alternatives. Client names: hyper (always measured), bare, tonic,
    /// balance-list, tonic-xds, envoy, mesh.
    #[arg(long, value_name = "KEY=VALUE", value_delimiter = ',')]
    only: Vec<String>,
    /// Also write the medians to FILE, as a JSON array.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with status 1 when a target that was measured is missed. Without it the status is 0.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(run(options))
}

async fn run(options: Options) -> Result<ExitCode> {
    let plan = plan(&options)?;
    let mut out = std::io::stdout();
    let turns = suite::run(&plan, &mut std::io::stderr()).await?;
    let medians = report::medians(&turns);
    write!(out, "{}", report::table(&medians))?;
    if let Some(file) = &options.json {
        std::fs::write(file, format!("{:#}\n", report::json(&medians)))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    let targets = report::targets(&medians);
    writeln!(out, "\n{}", report::verdicts(&targets))?;
    let met = targets.iter().all(report::Target::is_met);
    Ok(if met || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn plan(options: &Options) -> Result<Plan> {
    let extent = match (options.quick, options.full) {
        (true, _) => Extent::Quick,
        (_, true) => Extent::Full,
        _ => Extent::Usual,
    };
    let seconds = options.seconds.unwrap_or(if options.quick { 0.25 } else { 0.5 });
    if !(0.05..=60.0).contains(&seconds) {
        bail!("--seconds is between 0.05 and 60, not {seconds}");
    }
    let rounds = options.rounds.unwrap_or(if options.quick { 5 } else { 7 });
    if !(1..=100).contains(&rounds) {
        bail!("--rounds is between 1 and 100, not {rounds}");
    }
    let filter = Filter::parse(&options.only)?;
    let all = extent.cells();
    let cells: Vec<Cell> = all.iter().copied().filter(|cell| filter.keeps(cell)).collect();
    if cells.is_empty() {
        let all: Vec<String> = all.iter().map(Cell::to_string).collect();
        bail!("--only leaves nothing of:\n  {}\n--full has every combination", all.join("\n  "));
    }
    let present = |kind: &Kind| *kind != Kind::Envoy || envoy::find().is_some();
    let kinds = Kind::ALL.into_iter().filter(|kind| filter.keeps_client(*kind) && present(kind)).collect();
    let run_ms = u64::try_from(std::time::Duration::from_secs_f64(seconds).as_millis())?;
    Ok(Plan { cells, kinds, rounds, run_ms, counted_calls: 2_000 })
}

/// What `--only` asks for; an empty list keeps all.
#[derive(Debug, Default)]
struct Filter {
    concurrency: Vec<usize>,
    payload: Vec<usize>,
    backends: Vec<usize>,
    runtime: Vec<String>,
    client: Vec<Kind>,
}

impl Filter {
    fn parse(words: &[String]) -> Result<Self> {
        let mut filter = Self::default();
        for word in words {
            let number = |value: &str| value.parse::<usize>().with_context(|| format!("--only {word}: not a number"));
            match word.split_once('=') {
                Some(("c", value)) => filter.concurrency.push(number(value)?),
                Some(("payload", value)) => filter.payload.push(number(value)?),
                Some(("backends", value)) => filter.backends.push(number(value)?),
                Some(("runtime", value @ ("multi" | "current"))) => filter.runtime.push(value.to_owned()),
                Some(("client", value)) => filter.client.push(value.parse()?),
                _ => bail!("--only {word}: give c=N, payload=N, backends=N, runtime=multi|current or client=NAME"),
            }
        }
        Ok(filter)
    }

    fn keeps(&self, cell: &Cell) -> bool {
        fn allows<T: PartialEq<U>, U>(list: &[T], value: U) -> bool {
            list.is_empty() || list.iter().any(|item| *item == value)
        }
        allows(&self.concurrency, cell.concurrency)
            && allows(&self.payload, cell.payload)
            && allows(&self.backends, cell.backends)
            && allows(&self.runtime, cell.flavor.name())
    }

    fn keeps_client(&self, kind: Kind) -> bool {
        self.client.is_empty() || kind == Kind::Hyper || self.client.contains(&kind)
    }
}
