//! Servers that do what the control plane says (gRFC A36).

use crate::{
    mtls::control_plane,
    support::{ANY, GUARD, TARGET, assert_says, hello, mesh_on, prompt_hello, routes, rule, service, to, until},
};
use envoy_types::{
    pb::{
        envoy::{
            config::{
                core::v3::{
                    Address, SocketAddress, TransportSocket, address::Address as Kind, socket_address::PortSpecifier,
                    transport_socket::ConfigType as SocketConfig,
                },
                listener::v3::{Filter, FilterChain, FilterChainMatch, Listener, filter::ConfigType},
                route::v3::{
                    NonForwardingAction, Route, RouteConfiguration, RouteMatch, VirtualHost, route::Action,
                    route_match::PathSpecifier,
                },
            },
            extensions::{
                filters::{
                    http::router::v3::Router,
                    network::http_connection_manager::v3::{
                        HttpConnectionManager, HttpFilter, http_connection_manager::RouteSpecifier, http_filter,
                    },
                },
                transport_sockets::tls::v3::{
                    CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext,
                    DownstreamTlsContext, common_tls_context::ValidationContextType,
                },
            },
        },
        google::protobuf::BoolValue,
    },
    util::pack_any,
};
use examples::greeter::{
    HelloReply, HelloRequest,
    greeter_server::{Greeter, GreeterServer},
};
use futures::stream::Empty;
use mesh_client::{ConnectionInfo, Inbound, Mesh, MeshBuilder, MeshChannel, inbound::Serving};
use mesh_control::ControlPlane;
use mesh_xds::server::ResourceType;
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
};
use tonic::{Code, Request, Response, Status, Streaming, service::Routes, transport::Server};

/// What the control plane's bootstrap says before `IP:PORT`.
const ISTIOS_NAME: &str = "xds.istio.io/grpc/lds/inbound/";
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// Says who called, and by which connection.
pub(crate) struct Porter;

#[tonic::async_trait]
impl Greeter for Porter {
    type SayHellosStream = Empty<Result<HelloReply, Status>>;
    type ChatStream = Empty<Result<HelloReply, Status>>;

    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let connection = request.extensions().get::<ConnectionInfo>().unwrap();
        let peer = connection.peer().and_then(|peer| peer.spiffe_id()).map(ToString::to_string).unwrap_or_default();
        let backend = connection.remote_addr().to_string();
        Ok(Response::new(HelloReply { peer, backend, ..HelloReply::default() }))
    }

    async fn say_hellos(&self, _: Request<HelloRequest>) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn chat(&self, _: Request<Streaming<HelloRequest>>) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

/// A server of a mesh, and a client that knows it as the greeter.
pub(crate) struct Pair {
    pub(crate) cp: ControlPlane,
    pub(crate) server: Mesh,
    pub(crate) inbound: Inbound,
    /// What the callback was told.
    pub(crate) told: Arc<Mutex<Vec<Serving>>>,
    _dir: tempfile::TempDir,
}

impl Pair {
    /// Over tonic's own server.
    pub(crate) async fn new() -> Self {
        Self::serving(|inbound| async move {
            let router = Server::builder().layer(inbound.layer()).add_service(GreeterServer::new(Porter));
            router.serve_with_incoming(inbound.incoming()).await.unwrap();
        })
        .await
    }

