//! What the application registers by the type of its configuration: filters, and the names of load-balancing policies.

use crate::resource::AuditLoggerParser;
use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

/// The configuration of a filter that the application registered, and what its parser made of it.
#[derive(Clone)]
pub struct CustomFilter {
    /// Name of the configuration's type.
    pub type_name: Arc<str>,
    /// The configuration as it came.
    pub payload: FilterPayload,
    /// What [`FilterParser::parse`] made of it.
    pub made: Arc<dyn Any + Send + Sync>,
}

/// The configuration of a filter, as it came.
#[derive(Clone, Debug, PartialEq)]
pub enum FilterPayload {
    /// A serialized protobuf message (`google.protobuf.Any`).
    Message(Vec<u8>),
    /// JSON: the `value` of a `TypedStruct` (xds.type.v3 or udpa.type.v1).
    Json(serde_json::Map<String, serde_json::Value>),
}

/// Reads the configurations of one type of filter.
pub trait FilterParser: Send + Sync {
    /// Validates a configuration; `of_route` where it overrides that of the filter (`typed_per_filter_config`).
    ///
    /// # Errors
    /// Why it is refused: the resource is rejected, with the path of the field.
    fn parse(&self, payload: &FilterPayload, of_route: bool) -> Result<Arc<dyn Any + Send + Sync>, String>;
}

/// What the application adds to the types that are known here.
#[derive(Clone, Default)]
pub struct Extensions {
    filters: BTreeMap<String, Arc<dyn FilterParser>>,
    lb_policies: BTreeSet<String>,
    audit_loggers: BTreeMap<String, Arc<dyn AuditLoggerParser>>,
}

impl Extensions {
    /// Adds a filter by the type of its configuration: a type URL, or a message's full name. Of two with one name, the later counts; a
    /// type that is known here stays what it is.
    pub fn add_filter(&mut self, type_url: &str, parser: Arc<dyn FilterParser>) {
        self.filters.insert(type_url.rsplit('/').next().unwrap_or(type_url).to_owned(), parser);
    }

    /// Adds a load-balancing policy by its name: the type of the `TypedStruct` that configures it, or the last part of that (gRFC A52).
    pub fn add_lb_policy(&mut self, name: &str) {
        self.lb_policies.insert(name.to_owned());
    }

    /// Adds an audit logger (gRFC A59) by the type of its configuration, as [`add_filter`](Self::add_filter) does.
    pub fn add_audit_logger(&mut self, type_url: &str, parser: Arc<dyn AuditLoggerParser>) {
        self.audit_loggers.insert(type_url.rsplit('/').next().unwrap_or(type_url).to_owned(), parser);
    }

    pub(crate) fn audit_logger(&self, type_name: &str) -> Option<&Arc<dyn AuditLoggerParser>> {
        self.audit_loggers.get(type_name)
    }

    pub(crate) fn has_lb_policy(&self, name: &str) -> bool {
        self.lb_policies.contains(name)
    }

    pub(crate) fn filter(&self, type_name: &str) -> Option<&Arc<dyn FilterParser>> {
        self.filters.get(type_name)
    }
}

impl PartialEq for CustomFilter {
    /// By what came, not by what was made of it.
    fn eq(&self, other: &Self) -> bool {
        self.type_name == other.type_name && self.payload == other.payload
    }
}

impl fmt::Debug for CustomFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CustomFilter")
            .field("type_name", &self.type_name)
            .field("payload", &self.payload)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Extensions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Extensions")
            .field("filters", &self.filters.keys())
            .field("lb_policies", &self.lb_policies)
            .field("audit_loggers", &self.audit_loggers.keys())
            .finish()
    }
}
