//! Whom a server's certificate must be for, where a cluster's settings name nobody: the host, as Istio and Envoy have it.

use crate::support::{
    ANY, CLUSTER, GUARD, TARGET, assert_says, assignment, edit, edit_cluster, hello,
    inbound::Serving,
    mesh_on,
    policies::{Issuer, Tokens, plain, serve, with_token},
    prompt_hello, routes, rule, service, to,
};
use bytes::Bytes;
use envoy_types::{
    pb::envoy::{
        config::{
            cluster::v3::Cluster,
            core::v3::{HealthStatus, UpstreamHttpProtocolOptions, transport_socket::ConfigType},
            endpoint::v3::{ClusterLoadAssignment, lb_endpoint::HostIdentifier},
            route::v3::{RouteConfiguration, route, route_action::ClusterSpecifier},
        },
        extensions::{
            transport_sockets::tls::v3::{UpstreamTlsContext, common_tls_context::ValidationContextType},
            upstreams::http::v3::HttpProtocolOptions,
        },
    },
    util::pack_any,
};
use examples::{
    backend::{Backend, Options},
    server::tls,
};
use http::{Request, Response, Uri};
use http_body_util::Full;
use mesh_client::{
    Inbound, Mesh,
    inbound::{JwtProvider, RequestBody},
};
use mesh_control::ControlPlane;
use mesh_tls::{Acceptor, ClientAuth, ClientSettings, PeerCheck, Roots, ServerSettings, default_provider};
use mesh_xds::server::ResourceType;
use prost::Message;
use rcgen::SanType;
use std::convert::Infallible;
use tempfile::TempDir;
use tonic::Code;

const HOST: &str = "greeter.default.svc.cluster.local";
const OPTIONS: &str = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions";

fn dns(name: &str) -> Vec<SanType> {
    vec![SanType::DnsName(name.try_into().unwrap())]
}

/// Without certificates of clients.
fn settings(issuer: &Issuer, name: &str) -> ServerSettings {
    let settings = ServerSettings::mtls(issuer.source("server", dns(name)));
    ServerSettings { client_auth: ClientAuth::Off, check: PeerCheck::Chain, ..settings }
}

/// A greeter whose certificate is for this name.
async fn named(issuer: &Issuer, name: &str) -> Backend {
    let acceptor = Acceptor::new(settings(issuer, name), default_provider()).unwrap();
    Backend::start(name, ANY, Options { accept: tls(acceptor), ..Options::default() }).await.unwrap()
}

/// The greeter is spoken to with TLS, below the roots of this authority.
async fn control_plane(issuer: &Issuer, backend: &Backend) -> (ControlPlane, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, issuer.roots()).unwrap();
    let route = routes(&format!("[{{route: [{{destination: {}}}], retries: {{attempts: 0}}}}]", to("")));
    let simple = rule(&format!("{{tls: {{mode: SIMPLE, caCertificates: {}}}}}", ca.display()), &[]);
    let cp = ControlPlane::builder().start().await.unwrap();
    cp.apply(&(service(&[("one", backend.addr())]) + &route + &simple)).await.unwrap();
    (cp, dir)
}

