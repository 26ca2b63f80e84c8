//! Checks of a whole model: what refers to nothing, what contradicts itself, and what has no effect.

mod data_plane;
mod security;

use crate::{
    input::Gaps,
    model::{
        Action, Destination, Forward, JwksUri, Model, MtlsMode, Policy, Port, Resolution, Routing, Service, TlsMode,
        covers,
    },
    problem::{At, Report},
};
use std::collections::BTreeMap;

/// Reports every finding about `model`.
pub(crate) fn check(model: &Model, gaps: Gaps, report: &Report) {
    let references = References { model, gaps, report };
    services(model, report);
    for routing in &model.routings {
        check_routing(routing, &references);
    }
    unique_hosts(model, report);
    telemetries(model, report);
    for policy in &model.policies {
        check_policy(policy, &references);
    }
    security::check(&references);
    if report.errors() == 0 {
        data_plane::check(model, report);
    }
}

/// What names something else, and whether that is there.
struct References<'a> {
    model: &'a Model,
    gaps: Gaps,
    report: &'a Report,
}

fn services(model: &Model, report: &Report) {
    let mut seen: BTreeMap<(&str, u16), &At> = BTreeMap::new();
    for service in &model.services {
        for host in &service.hosts {
            if host.value.contains('*') {
                let reason = format!("host `{}`: a wildcard cannot be resolved by a proxyless client", host.value);
                report.error(&host.at, reason);
            }
            for port in &service.ports {
                if let Some(first) = seen.insert((&host.value, port.number.value), &host.at) {
                    let what =
                        format!("port {} of host {} is already defined at {first}", port.number.value, host.value);
                    report.error(&port.number.at, what);
                }
            }
        }
        if service.endpoints.is_empty() && service.resolution == Resolution::Static {
            report.warning(service.object.at(), format!("{} has no endpoints: every call fails", service.object));
        }
        same_address_twice(service, report);
    }
}

fn same_address_twice(service: &Service, report: &Report) {
    for port in &service.ports {
        let mut seen: BTreeMap<(&str, u16), &At> = BTreeMap::new();
        for workload in &service.endpoints {
            let (host, number) = (workload.address.value.as_str(), workload.port(port));
            if let Some(first) = seen.insert((host, number), &workload.address.at) {
                let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
                let reason = format!("{host}:{number} serves port {} already, at {first}", port.number.value);
                report.error(&workload.address.at, reason);
            }
        }
    }
}

/// Two routings for one host: which wins would be chance.
fn unique_hosts(model: &Model, report: &Report) {
    let mut routed: BTreeMap<&str, &At> = BTreeMap::new();
    for host in model.routings.iter().flat_map(|r| &r.hosts) {
        if let Some(first) = routed.insert(&host.value, &host.at) {
            report.error(&host.at, format!("host {} already has a VirtualService, at {first}", host.value));
        }
    }
    let mut ruled: BTreeMap<&str, &At> = BTreeMap::new();
    for policy in &model.policies {
        if let Some(first) = ruled.insert(&policy.host.value, &policy.host.at) {
            let host = &policy.host.value;
            report.error(&policy.host.at, format!("host {host} already has a DestinationRule, at {first}"));
        }
    }
}

/// Of several that are for the same clients one counts.
fn telemetries(model: &Model, report: &Report) {
    let mut seen: BTreeMap<(&str, &BTreeMap<String, String>), &At> = BTreeMap::new();
    for telemetry in &model.telemetries {
        let object = &telemetry.object;
        match seen.get(&(object.namespace.as_str(), &telemetry.selector)) {
            Some(first) => {
                let reason = format!("{object} has no effect: the one at {first} is for the same clients");
                report.warning(object.at(), reason);
            }
            None => {
                seen.insert((&object.namespace, &telemetry.selector), object.at());
            }
        }
    }
}

fn check_routing(routing: &Routing, references: &References<'_>) {
    let report = references.report;
    for host in &routing.hosts {
        references.host(&host.value, &host.at);
    }
    let mut all_taken: Option<&At> = None;
    for route in &routing.routes {
        if let Some(at) = all_taken {
            report.warning(&route.at, format!("never reached: the route at {at} matches every request"));
        }
        if route.matches.is_empty() || route.matches.iter().any(crate::model::RouteMatch::takes_all) {
            all_taken = all_taken.or(Some(&route.at));
        }
        if let Action::Forward(forward) = &route.action {
            check_forward(forward, &route.at, references);
        }
    }
}

