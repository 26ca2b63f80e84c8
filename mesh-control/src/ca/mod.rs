//! A certificate authority for development: a root in a folder, and a short-lived SPIFFE certificate per service account.
//!
//! ```text
//! DIR/ca.pem                          the root certificate          DIR/ca-key.pem   its key, for the owner only
//! DIR/ns/NAMESPACE/sa/ACCOUNT/cert.pem  key.pem  ca.pem             what a workload reads
//! ```
//!
//! The three files of a workload are links into one versioned folder, which is switched by a single rename, as Kubernetes
//! does with mounted secrets. A reader that gets the certificate before the switch and the key after it sees a pair that
//! does not match, and reads again.

mod files;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};
use tokio::{sync::Notify, time::Instant};

/// How long the root lasts.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Certificates are valid from a little earlier, for clocks that are behind.
const BACKDATE: Duration = Duration::from_secs(60);

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
    root_pem: String,
    issuer: Issuer<'static, KeyPair>,
    /// When each identity was last written.
    issued: Mutex<BTreeMap<(String, String), Instant>>,
    changed: Notify,
}

/// `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/ACCOUNT`
pub fn spiffe_id(trust_domain: &str, namespace: &str, account: &str) -> String {
    format!("spiffe://{trust_domain}/ns/{namespace}/sa/{account}")
}

impl CertificateAuthority {
    /// Loads the root from `dir`, or creates the folder and a new root in it.
    ///
    /// # Errors
    /// The folder cannot be written, or holds a root that cannot be used.
    pub fn open(dir: &Path, trust_domain: &str, lifetime: Duration) -> Result<Self, Error> {
        check_name(trust_domain)?;
        // A bootstrap names the files for processes with other working directories.
        let dir = std::path::absolute(dir).map_err(|source| Error::File { path: dir.to_owned(), source })?;
        let (root_pem, issuer) = root(&dir, trust_domain)?;
        let shared = Shared {
            dir,
            trust_domain: trust_domain.to_owned(),
            lifetime,
            root_pem,
            issuer,
            issued: Mutex::default(),
            changed: Notify::new(),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Writes a new key and certificate for a service account, and the bundle. Returns the folder that holds `cert.pem`
    /// (the leaf), `key.pem` (PKCS #8) and `ca.pem`.
    ///
    /// # Errors
    /// The names cannot be part of a SPIFFE id, or the files cannot be written; the former files then stay.
    pub fn issue(&self, namespace: &str, account: &str) -> Result<PathBuf, Error> {
        check_name(namespace)?;
        check_name(account)?;
        let dir = self.identity_dir(namespace, account);
        let (certificate, key) = self.leaf(namespace, account, &dir)?;
        let content = [("cert.pem", certificate.as_str()), ("key.pem", &key), ("ca.pem", &self.shared.root_pem)];
        files::write_together(&dir, &content).map_err(|(path, source)| Error::File { path, source })?;
        let mut issued = self.shared.issued.lock().unwrap_or_else(PoisonError::into_inner);
        issued.insert((namespace.to_owned(), account.to_owned()), Instant::now());
        drop(issued);
        self.shared.changed.notify_one();
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

    /// Writes new keys and certificates for every identity issued so far.
    ///
    /// # Errors
    /// As [`Self::issue`], of the first that fails; the others are written all the same.
    pub fn rotate_all(&self) -> Result<(), Error> {
        let results: Vec<_> = self.identities().iter().map(|(n, a)| self.issue(n, a)).collect();
        results.into_iter().try_for_each(|result| result.map(drop))
    }

    /// Where the files of a service account are, issued or not.
    pub fn identity_dir(&self, namespace: &str, account: &str) -> PathBuf {
        self.shared.dir.join("ns").join(namespace).join("sa").join(account)
    }

    /// The service accounts issued so far, as namespace and account.
    pub fn identities(&self) -> Vec<(String, String)> {
        self.shared.issued.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// The folder of the authority.
    pub fn dir(&self) -> &Path {
        &self.shared.dir
    }

    /// The root certificate, PEM.
    pub fn root_pem(&self) -> &str {
        &self.shared.root_pem
    }

    /// The trust domain of the identities.
    pub fn trust_domain(&self) -> &str {
        &self.shared.trust_domain
    }

    /// Renews every identity at half of its lifetime, forever; a failure is logged and tried again.
    ///
    /// # Cancel safety
    /// Dropping the future stops the renewal; identities are whole at any time.
    pub async fn renew(self) {
        loop {
            let next = {
                let issued = self.shared.issued.lock().unwrap_or_else(PoisonError::into_inner);
                issued.iter().map(|(id, at)| (*at + self.shared.lifetime / 2, id.clone())).min()
            };
            let Some((due, (namespace, account))) = next else {
                self.shared.changed.notified().await;
                continue;
            };
            tokio::select! {
                () = tokio::time::sleep_until(due) => {}
                () = self.shared.changed.notified() => continue,
            }
            if let Err(error) = self.issue(&namespace, &account) {
                tracing::error!(%error, "cannot renew a certificate");
                tokio::time::sleep((self.shared.lifetime / 20).max(Duration::from_secs(1))).await;
            }
        }
    }

    fn leaf(&self, namespace: &str, account: &str, dir: &Path) -> Result<(String, String), Error> {
        let failed = |source| Error::Certificate { path: dir.to_owned(), source };
        let id = spiffe_id(&self.shared.trust_domain, namespace, account);
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, self.shared.trust_domain.as_str());
        params.subject_alt_names = vec![SanType::URI(id.try_into().map_err(failed)?)];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let now = SystemTime::now();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + self.shared.lifetime).into();
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = params.signed_by(&key, &self.shared.issuer).map_err(failed)?;
        Ok((certificate.pem(), key.serialize_pem()))
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys are not for logs.
        f.debug_struct("CertificateAuthority").field("dir", &self.dir).finish_non_exhaustive()
    }
}

fn root(dir: &Path, trust_domain: &str) -> Result<(String, Issuer<'static, KeyPair>), Error> {
    let (certificate_path, key_path) = (dir.join("ca.pem"), dir.join("ca-key.pem"));
    let file = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { path, source }
    };
    let bad = |path: &Path| {
        let path = path.to_owned();
        move |source| Error::Certificate { path, source }
    };
    if key_path.exists() || certificate_path.exists() {
        let certificate = std::fs::read_to_string(&certificate_path).map_err(file(&certificate_path))?;
        let key = std::fs::read_to_string(&key_path).map_err(file(&key_path))?;
        let key = KeyPair::from_pem(&key).map_err(bad(&key_path))?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(bad(&certificate_path))?;
        return Ok((certificate, issuer));
    }
    files::private_dir(dir).map_err(file(dir))?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain);
    params.distinguished_name.push(DnType::CommonName, "mesh development CA");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let now = SystemTime::now();
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    let key = KeyPair::generate().map_err(bad(&key_path))?;
    let certificate = params.self_signed(&key).map_err(bad(&certificate_path))?.pem();
    // The key first: a certificate without its key is of no use.
    files::write_private(&key_path, &key.serialize_pem()).map_err(file(&key_path))?;
    files::write_private(&certificate_path, &certificate).map_err(file(&certificate_path))?;
    Ok((certificate, Issuer::new(params, key)))
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
