//! One run: a mesh, its control plane, its backends and its callers, through the faults of a seed and to the end.

use crate::{
    backend::Backend,
    ledger::{CALL, Ledger},
    net::{Healing, Net},
    plan::{Balancing, FAULTS, Fault, Plan},
    resources::{self, NAME, TIMEOUT},
};
use bytes::Bytes;
use http::{HeaderValue, Request};
use http_body_util::{BodyExt, Full};
use mesh_client::{Keepalive, Mesh, MeshChannel, Profile};
use mesh_xds::{
    Bootstrap,
    server::{ResourceCache, ResourceType, ServerOptions, serve_connection},
};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, sleep_until, timeout},
};
use tower::ServiceExt;

/// What is still open so long after its endpoint was removed is cut.
const DRAIN: Duration = Duration::from_secs(2);
/// Until all is well after the last fault: pauses between attempts to connect and ejections are over by then.
const SETTLING: Duration = Duration::from_secs(30);
/// Between two calls meanwhile.
const SETTLING_PACE: Duration = Duration::from_millis(400);
/// For what has no time of its own.
const GRACE: Duration = Duration::from_millis(500);
/// All of these succeed at the end.
const LAST_CALLS: u32 = 60;

/// What a run saw.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Summary {
    pub(crate) calls: u32,
    pub(crate) failed: u32,
    pub(crate) retries: u32,
}

/// The xDS server of the network.
struct ControlPlane {
    net: Net,
    cache: ResourceCache,
    task: Option<JoinHandle<()>>,
}

struct World {
    plan: Plan,
    net: Net,
    control: ControlPlane,
    backends: Vec<Backend>,
    /// Whether each is in the assignment.
    members: Vec<bool>,
    ledger: Arc<Mutex<Ledger>>,
    tasks: JoinSet<()>,
}

/// Plays it.
///
/// # Errors
/// What should have held, and did not.
pub(crate) async fn run(seed: u64) -> Result<Summary, String> {
    let plan = Plan::of(seed);
    let net = Net::new(seed);
    let ledger = Ledger::new(plan.budget, plan.retries);
    let backends = (0..plan.backends).map(|i| Backend::start(&net, address(i), &ledger)).collect();
    let cache = ResourceCache::new();
    let members = vec![true; plan.backends];
    let control = ControlPlane { net: net.clone(), cache, task: None };
    let mut world = World { plan, net, control, backends, members, ledger, tasks: JoinSet::new() };
    world.control.cache.set(resources::all(&world.plan, &world.assignment()));
    world.control.restart();

    let mut builder = Mesh::builder()
        .bootstrap(bootstrap())
        .dial(world.net.clone())
        .profile(world.plan.profile)
        .keepalive(Some(Keepalive {
            interval: Duration::from_secs(1),
            timeout: Duration::from_millis(500),
            ..Keepalive::default()
        }))
        .drain_timeout(DRAIN)
        .failfast(world.plan.failfast.then_some(Duration::from_secs(1)));
    if let Some(budget) = world.plan.budget.of_the_mesh() {
        builder = builder.retry_budget(budget);
    }
    let mesh = builder.build().await.map_err(|error| error.to_string())?;
    let channel = mesh.channel(&format!("xds:///{NAME}")).map_err(|error| error.to_string())?;
    channel.ready(Duration::from_secs(5)).await.map_err(|error| format!("never ready: {error}"))?;

    let begun = Instant::now();
    let calling = tokio::spawn(callers(channel.clone(), world.grpc(), world.ledger.clone(), world.plan.pace));
    let watch = tokio::spawn(watch_budget(channel.clone(), world.ledger.clone(), world.plan.budget));
    world.suffer(begun).await;
    world.heal();
    calling.abort();
    let calling = tokio::spawn(callers(channel.clone(), world.grpc(), world.ledger.clone(), SETTLING_PACE));
    sleep(SETTLING).await;
    calling.abort();
    timeout(2 * TIMEOUT + GRACE, idle(&world.ledger)).await.map_err(|_| "calls never end".to_owned())?;
    watch.abort();
    world.last_calls(&mesh, &channel).await?;
    until("all counts are zero", || channel.load().is_idle())
        .await
        .map_err(|error| format!("{error}: {:?}", channel.load()))?;
    drop((channel, mesh));
    until("all connections are closed", || world.backends.iter().all(|b| world.net.open(b.address) == 0)).await?;
    world.verdict()
}

/// Of this number.
fn address(backend: usize) -> SocketAddr {
    SocketAddr::from(([10, 0, 0, 1 + backend as u8], 80))
}

fn control_plane() -> SocketAddr {
    SocketAddr::from(([10, 1, 0, 1], 18000))
}

fn bootstrap() -> Bootstrap {
    let json = format!(
        r#"{{"xds_servers": [{{"server_uri": "{}", "channel_creds": [{{"type": "insecure"}}]}}], "node": {{"id": "sim"}}}}"#,
        control_plane()
    );
    let mut bootstrap = Bootstrap::from_json(&json).expect("a bootstrap");
    bootstrap.timing.backoff_max = Duration::from_secs(3);
    bootstrap.timing.connect_timeout = Duration::from_secs(2);
    bootstrap.timing.keepalive_interval = Duration::from_secs(1);
    bootstrap.timing.keepalive_timeout = Duration::from_millis(500);
    bootstrap
}

