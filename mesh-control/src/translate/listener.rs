//! LDS: one `api_listener` per target, under each name by which the host is called.

use super::{Target, ads, cluster_name, telemetry};
use crate::model::{Telemetry, Tracing};
use envoy_types::{
    pb::envoy::{
        config::listener::v3::{ApiListener, Listener},
        extensions::filters::{
            http::{fault::v3::HttpFault, router::v3::Router},
            network::http_connection_manager::v3::{
                HttpConnectionManager, HttpFilter, Rds, http_connection_manager::RouteSpecifier,
                http_filter::ConfigType,
            },
        },
    },
    pb::google::protobuf::Any,
    util::pack_any,
};
use mesh_xds::server::Tailor;

/// Key of the fault filter's per-route configs.
pub(super) const FAULT: &str = "envoy.filters.http.fault";
const ROUTER: &str = "envoy.filters.http.router";

/// The host in full, and the short forms of a cluster's service (`reviews.prod` for `reviews.prod.svc.cluster.local`).
pub(super) fn hosts(host: &str) -> Vec<String> {
    let mut hosts = vec![host.to_owned()];
    if let Some(service) = host.strip_suffix(".svc.cluster.local")
        && let Some((name, namespace)) = service.split_once('.')
    {
        hosts.push(format!("{service}.svc"));
        hosts.push(service.to_owned());
        // The namespace of clients is not known; those of the default one use the bare name.
        if namespace == "default" {
            hosts.push(name.to_owned());
        }
    }
    hosts
}

pub(super) fn names(host: &str, port: u16) -> Vec<String> {
    hosts(host).into_iter().map(|host| format!("{host}:{port}")).collect()
}

/// A listener, and what is made of it for each client, where they are told to trace differently.
pub(super) fn listener(target: &Target<'_>, name: String, telemetries: &[Telemetry]) -> (Any, Option<Tailor>) {
    let (manager, root) = (manager(target), &target.mesh.root_namespace);
    let with = move |tracing: Tracing| {
        let manager = HttpConnectionManager { tracing: telemetry::tracing(tracing), ..manager.clone() };
        let api_listener = Some(ApiListener { api_listener: Some(pack_any(manager)) });
        pack_any(Listener { name: name.clone(), api_listener, ..Listener::default() })
    };
    if let Some(tracing) = telemetry::for_all(telemetries, root) {
        return (with(tracing), None);
    }
    let told: Vec<_> = telemetries.iter().map(|t| (&t.object.namespace, &t.selector, t.tracing)).collect();
    let root = root.clone();
    let (key, telemetries, any) = (format!("{root} {told:?}"), telemetries.to_vec(), with(Tracing::default()));
    (any, Some(Tailor::new(key, move |node| with(telemetry::for_node(&telemetries, &root, node)))))
}

fn manager(target: &Target<'_>) -> HttpConnectionManager {
    let route_config_name = cluster_name(target.port.number.value, "", target.host);
    let rds = Rds { config_source: Some(ads()), route_config_name };
    let filter = |name: &str, config| HttpFilter {
        name: name.to_owned(),
        config_type: Some(ConfigType::TypedConfig(config)),
        ..HttpFilter::default()
    };
    HttpConnectionManager {
        stat_prefix: target.host.to_owned(),
        route_specifier: Some(RouteSpecifier::Rds(rds)),
        http_filters: vec![filter(FAULT, pack_any(HttpFault::default())), filter(ROUTER, pack_any(Router::default()))],
        ..HttpConnectionManager::default()
    }
}
