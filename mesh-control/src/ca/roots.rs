//! The root certificates: the one that signs, the one that follows, and those before that are still trusted.
//!
//! A root is replaced in three steps. The new one is trusted beside the old (`ca.pem` holds both, and so does every bundle); after
//! one lifetime of certificates everybody has heard of it, and it signs; after one more no certificate of the old one is valid any
//! longer, and it is forgotten. Each step is one rename, so that a process that ends in between goes on where it was.

use super::{
    BACKDATE, Error,
    files::{self, Closed},
};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::time::Instant;

/// How long a root lasts.
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
const END: &str = "-----END CERTIFICATE-----";

const CERTIFICATES: &str = "ca.pem";
const KEY: &str = "ca-key.pem";
const NEXT_KEY: &str = "ca-next-key.pem";

/// A root with its key.
pub(super) struct Root {
    pub(super) pem: String,
    pub(super) issuer: Issuer<'static, KeyPair>,
}

/// All roots that are trusted.
pub(super) struct Roots {
    dir: PathBuf,
    trust_domain: String,
    /// Keys are not written.
    in_memory: bool,
    /// How long a new root is trusted before it signs, and an old one afterwards.
    overlap: Duration,
    signing: Arc<Root>,
    next: Option<(Arc<Root>, Instant)>,
    old: Vec<String>,
    forget: Option<Instant>,
}

impl Roots {
    pub(super) fn open(dir: &Path, trust_domain: &str, in_memory: bool, overlap: Duration) -> Result<Self, Error> {
        let (certificates, key, next) = (dir.join(CERTIFICATES), dir.join(KEY), dir.join(NEXT_KEY));
        let of = |signing: Root| Self {
            dir: dir.to_owned(),
            trust_domain: trust_domain.to_owned(),
            in_memory,
            overlap,
            signing: Arc::new(signing),
            next: None,
            old: Vec::new(),
            forget: None,
        };
        if in_memory && key.exists() {
            return Err(Error::Kept(key));
        }
        files::outermost_dir(dir).map_err(|source| Error::File { path: dir.to_owned(), source })?;
        if in_memory || !(key.exists() || certificates.exists()) {
            let roots = of(Root::create(trust_domain, &certificates)?);
            // The key first: a certificate without its key is of no use.
            roots.write_key(&key, &roots.signing)?;
            roots.write_certificates()?;
            return Ok(roots);
        }
        let key_text = read(&key, Closed::Wholly)?;
        let bundle = pieces(&read(&certificates, Closed::ToWriters)?);
        let mut roots = of(Root::load(&key_text, &key, &bundle, &certificates)?);
        // A key whose certificate is not there yet: the rotation had not begun.
        if next.exists()
            && let Ok(root) = Root::load(&read(&next, Closed::Wholly)?, &next, &bundle, &certificates)
        {
            roots.next = Some((Arc::new(root), Instant::now() + remaining(&next, overlap)));
        }
        let known = [Some(&roots.signing.pem), roots.next.as_ref().map(|(root, _)| &root.pem)];
        roots.old = bundle.into_iter().filter(|pem| !known.contains(&Some(pem))).collect();
        if !roots.old.is_empty() {
            // When it began to sign is when its key was renamed, which no file says: trusted for one whole overlap again.
            roots.forget = Some(Instant::now() + overlap);
        }
        Ok(roots)
    }

    /// What signs now.
    pub(super) fn signing(&self) -> Arc<Root> {
        self.signing.clone()
    }

    /// Every root that is trusted, the one that signs first.
    pub(super) fn all(&self) -> impl Iterator<Item = &str> {
        let next = self.next.as_ref().map(|(root, _)| root.pem.as_str());
        std::iter::once(self.signing.pem.as_str()).chain(next).chain(self.old.iter().map(String::as_str))
    }

    pub(super) fn bundle(&self) -> String {
        self.all().collect()
    }

