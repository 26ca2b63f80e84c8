//! Certificates from Istio's certificate authority, by requests that we sign ourselves.

use super::{Backoff, BoxedIo, CONNECT_TIMEOUT, channel, reason};
use crate::{
    ClientSettings, ClientTls, CryptoProvider, Identity, MemorySource, PeerCheck, Roots, Source, SourceError, SpiffeId,
    TrustRoots,
    grpc::{CertificateRequest, IstioCaClient, Kind, Struct, Value},
    source::shelf::{Shelf, Shelved, Task},
};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    collections::BTreeMap,
    fmt, io,
    net::IpAddr,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{net::TcpStream, runtime::Handle, sync::Notify, time::timeout};
use tonic::{Request, metadata::AsciiMetadataValue};
use zeroize::Zeroizing;

/// Limit for one request, connection included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// Certificates are not renewed more often.
const SHORTEST_RENEWAL: Duration = Duration::from_millis(100);
/// A wait is cut into pieces, so that a machine that slept notices.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How much earlier or later than planned a renewal comes, as a share: replicas started together drift apart.
const JITTER: f64 = 0.1;

/// How the authority is spoken to.
#[derive(Clone, Debug)]
pub enum CaTls {
    /// TLS; the authority's certificate must be valid for its name.
    Verified {
        /// Whom we trust to name it: in Kubernetes a [`FileSource`](crate::FileSource) over `istio-ca-root-cert`.
        roots: Roots,
        /// Its name, if it is not the host of the address.
        server_name: Option<String>,
    },
    /// No TLS: for an authority on this machine, a loopback address or `localhost`. The token is sent in the clear.
    Plaintext,
    /// The same, wherever it is: whoever is on the way has the token, and says whom we trust.
    DangerousPlaintext,
}

/// How we show the authority who we are.
#[derive(Clone, Debug)]
pub enum CaAuth {
    /// By the token in this file, which is read anew for every request: a projected service account token.
    TokenFile(PathBuf),
    /// By our current certificate, and before there is one, by that of this source.
    Certificate(Arc<dyn Source>),
}

/// Settings of an [`IstioCaSource`].
#[derive(Clone, Debug)]
pub struct IstioCaConfig {
    /// The name in messages and metrics.
    pub name: String,
    /// `host:port`: in Kubernetes `istiod.istio-system.svc:15012`.
    pub address: String,
    /// How it is spoken to.
    pub tls: CaTls,
    /// How we are known to it.
    pub auth: CaAuth,
    /// The identity to ask for; a certificate of another one is refused. `None` takes what the authority gives.
    pub spiffe_id: Option<SpiffeId>,
    /// Sent as `ClusterID`: of which cluster the token is. Default `Kubernetes`.
    pub cluster_id: String,
    /// Sent with the request, for example `CertSigner`.
    pub metadata: BTreeMap<String, String>,
    /// The wished lifetime. Default 24 h.
    pub lifetime: Duration,
    /// After which share (0..1) of what is left of its lifetime a certificate is renewed, a tenth earlier or later. Default 0.5.
    pub renew_at: f64,
    /// Loads the keys.
    pub provider: Arc<CryptoProvider>,
}

/// Has certificates signed by `istio.v1.auth.IstioCertificateService`: istiod, or mesh-control's.
///
/// Every certificate has a new key (ECDSA P-256), which is made in this process and never leaves it. The last element
/// of the authority's answer has the roots that peers are verified with: several of them while its root is replaced. A renewal that fails is tried again, after one
/// second at first and half a minute at most, with a warning and a count each time, while the old certificate stays
/// in use. The task ends when the source is dropped.
pub struct IstioCaSource {
    shared: Arc<Shared>,
    _task: Task,
}

#[derive(Debug)]
struct Shared {
    config: IstioCaConfig,
    host: String,
    shelf: Shelf,
    renew: Notify,
}

impl IstioCaConfig {
    /// The identity that the authority gives, and every default.
    pub fn new(
        name: impl Into<String>,
        address: impl Into<String>,
        tls: CaTls,
        auth: CaAuth,
        provider: Arc<CryptoProvider>,
    ) -> Self {
        Self {
            name: name.into(),
            address: address.into(),
            tls,
            auth,
            spiffe_id: None,
            cluster_id: "Kubernetes".into(),
            metadata: BTreeMap::new(),
            lifetime: Duration::from_secs(24 * 3600),
            renew_at: 0.5,
            provider,
        }
    }

    /// The host of the address.
    fn check(&self) -> Result<String, String> {
        let host = self.address.rsplit_once(':').filter(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok());
        let Some((host, _)) = host else {
            return Err(format!("the address {:?} is not host:port", self.address));
        };
        if !(self.renew_at > 0.0 && self.renew_at < 1.0) {
            return Err(format!("renew_at must lie between 0 and 1, it is {}", self.renew_at));
        }
        if self.lifetime.as_secs() == 0 {
            return Err("lifetime must be at least one second".into());
        }
        if let (CaTls::Plaintext | CaTls::DangerousPlaintext, CaAuth::Certificate(_)) = (&self.tls, &self.auth) {
            return Err("a certificate cannot be shown in plaintext".into());
        }
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let local = host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
        if matches!(self.tls, CaTls::Plaintext) && !local {
            return Err(format!("the token would go in the clear to {host}, which is not this machine"));
        }
        Ok(host.to_owned())
    }
}

