//! Istio's networking API (v1, v1beta1 and v1alpha3, one schema), and its security and telemetry APIs.

mod destination_rule;
mod locality;
mod operator;
pub(super) mod security;
mod service_entry;
mod telemetry;
mod virtual_service;

use super::{fields::Fields, node::Node};
use crate::{
    model::{Model, Object},
    problem::{Located, Report},
};

/// The kinds that are read.
pub(super) const KINDS: [&str; 3] = ["ServiceEntry", "VirtualService", "DestinationRule"];
/// `apiVersion` and kind of what holds the defaults of the mesh.
pub(super) const OPERATOR: (&str, &str) = ("install.istio.io/v1alpha1", "IstioOperator");

/// `apiVersion`s and kind of what is traced.
pub(super) const TELEMETRY: (&[&str], &str) = (&["telemetry.istio.io/v1", "telemetry.istio.io/v1alpha1"], "Telemetry");

/// Reads one object into the model.
pub(super) fn read(object: Object, dry_run: bool, spec: &Node, report: &Report, model: &mut Model) {
    match object.kind {
        "ServiceEntry" => model.services.extend(service_entry::read(object, spec, report)),
        "Telemetry" => model.telemetries.extend(telemetry::read(object, spec, report)),
        "IstioOperator" => model.mesh = operator::read(spec, report),
        kind if security::KINDS.contains(&kind) => security::read(object, dry_run, spec, report, &mut model.security),
        "VirtualService" => model.routings.extend(virtual_service::read(object, spec, report)),
        _ => model.policies.extend(destination_rule::read(object, spec, report)),
    }
}

/// A host in full and in lower case: a name without a dot is one of the object's own namespace.
fn full_host(host: Located<String>, namespace: &str) -> Located<String> {
    host.map(|host| {
        let host = host.to_ascii_lowercase();
        if host.contains('.') || host.starts_with('*') { host } else { format!("{host}.{namespace}.svc.cluster.local") }
    })
}

/// The hosts of an object, in full; at least one.
fn hosts(f: &Fields<'_>, object: &Object) -> Vec<Located<String>> {
    let hosts: Vec<_> = f.strings("hosts").into_iter().map(|h| full_host(h, &object.namespace)).collect();
    if f.get("hosts").is_none_or(Node::is_empty_list) {
        f.missing("hosts", object.kind);
    }
    for host in &hosts {
        let name = host.value.strip_prefix("*.").unwrap_or(&host.value);
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if host.value != "*" && (name.is_empty() || !name.chars().all(legal)) {
            f.report.error(&host.at, format!("`{}` is not a host name", host.value));
        }
    }
    hosts
}

/// Who may see an object: everything is visible here.
fn export_to(f: &Fields<'_>) {
    if f.strings("exportTo").iter().any(|e| e.value != "*") {
        f.not_honoured(&["exportTo"]);
    }
}
