//! Sampling of traces, which lives in the connection manager of each listener.

use super::locality::labels_of;
use crate::model::{Telemetry, Tracing};
use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        extensions::filters::network::http_connection_manager::v3::http_connection_manager::Tracing as ProtoTracing,
        r#type::v3::Percent,
    },
    google::protobuf::value::Kind,
};

/// What a listener says of traces; `None`: nothing, the program decides.
pub(super) fn tracing(told: Tracing) -> Option<ProtoTracing> {
    let percent = |value: f64| Some(Percent { value });
    let shares = |client, random, overall| ProtoTracing {
        client_sampling: percent(client),
        random_sampling: percent(random),
        overall_sampling: percent(overall),
        ..ProtoTracing::default()
    };
    match told {
        Tracing { disabled: Some(true), .. } => Some(shares(0.0, 0.0, 0.0)),
        Tracing { random: Some(random), .. } => Some(shares(100.0, random, 100.0)),
        _ => None,
    }
}

/// For all clients alike, where it is the same for all.
pub(super) fn for_all(all: &[Telemetry], root: &str) -> Option<Tracing> {
    let general = all.iter().all(|telemetry| telemetry.rank(root) == 0 && telemetry.selector.is_empty());
    general.then(|| Tracing::of(all, root, "default", &std::collections::BTreeMap::new()))
}

/// For this client: by `NAMESPACE` and `LABELS` of its metadata, where Istio's proxies have them.
pub(super) fn for_node(all: &[Telemetry], root: &str, node: &Node) -> Tracing {
    let said = node.metadata.as_ref().and_then(|metadata| metadata.fields.get("NAMESPACE"));
    let namespace = match said.and_then(|value| value.kind.as_ref()) {
        Some(Kind::StringValue(namespace)) => namespace.as_str(),
        _ => "default",
    };
    Tracing::of(all, root, namespace, &labels_of(node))
}
