//! Proto -> validated type. A resource is accepted whole or rejected with the path of the field and the reason.

#![allow(deprecated, reason = "control planes still send the deprecated fields")]

mod action;
mod answer;
mod cluster;
mod discovery;
mod edit;
mod endpoint;
mod filter;
mod hash_policy;
mod health_check;
mod lb_policy;
mod lb_settings;
mod listener;
mod matcher;
mod metadata;
mod outlier;
mod protocol_options;
mod retry;
mod route;
mod route_match;
mod secret;
mod server_listener;
mod tls;
mod wire;

#[cfg(test)]
mod tests;

use crate::{
    bootstrap::{CertificateProvider, GrpcService},
    lint::Note,
    resource::Extensions,
};
use envoy_types::pb::{
    envoy::config::core::v3::{ConfigSource, config_source::ConfigSourceSpecifier},
    google::protobuf::{Any, Duration as ProtoDuration, UInt32Value},
};
use std::{collections::BTreeMap, fmt::Write as _, time::Duration};

pub(crate) use wire::peek_name;

/// Why a resource is rejected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{path}: {reason}")]
pub struct Invalid {
    /// Path of the field, as in `api_listener.http_filters[1].typed_config`; `$` is the resource itself.
    pub path: String,
    /// What is wrong with it.
    pub reason: String,
}

/// Result of a step of validation.
pub(crate) type Valid<T> = Result<T, Invalid>;

/// Decodes resources: knows what the bootstrap allows, and collects the notes on what has no effect.
#[derive(Debug)]
pub struct Decoder<'a> {
    providers: &'a BTreeMap<String, CertificateProvider>,
    services: Option<&'a BTreeMap<String, GrpcService>>,
    extensions: Option<&'a Extensions>,
    /// The control plane has the feature `trusted_xds_server`.
    trusted: bool,
    /// The listener that is decoded is a server's.
    server: bool,
    path: Vec<Segment>,
    notes: Vec<Note>,
}

