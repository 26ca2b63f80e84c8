//! grpc-go with xDS, and go-spiffe, by the program in `grpcgo/`.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::process::Command;

use crate::process::with_xds;
use crate::{Outcome, Process, peer};

/// How long one run of the client may take, over all its calls.
const RUN: Duration = Duration::from_secs(120);

/// Makes `calls` greeter calls to `target`, over TLS where the control plane says so.
///
/// # Errors
/// The client is missing, failed, or did not end in time. A call that fails is not an error here but part of the outcome.
pub async fn call(target: &str, bootstrap: &str, calls: u32) -> Result<Outcome> {
    let mut command = Command::new(peer("grpcgo")?);
    command.args(["call", "-n", &calls.to_string(), target]);
    run(with_xds(&mut command, bootstrap)).await
}

/// Makes greeter calls to `target` for so long, each over a new connection, and so by a new handshake.
///
/// # Errors
/// As [`call`].
pub async fn call_anew(target: &str, bootstrap: &str, lasting: Duration) -> Result<Outcome> {
    let mut command = Command::new(peer("grpcgo")?);
    command.args(["call", "-for", &format!("{}ms", lasting.as_millis()), target]);
    run(with_xds(&mut command, bootstrap)).await
}

/// Makes `calls` greeter calls to `addr` over mTLS, with the identity that the Workload API at `socket` gives.
///
/// # Errors
/// As [`call`].
pub async fn call_with_svid(socket: &Path, addr: SocketAddr, calls: u32) -> Result<Outcome> {
    let mut command = Command::new(peer("grpcgo")?);
    command.args(["spiffe-call", "-socket", &uri(socket), "-n", &calls.to_string(), &addr.to_string()]);
    run(&mut command).await
}

/// A greeter on grpc-go.
#[derive(Debug)]
pub struct Server {
    process: Process,
    addr: SocketAddr,
}

impl Server {
    /// Serves at `addr` as the control plane says; returns when it does.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start(addr: SocketAddr, bootstrap: &str) -> Result<Self> {
        let mut command = Command::new(peer("grpcgo")?);
        command.args(["serve", "-addr", &addr.to_string()]);
        Self::ready(with_xds(&mut command, bootstrap)).await
    }

    /// Serves on a free port of 127.0.0.1 over mTLS, with the identity that the Workload API at `socket` gives.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_with_svid(socket: &Path) -> Result<Self> {
        let mut command = Command::new(peer("grpcgo")?);
        command.args(["spiffe-serve", "-socket", &uri(socket)]);
        Self::ready(&mut command).await
    }

    async fn ready(command: &mut Command) -> Result<Self> {
        let mut process = Process::start("the grpc-go server", tempfile::tempdir()?, command)?;
        let addr = process.announced(|line| line.parse().ok()).await?;
        Ok(Self { process, addr })
    }

    /// How many certificates of callers it has seen.
    ///
    /// # Errors
    /// Its output cannot be read.
    pub fn certificates(&self) -> Result<usize> {
        Ok(self.process.output()?.lines().filter(|line| line.starts_with("certificate ")).count())
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Checks that it still runs.
    ///
    /// # Errors
    /// It ended; the message has the end of its output.
    pub fn running(&mut self) -> Result<()> {
        self.process.running()
    }
}

fn uri(socket: &Path) -> String {
    format!("unix://{}", socket.display())
}

async fn run(command: &mut Command) -> Result<Outcome> {
    let ran = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let ended = tokio::time::timeout(RUN, ran).await.context("the grpc-go client did not end")??;
    let said = String::from_utf8_lossy(&ended.stderr);
    anyhow::ensure!(ended.status.success(), "the grpc-go client ended with {}:\n{said}", ended.status);
    serde_json::from_slice(&ended.stdout).with_context(|| format!("the client printed:\n{said}"))
}
