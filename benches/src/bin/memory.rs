//! Resident memory of idle channels and of endpoints, connected and not.

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use benches::client::{Client, over};
use benches::load::{Shape, message};
use benches::process::resident_bytes;
use benches::worker::{self, Internal, Worker};
use clap::{Parser, ValueEnum};
use mesh_client::{Mesh, MeshChannel};
use tokio::time::{sleep, timeout};

/// Measure memory: what this process grows by, divided by how many there are, of channels that nobody uses, of endpoints that nobody has
/// called, and of endpoints with an open, idle HTTP/2 connection. Pages are what is counted, so few are measured badly.
#[derive(Debug, Parser)]
#[command(name = "memory", version)]
struct Options {
    /// Channels, each to one endpoint of its own.
    #[arg(long, value_name = "N", default_value_t = 5_000)]
    channels: usize,
    /// Endpoints of one channel that are not connected.
    #[arg(long, value_name = "N", default_value_t = 50_000)]
    endpoints: usize,
    /// Endpoints of one channel that are connected; each is a listening socket of the server's process.
    #[arg(long, value_name = "N", default_value_t = 1_000)]
    connected: usize,
    #[arg(long, hide = true)]
    row: Option<Row>,
    #[command(subcommand)]
    command: Option<Internal>,
}

/// What is measured.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum Row {
    Channels,
    Endpoints,
    Connected,
}

const LIMIT: Duration = Duration::from_secs(60);

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    if [options.channels, options.endpoints].iter().any(|count| !(1..=1_000_000).contains(count)) {
        bail!("--channels and --endpoints are between 1 and 1000000");
    }
    if !(1..=10_000).contains(&options.connected) {
        bail!("--connected is between 1 and 10000");
    }
    match options.row {
        None => rows(),
        Some(row) => tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run(&options, row)),
    }
}

/// Each row in a process of its own: what one frees, the next would take.
fn rows() -> Result<ExitCode> {
    for row in [Row::Channels, Row::Endpoints, Row::Connected] {
        let mut command = std::process::Command::new(std::env::current_exe()?);
        command
            .args(std::env::args_os().skip(1))
            .arg("--row")
            .arg(row.to_possible_value().context("it is shown")?.get_name());
        ensure!(command.status()?.success(), "a row failed");
    }
    Ok(ExitCode::SUCCESS)
}

async fn run(options: &Options, row: Row) -> Result<ExitCode> {
    let mesh = Mesh::builder().build().await?;
    match row {
        Row::Channels => {
            let addresses: Vec<_> = addresses(options.channels).collect();
            let before = resident_bytes();
            let channels: Vec<MeshChannel> =
                addresses.iter().map(|address| mesh.fixed_channel(&[*address])).collect::<Result<_, _>>()?;
            for channel in &channels {
                channel.ready(LIMIT).await?;
            }
            say("idle channels", channels.len(), before)?;
        }
        Row::Endpoints => {
            let addresses: Vec<_> = addresses(options.endpoints).collect();
            let before = resident_bytes();
            let channel = mesh.fixed_channel(&addresses)?;
            channel.ready(LIMIT).await?;
            say("endpoints, not connected", options.endpoints, before)?;
        }
        Row::Connected => {
            let (server, addresses) = Worker::server(options.connected).await?;
            let before = resident_bytes();
            let channel = mesh.fixed_channel(&addresses)?;
            let mut client = over(channel.clone());
            let message = message(64);
            let open = async {
                // Round robin asks each in turn.
                while (channel.load().connections as usize) < options.connected {
                    client.call(message.clone(), Shape::Echo).await?;
                }
                Ok::<_, anyhow::Error>(())
            };
            timeout(LIMIT, open).await??;
            sleep(Duration::from_millis(200)).await;
            say("endpoints, connected and idle", options.connected, before)?;
            server.stop().await?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn say(what: &str, count: usize, before: u64) -> Result<()> {
    let grown = resident_bytes().saturating_sub(before);
    Ok(writeln!(std::io::stdout(), "{what:<40} {count:>8} {:>10} B each", grown / count as u64)?)
}

/// So many addresses that nobody listens at.
fn addresses(count: usize) -> impl Iterator<Item = SocketAddr> {
    (1..).map(|number: u32| SocketAddr::from((Ipv4Addr::from(0x0a00_0000 + number), 50051))).take(count)
}
