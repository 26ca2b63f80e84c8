//! Clusters whose endpoints are found by DNS: STRICT_DNS, LOGICAL_DNS and `envoy.clusters.dns`.

#![allow(deprecated, reason = "control planes still send the deprecated fields")]

use crate::support::{
    CLUSTER, World, assert_says,
    echo::{Echo, Way, get},
    edit, edit_cluster, nobody, service, until,
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                cluster::v3::{
                    Cluster,
                    cluster::{ClusterDiscoveryType, CustomClusterType, DiscoveryType, DnsLookupFamily},
                },
                core::v3::{Address, SocketAddress, address::Address as Kind, socket_address::PortSpecifier},
                endpoint::v3::{
                    ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier,
                },
                route::v3::{RouteAction, RouteConfiguration, route, route_action::HostRewriteSpecifier},
            },
            extensions::clusters::{aggregate::v3::ClusterConfig, dns::v3::DnsCluster},
        },
        google::protobuf::{BoolValue, Duration},
    },
    util::pack_any,
};
use examples::port::Port;
use hickory_resolver::{
    config::{NameServerConfig, ResolverConfig},
    proto::rr::{
        LowerName, Name, RData, Record, RecordType,
        rdata::{A, SOA},
    },
};
use hickory_server::{
    Server,
    store::in_memory::InMemoryZoneHandler,
    zone_handler::{AxfrPolicy, Catalog, ZoneType},
};
use mesh_client::{Mesh, Profile};
use mesh_control::ControlPlane;
use mesh_xds::{server::ResourceType, source::DnsOptions};
use std::{
    net::{Ipv4Addr, SocketAddr},
    str::FromStr,
    sync::Arc,
};

/// A DNS server for `mesh.test`.
struct Dns {
    zone: Arc<InMemoryZoneHandler>,
    serial: u32,
    resolver: ResolverConfig,
    _server: Server<Catalog>,
}

impl Dns {
    async fn start() -> Self {
        let origin = Name::from_str("mesh.test.").unwrap();
        let zone: Arc<InMemoryZoneHandler> =
            Arc::new(InMemoryZoneHandler::empty(origin.clone(), ZoneType::Primary, AxfrPolicy::Deny));
        let soa = SOA::new(origin.clone(), origin.clone(), 1, 60, 60, 60, 1);
        zone.upsert(Record::from_rdata(origin.clone(), 60, RData::SOA(soa)), 1).await;
        let mut catalog = Catalog::new();
        catalog.upsert(LowerName::new(&origin), vec![zone.clone()]);
        let socket = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let mut server = Server::new(catalog);
        server.register_socket(socket);
        let mut upstream = NameServerConfig::udp(address.ip());
        upstream.connections[0].port = address.port();
        let resolver = ResolverConfig::from_parts(None, Vec::new(), vec![upstream]);
        Self { zone, serial: 1, resolver, _server: server }
    }

    /// A name stands for these addresses from now on; without any, it does not exist.
    async fn set(&mut self, host: &str, addresses: &[Ipv4Addr]) {
        let name = Name::from_str(&format!("{host}.")).unwrap();
        let key = LowerName::new(&name);
        self.zone.records_mut().await.retain(|known, _| known.record_type != RecordType::A || known.name != key);
        for address in addresses {
            self.serial += 1;
            let record = Record::from_rdata(name.clone(), 1, RData::A(A(*address)));
            self.zone.upsert(record, self.serial).await;
        }
    }

    async fn world(&self, cp: ControlPlane, profile: Option<Profile>) -> World {
        let options = DnsOptions { resolver: Some(self.resolver.clone()), ..DnsOptions::default() };
        let builder = Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().dns(options);
        let builder = match profile {
            Some(profile) => builder.profile(profile),
            None => builder,
        };
        let mesh = builder.build().await.unwrap();
        let channel = mesh.channel(crate::support::TARGET).unwrap();
        channel.ready(crate::support::GUARD).await.unwrap();
        World { cp, mesh, channel }
    }
}

const LOOPBACK: [Ipv4Addr; 3] = [Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];

/// Servers on one port of several addresses.
fn servers() -> Vec<Echo> {
    let ports = loop {
        let first = nobody();
        let at = |host: Ipv4Addr| Port::take(SocketAddr::new(host.into(), first.addr().port()));
        // The port of another address may be somebody's: then another port.
        if let (Ok(second), Ok(third)) = (at(LOOPBACK[1]), at(LOOPBACK[2])) {
            break [first, second, third];
        }
    };
    ports.into_iter().zip(["a", "b", "c"]).map(|(port, name)| Echo::on(name, port.listen().unwrap())).collect()
}

async fn control_plane(server: &Echo) -> ControlPlane {
    ControlPlane::builder().yaml(service(&[("v1", server.addr())])).start().await.unwrap()
}