    pub(crate) async fn serving<F: Future<Output = ()> + Send + 'static>(serve: impl FnOnce(Inbound) -> F) -> Self {
        Self::of(|mesh| mesh, serve).await
    }

    /// The server's mesh as `change` has it.
    pub(crate) async fn of<F: Future<Output = ()> + Send + 'static>(
        change: impl FnOnce(MeshBuilder) -> MeshBuilder,
        serve: impl FnOnce(Inbound) -> F,
    ) -> Self {
        let (cp, dir) = control_plane().await;
        // Names that are nobody's but the test's.
        let bootstrap = cp.bootstrap().replace(ISTIOS_NAME, "server/");
        let server = change(Mesh::builder().bootstrap_json(&bootstrap).unwrap()).build().await.unwrap();
        let told: Arc<Mutex<Vec<Serving>>> = Arc::default();
        let hears = told.clone();
        let tell = move |serving: &Serving| hears.lock().unwrap().push(serving.clone());
        let inbound = server.inbound_builder().unwrap().on_serving(tell).bind(ANY).await.unwrap();
        tokio::spawn(serve(inbound.clone()));
        Self { cp, server, inbound, told, _dir: dir }
    }

    pub(crate) fn name(&self) -> String {
        format!("server/{}", self.inbound.local_addr())
    }

    pub(crate) fn serve(&self, listener: Listener) {
        self.cp.cache().update(ResourceType::Listener, self.name(), pack_any(listener));
    }

    pub(crate) fn listener(&self, filter_chains: Vec<FilterChain>) -> Listener {
        Listener { name: self.name(), address: socket(self.inbound.local_addr()), filter_chains, ..Listener::default() }
    }

    /// A channel to the server with this traffic policy. Tells the control plane before the server's listener is.
    pub(crate) async fn channel(&self, traffic: &str) -> MeshChannel {
        let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
        let yaml = service(&[("one", self.inbound.local_addr())]) + &route + &rule(traffic, &[]);
        self.cp.apply(&yaml).await.unwrap();
        mesh_on(&self.cp).await.channel(TARGET).unwrap()
    }

    async fn until_not_serving(&self, parts: &[&str]) {
        let reason = || match self.inbound.serving() {
            Serving::NotServing { reason } => reason.to_string(),
            _ => String::new(),
        };
        until("it stops to serve", async || parts.iter().all(|part| reason().contains(part))).await;
    }
}

fn socket(address: SocketAddr) -> Option<Address> {
    let address = SocketAddress {
        address: address.ip().to_string(),
        port_specifier: Some(PortSpecifier::PortValue(address.port().into())),
        ..SocketAddress::default()
    };
    Some(Address { address: Some(Kind::SocketAddress(address)) })
}

/// Filters before the router, and routes of all hosts.
pub(crate) fn manager(routes: Vec<Route>, filters: Vec<HttpFilter>) -> HttpConnectionManager {
    let host = VirtualHost { name: "all".into(), domains: vec!["*".into()], routes, ..VirtualHost::default() };
    let router = HttpFilter {
        name: "router".into(),
        config_type: Some(http_filter::ConfigType::TypedConfig(pack_any(Router::default()))),
        ..HttpFilter::default()
    };
    HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::RouteConfig(RouteConfiguration {
            virtual_hosts: vec![host],
            ..RouteConfiguration::default()
        })),
        http_filters: filters.into_iter().chain([router]).collect(),
        ..HttpConnectionManager::default()
    }
}

pub(crate) fn chain(name: &str, transport: &str, tls: Option<DownstreamTlsContext>) -> FilterChain {
    chain_with(name, transport, tls, |_| {})
}

/// The same, with more that its connection manager says.
pub(crate) fn chain_with(
    name: &str,
    transport: &str,
    tls: Option<DownstreamTlsContext>,
    says: impl FnOnce(&mut HttpConnectionManager),
) -> FilterChain {
    let route = Route {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".into())), ..RouteMatch::default() }),
        action: Some(Action::NonForwardingAction(NonForwardingAction {})),
        ..Route::default()
    };
    let mut manager = manager(vec![route], vec![]);
    says(&mut manager);
    FilterChain {
        name: name.into(),
        filter_chain_match: Some(FilterChainMatch {
            transport_protocol: transport.into(),
            ..FilterChainMatch::default()
        }),
        filters: vec![Filter { name: "http".into(), config_type: Some(ConfigType::TypedConfig(pack_any(manager))) }],
        transport_socket: tls.map(|tls| TransportSocket {
            name: "tls".into(),
            config_type: Some(SocketConfig::TypedConfig(pack_any(tls))),
        }),
        ..FilterChain::default()
    }
}

/// The workload's own certificate, and one wanted of clients.
pub(crate) fn mutual(instance: &str) -> DownstreamTlsContext {
    let provider = || {
        Some(CertificateProviderPluginInstance { instance_name: instance.into(), certificate_name: "default".into() })
    };
    let common = CommonTlsContext {
        tls_certificate_provider_instance: provider(),
        validation_context_type: Some(ValidationContextType::ValidationContext(CertificateValidationContext {
            ca_certificate_provider_instance: provider(),
            ..CertificateValidationContext::default()
        })),
        ..CommonTlsContext::default()
    };
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    }
}

