//! gRPC's C-core as a client and as a server, by the scripts in `ccore/`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::{io::AsyncWriteExt, process::Command};

use crate::process::with_xds;
use crate::{Outcome, Process, folder, peer};

/// How long one run of the client may take, over all its calls.
const RUN: Duration = Duration::from_secs(120);

/// A greeter on C-core.
#[derive(Debug)]
pub struct Server {
    process: Process,
    addr: SocketAddr,
}

impl Server {
    /// Starts it on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// It is not installed, or did not get ready.
    pub async fn start() -> Result<Self> {
        Self::ready(&mut program("server.py")?).await
    }

    /// Serves at `addr` as the control plane says: mTLS, authorization.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_with_xds(addr: SocketAddr, bootstrap: &str) -> Result<Self> {
        Self::ready(with_xds(program("server.py")?.arg(addr.to_string()), bootstrap)).await
    }

    async fn ready(command: &mut Command) -> Result<Self> {
        let mut process = Process::start("the C-core server", tempfile::tempdir()?, command)?;
        let addr = process.announced(|line| line.parse().ok()).await?;
        Ok(Self { process, addr })
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

/// Makes `requests` greeter calls one after another to `target`, with these headers on each.
///
/// # Errors
/// The client is missing, failed, or did not end in time. A call that fails is not an error here but part of the outcome.
pub async fn call(target: &str, bootstrap: &str, requests: u32, headers: &[(&str, &str)]) -> Result<Outcome> {
    let mut command = client(target, bootstrap)?;
    command
        .args(["--requests", &requests.to_string()])
        .args(headers.iter().map(|(name, value)| format!("--header={name}={value}")));
    Ok(serde_json::from_value(run(command, "").await?)?)
}

/// The backend of each of `keys`, sent in the header of this name.
///
/// # Errors
/// The client is missing, did not end in time, or a call failed.
pub async fn backends_of(
    target: &str,
    bootstrap: &str,
    header: &str,
    keys: &[String],
) -> Result<BTreeMap<String, String>> {
    let mut command = client(target, bootstrap)?;
    command.args(["--key-header", header]);
    let mut printed = run(command, &keys.join("\n")).await?;
    Ok(serde_json::from_value(printed["backends_of"].take())?)
}

fn client(target: &str, bootstrap: &str) -> Result<Command> {
    let mut command = program("client.py")?;
    with_xds(command.arg(target), bootstrap).kill_on_drop(true);
    Ok(command)
}

fn program(script: &str) -> Result<Command> {
    let mut command = Command::new(peer("venv/bin/python3")?);
    command.arg(folder().join("ccore").join(script));
    Ok(command)
}

/// What the client prints, after it was given `input`.
async fn run(mut command: Command, input: &str) -> Result<Value> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("it was given no standard input")?;
    // One that reads none of it has closed its end.
    let _ = stdin.write_all(input.as_bytes()).await;
    drop(stdin);
    let ended =
        tokio::time::timeout(RUN, child.wait_with_output()).await.context("the C-core client did not end")??;
    let said = String::from_utf8_lossy(&ended.stderr);
    anyhow::ensure!(ended.status.success(), "the C-core client ended with {}:\n{said}", ended.status);
    serde_json::from_slice(&ended.stdout).with_context(|| format!("the client printed:\n{said}"))
}
