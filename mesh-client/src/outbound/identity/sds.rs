//! Secrets of the control plane (SDS), and certificates that resources hold themselves, as sources.

use super::{Opener, Role};
use crate::{error::BoxError, task::Task};
use mesh_tls::{
    CryptoProvider, FileSource, FileSourceConfig, Identity, Material, MemorySource, RevocationPolicy, Source,
    TrustBundle, TrustDomain, TrustRoots,
};
use mesh_xds::{
    SecretWatch,
    resource::{DataSource, RootSource, SecretKind},
    snapshot::SecretState,
};
use std::{
    ops::Deref,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::sync::watch;
use zeroize::Zeroizing;

/// How often files that a secret names are looked at again. Envoy is told by the system when they change.
const FILES_EVERY: Duration = Duration::from_secs(5);
/// Envoy: where there are revocation lists, every issuer needs one that counts.
const REVOCATION: RevocationPolicy = RevocationPolicy { refuse_unlisted_authorities: true, refuse_expired_lists: true };

/// What was read of a secret.
pub(super) enum Parsed {
    Own(Identity),
    Trust(TrustRoots),
}

/// The files of a secret that has nothing else.
#[derive(Debug)]
pub(super) struct Files {
    certificate: Option<(PathBuf, PathBuf)>,
    ca: Option<PathBuf>,
    bundle_map: Option<PathBuf>,
    crl: Option<PathBuf>,
}

/// Text of a secret, which may be a key: it is not copied, and wiped if it was read.
enum Text<'s> {
    Held(&'s [u8]),
    Read(Zeroizing<Vec<u8>>),
}

impl<'s> Text<'s> {
    fn of(source: &'s DataSource) -> Result<Self, String> {
        match source {
            DataSource::Bytes(bytes) => Ok(Self::Held(bytes)),
            DataSource::File(path) => {
                let read = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()));
                read.map(|bytes| Self::Read(Zeroizing::new(bytes)))
            }
        }
    }
}

impl Deref for Text<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Held(bytes) => bytes,
            Self::Read(bytes) => bytes,
        }
    }
}

/// A source that tasks fill, for as long as it is used.
#[derive(Debug)]
pub(super) struct Followed {
    held: Arc<MemorySource>,
    _tasks: Vec<Task>,
}

/// Follows a secret of the control plane.
pub(super) fn follow(watch: SecretWatch, role: Role, opener: &Opener) -> Arc<dyn Source> {
    Arc::new(Followed::new(format!("secret {}", watch.name()), [(watch, role)], opener))
}

impl Followed {
    pub(super) fn new(name: String, watches: impl IntoIterator<Item = (SecretWatch, Role)>, opener: &Opener) -> Self {
        let held = Arc::new(MemorySource::empty(name));
        let follow = |(watch, role)| Task::on(&opener.runtime, keep(watch, role, held.clone(), opener.clone()));
        Self { _tasks: watches.into_iter().map(follow).collect(), held }
    }
}

