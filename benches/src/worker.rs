//! One client in a process of its own, so that CPU time and allocations are its own.
//!
//! The parent writes one [`Load`] per line to the worker's standard input and reads one [`Answer`] per line; closing
//! the input ends the worker.

use std::io::BufRead;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::client::{self, Client, Hyper, Kind, Meshed, Ours};
use crate::inbound::{self, Side};
use crate::load::{self, Load, Measured};
use crate::{apply, server, xds};

/// The runtime a client runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Flavor {
    /// tokio's multi-threaded runtime, one worker per core.
    MultiThread,
    /// tokio's current-thread runtime.
    CurrentThread,
}

impl Flavor {
    /// Its short name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MultiThread => "multi",
            Self::CurrentThread => "current",
        }
    }
}

/// What a child process is to do; handed to it as JSON on its command line.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Serve: prints the addresses, one JSON array, and serves until its input is closed.
    Server {
        /// How many listening sockets.
        backends: usize,
    },
    /// Be a client.
    Client {
        /// Which one.
        kind: Kind,
        /// On which runtime.
        flavor: Flavor,
        /// The addresses to call, for clients without xDS.
        addresses: Vec<SocketAddr>,
        /// Where the control plane listens, for clients with xDS.
        control_plane: SocketAddr,
    },
    /// Be a server of the `inbound` measurement; see [`crate::inbound::serve`].
    Inbound {
        /// Which one.
        side: Side,
        /// How many listening sockets.
        listeners: usize,
        /// Where the certificate is, for mutual TLS.
        identity: Option<PathBuf>,
    },
    /// Be a client of the `inbound` measurement: one of tonic's channels to each address, in turn.
    TonicTurns {
        /// The addresses.
        addresses: Vec<SocketAddr>,
        /// Where the certificate is, for mutual TLS.
        identity: Option<PathBuf>,
    },
    /// Be a client of the `inbound` measurement: a connection of bare hyper to each address, in turn, over mutual TLS.
    HyperTurns {
        /// The addresses.
        addresses: Vec<SocketAddr>,
        /// Where the certificate is.
        identity: PathBuf,
    },
    /// Be a client of the `inbound` measurement: our channel, with everything on.
    MeshClient {
        /// The control plane and the certificates, as JSON.
        bootstrap: String,
    },
    /// Be the client of the `apply` measurement; see [`crate::apply`].
    Follower {
        /// Which one.
        kind: Kind,
        /// Where the control plane listens.
        control_plane: SocketAddr,
    },
}

/// The answer of a worker to a line of input.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// The client is connected.
    Ready,
    /// The load ran.
    Measured(Measured),
    /// It did not.
    Failed(String),
}

/// Resident memory of a process, in bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Now.
    pub resident: u64,
    /// The most at any time.
    pub most: u64,
}

/// The hidden command of a program that starts itself again as its workers.
#[derive(Debug, Subcommand)]
pub enum Internal {
    /// Be one of the processes of a run.
    #[command(hide = true)]
    Play {
        /// The role, as JSON.
        role: String,
    },
}