impl IstioCaSource {
    /// Starts asking. Does not wait for the authority: [`ready`](crate::ready) does.
    ///
    /// # Errors
    /// The settings are inconsistent.
    pub fn new(config: IstioCaConfig, runtime: &Handle) -> Result<Self, SourceError> {
        let host = config.check().map_err(|reason| SourceError { name: config.name.clone(), file: None, reason })?;
        let shared = Arc::new(Shared {
            shelf: Shelf::new(config.name.clone(), Some(runtime)),
            host,
            renew: Notify::new(),
            config,
        });
        let task = runtime.spawn(keep(shared.clone())).into();
        Ok(Self { shared, _task: task })
    }

    /// Has a new certificate made now, out of turn. Does not wait for it.
    pub fn renew(&self) {
        self.shared.renew.notify_one();
    }
}

async fn keep(shared: Arc<Shared>) {
    let mut backoff = Backoff::default();
    loop {
        let asked = timeout(REQUEST_TIMEOUT, shared.ask()).await;
        let until = match asked.unwrap_or_else(|_| Err(format!("no answer within {REQUEST_TIMEOUT:?}").into())) {
            Ok((identity, roots)) => {
                backoff.reset();
                let now = SystemTime::now();
                let left = identity.not_after().duration_since(now).unwrap_or_default();
                shared.shelf.publish(Some(Arc::new(identity)), Some(Arc::new(roots)));
                now + renewal(left, shared.config.renew_at, fastrand::f64())
            }
            Err(failure) => {
                shared.shelf.failed(&shared.shelf.error(failure.file, failure.reason));
                SystemTime::now() + backoff.next(fastrand::f64())
            }
        };
        shared.wait(until).await;
    }
}

/// How long after it was made a certificate that has `left` to live is renewed; `random` is from 0 to 1.
fn renewal(left: Duration, renew_at: f64, random: f64) -> Duration {
    let share = renew_at * (1.0 - JITTER + 2.0 * JITTER * random);
    left.mul_f64(share.min(0.95)).max(SHORTEST_RENEWAL)
}

/// Why there is no certificate.
struct Failure {
    file: Option<PathBuf>,
    reason: String,
}

impl From<String> for Failure {
    fn from(reason: String) -> Self {
        Self { file: None, reason }
    }
}

impl Shared {
    /// Until this time of the wall clock, or until someone wants a certificate now.
    async fn wait(&self, until: SystemTime) {
        while let Ok(left) = until.duration_since(SystemTime::now()) {
            if timeout(left.min(LONGEST_WAIT), self.renew.notified()).await.is_ok() {
                return;
            }
        }
    }

    async fn ask(&self) -> Result<(Identity, TrustRoots), Failure> {
        let token = self.token().await?;
        let (key, csr) = self.request().map_err(|e| format!("the request cannot be made: {e}"))?;
        let metadata = self
            .config
            .metadata
            .iter()
            .map(|(name, value)| (name.clone(), Value { kind: Some(Kind::StringValue(value.clone())) }));
        let message = CertificateRequest {
            csr,
            validity_duration: i64::try_from(self.config.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: (!self.config.metadata.is_empty()).then(|| Struct { fields: metadata.collect() }),
        };
        let mut request = Request::new(message);
        if let Some(token) = &token {
            let header = Zeroizing::new(format!("Bearer {}", token.trim()));
            let mut header = AsciiMetadataValue::try_from(header.as_str())
                .map_err(|_| "the token has characters that no token has".to_owned())?;
            header.set_sensitive(true);
            request.metadata_mut().insert("authorization", header);
        }
        if let Ok(cluster) = AsciiMetadataValue::try_from(self.config.cluster_id.as_str()) {
            request.metadata_mut().insert("clusterid", cluster);
        }
        let address = &self.config.address;
        let connect = self.connector()?;
        let channel = channel(connect, true).await.map_err(|e| format!("{address} cannot be reached: {e}"))?;
        let answer = IstioCaClient::new(channel).create_certificate(request).await;
        let answer = answer.map_err(|status| reason(address, &status))?;
        self.take(&answer.into_inner().cert_chain, key)
            .map_err(|reason| format!("the answer of {address}: {reason}").into())
    }

    async fn token(&self) -> Result<Option<Zeroizing<String>>, Failure> {
        let CaAuth::TokenFile(file) = &self.config.auth else { return Ok(None) };
        let failed = |reason| Failure { file: Some(file.clone()), reason };
        let path = file.clone();
        let read = tokio::task::spawn_blocking(move || std::fs::read_to_string(path).map(Zeroizing::new)).await;
        let token = read.map_err(|e| failed(e.to_string()))?.map_err(|e| failed(e.to_string()))?;
        if token.trim().is_empty() { Err(failed("holds no token".into())) } else { Ok(Some(token)) }
    }

    /// A new key, and the request signed with it.
    fn request(&self) -> Result<(PrivateKeyDer<'static>, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        if let Some(id) = &self.config.spiffe_id {
            params.subject_alt_names.push(SanType::URI(id.as_str().try_into()?));
        }
        let csr = params.serialize_request(&key)?.pem()?;
        Ok((PrivatePkcs8KeyDer::from(key.serialize_der()).into(), csr))
    }

