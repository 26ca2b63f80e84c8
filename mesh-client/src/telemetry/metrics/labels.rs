//! Istio's labels: who calls, and whom.

use super::Outcome;
use mesh_xds::{bootstrap::Node, resource::MetadataValue};
use metrics::Label;
use serde_json::Value;
use std::{collections::BTreeMap, sync::Arc};

/// Istio's word for what is not known.
const UNKNOWN: &str = "unknown";

/// The labels of the caller, the same for all requests of a mesh: from the bootstrap's node, where that is Istio's.
#[derive(Clone, Debug)]
pub(crate) struct Source(Arc<[Label]>);

/// The workload of an endpoint, as Istio's endpoint discovery names it, and who it proved to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Workload {
    /// `name;namespace;canonical name;canonical revision;cluster id` (Istio's `filter_metadata["istio"]["workload"]`).
    pub(crate) text: Option<Arc<str>>,
    /// The SPIFFE id, or the subject, of its certificate.
    pub(crate) principal: Option<Arc<str>>,
}

impl Source {
    /// Of this node. Istio's agent writes `WORKLOAD_NAME`, `NAMESPACE`, `LABELS`, `CLUSTER_ID`, `SERVICE_ACCOUNT` and `MESH_CONFIG` metadata; another
    /// node is a workload of the name of its `cluster`.
    pub(crate) fn of(node: &Node) -> Self {
        let metadata = |key: &str| node.metadata.get(key).and_then(Value::as_str).filter(|text| !text.is_empty());
        let labels = node.metadata.get("LABELS").and_then(Value::as_object);
        let label = |key: &str| labels.and_then(|labels| labels.get(key)).and_then(Value::as_str);
        let cluster = Some(node.cluster.as_str()).filter(|name| !name.is_empty());
        let name = metadata("WORKLOAD_NAME").or(cluster);
        let namespace = metadata("NAMESPACE");
        let app = label("app").or_else(|| label("app.kubernetes.io/name"));
        let version = label("version").or_else(|| label("app.kubernetes.io/version"));
        let principal = metadata("SERVICE_ACCOUNT").zip(namespace).map(|(account, namespace)| {
            let domain = metadata("TRUST_DOMAIN").unwrap_or("cluster.local");
            format!("spiffe://{domain}/ns/{namespace}/sa/{account}")
        });
        Self::new(
            name,
            namespace,
            principal.as_deref(),
            app,
            version,
            metadata("CLUSTER_ID"),
            label("service.istio.io/canonical-name").or(app).or(name),
            label("service.istio.io/canonical-revision").or(version).or(Some("latest")),
        )
    }

    #[allow(clippy::too_many_arguments, reason = "one for each label")]
    fn new(
        workload: Option<&str>,
        namespace: Option<&str>,
        principal: Option<&str>,
        app: Option<&str>,
        version: Option<&str>,
        cluster: Option<&str>,
        service: Option<&str>,
        revision: Option<&str>,
    ) -> Self {
        let label = |name: &'static str, value: Option<&str>| Label::new(name, value.unwrap_or(UNKNOWN).to_owned());
        Self(Arc::new([
            label("reporter", Some("source")),
            label("source_workload", workload),
            label("source_workload_namespace", namespace),
            label("source_principal", principal),
            label("source_app", app),
            label("source_version", version),
            label("source_cluster", cluster),
            label("source_canonical_service", service),
            label("source_canonical_revision", revision),
        ]))
    }
}

impl Source {
    /// The same workload where it serves: `destination_*`.
    pub(crate) fn as_destination(&self) -> Vec<Label> {
        let own = self.0.iter().filter_map(|label| {
            let name = match label.key() {
                "source_workload" => "destination_workload",
                "source_workload_namespace" => "destination_workload_namespace",
                "source_principal" => "destination_principal",
                "source_app" => "destination_app",
                "source_version" => "destination_version",
                "source_cluster" => "destination_cluster",
                "source_canonical_service" => "destination_canonical_service",
                "source_canonical_revision" => "destination_canonical_revision",
                _ => return None,
            };
            Some(Label::new(name, label.value().to_owned()))
        });
        own.collect()
    }
}

impl Default for Source {
    fn default() -> Self {
        Self::new(None, None, None, None, None, None, None, None)
    }
}

impl Workload {
    /// What Istio's endpoint discovery says.
    pub(crate) fn named(metadata: &BTreeMap<String, BTreeMap<String, MetadataValue>>) -> Option<Arc<str>> {
        match metadata.get("istio")?.get("workload")? {
            MetadataValue::String(text) => Some(text.as_str().into()),
            _ => None,
        }
    }
}