/// Takes away what our control plane says of names, and says what Envoy's do.
fn by_host(cluster: &mut Cluster, auto_san_validation: bool) {
    let socket = cluster.transport_socket.as_mut().unwrap();
    let Some(ConfigType::TypedConfig(any)) = &mut socket.config_type else { panic!() };
    let mut context = UpstreamTlsContext::decode(&*any.value).unwrap();
    context.sni.clear();
    context.auto_sni_san_validation = false;
    let common = context.common_tls_context.as_mut().unwrap();
    let Some(ValidationContextType::ValidationContext(validation)) = &mut common.validation_context_type else {
        panic!()
    };
    #[allow(deprecated, reason = "what our control plane fills")]
    validation.match_subject_alt_names.clear();
    *any = pack_any(context);
    let options = cluster.typed_extension_protocol_options.get_mut(OPTIONS).unwrap();
    let mut said = HttpProtocolOptions::decode(&*options.value).unwrap();
    let named = UpstreamHttpProtocolOptions { auto_sni: true, auto_san_validation, ..Default::default() };
    said.upstream_http_protocol_options = Some(named);
    *options = pack_any(said);
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused_where_a_destination_rule_names_nobody() {
    let issuer = Issuer::new();
    let (good, other) = (named(&issuer, HOST).await, named(&issuer, "other.test").await);
    let (cp, _dir) = control_plane(&issuer, &good).await;
    let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
    hello(&channel).await.unwrap();
    let (cp, _dir) = control_plane(&issuer, &other).await;
    let status = prompt_hello(&mesh_on(&cp).await.channel(TARGET).unwrap()).await.unwrap_err();
    assert_eq!((status.code(), other.state().calls()), (Code::Unavailable, 0));
    assert_says(status.message(), &["the server's certificate", HOST, "other.test"]);
}

#[tokio::test]
async fn a_certificate_for_another_host_is_refused_where_envoys_options_ask_for_the_host() {
    let issuer = Issuer::new();
    for (name, verified, good) in [(HOST, true, true), ("other.test", true, false), ("other.test", false, true)] {
        let backend = named(&issuer, name).await;
        let (cp, _dir) = control_plane(&issuer, &backend).await;
        edit_cluster(&cp, CLUSTER, |cluster| by_host(cluster, verified));
        let said = prompt_hello(&mesh_on(&cp).await.channel(TARGET).unwrap()).await;
        assert_eq!(said.is_ok(), good, "{name}, verified: {verified}: {said:?}");
        if let Err(status) = said {
            assert_says(status.message(), &["the server's certificate", HOST, "other.test"]);
        }
    }
}

/// The same for a cluster that has no service's name: the endpoint has the host.
#[tokio::test]
async fn the_endpoint_says_which_host_it_is_where_the_cluster_does_not() {
    let issuer = Issuer::new();
    let backend = named(&issuer, "one.test").await;
    let (cp, _dir) = control_plane(&issuer, &backend).await;
    let served = cp.cache().resources().get(ResourceType::Cluster, CLUSTER).unwrap().clone();
    let mut cluster = Cluster::decode(&*served.value).unwrap();
    by_host(&mut cluster, true);
    cluster.eds_cluster_config.as_mut().unwrap().service_name = CLUSTER.to_owned();
    cluster.name = "plain".to_owned();
    cp.cache().update(ResourceType::Cluster, "plain", pack_any(cluster));
    let served = cp.cache().resources();
    for (name, _) in served.iter(ResourceType::RouteConfiguration) {
        edit(&cp, ResourceType::RouteConfiguration, name, |routes: &mut RouteConfiguration| {
            for route in routes.virtual_hosts.iter_mut().flat_map(|host| &mut host.routes) {
                let Some(route::Action::Route(action)) = &mut route.action else { continue };
                action.cluster_specifier = Some(ClusterSpecifier::Cluster("plain".to_owned()));
            }
        });
    }
    let endpoint_is = |host: &str| {
        let mut endpoints: ClusterLoadAssignment = assignment(&[&[backend.addr()]], HealthStatus::Healthy);
        let Some(HostIdentifier::Endpoint(endpoint)) = &mut endpoints.endpoints[0].lb_endpoints[0].host_identifier
        else {
            panic!()
        };
        endpoint.hostname = host.to_owned();
        cp.cache().update(ResourceType::ClusterLoadAssignment, CLUSTER, pack_any(endpoints));
    };
    for (host, wrong) in [("", Some("by name")), ("other.test", Some("other.test")), ("one.test:443", None)] {
        endpoint_is(host);
        let channel = mesh_on(&cp).await.channel(TARGET).unwrap();
        channel.ready(GUARD).await.unwrap();
        let said = prompt_hello(&channel).await;
        match (said, wrong) {
            (Ok(_), None) => {}
            (Err(status), Some(part)) => assert_says(status.message(), &[part]),
            (said, _) => panic!("{host}: {said:?}"),
        }
    }
}

#[tokio::test]
async fn keys_that_an_https_uri_names_are_believed_to_its_host_alone() {
    let (issuer, tokens) = (Issuer::new(), Tokens::new());
    let set = tokens.jwks();
    let answer = move |_: Request<RequestBody>| {
        let set = set.clone();
        async move { Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(set)))) }
    };
    let inbound = Inbound::builder().tls(settings(&issuer, "*.issuer.test")).bind(ANY).await.unwrap();
    let keys = Serving::of(inbound, tower::service_fn(answer));
    // Whoever the authority knows may answer: no name is asked for.
    let client = ClientSettings::new(Roots::Source(issuer.source("roots", dns("x.test"))));
    let mesh = Mesh::builder().fallback_tls(client).build().await.unwrap();
    let channel = mesh.fixed_channel(&[keys.addr]).unwrap();
    let token = tokens.of("https://issuer", "anna");
    for (uri, expected) in [
        ("https://keys.issuer.test/keys", 200),
        ("https://keys.other.test/keys", 401),
        ("https://127.0.0.1/keys", 401),
        ("http://keys.other.test/keys", 200),
    ] {
        let provider = JwtProvider::fetched("https://issuer", channel.clone(), Uri::from_static(uri));
        let serving = serve(Inbound::builder().jwt(provider)).await;
        let (status, body, _) = plain(serving.addr, with_token("/", &token)).await;
        assert_eq!(status, expected, "{uri}: {body}");
    }
}
