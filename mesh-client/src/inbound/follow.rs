//! An inbound side whose configuration comes from the control plane (gRFC A36).

use super::{Chain, Config, FetchKeys, Kept, Policy, Shared, Source};
use crate::{
    error::BoxError,
    outbound::identity::Identities,
    telemetry::{metrics::Source as Labels, watch::AccessLogger},
};
use mesh_tls::Acceptor;
use mesh_xds::{
    ServerSnapshot, ServerWatch, XdsClient,
    bootstrap::BootstrapError,
    resource::{DownstreamTls, FilterChain, FilterChainMatch, HttpFilter, RemoteJwks},
    snapshot::ServerState,
};
use std::{
    fmt,
    net::SocketAddr,
    sync::{Arc, Weak},
};
use tokio::task::AbortHandle;

/// Whether an inbound side takes connections.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Serving {
    /// As its configuration says.
    Serving {
        /// `version_info` of what it is made of, for people: "lds=3 rds=3"; `code` without a control plane.
        version: Arc<str>,
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
    pub(crate) runtime: tokio::runtime::Handle,
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
}

/// Ends what follows the control plane when the inbound side ends.
#[derive(Debug)]
pub(super) struct Following(AbortHandle);

/// One chain as it was configured: what decides whether its connections may stay.
struct Made {
    tls: Option<Arc<DownstreamTls>>,
    matcher: FilterChainMatch,
    chain: Arc<Chain>,
}

/// What stands of the configuration in force.
struct Compiler {
    identities: Arc<Identities>,
    /// For chains of which the control plane does not say how they are secured (gRFC A29).
    fallback: Option<Acceptor>,
    asked: Asked,
    fetch: Fetch,
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
    fallback: Option<Acceptor>,
    asked: Asked,
) -> Following {
    let (identities, fetch) = (origin.identities.clone(), origin.fetch.clone());
    let compiler = Compiler { identities, fallback, asked, fetch, made: Vec::new() };
    Following(origin.runtime.spawn(run(Arc::downgrade(shared), watch, compiler)).abort_handle())
}

async fn run(shared: Weak<Shared>, mut watch: ServerWatch, mut compiler: Compiler) {
    loop {
        let state = watch.state();
        match shared.upgrade() {
            None => return,
            Some(shared) => compiler.step(&shared, state),
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
            ServerState::Ready(snapshot) => match self.compile(&snapshot, shared) {
                Ok(config) => {
                    shared.apply(config);
                    return shared.serves(Serving::Serving { version: snapshot.version.clone() });
                }
                Err(error) if !self.made.is_empty() => {
                    tracing::error!(listener = &*snapshot.name, error = &*error, "the last good configuration stays");
                    return;
                }
                Err(error) => stop(format!("Listener \"{}\": {error}", snapshot.name)),
            },
            ServerState::Absent(error) | ServerState::Pending { cause: Some(error) } => stop(error.to_string()),
            ServerState::Pending { cause: None } => Serving::awaited(),
        };
        self.made.clear();
        shared.apply(Config::default());
        shared.serves(serving);
    }

    /// Chains that are as they were before stay the same, connections and all; what their requests are asked changes in place.
    fn compile(&mut self, snapshot: &ServerSnapshot, shared: &Shared) -> Result<Config, BoxError> {
        let mut made: Vec<Made> = Vec::new();
        for said in snapshot.listener.chains() {
            let kept = self
                .made
                .iter()
                .find(|old| old.chain.name == said.name && old.matcher == said.matcher && old.tls == said.tls);
            let chain = match kept {
                Some(old) => old.chain.clone(),
                None => Arc::new(self.chain(said, shared)?),
            };
            made.push(Made { tls: said.tls.clone(), matcher: said.matcher.clone(), chain });
        }
        for (said, made) in snapshot.listener.chains().zip(&made) {
            made.chain.policy.store(Some(Arc::new(self.policy(snapshot, said))));
        }
        let mut chains: Vec<_> = made.iter().map(|made| made.chain.clone()).collect();
        let default = snapshot.listener.default_filter_chain.as_ref().and_then(|_| chains.pop());
        self.made = made;
        Ok(Config { chains, default, detection_timeout: snapshot.listener.detection_timeout })
    }

    /// What every request of a chain is asked. What cannot be honoured lets nobody in.
    fn policy(&self, snapshot: &ServerSnapshot, said: &FilterChain) -> Policy {
        let Asked { kept, filters, fetches } = &self.asked;
        let filters: Vec<_> = filters.iter().chain(&said.http.http_filters).cloned().collect();
        let fetch = |remote: &RemoteJwks| {
            let own = fetches.iter().find(|(cluster, _)| *cluster == remote.cluster).map(|(_, fetch)| fetch.clone());
            own.or_else(|| (self.fetch)(remote))
        };
        // Routes that do not exist are none: requests find no way (gRFC A36).
        let missing = Arc::default();
        let routes = match snapshot.routes_of(said) {
            Some(Ok(routes)) => routes,
            Some(Err(_)) | None => &missing,
        };
        Policy::compile(
            Source {
                listener: &snapshot.name,
                filters: &filters,
                routes: Some(routes),
                forward_client_cert: said.connections.forward_client_cert,
                client_cert_details: said.connections.client_cert_details,
                around: None,
                fetch: Some(&fetch),
            },
            kept,
        )
    }

    fn chain(&self, said: &FilterChain, shared: &Shared) -> Result<Chain, BoxError> {
        let tls = match &said.tls {
            Some(tls) => Some(self.identities.server_tls(tls, shared.limits.handshake_timeout)?),
            None => self.fallback.clone(),
        };
        Ok(Chain { matcher: said.matcher.clone(), ..Chain::new(said.name.clone(), tls, None) })
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
            Self::Serving { version } => write!(f, "serving ({version})"),
            Self::NotServing { reason } => write!(f, "not serving: {reason}"),
        }
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.0.abort();
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
