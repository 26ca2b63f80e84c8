//! Certificates from a SPIFFE workload endpoint: an agent on this machine that knows who we are.

use super::{Backoff, WorkloadEndpoint, channel, reason};
use crate::{
    CryptoProvider, Identity, RevocationPolicy, SourceError, SpiffeId, TrustBundle, TrustDomain, TrustRoots,
    bundle::split_der,
    grpc::{JwtSvidRequest, WorkloadApiClient, X509SvidResponse},
    source::{
        jwt::{Held, JwtBundles},
        shelf::{Shelf, Shelved, Task},
    },
};
use base64::Engine;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};
use tokio::{runtime::Handle, time::timeout};
use tonic::{Code, Response, Status, Streaming, transport::Channel};
use zeroize::Zeroizing;

/// From the connection to the first message, and for a token.
const FIRST_ANSWER: Duration = Duration::from_secs(30);

/// Which of our identities a [`WorkloadApiSource`] takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SvidChoice {
    /// The first: the endpoint's default.
    #[default]
    Default,
    /// The one with this hint.
    Hint(String),
    /// The one with this id.
    Id(SpiffeId),
}

/// Settings of a [`WorkloadApiSource`].
#[derive(Clone, Debug)]
pub struct WorkloadApiConfig {
    /// The name in messages and metrics.
    pub name: String,
    /// Where the endpoint listens.
    pub endpoint: WorkloadEndpoint,
    /// Which identity, when there are several.
    pub svid: SvidChoice,
    /// Of which other trust domains members are trusted, if the endpoint sends their bundles; `None`: of all that it sends.
    pub federated: Option<Vec<TrustDomain>>,
    /// What missing and old revocation lists mean, if the endpoint sends any.
    pub revocation: RevocationPolicy,
    /// Loads the keys.
    pub provider: Arc<CryptoProvider>,
}

/// Follows the X.509 SVIDs of a SPIFFE workload endpoint (SPIFFE Workload API): our certificate, and the roots of our
/// trust domain and of those federated with it, each for its own peers.
///
/// A connection that ends is made again, for ever, after one second at first and half a minute at most. What cannot be
/// used is refused as a whole, and the last good material stays. The task ends when the source is dropped.
pub struct WorkloadApiSource {
    shared: Arc<Shared>,
    runtime: Handle,
    _task: Task,
}

#[derive(Debug)]
struct Shared {
    config: WorkloadApiConfig,
    shelf: Shelf,
}

/// Why a message is not taken.
enum Refused {
    Wrong(String),
    /// Its certificate has expired, or is not yet valid.
    Untimely(String),
}

impl From<String> for Refused {
    fn from(reason: String) -> Self {
        Self::Wrong(reason)
    }
}

/// A JWT SVID: a bearer token that says who we are. Wiped when dropped, never shown.
#[derive(Clone)]
pub struct JwtToken {
    spiffe_id: SpiffeId,
    token: Zeroizing<String>,
    expires_at: SystemTime,
}

impl WorkloadApiConfig {
    /// The default identity of this endpoint.
    pub fn new(name: impl Into<String>, endpoint: WorkloadEndpoint, provider: Arc<CryptoProvider>) -> Self {
        let (svid, revocation) = (SvidChoice::Default, RevocationPolicy::default());
        Self { name: name.into(), endpoint, svid, federated: None, revocation, provider }
    }
}

impl WorkloadApiSource {
    /// Starts following. Does not wait for the endpoint: [`ready`](crate::ready) does.
    pub fn new(config: WorkloadApiConfig, runtime: &Handle) -> Self {
        let shared = Arc::new(Shared { shelf: Shelf::new(config.name.clone(), Some(runtime)), config });
        let task = runtime.spawn(follow(shared.clone())).into();
        Self { shared, runtime: runtime.clone(), _task: task }
    }

