//! `ServiceEntry`: hosts, ports and endpoints.

use super::{Node, export_to, hosts};
use crate::{
    input::fields::Fields,
    model::{Locality, Object, Port, Protocol, Resolution, Service, Workload},
    problem::Report,
};
use std::{collections::BTreeMap, net::IpAddr};

pub(super) fn read(object: Object, spec: &Node, report: &Report) -> Option<Service> {
    spec.fields(report, "ServiceEntry.spec", |f| {
        let hosts = hosts(f, &object);
        let ports: Vec<Port> = f.list("ports").iter().filter_map(|node| port(node, report)).collect();
        if f.get("ports").is_none_or(Node::is_empty_list) {
            f.missing("ports", "ServiceEntry.spec");
        }
        let location = f.string("location");
        if let Some(location) = location
            && !["MESH_INTERNAL", "MESH_EXTERNAL"].contains(&location.value.as_str())
        {
            report.error(&location.at, format!("unknown location `{}`", location.value));
        }
        let resolution = resolution(f);
        f.not_honoured(&["addresses", "workloadSelector"]);
        export_to(f);
        let endpoints = f.list("endpoints");
        if resolution == Resolution::DnsRoundRobin
            && let Some(second) = endpoints.get(1)
        {
            report.error(&second.at, "resolution DNS_ROUND_ROBIN has one endpoint at most");
        }
        let endpoints = endpoints.iter().filter_map(|node| workload(node, &ports, resolution, report)).collect();
        let subject_alt_names = f.strings("subjectAltNames").into_iter().map(|s| s.value).collect();
        Service { object, hosts, ports, resolution, endpoints, subject_alt_names }
    })
}

fn resolution(f: &Fields<'_>) -> Resolution {
    if f.get("resolution").is_none() {
        // The default is NONE: connect to the address that the caller dialled, which a proxyless client does not have.
        f.missing("resolution", "ServiceEntry.spec");
    }
    let Some(resolution) = f.string("resolution") else { return Resolution::Static };
    match resolution.value.as_str() {
        "STATIC" => {}
        "DNS" => return Resolution::Dns,
        "DNS_ROUND_ROBIN" => return Resolution::DnsRoundRobin,
        "NONE" | "DYNAMIC_DNS" => {
            let reason = format!("resolution {} is not supported: use STATIC, with endpoints", resolution.value);
            f.report.error(&resolution.at, reason);
        }
        other => f.report.error(&resolution.at, format!("unknown resolution `{other}`")),
    }
    Resolution::Static
}

fn port(node: &Node, report: &Report) -> Option<Port> {
    node.fields(report, "a port", |f| {
        let number = f.port("number");
        if f.get("number").is_none() {
            f.missing("number", "the port");
        }
        let name = f.required_string("name", "the port").map(|n| n.value);
        let protocol = f.string("protocol");
        let target = f.port("targetPort").map(|p| p.value);
        // Istio: without a protocol, the name says it (`grpc-web`, `http2-api`); else it is TCP.
        let said = protocol.as_ref().map(|p| p.value.to_ascii_uppercase());
        let by_name = || name.as_deref().unwrap_or_default().split('-').next().unwrap_or_default().to_ascii_uppercase();
        let said = said.filter(|p| !p.is_empty()).unwrap_or_else(by_name);
        let parsed = match said.as_str() {
            "HTTP" => Protocol::Http,
            "HTTP2" | "HTTP_PROXY2" => Protocol::Http2,
            "GRPC" | "GRPC_WEB" | "GRPC-WEB" => Protocol::Grpc,
            _ => Protocol::Opaque,
        };
        let known = ["TCP", "TLS", "HTTPS", "MONGO", "MYSQL", "REDIS", "UDP", "HBONE"];
        if parsed == Protocol::Opaque
            && let Some(protocol) = protocol
        {
            if known.contains(&said.as_str()) {
                report.warning(
                    &protocol.at,
                    format!("protocol {said} is not honoured: only HTTP, HTTP2 and GRPC are routed"),
                );
            } else {
                report.error(&protocol.at, format!("unknown protocol `{}`", protocol.value));
            }
        }
        Some(Port { number: number?, name: name?, protocol: parsed, target })
    })?
}

fn workload(node: &Node, ports: &[Port], resolution: Resolution, report: &Report) -> Option<Workload> {
    node.fields(report, "an endpoint", |f| {
        let address = f.required_string("address", "the endpoint").and_then(|address| {
            match (address.value.parse::<IpAddr>(), resolution) {
                (Ok(ip), _) => Some(address.map(|_| ip.to_string())),
                (Err(_), Resolution::Static) => {
                    let reason = "is not an IP address: names are resolved where the resolution is DNS";
                    report.error(&address.at, format!("`{}` {reason}", address.value));
                    None
                }
                (Err(_), _) if !is_name(&address.value) => {
                    report.error(&address.at, format!("`{}` is no IP address and no DNS name", address.value));
                    None
                }
                (Err(_), _) => Some(address),
            }
        });
        f.not_honoured(&["network"]);
        let mut named = BTreeMap::new();
        for (key, value) in f.map("ports") {
            if !ports.iter().any(|p| p.name == key.name) {
                report.error(&key.at, format!("`{}` is not the name of a port of this ServiceEntry", key.name));
            }
            if let Some(number) = value.int::<u16>(report, &key.name) {
                if number == 0 {
                    report.error(&value.at, format!("port {} is out of range: 0", key.name));
                }
                named.insert(key.name.clone(), number);
            }
        }
        let labels = f.string_map("labels");
        let locality = f.text("locality").map(|l| locality(&l)).unwrap_or_default();
        // Istio: 0 is the default, 1.
        let weight = f.int::<u32>("weight").unwrap_or(1).max(1);
        let service_account = f.text("serviceAccount").filter(|s| !s.is_empty());
        Some(Workload { address: address?, ports: named, labels, locality, weight, service_account })
    })?
}

fn is_name(text: &str) -> bool {
    let label =
        |label: &str| !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    text.trim_end_matches('.').split('.').all(label)
}

fn locality(text: &str) -> Locality {
    let mut parts = text.splitn(3, '/').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    Locality { region: next(), zone: next(), sub_zone: next() }
}
