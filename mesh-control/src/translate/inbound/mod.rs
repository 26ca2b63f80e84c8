//! LDS of servers: a listener under Istio's name for every address that a workload serves on, with what its connections and
//! requests must pass.
//!
//! The shapes are those of istiod's generator for gRPC servers. Beyond it: PERMISSIVE is two filter chains, one for TLS and one for
//! plaintext; a policy that allows nothing is an RBAC filter that matches nothing; and tokens are verified.

mod authz;
mod jwt;

use super::{Options, Target, targets, tls};
use crate::model::{Authorization, IpBlock, JwtRule, Model, MtlsMode, Resolution, Scoped, Workload};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    Address, CidrRange, Node, SocketAddress,
                    address::Address as AddressKind,
                    socket_address::{PortSpecifier, Protocol},
                },
                listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, filter::ConfigType as FilterConfig},
                route::v3::{
                    NonForwardingAction, Route, RouteConfiguration, RouteMatch, VirtualHost, route::Action,
                    route_match::PathSpecifier,
                },
            },
            extensions::filters::{
                http::router::v3::Router,
                network::http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter::ConfigType,
                },
            },
        },
        google::protobuf::{Any, UInt32Value, value::Kind},
    },
    util::pack_any,
};
use mesh_xds::server::{ResourceSet, ResourceType, Tailor};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// What stands before `IP:PORT` in the name of a server's listener: `server_listener_resource_name_template` of Istio's agent.
pub(crate) const PREFIX: &str = "xds.istio.io/grpc/lds/inbound/";

/// Somebody who serves on an address.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Server {
    namespace: String,
    labels: BTreeMap<String, String>,
    service_account: Option<String>,
    address: SocketAddr,
}

/// What a server lets in.
#[derive(Clone, Debug, PartialEq)]
struct Entrance {
    mode: MtlsMode,
    filters: Vec<HttpFilter>,
}

/// Adds the listeners of all servers.
pub(super) fn listeners(model: &Model, options: &Options, set: &mut ResourceSet) {
    for (address, servers) in by_address(model) {
        let name = format!("{PREFIX}{address}");
        let doors: Vec<(Server, Entrance)> =
            servers.into_iter().map(|server| (server.clone(), entrance(model, &server, options))).collect();
        let any = pack_any(listener(&name, address, &all(doors.iter().map(|(_, entrance)| entrance))));
        let alike = doors.windows(2).all(|pair| pair[0].1 == pair[1].1);
        if alike {
            set.insert(ResourceType::Listener, name, any);
            continue;
        }
        // Several workloads serve on this port, each with addresses of its own: who asks says which it is.
        let key = format!("{doors:?}");
        let for_node = name.clone();
        let tailor = Tailor::new(key, move |node| {
            let own = doors.iter().filter(|(server, _)| server.may_be(node)).map(|(_, entrance)| entrance);
            let own: Vec<_> = own.collect();
            // Whoever it is must obey every policy that may be its own.
            let own = if own.is_empty() { doors.iter().map(|(_, entrance)| entrance).collect() } else { own };
            pack_any(listener(&for_node, address, &all(own.into_iter())))
        });
        set.insert_tailored(ResourceType::Listener, name, any, tailor);
    }
}

/// Whether clients may speak mutual TLS to a workload: it takes nothing else, or says by Istio's label that it can.
pub(super) fn speaks_mtls(target: &Target<'_>, workload: &Workload, options: &Options) -> bool {
    let (namespace, port) = (&target.service.object.namespace, workload.port(target.port));
    let said = target.security.mtls_mode(namespace, &workload.labels, port, &target.mesh.root_namespace);
    match said.unwrap_or(options.mtls) {
        MtlsMode::Strict => true,
        MtlsMode::Permissive => workload.says_mtls(),
        MtlsMode::Disable => false,
    }
}

/// Everybody who serves, by each address that they may be bound to: their own, and all addresses.
fn by_address(model: &Model) -> BTreeMap<SocketAddr, BTreeSet<Server>> {
    let mut servers: BTreeMap<SocketAddr, BTreeSet<Server>> = BTreeMap::new();
    for target in targets(model).filter(|target| target.service.resolution == Resolution::Static) {
        for workload in &target.service.endpoints {
            let Ok(ip) = workload.address.value.parse::<IpAddr>() else { continue };
            let port = workload.port(target.port);
            let server = Server {
                namespace: target.service.object.namespace.clone(),
                labels: workload.labels.clone(),
                service_account: workload.service_account.clone(),
                address: SocketAddr::new(ip, port),
            };
            for ip in [ip, Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()] {
                servers.entry(SocketAddr::new(ip, port)).or_default().insert(server.clone());
            }
        }
    }
    servers
}

impl Server {
    /// Whether nothing that the node says of itself contradicts it: `NAMESPACE`, `SERVICE_ACCOUNT` and `LABELS` of its metadata, and
    /// the address in an id of Istio's form (`sidecar~IP~NAME.NAMESPACE~DOMAIN`).
    fn may_be(&self, node: &Node) -> bool {
        let said = |key: &str| match node.metadata.as_ref()?.fields.get(key)?.kind.as_ref()? {
            Kind::StringValue(text) => Some(text.as_str()),
            _ => None,
        };
        let ip = node.id.split('~').nth(1).and_then(|ip| ip.parse::<IpAddr>().ok());
        let labels = super::locality::labels_of(node);
        said("NAMESPACE").is_none_or(|namespace| namespace == self.namespace)
            && said("SERVICE_ACCOUNT")
                .is_none_or(|account| self.service_account.as_deref().is_none_or(|a| a == account))
            && ip.is_none_or(|ip| ip == self.address.ip())
            && labels.iter().all(|(key, value)| self.labels.get(key).is_none_or(|own| own == value))
    }
}

