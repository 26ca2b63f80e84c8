//! Measures our server's side beside tonic's, and the pair of our channel and our server beside a pair of tonic's, in turns.

use std::io::Write;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use benches::client::Kind;
use benches::inbound::Side;
use benches::load::{Load, Measured, Shape};
use benches::report::median;
use benches::worker::{self, Flavor, Internal, Role, Worker};
use clap::Parser;
use mesh_control::ControlPlane;

/// Measure servers: unary gRPC echo of 64 bytes over loopback, closed loop. First the server's side alone: 33 calls in flight over 3
/// connections of our bare transport, against tonic's own server with nothing, and against ours without a policy and with RBAC, metrics
/// and trace extraction. Then whole pairs, with three servers: tonic's channels, one for each, against tonic's servers, and our channel,
/// with all that it does, against ours; in plaintext and with mutual TLS. Last our channel beside bare hyper over tokio-rustls, both to
/// servers of ours. Each client and each server is a process of its own. Printed are medians over the rounds, and ratios within a round.
#[derive(Debug, Parser)]
#[command(name = "inbound", version)]
struct Options {
    /// Measured time of each turn, in seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.5)]
    seconds: f64,
    /// Turns of each.
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,
    /// Only these parts.
    #[arg(long, value_name = "PART", value_delimiter = ',', default_values_t = [Part::Server, Part::Pair, Part::Mtls, Part::Client], value_enum)]
    only: Vec<Part>,
    /// Exit with status 1 when a target is missed. Without it the status is 0.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Internal>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// The server's side alone.
    Server,
    /// Pairs in plaintext.
    Pair,
    /// Pairs with mutual TLS.
    Mtls,
    /// The client's side alone, with mutual TLS.
    Client,
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Server => "server",
            Self::Pair => "pair",
            Self::Mtls => "mtls",
            Self::Client => "client",
        })
    }
}

/// A client and its server.
struct Pair {
    title: String,
    server: Worker,
    client: Worker,
    shape: Shape,
    turns: Vec<(Measured, f64)>,
}

impl Pair {
    async fn start(
        title: &str,
        side: Side,
        listeners: usize,
        identity: Option<PathBuf>,
        client: impl AsyncFnOnce(Vec<SocketAddr>) -> Result<Role>,
    ) -> Result<Self> {
        let (server, addresses) = Worker::inbound(side, listeners, identity).await?;
        let role = client(addresses).await?;
        let client = Worker::client(&role).await.context("the client does not start")?;
        Ok(Self { title: title.to_owned(), server, client, shape: Shape::Echo, turns: Vec::new() })
    }

    /// Its requests are part of a trace.
    fn traced(self) -> Self {
        Self { shape: Shape::Traced, ..self }
    }

    /// What the client measured, and the CPU time of the server per call.
    async fn turn(&mut self, concurrency: usize, run_ms: u64) -> Result<()> {
        let shape = self.shape;
        let load = |run_ms| Load { payload: 64, shape, concurrency, warm_ms: 0, run_ms, counted_calls: 0 };
        self.client.run(&load((run_ms / 8).max(50))).await?;
        let before = self.server.cpu_us().await?;
        let measured = self.client.run(&load(run_ms)).await?;
        let after = self.server.cpu_us().await?;
        self.turns.push((measured, (after - before) as f64 / measured.calls as f64));
        Ok(())
    }

