//! What the tests share: greeters, control planes, channels and calls.

pub(crate) mod code;
pub(crate) mod echo;
mod h2_server;
pub(crate) mod inbound;
pub(crate) mod memory;
pub(crate) mod policies;
pub(crate) mod raw_h2;
pub(crate) mod way;

pub(crate) use h2_server::{H2Server, Served, Then};

use envoy_types::pb::envoy::config::{
    cluster::v3::Cluster,
    core::v3::{Address, HealthStatus, SocketAddress, address::Address as Kind, socket_address::PortSpecifier},
    endpoint::v3::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint::HostIdentifier},
};
use envoy_types::{pb::google::protobuf::UInt32Value, util::pack_any};
use examples::{
    backend::{Backend, HttpBackend, Options},
    greeter::{HelloReply, HelloRequest, greeter_client::GreeterClient},
    port::Port,
};
use mesh_client::{Mesh, MeshChannel, Profile};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use prost::{Message, Name};
use std::{
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};
use tonic::{Request, Status};

/// Any free loopback port.
pub(crate) const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
/// The greeter's target.
pub(crate) const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";
/// The greeter's cluster without a subset.
pub(crate) const CLUSTER: &str = "outbound|50051||greeter.default.svc.cluster.local";
/// Far more than anything takes that does not hang.
pub(crate) const GUARD: Duration = Duration::from_secs(30);
/// Longer than any test.
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// A mesh on a control plane of its own, and a channel to the greeter.
pub(crate) struct World {
    pub(crate) cp: ControlPlane,
    pub(crate) mesh: Mesh,
    pub(crate) channel: MeshChannel,
}

impl World {
    /// With this configuration, in force.
    pub(crate) async fn new(yaml: &str) -> Self {
        Self::on(ControlPlane::builder().yaml(yaml).start().await.unwrap()).await
    }

    /// On this control plane.
    pub(crate) async fn on(cp: ControlPlane) -> Self {
        let mesh = mesh_on(&cp).await;
        let channel = mesh.channel(TARGET).unwrap();
        channel.ready(GUARD).await.unwrap();
        Self { cp, mesh, channel }
    }

    /// How a greeting would be served now, in words.
    pub(crate) fn explain(&self) -> String {
        let request = http::Request::post(format!("http://{}/helloworld.Greeter/SayHello", &TARGET["xds:///".len()..]));
        self.mesh.explain(&request.body(()).unwrap().into_parts().0).to_string()
    }
}

/// A mesh on this control plane with Envoy's rules.
pub(crate) async fn envoy_mesh(cp: &ControlPlane) -> Mesh {
    Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().profile(Profile::Envoy).build().await.unwrap()
}

/// A mesh on this control plane.
pub(crate) async fn mesh_on(cp: &ControlPlane) -> Mesh {
    Mesh::builder().bootstrap_json(&cp.bootstrap()).unwrap().build().await.unwrap()
}

/// Edits a resource that the control plane serves.
pub(crate) fn edit<M: Message + Name + Default>(
    cp: &ControlPlane,
    resource_type: ResourceType,
    name: &str,
    change: impl FnOnce(&mut M),
) {
    let served = cp.cache().resources().get(resource_type, name).expect("it is served").clone();
    let mut message = M::decode(&*served.value).unwrap();
    change(&mut message);
    cp.cache().update(resource_type, name, pack_any(message));
}

/// Edits a cluster that the control plane serves.
pub(crate) fn edit_cluster(cp: &ControlPlane, name: &str, change: impl FnOnce(&mut Cluster)) {
    edit(cp, ResourceType::Cluster, name, change);
}

/// An address where nobody listens, and that nobody else is given while the test keeps it.
pub(crate) fn nobody() -> Port {
    Port::take(ANY).expect("a free port")
}

/// A greeter of this name.
pub(crate) async fn greeter(name: &str) -> Backend {
    Backend::start(name, ANY, Options::default()).await.expect("a free port")
}

/// A plain HTTP server of this name.
pub(crate) async fn http_backend(name: &str) -> HttpBackend {
    Backend::http(name, ANY, Options::default()).await.expect("a free port")
}

/// A mesh without a control plane.
pub(crate) async fn plain_mesh() -> Mesh {
    Mesh::builder().build().await.expect("inside a runtime")
}

