//! An inbound side whose configuration is a file, read again when it changes: `docs/inbound-file.md` has its format.

mod fields;
mod parse;

use super::{
    Chain, Config, Limits, Security, Shared,
    builder::BuildError,
    follow::{Asked, Serving},
};
use crate::{
    error::{BoxError, caught},
    task::Task,
};
use mesh_tls::{Acceptor, CryptoProvider, FileSource, FileSourceConfig, Roots, ServerSettings};
use mesh_xds::resource::{ClientCertDetails, ForwardClientCert, HttpFilterConfig};
use metrics::counter;
use parse::{Said, Tls, TlsFiles};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{runtime::Handle, time::sleep};

/// How often it is looked at.
pub(super) const REFRESH: Duration = Duration::from_secs(5);

/// Longer than any handshake.
const NO_LIMIT: Duration = Duration::from_secs(24 * 3600);

/// What the program says.
pub(super) struct Own {
    pub(super) limits: Limits,
    pub(super) security: Security,
    pub(super) forwarding: (ForwardClientCert, ClientCertDetails),
}

/// What stands of the file.
pub(super) struct File {
    path: PathBuf,
    refresh: Duration,
    asked: Asked,
    /// Of the program, where the file says nothing.
    own: Own,
    /// What was read last, good or bad.
    text: Vec<u8>,
    /// The number of the configuration in force.
    version: u64,
    made: Option<(Tls, Arc<Chain>)>,
    /// What was read last is not in force, because of this.
    problem: Option<String>,
}

impl File {
    /// Reads it for the first time.
    pub(super) fn open(
        path: PathBuf,
        refresh: Duration,
        asked: Asked,
        own: Own,
    ) -> Result<(Self, Config, Arc<Limits>), BuildError> {
        let text = Vec::new();
        let mut file = Self { path, refresh, asked, own, text, version: 0, made: None, problem: None };
        let read = read(&file.path).and_then(|text| file.compile(text));
        match read {
            Ok((config, limits)) => Ok((file, config, limits)),
            Err(error) => Err(BuildError::File { path: file.path, error }),
        }
    }

    pub(super) fn serving(&self) -> Serving {
        let version = format!("file {}", self.version).into();
        let problems = self.problem.iter().map(|problem| format!("file {}: {problem}", self.path.display())).collect();
        Serving::Serving { version, problems }
    }

    /// Keeps the configuration as the file says, until the inbound side ends.
    pub(super) fn follow(mut self, shared: &Arc<Shared>) -> Task {
        let shared = Arc::downgrade(shared);
        Task::spawn(async move { while self.step(&shared).await {} })
    }

    async fn step(&mut self, shared: &Weak<Shared>) -> bool {
        sleep(self.refresh).await;
        let path = self.path.clone();
        let text = tokio::task::spawn_blocking(move || read(&path)).await.unwrap_or_else(|error| Err(error.into()));
        let Some(shared) = shared.upgrade() else { return false };
        // One that was bad may name certificates that are there by now.
        if text.as_ref().is_ok_and(|text| *text == self.text) && self.problem.is_none() {
            return true;
        }
        let compiled = caught(|| text.and_then(|text| self.compile(text)));
        match compiled.unwrap_or_else(|panic| Err(format!("making what it says panicked: {panic}").into())) {
            Ok((config, limits)) => {
                self.problem = None;
                shared.limit(limits);
                shared.apply(config);
            }
            Err(error) => {
                let problem = error.to_string();
                if self.problem.as_ref() != Some(&problem) {
                    tracing::error!(file = %self.path.display(), problem, "the last good configuration stays");
                    let file = self.path.display().to_string();
                    counter!("mesh_inbound_file_errors_total", "file" => file).increment(1);
                }
                self.problem = Some(problem);
            }
        }
        shared.serves(self.serving());
        true
    }

    /// The chain stays the same where connections are secured as before.
    fn compile(&mut self, text: Vec<u8>) -> Result<(Config, Arc<Limits>), BoxError> {
        let of_program = self.asked.filters.iter().any(|filter| matches!(filter.config, HttpFilterConfig::Jwt(_)));
        let said = Said::read(&text, &self.own.limits, of_program).map_err(|wrong| wrong.to_string())?;
        let chain = match &self.made {
            Some((tls, chain)) if *tls == said.tls => chain.clone(),
            _ => {
                let security = match (&said.tls, &self.own.security) {
                    (Tls::Files(tls), _) => Security::Tls(tls.acceptor(&self.asked.kept.provider)?),
                    (Tls::Off, _) => Security::Plaintext,
                    // What was forgotten is no wish.
                    (Tls::Unsaid, Security::Plaintext) if self.made.as_ref().is_some_and(|(tls, _)| tls.is_on()) => {
                        return Err("tls: is missing where it was in force: plaintext has to be said, by {\"mode\": \"disabled\"}".into());
                    }
                    (Tls::Unsaid, own) => own.clone(),
                };
                Arc::new(Chain::new("file", security, Arc::default(), None))
            }
        };
        let policy = self.asked.policy(said.filters, said.forwarding.unwrap_or(self.own.forwarding));
        if let Some(reason) = policy.refusal() {
            return Err((&**reason).into());
        }
        let limits = Arc::new(said.limits);
        chain.limits.store(limits.clone());
        chain.policy.store(Some(Arc::new(policy)));
        self.made = Some((said.tls, chain.clone()));
        self.text = text;
        self.version += 1;
        Ok((Config::single(chain), limits))
    }
}

fn read(path: &Path) -> Result<Vec<u8>, BoxError> {
    Ok(fs::read(path)?)
}

impl TlsFiles {
    fn acceptor(&self, provider: &Arc<CryptoProvider>) -> Result<Acceptor, BoxError> {
        let mut files = FileSourceConfig::new("inbound", provider.clone());
        files.certificate_file = Some(self.certificate.clone());
        files.private_key_file = Some(self.key.clone());
        files.ca_certificate_file.clone_from(&self.ca);
        files.spiffe_trust_bundle_map_file.clone_from(&self.bundle_map);
        files.crl_file.clone_from(&self.crl);
        files.refresh_interval = self.refresh;
        let source = Arc::new(FileSource::new(files, &Handle::current())?);
        let mut settings = ServerSettings::mtls(source.clone());
        settings.roots = Roots::Source(source);
        (settings.mode, settings.client_auth, settings.check) = (self.mode, self.client_auth, self.peer);
        if !self.alpn.is_empty() {
            settings.alpn.clone_from(&self.alpn);
        }
        // The limits say it, and may say it anew: connections have no more time than those let them.
        settings.handshake_timeout = NO_LIMIT;
        Ok(Acceptor::new(settings, provider.clone())?)
    }
}
