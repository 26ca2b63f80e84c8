//! The clusters of a mesh, carried over by name, and how their endpoints are connected to.

use crate::{
    outbound::{
        cluster::{Balancing, Breaker, ClusterDeps, LiveCluster, WeightNumbers},
        connect::{Connector, ConnectorSettings, DialRef, Numbers, Security, Socket, Sockets, Subchannel, TlsRenewal},
        filter::Filters,
        identity::Identities,
        resolve::Facts,
        retry::{Permit, RetryBudget},
        route::Profile,
    },
    telemetry::metrics::RequestMetrics,
    transport::{Keepalive, Protocol},
};
use mesh_xds::resource::{Cluster, ClusterLoadAssignment, HttpProtocol, LbPolicy, RoutingPriority, TransportSocket};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::AtomicUsize},
    time::Duration,
};
use tokio::sync::Semaphore;

/// One cluster as calls see it.
/// Aligned, so that the count of handles is not on a cache line that every call reads.
#[repr(align(128))]
pub(crate) struct Upstream {
    pub(crate) name: Arc<str>,
    pub(crate) live: Arc<LiveCluster<Subchannel>>,
    pub(crate) metrics: RequestMetrics,
    /// Bytes of bodies that are held to be sent here as copies of requests.
    pub(crate) mirrored: AtomicUsize,
    /// The mesh's own limit of retries, beside that of the cluster.
    pub(crate) budget: Option<Arc<RetryBudget>>,
}

/// All clusters of a mesh. A cluster lives while a configuration or a call holds it (gRFC A31), and is shared by the targets that
/// name it in one scope: circuit breakers count per cluster in the process (gRFC A32).
pub(crate) struct Upstreams {
    clusters: Mutex<HashMap<Key, Weak<Upstream>>>,
    identities: Arc<Identities>,
    shared: Arc<Shared>,
    balancing: Arc<Balancing>,
    pub(crate) filters: Filters,
}

/// Whose name it is, a cluster's name, and the protocol its endpoints are spoken to in.
type Key = (Arc<str>, Arc<str>, Protocol);

/// What the connectors of all clusters share.
struct Shared {
    runtime: tokio::runtime::Handle,
    handshakes: Arc<Semaphore>,
    keepalive: Option<Keepalive>,
    /// Of every socket, where the mesh says it.
    user_timeout: Option<Duration>,
    drain_timeout: Duration,
    renewal: TlsRenewal,
    dial: Option<DialRef>,
}

/// TLS and HTTP handshakes at the same time: enough to keep every core busy while peers answer.
const HANDSHAKES: usize = 128;

impl Upstreams {
    pub(crate) fn new(
        identities: Arc<Identities>,
        keepalive: Option<Keepalive>,
        user_timeout: Option<Duration>,
        (drain_timeout, renewal): (Duration, TlsRenewal),
        dial: Option<DialRef>,
        balancing: Balancing,
        runtime: tokio::runtime::Handle,
    ) -> Self {
        let handshakes = Arc::new(Semaphore::new(HANDSHAKES));
        let shared = Arc::new(Shared { runtime, handshakes, keepalive, user_timeout, drain_timeout, renewal, dial });
        let (clusters, balancing) = (Mutex::default(), Arc::new(balancing));
        Self { clusters, identities, shared, balancing, filters: Filters::default() }
    }