    fn connector(
        &self,
    ) -> Result<impl Fn() -> futures::future::BoxFuture<'static, io::Result<BoxedIo>> + use<>, Failure> {
        let address = self.config.address.clone();
        let tls = match &self.config.tls {
            CaTls::Plaintext | CaTls::DangerousPlaintext => None,
            CaTls::Verified { roots, server_name } => {
                let settings = ClientSettings {
                    identity: self.certificate()?,
                    check: PeerCheck::ServerName,
                    alpn: vec![b"h2".to_vec()],
                    ..ClientSettings::new(roots.clone())
                };
                let tls = ClientTls::new(settings, self.config.provider.clone()).map_err(|e| e.to_string())?;
                Some((tls, server_name.clone().unwrap_or_else(|| self.host.clone())))
            }
        };
        Ok(move || {
            let (address, tls) = (address.clone(), tls.clone());
            Box::pin(async move {
                let stream = TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                let Some((tls, name)) = tls else { return Ok(Box::new(stream) as BoxedIo) };
                let connected = timeout(CONNECT_TIMEOUT, tls.connect(stream, Some(&name))).await;
                let (stream, _) = connected.map_err(io::Error::other)?.map_err(io::Error::other)?;
                Ok(Box::new(stream) as BoxedIo)
            }) as futures::future::BoxFuture<'static, _>
        })
    }

    /// The certificate that shows the authority who we are.
    fn certificate(&self) -> Result<Option<Arc<dyn Source>>, Failure> {
        let CaAuth::Certificate(first) = &self.config.auth else { return Ok(None) };
        let valid = |identity: &Arc<Identity>| identity.check_validity(SystemTime::now()).is_ok();
        match self.shelf.current().identity.clone().filter(valid) {
            Some(current) => {
                // a source of its own: that of the connection, which shall not change under it
                let source = MemorySource::empty(format!("{} (to its authority)", self.config.name));
                source.set(Some(current), None);
                Ok(Some(Arc::new(source)))
            }
            None => Ok(Some(first.clone())),
        }
    }

    fn take(&self, chain: &[String], key: PrivateKeyDer<'static>) -> Result<(Identity, TrustRoots), String> {
        let (chain, roots) = split(chain)?;
        let identity = Identity::from_der(chain, key, &self.config.provider).map_err(|e| e.to_string())?;
        let untimely = |e| format!("the certificate of {}: {e}", identity.name());
        identity.check_validity(SystemTime::now()).map_err(untimely)?;
        match (&self.config.spiffe_id, identity.spiffe_id()) {
            (_, None) => return Err(format!("the certificate of {} has no SPIFFE id", identity.name())),
            (Some(wanted), Some(found)) if wanted != found => {
                return Err(format!("the certificate is {found}'s, we are {wanted}"));
            }
            _ => {}
        }
        let roots = TrustRoots::from_der(&roots).map_err(|e| format!("the root: {e}"))?;
        Ok((identity, roots))
    }
}

/// Our certificate with those that vouch for it, and the roots: the last element, which holds several of them while the authority's root is
/// replaced. An answer in one piece ends with its only root.
fn split(chain: &[String]) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), String> {
    let read = |pem: &str| crate::material::certificates(pem.as_bytes()).map_err(|e| format!("it {e}"));
    let (own, roots) = match chain {
        [own @ .., roots] if !own.is_empty() => (read(&own.join("\n"))?, read(roots)?),
        _ => {
            let mut own = read(&chain.join("\n"))?;
            let roots = own.pop().into_iter().collect();
            (own, roots)
        }
    };
    if own.is_empty() { Err("it has no root after our certificate".into()) } else { Ok((own, roots)) }
}

impl Shelved for IstioCaSource {
    fn shelf(&self) -> &Shelf {
        &self.shared.shelf
    }
}

impl fmt::Debug for IstioCaSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IstioCaSource").field("shared", &self.shared).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renewals_come_at_a_share_of_the_lifetime_a_tenth_earlier_or_later() {
        let day = Duration::from_secs(24 * 3600);
        assert_eq!(renewal(day, 0.5, 0.5), day / 2);
        assert!((renewal(day, 0.5, 0.0).as_secs_f64() - 0.45 * day.as_secs_f64()).abs() < 1.0);
        assert!((renewal(day, 0.5, 1.0).as_secs_f64() - 0.55 * day.as_secs_f64()).abs() < 1.0);
        assert!(renewal(day, 0.99, 1.0) < day);
        assert_eq!(renewal(Duration::ZERO, 0.5, 0.5), SHORTEST_RENEWAL);
    }
}