fn check_forward(forward: &Forward, at: &At, references: &References<'_>) {
    let report = references.report;
    let total: u64 = forward.destinations.iter().map(|d| u64::from(d.weight)).sum();
    // Istio: weights are shares of their sum, which must not be zero.
    if forward.destinations.len() > 1 {
        if total == 0 {
            report.error(at, "the weights of the destinations add up to 0");
        } else if u32::try_from(total).is_err() {
            report.error(at, format!("the weights of the destinations add up to {total}, too much"));
        } else if total != 100 {
            report.warning(
                at,
                format!("the weights of the destinations add up to {total}, not 100: taken as shares of {total}"),
            );
        }
    }
    for destination in forward.destinations.iter().chain(forward.mirrors.iter().map(|m| &m.destination)) {
        references.destination(destination);
    }
}

impl References<'_> {
    fn destination(&self, destination: &Destination) {
        let host = &destination.host;
        self.host(&host.value, &host.at);
        if let (Some(service), Some(port)) = (self.model.service(&host.value), &destination.port)
            && !service.ports.iter().any(|p| p.number.value == port.value)
        {
            self.report.error(&port.at, format!("host {} has no port {}", host.value, port.value));
        }
        if let Some(subset) = &destination.subset
            && !self.gaps.policies
            && self.model.policy(&host.value).is_none_or(|p| p.subset(&subset.value).is_none())
        {
            let reason = format!("no DestinationRule for {} has a subset `{}`", host.value, subset.value);
            self.report.error(&subset.at, reason);
        }
    }

    /// Keys of tokens are fetched as any other request is sent: through a cluster.
    fn keys(&self, uri: &JwksUri, at: &At) {
        let JwksUri { uri, host, port } = uri;
        self.host(host, at);
        let Some(service) = self.model.service(host) else { return };
        match service.ports.iter().find(|p| p.number.value == *port) {
            None => self.report.error(at, format!("host {host} has no port {port}")),
            Some(port) if uri.starts_with("https") && !self.gaps.policies && !self.speaks_tls(service, host, port) => {
                let port = port.number.value;
                let reason = format!(
                    "no DestinationRule has TLS for {host}:{port}: servers read no keys in the clear that an https URI names"
                );
                self.report.warning(at, reason);
            }
            Some(_) => {}
        }
    }

    /// Whether clients may speak TLS to it: a DestinationRule says so, or Istio's automatic mutual TLS does.
    fn speaks_tls(&self, service: &Service, host: &str, port: &Port) -> bool {
        let traffic = self.model.policy(host).map(|policy| &policy.traffic);
        let said = traffic.and_then(|t| t.ports.get(&port.number.value).unwrap_or(t).tls.as_ref());
        if let Some(tls) = said {
            return tls.mode != TlsMode::Disable;
        }
        let (security, namespace) = (&self.model.security, &service.object.namespace);
        service.endpoints.iter().any(|w| {
            let mode = security.mtls_mode(namespace, &w.labels, w.port(port), &self.model.mesh.root_namespace);
            mode == Some(MtlsMode::Strict) || w.says_mtls()
        })
    }

    fn host(&self, host: &str, at: &At) {
        let mut known = self.model.services.iter().flat_map(|s| &s.hosts);
        if self.gaps.services || known.any(|h| covers(host, &h.value)) {
            return;
        }
        if host.starts_with('*') {
            self.report.warning(at, format!("no ServiceEntry has a host that `{host}` covers"));
        } else {
            self.report.error(at, format!("no ServiceEntry has the host {host}"));
        }
    }
}

fn check_policy(policy: &Policy, references: &References<'_>) {
    let (model, report) = (references.model, references.report);
    references.host(&policy.host.value, &policy.host.at);
    let mut seen: BTreeMap<&str, &At> = BTreeMap::new();
    for subset in &policy.subsets {
        if let Some(first) = seen.insert(&subset.name.value, &subset.name.at) {
            report.error(&subset.name.at, format!("subset {} is already defined at {first}", subset.name.value));
        }
        let covered: Vec<_> =
            model.services.iter().filter(|s| s.hosts.iter().any(|h| covers(&policy.host.value, &h.value))).collect();
        let endpoints = covered.iter().flat_map(|s| &s.endpoints);
        if !covered.is_empty() && !endpoints.into_iter().any(|w| subset.selects(w)) {
            report.warning(&subset.name.at, format!("subset {} selects no endpoint", subset.name.value));
        }
    }
}