    /// A token for these audiences (JWT-SVID), of the identity with this id or of the default one. Asks the endpoint each
    /// time, and waits half a minute at most.
    ///
    /// # Errors
    /// No audience is given, the endpoint cannot be reached, refuses or says nothing, or the token is not well-formed.
    pub async fn jwt_svid(&self, audiences: &[&str], id: Option<&SpiffeId>) -> Result<JwtToken, SourceError> {
        let error = |reason: String| self.shared.shelf.error(None, format!("JWT: {reason}"));
        if audiences.is_empty() {
            return Err(error("no audience is given".into()));
        }
        let request = JwtSvidRequest {
            audience: audiences.iter().map(ToString::to_string).collect(),
            spiffe_id: id.map(ToString::to_string).unwrap_or_default(),
        };
        let mut client = self.client().await?;
        let answer = timeout(FIRST_ANSWER, client.fetch_jwt_svid(request)).await;
        let silent = |_| error(format!("{} says nothing within {FIRST_ANSWER:?}", self.shared.config.endpoint));
        let answer = answer.map_err(silent)?.map_err(|status| error(self.shared.why(&status)))?;
        let Some(mut svid) = answer.into_inner().svids.into_iter().next() else {
            return Err(error("the endpoint sent none".into()));
        };
        let token = Zeroizing::new(std::mem::take(&mut svid.svid));
        let expires_at = expiry(&token).ok_or_else(|| error("the token is malformed".into()))?;
        let spiffe_id = svid.spiffe_id.parse().map_err(|e| error(format!("the id {:?} {e}", svid.spiffe_id)))?;
        Ok(JwtToken { spiffe_id, token, expires_at })
    }

    /// Follows the keys that verify JWT SVIDs, of our trust domain and of those federated with it, on a stream of its own: for ever, whether or not
    /// this source is dropped, until the last clone of what is returned is. What cannot be used is refused as a whole, and the last good
    /// keys stay.
    pub fn jwt_bundles(&self) -> JwtBundles {
        let shared = self.shared.clone();
        let name = format!("{} JWT bundles", shared.config.name);
        JwtBundles::followed(name, |held| self.runtime.spawn(follow_bundles(shared, held)).into())
    }

    /// A client of the endpoint, for everything else.
    ///
    /// # Errors
    /// The endpoint cannot be reached.
    pub async fn client(&self) -> Result<WorkloadApiClient<Channel>, SourceError> {
        self.shared.client().await.map_err(|reason| self.shared.shelf.error(None, reason))
    }
}

async fn follow(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    loop {
        let reason = shared.follow(&mut backoff).await;
        shared.shelf.failed(&shared.shelf.error(None, reason));
        tokio::time::sleep(backoff.next(fastrand::f64())).await;
    }
}

async fn follow_bundles(shared: Arc<Shared>, held: Arc<Held>) {
    let mut backoff = Backoff::default();
    loop {
        let reason = shared.follow_bundles(&held, &mut backoff).await;
        held.fail(reason);
        tokio::time::sleep(backoff.next(fastrand::f64())).await;
    }
}

impl Shared {
    async fn client(&self) -> Result<WorkloadApiClient<Channel>, String> {
        let endpoint = self.config.endpoint.clone();
        let pings = matches!(endpoint, WorkloadEndpoint::Tcp(_));
        let channel = channel(move || endpoint.clone().open(), pings).await;
        Ok(WorkloadApiClient::new(channel.map_err(|e| format!("{} cannot be reached: {e}", self.config.endpoint))?))
    }

    /// Takes what the endpoint sends until the stream ends; returns why it did.
    async fn follow(&self, backoff: &mut Backoff) -> String {
        let mut client = match self.client().await {
            Ok(client) => client,
            Err(reason) => return reason,
        };
        let (mut next, mut messages) = match self.begun(client.fetch_x509_svid()).await {
            Ok(begun) => begun,
            Err(reason) => return reason,
        };
        loop {
            match next {
                Ok(Some(message)) => match self.take(message) {
                    Ok((identity, roots)) => {
                        backoff.reset();
                        self.shelf.publish(Some(Arc::new(identity)), Some(Arc::new(roots)));
                    }
                    // what is wrong stays so until something else is sent; what is only early is asked for again
                    Err(Refused::Wrong(reason)) => self.shelf.failed(&self.shelf.error(None, reason)),
                    Err(Refused::Untimely(reason)) => return reason,
                },
                Ok(None) => return format!("{} ended the stream", self.config.endpoint),
                Err(status) => return self.why(&status),
            }
            next = messages.message().await;
        }
    }