/// What is there stays until there is something newer: a secret that is removed or broken takes nothing away.
async fn keep(mut watch: SecretWatch, role: Role, held: Arc<MemorySource>, opener: Opener) {
    let mut told = None;
    loop {
        let state = watch.state();
        let fail = |told: &mut Option<String>, reason: String| {
            if told.as_ref() != Some(&reason) {
                held.fail(reason.clone());
                *told = Some(reason);
            }
        };
        let fits = |kind: &SecretKind| {
            matches!(
                (kind, role),
                (SecretKind::Certificate(_), Role::Certificate) | (SecretKind::Trust(_), Role::Trust)
            )
        };
        let files = match &state {
            SecretState::Ready(secret) if !fits(&secret.kind) => {
                let wanted = if role == Role::Trust { "a validation_context" } else { "a tls_certificate" };
                fail(&mut told, format!("Secret \"{}\" is not {wanted}", secret.name));
                None
            }
            SecretState::Ready(secret) => match files(&secret.kind) {
                Some(files) => match open_files(held.name(), files, &opener) {
                    Ok(source) => {
                        told = None;
                        Some(source)
                    }
                    Err(error) => {
                        fail(&mut told, error.to_string());
                        None
                    }
                },
                None => {
                    match read(&secret.kind, &opener.crypto).and_then(|parsed| parsed.timely()) {
                        Ok(parsed) => {
                            told = None;
                            parsed.put(&held);
                        }
                        Err(error) => fail(&mut told, error.to_string()),
                    }
                    None
                }
            },
            SecretState::Absent(error) | SecretState::Pending { cause: Some(error) } => {
                fail(&mut told, error.to_string());
                None
            }
            SecretState::Pending { cause: None } => None,
        };
        let copying = async {
            match files {
                Some(files) => copy(&*files, &held).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = watch.changed() => if changed.is_err() { return },
            () = copying => {}
            // What is only early is good later.
            () = tokio::time::sleep(FILES_EVERY), if told.is_some() => {}
        }
    }
}

/// Passes on what the files of a secret hold. Never returns.
async fn copy(files: &dyn Source, held: &MemorySource) {
    let mut changes = files.changed();
    loop {
        let material = files.current();
        if material.generation > 0 {
            if let Some(identity) = &material.identity {
                held.set_identity(identity.clone());
            }
            if let Some(roots) = &material.roots {
                held.set_roots(roots.clone());
            }
        } else if let Some(reason) = files.last_error() {
            held.fail(reason);
        }
        if changes.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

/// `None`: at least a part of it is text.
pub(super) fn files(kind: &SecretKind) -> Option<Files> {
    let path = |source: &DataSource| match source {
        DataSource::File(path) => Some(path.clone()),
        DataSource::Bytes(_) => None,
    };
    match kind {
        SecretKind::Certificate(own) => {
            let certificate = Some((path(&own.chain)?, path(&own.key)?));
            Some(Files { certificate, ca: None, bundle_map: None, crl: None })
        }
        SecretKind::Trust(trust) => {
            let crl = match &trust.crl {
                Some(crl) => Some(path(crl)?),
                None => None,
            };
            let (ca, bundle_map) = match &trust.ca {
                RootSource::All(ca) => (Some(path(ca)?), None),
                RootSource::BundleMap(map) => (None, Some(path(map)?)),
                // Files of single domains are read once, as by Envoy.
                RootSource::ByDomain(_) => return None,
            };
            Some(Files { certificate: None, ca, bundle_map, crl })
        }
    }
}

pub(super) fn open_files(name: &str, files: Files, opener: &Opener) -> Result<Arc<dyn Source>, BoxError> {
    let mut config = FileSourceConfig::new(name, opener.crypto.clone());
    (config.certificate_file, config.private_key_file) = files.certificate.unzip();
    config.ca_certificate_file = files.ca;
    config.spiffe_trust_bundle_map_file = files.bundle_map;
    config.crl_file = files.crl;
    config.revocation = REVOCATION;
    config.refresh_interval = FILES_EVERY;
    config.lazy = true;
    Ok(Arc::new(FileSource::new(config, &opener.runtime)?))
}

/// Reads a secret whose parts are text; a part that is a file is read once.
pub(super) fn read(kind: &SecretKind, crypto: &CryptoProvider) -> Result<Parsed, BoxError> {
    Ok(match kind {
        SecretKind::Certificate(own) => {
            Parsed::Own(Identity::from_pem(&Text::of(&own.chain)?, &Text::of(&own.key)?, crypto)?)
        }
        SecretKind::Trust(trust) => {
            let roots = match &trust.ca {
                RootSource::All(ca) => TrustRoots::from_pem(&Text::of(ca)?)?,
                RootSource::BundleMap(map) => TrustRoots::from_bundle_map(&Text::of(map)?)?,
                RootSource::ByDomain(domains) => {
                    let bundle = |(name, pem): &(Arc<str>, DataSource)| {
                        let of = |reason: String| format!("the roots of trust domain {name}: {reason}");
                        let domain: TrustDomain = name.parse().map_err(|e| of(format!("the name {e}")))?;
                        let pem = Text::of(pem).map_err(of)?;
                        Ok::<_, String>((domain, TrustBundle::from_pem(&pem).map_err(|e| of(e.to_string()))?))
                    };
                    TrustRoots::by_trust_domain(domains.iter().map(bundle).collect::<Result<Vec<_>, _>>()?)
                }
            };
            Parsed::Trust(match &trust.crl {
                Some(crl) => roots.with_crl_pem(&Text::of(crl)?, REVOCATION)?,
                None => roots,
            })
        }
    })
}

impl Parsed {
    /// # Errors
    /// The certificate has expired, or is not yet valid.
    fn timely(self) -> Result<Self, BoxError> {
        if let Self::Own(identity) = &self {
            identity.check_validity(SystemTime::now()).map_err(|error| format!("{}: {error}", identity.name()))?;
        }
        Ok(self)
    }

    pub(super) fn put(self, source: &MemorySource) {
        match self {
            Self::Own(identity) => source.set_identity(Arc::new(identity)),
            Self::Trust(roots) => source.set_roots(Arc::new(roots)),
        }
    }
}

impl Source for Followed {
    fn name(&self) -> &str {
        self.held.name()
    }

    fn current(&self) -> Arc<Material> {
        self.held.current()
    }

    fn changed(&self) -> watch::Receiver<u64> {
        self.held.changed()
    }

    fn last_error(&self) -> Option<String> {
        self.held.last_error()
    }
}