#[tokio::test]
async fn a_server_serves_once_the_control_plane_says_how_and_until_it_says_no_more() {
    let pair = Pair::new().await;
    let channel = pair.channel("{}").await;
    assert!(!pair.inbound.serving().is_serving());
    let status = prompt_hello(&channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    pair.serve(pair.listener(vec![chain("plain", "", None)]));
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
    until("it serves", async || hello(&channel).await.is_ok()).await;

    // A bad update keeps the last good one.
    let bad =
        Listener { use_original_dst: Some(BoolValue { value: true }), ..pair.listener(vec![chain("x", "", None)]) };
    pair.serve(bad);
    until("the update is refused", async || {
        let resources = pair.server.status().unwrap().resources;
        resources.iter().any(|r| *r.name == *pair.name() && r.error_state.is_some())
    })
    .await;
    assert!(pair.inbound.serving().is_serving());
    hello(&channel).await.unwrap();

    // One for another address is none for this server.
    let elsewhere =
        Listener { address: socket("127.0.0.1:1".parse().unwrap()), ..pair.listener(vec![chain("x", "", None)]) };
    pair.serve(elsewhere);
    pair.until_not_serving(&["127.0.0.1:1", &pair.inbound.local_addr().to_string()]).await;
    pair.serve(pair.listener(vec![chain("plain", "", None)]));
    tokio::time::timeout(GUARD, pair.inbound.ready()).await.unwrap();
    pair.cp.cache().remove(ResourceType::Listener, &pair.name());
    pair.until_not_serving(&["does not exist", &pair.name()]).await;
    let fresh = mesh_on(&pair.cp).await.channel(TARGET).unwrap();
    assert_eq!(prompt_hello(&fresh).await.unwrap_err().code(), Code::Unavailable);
    let told: Vec<_> = pair.told.lock().unwrap().iter().map(Serving::is_serving).collect();
    assert_eq!(told, [true, false, true, false]);
}

#[tokio::test]
async fn connections_are_secured_as_the_filter_chain_that_takes_them_says() {
    let pair = Pair::new().await;
    let mutual_channel = pair.channel("{tls: {mode: ISTIO_MUTUAL}}").await;
    mutual_channel.ready(GUARD).await.unwrap();
    pair.serve(pair.listener(vec![chain("mutual", "", Some(mutual("default")))]));
    until("mutual TLS serves", async || hello(&mutual_channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;

    // STRICT: who speaks plaintext is refused.
    let plain_channel = pair.channel("{}").await;
    pair.serve(pair.listener(vec![chain("mutual", "", Some(mutual("default")))]));
    let status = prompt_hello(&plain_channel).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);

    // PERMISSIVE: both are taken, told apart by what they begin with.
    let both = vec![chain("mutual", "tls", Some(mutual("default"))), chain("plain", "raw_buffer", None)];
    pair.serve(pair.listener(both));
    until("plaintext is taken", async || hello(&plain_channel).await.is_ok_and(|reply| reply.peer.is_empty())).await;
    let mutual_channel = pair.channel("{tls: {mode: ISTIO_MUTUAL}}").await;
    let both = vec![chain("mutual", "tls", Some(mutual("default"))), chain("plain", "raw_buffer", None)];
    pair.serve(pair.listener(both));
    until("and so is TLS", async || hello(&mutual_channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
}

#[tokio::test]
async fn an_update_leaves_connections_alone_that_it_does_not_concern() {
    let pair = Pair::new().await;
    let channel = pair.channel("{}").await;
    pair.serve(pair.listener(vec![chain("plain", "raw_buffer", None)]));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let connection = hello(&channel).await.unwrap().backend;
    pair.serve(
        pair.listener(vec![chain("plain", "raw_buffer", None), chain("mutual", "tls", Some(mutual("default")))]),
    );
    let served = || pair.told.lock().unwrap().iter().filter(|serving| serving.is_serving()).count();
    until("the update is in force", async || served() == 2).await;
    for _ in 0..5 {
        assert_eq!(hello(&channel).await.unwrap().backend, connection);
    }
}

#[tokio::test]
async fn the_control_plane_decides_by_peer_authentication_who_may_connect() {
    let (cp, _dir) = control_plane().await;
    let server = mesh_on(&cp).await;
    let inbound = server.inbound(ANY).await.unwrap();
    let router = Server::builder().layer(inbound.layer()).add_service(GreeterServer::new(Porter));
    tokio::spawn(router.serve_with_incoming(inbound.incoming()));
    let policy = |mode: &str| {
        format!(
            "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {{name: default}}\nspec: {{mtls: {{mode: {mode}}}}}\n"
        )
    };
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let yaml = |mode: &str, traffic: &str| {
        service(&[("one", inbound.local_addr())]) + &route + &rule(traffic, &[]) + &policy(mode)
    };
    cp.apply(&yaml("STRICT", "{tls: {mode: ISTIO_MUTUAL}}")).await.unwrap();
    tokio::time::timeout(GUARD, inbound.ready()).await.unwrap();
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("mutual TLS serves", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
    cp.apply(&yaml("STRICT", "{tls: {mode: DISABLE}}")).await.unwrap();
    until("plaintext is refused", async || prompt_hello(&channel).await.is_err()).await;
    cp.apply(&yaml("PERMISSIVE", "{tls: {mode: DISABLE}}")).await.unwrap();
    until("plaintext is taken", async || hello(&channel).await.is_ok_and(|reply| reply.peer.is_empty())).await;
}

#[tokio::test]
async fn connections_of_a_filter_chain_that_is_gone_are_drained_without_a_failed_call() {
    let pair = Pair::serving(|inbound| async move {
        inbound.serve(Routes::new(GreeterServer::new(Porter))).await.unwrap();
    })
    .await;
    let channel = pair.channel("{}").await;
    pair.serve(pair.listener(vec![chain("one", "", None)]));
    until("it serves", async || hello(&channel).await.is_ok()).await;
    let first = hello(&channel).await.unwrap().backend;
    pair.serve(pair.listener(vec![chain("two", "", None)]));
    until("there is another connection", async || hello(&channel).await.unwrap().backend != first).await;
}

#[tokio::test]
async fn a_certificate_provider_that_the_server_lacks_is_refused_with_its_name() {
    let pair = Pair::new().await;
    pair.serve(pair.listener(vec![chain("mutual", "", Some(mutual("nobody")))]));
    pair.until_not_serving(&["\"nobody\"", "certificate_providers"]).await;
}

#[tokio::test]
async fn a_mesh_without_a_control_plane_or_template_cannot_say_what_a_server_does() {
    let none = Mesh::builder().build().await.unwrap();
    assert_says(&none.inbound(ANY).await.unwrap_err().to_string(), &["no control plane", "Inbound::builder"]);
    let json = r#"{"xds_servers": [{"server_uri": "127.0.0.1:1", "channel_creds": [{"type": "insecure"}]}]}"#;
    let mesh = Mesh::builder().bootstrap_json(json).unwrap().build().await.unwrap();
    assert_says(&mesh.inbound(ANY).await.unwrap_err().to_string(), &["server_listener_resource_name_template"]);
}

#[tokio::test]
async fn who_may_do_what_is_what_authorization_policies_say() {
    let (cp, _dir) = control_plane().await;
    let server = mesh_on(&cp).await;
    let inbound = server.inbound(ANY).await.unwrap();
    let serving = inbound.clone();
    tokio::spawn(async move { serving.serve(Routes::new(GreeterServer::new(Porter))).await.unwrap() });
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let yaml = |principal: &str| {
        let strict = "---\napiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default}\nspec: {mtls: {mode: STRICT}}\n";
        let policy = format!(
            "---\napiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: greeter}}\nspec:\n  action: ALLOW\n  rules: [{{from: [{{source: {{principals: [\"{principal}\"]}}}}]}}]\n"
        );
        service(&[("one", inbound.local_addr())])
            + &route
            + &rule("{tls: {mode: ISTIO_MUTUAL}}", &[])
            + strict
            + &policy
    };
    cp.apply(&yaml("cluster.local/ns/default/sa/client")).await.unwrap();
    tokio::time::timeout(GUARD, inbound.ready()).await.unwrap();
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    until("the caller is let in", async || hello(&channel).await.is_ok_and(|reply| reply.peer == CLIENT)).await;
    let connection = hello(&channel).await.unwrap().backend;
    // What requests are asked changes on the connections that are open.
    cp.apply(&yaml("cluster.local/ns/default/sa/somebody-else")).await.unwrap();
    until("the caller is let in no more", async || {
        hello(&channel).await.is_err_and(|status| status.code() == Code::PermissionDenied)
    })
    .await;
    cp.apply(&yaml("cluster.local/ns/default/sa/client")).await.unwrap();
    until("and again", async || hello(&channel).await.is_ok()).await;
    assert_eq!(hello(&channel).await.unwrap().backend, connection);
}