/// `host:port` in a locality of its own, at this priority.
fn named(host: &str, port: u16, priority: u32) -> LocalityLbEndpoints {
    let port_specifier = Some(PortSpecifier::PortValue(port.into()));
    let socket = SocketAddress { address: host.to_owned(), port_specifier, ..SocketAddress::default() };
    let address = Some(Address { address: Some(Kind::SocketAddress(socket)) });
    let host_identifier = Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() }));
    let endpoint = LbEndpoint { host_identifier, ..LbEndpoint::default() };
    LocalityLbEndpoints { priority, lb_endpoints: vec![endpoint], ..LocalityLbEndpoints::default() }
}

fn ms(millis: i32) -> Option<Duration> {
    Some(Duration { seconds: 0, nanos: millis * 1_000_000 })
}

/// Makes a cluster one of these names, looked up every 20 ms.
fn make(cluster: &mut Cluster, kind: DiscoveryType, endpoints: Vec<LocalityLbEndpoints>) {
    cluster.cluster_discovery_type = Some(ClusterDiscoveryType::Type(kind.into()));
    cluster.eds_cluster_config = None;
    cluster.dns_refresh_rate = ms(20);
    cluster.dns_lookup_family = DnsLookupFamily::V4Only.into();
    cluster.load_assignment = Some(ClusterLoadAssignment {
        cluster_name: cluster.name.clone(),
        endpoints,
        ..ClusterLoadAssignment::default()
    });
}

async fn names(mesh: &Mesh, way: Way) -> String {
    way.spread(mesh, 9).await.into_keys().collect::<Vec<_>>().join(" ")
}

#[tokio::test]
async fn every_address_of_a_strict_dns_name_is_an_endpoint() {
    let mut dns = Dns::start().await;
    let servers = servers();
    let port = servers[0].addr().port();
    dns.set("greeter.mesh.test", &LOOPBACK[..2]).await;
    let cp = control_plane(&servers[0]).await;
    edit_cluster(&cp, CLUSTER, |c| make(c, DiscoveryType::StrictDns, vec![named("greeter.mesh.test", port, 0)]));
    let world = dns.world(cp, None).await;
    for way in Way::BOTH {
        assert_eq!(names(&world.mesh, way).await, "a b", "{way:?}");
    }
    assert_says(&world.explain(), &["127.0.0.2", "dns="]);
    let follows = async |expected: &str| {
        until(expected, async || names(&world.mesh, Way::Layer).await == expected).await;
        assert_eq!(names(&world.mesh, Way::Channel).await, expected);
    };
    dns.set("greeter.mesh.test", &LOOPBACK[1..]).await;
    follows("b c").await;
    // Lookups fail for a while: the last good addresses stay.
    dns.set("greeter.mesh.test", &[]).await;
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        assert_eq!(names(&world.mesh, Way::Channel).await, "b c");
    }
    dns.set("greeter.mesh.test", &LOOPBACK[..1]).await;
    follows("a").await;

    // Several names, by priority; one that has no address takes no other down.
    dns.set("other.mesh.test", &LOOPBACK[1..2]).await;
    edit_cluster(&world.cp, CLUSTER, |c| {
        let names = ["nobody.mesh.test", "other.mesh.test", "127.0.0.3"];
        let endpoints = names.iter().zip([0, 0, 1]).map(|(name, priority)| {
            let mut locality = named(name, port, priority);
            locality.locality = Some(envoy_types::pb::envoy::config::core::v3::Locality {
                zone: (*name).to_owned(),
                ..Default::default()
            });
            locality
        });
        make(c, DiscoveryType::StrictDns, endpoints.collect());
    });
    follows("b").await;
    dns.set("nobody.mesh.test", &LOOPBACK[..1]).await;
    follows("a b").await;
}

#[tokio::test]
async fn a_name_that_is_not_resolved_fails_calls_with_the_cause_until_it_is() {
    let mut dns = Dns::start().await;
    let servers = servers();
    let port = servers[0].addr().port();
    let cp = control_plane(&servers[0]).await;
    let typed = DnsCluster {
        dns_refresh_rate: ms(20),
        all_addresses_in_single_endpoint: false,
        dns_lookup_family: 2,
        ..DnsCluster::default()
    };
    edit_cluster(&cp, CLUSTER, |c| {
        make(c, DiscoveryType::StrictDns, vec![named("late.mesh.test", port, 0)]);
        let typed_config = Some(pack_any(typed));
        c.cluster_discovery_type = Some(ClusterDiscoveryType::ClusterType(CustomClusterType {
            name: "envoy.clusters.dns".into(),
            typed_config,
        }));
    });
    let world = dns.world(cp, None).await;
    for way in Way::BOTH {
        let error = way.backend(&world.mesh, get("/x")).await;
        assert_says(&error, &["name not resolved", "late.mesh.test"]);
    }
    dns.set("late.mesh.test", &LOOPBACK[..1]).await;
    until("a", async || names(&world.mesh, Way::Channel).await == "a").await;
}