    /// Begins to replace the root.
    pub(super) fn rotate(&mut self) -> Result<(), Error> {
        if self.next.is_some() || self.forget.is_some() {
            return Err(Error::Rotating);
        }
        let root = Arc::new(Root::create(&self.trust_domain, &self.dir.join(CERTIFICATES))?);
        self.write_key(&self.dir.join(NEXT_KEY), &root)?;
        self.next = Some((root, Instant::now() + self.overlap));
        self.write_certificates()
    }

    /// When the next step is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next.as_ref().map(|(_, due)| *due).or(self.forget)
    }

    /// Does what is due; whether that was anything.
    pub(super) fn step(&mut self, now: Instant) -> Result<bool, Error> {
        if let Some((root, due)) = &self.next
            && *due <= now
        {
            if !self.in_memory {
                let (from, path) = (self.dir.join(NEXT_KEY), self.dir.join(KEY));
                std::fs::rename(from, &path).map_err(|source| Error::File { path, source })?;
            }
            let before = std::mem::replace(&mut self.signing, root.clone());
            self.old.push(before.pem.clone());
            self.next = None;
            self.forget = Some(now + self.overlap);
            self.write_certificates()?;
            return Ok(true);
        }
        if self.forget.is_some_and(|due| due <= now) {
            self.old.clear();
            self.forget = None;
            self.write_certificates()?;
            return Ok(true);
        }
        Ok(false)
    }

    fn write_key(&self, path: &Path, root: &Root) -> Result<(), Error> {
        if self.in_memory {
            return Ok(());
        }
        let key = root.issuer.key().serialize_pem();
        files::write_private(path, &key).map_err(|source| Error::File { path: path.to_owned(), source })
    }

    fn write_certificates(&self) -> Result<(), Error> {
        let path = self.dir.join(CERTIFICATES);
        files::write_private(&path, &self.bundle()).map_err(|source| Error::File { path, source })
    }
}

impl Root {
    fn create(trust_domain: &str, path: &Path) -> Result<Self, Error> {
        let bad = |source| Error::Certificate { path: path.to_owned(), source };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain);
        params.distinguished_name.push(DnType::CommonName, "mesh development CA");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages =
            vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
        let now = SystemTime::now();
        params.not_before = (now - BACKDATE).into();
        params.not_after = (now + ROOT_LIFETIME).into();
        let key = KeyPair::generate().map_err(bad)?;
        let pem = params.self_signed(&key).map_err(bad)?.pem();
        Ok(Self { pem, issuer: Issuer::new(params, key) })
    }

    /// The certificate of `bundle` that belongs to this key.
    fn load(key: &str, key_path: &Path, bundle: &[String], bundle_path: &Path) -> Result<Self, Error> {
        let key = KeyPair::from_pem(key).map_err(|source| Error::Certificate { path: key_path.to_owned(), source })?;
        let bad = |source| Error::Certificate { path: bundle_path.to_owned(), source };
        let own = |pem: &&String| {
            let der = CertificateDer::from_pem_slice(pem.as_bytes());
            der.is_ok_and(|der| contains(&der, key.public_key_raw()))
        };
        let pem = bundle.iter().find(own).ok_or(bad(rcgen::Error::CouldNotParseCertificate))?.clone();
        let issuer = Issuer::from_ca_cert_pem(&pem, key).map_err(bad)?;
        Ok(Self { pem, issuer })
    }
}

fn read(path: &Path, closed: Closed) -> Result<String, Error> {
    files::read_own(path, closed).map_err(|source| Error::File { path: path.to_owned(), source })
}

/// The certificates of a bundle, each in PEM.
fn pieces(bundle: &str) -> Vec<String> {
    let parts = bundle.split_inclusive(END).map(str::trim_start).filter(|part| part.ends_with(END));
    parts.map(|part| format!("{part}\n")).collect()
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

/// What is left of `time` since a file was written.
fn remaining(path: &Path, time: Duration) -> Duration {
    let written =
        std::fs::metadata(path).and_then(|metadata| metadata.modified()).unwrap_or_else(|_| SystemTime::now());
    let passed = SystemTime::now().duration_since(written).unwrap_or_default();
    time.saturating_sub(passed)
}