/// What passes every one of these.
fn all<'a>(entrances: impl Iterator<Item = &'a Entrance>) -> Entrance {
    let mut together = Entrance { mode: MtlsMode::Disable, filters: Vec::new() };
    for entrance in entrances {
        together.mode = together.mode.max(entrance.mode);
        for filter in &entrance.filters {
            if together.filters.iter().any(|known| known.config_type == filter.config_type) {
                continue;
            }
            let mut filter = filter.clone();
            let names = (0..).map(|n| if n == 0 { filter.name.clone() } else { format!("{}.{n}", filter.name) });
            let free = names.into_iter().find(|name| together.filters.iter().all(|known| known.name != *name));
            filter.name = free.unwrap_or_default();
            together.filters.push(filter);
        }
    }
    together
}

fn entrance(model: &Model, server: &Server, options: &Options) -> Entrance {
    let Server { namespace, labels, address, .. } = server;
    let root = model.mesh.root_namespace.as_str();
    let security = &model.security;
    let mode = security.mtls_mode(namespace, labels, address.port(), root).unwrap_or(options.mtls);
    let tokens: Vec<_> = security.requests.iter().filter(|p| p.selects(namespace, labels, root)).collect();
    let policies: Vec<_> = security.authorizations.iter().filter(|p| p.selects(namespace, labels, root)).collect();
    let rules: Vec<_> = tokens.iter().flat_map(|policy| &policy.rules).collect();
    Entrance { mode, filters: filters(&rules, &policies) }
}

/// What is asked of tokens stands before what is asked of who may do what.
fn filters(tokens: &[&JwtRule], policies: &[&Authorization]) -> Vec<HttpFilter> {
    jwt::filter(tokens).into_iter().chain(authz::filters(policies)).collect()
}

/// The listener of a server to which nothing else applies, for the lint.
pub(crate) fn listener_of(tokens: &[&JwtRule], policies: &[&Authorization]) -> Any {
    let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), 1);
    let entrance = Entrance { mode: MtlsMode::Strict, filters: filters(tokens, policies) };
    pack_any(listener(&format!("{PREFIX}{address}"), address, &entrance))
}

fn listener(name: &str, address: SocketAddr, entrance: &Entrance) -> Listener {
    let socket = SocketAddress {
        protocol: Protocol::Tcp.into(),
        address: address.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
        ..SocketAddress::default()
    };
    let chain = |suffix: &str, transport: &str, tls: bool| FilterChain {
        name: format!("inbound-{suffix}"),
        filter_chain_match: (!transport.is_empty())
            .then(|| FilterChainMatch { transport_protocol: transport.to_owned(), ..FilterChainMatch::default() }),
        filters: vec![Filter {
            name: format!("inbound-hcm-{suffix}"),
            config_type: Some(FilterConfig::TypedConfig(pack_any(manager(&entrance.filters)))),
        }],
        transport_socket: tls.then(tls::downstream),
        ..FilterChain::default()
    };
    let filter_chains = match entrance.mode {
        MtlsMode::Strict => vec![chain("mtls", "", true)],
        MtlsMode::Permissive => vec![chain("mtls", "tls", true), chain("plaintext", "raw_buffer", false)],
        MtlsMode::Disable => vec![chain("plaintext", "", false)],
    };
    Listener {
        name: name.to_owned(),
        address: Some(Address { address: Some(AddressKind::SocketAddress(socket)) }),
        filter_chains,
        ..Listener::default()
    }
}

fn manager(filters: &[HttpFilter]) -> HttpConnectionManager {
    let everything = Route {
        r#match: Some(RouteMatch {
            path_specifier: Some(PathSpecifier::Prefix("/".to_owned())),
            ..RouteMatch::default()
        }),
        action: Some(Action::NonForwardingAction(NonForwardingAction {})),
        ..Route::default()
    };
    let routes = RouteConfiguration {
        name: "inbound".to_owned(),
        virtual_hosts: vec![VirtualHost {
            name: "inbound".to_owned(),
            domains: vec!["*".to_owned()],
            routes: vec![everything],
            ..VirtualHost::default()
        }],
        ..RouteConfiguration::default()
    };
    let router = filter("envoy.filters.http.router", pack_any(Router::default()));
    HttpConnectionManager {
        stat_prefix: "inbound".to_owned(),
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        http_filters: filters.iter().cloned().chain([router]).collect(),
        ..HttpConnectionManager::default()
    }
}

fn filter(name: &str, config: Any) -> HttpFilter {
    HttpFilter { name: name.to_owned(), config_type: Some(ConfigType::TypedConfig(config)), ..HttpFilter::default() }
}

fn cidr(block: IpBlock) -> CidrRange {
    CidrRange {
        address_prefix: block.address.to_string(),
        prefix_len: Some(UInt32Value { value: block.prefix.into() }),
    }
}