#[tokio::test]
async fn the_addresses_of_a_logical_dns_name_are_one_endpoint() {
    let mut dns = Dns::start().await;
    let servers = servers();
    let port = servers[0].addr().port();
    dns.set("greeter.mesh.test", &LOOPBACK).await;
    let cp = control_plane(&servers[0]).await;
    edit_cluster(&cp, CLUSTER, |c| make(c, DiscoveryType::LogicalDns, vec![named("greeter.mesh.test", port, 0)]));
    edit::<RouteConfiguration>(&cp, ResourceType::RouteConfiguration, CLUSTER, |config| {
        let route = &mut config.virtual_hosts[0].routes[0];
        let Some(route::Action::Route(RouteAction { host_rewrite_specifier, .. })) = &mut route.action else {
            panic!()
        };
        *host_rewrite_specifier = Some(HostRewriteSpecifier::AutoHostRewrite(BoolValue { value: true }));
    });
    let world = dns.world(cp, Some(Profile::Envoy)).await;
    // One takes all.
    let used = names(&world.mesh, Way::Channel).await;
    assert!(["a", "b", "c"].contains(&&*used), "{used}");
    let at = ["a", "b", "c"].iter().position(|name| *name == used).unwrap();
    // `auto_host_rewrite`: the name that was looked up.
    assert_eq!(servers[at].last().authority(), "greeter.mesh.test");
    // The address is gone: another one.
    let others: Vec<_> = LOOPBACK.into_iter().filter(|ip| servers[at].addr().ip() != *ip).collect();
    dns.set("greeter.mesh.test", &others).await;
    until("another", async || {
        let now = names(&world.mesh, Way::Layer).await;
        now != used && now.len() == 1
    })
    .await;
    // One that cannot be connected to is stepped over.
    dns.set("greeter.mesh.test", &[Ipv4Addr::new(127, 0, 0, 77), LOOPBACK[at]]).await;
    until("the one that listens", async || names(&world.mesh, Way::Channel).await == used).await;
}

#[tokio::test]
async fn a_service_entry_may_be_resolved_by_dns() {
    let mut dns = Dns::start().await;
    let servers = servers();
    dns.set("greeter.mesh.test", &LOOPBACK[..2]).await;
    let listed = format!("address: {}", servers[0].addr().ip());
    let yaml = service(&[("v1", servers[0].addr())]).replace(&listed, "address: greeter.mesh.test");
    let many = ControlPlane::builder().yaml(yaml.replace("STATIC", "DNS")).start().await.unwrap();
    let many = dns.world(many, None).await;
    let one = ControlPlane::builder().yaml(yaml.replace("STATIC", "DNS_ROUND_ROBIN")).start().await.unwrap();
    let one = dns.world(one, None).await;
    for way in Way::BOTH {
        assert_eq!(names(&many.mesh, way).await, "a b", "{way:?}");
        assert_eq!(names(&one.mesh, way).await.len(), 1, "{way:?}");
    }
}

#[tokio::test]
async fn a_dns_cluster_stands_behind_another_in_an_aggregate() {
    let mut dns = Dns::start().await;
    let servers = servers();
    let port = servers[0].addr().port();
    let cp = control_plane(&servers[0]).await;
    let leaf = |name: &str, host: &str| {
        let mut cluster = Cluster { name: name.to_owned(), ..Cluster::default() };
        make(&mut cluster, DiscoveryType::LogicalDns, vec![named(host, port, 0)]);
        let options = cp.cache().resources().get(ResourceType::Cluster, CLUSTER).unwrap().clone();
        let served: Cluster = prost::Message::decode(&*options.value).unwrap();
        cluster.typed_extension_protocol_options = served.typed_extension_protocol_options;
        cp.cache().update(ResourceType::Cluster, name, pack_any(cluster));
    };
    leaf("near", "near.mesh.test");
    leaf("far", "far.mesh.test");
    let typed_config = Some(pack_any(ClusterConfig { clusters: vec!["near".into(), "far".into()] }));
    edit_cluster(&cp, CLUSTER, |c| {
        let kind = CustomClusterType { name: "envoy.clusters.aggregate".into(), typed_config };
        c.cluster_discovery_type = Some(ClusterDiscoveryType::ClusterType(kind));
    });
    dns.set("far.mesh.test", &LOOPBACK[1..2]).await;
    let world = dns.world(cp, None).await;
    for way in Way::BOTH {
        assert_eq!(names(&world.mesh, way).await, "b", "{way:?}: the other one is not resolved");
    }
    dns.set("near.mesh.test", &LOOPBACK[..1]).await;
    until("a", async || names(&world.mesh, Way::Channel).await == "a").await;
}
