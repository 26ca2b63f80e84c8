//! A certificate authority for development: a root, and short-lived SPIFFE certificates for workloads, which get them by files, over
//! the SPIFFE Workload API, over SDS, or by a signing request to Istio's CA API.
//!
//! ```text
//! DIR/ca.pem                          the roots that are trusted    DIR/ca-key.pem   the key of the one that signs
//! DIR/jwks.json                       keys that verify tokens       DIR/jwt-key.pem  the key that signs them
//! DIR/ns/NAMESPACE/sa/ACCOUNT/cert.pem  key.pem  ca.pem  token      what a workload reads
//! DIR/ns/NAMESPACE/sa/ACCOUNT/api.sock                              where it asks
//! ```
//!
//! Everything is for the owner of the folder only: 0700 and 0600. Who can read a workload's folder has its identity. With
//! [`CertificateAuthority::in_memory`] no key is written at all.
//!
//! The files of a workload are links into one versioned folder, which is switched by a single rename, as Kubernetes does with mounted
//! secrets. A reader that gets the certificate before the switch and the key after it sees a pair that does not match, and reads again.

mod files;
mod roots;
pub(crate) mod serve;
mod tokens;

use mesh_tls::SpiffeId;
use rcgen::{
    CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use roots::{Root, Roots};
use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};
use tokens::Tokens;
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};

/// Certificates are valid from a little earlier, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);
/// Tokens last at least this long: they are read less often than certificates.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);
/// Whom tokens are for, so that the authority takes them: Istio's.
const AUDIENCE: &str = "istio-ca";

/// Lifetime of a workload's certificate unless told otherwise.
pub const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// What went wrong in the CA, with the path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("dev CA: {}: {source}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The root certificate or its key cannot be used, or a certificate could not be made.
    #[error("dev CA: {}: {source}", path.display())]
    Certificate {
        /// The file it is about.
        path: PathBuf,
        /// Why.
        source: rcgen::Error,
    },
    /// A namespace or account that cannot be a part of a path or of a SPIFFE id.
    #[error("dev CA: `{0}` cannot be a namespace or a service account")]
    Name(String),
    /// A certificate signing request that is malformed, or not signed by the key it is about.
    #[error("dev CA: the certificate signing request cannot be used: {0}")]
    Request(rcgen::Error),
    /// The root is to be in memory, in a folder of one that is not.
    #[error("dev CA: {} exists: a root in memory needs a folder of its own", .0.display())]
    Kept(PathBuf),
    /// The root is being replaced already.
    #[error("dev CA: the root is being replaced already")]
    Rotating,
    /// A server of the authority cannot listen.
    #[error("dev CA: cannot listen on {place}: {source}")]
    Listen {
        /// An address, or the path of a socket.
        place: String,
        /// Why.
        source: io::Error,
    },
}

/// The certificate authority. A handle: clones share the root and the identities.
#[derive(Clone, Debug)]
pub struct CertificateAuthority {
    shared: Arc<Shared>,
}

struct Shared {
    dir: PathBuf,
    trust_domain: String,
    lifetime: Duration,
    in_memory: bool,
    roots: Mutex<Roots>,
    tokens: Tokens,
    /// The identities of workloads, by namespace and account.
    issued: Mutex<BTreeMap<(String, String), Arc<Svid>>>,
    /// The renewal has something new to wait for.
    changed: Notify,
    /// Counts whatever workloads should hear of.
    news: watch::Sender<u64>,
}

/// An identity, with its key.
pub(crate) struct Svid {
    pub(crate) id: String,
    pub(crate) certificate_pem: String,
    pub(crate) certificate_der: Vec<u8>,
    pub(crate) key_pem: String,
    pub(crate) key_der: Vec<u8>,
    at: Instant,
}

/// The SPIFFE id of a service account, in Istio's form.
pub fn spiffe_id(trust_domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}

