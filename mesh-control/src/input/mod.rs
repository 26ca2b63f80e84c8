//! YAML in, [`Model`] out: Istio's ServiceEntry, VirtualService and DestinationRule; PeerAuthentication, AuthorizationPolicy and
//! RequestAuthentication; Telemetry; and the `meshConfig` of an IstioOperator.

mod fields;
mod istio;
mod node;

use crate::{
    lint,
    model::{Model, Object},
    problem::{At, Problem, Rejected, Report, Severity},
};
use fields::Fields;
use node::{Node, Value};
use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The name of text that is in no file.
pub const INLINE: &str = "<yaml>";

/// The text of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    /// For messages.
    pub name: Arc<str>,
    /// YAML, any number of documents.
    pub text: String,
}

/// A configuration without errors, and what may be wrong with it all the same.
#[derive(Clone, Debug, Default)]
pub struct Loaded {
    /// The configuration.
    pub model: Model,
    /// Warnings, in order of place.
    pub warnings: Vec<Problem>,
}

/// Fields every Kubernetes object may have, which mean nothing here.
const KUBERNETES_METADATA: &[&str] = &[
    "labels",
    "annotations",
    "creationTimestamp",
    "deletionTimestamp",
    "finalizers",
    "generateName",
    "generation",
    "managedFields",
    "ownerReferences",
    "resourceVersion",
    "selfLink",
    "uid",
];

/// A policy with it is told about and not enforced.
const DRY_RUN: &str = "istio.io/dry-run";

const SECURITY: &[&str] = &["security.istio.io/v1", "security.istio.io/v1beta1"];
const NETWORKING: &[&str] = &["networking.istio.io/v1", "networking.istio.io/v1beta1", "networking.istio.io/v1alpha3"];

impl Source {
    /// Text that is in no file.
    pub fn inline(text: impl Into<String>) -> Self {
        Self { name: INLINE.into(), text: text.into() }
    }

    /// Reads one file.
    ///
    /// # Errors
    /// The file cannot be read, or is not UTF-8; the error names it.
    pub fn file(path: &Path) -> io::Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
        Ok(Self { name: path.display().to_string().into(), text })
    }

    /// Reads a file, or every `*.yaml` and `*.yml` directly in a folder (hidden ones left out), by name.
    ///
    /// # Errors
    /// The file, the folder, or a file in it cannot be read; the error names it.
    pub fn path(path: &Path) -> io::Result<Vec<Self>> {
        if !path.is_dir() {
            return Ok(vec![Self::file(path)?]);
        }
        let naming = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
        let mut files = Vec::new();
        for entry in std::fs::read_dir(path).map_err(naming)? {
            let file = entry.map_err(naming)?.path();
            if is_config_file(&file) {
                files.push(file);
            }
        }
        files.sort();
        files.iter().map(|file| Self::file(file)).collect()
    }
}

/// Reads and checks a whole configuration. It is taken as a whole or not at all.
///
/// # Errors
/// Every error of every source.
pub fn load(sources: &[Source]) -> Result<Loaded, Rejected> {
    let (model, problems) = check(sources);
    let (errors, warnings): (Vec<_>, Vec<_>) = problems.into_iter().partition(|p| p.severity == Severity::Error);
    if errors.is_empty() { Ok(Loaded { model, warnings }) } else { Err(Rejected { errors }) }
}

/// Reads and checks a whole configuration; returns what could be read, and every finding in order of place.
pub fn check(sources: &[Source]) -> (Model, Vec<Problem>) {
    let report = Report::default();
    let mut reading =
        Reading { report: &report, seen: BTreeMap::new(), gaps: Gaps::default(), model: Model::default() };
    for source in sources {
        for document in node::read(&source.name, &source.text) {
            match document {
                Ok(node) => reading.document(&node),
                Err((at, reason)) => {
                    reading.gaps = Gaps { services: true, policies: true };
                    report.error(&at, reason);
                }
            }
        }
    }
    let Reading { model, gaps, .. } = reading;
    lint::check(&model, gaps, &report);
    (model, report.into_problems())
}

/// Objects that are there and could not be read: nothing is said to be missing that may be among them.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Gaps {
    pub(crate) services: bool,
    pub(crate) policies: bool,
}

struct Reading<'a> {
    report: &'a Report,
    /// Every object so far, and its place.
    seen: BTreeMap<(&'static str, String, String), At>,
    gaps: Gaps,
    model: Model,
}

