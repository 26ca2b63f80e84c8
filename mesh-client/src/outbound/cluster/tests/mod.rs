//! A cluster over links that have no network: the test sets their state.

mod carry_over;
mod ejection;
mod picking;

use super::*;
use mesh_xds::resource::{self, LocalityId};
use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU8, Ordering::SeqCst},
    time::Duration,
};
use tokio::sync::watch;

/// A link whose state the test sets.
#[derive(Debug)]
pub(super) struct FakeLink {
    address: SocketAddr,
    state: AtomicU8,
    drained: AtomicBool,
    unhealthy: Mutex<Vec<bool>>,
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
pub(super) struct FakeConnector {
    changes: watch::Sender<u64>,
    opened: Mutex<Vec<Arc<FakeLink>>>,
}

/// A cluster and all that it ever opened.
struct Bed {
    cluster: Arc<LiveCluster<FakeLink>>,
    connectors: Arc<Mutex<Vec<Arc<FakeConnector>>>>,
    rng: fastrand::Rng,
}

const STATES: [Connectivity; 4] =
    [Connectivity::Idle, Connectivity::Connecting, Connectivity::Ready, Connectivity::TransientFailure];

impl Link for FakeLink {
    type Connector = FakeConnector;
    type Kept = ();

    fn open(address: SocketAddr, connector: &Arc<FakeConnector>) -> Arc<Self> {
        let changes = connector.changes.clone();
        let link = Self {
            address,
            state: AtomicU8::new(0),
            drained: AtomicBool::new(false),
            unhealthy: Mutex::default(),
            changes,
        };
        let link = Arc::new(link);
        connector.opened.lock().unwrap().push(link.clone());
        link
    }

    fn changes(connector: &FakeConnector) -> watch::Receiver<u64> {
        connector.changes.subscribe()
    }

    fn connectivity(&self) -> Connectivity {
        STATES[usize::from(self.state.load(SeqCst))]
    }

    fn last_error(&self) -> Option<LinkError> {
        let refused = || Arc::new(std::io::Error::from(std::io::ErrorKind::ConnectionRefused)) as LinkError;
        (self.connectivity() == Connectivity::TransientFailure).then(refused)
    }

    fn drain(&self) {
        self.drained.store(true, SeqCst);
    }

    fn is_used(_: &FakeConnector) -> bool {
        true
    }

    fn check<'a>(
        _: &'a Arc<FakeConnector>,
        _: &'a CheckTarget,
        (): &'a mut (),
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<(), Failed>> + Send + 'a>> {
        Box::pin(std::future::ready(Ok(())))
    }

    fn unhealthy(&self, drain: bool) {
        self.unhealthy.lock().unwrap().push(drain);
    }

    async fn reports(&self, _: SocketAddr, _: Duration, _: impl Fn(&Report) + Send + Sync) -> Ended {
        Ended::NotServed
    }
}

impl FakeLink {
    fn set(&self, state: Connectivity) {
        self.state.store(state as u8, SeqCst);
        self.changes.send_modify(|n| *n += 1);
    }
}

impl Bed {
    /// Must be called within a runtime.
    fn new(cluster: Cluster, endpoints: ClusterLoadAssignment) -> Self {
        let connectors: Arc<Mutex<Vec<Arc<FakeConnector>>>> = Arc::default();
        let made = connectors.clone();
        let connector: ConnectorFactory<FakeLink> = Arc::new(move |_, _| {
            let connector = FakeConnector { changes: watch::Sender::new(0), opened: Mutex::default() };
            let connector = Arc::new(connector);
            made.lock().unwrap().push(connector.clone());
            connector
        });
        let runtime = tokio::runtime::Handle::current();
        let deps = ClusterDeps { connector, runtime, profile: Profile::Grpc, balancing: Arc::default(), weights: None };
        let cluster = LiveCluster::new(Arc::new(cluster), Arc::new(endpoints), deps);
        let bed = Self { cluster, connectors, rng: fastrand::Rng::with_seed(11) };
        bed.open_all();
        bed
    }

    fn of(n: u16) -> Self {
        Self::new(cluster(), assignment(n))
    }

    fn update(&self, endpoints: ClusterLoadAssignment) {
        let config = self.cluster.writer().cluster.clone();
        self.cluster.update(config, Arc::new(endpoints));
        self.open_all();
    }

    /// A request has come to every endpoint.
    fn open_all(&self) {
        self.endpoints().iter().for_each(|endpoint| {
            endpoint.link();
        });
    }

    /// Every link, in the order of opening.
    fn opened(&self) -> Vec<Arc<FakeLink>> {
        self.open_all();
        let connectors = self.connectors.lock().unwrap();
        connectors.iter().flat_map(|connector| connector.opened.lock().unwrap().clone()).collect()
    }

    /// The link now in use for a port.
    fn link(&self, port: u16) -> Arc<FakeLink> {
        self.endpoint(port).link().clone()
    }

    fn endpoint(&self, port: u16) -> Arc<Endpoint<FakeLink>> {
        self.cluster.writer().set.all().find(|e| e.address().port() == port).unwrap().clone()
    }

    fn endpoints(&self) -> Vec<Arc<Endpoint<FakeLink>>> {
        self.cluster.writer().set.all().cloned().collect()
    }

    fn pick(&mut self) -> Pick<FakeLink> {
        self.cluster.pick(&plain(), &[], &mut self.rng)
    }

    /// How often each port is picked in `times` picks.
    fn picks(&mut self, times: usize) -> BTreeMap<u16, usize> {
        let mut counts = BTreeMap::new();
        for _ in 0..times {
            match self.pick() {
                Pick::Endpoint(endpoint) => *counts.entry(endpoint.address().port()).or_insert(0) += 1,
                other => panic!("{other:?}"),
            }
        }
        counts
    }

    /// The ports picked, each often enough to be seen.
    fn picked(&mut self) -> Vec<u16> {
        self.picks(200).into_keys().collect()
    }
}

fn plain() -> PickInput<'static> {
    PickInput::plain(Instant::now())
}

fn cluster() -> Cluster {
    Cluster::fixed("backend", Arc::default())
}

fn address(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

fn locality(zone: &str, weight: u32, ports: impl IntoIterator<Item = u16>) -> resource::Locality {
    let id = LocalityId { zone: zone.into(), ..LocalityId::default() };
    let endpoints = ports.into_iter().map(|port| resource::Endpoint::new(address(port))).collect();
    resource::Locality { id: Arc::new(id), weight, endpoints }
}

/// Ports 1 to n.
fn assignment(n: u16) -> ClusterLoadAssignment {
    priorities([vec![locality("a", 1, 1..=n)]])
}

fn priorities(priorities: impl IntoIterator<Item = Vec<resource::Locality>>) -> ClusterLoadAssignment {
    ClusterLoadAssignment {
        name: "backend".into(),
        priorities: priorities.into_iter().collect(),
        ..ClusterLoadAssignment::default()
    }
}

/// Lets the cluster's tasks run.
async fn settle() {
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
}