#[derive(Debug)]
enum Segment {
    Field(&'static str),
    Index(&'static str, usize),
    Key(&'static str, String),
}

impl<'a> Decoder<'a> {
    /// A decoder that knows these certificate provider instances.
    pub fn new(providers: &'a BTreeMap<String, CertificateProvider>) -> Self {
        let (path, notes) = (Vec::new(), Vec::new());
        Self { providers, services: None, extensions: None, trusted: false, server: false, path, notes }
    }

    /// One that knows which services resources may name by their targets too (gRFC A102).
    #[must_use]
    pub fn with_services(mut self, services: &'a BTreeMap<String, GrpcService>) -> Self {
        self.services = Some(services);
        self
    }

    /// One that knows these extensions too.
    #[must_use]
    pub fn with_extensions(mut self, extensions: &'a Extensions) -> Self {
        self.extensions = Some(extensions);
        self
    }

    /// The same for resources of a control plane that is `trusted` (gRFC A81).
    #[must_use]
    pub fn trusted(mut self, trusted: bool) -> Self {
        self.trusted = trusted;
        self
    }

    /// Takes the notes collected so far.
    pub fn take_notes(&mut self) -> Vec<Note> {
        self.path.clear();
        std::mem::take(&mut self.notes)
    }

    /// Decodes the message itself.
    fn message<M: prost::Message + Default>(&self, bytes: &[u8]) -> Valid<M> {
        M::decode(bytes).map_err(|error| self.invalid(format!("malformed protobuf: {error}")))
    }

    /// Decodes an `Any` of a known type.
    fn any<M: prost::Message + prost::Name + Default>(&self, any: &Any) -> Valid<M> {
        if type_name(&any.type_url) != M::full_name() {
            return Err(self.invalid(format!("expected {}, found \"{}\"", M::full_name(), any.type_url)));
        }
        self.message(&any.value)
    }

    fn at<T>(&mut self, field: &'static str, step: impl FnOnce(&mut Self) -> Valid<T>) -> Valid<T> {
        self.within(Segment::Field(field), step)
    }

    fn at_index<T>(&mut self, field: &'static str, index: usize, step: impl FnOnce(&mut Self) -> Valid<T>) -> Valid<T> {
        self.within(Segment::Index(field, index), step)
    }

    /// Every element of a list.
    fn each<P, T>(
        &mut self,
        field: &'static str,
        protos: Vec<P>,
        step: impl Fn(&mut Self, P) -> Valid<T>,
    ) -> Valid<Vec<T>> {
        let protos = protos.into_iter().enumerate();
        protos.map(|(index, proto)| self.at_index(field, index, |cx| step(cx, proto))).collect()
    }

    fn at_key<T>(&mut self, field: &'static str, key: &str, step: impl FnOnce(&mut Self) -> Valid<T>) -> Valid<T> {
        self.within(Segment::Key(field, key.to_owned()), step)
    }

    fn within<T>(&mut self, segment: Segment, step: impl FnOnce(&mut Self) -> Valid<T>) -> Valid<T> {
        self.path.push(segment);
        let result = step(self);
        self.path.pop();
        result
    }

    fn location(&self) -> String {
        let mut out = String::new();
        for segment in &self.path {
            if !out.is_empty() {
                out.push('.');
            }
            // Writing to a String cannot fail.
            let _ = match segment {
                Segment::Field(field) => write!(out, "{field}"),
                Segment::Index(field, index) => write!(out, "{field}[{index}]"),
                Segment::Key(field, key) => write!(out, "{field}[\"{key}\"]"),
            };
        }
        if out.is_empty() {
            out.push('$');
        }
        out
    }

    /// An error at the current path.
    fn invalid(&self, reason: impl Into<String>) -> Invalid {
        Invalid { path: self.location(), reason: reason.into() }
    }

    /// An error at a field of the current path.
    fn invalid_at(&mut self, field: &'static str, reason: impl Into<String>) -> Invalid {
        self.path.push(Segment::Field(field));
        let error = self.invalid(reason);
        self.path.pop();
        error
    }

    /// Reports a field of the current path that has no effect.
    fn note(&mut self, field: &'static str, reason: impl Into<String>) {
        self.path.push(Segment::Field(field));
        self.notes.push(Note { path: self.location(), reason: reason.into() });
        self.path.pop();
    }

    /// Reports fields that are set but not honoured.
    fn ignored(&mut self, fields: &[(&'static str, bool)]) {
        for (field, set) in fields {
            if *set {
                self.note(field, "not supported, ignored");
            }
        }
    }

    fn duration(&mut self, field: &'static str, value: Option<ProtoDuration>) -> Valid<Option<Duration>> {
        let Some(value) = value else { return Ok(None) };
        let (Ok(seconds), Ok(nanos)) = (u64::try_from(value.seconds), u32::try_from(value.nanos)) else {
            return Err(self.invalid_at(field, "is a negative duration"));
        };
        // The range of google.protobuf.Duration: about 10,000 years.
        if seconds > 315_576_000_000 || nanos > 999_999_999 {
            return Err(self.invalid_at(field, "is not a valid duration"));
        }
        Ok(Some(Duration::new(seconds, nanos)))
    }

    fn positive(&mut self, field: &'static str, value: Option<ProtoDuration>) -> Valid<Option<Duration>> {
        match self.duration(field, value)? {
            Some(Duration::ZERO) => Err(self.invalid_at(field, "must be greater than zero")),
            other => Ok(other),
        }
    }

    /// A percentage in 0..=100.
    fn percent(&mut self, field: &'static str, value: Option<UInt32Value>, default: u32) -> Valid<u32> {
        match value.map_or(default, |value| value.value) {
            percent @ 0..=100 => Ok(percent),
            other => Err(self.invalid_at(field, format!("{other} is more than 100 percent"))),
        }
    }

    /// A config source must be the same ADS stream (gRFC A27).
    fn ads(&mut self, field: &'static str, source: Option<&ConfigSource>) -> Valid<()> {
        let specifier = source.and_then(|source| source.config_source_specifier.as_ref());
        match specifier {
            Some(ConfigSourceSpecifier::Ads(_) | ConfigSourceSpecifier::Self_(_)) => Ok(()),
            Some(_) => Err(self.invalid_at(field, "must be ads or self")),
            None => Err(self.invalid_at(field, "is missing: must be ads or self")),
        }
    }
}

/// The message name of a type URL.
fn type_name(url: &str) -> &str {
    url.rsplit('/').next().unwrap_or(url)
}

fn u32_or(value: Option<UInt32Value>, default: u32) -> u32 {
    value.map_or(default, |value| value.value)
}