    async fn stop(self) -> Result<()> {
        self.client.stop().await?;
        self.server.stop().await
    }
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if let Some(Internal::Play { role }) = &options.command {
        return worker::play(role);
    }
    if !(0.05..=60.0).contains(&options.seconds) || !(1..=100).contains(&options.rounds) {
        bail!("--seconds is between 0.05 and 60, and --rounds between 1 and 100");
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?.block_on(run(&options))
}

async fn run(options: &Options) -> Result<ExitCode> {
    let mut met = true;
    for part in &options.only {
        met &= match part {
            Part::Server => server(options).await?,
            Part::Pair => pairs(options, false).await?,
            Part::Mtls => pairs(options, true).await?,
            Part::Client => clients(options).await?,
        };
    }
    Ok(if met || !options.check { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn server(options: &Options) -> Result<bool> {
    let bare = async |addresses: Vec<SocketAddr>| {
        let addresses = vec![addresses[0]; 3];
        let control_plane = addresses[0];
        Ok(Role::Client { kind: Kind::Bare, flavor: Flavor::MultiThread, addresses, control_plane })
    };
    let mut pairs = Vec::new();
    for side in [Side::Tonic, Side::Bare, Side::Full] {
        pairs.push(Pair::start(side.title(), side, 1, None, bare).await?.traced());
    }
    let ratios = measure("server alone, 3 connections x 11 streams", &mut pairs, 33, options).await?;
    for pair in pairs {
        pair.stop().await?;
    }
    let &[_, .., (rps, cpu)] = &ratios[..] else { bail!("nothing was measured") };
    Ok(verdict("server alone: rps / tonic's", rps, 1.4, true)?
        & verdict("server alone: CPU per request / tonic's", cpu, 0.65, false)?)
}

async fn pairs(options: &Options, mutual: bool) -> Result<bool> {
    let dir = tempfile::tempdir()?;
    let control_plane = control_plane(mutual.then_some(dir.path())).await?;
    let identity = |account: &str| identity(&control_plane, account);
    let of_tonic = async |addresses: Vec<SocketAddr>| Ok(Role::TonicTurns { addresses, identity: identity("client")? });
    let tonic = Pair::start("tonic's pair", Side::Tonic, 3, identity("echo")?, of_tonic).await?;
    let of_mesh = async |addresses| mesh_client(&control_plane, addresses).await;
    let mesh = Pair::start("our channel, our inbound", Side::Full, 3, identity("echo")?, of_mesh).await?;
    let (secured, bound) = if mutual { ("mutual TLS", 1.5) } else { ("plaintext", 2.0) };
    compare(&format!("pairs, {secured}"), "tonic's", bound, vec![tonic, mesh], options).await
}

async fn clients(options: &Options) -> Result<bool> {
    let dir = tempfile::tempdir()?;
    let control_plane = control_plane(Some(dir.path())).await?;
    let folder = |account: &str| identity(&control_plane, account)?.context("the authority is off");
    let client = folder("client")?;
    let of_hyper = async |addresses| Ok(Role::HyperTurns { addresses, identity: client });
    let hyper = Pair::start("bare hyper over tokio-rustls", Side::Bare, 3, Some(folder("echo")?), of_hyper).await?;
    let of_mesh = async |addresses| mesh_client(&control_plane, addresses).await;
    let mesh = Pair::start("our channel", Side::Bare, 3, Some(folder("echo")?), of_mesh).await?;
    compare("clients of our inbound, mutual TLS", "hyper's", 1.3, vec![hyper, mesh], options).await
}

/// With an authority in this folder, if wanted.
async fn control_plane(dir: Option<&Path>) -> Result<ControlPlane> {
    let builder = ControlPlane::builder();
    let builder = match dir {
        Some(dir) => builder.ca(dir.join("ca")).identity("default", "client"),
        None => builder,
    };
    Ok(builder.start().await?)
}

/// Where the certificate of a service account is.
fn identity(control_plane: &ControlPlane, account: &str) -> Result<Option<PathBuf>> {
    Ok(control_plane.ca().map(|ca| ca.ensure("default", account)).transpose()?)
}

/// Our channel, which the control plane tells of these servers.
async fn mesh_client(control_plane: &ControlPlane, addresses: Vec<SocketAddr>) -> Result<Role> {
    control_plane.apply(&configuration(&addresses, control_plane.ca().is_some())).await?;
    Ok(Role::MeshClient { bootstrap: control_plane.bootstrap() })
}

/// Whether the last of the pairs makes `bound` times the calls of the first, whose name is `reference`.
async fn compare(name: &str, reference: &str, bound: f64, mut pairs: Vec<Pair>, options: &Options) -> Result<bool> {
    let mut met = true;
    for concurrency in [32, 256] {
        let name = format!("{name}, c={concurrency}");
        let ratios = measure(&name, &mut pairs, concurrency, options).await?;
        let Some((rps, _)) = ratios.last() else { bail!("nothing was measured") };
        met &= verdict(&format!("{name}: rps / {reference}"), *rps, bound, true)?;
    }
    for pair in pairs {
        pair.stop().await?;
    }
    Ok(met)
}

/// Takes turns, prints the table, and returns rps and server CPU over those of the first.
async fn measure(name: &str, pairs: &mut [Pair], concurrency: usize, options: &Options) -> Result<Vec<(f64, f64)>> {
    let run_ms = u64::try_from(Duration::from_secs_f64(options.seconds).as_millis())?;
    let count = pairs.len();
    for pair in pairs.iter_mut() {
        pair.turns.clear();
    }
    for round in 0..options.rounds {
        for turn in 0..count {
            pairs[(turn + round) % count].turn(concurrency, run_ms).await?;
        }
    }
    let mut out = std::io::stdout();
    writeln!(out, "\n{name}")?;
    writeln!(
        out,
        "  {:<34} {:>9} {:>8} {:>8} {:>11} {:>11} {:>7} {:>7}",
        "", "rps", "p50 us", "p99 us", "server CPU", "client CPU", "rps x", "CPU x"
    )?;
    let mut ratios = Vec::new();
    for pair in pairs.iter() {
        let of = |value: &dyn Fn(&(Measured, f64)) -> f64| median(pair.turns.iter().map(value).collect());
        let ratio = |value: &dyn Fn(&(Measured, f64)) -> f64| {
            median(pair.turns.iter().zip(&pairs[0].turns).map(|(mine, theirs)| value(mine) / value(theirs)).collect())
        };
        let (rps, cpu) = (ratio(&|turn| turn.0.rps), ratio(&|turn| turn.1));
        writeln!(
            out,
            "  {:<34} {:>9.0} {:>8.0} {:>8.0} {:>11.1} {:>11.1} {rps:>7.2} {cpu:>7.2}",
            pair.title,
            of(&|turn| turn.0.rps),
            of(&|turn| turn.0.p50_us),
            of(&|turn| turn.0.p99_us),
            of(&|turn| turn.1),
            of(&|turn| turn.0.cpu_us),
        )?;
        ratios.push((rps, cpu));
    }
    Ok(ratios)
}

fn verdict(claim: &str, measured: f64, bound: f64, at_least: bool) -> Result<bool> {
    let met = if at_least { measured >= bound } else { measured <= bound };
    let (verdict, sign) = (if met { "PASS" } else { "FAIL" }, if at_least { ">=" } else { "<=" });
    writeln!(std::io::stdout(), "{verdict}  {claim:<58} {measured:>6.2}  ({sign} {bound:.2})")?;
    Ok(met)
}

/// The echo service of three servers, with retries, outlier detection and breakers, and mutual TLS if wanted.
fn configuration(addresses: &[SocketAddr], mutual: bool) -> String {
    let endpoint =
        |address: &SocketAddr| format!("  - {{address: {}, ports: {{grpc: {}}}}}\n", address.ip(), address.port());
    let endpoints: String = addresses.iter().map(endpoint).collect();
    let mode = if mutual { "ISTIO_MUTUAL" } else { "DISABLE" };
    format!(
        "apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: echo}}
spec:
  hosts: [echo.default.svc.cluster.local]
  resolution: STATIC
  ports: [{{number: 50051, name: grpc, protocol: GRPC}}]
  endpoints:
{endpoints}---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{name: echo}}
spec:
  host: echo.default.svc.cluster.local
  trafficPolicy:
    tls: {{mode: {mode}}}
    loadBalancer: {{simple: ROUND_ROBIN}}
    outlierDetection: {{consecutive5xxErrors: 5, interval: 1s, baseEjectionTime: 1s}}
"
    )
}
