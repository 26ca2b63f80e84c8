//! An inbound side whose configuration comes from the control plane (gRFC A36).

use super::{Chain, Config, FetchKeys, Kept, Policy, Security, Shared, Source};
use crate::{
    error::{BoxError, caught},
    outbound::identity::Identities,
    task::Task,
    telemetry::{metrics::Source as Labels, watch::AccessLogger},
};
use mesh_tls::CryptoProvider;
use mesh_xds::{
    ServerSnapshot, ServerWatch, XdsClient,
    bootstrap::BootstrapError,
    resource::{ClientCertDetails, DownstreamTls, FilterChain, ForwardClientCert, HttpFilter, RemoteJwks},
    snapshot::ServerState,
};
use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Weak},
};
use tokio::runtime::Handle;

/// Whether an inbound side takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Serving {
    /// As its configuration says.
    Serving {
        /// `version_info` of what it is made of, for people: "lds=3 rds=3"; `code`, or "file 2",
        /// without a control plane.
        version: Arc<str>,
        /// What of that is not in force, by the name of its filter chain, and why: connections of a chain whose TLS cannot be made are closed, or
        /// go on to be secured as before. Empty where all is well.
        problems: Arc<[String]>,
    },
    /// Connections are closed as soon as they are accepted (gRFC A36).
    NotServing {
        /// Why: what is missing or wrong, by name.
        reason: Arc<str>,
    },
}

/// Is told each time an inbound side begins or ceases to serve, or serves as another configuration says. Called on the task that
/// follows the control plane: it must not block.
pub(super) type OnServing = Arc<dyn Fn(&Serving) + Send + Sync>;

/// Where the configuration of an inbound side comes from.
#[derive(Clone)]
pub(crate) struct Origin {
    pub(crate) xds: XdsClient,
    pub(crate) identities: Arc<Identities>,
    pub(crate) runtime: Handle,
    /// Of the mesh.
    pub(crate) crypto: Arc<CryptoProvider>,
    /// Who we are, in metrics.
    pub(crate) labels: Labels,
    /// The mesh's own, where the server has none.
    pub(crate) access_log: Option<AccessLogger>,
    pub(crate) fetch: Fetch,
}

/// How keys of tokens are fetched that the control plane names; `None`: they cannot be.
pub(crate) type Fetch = Arc<dyn Fn(&RemoteJwks) -> Option<Arc<dyn FetchKeys>> + Send + Sync>;

/// What requests are asked by the program, and what is kept of the answers over changes.
pub(super) struct Asked {
    pub(super) kept: Kept,
    /// Before those of the control plane.
    pub(super) filters: Vec<HttpFilter>,
    pub(super) fetches: Vec<(Arc<str>, Arc<dyn FetchKeys>)>,
    /// Other keys are fetched so.
    pub(super) fetch: Option<Fetch>,
}

/// One chain as it was configured: what decides whether it is the same.
struct Made {
    /// For connections that match no other.
    default: bool,
    tls: Option<Arc<DownstreamTls>>,
    chain: Arc<Chain>,
}

/// What stands of the configuration in force.
struct Compiler {
    identities: Arc<Identities>,
    /// For chains of which the control plane does not say how they are secured (gRFC A29).
    fallback: Security,
    asked: Asked,
    made: Vec<Made>,
}

impl Origin {
    /// What a server on this address is to do.
    pub(super) fn watch(&self, address: SocketAddr) -> Result<ServerWatch, BootstrapError> {
        let _runtime = self.runtime.enter();
        self.xds.watch_server(address)
    }
}

/// Keeps the configuration as the control plane says, until the inbound side ends.
pub(super) fn follow(
    shared: &Arc<Shared>,
    watch: ServerWatch,
    origin: &Origin,
    fallback: Security,
    asked: Asked,
) -> Task {
    let compiler = Compiler { identities: origin.identities.clone(), fallback, asked, made: Vec::new() };
    Task::on(&origin.runtime, run(Arc::downgrade(shared), watch, compiler))
}

async fn run(shared: Weak<Shared>, mut watch: ServerWatch, mut compiler: Compiler) {
    loop {
        let state = watch.state();
        match shared.upgrade() {
            None => return,
            Some(shared) => {
                if let Err(panic) = caught(|| compiler.step(&shared, state)) {
                    let reason = format!("the configuration cannot be put in force, making it panicked: {panic}");
                    compiler.stop(&shared, Serving::NotServing { reason: reason.into() });
                }
            }
        }
        if watch.changed().await.is_err() {
            return;
        }
    }
}

