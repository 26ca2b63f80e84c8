//! An inbound side from code.

use super::{
    Chain, Config, FetchKeys, Inbound, JwtAuthentication, Kept, Limits, Origin, RateLimit, Rbac, Security, Serving,
    file::{File, Own, REFRESH},
    follow::{Asked, OnServing, follow},
};
use crate::{
    TlsRenewal,
    error::BoxError,
    telemetry::{
        access_log::AccessLog,
        metrics::{ServerMetrics, Source as Labels, own_labels},
        watch::AccessLogger,
    },
};
use mesh_tls::{Acceptor, CryptoProvider, ServerSettings, TlsError, default_provider};
use mesh_xds::{
    bootstrap::BootstrapError,
    resource::{ClientCertDetails, ForwardClientCert, HttpFilter, HttpFilterConfig},
};
use std::{fmt, io, path::PathBuf, sync::Arc, time::Duration};
use tokio::net::{TcpListener, ToSocketAddrs, lookup_host};

/// Makes an [`Inbound`]: from code, where without TLS settings it takes plaintext, or as the control plane says
/// ([`Mesh::inbound_builder`](crate::Mesh::inbound_builder)).
#[derive(Default)]
pub struct InboundBuilder {
    tls: Option<Tls>,
    limits: Limits,
    origin: Option<Origin>,
    on_serving: Option<OnServing>,
    filters: Vec<HttpFilter>,
    fetches: Vec<(Arc<str>, Arc<dyn FetchKeys>)>,
    service: Option<String>,
    forwarding: (ForwardClientCert, ClientCertDetails),
    access_log: Option<AccessLogger>,
    /// And how often it is looked at.
    file: Option<(PathBuf, Duration)>,
    crypto: Option<Arc<CryptoProvider>>,
    normalize: bool,
    /// The first policy that can never mean what it says.
    wrong: Option<String>,
    renewal: TlsRenewal,
}

enum Tls {
    Settings(ServerSettings),
    Acceptor(Acceptor),
}

/// Why an inbound side cannot be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}")]
    Listen {
        /// What was asked for, all addresses of its name.
        address: String,
        /// Why not.
        #[source]
        error: io::Error,
    },
    /// The TLS settings cannot be used.
    #[error("TLS settings of the server with the certificates of \"{identity}\": {error}")]
    Tls {
        /// The name of the source of its certificate.
        identity: String,
        /// Why not.
        #[source]
        error: TlsError,
    },
    /// A policy from code cannot be honoured, or can never mean what it says: keys of tokens that cannot be read, a rule about tokens before
    /// there are any, a name that no header has, a limit of nothing.
    #[error("policy: {0}")]
    Policy(Arc<str>),
    /// The bootstrap does not say how the listener of a server is called.
    #[error(transparent)]
    Bootstrap(#[from] BootstrapError),
    /// The configuration file cannot be read, or is not one.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, with the place in it.
        error: BoxError,
    },
    /// Both a control plane and a file would say what the server is to do.
    #[error("the control plane says what the server is to do: it can have no configuration file as well")]
    TwoSources,
    /// The mesh has no control plane that could say what the server is to do.
    #[error("the mesh has no control plane: make the inbound side from code, with Inbound::builder")]
    NoControlPlane,
}

impl BuildError {
    fn listen(address: impl Into<String>, error: io::Error) -> Self {
        Self::Listen { address: address.into(), error }
    }
}

fn given(error: io::Error) -> BuildError {
    BuildError::listen("the socket that was given", error)
}

impl InboundBuilder {
    /// As the control plane of a mesh says.
    pub(crate) fn of_mesh(origin: Origin) -> Self {
        Self { origin: Some(origin), ..Self::default() }
    }

    /// Is told each time the inbound side begins to take connections or ceases to, and of each new configuration, with the reason. Called on
    /// the task that follows the control plane: it must not block.
    #[must_use]
    pub fn on_serving(mut self, tell: impl Fn(&Serving) + Send + Sync + 'static) -> Self {
        self.on_serving = Some(Arc::new(tell));
        self
    }

