//! The main job, end to end, in one process: control plane, backends and a client that joins the mesh.

mod resilience;
mod routing;
mod security;
mod traffic;
mod world;

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use examples::report::Report;
use world::World;

/// Shows a mesh at work: Istio YAML, a control plane, four backends and a client, in this process, on free loopback ports.
///
/// Eleven steps, each with what was seen. Exits with 1 when a claim does not hold.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
struct Args {
    /// Stay running with slow traffic afterwards, and print commands to try
    #[arg(long)]
    stay: bool,
}

#[tokio::main]
async fn main() -> ExitCode {
    #[allow(clippy::disallowed_methods, reason = "the time a person waits, measured from the first line of main")]
    let started = Instant::now();
    let args = Args::parse();
    let mut report = Report::new();
    match run(&mut report, started, args.stay).await {
        Ok(()) => report.finish(),
        Err(error) => {
            report.abort(&error);
            ExitCode::FAILURE
        }
    }
}

async fn run(report: &mut Report, started: Instant, stay: bool) -> anyhow::Result<()> {
    let mut world = World::start().await?;
    routing::first_request(&mut world, report, started).await?;
    routing::split(&world, report).await?;
    routing::canary(&world, report).await?;
    routing::live_edit(&mut world, report).await?;
    resilience::failing_backend(&mut world, report).await?;
    resilience::killed_backend(&mut world, report).await?;
    resilience::broken_yaml(&mut world, report).await?;
    resilience::control_plane_outage(&mut world, report).await?;
    routing::plain_http(&world, report).await?;
    security::mutual_tls(&mut world, report).await?;
    routing::explain(&world, report).await?;
    if stay {
        world.stay(report).await?;
    }
    world.shutdown().await;
    Ok(())
}
