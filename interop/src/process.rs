//! A peer as a child process, with its output kept for the test that fails.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// How long a peer may take to be ready. It takes about two seconds; a machine under load gets more.
pub(crate) const READY: Duration = Duration::from_secs(60);
/// How often a peer that starts is asked.
pub(crate) const ASK: Duration = Duration::from_millis(25);
/// How much of the output is shown when something failed, in bytes.
const SHOWN: usize = 4096;

/// A running peer. Dropping it kills the process; a dropping panic shows the end of its output.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Child,
    output: PathBuf,
    /// The process's working folder, removed with it.
    folder: TempDir,
}

impl Process {
    /// Starts `command` in `folder`, with its output in a file there.
    ///
    /// # Errors
    /// The program cannot be started, or the file not be made.
    pub fn start(name: &'static str, folder: TempDir, command: &mut Command) -> Result<Self> {
        let output = folder.path().join("output.log");
        let file = File::create(&output)?;
        let child = command
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name, child, output, folder })
    }

    /// The process's working folder.
    pub fn folder(&self) -> &std::path::Path {
        self.folder.path()
    }

    /// Waits until `path` at `addr` is answered with status 200.
    ///
    /// # Errors
    /// The process ended, or was not ready in time; the message shows the end of its output.
    pub async fn ready(&mut self, addr: SocketAddr, path: &str) -> Result<()> {
        let asked = async {
            loop {
                if get(addr, path).await.is_ok_and(|(status, _)| status == 200) {
                    return Ok(());
                }
                self.running()?;
                tokio::time::sleep(ASK).await;
            }
        };
        match tokio::time::timeout(READY, asked).await {
            Ok(answer) => answer,
            Err(_) => bail!("{} was not ready after {READY:?}; its output ends:\n{}", self.name, self.tail()),
        }
    }

    /// Waits for the first line of output that `read` makes something of.
    ///
    /// # Errors
    /// The process ended, or said nothing of the kind in time; the message shows the end of its output.
    pub async fn announced<T>(&mut self, read: impl Fn(&str) -> Option<T>) -> Result<T> {
        let heard = async {
            loop {
                let output = self.output()?;
                // The last line may not be complete yet.
                let whole = output.rfind('\n').map_or("", |end| &output[..end]);
                if let Some(found) = whole.lines().find_map(&read) {
                    return Ok(found);
                }
                self.running()?;
                tokio::time::sleep(ASK).await;
            }
        };
        match tokio::time::timeout(READY, heard).await {
            Ok(found) => found,
            Err(_) => bail!("{} was not ready after {READY:?}; its output ends:\n{}", self.name, self.tail()),
        }
    }

    /// Checks that the process still runs.
    ///
    /// # Errors
    /// It ended; the message has its status and the end of its output.
    pub fn running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} ended with {status}; its output ends:\n{}", self.name, self.tail()),
        }
    }

    /// The output so far.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn output(&self) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.output)?).into_owned())
    }

    fn tail(&self) -> String {
        let text = self.output().unwrap_or_else(|error| error.to_string());
        let cut = text.len().saturating_sub(SHOWN);
        let cut = (cut..=text.len()).find(|&at| text.is_char_boundary(at)).unwrap_or(0);
        text[cut..].to_owned()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- {} said:\n{}", self.name, self.tail());
        }
    }
}

/// Gives a gRPC program its bootstrap.
pub(crate) fn with_xds<'a>(command: &'a mut Command, bootstrap: &str) -> &'a mut Command {
    command.env("GRPC_XDS_BOOTSTRAP_CONFIG", bootstrap).env_remove("GRPC_XDS_BOOTSTRAP")
}

/// A plain GET; returns the status and the body.
///
/// # Errors
/// The connection failed, or the answer is not HTTP.
pub(crate) async fn get(addr: SocketAddr, path: &str) -> Result<(u16, String)> {
    let client = Client::builder(TokioExecutor::new()).build_http::<Empty<Bytes>>();
    let answer = client.get(format!("http://{addr}{path}").parse()?).await?;
    let status = answer.status().as_u16();
    let body = answer.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}