/// The greeter's ServiceEntry: endpoints with the label `version`.
pub(crate) fn service(endpoints: &[(&str, SocketAddr)]) -> String {
    let endpoint = |(version, addr): &(&str, SocketAddr)| {
        format!("  - {{address: {}, ports: {{grpc: {}}}, labels: {{version: {version}}}}}\n", addr.ip(), addr.port())
    };
    let endpoints: String = endpoints.iter().map(endpoint).collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: greeter}}\nspec:\n  hosts: \
         [greeter.default.svc.cluster.local]\n  resolution: STATIC\n  ports: [{{number: 50051, name: grpc, protocol: \
         GRPC}}]\n  endpoints:\n{endpoints}"
    )
}

/// The greeter's VirtualService with these routes, as a flow list; `to(SUBSET)` makes a destination.
pub(crate) fn routes(http: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{name: greeter}}\nspec:\n  hosts: \
         [greeter.default.svc.cluster.local]\n  http: {http}\n"
    )
}

/// A route destination: the greeter, or one of its subsets.
pub(crate) fn to(subset: &str) -> String {
    let subset = if subset.is_empty() { String::new() } else { format!(", subset: {subset}") };
    format!("{{host: greeter.default.svc.cluster.local{subset}}}")
}

/// The greeter's DestinationRule with this traffic policy, as a flow map, and a subset for each version.
pub(crate) fn rule(traffic: &str, versions: &[&str]) -> String {
    let subset = |v: &&str| format!("{{name: {v}, labels: {{version: {v}}}}}");
    let subsets = versions.iter().map(subset).collect::<Vec<_>>().join(", ");
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: greeter}}\nspec:\n  host: \
         greeter.default.svc.cluster.local\n  trafficPolicy: {traffic}\n  subsets: [{subsets}]\n"
    )
}

/// An assignment of the greeter: localities by priority.
pub(crate) fn assignment(priorities: &[&[SocketAddr]], health: HealthStatus) -> ClusterLoadAssignment {
    let endpoint = |addr: &SocketAddr| {
        let port_specifier = Some(PortSpecifier::PortValue(addr.port().into()));
        let socket = SocketAddress { address: addr.ip().to_string(), port_specifier, ..SocketAddress::default() };
        let address = Some(Address { address: Some(Kind::SocketAddress(socket)) });
        LbEndpoint {
            health_status: health.into(),
            host_identifier: Some(HostIdentifier::Endpoint(Endpoint { address, ..Endpoint::default() })),
            ..LbEndpoint::default()
        }
    };
    let locality = |(priority, endpoints): (usize, &&[SocketAddr])| LocalityLbEndpoints {
        locality: Some(envoy_types::pb::envoy::config::core::v3::Locality {
            zone: format!("zone-{priority}"),
            ..Default::default()
        }),
        priority: u32::try_from(priority).unwrap(),
        load_balancing_weight: Some(UInt32Value { value: 1 }),
        lb_endpoints: endpoints.iter().map(endpoint).collect(),
        ..LocalityLbEndpoints::default()
    };
    ClusterLoadAssignment {
        cluster_name: CLUSTER.to_owned(),
        endpoints: priorities.iter().enumerate().map(locality).collect(),
        ..ClusterLoadAssignment::default()
    }
}

/// One call.
pub(crate) async fn hello(channel: &MeshChannel) -> Result<HelloReply, Status> {
    hello_with(channel, |_| {}).await
}

/// One call whose request is dressed up first.
pub(crate) async fn hello_with(
    channel: &MeshChannel,
    dress: impl FnOnce(&mut Request<HelloRequest>),
) -> Result<HelloReply, Status> {
    let mut request = Request::new(HelloRequest { name: "test".to_owned(), count: 0 });
    dress(&mut request);
    GreeterClient::new(channel.clone()).say_hello(request).await.map(tonic::Response::into_inner)
}

/// One call with an hour's deadline that must end far sooner.
pub(crate) async fn prompt_hello(channel: &MeshChannel) -> Result<HelloReply, Status> {
    let call = hello_with(channel, |r| r.set_timeout(HOUR));
    tokio::time::timeout(GUARD, call).await.expect("did not end promptly")
}

/// Asks again until `holds`.
pub(crate) async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let asked = async {
        while !holds().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(tokio::time::timeout(GUARD, asked).await.is_ok(), "never so: {what}");
}

/// Every part is in the text.
#[track_caller]
pub(crate) fn assert_says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
}