impl CertificateAuthority {
    /// Uses the root in this folder, or makes one. Identities that an earlier process left there are issued again when they are asked
    /// for.
    ///
    /// # Errors
    /// The folder cannot be read or written, or its root cannot be used.
    pub fn open(dir: &Path, trust_domain: &str, lifetime: Duration) -> Result<Self, Error> {
        Self::start(dir, trust_domain, lifetime, false)
    }

    /// Makes a root whose key is in memory only, as are those of the workloads, which get their certificates over the Workload API, over
    /// SDS, or by signing requests. The folder holds the root certificate, tokens, and sockets.
    ///
    /// # Errors
    /// The folder cannot be written, or holds the key of another root.
    pub fn in_memory(dir: &Path, trust_domain: &str, lifetime: Duration) -> Result<Self, Error> {
        Self::start(dir, trust_domain, lifetime, true)
    }

    fn start(dir: &Path, trust_domain: &str, lifetime: Duration, in_memory: bool) -> Result<Self, Error> {
        check_name(trust_domain)?;
        // A bootstrap names the files for processes with other working directories.
        let dir = std::path::absolute(dir).map_err(|source| Error::File { path: dir.to_owned(), source })?;
        let roots = Roots::open(&dir, trust_domain, in_memory, lifetime)?;
        let shared = Shared {
            tokens: Tokens::open(&dir, trust_domain, in_memory)?,
            dir,
            trust_domain: trust_domain.to_owned(),
            lifetime,
            in_memory,
            roots: Mutex::new(roots),
            issued: Mutex::default(),
            changed: Notify::new(),
            news: watch::Sender::new(0),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Makes a new key and certificate for a service account, and writes them with the bundle and a token. Returns the folder that
    /// holds `cert.pem` (the leaf), `key.pem` (PKCS #8), `ca.pem` and `token`; of an authority in memory the last two only.
    ///
    /// # Errors
    /// The names cannot be part of a SPIFFE id, or the files cannot be written; the former files then stay.
    pub fn issue(&self, namespace: &str, account: &str) -> Result<PathBuf, Error> {
        check_name(namespace)?;
        check_name(account)?;
        let dir = self.identity_dir(namespace, account);
        let failed = |source| Error::Certificate { path: dir.clone(), source };
        let shared = &self.shared;
        let id = self.spiffe_id(namespace, account);
        let svid = self.svid(&id, &[]).map_err(failed)?;
        let audience = [AUDIENCE.to_owned()];
        let lifetime = shared.lifetime.max(TOKEN_LIFETIME);
        let token = shared.tokens.issue(&id, &audience, lifetime, SystemTime::now()).map_err(failed)?;
        let bundle = self.root_pem();
        let public = [("ca.pem", bundle.as_str()), ("token", &token)];
        let secret = [("cert.pem", svid.certificate_pem.as_str()), ("key.pem", &svid.key_pem)];
        let secret = secret.into_iter().filter(|_| !shared.in_memory);
        let content: Vec<_> = secret.chain(public).collect();
        files::write_together(&dir, &content).map_err(|(path, source)| Error::File { path, source })?;
        self.issued().insert((namespace.to_owned(), account.to_owned()), Arc::new(svid));
        self.tell();
        Ok(dir)
    }

    /// As [`Self::issue`], unless this authority has issued it already.
    ///
    /// # Errors
    /// As [`Self::issue`].
    pub fn ensure(&self, namespace: &str, account: &str) -> Result<PathBuf, Error> {
        let issued = self.identities().iter().any(|(n, a)| n == namespace && a == account);
        if issued { Ok(self.identity_dir(namespace, account)) } else { self.issue(namespace, account) }
    }

    /// Makes new keys and certificates for every identity issued so far.
    ///
    /// # Errors
    /// As [`Self::issue`], of the first that fails; the others are written all the same.
    pub fn rotate_all(&self) -> Result<(), Error> {
        let results: Vec<_> = self.identities().iter().map(|(n, a)| self.issue(n, a)).collect();
        results.into_iter().try_for_each(|result| result.map(drop))
    }

    /// Begins to replace the root: the new one is trusted beside the old from now on, signs after one lifetime of certificates, and after
    /// one more the old one is forgotten. [`Self::renew`] does what is due.
    ///
    /// # Errors
    /// The root is being replaced already, or files cannot be written.
    pub fn rotate_root(&self) -> Result<(), Error> {
        self.roots().rotate()?;
        self.tell();
        self.rotate_all()
    }

    /// Signs a request (PKCS #10, PEM) for this service account, whatever names it asks for, and at most for the lifetime of the
    /// authority's certificates. Returns the leaf, and the bundle of roots, PEM.
    ///
    /// # Errors
    /// The request cannot be used.
    pub fn sign(&self, request: &str, id: &SpiffeId, lifetime: Option<Duration>) -> Result<[String; 2], Error> {
        let request = CertificateSigningRequestParams::from_pem(request).map_err(Error::Request)?;
        let lifetime = lifetime.map_or(self.shared.lifetime, |wanted| wanted.min(self.shared.lifetime));
        let params = self.leaf(id.as_str(), &[], lifetime).map_err(Error::Request)?;
        let leaf = params.signed_by(&request.public_key, &self.signing().issuer).map_err(Error::Request)?;
        Ok([leaf.pem(), self.root_pem()])
    }

    /// A token that says that its bearer is this service account, for these audiences: a JWT-SVID.
    ///
    /// # Errors
    /// The names cannot be part of a SPIFFE id.
    pub fn token(&self, namespace: &str, account: &str, audiences: &[String]) -> Result<String, Error> {
        check_name(namespace)?;
        check_name(account)?;
        let id = self.spiffe_id(namespace, account);
        let lifetime = self.shared.lifetime.max(TOKEN_LIFETIME);
        let issued = self.shared.tokens.issue(&id, audiences, lifetime, SystemTime::now());
        issued.map_err(|source| Error::Certificate { path: self.identity_dir(namespace, account), source })
    }

    /// `iss` of the tokens: `https://TRUST_DOMAIN`.
    pub fn token_issuer(&self) -> &str {
        self.shared.tokens.issuer()
    }

    /// The keys that verify the tokens, a JSON Web Key Set.
    pub fn jwks(&self) -> &str {
        self.shared.tokens.jwks()
    }

    /// Where the files of a service account are, issued or not.
    pub fn identity_dir(&self, namespace: &str, account: &str) -> PathBuf {
        self.shared.dir.join("ns").join(namespace).join("sa").join(account)
    }

    /// The unix socket of a service account: the SPIFFE Workload API and SDS, for whoever can open it. `SPIFFE_ENDPOINT_SOCKET` is
    /// `unix:` and this path. Served by a control plane.
    pub fn socket(&self, namespace: &str, account: &str) -> PathBuf {
        self.identity_dir(namespace, account).join("api.sock")
    }

    /// The service accounts issued so far, as namespace and account.
    pub fn identities(&self) -> Vec<(String, String)> {
        self.issued().keys().cloned().collect()
    }

    /// The folder of the authority.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// The root certificates that are trusted, PEM; the one that signs comes first.
    pub fn root_pem(&self) -> String {
        self.roots().bundle()
    }

    /// The trust domain of the identities.
    pub fn trust_domain(&self) -> &str {
        &self.shared.trust_domain
    }

    /// Whether keys are in memory only.
    pub fn is_in_memory(&self) -> bool {
        self.shared.in_memory
    }

    /// Renews every identity at half of its lifetime, and does what is due with the roots, forever; a failure is logged and tried again.
    ///
    /// # Cancel safety
    /// Dropping the future stops the renewal; identities are whole at any time.
    pub async fn renew(self) {
        loop {
            let identity =
                self.issued().iter().map(|(id, svid)| (svid.at + self.shared.lifetime / 2, id.clone())).min();
            let root = self.roots().due();
            let due = [identity.as_ref().map(|(due, _)| *due), root].into_iter().flatten().min();
            let Some(due) = due else {
                self.shared.changed.notified().await;
                continue;
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = self.shared.changed.notified() => continue,
            }
            let stepped = self.roots().step(Instant::now());
            let done = match (stepped, identity) {
                (Ok(true), _) => {
                    self.tell();
                    self.rotate_all()
                }
                (Err(error), _) => Err(error),
                (Ok(false), Some((due, (namespace, account)))) if due <= Instant::now() => {
                    self.issue(&namespace, &account).map(drop)
                }
                (Ok(false), _) => Ok(()),
            };
            if let Err(error) = done {
                tracing::error!(%error, "cannot renew a certificate");
                tokio::time::sleep((self.shared.lifetime / 20).max(Duration::from_secs(1))).await;
            }
        }
    }

    /// The certificate of an identity in force.
    pub(crate) fn current(&self, namespace: &str, account: &str) -> Option<Arc<Svid>> {
        self.issued().get(&(namespace.to_owned(), account.to_owned())).cloned()
    }

    /// Changes with every certificate and root.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.shared.news.subscribe()
    }

    pub(crate) fn spiffe_id(&self, namespace: &str, account: &str) -> String {
        spiffe_id(&self.shared.trust_domain, namespace, account)
    }

    pub(crate) fn lifetime(&self) -> Duration {
        self.shared.lifetime
    }

    /// There is something new: for the renewal to wait for, and for workloads to hear.
    fn tell(&self) {
        self.shared.changed.notify_one();
        self.shared.news.send_modify(|count| *count += 1);
    }

    fn tokens(&self) -> &Tokens {
        &self.shared.tokens
    }

    fn issued(&self) -> MutexGuard<'_, BTreeMap<(String, String), Arc<Svid>>> {
        self.shared.issued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn roots(&self) -> MutexGuard<'_, Roots> {
        self.shared.roots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signing(&self) -> Arc<Root> {
        self.roots().signing()
    }

    /// A new key with its certificate, which is not remembered.
    pub(crate) fn svid(&self, id: &str, hosts: &[SanType]) -> Result<Svid, rcgen::Error> {
        let key = KeyPair::generate()?;
        let certificate = self.leaf(id, hosts, self.shared.lifetime)?.signed_by(&key, &self.signing().issuer)?;
        Ok(Svid {
            id: id.to_owned(),
            certificate_pem: certificate.pem(),
            certificate_der: certificate.der().to_vec(),
            key_pem: key.serialize_pem(),
            key_der: key.serialize_der(),
            at: Instant::now(),
        })
    }

    fn leaf(&self, id: &str, hosts: &[SanType], lifetime: Duration) -> Result<CertificateParams, rcgen::Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, self.shared.trust_domain.as_str());
        params.subject_alt_names = vec![SanType::URI(id.try_into()?)];
        params.subject_alt_names.extend_from_slice(hosts);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let now = SystemTime::now();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + lifetime).into();
        Ok(params)
    }
}

/// Names that a server of the control plane is called by.
pub(crate) fn control_plane_names(listening: IpAddr) -> Vec<SanType> {
    let names = ["localhost", "istiod.istio-system.svc", "istiod.istio-system.svc.cluster.local", "istio-ca"];
    let names = names.into_iter().filter_map(|name| name.try_into().ok().map(SanType::DnsName));
    let loopback = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])];
    names.chain(loopback.into_iter().chain([listening]).map(SanType::IpAddress)).collect()
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys are not for logs.
        f.debug_struct("CertificateAuthority").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl std::fmt::Debug for Svid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Svid").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A path segment of a SPIFFE id that is also a file name.
fn check_name(name: &str) -> Result<(), Error> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name == "." || name == ".." || !name.chars().all(legal) {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
