//! The cells that are measured, and the rounds in which every client has its turn.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::client::Kind;
use crate::envoy::{self, Envoy};
use crate::load::{Load, Measured, Shape};
use crate::worker::{Flavor, Role, Worker};
use crate::xds::ControlPlane;

/// The connections that clients without a pool of their own keep to a hop.
const CONNECTIONS_TO_HOP: usize = 3;

/// One setting in which all clients are measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cell {
    /// The runtime of the client.
    pub flavor: Flavor,
    /// Listening backends.
    pub backends: usize,
    /// Bytes per message.
    pub payload: usize,
    /// Calls in flight.
    pub concurrency: usize,
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flavor, backends, payload, concurrency } = self;
        write!(f, "c={concurrency} payload={payload} backends={backends} runtime={}", flavor.name())
    }
}

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// The cells the targets speak of, briefly: under a minute.
    Quick,
    /// Those, and one step along every dimension: under ten minutes.
    Usual,
    /// Every combination.
    Full,
}

impl Extent {
    /// The cells, grouped so that those which share processes are neighbours.
    #[must_use]
    pub fn cells(self) -> Vec<Cell> {
        let cell = |flavor, backends, payload, concurrency| Cell { flavor, backends, payload, concurrency };
        let (multi, current) = (Flavor::MultiThread, Flavor::CurrentThread);
        let mut cells = match self {
            Self::Quick => [1, 32, 256].map(|c| cell(multi, 3, 64, c)).to_vec(),
            Self::Usual => vec![
                cell(multi, 3, 64, 1),
                cell(multi, 3, 64, 8),
                cell(multi, 3, 64, 32),
                cell(multi, 3, 64, 256),
                cell(multi, 3, 16 << 10, 32),
                cell(multi, 30, 64, 32),
                cell(multi, 30, 64, 256),
                cell(current, 3, 64, 1),
                cell(current, 3, 64, 32),
            ],
            Self::Full => {
                let mut cells = Vec::new();
                for flavor in [multi, current] {
                    for backends in [3, 30] {
                        for payload in [64, 16 << 10] {
                            cells.extend([1, 8, 32, 256].map(|c| cell(flavor, backends, payload, c)));
                        }
                    }
                }
                cells
            }
        };
        cells.sort();
        cells
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The settings.
    pub cells: Vec<Cell>,
    /// The clients, the reference among them.
    pub kinds: Vec<Kind>,
    /// Turns of each client in each cell.
    pub rounds: usize,
    /// Measured time of one turn, in milliseconds.
    pub run_ms: u64,
    /// Calls over which allocations are counted, once per cell.
    pub counted_calls: u64,
}

/// Every measured turn, by cell and client, in the order of the rounds.
pub type Turns = BTreeMap<(Cell, Kind), Vec<Measured>>;

/// The processes that share one number of backends and one runtime.
struct Stage {
    server: Worker,
    envoy: Option<Envoy>,
    clients: Vec<(Kind, Worker)>,
    control_plane: ControlPlane,
}

impl Stage {
    async fn set(flavor: Flavor, backends: usize, kinds: &[Kind], envoy: Option<&PathBuf>) -> Result<Self> {
        let (server, addresses) = Worker::server(backends).await?;
        let control_plane = ControlPlane::start(&[&addresses]).await?;
        let envoy = match envoy {
            Some(binary) if kinds.contains(&Kind::Envoy) => Some(Envoy::start(binary, &addresses).await?),
            _ => None,
        };
        let mut clients = Vec::new();
        for kind in kinds.iter().copied() {
            let addresses = match &envoy {
                Some(envoy) if kind == Kind::Envoy => vec![envoy.address; CONNECTIONS_TO_HOP],
                _ => addresses.clone(),
            };
            let role = Role::Client { kind, flavor, addresses, control_plane: control_plane.address() };
            let worker = Worker::client(&role).await.with_context(|| format!("cannot start {}", kind.name()))?;
            clients.push((kind, worker));
        }
        Ok(Self { server, envoy, clients, control_plane })
    }

    async fn strike(self) -> Result<()> {
        for (_, worker) in self.clients {
            worker.stop().await?;
        }
        if let Some(envoy) = self.envoy {
            envoy.stop().await?;
        }
        self.control_plane.stop().await;
        self.server.stop().await
    }
}

/// Measures all of `plan`, in turns, and tells `progress` how far it is.
///
/// # Errors
/// When a process does not come up, or a call fails.
pub async fn run(plan: &Plan, progress: &mut (dyn Write + Send)) -> Result<Turns> {
    let envoy = envoy::find();
    if plan.kinds.contains(&Kind::Envoy) && envoy.is_none() {
        bail!("there is no envoy on the PATH or in interop/.peers");
    }
    let mut turns = Turns::new();
    let mut groups: BTreeMap<(Flavor, usize), Vec<Cell>> = BTreeMap::new();
    for cell in &plan.cells {
        groups.entry((cell.flavor, cell.backends)).or_default().push(*cell);
    }
    for ((flavor, backends), cells) in groups {
        let mut stage = Stage::set(flavor, backends, &plan.kinds, envoy.as_ref()).await?;
        for cell in cells {
            for round in 0..plan.rounds {
                writeln!(progress, "{cell}: round {} of {}", round + 1, plan.rounds)?;
                let counted_calls = if round == 0 { plan.counted_calls } else { 0 };
                let load = Load {
                    payload: cell.payload,
                    concurrency: cell.concurrency,
                    shape: Shape::Echo,
                    warm_ms: (plan.run_ms / 8).clamp(50, 300),
                    run_ms: plan.run_ms,
                    counted_calls,
                };
                // Each round begins with another client, so that none always follows the same one.
                let count = stage.clients.len();
                for turn in 0..count {
                    let (kind, worker) = &mut stage.clients[(turn + round) % count];
                    let measured = worker.run(&load).await.with_context(|| cell.to_string())?;
                    turns.entry((cell, *kind)).or_default().push(measured);
                }
            }
        }
        stage.strike().await?;
    }
    Ok(turns)
}