/// Runs `role` in this process until standard input is closed.
///
/// # Errors
/// When the runtime cannot be built, or the role cannot be taken.
pub fn play(role: &str) -> Result<ExitCode> {
    let role: Role = serde_json::from_str(role).context("the role is not what this version writes")?;
    let mut builder = match role {
        Role::Client { flavor: Flavor::CurrentThread, .. } => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    // Input is read on a thread, so that the runtime goes on driving its connections between two loads.
    let (sender, lines) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    builder.enable_all().build()?.block_on(async {
        match role {
            Role::Server { backends } => serve(backends, lines).await,
            Role::Client { kind, addresses, control_plane, .. } => call(kind, &addresses, control_plane, lines).await,
            Role::Inbound { side, listeners, identity } => inbound::serve(side, listeners, identity, lines).await,
            Role::TonicTurns { addresses, identity } => {
                answer(client::tonic_turns(&addresses, identity.as_deref()).await?, lines).await
            }
            Role::HyperTurns { addresses, identity } => {
                answer(Hyper::connect(&addresses, Some(&identity)).await?, lines).await
            }
            Role::MeshClient { bootstrap } => {
                client::record_metrics()?;
                let mesh = mesh_client::Mesh::builder().bootstrap_json(&bootstrap)?.build().await?;
                let channel = mesh.channel("xds:///echo.default.svc.cluster.local:50051")?;
                channel.ready(Duration::from_secs(10)).await?;
                answer(client::over(channel), lines).await
            }
            Role::Follower { kind, control_plane } => apply::follow(kind, control_plane, lines).await,
        }
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn serve(backends: usize, mut lines: mpsc::Receiver<String>) -> Result<()> {
    let backends = server::start(backends).await?;
    let addresses: Vec<SocketAddr> = backends.iter().map(|backend| backend.address).collect();
    say(&addresses)?;
    while lines.recv().await.is_some() {
        say(&server::accepted_by_port(&backends))?;
    }
    Ok(())
}

async fn call(
    kind: Kind,
    addresses: &[SocketAddr],
    control_plane: SocketAddr,
    lines: mpsc::Receiver<String>,
) -> Result<()> {
    match kind {
        Kind::Hyper | Kind::Envoy => answer(Hyper::connect(addresses, None).await?, lines).await,
        Kind::Bare => answer(Ours::connect(addresses).await?, lines).await,
        Kind::Tonic => answer(client::tonic_channel(addresses[0]).await?, lines).await,
        Kind::BalanceList => answer(client::balance_list(addresses)?, lines).await,
        Kind::TonicXds => answer(client::tonic_xds(&xds::bootstrap(control_plane, "http://"))?, lines).await,
        Kind::Mesh => {
            client::record_metrics()?;
            answer(Meshed::new(&xds::bootstrap(control_plane, "")).await?, lines).await
        }
    }
}

async fn answer<C: Client>(client: C, mut lines: mpsc::Receiver<String>) -> Result<()> {
    say(&Answer::Ready)?;
    while let Some(line) = lines.recv().await {
        let load: Load = serde_json::from_str(&line)?;
        say(&match load::run(&client, load).await {
            Ok(measured) => Answer::Measured(measured),
            Err(error) => Answer::Failed(format!("{error:#}")),
        })?;
    }
    Ok(())
}

/// Writes one line to standard output.
pub(crate) fn say<T: Serialize>(value: &T) -> Result<()> {
    use std::io::Write;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value)?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// A child process of this binary, playing a [`Role`]. It is killed when this is dropped.
#[derive(Debug)]
pub struct Worker {
    name: String,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Worker {
    /// Starts the binary that is running with the hidden arguments that make it play `role`.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn start(name: &str, role: &Role) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("play").arg(serde_json::to_string(role)?);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn()?;
        let input = child.stdin.take().context("no standard input")?;
        let output = BufReader::new(child.stdout.take().context("no standard output")?).lines();
        Ok(Self { name: name.to_owned(), child, input, output })
    }

    /// Starts a server process and waits for its addresses.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn server(backends: usize) -> Result<(Self, Vec<SocketAddr>)> {
        let mut worker = Self::start("server", &Role::Server { backends })?;
        let addresses = worker.read(Duration::from_secs(20)).await?;
        Ok((worker, addresses))
    }

    /// Starts a server of the `inbound` measurement and waits for its addresses.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn inbound(side: Side, listeners: usize, identity: Option<PathBuf>) -> Result<(Self, Vec<SocketAddr>)> {
        let mut worker = Self::start(side.title(), &Role::Inbound { side, listeners, identity })?;
        let addresses = worker.read(Duration::from_secs(20)).await?;
        Ok((worker, addresses))
    }

    /// Asks such a server for the CPU time it has used, in microseconds.
    ///
    /// # Errors
    /// When the process ended.
    pub async fn cpu_us(&mut self) -> Result<u64> {
        self.ask(&"cpu", Duration::from_secs(10)).await
    }

    /// Asks such a server for its memory.
    ///
    /// # Errors
    /// When the process ended.
    pub async fn memory(&mut self) -> Result<Memory> {
        self.ask(&"memory", Duration::from_secs(10)).await
    }

    /// Starts a client process and waits until it is connected.
    ///
    /// # Errors
    /// When it does not come up.
    pub async fn client(role: &Role) -> Result<Self> {
        let name = match role {
            Role::Client { kind, .. } => kind.name(),
            Role::TonicTurns { .. } => "tonic's channels",
            Role::HyperTurns { .. } => "bare hyper",
            Role::MeshClient { .. } => "our channel",
            _ => bail!("not a client"),
        };
        let mut worker = Self::start(name, role)?;
        match worker.read(Duration::from_secs(20)).await? {
            Answer::Ready => Ok(worker),
            other => bail!("{} began with {other:?}", worker.name),
        }
    }

    /// Has a client run `load`.
    ///
    /// # Errors
    /// When a call failed, or the process ended.
    pub async fn run(&mut self, load: &Load) -> Result<Measured> {
        let limit = Duration::from_millis(load.warm_ms + load.run_ms) + Duration::from_secs(30);
        match self.ask(load, limit).await? {
            Answer::Measured(measured) => Ok(measured),
            Answer::Failed(error) => bail!("{}: {error}", self.name),
            Answer::Ready => bail!("{} is out of step", self.name),
        }
    }

    /// Asks a server for the connections it accepted, by port.
    ///
    /// # Errors
    /// When the process ended.
    pub async fn accepted(&mut self) -> Result<std::collections::HashMap<u16, u64>> {
        self.ask(&"accepted", Duration::from_secs(10)).await
    }

    /// Ends the process and waits for it, killing it when it takes longer than two seconds.
    ///
    /// # Errors
    /// When it can neither be waited for nor killed.
    pub async fn stop(self) -> Result<()> {
        let Self { mut child, input, .. } = self;
        drop(input);
        if timeout(Duration::from_secs(2), child.wait()).await.is_err() {
            child.kill().await?;
        }
        Ok(())
    }

    /// Writes `question` and reads the answer, for no longer than `limit`.
    ///
    /// # Errors
    /// When the process ended, or said nothing, or something else.
    pub(crate) async fn ask<Q: Serialize, A: for<'a> Deserialize<'a>>(
        &mut self,
        question: &Q,
        limit: Duration,
    ) -> Result<A> {
        self.write(&serde_json::to_string(question)?).await?;
        self.read(limit).await
    }

    pub(crate) async fn write(&mut self, line: &str) -> Result<()> {
        self.input.write_all(format!("{line}\n").as_bytes()).await?;
        Ok(self.input.flush().await?)
    }

    pub(crate) async fn read<T: for<'a> Deserialize<'a>>(&mut self, limit: Duration) -> Result<T> {
        let line = timeout(limit, self.output.next_line()).await;
        let line = line.with_context(|| format!("{} said nothing for {limit:?}", self.name))??;
        let line = line.with_context(|| format!("{} ended; its error is above", self.name))?;
        Ok(serde_json::from_str(&line)?)
    }
}
