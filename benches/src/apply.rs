//! What a configuration change costs: a cluster of many endpoints of which one is replaced.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};

use crate::client::{self, Client, Kind, Meshed};
use crate::report::median;
use crate::worker::{Role, Worker, say};
use crate::xds::{self, ControlPlane};
use crate::{load, process};

/// How long any one step may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Calls after which some connections are open that a change of another endpoint must leave alone.
const CALLS: usize = 200;

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Endpoints of the cluster.
    pub endpoints: usize,
    /// Changes that are timed.
    pub updates: usize,
}

/// What was measured for one client.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Applied {
    /// From the creation of the client to the end of its first call, in milliseconds.
    pub first_call_ms: f64,
    /// CPU time of the client's process until then, in milliseconds.
    pub first_call_cpu_ms: f64,
    /// From an update to its acknowledgement, in milliseconds, median.
    pub ack_ms: f64,
    /// From an update to the first call that the new endpoint answers, its connection included, in milliseconds,
    /// median; `None` when the client ignores priorities, which this is measured with.
    pub used_ms: Option<f64>,
    /// The longest of these times.
    pub used_max_ms: Option<f64>,
    /// CPU time of the client's process per update, in milliseconds.
    pub update_cpu_ms: f64,
    /// Connections to endpoints that did not change and were connected to again.
    pub reconnects: u64,
    /// Memory of its own (without the program's code) above that of the process without the client, divided by the number of
    /// endpoints, in bytes, after the first call.
    pub bytes_per_endpoint: f64,
    /// Resident memory in all, in bytes.
    pub resident_bytes: u64,
}

/// What the parent asks of a follower.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Question {
    /// Make so many calls, one after the other.
    Calls(usize),
    /// Call until this port answers.
    Until(u16),
}

/// Where a follower stands.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Standing {
    /// Time since the client was made, in milliseconds.
    elapsed_ms: f64,
    cpu_ms: f64,
    resident_bytes: u64,
    /// Memory beyond that before the client was made; not the program's code, which is read as it is first run.
    own_bytes: u64,
    answered_by: u16,
}

/// Measures `kind`.
///
/// # Errors
/// When a process does not come up, a call fails, or a change is not applied within half a minute.
pub async fn run(kind: Kind, plan: Plan) -> Result<Applied> {
    // The last backends are spares that replace others.
    let (mut server, addresses) = Worker::server(plan.endpoints + plan.updates + 1).await?;
    let (endpoints, spares) = addresses.split_at(plan.endpoints);
    let flat = flat(kind, endpoints, spares, &mut server).await?;
    let used = used(kind, endpoints, spares).await?;
    server.stop().await?;
    Ok(Applied {
        used_ms: used.as_ref().map(|times| median(times.clone())),
        used_max_ms: used.map(|times| times.into_iter().fold(0.0, f64::max)),
        ..flat
    })
}

/// All endpoints in one priority: first call, acknowledgements, reconnects and memory.
async fn flat(kind: Kind, endpoints: &[SocketAddr], spares: &[SocketAddr], server: &mut Worker) -> Result<Applied> {
    let mut current = endpoints.to_vec();
    let control_plane = ControlPlane::start(&[&current]).await?;
    let (mut follower, first) = start(kind, &control_plane).await?;
    let before: Standing = follower.ask(&Question::Calls(CALLS), LIMIT).await?;
    let connected = server.accepted().await?;
    let mut acks = Vec::new();
    for (index, spare) in spares.iter().enumerate().skip(1) {
        // An endpoint that was not called yet: from the end, where round robin has not been.
        let last = current.len() - 1;
        let place = (0..=last).rev().filter(|at| connected.get(&current[*at].port()) == Some(&0)).nth(index);
        current[place.unwrap_or(last)] = *spare;
        let encoded = xds::encode(&[&current]);
        let sent = Instant::now();
        let version = control_plane.set_endpoints(encoded);
        control_plane.acked(version).await?;
        acks.push(millis(sent.elapsed()));
    }
    let updates = acks.len();
    let after: Standing = follower.ask(&Question::Calls(1), LIMIT).await?;
    let _: Standing = follower.ask(&Question::Calls(CALLS), LIMIT).await?;
    let again = server.accepted().await?;
    let reconnects = connected.iter().filter(|(_, count)| **count > 0).map(|(port, count)| again[port] - count).sum();
    follower.stop().await?;
    control_plane.stop().await;
    Ok(Applied {
        first_call_ms: first.elapsed_ms,
        first_call_cpu_ms: first.cpu_ms,
        ack_ms: median(acks),
        used_ms: None,
        used_max_ms: None,
        update_cpu_ms: (after.cpu_ms - before.cpu_ms) / updates as f64,
        reconnects,
        bytes_per_endpoint: first.own_bytes as f64 / endpoints.len() as f64,
        resident_bytes: first.resident_bytes,
    })
}