    /// Takes the bundles that the endpoint sends until the stream ends; returns why it did.
    async fn follow_bundles(&self, held: &Held, backoff: &mut Backoff) -> String {
        let mut client = match self.client().await {
            Ok(client) => client,
            Err(reason) => return reason,
        };
        let (mut next, mut messages) = match self.begun(client.fetch_jwt_bundles()).await {
            Ok(begun) => begun,
            Err(reason) => return reason,
        };
        loop {
            match next {
                Ok(Some(message)) => {
                    let own =
                        self.shelf.current().identity.as_ref().and_then(|own| Some(own.spiffe_id()?.trust_domain()));
                    if own.is_none() && self.config.federated.is_some() {
                        return "which trust domain is ours is not known yet".into();
                    }
                    let is_trusted = |domain: &TrustDomain| own.as_ref() == Some(domain) || self.is_federated(domain);
                    let named = |(domain, set): (&String, _)| {
                        let of = |reason| format!("the JWT bundle of {domain:?}: {reason}");
                        Ok((trust_domain(domain).map_err(of)?, set))
                    };
                    let bundles: Result<Vec<_>, String> = message.bundles.iter().map(named).collect();
                    let sets = |bundles: Vec<(TrustDomain, &Vec<u8>)>| {
                        let trusted = bundles.into_iter().filter(|(domain, _)| is_trusted(domain));
                        held.replace(trusted.map(|(domain, set)| (domain, set.as_slice())))
                    };
                    match bundles.and_then(sets) {
                        Ok(()) => backoff.reset(),
                        Err(reason) => held.fail(reason),
                    }
                }
                Ok(None) => return format!("{} ended the stream", self.config.endpoint),
                Err(status) => return self.why(&status),
            }
            next = messages.message().await;
        }
    }

    /// A stream with its first message. Over a Unix socket there are no PINGs: who takes connections and says nothing is known by the time.
    async fn begun<T>(
        &self,
        call: impl Future<Output = Result<Response<Streaming<T>>, Status>>,
    ) -> Result<(Result<Option<T>, Status>, Streaming<T>), String> {
        let begin = async {
            let mut messages = call.await?.into_inner();
            Ok::<_, Status>((messages.message().await, messages))
        };
        match timeout(FIRST_ANSWER, begin).await {
            Ok(begun) => begun.map_err(|status| self.why(&status)),
            Err(_) => Err(format!("{} says nothing within {FIRST_ANSWER:?}", self.config.endpoint)),
        }
    }

    /// Whether members of this trust domain, which is not ours, are trusted.
    fn is_federated(&self, domain: &TrustDomain) -> bool {
        self.config.federated.as_ref().is_none_or(|wanted| wanted.contains(domain))
    }

    fn why(&self, status: &Status) -> String {
        match status.code() {
            Code::PermissionDenied => format!("{} has no identity for us: {}", self.config.endpoint, status.message()),
            _ => reason(&self.config.endpoint, status),
        }
    }

    fn take(&self, mut message: X509SvidResponse) -> Result<(Identity, TrustRoots), Refused> {
        let (identity, roots) = (self.identity(&mut message)?, self.roots(&message)?);
        let untimely = |e| Refused::Untimely(format!("the SVID of {:?}: {e}", identity.name()));
        identity.check_validity(SystemTime::now()).map_err(untimely)?;
        Ok((identity, roots))
    }

