//! What is traced.

use super::Object;
use std::collections::BTreeMap;

/// How clients of some workloads trace.
#[derive(Clone, Debug)]
pub struct Telemetry {
    /// The document.
    pub object: Object,
    /// Labels of the clients that it is for; empty: all of its namespace.
    pub selector: BTreeMap<String, String>,
    /// What it says.
    pub tracing: Tracing,
}

/// What is said of traces. What is not, holds as the level above says.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tracing {
    /// Percent of new traces that are recorded, 0.0..=100.0.
    pub random: Option<f64>,
    /// None are.
    pub disabled: Option<bool>,
}

impl Telemetry {
    /// How specific it is: of the mesh (in the `root` namespace), of a namespace, of some workloads.
    pub fn rank(&self, root: &str) -> u8 {
        match (self.object.namespace == root, self.selector.is_empty()) {
            (true, _) => 0,
            (false, true) => 1,
            (false, false) => 2,
        }
    }

    /// Whether it is for clients of this namespace with these labels.
    pub fn covers(&self, root: &str, namespace: &str, labels: &BTreeMap<String, String>) -> bool {
        let own = self.object.namespace == root || self.object.namespace == namespace;
        own && self.selector.iter().all(|(key, value)| labels.get(key) == Some(value))
    }
}

impl Tracing {
    /// What holds for clients of this namespace with these labels: level by level, of each the first that says something (Istio: the
    /// oldest).
    pub fn of(all: &[Telemetry], root: &str, namespace: &str, labels: &BTreeMap<String, String>) -> Self {
        let mut told = Self::default();
        for rank in [2, 1, 0] {
            let first = all.iter().find(|t| t.rank(root) == rank && t.covers(root, namespace, labels));
            if let Some(Telemetry { tracing, .. }) = first {
                told.random = told.random.or(tracing.random);
                told.disabled = told.disabled.or(tracing.disabled);
            }
        }
        told
    }
}