/// One endpoint in the first priority, all others in the second: the next pick after an update of the first shows that
/// the update is in force. `None` when the client calls the second priority.
async fn used(kind: Kind, endpoints: &[SocketAddr], spares: &[SocketAddr]) -> Result<Option<Vec<f64>>> {
    let (first, rest) = endpoints.split_first().context("no endpoints")?;
    let control_plane = ControlPlane::start(&[&[*first], rest]).await?;
    let (mut follower, standing) = start(kind, &control_plane).await?;
    if standing.answered_by != first.port() {
        follower.stop().await?;
        control_plane.stop().await;
        return Ok(None);
    }
    let mut times = Vec::new();
    for spare in spares.iter().skip(1) {
        let encoded = xds::encode(&[&[*spare], rest]);
        follower.write(&serde_json::to_string(&Question::Until(spare.port()))?).await?;
        // The follower calls all the time from here on, so the update arrives amid calls.
        tokio::time::sleep(Duration::from_millis(20)).await;
        let sent = Instant::now();
        control_plane.set_endpoints(encoded);
        let _: Standing = follower.read(LIMIT).await?;
        times.push(millis(sent.elapsed()));
    }
    follower.stop().await?;
    control_plane.stop().await;
    Ok(Some(times))
}

async fn start(kind: Kind, control_plane: &ControlPlane) -> Result<(Worker, Standing)> {
    let role = Role::Follower { kind, control_plane: control_plane.address() };
    let mut follower = Worker::start(kind.name(), &role)?;
    let first = follower.read(LIMIT).await?;
    Ok((follower, first))
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Plays the client: makes it, calls once, says so, and then does what the lines of input ask.
pub(crate) async fn follow(kind: Kind, control_plane: SocketAddr, lines: mpsc::Receiver<String>) -> Result<()> {
    if kind == Kind::Mesh {
        client::record_metrics()?;
    }
    let base_bytes = process::anonymous_bytes();
    let start = Instant::now();
    match kind {
        Kind::TonicXds => {
            let client = client::tonic_xds(&xds::bootstrap(control_plane, "http://"))?;
            answer(client, start, base_bytes, lines).await
        }
        Kind::Mesh => {
            let client = Meshed::new(&xds::bootstrap(control_plane, "")).await?;
            answer(client, start, base_bytes, lines).await
        }
        Kind::Hyper | Kind::Bare | Kind::Tonic | Kind::BalanceList | Kind::Envoy => {
            bail!("{} takes no updates", kind.name())
        }
    }
}

async fn answer<C: Client>(
    mut client: C,
    start: Instant,
    base_bytes: u64,
    mut lines: mpsc::Receiver<String>,
) -> Result<()> {
    let message = load::message(64);
    let stand = |answered_by| Standing {
        elapsed_ms: millis(start.elapsed()),
        cpu_ms: millis(process::cpu_time()),
        resident_bytes: process::resident_bytes(),
        own_bytes: process::anonymous_bytes().saturating_sub(base_bytes),
        answered_by,
    };
    say(&stand(call(&mut client, &message).await?))?;
    while let Some(line) = lines.recv().await {
        let mut answered_by = 0;
        match serde_json::from_str(&line)? {
            Question::Calls(count) => {
                for _ in 0..count {
                    answered_by = call(&mut client, &message).await?;
                }
            }
            Question::Until(port) => {
                let begin = Instant::now();
                while answered_by != port {
                    answered_by = call(&mut client, &message).await?;
                    if begin.elapsed() > LIMIT {
                        bail!("no call reached port {port}");
                    }
                }
            }
        }
        say(&stand(answered_by))?;
    }
    Ok(())
}

async fn call<C: Client>(client: &mut C, message: &Bytes) -> Result<u16> {
    let reply =
        timeout(LIMIT, client.call(message.clone(), load::Shape::Echo)).await.context("a call did not end")??;
    Ok(reply.backend())
}