async fn until(what: &str, mut holds: impl FnMut() -> bool) -> Result<(), String> {
    for _ in 0..500 {
        if holds() {
            return Ok(());
        }
        sleep(Duration::from_millis(10)).await;
    }
    Err(format!("never so: {what}"))
}

async fn idle(ledger: &Mutex<Ledger>) {
    while ledger.lock().unwrap().active > 0 {
        sleep(Duration::from_millis(10)).await;
    }
}

impl World {
    fn grpc(&self) -> bool {
        self.plan.profile == Profile::Grpc
    }

    fn assignment(&self) -> Vec<(SocketAddr, u32)> {
        let members = self.backends.iter().zip(&self.members).enumerate().filter(|(_, (_, member))| **member);
        members.map(|(i, (backend, _))| (backend.address, u32::from(i >= self.plan.second))).collect()
    }

    async fn suffer(&mut self, begun: Instant) {
        for (at, fault) in std::mem::take(&mut self.plan.faults) {
            sleep_until(begun + at).await;
            self.befall(fault);
        }
        sleep_until(begun + FAULTS).await;
    }

    fn befall(&mut self, fault: Fault) {
        match fault {
            Fault::Part(i) => self.net.part(self.backends[i].address),
            Fault::Heal(i, healing) => self.net.heal(self.backends[i].address, healing),
            Fault::Crash { backend, silently } if self.backends[backend].is_up() => {
                self.backends[backend].crash(silently);
            }
            Fault::Restart(i) if !self.backends[i].is_up() => self.backends[i].restart(),
            Fault::Crash { .. } | Fault::Restart(_) => {}
            Fault::Slow(i, delay) => self.backends[i].state.lock().unwrap().delay = delay,
            Fault::Fail(i, percent) => self.backends[i].state.lock().unwrap().failing = percent,
            Fault::FailAll(percent) => {
                self.backends.iter().for_each(|backend| backend.state.lock().unwrap().failing = percent);
            }
            Fault::Remove(i) => self.remove(i),
            Fault::Add(i) => self.add(i),
            Fault::ControlPlaneParts => self.net.part(control_plane()),
            Fault::ControlPlaneHeals(healing) => self.net.heal(control_plane(), healing),
            Fault::ControlPlaneCrashes => self.control.crash(),
            Fault::ControlPlaneRestarts => self.control.restart(),
        }
    }

    fn remove(&mut self, i: usize) {
        if !self.members[i] || self.members.iter().filter(|member| **member).count() == 1 {
            return;
        }
        self.members[i] = false;
        let version = self.assign();
        let (cache, net) = (self.control.cache.clone(), self.net.clone());
        let (address, state) = (self.backends[i].address, Arc::clone(&self.backends[i].state));
        self.tasks.spawn(async move {
            cache.settled(version).await;
            let gone = Instant::now();
            {
                let mut state = state.lock().unwrap();
                if cache.type_version(ResourceType::ClusterLoadAssignment) != version || state.gone.is_some() {
                    // It may be back again; then this is not the removal that counts.
                    return;
                }
                state.gone = Some(gone);
            }
            sleep(DRAIN + GRACE).await;
            let mut state = state.lock().unwrap();
            if state.gone == Some(gone) && state.streams > 0 && net.quiet_since(address, gone - DRAIN) {
                let line = format!("{} streams of {address} go on after its removal and drain", state.streams);
                state.wrong.push(line);
            }
        });
    }

    fn add(&mut self, i: usize) {
        if !self.members[i] {
            self.members[i] = true;
            self.backends[i].state.lock().unwrap().gone = None;
            self.assign();
        }
    }

    fn assign(&self) -> u64 {
        let endpoints = resources::encoded(&self.assignment());
        self.control.cache.update(ResourceType::ClusterLoadAssignment, NAME, endpoints);
        self.control.cache.type_version(ResourceType::ClusterLoadAssignment)
    }

    /// Nothing is wrong any more.
    fn heal(&mut self) {
        for backend in &mut self.backends {
            if backend.is_up() {
                self.net.heal(backend.address, Healing::Resumes);
            } else {
                backend.restart();
            }
            let mut state = backend.state.lock().unwrap();
            (state.delay, state.failing) = (Duration::ZERO, 0);
        }
        self.net.heal(control_plane(), Healing::Resets);
        self.control.restart();
    }