impl Compiler {
    fn step(&mut self, shared: &Arc<Shared>, state: ServerState) {
        let stop = |reason: String| Serving::NotServing { reason: reason.into() };
        let serving = match state {
            ServerState::Ready(snapshot) if snapshot.listener.address != shared.local => {
                let told = snapshot.listener.address;
                stop(format!("Listener \"{}\" is for {told}, this server listens on {}", snapshot.name, shared.local))
            }
            ServerState::Ready(snapshot) => {
                let (config, problems) = self.compile(&snapshot, shared);
                for problem in &problems {
                    tracing::error!(listener = &*snapshot.name, "{problem}");
                }
                if self.made.iter().any(|made| !made.is_refused()) {
                    shared.apply(config);
                    let (version, problems) = (snapshot.version.clone(), problems.into());
                    return shared.serves(Serving::Serving { version, problems });
                }
                stop(format!("Listener \"{}\": {}", snapshot.name, problems.join("; ")))
            }
            ServerState::Absent(error) | ServerState::Pending { cause: Some(error) } => stop(error.to_string()),
            ServerState::Pending { cause: None } => Serving::awaited(),
        };
        self.stop(shared, serving);
    }

    /// Nobody is served, for this reason.
    fn stop(&mut self, shared: &Arc<Shared>, reason: Serving) {
        self.made.clear();
        shared.apply(Config::default());
        shared.serves(reason);
    }

    /// Chains that are secured as before stay the same; what their requests are asked changes in place. Beside it, what cannot be put in force.
    fn compile(&mut self, snapshot: &ServerSnapshot, shared: &Shared) -> (Config, Vec<String>) {
        let mut problems = Vec::new();
        let mut before = std::mem::take(&mut self.made);
        let chains = snapshot.listener.filter_chains.iter().map(|said| (false, said));
        let default = snapshot.listener.default_filter_chain.iter().map(|said| (true, said));
        for (default, said) in chains.chain(default) {
            let old = before.iter().position(|old| old.default == default && old.chain.name == said.name);
            let old = old.map(|at| before.remove(at));
            let limits = Arc::new(shared.limits.load().within(&said.connections, said.http.stream_idle_timeout));
            let policy = Some(Arc::new(self.policy(snapshot, said, &self.place(snapshot, default, said))));
            let made = match old {
                Some(old) if old.tls == said.tls && !old.is_refused() => old,
                old => self.security(said, shared).map(|security| Made::new(default, said, security)).unwrap_or_else(
                    |error| {
                        problems.push(format!("filter chain \"{}\": {error}", said.name));
                        let refused = || Made::new(default, said, Security::Refused(error.to_string().into()));
                        old.filter(|old| old.is_as_strict_as(said)).unwrap_or_else(refused)
                    },
                ),
            };
            made.chain.limits.store(limits);
            made.chain.policy.store(policy);
            self.made.push(made);
        }
        let chain = |made: &Made| made.chain.clone();
        let matchers = snapshot.listener.filter_chains.iter().map(|said| said.matcher.clone());
        let config = Config {
            chains: matchers.zip(self.made.iter().map(chain)).collect(),
            default: self.made.last().filter(|made| made.default).map(chain),
            detection_timeout: snapshot.listener.detection_timeout,
        };
        (config, problems)
    }

    /// Where the filters of the next chain count: by its name, and how many there were of that name. Other chains count for themselves.
    fn place(&self, snapshot: &ServerSnapshot, default: bool, said: &FilterChain) -> Arc<str> {
        let nth = self.made.iter().filter(|made| made.default == default && made.chain.name == said.name).count();
        let kind = if default { "default" } else { "chain" };
        format!("{}/{kind} {nth} {}", snapshot.name, said.name).into()
    }

    /// What every request of a chain is asked. What cannot be honoured lets nobody in.
    fn policy(&self, snapshot: &ServerSnapshot, said: &FilterChain, place: &Arc<str>) -> Policy {
        let asked = &self.asked;
        let filters: Vec<_> = asked.filters.iter().chain(&said.http.http_filters).cloned().collect();
        // Routes that do not exist are none: requests find no way (gRFC A36).
        let missing = Arc::default();
        let routes = match snapshot.routes_of(said) {
            Some(Ok(routes)) => routes,
            Some(Err(_)) | None => &missing,
        };
        Policy::compile(
            Source {
                listener: place,
                together: Some((&snapshot.name, asked.filters.len())),
                filters: &filters,
                routes: Some(routes),
                forward_client_cert: said.connections.forward_client_cert,
                client_cert_details: said.connections.client_cert_details,
                max_stream_duration: said.http.max_stream_duration,
                around: None,
                fetch: Some(&|remote| asked.fetch(remote)),
            },
            &asked.kept,
        )
    }