impl Reading<'_> {
    fn document(&mut self, node: &Node) {
        if node.value == Value::Null {
            return;
        }
        let (services, errors) = (self.model.services.len(), self.report.errors());
        let kind = node.fields(self.report, "a document", |f| self.object(f)).flatten();
        let with_hosts = self.model.services.get(services).is_some_and(|s| !s.hosts.is_empty());
        match kind.as_deref() {
            Some("ServiceEntry") => self.gaps.services |= !with_hosts,
            Some("DestinationRule") => self.gaps.policies |= self.report.errors() > errors,
            Some(_) => {}
            None => self.gaps = Gaps { services: true, policies: true },
        }
    }

    /// Returns the kind that the document says it is.
    fn object(&mut self, f: &Fields<'_>) -> Option<String> {
        let report = self.report;
        f.skip(&["status"]);
        let version = f.required_string("apiVersion", "the document");
        let kind = f.required_string("kind", "the document");
        let said = kind.as_ref().map(|k| k.value.clone());
        let object = f.get("metadata").map(|metadata| {
            metadata.fields(report, "metadata", |m| {
                m.skip(KUBERNETES_METADATA);
                let name = m.required_string("name", "metadata");
                let namespace = m.text("namespace").filter(|n| !n.is_empty()).unwrap_or_else(|| "default".to_owned());
                let mut annotations = m.map("annotations").iter();
                let dry_run = annotations.find(|(key, _)| key.name == DRY_RUN).map(|(_, value)| &value.value);
                let dry_run = dry_run.is_some_and(|v| matches!(v, Value::String(s) if s == "true"));
                (name, namespace, dry_run)
            })
        });
        if object.is_none() {
            f.missing("metadata", "the document");
        }
        let spec = f.get("spec");
        let (Some(version), Some(kind)) = (version, kind) else { return said };
        let operator = (version.value.as_str(), kind.value.as_str()) == istio::OPERATOR;
        let kinds: &[&'static str] = match version.value.as_str() {
            _ if operator => &[istio::OPERATOR.1],
            version if NETWORKING.contains(&version) => &istio::KINDS,
            version if SECURITY.contains(&version) => &istio::security::KINDS,
            version if istio::TELEMETRY.0.contains(&version) => &[istio::TELEMETRY.1],
            unknown => {
                let known = [NETWORKING, SECURITY, istio::TELEMETRY.0].concat().join(", ");
                report.error(&version.at, format!("unknown apiVersion `{unknown}`: known are {known}"));
                return said;
            }
        };
        let Some(known) = kinds.iter().copied().find(|k| *k == kind.value) else {
            let known = kinds.join(", ");
            report.error(&kind.at, format!("unknown kind `{}`: known are {known}", kind.value));
            return said;
        };
        let Some(Some((Some(name), namespace, dry_run))) = object else { return said };
        let object = Object { kind: known, namespace, name };
        let key = (known, object.namespace.clone(), object.name.value.clone());
        if let Some(first) = self.seen.get(&key) {
            report.error(object.at(), format!("{object} is already defined at {first}"));
            return said;
        }
        self.seen.insert(key, object.at().clone());
        match spec {
            Some(spec) => istio::read(object, dry_run, spec, report, &mut self.model),
            // An AuthorizationPolicy that says nothing allows nothing; nothing said is what Kubernetes makes of `spec: {}`.
            None if istio::security::KINDS.contains(&known) => {
                let nothing = Node { value: Value::Map(Vec::new()), at: object.at().clone() };
                istio::read(object, dry_run, &nothing, report, &mut self.model);
            }
            None => f.missing("spec", "the document"),
        }
        said
    }
}

/// Whether a file in a config folder is read.
pub(crate) fn is_config_file(path: &Path) -> bool {
    let hidden = path.file_name().is_none_or(|name| name.to_string_lossy().starts_with('.'));
    !hidden && path.extension().is_some_and(|e| e == "yaml" || e == "yml") && !path.is_dir()
}

/// All sources of several files and folders.
///
/// # Errors
/// As [`Source::path`].
pub fn sources(paths: &[PathBuf]) -> io::Result<Vec<Source>> {
    let read: io::Result<Vec<_>> = paths.iter().map(|path| Source::path(path)).collect();
    Ok(read?.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests;