    fn identity(&self, message: &mut X509SvidResponse) -> Result<Identity, String> {
        let offered: Vec<_> = message.svids.iter().map(|svid| svid.spiffe_id.clone()).collect();
        let mut svids = message.svids.iter_mut();
        let chosen = match &self.config.svid {
            SvidChoice::Default => svids.next(),
            SvidChoice::Hint(hint) => svids.find(|svid| svid.hint == *hint),
            SvidChoice::Id(id) => svids.find(|svid| svid.spiffe_id == id.as_str()),
        };
        let svid = chosen
            .ok_or_else(|| format!("the endpoint has no such identity ({:?}), only {offered:?}", self.config.svid))?;
        let of = |reason: String| format!("the SVID of {:?}: {reason}", svid.spiffe_id);
        let id: SpiffeId = svid.spiffe_id.parse().map_err(|e| of(format!("the id {e}")))?;
        let chain = split_der(&svid.x509_svid).map_err(|e| of(e.to_string()))?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(std::mem::take(&mut svid.x509_svid_key)));
        let identity = Identity::from_der(chain, key, &self.config.provider).map_err(|e| of(e.to_string()))?;
        match identity.spiffe_id() {
            Some(found) if *found == id => Ok(identity),
            _ => Err(of(format!("its certificate is {}'s", identity.name()))),
        }
    }

    fn roots(&self, message: &X509SvidResponse) -> Result<TrustRoots, String> {
        let mut bundles = BTreeMap::new();
        let federated = message.federated_bundles.iter().map(|(domain, bundle)| (domain.as_str(), bundle, true));
        // our own come last: no foreign bundle replaces them
        let own = message.svids.iter().rev().map(|svid| (svid.spiffe_id.as_str(), &svid.bundle, false));
        for (domain, bundle, foreign) in federated.chain(own) {
            let of = |reason: String| format!("the bundle of {domain:?}: {reason}");
            let name = trust_domain(domain).map_err(of)?;
            // A domain whose members have tokens alone has no certificates.
            if foreign && (!self.is_federated(&name) || bundle.is_empty()) {
                continue;
            }
            let bundle = TrustBundle::from_concatenated_der(bundle).map_err(|e| of(e.to_string()))?;
            bundles.insert(name, bundle);
        }
        let roots = TrustRoots::by_trust_domain(bundles);
        if message.crl.is_empty() {
            return Ok(roots);
        }
        roots.with_crls(message.crl.iter().map(Vec::as_slice), self.config.revocation).map_err(|e| e.to_string())
    }
}

/// `spiffe://td`, `spiffe://td/path` or `td`.
fn trust_domain(text: &str) -> Result<TrustDomain, String> {
    let domain = match text.starts_with("spiffe://") {
        true => text.parse::<SpiffeId>().map(|id| id.trust_domain()),
        false => text.parse(),
    };
    domain.map_err(|e| format!("the name {e}"))
}

/// `exp` of a token whose signature we cannot judge: it is ours.
fn expiry(token: &str) -> Option<SystemTime> {
    #[derive(Deserialize)]
    struct Claims {
        exp: f64,
    }
    let mut parts = token.split('.');
    let (_, claims, _, None) = (parts.next()?, parts.next()?, parts.next()?, parts.next()) else { return None };
    let claims = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(claims.exp).ok()?)
}

impl JwtToken {
    /// Whom it speaks for.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    /// The token in JWS compact serialization, for `authorization: Bearer`.
    pub fn token(&self) -> &str {
        &self.token
    }

    /// When it expires.
    pub fn expires_at(&self) -> SystemTime {
        self.expires_at
    }
}

impl Shelved for WorkloadApiSource {
    fn shelf(&self) -> &Shelf {
        &self.shared.shelf
    }
}

impl fmt::Debug for WorkloadApiSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadApiSource").field("shared", &self.shared).finish_non_exhaustive()
    }
}

impl fmt::Debug for JwtToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("JwtToken").field("spiffe_id", &self.spiffe_id).finish_non_exhaustive()
    }
}
