//! Measures what hostile clients cost a server of ours, and whether a good one is served meanwhile.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use benches::client::{Client, Hyper};
use benches::hostile::{Attack, Outcome, served};
use benches::inbound::Side;
use benches::load::{Shape, message};
use benches::worker::{self, Internal, Memory, Worker};
use clap::Parser;
use mesh_control::ControlPlane;
use tokio::time::{Instant, sleep};

/// Measure attacks: each against a server of its own process (`inbound.serve`, with RBAC, metrics and trace extraction, and the default limits),
/// while one good client, bare hyper, calls without a pause. Printed are the most that the server's resident memory grew by, in all and for
/// each connection, what of it is left two seconds after the attack, how many connections the server ended, and the calls of the good client, none
/// of which may fail or take five seconds. The attackers share the machine with both: the floods show in the good client's times for
/// that alone.
#[derive(Debug, Parser)]
#[command(name = "hostile", version)]
struct Options {
    /// Connections of the attacks that hold many.
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    connections: usize,
    /// How long each attack lasts, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 3.0)]
    seconds: f64,
    /// Only these attacks.
    #[arg(long, value_name = "ATTACK", value_delimiter = ',', default_values_t = Attack::ALL, value_enum)]
    only: Vec<Attack>,
    #[command(subcommand)]
    command: Option<Internal>,
}

/// What stays after an attack is looked at after this.
const SETTLED: Duration = Duration::from_secs(2);

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    if !(1..=9_000).contains(&options.connections) {
        bail!("--connections is between 1 and 9000");
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(&options))?;
    Ok(ExitCode::SUCCESS)
}

async fn run(options: &Options) -> Result<()> {
    let dir = tempfile::tempdir()?;
    let control_plane = ControlPlane::builder().ca(dir.path().join("ca")).identity("default", "client").start().await?;
    let ca = control_plane.ca().context("the authority is on")?;
    let identity = |account: &str| Ok::<_, anyhow::Error>(ca.ensure("default", account)?);
    let (client, server) = (identity("client")?, identity("echo")?);
    writeln!(
        std::io::stdout(),
        "{:<26} {:>11} {:>9} {:>9} {:>11} {:>9} {:>9} {:>8} {:>8} {:>8}",
        "",
        "connections",
        "sent MB",
        "grown MB",
        "B per conn.",
        "left MB",
        "ended",
        "calls/s",
        "p50 us",
        "p99 us"
    )?;
    for attack in &options.only {
        let of = |folder: &PathBuf| attack.over_tls().then(|| folder.clone());
        measure(*attack, options, of(&client).as_deref(), of(&server)).await.with_context(|| attack.title())?;
    }
    Ok(())
}

async fn measure(attack: Attack, options: &Options, client: Option<&Path>, server: Option<PathBuf>) -> Result<()> {
    let (mut worker, addresses) = Worker::inbound(Side::Full, 1, server).await?;
    let address = *addresses.first().context("it listens")?;
    let (mut good, message) = (Hyper::connect(&addresses, client).await?, message(64));
    let mut call = async || good.call(message.clone(), Shape::Echo).await.map(drop);
    for _ in 0..1_000 {
        call().await?;
    }
    let Memory { resident: before, .. } = worker.memory().await?;
    let begun = Instant::now();
    let end = begun + Duration::from_secs_f64(options.seconds);
    let (attacked, took) = tokio::join!(tokio::spawn(attack.run(address, options.connections, end)), served(call, end));
    let Memory { most, .. } = worker.memory().await?;
    let (Outcome { connections, sent, cut }, took) = (attacked??, took.context("the good client")?);
    sleep(SETTLED).await;
    let Memory { resident: after, .. } = worker.memory().await?;
    let (grown, left) = (most.saturating_sub(before), after.saturating_sub(before));
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    writeln!(
        std::io::stdout(),
        "{:<26} {connections:>11} {:>9.1} {:>9.1} {:>11} {:>9.1} {cut:>9} {:>8.0} {:>8} {:>8}",
        attack.title(),
        megabytes(sent),
        megabytes(grown),
        grown / u64::try_from(connections.max(1))?,
        megabytes(left),
        took.len() as f64 / begun.elapsed().min(Duration::from_secs_f64(options.seconds)).as_secs_f64(),
        took.percentile(50).as_micros(),
        took.percentile(99).as_micros(),
    )?;
    worker.stop().await
}
