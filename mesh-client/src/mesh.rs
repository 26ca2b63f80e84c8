//! The handle of a mesh: one control plane client, its clusters and their connections.

use crate::{
    Inbound, Keepalive, MeshChannel, MeshLayer,
    channel::Core,
    error::BoxError,
    inbound::{self, AuditLoggerFactory, AuditParser, FetchKeys, Fetched, InboundBuilder, Origin},
    outbound::{
        call::Settings,
        cluster::Balancing,
        connect::{DRAIN_TIMEOUT, Dial, DialRef, TlsRenewal},
        filter::{FilterFactory, Parser},
        identity::{Fallback, Identities, Opener, ads_connector},
        narrate,
        pick::{LbPolicyFactory, OwnZone, Registry},
        resolve::{Facts, Resolver, State, Target, TargetError},
        retry::{Hook, HookRef, RetryBudget},
        route::Profile,
        timeout::is_grpc,
        upstream::Upstreams,
    },
    telemetry::{
        access_log::AccessLog,
        explain::Explanation,
        metrics::{Metrics, Source, Unserved, grpc::Calls},
        trace::Propagation,
        watch::Observers,
    },
};
use mesh_xds::{
    Bootstrap, ClientOptions, TargetWatch, XdsClient,
    bootstrap::{BootstrapError, CertificateProvider},
    resource::{ClusterLoadAssignment, DomainPattern, Endpoint, Extensions, RemoteJwks},
    source::{self, DnsOptions, Policy, PolicyError},
    status::ClientStatus,
};
use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};
use tokio::net::ToSocketAddrs;

/// A mesh: discovery, routing, balancing, retries, identity and tracing for the clients of one process.
///
/// Cheap to clone; clones are handles to the same mesh. Several meshes can live in one process. Tasks run on the tokio runtime
/// that [`build`](MeshBuilder::build) was called in, and stop when the last handle, channel and layer are dropped.
#[derive(Clone)]
pub struct Mesh {
    inner: Arc<Inner>,
}

struct Inner {
    xds: Option<XdsClient>,
    identities: Arc<Identities>,
    upstreams: Arc<Upstreams>,
    settings: Arc<Settings>,
    profile: Option<Profile>,
    policy: Policy,
    hosts: Vec<Host>,
    dns: DnsOptions,
    runtime: tokio::runtime::Handle,
    /// Channels in use, by target and profile: equal targets share one.
    channels: Mutex<HashMap<(String, Profile), Weak<Core>>>,
    /// Targets that only [`Mesh::explain`] asked for, the newest first.
    explained: Mutex<Vec<MeshChannel>>,
}

/// A host that code says all about.
#[derive(Debug)]
struct Host {
    domain: DomainPattern,
    /// The domain as given.
    name: Arc<str>,
    target: Target,
    policy: Policy,
}

/// At most this many targets are watched for [`Mesh::explain`] alone.
const MAX_EXPLAINED: usize = 8;
/// gRFC A42.
const RING_HASH_CAP: u64 = 4096;

/// Builds a [`Mesh`].
pub struct MeshBuilder {
    bootstrap: Option<Bootstrap>,
    profile: Option<Profile>,
    policy: Policy,
    hosts: Vec<Host>,
    dns: DnsOptions,
    settings: Settings,
    observers: Observers,
    crypto: Option<Arc<mesh_tls::CryptoProvider>>,
    certificates: HashMap<String, Arc<dyn mesh_tls::Source>>,
    fallback: Option<mesh_tls::ClientSettings>,
    keepalive: Option<Keepalive>,
    user_timeout: Option<Duration>,
    drain_timeout: Duration,
    tls_renewal: TlsRenewal,
    dial: Option<DialRef>,
    extensions: Extensions,
    ring_hash_cap: u64,
    zone_share: Option<f64>,
    lb_policies: HashMap<String, Arc<dyn LbPolicyFactory>>,
}