    /// All succeed; round robin finds every endpoint of the priority that is in use.
    async fn last_calls(&self, mesh: &Mesh, channel: &MeshChannel) -> Result<(), String> {
        let before: Vec<u32> = self.backends.iter().map(|backend| backend.state.lock().unwrap().requests).collect();
        for number in 0..LAST_CALLS {
            call(channel, &self.ledger, self.grpc(), Kind::Unary)
                .await
                .map_err(|error| format!("call {number} after all healed: {error}"))?;
        }
        if self.plan.balancing != Balancing::RoundRobin {
            return Ok(());
        }
        let first = self.assignment().iter().map(|(_, priority)| *priority).min();
        for (address, priority) in self.assignment() {
            let i = self.backends.iter().position(|backend| backend.address == address).expect("it is one");
            let served = self.backends[i].state.lock().unwrap().requests - before[i];
            if Some(priority) == first && served == 0 {
                let request = Request::post(format!("http://{NAME}/unary")).body(()).expect("a request");
                let explained = mesh.explain(&request.into_parts().0);
                return Err(format!("{address} gets nothing after all healed: {explained}"));
            }
        }
        Ok(())
    }

    fn verdict(self) -> Result<Summary, String> {
        let states = self.backends.iter().flat_map(|b| std::mem::take(&mut b.state.lock().unwrap().wrong));
        let ledger = self.ledger.lock().unwrap();
        match states.chain(ledger.wrong.iter().cloned()).next() {
            Some(wrong) => Err(wrong),
            None => Ok(Summary { calls: ledger.begun, failed: ledger.failed, retries: ledger.retries }),
        }
    }
}

/// A caller's call.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Unary,
    /// So many messages.
    Stream(u32),
}

async fn call(channel: &MeshChannel, ledger: &Arc<Mutex<Ledger>>, grpc: bool, kind: Kind) -> Result<(), String> {
    let underway = Ledger::begin(ledger);
    let path = match kind {
        Kind::Unary => "/unary",
        Kind::Stream(_) => "/stream",
    };
    let body = Bytes::from(vec![b'x'; fastrand::usize(..2_000)]);
    let mut request = Request::post(format!("http://{NAME}{path}"))
        .header("x-key", fastrand::u32(..).to_string())
        .header(CALL, underway.number)
        .body(Full::new(body))
        .expect("a request");
    if grpc {
        request.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    }
    if let Kind::Stream(beats) = kind {
        request.headers_mut().insert("x-beats", beats.into());
    }
    let response = channel.clone().oneshot(request).await.map_err(|error| error.to_string())?;
    if !response.status().is_success() {
        return Err(format!("HTTP {}", response.status()));
    }
    let in_head = response.headers().get("grpc-status").cloned();
    let body = response.into_body().collect().await.map_err(|error| error.to_string())?;
    let status = in_head.or_else(|| body.trailers()?.get("grpc-status").cloned());
    match status {
        Some(status) if status != "0" => Err(format!("grpc-status {status:?}")),
        _ => Ok(()),
    }
}

/// Calls, and calls.
async fn callers(channel: MeshChannel, grpc: bool, ledger: Arc<Mutex<Ledger>>, pace: Duration) {
    loop {
        sleep(pace.mul_f64(2.0 * fastrand::f64())).await;
        let (channel, ledger) = (channel.clone(), ledger.clone());
        tokio::spawn(async move {
            let call = |kind| call(&channel, &ledger, grpc, kind);
            let (failed, wrong) = match fastrand::u32(..10) {
                // Patience ends some time.
                0 => (timeout(2 * TIMEOUT, call(Kind::Stream(fastrand::u32(..20)))).await.is_err(), None),
                1 => {
                    let patience = Duration::from_millis(fastrand::u64(..500));
                    (timeout(patience, call(Kind::Unary)).await.is_err(), None)
                }
                _ => match timeout(TIMEOUT + GRACE, call(Kind::Unary)).await {
                    Ok(result) => (result.is_err(), None),
                    Err(_) => (true, Some(format!("a call did not end within {TIMEOUT:?}"))),
                },
            };
            let mut ledger = ledger.lock().unwrap();
            ledger.failed += u32::from(failed);
            ledger.wrong.extend(wrong);
        });
    }
}

/// Never more retries in flight than the budget allows.
async fn watch_budget(channel: MeshChannel, ledger: Arc<Mutex<Ledger>>, budget: crate::plan::Budget) {
    loop {
        sleep(Duration::from_millis(23)).await;
        let retries = channel.load().retries;
        let mut ledger = ledger.lock().unwrap();
        if let Some(limit) = budget.at_once(ledger.peak)
            && retries > limit
        {
            let line = format!("{retries} retries at once, and the budget allows {limit} of {} calls", ledger.peak);
            ledger.wrong.push(line);
        }
    }
}

impl ControlPlane {
    fn restart(&mut self) {
        if self.task.is_some() {
            return;
        }
        let mut pipes = self.net.listen(control_plane());
        let cache = self.cache.clone();
        let mut options = ServerOptions::default();
        options.keepalive_interval = Some(Duration::from_secs(1));
        options.keepalive_timeout = Duration::from_millis(500);
        self.task = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Some(pipe) = pipes.recv().await {
                connections.spawn(serve_connection(pipe, cache.clone(), options.clone()));
            }
        }));
    }

    fn crash(&mut self) {
        self.net.crash(control_plane(), false);
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}