/// All labels of a request that ended so. `cluster`: the one that it was for, if it got so far.
pub(super) fn all(source: &Source, cluster: Option<&str>, workload: Option<&Workload>, outcome: Outcome) -> Vec<Label> {
    let host = cluster.map_or(UNKNOWN, service_of);
    let (service, namespace) = name_and_namespace(host);
    let text = workload.and_then(|workload| workload.text.as_deref()).unwrap_or_default();
    let mut parts = text.split(';').map(|part| Some(part).filter(|part| !part.is_empty()));
    let mut part = || parts.next().flatten();
    let (name, in_namespace, canonical, revision, id) = (part(), part(), part(), part(), part());
    let label = |name: &'static str, value: Option<&str>| Label::new(name, value.unwrap_or(UNKNOWN).to_owned());
    let mut labels = source.0.to_vec();
    labels.extend([
        label("destination_workload", name),
        label("destination_workload_namespace", in_namespace),
        label("destination_principal", workload.and_then(|workload| workload.principal.as_deref())),
        label("destination_app", canonical),
        label("destination_version", revision),
        label("destination_service", Some(host)),
        label("destination_service_name", Some(service)),
        label("destination_service_namespace", in_namespace.or(namespace)),
        label("destination_cluster", id),
        label("destination_canonical_service", canonical),
        label("destination_canonical_revision", revision),
        label("request_protocol", Some(if outcome.grpc.is_some() { "grpc" } else { "http" })),
        Label::new("response_code", outcome.status.to_string()),
        Label::new("grpc_response_status", outcome.grpc.map(|code| code.to_string()).unwrap_or_default()),
        Label::new("response_flags", outcome.flag.to_string()),
        // Istio's caller does not know what the other side asked for.
        label("connection_security_policy", None),
        Label::new("cluster", cluster.unwrap_or_default().to_owned()),
    ]);
    labels
}

/// All labels of a request that was served and ended so. What is not known of the caller is told so.
pub(super) fn destination(known: &[Label], outcome: Outcome) -> Vec<Label> {
    let mut labels = known.to_vec();
    for name in [
        "source_workload",
        "source_app",
        "source_version",
        "source_cluster",
        "source_canonical_service",
        "source_canonical_revision",
        "destination_workload",
        "destination_workload_namespace",
        "destination_principal",
        "destination_app",
        "destination_version",
        "destination_cluster",
        "destination_canonical_service",
        "destination_canonical_revision",
    ] {
        if !labels.iter().any(|label| label.key() == name) {
            labels.push(Label::new(name, UNKNOWN));
        }
    }
    labels.extend([
        Label::new("request_protocol", if outcome.grpc.is_some() { "grpc" } else { "http" }),
        Label::new("response_code", outcome.status.to_string()),
        Label::new("grpc_response_status", outcome.grpc.map(|code| code.to_string()).unwrap_or_default()),
        Label::new("response_flags", outcome.flag.to_string()),
    ]);
    labels
}

/// `name.namespace.svc…` taken apart; another host is a name of its own.
pub(super) fn name_and_namespace(host: &str) -> (&str, Option<&str>) {
    let mut parts = host.splitn(4, '.');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(name), Some(namespace), Some("svc")) => (name, Some(namespace)),
        _ => (host, None),
    }
}

/// The host in Istio's cluster name `outbound|PORT|SUBSET|HOST`, or the name itself.
pub(crate) fn service_of(cluster: &str) -> &str {
    match cluster.strip_prefix("outbound|") {
        Some(rest) => rest.rsplit('|').next().unwrap_or(cluster),
        None => cluster,
    }
}

/// The subset in Istio's cluster name, when there is one.
pub(crate) fn subset_of(cluster: &str) -> Option<&str> {
    let mut parts = cluster.strip_prefix("outbound|")?.split('|');
    parts.nth(1).filter(|s| !s.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::access_log::ResponseFlags;

    fn value<'a>(labels: &'a [Label], name: &str) -> &'a str {
        labels.iter().find(|label| label.key() == name).map_or("none", Label::value)
    }

    #[test]
    fn istio_names_are_taken_apart() {
        assert_eq!(
            service_of("outbound|50051|v1|greeter.default.svc.cluster.local"),
            "greeter.default.svc.cluster.local"
        );
        assert_eq!(subset_of("outbound|50051|v1|greeter"), Some("v1"));
        assert_eq!(subset_of("outbound|50051||greeter"), None);
        assert_eq!((service_of("plain"), subset_of("plain")), ("plain", None));
        assert_eq!(name_and_namespace("greeter.default.svc.cluster.local"), ("greeter", Some("default")));
        assert_eq!(name_and_namespace("www.example.org"), ("www.example.org", None));
    }

    #[test]
    fn labels_are_istios() {
        let metadata = serde_json::json!({
            "WORKLOAD_NAME": "shop-v1", "NAMESPACE": "prod", "CLUSTER_ID": "Kubernetes", "SERVICE_ACCOUNT": "shop",
            "LABELS": {"app": "shop", "version": "v1"}
        });
        let node = Node { metadata: metadata.as_object().unwrap().clone(), ..Node::default() };
        let workload = Workload { text: Some("greeter-v2;default;greeter;v2;Kubernetes".into()), principal: None };
        let outcome = Outcome { status: 200, grpc: Some(0), flag: ResponseFlags::NONE };
        let labels = all(
            &Source::of(&node),
            Some("outbound|50051|v2|greeter.default.svc.cluster.local"),
            Some(&workload),
            outcome,
        );
        for (name, wanted) in [
            ("reporter", "source"),
            ("source_workload", "shop-v1"),
            ("source_principal", "spiffe://cluster.local/ns/prod/sa/shop"),
            ("source_canonical_service", "shop"),
            ("source_canonical_revision", "v1"),
            ("destination_workload", "greeter-v2"),
            ("destination_service", "greeter.default.svc.cluster.local"),
            ("destination_service_name", "greeter"),
            ("destination_service_namespace", "default"),
            ("destination_canonical_revision", "v2"),
            ("destination_principal", "unknown"),
            ("request_protocol", "grpc"),
            ("grpc_response_status", "0"),
            ("response_flags", "-"),
            ("connection_security_policy", "unknown"),
        ] {
            assert_eq!(value(&labels, name), wanted, "{name}");
        }
    }
}
