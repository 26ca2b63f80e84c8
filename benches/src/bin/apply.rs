//! Measures what a change of one endpoint among many costs a client, until it is in force.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use benches::apply::{self, Applied, Plan};
use benches::client::Kind;
use benches::report::median;
use benches::worker::{self, Internal};
use clap::Parser;
use mesh_client::bench_api::ApplyBench;
use mesh_xds::resource::LbPolicy;
use tokio::time::Instant;

/// Measure the configuration path: a cluster of many endpoints, of which one is replaced at a time, over xDS.
///
/// Printed per client: the time from its creation to the end of its first call, the time from an update to its
/// acknowledgement and to the first call that the new endpoint answers, CPU time, connections that were needlessly made
/// again, and idle memory per endpoint.
#[derive(Debug, Parser)]
#[command(name = "apply", version)]
struct Options {
    /// Endpoints of the cluster; each is a listening socket of the server's process.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    endpoints: usize,
    /// Updates that are timed.
    #[arg(long, value_name = "N", default_value_t = 20)]
    updates: usize,
    /// Clients to measure: mesh, tonic-xds.
    #[arg(long, value_name = "NAME", value_delimiter = ',', default_values = ["mesh", "tonic-xds"])]
    client: Vec<Kind>,
    /// Also write the figures to FILE, as a JSON object by client.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Exit with status 1 when a target is missed. Without it the status is 0.
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
    if !(2..=25_000).contains(&options.endpoints) || !(1..=1_000).contains(&options.updates) {
        bail!("--endpoints is between 2 and 25000 and --updates between 1 and 1000");
    }
    let plan = Plan { endpoints: options.endpoints, updates: options.updates };
    let picker_ms = in_process(plan);
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(&options, plan, picker_ms))
}

async fn run(options: &Options, plan: Plan, picker_ms: f64) -> Result<ExitCode> {
    let mut results = Vec::new();
    for kind in &options.client {
        let applied = apply::run(*kind, plan).await.with_context(|| kind.name())?;
        results.push((*kind, applied));
    }
    let mut out = std::io::stdout();
    writeln!(out, "in process, from a validated assignment to the picker that uses it, median: {picker_ms:.2} ms")?;
    print(&mut out, plan, &results)?;
    if let Some(file) = &options.json {
        let object: serde_json::Map<_, _> = results
            .iter()
            .map(|(kind, applied)| Ok((kind.name().to_owned(), serde_json::to_value(applied)?)))
            .collect::<Result<_>>()?;
        std::fs::write(file, format!("{:#}\n", serde_json::Value::Object(object)))?;
    }
    let mut met = true;
    if let Some((_, mesh)) = results.iter().find(|(kind, _)| *kind == Kind::Mesh) {
        let used = mesh.used_ms.unwrap_or(f64::INFINITY);
        let targets = [
            ("an update is used within 5 ms", used < 5.0),
            ("the first call ends within 20 ms", mesh.first_call_ms < 20.0),
            ("no needless reconnect", mesh.reconnects == 0),
        ];
        for (claim, holds) in targets {
            writeln!(out, "{}  mesh: {claim}", if holds { "PASS" } else { "FAIL" })?;
            met &= holds;
        }
    }
    Ok(if met || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The last step alone, without the protocol: milliseconds until the picker uses an assignment.
fn in_process(plan: Plan) -> f64 {
    let mut bench = ApplyBench::new(LbPolicy::RoundRobin, plan.endpoints);
    let times = (0..plan.updates).map(|_| {
        let next = bench.next_assignment();
        let start = Instant::now();
        bench.apply(next);
        start.elapsed().as_secs_f64() * 1e3
    });
    median(times.collect())
}

fn print(out: &mut impl Write, plan: Plan, results: &[(Kind, Applied)]) -> std::io::Result<()> {
    writeln!(out, "{} endpoints, {} updates of one endpoint each", plan.endpoints, plan.updates)?;
    let row = |out: &mut dyn Write, name: &str, value: &dyn Fn(&Applied) -> String| {
        write!(out, "{name:<52}")?;
        for (_, applied) in results {
            write!(out, " {:>14}", value(applied))?;
        }
        writeln!(out)
    };
    write!(out, "{:<52}", "")?;
    for (kind, _) in results {
        write!(out, " {:>14}", kind.name())?;
    }
    writeln!(out)?;
    let optional = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.2} ms"));
    row(out, "first call after start", &|a| format!("{:.1} ms", a.first_call_ms))?;
    row(out, "CPU until then", &|a| format!("{:.1} ms", a.first_call_cpu_ms))?;
    row(out, "update to acknowledgement, median", &|a| format!("{:.2} ms", a.ack_ms))?;
    row(out, "update to the first call that uses it, median", &|a| optional(a.used_ms))?;
    row(out, "update to the first call that uses it, worst", &|a| optional(a.used_max_ms))?;
    row(out, "client CPU per update", &|a| format!("{:.2} ms", a.update_cpu_ms))?;
    row(out, "needless reconnects", &|a| a.reconnects.to_string())?;
    row(out, "idle memory per endpoint", &|a| format!("{:.0} B", a.bytes_per_endpoint))?;
    row(out, "resident memory of the process", &|a| format!("{:.1} MB", a.resident_bytes as f64 / 1e6))
}