    fn security(&self, said: &FilterChain, shared: &Shared) -> Result<Security, BoxError> {
        Ok(match &said.tls {
            Some(tls) => Security::Tls(self.identities.server_tls(tls, shared.limits.load().handshake_timeout)?),
            None => self.fallback.clone(),
        })
    }
}

impl Made {
    fn new(default: bool, said: &FilterChain, security: Security) -> Self {
        let chain = Arc::new(Chain::new(said.name.clone(), security, Arc::default(), None));
        Self { default, tls: said.tls.clone(), chain }
    }

    fn is_refused(&self) -> bool {
        matches!(self.chain.security, Security::Refused(_))
    }

    /// Whether it can stand in for this one: what lets in others than is said now cannot.
    fn is_as_strict_as(&self, said: &FilterChain) -> bool {
        let strict = match (&self.tls, &said.tls) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(old), Some(now)) => {
                old.require_client_certificate >= now.require_client_certificate
                    && old.ca == now.ca
                    && old.san_matchers == now.san_matchers
            }
        };
        strict && !self.is_refused()
    }
}

/// The target that serves the keys of tokens: the service of Istio's cluster, else what the URI names, unless it is to be encrypted.
pub(crate) fn jwks_target(remote: &RemoteJwks) -> Option<String> {
    if let Some(rest) = remote.cluster.strip_prefix("outbound|") {
        let (port, host) = (rest.split('|').next()?, rest.rsplit('|').next()?);
        return Some(format!("xds:///{host}:{port}"));
    }
    let plain = remote.uri.scheme_str() == Some("http");
    plain.then(|| format!("dns:///{}:{}", remote.uri.host().unwrap_or_default(), remote.uri.port_u16().unwrap_or(80)))
}

impl fmt::Debug for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Origin").field("xds", &self.xds).finish_non_exhaustive()
    }
}

impl Serving {
    /// At first.
    pub(super) fn awaited() -> Self {
        Self::NotServing { reason: "the control plane has not said yet what this server is to do".into() }
    }

    /// Whether connections are taken.
    pub fn is_serving(&self) -> bool {
        matches!(self, Self::Serving { .. })
    }
}

impl fmt::Display for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Serving { version, problems } if problems.is_empty() => write!(f, "serving ({version})"),
            Self::Serving { version, problems } => write!(f, "serving ({version}), but {}", problems.join("; ")),
            Self::NotServing { reason } => write!(f, "not serving: {reason}"),
        }
    }
}

impl Asked {
    /// What requests are asked where there are no routes: by the program first, then by `filters`.
    pub(super) fn policy(
        &self,
        filters: Vec<HttpFilter>,
        (forward_client_cert, client_cert_details): (ForwardClientCert, ClientCertDetails),
    ) -> Policy {
        let all: Vec<_> = self.filters.iter().cloned().chain(filters).collect();
        let source = Source {
            listener: &"inbound".into(),
            together: None,
            filters: &all,
            routes: None,
            forward_client_cert,
            client_cert_details,
            max_stream_duration: None,
            around: None,
            fetch: Some(&|remote| self.fetch(remote)),
        };
        Policy::compile(source, &self.kept)
    }

    /// Who fetches these keys: the program says it first.
    fn fetch(&self, remote: &RemoteJwks) -> Option<Arc<dyn FetchKeys>> {
        let own = self.fetches.iter().find(|(cluster, _)| *cluster == remote.cluster);
        own.map(|(_, fetch)| fetch.clone()).or_else(|| self.fetch.as_ref()?(remote))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn keys_of_tokens_are_fetched_from_the_service_or_the_name() {
        let target = |uri: &str, cluster: &str| {
            jwks_target(&RemoteJwks {
                uri: uri.parse().unwrap(),
                cluster: cluster.into(),
                timeout: Duration::from_secs(1),
                cache_duration: Duration::from_secs(1),
                async_fetch: false,
                failed_refetch: Duration::from_secs(1),
                retries: 0,
                stale: Duration::ZERO,
            })
        };
        let of = |text: &str| Some(text.to_owned());
        assert_eq!(
            target("http://a/keys", "outbound|80||jwks.ns.svc.cluster.local"),
            of("xds:///jwks.ns.svc.cluster.local:80")
        );
        assert_eq!(target("http://a:8080/keys", "jwks"), of("dns:///a:8080"));
        assert_eq!(target("http://a/keys", "jwks"), of("dns:///a:80"));
        assert_eq!(target("https://a/keys", "jwks"), None, "never in the clear what is to be encrypted");
    }
}