    /// Does what a file says, in JSON: TLS, limits, who may do what. It is looked at every five seconds; a change is put in force in place, as one of a
    /// control plane would be: connections stay, unless they are secured in another way. A file that is wrong changes nothing, and
    /// is told ([`Inbound::serving`], `on_serving`, the log, `mesh_inbound_file_errors_total`). What it does not say is as the builder says; its filters come behind the
    /// builder's. The format is in `docs/inbound-file.md`.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// let inbound = mesh_client::Inbound::builder().file("inbound.json").bind("0.0.0.0:50051").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>) -> Self {
        let refresh = self.file.map_or(REFRESH, |(_, refresh)| refresh);
        self.file = Some((path.into(), refresh));
        self
    }

    /// How often the [`file`](Self::file), which has to be given before, is looked at; at least each 10 ms.
    #[must_use]
    pub fn file_refresh(mut self, refresh: Duration) -> Self {
        if let Some((_, before)) = &mut self.file {
            *before = refresh.max(Duration::from_millis(10));
        }
        self
    }

    /// Connections are secured so, where there is a control plane only those of filter chains of which it does not say how (gRFC A29). [`ServerSettings::mode`] says whether plaintext is taken too.
    #[must_use]
    pub fn tls(mut self, settings: ServerSettings) -> Self {
        self.tls = Some(Tls::Settings(settings));
        self
    }

    /// Connections are secured by an acceptor that was made before. Its mode can be changed at any time.
    #[must_use]
    pub fn acceptor(mut self, acceptor: Acceptor) -> Self {
        self.tls = Some(Tls::Acceptor(acceptor));
        self
    }

    /// What becomes of open connections when whom we trust changes (other roots, a list of revoked certificates). [`TlsRenewal::Within`]: those whose
    /// clients would not be let in any more are told to go away at once, and cut when that time is over; the others stay, also when our own
    /// certificate was renewed, and when the certificate that they showed has expired since: that it is valid is asked when they connect, and a bound for it is
    /// [`Limits::max_connection_age`]. Default: 10 s, as with a [`MeshBuilder`](crate::MeshBuilder::tls_renewal).
    #[must_use]
    pub fn tls_renewal(mut self, renewal: TlsRenewal) -> Self {
        self.renewal = renewal;
        self
    }

    /// What clients may cost.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Who may do what. Asked in the order in which they, tokens and rate limits are given here.
    ///
    /// ```no_run
    /// # async fn run() -> Result<(), Box<dyn std::error::Error>> {
    /// use mesh_client::inbound::{Inbound, Rbac, Rule};
    ///
    /// let inbound = Inbound::builder()
    ///     .authorize(Rbac::deny().rule("admin", Rule::new().path("/admin*").not_namespace("ops")))
    ///     .authorize(Rbac::allow().rule("shop", Rule::new().namespace("shop")))
    ///     .bind("0.0.0.0:50051")
    ///     .await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn authorize(mut self, rbac: Rbac) -> Self {
        let name = format!("authorize-{}", self.filters.len());
        let authenticated = self.filters.iter().any(|filter| matches!(filter.config, HttpFilterConfig::Jwt(_)));
        self.mistake(&name, rbac.wrong(authenticated));
        self.filters.push(rbac.filter(name));
        self
    }

    /// Requests need a token of this issuer, or of one of several ([`JwtAuthentication::any_of`]). What it says is known to the rules that are
    /// given after it, and to handlers ([`JwtClaims`](super::JwtClaims)).
    #[must_use]
    pub fn jwt(mut self, tokens: impl Into<JwtAuthentication>) -> Self {
        let (filter, fetches) = tokens.into().filter(format!("jwt-{}", self.filters.len()));
        self.filters.push(filter);
        self.fetches.extend(fetches);
        self
    }

    /// How many requests are taken.
    #[must_use]
    pub fn rate_limit(mut self, limit: RateLimit) -> Self {
        let name = format!("rate-limit-{}", self.filters.len());
        self.mistake(&name, limit.wrong());
        self.filters.push(limit.filter(name));
        self
    }

    /// A filter of the program's own, or any that a control plane could send.
    #[must_use]
    pub fn filter(mut self, filter: HttpFilter) -> Self {
        self.filters.push(filter);
        self
    }

    /// The crypto provider of its TLS connections and of what verifies tokens. Default: that of the mesh
    /// ([`MeshBuilder::crypto_provider`](crate::MeshBuilder::crypto_provider)), else [`mesh_tls::default_provider`]. An
    /// [`acceptor`](Self::acceptor) keeps its own.
    #[must_use]
    pub fn crypto_provider(mut self, provider: Arc<CryptoProvider>) -> Self {
        self.crypto = Some(provider);
        self
    }

    /// Paths are normalised before anything looks at them, the application included (RFC 3986 section 6.2.2): `%61` becomes `a` and `%2e` a dot,
    /// what stays encoded is in capitals, `/x/../y` becomes `/y`, `//` one slash, and a backslash a slash. Paths with an encoded slash or backslash, which
    /// services read in different ways, are answered with 400.
    #[must_use]
    pub fn normalize_paths(mut self) -> Self {
        self.normalize = true;
        self
    }

    fn mistake(&mut self, filter: &str, wrong: Option<String>) {
        if let (None, Some(wrong)) = (&self.wrong, wrong) {
            self.wrong = Some(format!("{filter}: {wrong}"));
        }
    }

    fn provider(&self) -> Arc<CryptoProvider> {
        let of_mesh = || self.origin.as_ref().map(|origin| origin.crypto.clone());
        self.crypto.clone().or_else(of_mesh).unwrap_or_else(default_provider)
    }

    /// The service that this is, such as `greeter.default.svc.cluster.local`: `destination_service` of the metrics.
    #[must_use]
    pub fn service(mut self, host: impl Into<String>) -> Self {
        self.service = Some(host.into());
        self
    }

    /// Is told of each request that was served, at its end.
    #[must_use]
    pub fn access_log(mut self, hook: impl Fn(&AccessLog) + Send + Sync + 'static) -> Self {
        self.access_log = Some(Arc::new(hook));
        self
    }

    /// What becomes of `x-forwarded-client-cert`; default: it is taken away.
    #[must_use]
    pub fn forward_client_cert(mut self, mode: ForwardClientCert, details: ClientCertDetails) -> Self {
        self.forwarding = (mode, details);
        self
    }

    /// What its policies share.
    fn kept(&self) -> Kept {
        let labels = self.origin.as_ref().map_or_else(Labels::default, |origin| origin.labels.clone());
        let own = own_labels(labels.as_destination(), self.service.as_deref());
        let log = self.access_log.clone().or_else(|| self.origin.as_ref()?.access_log.clone());
        Kept::new(ServerMetrics::new(own), self.provider()).access_log(log).normalize(self.normalize)
    }

    /// Listens on `address`.
    ///
    /// # Errors
    /// The address is taken or not ours, or the TLS settings, a policy or the configuration file cannot be used.
    pub async fn bind(self, address: impl ToSocketAddrs) -> Result<Inbound, BuildError> {
        let found =
            lookup_host(address).await.map_err(|error| BuildError::listen("a name that is not found", error))?;
        let addresses: Vec<_> = found.collect();
        let listener = TcpListener::bind(&addresses[..]).await;
        self.listener(listener.map_err(|error| {
            let names: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            BuildError::listen(names.join(", "), error)
        })?)
    }

    /// Takes the connections of a listener that exists.
    ///
    /// # Errors
    /// The TLS settings or a policy cannot be used.
    pub fn listener(self, listener: TcpListener) -> Result<Inbound, BuildError> {
        if let Some(wrong) = &self.wrong {
            return Err(BuildError::Policy(wrong.as_str().into()));
        }
        for HttpFilter { name, config, .. } in &self.filters {
            config.check().map_err(|error| BuildError::Policy(format!("{name}: {error}").into()))?;
        }
        let kept = self.kept();
        let provider = self.provider();
        let Self { tls, limits, origin, on_serving, filters, fetches, forwarding, file, renewal, .. } = self;
        let fetch = origin.as_ref().map(|origin| origin.fetch.clone());
        let asked = Asked { kept, filters, fetches, fetch };
        let policy = asked.policy(Vec::new(), forwarding);
        if let Some(reason) = policy.refusal() {
            return Err(BuildError::Policy(reason.clone()));
        }
        let security = match tls {
            None => Security::Plaintext,
            Some(Tls::Acceptor(acceptor)) => Security::Tls(acceptor),
            Some(Tls::Settings(settings)) => {
                let identity = settings.identity.name().to_owned();
                let acceptor = Acceptor::new(settings, provider);
                Security::Tls(acceptor.map_err(|error| BuildError::Tls { identity, error })?)
            }
        };
        let (inbound, following) = match (origin, file) {
            (None, None) => {
                let (policy, limits) = (Arc::new(policy), Arc::new(limits));
                let chain = Arc::new(Chain::new("", security, limits.clone(), Some(policy)));
                return Inbound::new(listener, Config::single(chain), limits, renewal, on_serving).map_err(given);
            }
            (None, Some((path, refresh))) => {
                let (file, config, limits) = File::open(path, refresh, asked, Own { limits, security, forwarding })?;
                let inbound = Inbound::new(listener, config, limits, renewal, on_serving).map_err(given)?;
                inbound.0.serving.send_replace(file.serving());
                let following = file.follow(&inbound.0);
                (inbound, following)
            }
            (Some(_), Some(_)) => return Err(BuildError::TwoSources),
            (Some(origin), None) => {
                let watch = origin.watch(listener.local_addr().map_err(given)?)?;
                let inbound =
                    Inbound::new(listener, Config::default(), Arc::new(limits), renewal, on_serving).map_err(given)?;
                inbound.0.serving.send_replace(Serving::awaited());
                let following = follow(&inbound.0, watch, &origin, security, asked);
                (inbound, following)
            }
        };
        inbound.0.following.get_or_init(|| following);
        Ok(inbound)
    }

    /// The same, for a listener of the standard library: inherited, or made with options of its own.
    ///
    /// # Errors
    /// It cannot be used without blocking, or the TLS settings or a policy cannot be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn std_listener(self, listener: std::net::TcpListener) -> Result<Inbound, BuildError> {
        let made = listener.set_nonblocking(true).and_then(|()| TcpListener::from_std(listener));
        self.listener(made.map_err(given)?)
    }
}

impl fmt::Debug for InboundBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InboundBuilder")
            .field("tls", &self.tls.is_some())
            .field("limits", &self.limits)
            .field("mesh", &self.origin.is_some())
            .finish_non_exhaustive()
    }
}