    /// The cluster of this name with this configuration: the living one, updated, or a new one. A cluster that does not say which
    /// HTTP version its endpoints speak gets that of the profile: HTTP/2 for gRPC, HTTP/1.1 as Envoy does. A new one limits its retries
    /// by the mesh's own budget too, counted by itself, and names this target as its own in what it counts.
    pub(crate) fn apply(
        &self,
        cluster: &Arc<Cluster>,
        endpoints: &Arc<ClusterLoadAssignment>,
        facts: &Facts,
    ) -> Arc<Upstream> {
        let (profile, settings) = (facts.profile, &facts.settings);
        let protocol = match (cluster.http_protocol, profile) {
            (Some(HttpProtocol::Http1), _) | (None, Profile::Envoy) => Protocol::Http1,
            (Some(HttpProtocol::Http2), _) | (None, Profile::Grpc) => Protocol::Http2,
        };
        let key = (facts.scope.clone(), cluster.name.clone(), protocol);
        let mut clusters = self.clusters.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(upstream) = clusters.get(&key).and_then(Weak::upgrade) {
            upstream.live.update(cluster.clone(), endpoints.clone());
            return upstream;
        }
        let (identities, shared) = (self.identities.clone(), self.shared.clone());
        let runtime = self.shared.runtime.clone();
        let (target, on) = (facts.label.clone(), settings.metrics);
        let weights = WeightNumbers::new(&target, on);
        let connector = move |cluster: &Cluster, breaker: &Arc<Breaker>| {
            let pick_first = matches!(cluster.lb_policy, LbPolicy::PickFirst { .. });
            let numbers = Numbers::new(&cluster.name, &target, pick_first, on);
            connector(cluster, protocol, breaker, &identities, &shared, numbers)
        };
        let balancing = self.balancing.clone();
        let deps = ClusterDeps { connector: Arc::new(connector), runtime, profile, balancing, weights };
        let upstream = Arc::new(Upstream {
            name: cluster.name.clone(),
            live: LiveCluster::new(cluster.clone(), endpoints.clone(), deps),
            metrics: RequestMetrics::new(&cluster.name, settings.source.clone()),
            mirrored: AtomicUsize::new(0),
            budget: settings.retry_budget.as_ref().map(|budget| Arc::new(budget.fresh())),
        });
        clusters.retain(|_, upstream| upstream.strong_count() > 0);
        clusters.insert(key, Arc::downgrade(&upstream));
        upstream
    }
}

impl Upstreams {
    /// Where tasks run.
    pub(crate) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.shared.runtime
    }
}

impl Upstream {
    /// A share of the retry budget, if there is one left while so many requests are in flight.
    pub(crate) fn retry_permit(&self, profile: Profile, priority: RoutingPriority, active: u32) -> Option<Permit> {
        let permit = self.live.budget(priority).try_acquire_as(profile, active)?;
        match &self.budget {
            None => Some(permit),
            Some(budget) => budget.try_acquire_as(profile, active).map(|own| permit.and(own)),
        }
    }
}

/// How the endpoints of `cluster` are connected to.
fn connector(
    cluster: &Cluster,
    protocol: Protocol,
    breaker: &Arc<Breaker>,
    identities: &Identities,
    shared: &Shared,
    numbers: Numbers,
) -> Arc<Connector> {
    let socket = |socket: &TransportSocket| match socket {
        TransportSocket::Fallback => match identities.fallback(protocol) {
            Some((tls, auto_host_sni)) => Socket { security: Security::Tls(tls), auto_host_sni },
            None => Socket { security: Security::Plaintext, auto_host_sni: false },
        },
        TransportSocket::Plaintext => Socket { security: Security::Plaintext, auto_host_sni: false },
        TransportSocket::Tls(tls) => {
            let security = match identities.client_tls(tls, protocol) {
                Ok(tls) => Security::Tls(tls),
                Err(error) => Security::Broken(error.into()),
            };
            Socket { security, auto_host_sni: tls.auto_host_sni }
        }
    };
    let sockets = Sockets {
        matches: cluster.transport_socket_matches.iter().map(|one| (one.clone(), socket(&one.socket))).collect(),
        default: socket(&cluster.transport_socket),
    };
    let security = sockets.default.security.clone();
    let mut settings = ConnectorSettings {
        dial: shared.dial.clone(),
        renewal: shared.renewal,
        numbers,
        ..ConnectorSettings::of(cluster, protocol, security, shared.keepalive, shared.drain_timeout)
    };
    settings.tcp.user_timeout = shared.user_timeout.or(settings.tcp.user_timeout);
    let (handshakes, runtime) = (shared.handshakes.clone(), shared.runtime.clone());
    Connector::with_variants(settings, sockets, handshakes, Some(breaker.clone()), runtime)
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Upstream").field("name", &self.name).finish_non_exhaustive()
    }
}