/// A mesh that cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The bootstrap is missing or wrong; the message names its source and the field.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// Not inside a tokio runtime.
    #[error("a mesh needs a tokio runtime to run its tasks on")]
    NoRuntime,
    /// [`MeshBuilder::policy`] cannot be.
    #[error("policy: {0}")]
    Policy(#[from] PolicyError),
    /// The settings of [`MeshBuilder::fallback_tls`] cannot be used.
    #[error("the fallback credentials: {0}")]
    Fallback(#[source] mesh_tls::TlsError),
    /// The credentials of the control plane's connection cannot be used.
    #[error("the control plane's credentials: {0}")]
    Credentials(#[source] BoxError),
}

impl Mesh {
    /// A mesh on the control plane that `GRPC_XDS_BOOTSTRAP` (a file's path, wins) or `GRPC_XDS_BOOTSTRAP_CONFIG` (JSON) names. Does not
    /// wait for the control plane: see [`MeshChannel::ready`].
    ///
    /// # Errors
    /// Neither variable is set, or what they hold is not a bootstrap: the error names the source and the field.
    pub async fn from_env() -> Result<Self, BuildError> {
        Self::builder().bootstrap(Bootstrap::from_env()?).build().await
    }

    /// A mesh from code.
    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    /// A channel to `target`: `xds:///NAME`, `xds://AUTHORITY/NAME`, `dns:///HOST:PORT`, or a fixed list `ipv4:ADDRESS:PORT,…`
    /// (`ipv6:` likewise), as in gRPC's naming document; or `host:///NAME`, one of the hosts that the mesh was
    /// [built with](MeshBuilder::host). Returns at once; equal targets share configuration and connections.
    ///
    /// # Errors
    /// The target is malformed, its scheme unknown, it is an `xds` target and the mesh has no control plane or authority for it, or a
    /// host that the mesh was not built with.
    pub fn channel(&self, target: &str) -> Result<MeshChannel, TargetError> {
        self.open(Target::parse(target)?, self.inner.profile.unwrap_or(Profile::Grpc))
    }

    /// A channel to a fixed list of addresses, with the policy of [`MeshBuilder::policy`].
    ///
    /// # Errors
    /// The list is empty.
    pub fn fixed_channel(&self, addresses: &[std::net::SocketAddr]) -> Result<MeshChannel, TargetError> {
        self.open(Target::Fixed(addresses.to_vec()), self.inner.profile.unwrap_or(Profile::Grpc))
    }

    /// The layer for hyper clients. All services made by one layer share what they know of hosts.
    pub fn layer(&self) -> MeshLayer {
        MeshLayer::new(self.clone())
    }

    /// How a request with this head would be served now: target, configuration, virtual host, route and why earlier ones did not
    /// match, clusters, endpoints with their state. Nothing is sent. A host that nothing has asked for yet is looked up, and the
    /// answer says that its configuration is not there yet. For a request that is sent, see [`Explain`](crate::Explain).
    pub fn explain(&self, request: &http::request::Parts) -> Explanation {
        let host = request
            .uri
            .authority()
            .map(|a| a.as_str().to_owned())
            .or_else(|| Some(request.headers.get(http::header::HOST)?.to_str().ok()?.to_owned()));
        let Some(host) = host else {
            return Explanation::of("target", "the request names no host, in its URI or in a host header");
        };
        let open = {
            let channels = self.inner.channels.lock().unwrap_or_else(PoisonError::into_inner);
            let mut open: Vec<_> = channels.values().filter_map(Weak::upgrade).filter(|c| c.serves(&host)).collect();
            let profile = if is_grpc(&request.headers) { Profile::Grpc } else { Profile::Envoy };
            open.sort_by_key(|c| (!matches!(**c.resolver.state(), State::Ready(_)), c.facts.profile != profile));
            open.into_iter().next()
        };
        if let Some(core) = open {
            return narrate::request(&core, request);
        }
        let name = if host.rsplit_once(':').is_some_and(|(_, p)| p.parse::<u16>().is_ok()) {
            host.clone()
        } else {
            format!("{host}:80")
        };
        let Some(target) = self.target_of(name) else {
            return Explanation::of(
                "target",
                format!("`{host}` is not a target of this mesh, which has no control plane"),
            );
        };
        match self.http_channel(target) {
            Ok(channel) => {
                let explanation = narrate::request(&channel.core, request);
                // Kept, so that the next question finds the answer.
                let mut explained = self.inner.explained.lock().unwrap_or_else(PoisonError::into_inner);
                explained.truncate(MAX_EXPLAINED - 1);
                explained.insert(0, channel);
                explanation
            }
            Err(error) => Explanation::of("target", error.to_string()),
        }
    }

    /// What the control plane client knows: connections, resources with their versions, errors and notes (CSDS's content). `None`
    /// without a control plane.
    pub fn status(&self) -> Option<ClientStatus> {
        self.inner.xds.as_ref().map(XdsClient::status)
    }

    /// The target of plain requests for `host:port`: a host that the mesh was built with, else what the control plane may know.
    pub(crate) fn target_of(&self, name: String) -> Option<Target> {
        if self.inner.host(&name).is_some() {
            return Some(Target::Host { name });
        }
        self.inner.xds.is_some().then_some(Target::Xds { authority: None, name })
    }

    /// Whether there is no host that the mesh could serve.
    pub(crate) fn knows_no_host(&self) -> bool {
        self.inner.xds.is_none() && self.inner.hosts.is_empty()
    }

    /// A channel for plain HTTP requests.
    pub(crate) fn http_channel(&self, target: Target) -> Result<MeshChannel, TargetError> {
        self.open(target, self.inner.profile.unwrap_or(Profile::Envoy))
    }

    /// A server on this address, as the control plane says (gRFC A36): the listener that the bootstrap's
    /// `server_listener_resource_name_template` names. Until it is there, and whenever it goes away, connections are closed as soon as they are
    /// accepted ([`Inbound::serving`]). A change leaves the connections alone that it does not concern.
    ///
    /// # Errors
    /// The address is taken or not ours, or the mesh has no control plane, or its bootstrap has no such template.
    pub async fn inbound(&self, address: impl ToSocketAddrs) -> Result<Inbound, inbound::BuildError> {
        self.inbound_builder()?.bind(address).await
    }

    /// The same, with limits and a callback.
    ///
    /// # Errors
    /// The mesh has no control plane.
    pub fn inbound_builder(&self) -> Result<InboundBuilder, inbound::BuildError> {
        let xds = self.inner.xds.clone().ok_or(inbound::BuildError::NoControlPlane)?;
        let (identities, runtime) = (self.inner.identities.clone(), self.inner.runtime.clone());
        let (crypto, labels) = (identities.crypto().clone(), self.inner.settings.source.clone());
        let access_log = self.inner.settings.observers.as_ref().and_then(|observers| observers.access_log.clone());
        let mesh = self.clone();
        let fetch = Arc::new(move |remote: &RemoteJwks| {
            let channel = mesh.channel(&inbound::jwks_target(remote)?).ok()?;
            Some(Arc::new(Fetched { channel, uri: remote.uri.clone() }) as Arc<dyn FetchKeys>)
        });
        Ok(InboundBuilder::of_mesh(Origin { xds, identities, runtime, crypto, labels, access_log, fetch }))
    }

    fn open(&self, target: Target, profile: Profile) -> Result<MeshChannel, TargetError> {
        let inner = &self.inner;
        let label = target.to_string();
        let mut channels = inner.channels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(core) = channels.get(&(label.clone(), profile)).and_then(Weak::upgrade) {
            return Ok(MeshChannel { core });
        }
        let (watch, server) = self.watch(&target, None)?;
        let scope = match &target {
            Target::Xds { .. } => Arc::default(),
            Target::Dns { .. } | Target::Fixed(_) => "policy".into(),
            Target::Host { name } => inner.host(name).map_or_else(Arc::default, |host| host.name.clone()),
        };
        let facts = Arc::new(Facts {
            label: label.as_str().into(),
            scope,
            authority: target.host().parse().ok(),
            profile,
            channel_id: fastrand::u64(..),
            calls: inner.settings.metrics.of_calls().then(|| Calls::new(&label, inner.settings.metrics)),
            unserved: Unserved::new(inner.settings.source.clone()),
            settings: inner.settings.clone(),
        });
        let resolver = Resolver::spawn(watch, inner.upstreams.clone(), facts.clone(), &inner.runtime);
        let core = Arc::new(Core { facts, resolver, server, target });
        channels.retain(|_, core| core.strong_count() > 0);
        channels.insert((label, profile), Arc::downgrade(&core));
        Ok(MeshChannel { core })
    }

    /// `host`: whose target it is.
    fn watch(&self, target: &Target, host: Option<&Host>) -> Result<(TargetWatch, Arc<str>), TargetError> {
        let fail = |reason: String| TargetError { target: target.to_string(), reason };
        let policy = host.map_or(&self.inner.policy, |host| &host.policy);
        match target {
            Target::Xds { authority, name } => {
                let xds = self.inner.xds.as_ref().ok_or_else(|| {
                    fail("the mesh has no control plane: set GRPC_XDS_BOOTSTRAP or GRPC_XDS_BOOTSTRAP_CONFIG, or give the builder a bootstrap".into())
                })?;
                // Inside the runtime's context: the first watch may start the client's task.
                let _runtime = self.inner.runtime.enter();
                let watch = xds.watch(authority.as_deref(), name, name).map_err(|e| fail(e.to_string()))?;
                let servers = xds.bootstrap().servers_of(authority.as_deref()).map_err(|e| fail(e.to_string()))?;
                let server =
                    servers.first().map_or_else(|| "the control plane".into(), |s| format!("control plane {}", s.uri));
                Ok((watch, server.into()))
            }
            Target::Dns { host: address } => {
                let _runtime = self.inner.runtime.enter();
                let name = host.map_or(&**address, |host| &host.name);
                let watch = source::dns(name, address, policy, &self.inner.dns).map_err(|e| fail(e.to_string()))?;
                Ok((watch, "DNS".into()))
            }
            Target::Fixed(addresses) => {
                if addresses.is_empty() {
                    return Err(fail("has no address".into()));
                }
                let name = host.map_or_else(|| target.to_string(), |host| host.name.to_string());
                let endpoints =
                    ClusterLoadAssignment::of(name.as_str(), addresses.iter().copied().map(Endpoint::new).collect());
                let _runtime = self.inner.runtime.enter();
                let watch = source::fixed_with(&name, Arc::new(endpoints), policy, &self.inner.dns);
                Ok((watch, "a fixed list".into()))
            }
            Target::Host { name } => {
                let host =
                    self.inner.host(name).ok_or_else(|| fail("the mesh was not built with such a host".into()))?;
                self.watch(&host.target, Some(host))
            }
        }
    }
}

impl Inner {
    /// What code says of this host, `host` or `host:port`.
    fn host(&self, name: &str) -> Option<&Host> {
        DomainPattern::best(self.hosts.iter().map(|host| (&host.domain, host)), name)
    }
}

impl MeshBuilder {
    /// The control plane. Without one, `dns:///` and fixed targets work and the [hosts](Self::host) that are told here; the layer hands
    /// everything else to its inner client.
    #[must_use]
    pub fn bootstrap(mut self, bootstrap: Bootstrap) -> Self {
        self.bootstrap = Some(bootstrap);
        self
    }

    /// The control plane, as gRPC bootstrap JSON.
    ///
    /// # Errors
    /// It is not a bootstrap: the error names the field.
    pub fn bootstrap_json(self, json: &str) -> Result<Self, BuildError> {
        Ok(self.bootstrap(Bootstrap::from_json(json)?))
    }

    /// Which rules hold where gRPC and Envoy differ. Default: [`Profile::Grpc`] for channels and [`Profile::Envoy`] for the layer.
    #[must_use]
    pub fn profile(mut self, profile: Profile) -> Self {
        self.profile = Some(profile);
        self
    }

    /// The policy of targets that have no control plane (`dns:///`, fixed lists): routes, clusters, retries, timeouts, filters.
    ///
    /// ```
    /// use mesh_client::policy::{Cluster, Policy, route};
    ///
    /// let canary = Cluster::of("canary", ["10.0.0.7:50051".parse().unwrap()]);
    /// let policy = Policy::default()
    ///     .with_cluster(canary)
    ///     .with_route(route::any().header("x-canary", "1").to("canary"))
    ///     .with_route(route::any().split([(Policy::TARGET, 99), ("canary", 1)]));
    /// let builder = mesh_client::Mesh::builder().policy(policy);
    /// ```
    #[must_use]
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// A host that is served from code, whatever a control plane says: requests for it through [`Mesh::layer`], and those of
    /// [`channel("host:///NAME")`](Mesh::channel), go to `target` (`dns:///HOST:PORT` or a fixed list) with this policy. `domain` is as those of
    /// virtual hosts in xDS: `shop.example`, with a port or without, `*.example`, `shop.*` or `*`; the longest of the best kind wins (gRFC
    /// A27). Clusters and their limits are the host's own, whatever other hosts call theirs. The same domain again replaces it.
    ///
    /// ```
    /// use mesh_client::policy::{Cluster, Policy, route};
    /// # fn build() -> Result<(), mesh_client::TargetError> {
    /// let canary = Cluster::of("canary", ["10.0.0.7:8080".parse().unwrap()]);
    /// let policy =
    ///     Policy::default().with_cluster(canary).with_route(route::any().header("x-canary", "1").to("canary"));
    /// let builder = mesh_client::Mesh::builder().host("shop.example", "dns:///shop:8080", policy)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// The domain is not one, the target is malformed or has its policy elsewhere (`xds:`, `host:`), or the policy cannot be.
    pub fn host(mut self, domain: &str, target: &str, policy: Policy) -> Result<Self, TargetError> {
        let fail = |reason: String| TargetError { target: target.to_owned(), reason };
        let parsed = Target::parse(target)?;
        if matches!(parsed, Target::Xds { .. } | Target::Host { .. }) {
            return Err(fail(
                "has its policy elsewhere; a host from code needs dns:///HOST:PORT or a fixed list".into(),
            ));
        }
        policy.check().map_err(|error| fail(format!("has a policy that cannot be: {error}")))?;
        let pattern = DomainPattern::parse(domain)
            .ok_or_else(|| fail(format!("is for \"{domain}\", which is not a domain: name, *suffix, prefix* or *")))?;
        self.hosts.retain(|host| host.domain != pattern);
        self.hosts.push(Host { domain: pattern, name: domain.into(), target: parsed, policy });
        Ok(self)
    }

    /// How `dns:///` targets are resolved. The names of DNS clusters are resolved by the same `resolver`; how often, they say themselves.
    #[must_use]
    pub fn dns(mut self, options: DnsOptions) -> Self {
        self.dns = options;
        self
    }

    /// How long a request without a deadline of its own waits for the first configuration. Default 20 s:
    /// more than the 15 s after which a resource that the control plane does not send counts as absent (gRFC A57).
    #[must_use]
    pub fn resolve_timeout(mut self, timeout: Duration) -> Self {
        self.settings.resolve_timeout = timeout;
        self
    }

    /// How long a call may wait for a connection, or for a stream of one, in all (Linkerd's failfast; it waits 3 s). Once a call has
    /// waited so long in vain, calls to the same cluster fail at once, with the last error of its connections, until one of its
    /// endpoints is ready. How many calls may wait at once is `max_pending_requests` of the cluster. Default `None`: calls wait to their
    /// deadline, and fail sooner only when connections fail.
    #[must_use]
    pub fn failfast(mut self, limit: Option<Duration>) -> Self {
        self.settings.failfast = limit;
        self
    }

    /// How long the headers of a response may take, in each attempt, from when the request was sent in full. An attempt that takes longer
    /// fails like one that exceeds its `per_try_timeout`: it is retried under the same conditions (`5xx`, `gateway-error`, `reset`;
    /// `deadline-exceeded`), and else the caller gets DEADLINE_EXCEEDED (HTTP 504). A request that goes on, and a response that began, are not
    /// limited. Default: no limit. With it, all requests take the general road, which costs a little more.
    #[must_use]
    pub fn response_headers_timeout(mut self, limit: Duration) -> Self {
        self.settings.response_headers = Some(limit);
        self
    }

    /// How many bytes of a request body are kept for retries. Default 64 KiB; a larger body goes on and is not retried.
    #[must_use]
    pub fn max_replay_bytes(mut self, bytes: usize) -> Self {
        self.settings.max_replay_bytes = bytes;
        self
    }

    /// How the trace context of incoming requests is handed on, and whether new traces are started.
    #[must_use]
    pub fn trace(mut self, propagation: Propagation) -> Self {
        self.settings.propagation = propagation;
        self
    }

    /// Tells what became of every request, once, at its end: that of its response body, or when the caller gives up. The hook is called on
    /// the task that ends the request, so it must not block. Without it, nothing of the record is made.
    ///
    /// ```
    /// # async fn build() -> Result<(), mesh_client::BuildError> {
    /// let mesh = mesh_client::Mesh::builder().access_log(|record| println!("{record}")).build().await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn access_log(mut self, hook: impl Fn(&AccessLog) + Send + Sync + 'static) -> Self {
        self.observers.access_log = Some(Arc::new(hook));
        self
    }

    /// Whether every request records its decisions, so that the error of one that fails has them: [`Error::explanation`](crate::Error::explanation). Costs
    /// some texts per request. Default false: then only those that carry an [`Explain`](crate::Explain) do.
    #[must_use]
    pub fn explain_errors(mut self, on: bool) -> Self {
        self.settings.explain_errors = on;
        self
    }

    /// Whether there is a `tracing` span for each call and for each of its attempts, at level INFO and with the target `mesh::call`: named
    /// as gRFC A72 does for gRPC (`Sent.…`, `Attempt.…`, in the field `otel.name`), with OpenTelemetry's attributes for HTTP. Default
    /// false. Where a subscriber takes them, the trace headers of each attempt name its span: with the feature `otel` and a layer of
    /// `tracing-opentelemetry`, as that exports it; else by an id made here, a field of the span. This replaces
    /// [`Propagation::child_spans`].
    #[must_use]
    pub fn spans(mut self, on: bool) -> Self {
        self.observers.spans = on;
        self
    }

    /// What is measured beyond what always is.
    #[must_use]
    pub fn metrics(mut self, metrics: Metrics) -> Self {
        self.settings.metrics = metrics;
        self
    }

    /// Asks the application about the outcome of every attempt, before the conditions of the route's retry policy do.
    #[must_use]
    pub fn retry_hook(mut self, hook: impl Hook) -> Self {
        self.settings.retry_hook = Some(HookRef(Arc::new(hook)));
        self
    }

    /// Limits the retries and hedges to each cluster by such a budget, beside what the cluster's configuration allows: Linkerd's
    /// [`RetryBudget::ratio`], or gRPC's [`RetryBudget::throttle`]. Every cluster counts by itself.
    #[must_use]
    pub fn retry_budget(mut self, budget: RetryBudget) -> Self {
        self.settings.retry_budget = Some(Arc::new(budget));
        self
    }

    /// The crypto provider of TLS connections, and of what servers of the mesh verify tokens with. Default: [`mesh_tls::default_provider`].
    #[must_use]
    pub fn crypto_provider(mut self, provider: Arc<mesh_tls::CryptoProvider>) -> Self {
        self.crypto = Some(provider);
        self
    }

    /// A certificate provider instance that the application holds itself: the Workload API, Istio's certificate authority, or certificates
    /// in memory. Configurations name it as they name those of the bootstrap, of which it replaces one of the same name. The
    /// instance `default` is also the workload's own identity where they ask for that: the secrets `default` and `ROOTCA` that Istio's
    /// agent serves to proxies.
    #[must_use]
    pub fn certificate_provider(mut self, instance: impl Into<String>, source: Arc<dyn mesh_tls::Source>) -> Self {
        self.certificates.insert(instance.into(), source);
        self
    }

    /// TLS with endpoints of clusters that say nothing of it: without a `transport_socket`, and without one of
    /// `transport_socket_matches` for the endpoint (gRFC A29: what `XdsCredentials` falls back to), and of targets without a control
    /// plane. Default: plaintext. What a cluster says wins, `raw_buffer` too. Without `sni` the server name is the endpoint's `hostname`,
    /// where it has one; without `alpn` the protocol of the cluster is offered.
    #[must_use]
    pub fn fallback_tls(mut self, settings: mesh_tls::ClientSettings) -> Self {
        self.fallback = Some(settings);
        self
    }

    /// PINGs on HTTP/2 connections to endpoints, so that a peer that went silent is noticed. Default: [`Keepalive::default`]; `None`
    /// turns them off.
    #[must_use]
    pub fn keepalive(mut self, keepalive: Option<Keepalive>) -> Self {
        self.keepalive = keepalive;
        self
    }

    /// How long what was sent to an endpoint may stay unacknowledged, or unsent before a peer that does not read, until the system gives
    /// the connection up (`TCP_USER_TIMEOUT`, RFC 5482; Linux and Android), over HTTP/1.1 and HTTP/2. Default: the timeout of the PINGs over
    /// HTTP/2 (gRFC A18), and the system's own over HTTP/1.1, which is a quarter of an hour.
    #[must_use]
    pub fn tcp_user_timeout(mut self, timeout: Duration) -> Self {
        self.user_timeout = Some(timeout);
        self
    }

    /// How long requests to an endpoint that was removed, or is unhealthy, may go on; then they are cut. Default 10 min.
    /// [`Duration::MAX`]: for ever.
    #[must_use]
    pub fn drain_timeout(mut self, timeout: Duration) -> Self {
        self.drain_timeout = timeout;
        self
    }

    /// What becomes of open connections when certificates or roots change. New ones always have the newest. Default:
    /// [`TlsRenewal::Within`] 10 s.
    #[must_use]
    pub fn tls_renewal(mut self, renewal: TlsRenewal) -> Self {
        self.tls_renewal = renewal;
        self
    }

    /// Opens the byte streams to endpoints and control planes by `dial` in place of TCP sockets: through a tunnel, or in a network
    /// that is simulated.
    #[must_use]
    pub fn dial(mut self, dial: impl Dial) -> Self {
        self.dial = Some(DialRef(Arc::new(dial)));
        self
    }

    /// Adds a filter that the control plane can configure: by the type of its configuration, a type URL or the full name of a message,
    /// also inside a `TypedStruct` (gRFC A39). A type that is known here is not replaced. Without this, a filter of an unknown type makes
    /// its listener rejected, unless it is optional.
    #[must_use]
    pub fn filter(mut self, type_url: &str, factory: impl FilterFactory) -> Self {
        self.extensions.add_filter(type_url, Arc::new(Parser(factory)));
        self
    }

    /// Adds an audit logger (gRFC A59) by the type of its configuration, for the RBAC filters of servers: `StdoutAuditLog` is built in.
    #[must_use]
    pub fn audit_logger(mut self, type_url: &str, factory: impl AuditLoggerFactory) -> Self {
        self.extensions.add_audit_logger(type_url, Arc::new(AuditParser(factory)));
        self
    }

    /// The most entries that a hash ring has, whatever its configuration says. Default 4096, as in gRPC (gRFC A42); more is more even,
    /// and costs memory: 12 bytes for each entry of each cluster.
    #[must_use]
    pub fn ring_hash_cap(mut self, entries: u64) -> Self {
        self.ring_hash_cap = entries.max(1);
        self
    }

    /// Which share of all clients of the services that this one calls is in its own zone, 0..=1: with three zones that have as many
    /// clients each, 1/3. Zone-aware routing (`zone_aware_lb_config`, [`Profile::Envoy`]) needs it, and the locality of the bootstrap's
    /// node; without it requests go to all zones by the number of their endpoints. (Envoy counts the endpoints of a `local_cluster`.)
    #[must_use]
    pub fn zone_share(mut self, share: f64) -> Self {
        self.zone_share = Some(share.clamp(0.0, 1.0));
        self
    }

    /// A load-balancing policy of the program's own. Clusters name it in their `load_balancing_policy`, as a `TypedStruct` whose type
    /// URL ends in `name` (gRFC A52). It is looked for before the policies of the same name that are built in.
    #[must_use]
    pub fn lb_policy(mut self, name: impl Into<String>, factory: impl LbPolicyFactory) -> Self {
        let name = name.into();
        self.extensions.add_lb_policy(&name);
        self.lb_policies.insert(name, Arc::new(factory));
        self
    }

    /// Builds the mesh. Does not wait for the control plane.
    ///
    /// # Errors
    /// There is no tokio runtime, the control plane's credentials cannot be used, or the policy cannot be.
    pub async fn build(self) -> Result<Mesh, BuildError> {
        self.policy.check()?;
        let runtime = tokio::runtime::Handle::try_current().map_err(|_| BuildError::NoRuntime)?;
        let crypto = self.crypto.unwrap_or_else(mesh_tls::default_provider);
        let fallback = self.fallback.map(|settings| Fallback::new(&settings, &crypto)).transpose();
        let fallback = fallback.map_err(BuildError::Fallback)?;
        let registry = Registry::new(self.lb_policies);
        let bootstrap = self.bootstrap.map(|mut bootstrap| {
            let given = self.certificates.keys().map(|instance| (instance.clone(), CertificateProvider::Application));
            bootstrap.certificate_providers.extend(given);
            Arc::new(bootstrap)
        });
        let locality = bootstrap.as_ref().map(|bootstrap| bootstrap.node.locality.clone());
        let balancing = Balancing {
            ring_cap: self.ring_hash_cap,
            seed: fastrand::u64(..),
            registry,
            own_zone: locality.zip(self.zone_share).map(|(locality, share)| OwnZone { locality, share }),
        };
        let source = bootstrap.as_ref().map(|b| Source::of(&b.node)).unwrap_or_default();
        let providers = bootstrap.as_ref().map(|b| b.certificate_providers.clone()).unwrap_or_default();
        let opener = Opener { crypto, runtime: runtime.clone() };
        let options = ClientOptions {
            extensions: self.extensions,
            resolver: self.dns.resolver.clone(),
            ..ClientOptions::default()
        };
        let connect = ads_connector(opener.clone(), self.dial.clone());
        let xds = bootstrap.map(|b| XdsClient::with_options(b, connect, options));
        let identities = Identities::new(providers, self.certificates, fallback, opener, xds.clone());
        let observed = self.observers.any() || self.settings.metrics.watch_calls();
        let propagation = self.settings.propagation.without_child_spans(self.observers.spans);
        let inner = Inner {
            xds,
            identities: identities.clone(),
            upstreams: Arc::new(Upstreams::new(
                identities,
                self.keepalive,
                self.user_timeout,
                (self.drain_timeout, self.tls_renewal),
                self.dial,
                balancing,
                runtime.clone(),
            )),
            settings: Arc::new(Settings {
                observers: observed.then(|| Arc::new(self.observers)),
                source,
                propagation,
                ..self.settings
            }),
            profile: self.profile,
            policy: self.policy,
            hosts: self.hosts,
            dns: self.dns,
            runtime,
            channels: Mutex::default(),
            explained: Mutex::default(),
        };
        Ok(Mesh { inner: Arc::new(inner) })
    }
}

impl Default for MeshBuilder {
    fn default() -> Self {
        Self {
            bootstrap: None,
            profile: None,
            policy: Policy::default(),
            hosts: Vec::new(),
            dns: DnsOptions::default(),
            settings: Settings::default(),
            observers: Observers::default(),
            crypto: None,
            certificates: HashMap::new(),
            fallback: None,
            keepalive: Some(Keepalive::default()),
            user_timeout: None,
            drain_timeout: DRAIN_TIMEOUT,
            tls_renewal: TlsRenewal::default(),
            dial: None,
            extensions: Extensions::default(),
            ring_hash_cap: RING_HASH_CAP,
            zone_share: None,
            lb_policies: HashMap::new(),
        }
    }
}

impl fmt::Debug for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mesh").field("xds", &self.inner.xds).finish_non_exhaustive()
    }
}

impl fmt::Debug for MeshBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshBuilder")
            .field("bootstrap", &self.bootstrap)
            .field("profile", &self.profile)
            .field("policy", &self.policy)
            .field("hosts", &self.hosts)
            .field("settings", &self.settings)
            .field("lb_policies", &self.lb_policies.keys())
            .finish_non_exhaustive()
    }
}
