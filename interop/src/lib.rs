//! Starts real peers for tests: Istio's control plane, Envoy, gRPC's C-core and grpc-go, and go-spiffe.
//!
//! `interop/run` installs them and runs the tests in `tests/`. Every peer listens on loopback alone, on ports that were
//! free, and is stopped when its handle is dropped, also by a failing test.

pub mod ccore;
pub mod envoy;
pub mod grpcgo;
pub mod istiod;
mod process;
pub mod report;

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};

pub use process::Process;

/// How calls ended, by whichever client made them.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Deserialize)]
pub struct Outcome {
    /// Answers by the name of the backend that gave them.
    pub backends: BTreeMap<String, u64>,
    /// Calls by gRPC status, as in `UNAVAILABLE`.
    pub codes: BTreeMap<String, u64>,
    /// Failed calls by the message of their status.
    pub details: BTreeMap<String, u64>,
    /// Answered calls by the identity of the client that the server saw; empty where it saw none.
    #[serde(default)]
    pub callers: BTreeMap<String, u64>,
    /// Answered calls by the identity of the server that the client saw, of clients that tell.
    #[serde(default)]
    pub servers: BTreeMap<String, u64>,
    /// Answered calls by the serial number of the server's certificate, of clients that tell.
    #[serde(default)]
    pub certificates: BTreeMap<String, u64>,
}

impl Outcome {
    /// How many calls were answered by a backend whose name starts with `prefix`.
    pub fn answered_by(&self, prefix: &str) -> u64 {
        self.backends.iter().filter(|(name, _)| name.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    /// How many calls ended with this status.
    pub fn ended_with(&self, code: &str) -> u64 {
        self.codes.get(code).copied().unwrap_or_default()
    }

    /// How many calls were made.
    pub fn total(&self) -> u64 {
        self.codes.values().sum()
    }
}

/// The path of an installed peer below `interop/.peers`.
///
/// # Errors
/// It was not installed; the message says how to.
pub fn peer(path: &str) -> Result<PathBuf> {
    let found = folder().join(".peers").join(path);
    anyhow::ensure!(found.exists(), "the peer {} is missing: run interop/run, which installs it", found.display());
    Ok(found)
}

/// This crate's folder, where the peers' own files are.
pub fn folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Ports below those that systems hand out for port 0 and to connections, so that nobody gets one of them by chance between the look at it
/// here and the peer's own bind: Linux's begin at 32768.
const PORTS: Range<u16> = 20_000..32_000;

/// An address for a peer that has to be told its port: nothing listens there, and no other call gave it away.
///
/// # Errors
/// `ip` is not an address of this machine, or no port is free.
pub fn free_addr(ip: IpAddr) -> Result<SocketAddr> {
    static GIVEN: AtomicUsize = AtomicUsize::new(0);
    let count = PORTS.len();
    // Two runs of the tests at once begin at different ports.
    let first = std::process::id() as usize * 97;
    let mut failed = None;
    for _ in 0..count {
        let offset = (first + GIVEN.fetch_add(1, Ordering::Relaxed)) % count;
        let addr = SocketAddr::new(ip, PORTS.start + u16::try_from(offset)?);
        match TcpListener::bind(addr) {
            Ok(_) => return Ok(addr),
            Err(error) if error.kind() == ErrorKind::AddrInUse => failed = Some(error),
            Err(error) => return Err(error).with_context(|| format!("find a free port on {ip}")),
        }
    }
    bail!("no port of {PORTS:?} is free on {ip}: {failed:?}")
}
