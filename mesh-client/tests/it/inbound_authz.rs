//! Who may do what on a server: RBAC, tokens and limits from code, over mTLS and plaintext, on tonic's server and on hyper's.

use crate::support::{
    ANY,
    inbound::{Polite, Serving},
    plain_mesh,
    policies::{Authority, Tokens, get, plain, secured, tell, with_token},
};
use bytes::Bytes;
use examples::greeter::{
    HelloReply, HelloRequest,
    greeter_client::GreeterClient,
    greeter_server::{Greeter, GreeterServer},
};
use futures::{StreamExt, stream::BoxStream};
use http::Request;
use http_body_util::Empty;
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    ConnectionInfo, Inbound,
    inbound::{
        AuditEvent, AuditLogger, AuditLogging, CidrRange, ClientCertDetails, ForwardClientCert, ForwardedClient,
        InboundBuilder, JwtProvider, PathTemplate, RateLimit, Rbac, Rule, audit_logger,
    },
};
use mesh_tls::{Mode, ServerSettings};
use metrics_util::debugging::{DebugValue, DebuggingRecorder};
use std::{
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::task::AbortHandle;
use tonic::{Code, Status, Streaming, service::Routes, transport::Endpoint};
use tower::{Layer, ServiceExt};

/// A server that runs until the test ends.
struct Running {
    addr: SocketAddr,
    task: AbortHandle,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Authority {
    async fn serve(self, change: impl FnOnce(InboundBuilder) -> InboundBuilder) -> (Running, Self) {
        let inbound = change(Inbound::builder().tls(self.server())).bind(ANY).await.unwrap();
        (http(inbound), self)
    }
}

/// hyper's server behind the layer.
fn http(inbound: Inbound) -> Running {
    let (addr, layer, mut incoming) = (inbound.local_addr(), inbound.layer(), inbound.incoming());
    let task = tokio::spawn(async move {
        while let Some(stream) = incoming.next().await {
            let stream = stream.unwrap();
            let (info, layer) = (stream.info().clone(), layer.clone());
            let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
                request.extensions_mut().insert::<ConnectionInfo>(info.clone());
                layer.layer(tower::service_fn(tell)).oneshot(request)
            });
            tokio::spawn(async move {
                let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    Running { addr, task: task.abort_handle() }
}

#[tokio::test]
async fn callers_are_let_in_by_identity_namespace_path_and_method() {
    let rules = Rbac::allow()
        .rule("cart", Rule::new().spiffe_id("spiffe://cluster.local/ns/shop/sa/cart").path("/orders*"))
        .rule("web", Rule::new().namespace("web").method("GET").path("/read"))
        .rule("any", Rule::new().spiffe_id("*").path_template(PathTemplate::new("/items/{id}/price").unwrap()));
    let (server, authority) = Authority::new().serve(|builder| builder.authorize(rules)).await;
    let (cart, web, other) =
        (authority.client("shop", "cart"), authority.client("web", "front"), authority.client("shop", "x"));
    for (who, client, path, allowed) in [
        ("cart", &cart, "/orders", true),
        ("cart", &cart, "/orders/7?x=1", true),
        ("cart", &cart, "/read", false),
        ("web", &web, "/read", true),
        ("web", &web, "/orders", false),
        ("other", &other, "/orders", false),
        ("other", &other, "/items/7/price", true),
        ("other", &other, "/items/7/8/price", false),
    ] {
        let (status, body, _) = secured(server.addr, client, get(path)).await;
        let expected = if allowed { 200 } else { 403 };
        assert_eq!(status, expected, "{who} {path}: {body}");
        assert!(allowed || body == "RBAC: access denied", "{body}");
    }
    let post = Request::post("http://shop.test/read").body(Empty::new()).unwrap();
    assert_eq!(secured(server.addr, &web, post).await.0, 403);
    assert_eq!(plain(server.addr, get("/items/7/price")).await.0, 403, "\"*\" wants an identity");
}

#[tokio::test]
async fn denials_come_before_what_is_allowed_and_not_means_everybody_else() {
    let (server, authority) = Authority::new()
        .serve(|builder| {
            let deny = Rbac::deny()
                .rule("admin", Rule::new().path("/admin*").not_namespace("ops"))
                .rule("header", Rule::new().header("x-blocked", "yes"))
                .rule("host", Rule::new().host("*.internal"));
            let everybody =
                Rbac::allow().rule("all", Rule::new().not_spiffe_id("spiffe://cluster.local/ns/web/sa/bad"));
            builder.authorize(deny).authorize(everybody)
        })
        .await;
    let (ops, web, bad) =
        (authority.client("ops", "root"), authority.client("web", "front"), authority.client("web", "bad"));
    assert_eq!(secured(server.addr, &ops, get("/admin/x")).await.0, 200);
    assert_eq!(secured(server.addr, &web, get("/admin/x")).await.0, 403);
    assert_eq!(plain(server.addr, get("/admin/x")).await.0, 403, "nobody is of namespace ops without a certificate");
    assert_eq!(secured(server.addr, &web, get("/x")).await.0, 200);
    assert_eq!(secured(server.addr, &bad, get("/x")).await.0, 403);
    let mut blocked = get("/x");
    blocked.headers_mut().insert("x-blocked", "yes".parse().unwrap());
    assert_eq!(plain(server.addr, blocked).await.0, 403);
    let internal = Request::get("http://A.Internal/x").body(Empty::new()).unwrap();
    assert_eq!(plain(server.addr, internal).await.0, 403);
}

#[tokio::test]
async fn addresses_are_those_of_the_connection_whatever_headers_say() {
    let loopback = CidrRange::new([127, 0, 0, 0].into(), 8).unwrap();
    let elsewhere = CidrRange::new([10, 0, 0, 0].into(), 8).unwrap();
    for (rule, status) in [
        (Rule::new().from_addresses(loopback), 200),
        (Rule::new().from_addresses(elsewhere), 403),
        (Rule::new().not_from_addresses(elsewhere), 200),
    ] {
        let (server, _) = Authority::new().serve(|builder| builder.authorize(Rbac::allow().rule("ip", rule))).await;
        let mut request = get("/");
        request.headers_mut().insert("x-forwarded-for", "10.1.2.3".parse().unwrap());
        assert_eq!(plain(server.addr, request).await.0, status);
    }
}

#[derive(Default)]
struct Heard(Mutex<Vec<String>>);

impl AuditLogger for Heard {
    fn log(&self, event: &AuditEvent<'_>) {
        let AuditEvent { rpc_method, principal, matched_rule, authorized, shadow, .. } = event;
        self.0.lock().unwrap().push(format!("{rpc_method} {principal} {matched_rule} {authorized} {shadow}"));
    }
}

#[tokio::test]
async fn shadow_rules_change_nothing_and_audit_hears_of_them() {
    let heard = Arc::new(Heard::default());
    let audit = AuditLogging { on_deny: true, on_allow: true, loggers: vec![audit_logger("test", heard.clone())] };
    let (server, authority) = Authority::new()
        .serve(|builder| builder.authorize(Rbac::deny().rule("all", Rule::new().path("/secret")).audit(audit).shadow()))
        .await;
    let cart = authority.client("shop", "cart");
    assert_eq!(secured(server.addr, &cart, get("/secret")).await.0, 200);
    assert_eq!(plain(server.addr, get("/open")).await.0, 200);
    let id = "spiffe://cluster.local/ns/shop/sa/cart";
    assert_eq!(*heard.0.lock().unwrap(), [format!("/secret {id} all false true"), "/open   true true".to_owned()]);
}

#[tokio::test]
async fn tokens_are_verified_and_their_claims_decide() {
    let tokens = Tokens::new();
    let provider = JwtProvider::inline("https://issuer", tokens.jwks()).audience("shop").optional();
    let rules = Rbac::allow()
        .rule("anna", Rule::new().token("https://issuer", "anna").path("/mine"))
        .rule("admins", Rule::new().claim("groups", "admin"))
        .rule("open", Rule::new().path("/open"));
    let (server, _) = Authority::new().serve(|builder| builder.jwt(provider).authorize(rules)).await;
    let claims = |sub: &str, groups: &[&str]| {
        let exp = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs() + 600;
        serde_json::json!({"iss": "https://issuer", "sub": sub, "aud": "shop", "exp": exp, "groups": groups})
    };
    let anna = tokens.token(&claims("anna", &["users"]));
    let (status, body, _) = plain(server.addr, with_token("/mine", &anna)).await;
    assert_eq!(status, 200, "{body}");
    assert!(body.contains("subject=anna"), "{body}");
    assert_eq!(plain(server.addr, with_token("/other", &anna)).await.0, 403);
    let root = tokens.token(&claims("root", &["users", "admin"]));
    assert_eq!(plain(server.addr, with_token("/other", &root)).await.0, 200);
    assert_eq!(plain(server.addr, get("/open")).await.0, 200, "a token is optional");
    assert_eq!(plain(server.addr, get("/mine")).await.0, 403);
    let forged = Tokens::new().token(&claims("anna", &["admin"]));
    let (status, body, headers) = plain(server.addr, with_token("/open", &forged)).await;
    assert_eq!((status, body.as_str()), (401, "Jwt verification fails"), "a bad one is never ignored");
    let challenge = headers["www-authenticate"].to_str().unwrap();
    assert!(challenge.starts_with("Bearer realm=") && challenge.ends_with("error=\"invalid_token\""), "{challenge}");
}

#[tokio::test]
async fn tokens_of_several_providers_decide_together() {
    let (users, devices) = (Tokens::new(), Tokens::new());
    let user = JwtProvider::inline("https://users", users.jwks());
    let device = JwtProvider::inline("https://devices", devices.jwks()).optional().configure(|provider| {
        provider.from_params = vec!["device".into()];
        provider.payload_in_metadata = "device".into();
    });
    let anna = Rbac::allow().rule("anna", Rule::new().token("https://users", "anna"));
    let (server, _) = Authority::new().serve(|builder| builder.jwt(user).jwt(device).authorize(anna)).await;
    let token = |by: &Tokens, issuer: &str, sub: &str| by.token(&serde_json::json!({"iss": issuer, "sub": sub}));
    let anna = token(&users, "https://users", "anna");
    let device = token(&devices, "https://devices", "phone");
    let (status, body, _) = plain(server.addr, with_token(&format!("/?device={device}"), &anna)).await;
    assert_eq!(status, 200, "the second token does not hide the first: {body}");
    assert!(body.contains("subject=anna"), "{body}");
    assert_eq!(plain(server.addr, with_token("/", &anna)).await.0, 200);
    let forged = format!("/?device={device}&%64evice={}", token(&users, "https://devices", "phone"));
    let (status, body, _) = plain(server.addr, with_token(&forged, &anna)).await;
    assert_eq!((status, body.as_str()), (401, "Jwt verification fails"), "the handler may look at the last");
}

#[tokio::test]
async fn limits_are_of_all_or_of_each_identity() {
    let hour = Duration::from_secs(3600);
    let (server, authority) =
        Authority::new().serve(|builder| builder.rate_limit(RateLimit::per_identity(2, hour))).await;
    let (a, b) = (authority.client("shop", "a"), authority.client("shop", "b"));
    let mut statuses = Vec::new();
    for client in [&a, &a, &a, &b, &b, &b] {
        statuses.push(secured(server.addr, client, get("/")).await.0);
    }
    assert_eq!(statuses, [200, 200, 429, 200, 200, 429]);
    let (server, authority) = Authority::new().serve(|builder| builder.rate_limit(RateLimit::total(3, hour))).await;
    let a = authority.client("shop", "a");
    let mut statuses = Vec::new();
    for _ in 0..2 {
        statuses.push(secured(server.addr, &a, get("/")).await.0);
        statuses.push(plain(server.addr, get("/")).await.0);
    }
    assert_eq!(statuses, [200, 200, 200, 429]);
}

#[tokio::test]
async fn the_clients_certificate_is_told_on_and_cannot_be_forged() {
    let forged = |mut request: Request<Empty<Bytes>>| {
        request.headers_mut().insert("x-forwarded-client-cert", "URI=spiffe://evil".parse().unwrap());
        request
    };
    let (server, _) = Authority::new().serve(|builder| builder).await;
    assert!(plain(server.addr, forged(get("/"))).await.1.ends_with("xfcc=-"), "taken away by default");
    let details = ClientCertDetails { uri: true, subject: true, ..ClientCertDetails::default() };
    let set = ForwardClientCert::SanitizeSet;
    let (server, authority) = Authority::new().serve(|builder| builder.forward_client_cert(set, details)).await;
    let cart = authority.client("shop", "cart");
    let (_, body, _) = secured(server.addr, &cart, forged(get("/"))).await;
    let hops = ForwardedClient::parse(body.split_once("xfcc=").unwrap().1).unwrap();
    assert_eq!(hops.len(), 1, "{body}");
    assert_eq!(hops[0].uri, ["spiffe://cluster.local/ns/shop/sa/cart"]);
    assert_eq!(hops[0].by, ["spiffe://cluster.local/ns/shop/sa/server"]);
    assert_eq!(hops[0].hash.as_ref().map(String::len), Some(64));
    assert!(plain(server.addr, forged(get("/"))).await.1.ends_with("xfcc=-"), "plaintext proves nothing");
    let append = ForwardClientCert::AppendForward;
    let (server, authority) = Authority::new().serve(|builder| builder.forward_client_cert(append, details)).await;
    let (_, body, _) = secured(server.addr, &authority.client("shop", "cart"), forged(get("/"))).await;
    let hops = ForwardedClient::parse(body.split_once("xfcc=").unwrap().1).unwrap();
    assert_eq!(
        hops.iter().map(|hop| hop.uri[0].as_str()).collect::<Vec<_>>(),
        ["spiffe://evil", "spiffe://cluster.local/ns/shop/sa/cart"]
    );
}

#[tokio::test]
async fn the_trace_of_the_caller_surrounds_the_handler() {
    let (server, _) = Authority::new().serve(|builder| builder).await;
    let mut request = get("/");
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    request.headers_mut().insert("traceparent", parent.parse().unwrap());
    let (_, body, _) = plain(server.addr, request).await;
    assert!(body.contains("trace=0af7651916cd43dd8448eb211c80319c"), "{body}");
    assert!(plain(server.addr, get("/")).await.1.contains("trace=-"));
}

const DENIED: &str = "rbac_access_denied_matched_policy[secret]";

#[test]
fn requests_that_are_served_are_counted_and_logged() {
    let recorder = DebuggingRecorder::new();
    let snapshotter = recorder.snapshotter();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let logged = log.clone();
    metrics::with_local_recorder(&recorder, || {
        runtime.block_on(async {
            let rules = Rbac::deny().rule("secret", Rule::new().path("/secret"));
            let (server, authority) = Authority::new()
                .serve(|builder| {
                    let builder = builder.service("shop.prod.svc.cluster.local").authorize(rules);
                    builder.access_log(move |record| logged.lock().unwrap().push(record.to_json()))
                })
                .await;
            let cart = authority.client("shop", "cart");
            assert_eq!(secured(server.addr, &cart, get("/x")).await.0, 200);
            assert_eq!(secured(server.addr, &cart, get("/secret")).await.0, 403);
            assert_eq!(plain(server.addr, get("/x")).await.0, 200);
        });
    });
    let cart = "spiffe://cluster.local/ns/shop/sa/cart";
    let counted = snapshotter.snapshot().into_vec();
    let total = |wanted: &[(&str, &str)]| -> u64 {
        let of = |key: &metrics::Key| {
            wanted.iter().all(|(name, value)| key.labels().any(|l| l.key() == *name && l.value() == *value))
        };
        let totals = counted.iter().filter(|(key, ..)| key.key().name() == "istio_requests_total" && of(key.key()));
        totals.map(|(.., value)| if let DebugValue::Counter(n) = value { *n } else { 0 }).sum()
    };
    let known = [
        ("reporter", "destination"),
        ("source_principal", cart),
        ("source_workload_namespace", "shop"),
        ("connection_security_policy", "mutual_tls"),
        ("destination_service_name", "shop"),
        ("destination_service_namespace", "prod"),
    ];
    assert_eq!(total(&known), 2);
    assert_eq!(total(&[known[1], ("response_code", "403")]), 1);
    assert_eq!(total(&[("source_principal", "unknown"), ("connection_security_policy", "none")]), 1);
    let log = log.lock().unwrap();
    assert_eq!(log.len(), 3);
    let first = &log[0];
    assert_eq!((&first["direction"], &first["peer"], &first["path"]), (&"inbound".into(), &cart.into(), &"/x".into()));
    assert_eq!((&first["response_code"], &first["response_code_details"]), (&200.into(), &"via_upstream".into()));
    assert!(first["bytes_sent"].as_u64().unwrap() > 0);
    assert_eq!((&log[1]["response_code"], &log[1]["response_code_details"]), (&403.into(), &DENIED.into()));
    assert!(log[2]["peer"].is_null());
}

#[derive(Clone)]
struct Service_;

#[tonic::async_trait]
impl Greeter for Service_ {
    type SayHellosStream = BoxStream<'static, Result<HelloReply, Status>>;
    type ChatStream = BoxStream<'static, Result<HelloReply, Status>>;

    async fn say_hello(&self, request: tonic::Request<HelloRequest>) -> Result<tonic::Response<HelloReply>, Status> {
        let message = format!("Hello {}", request.into_inner().name);
        Ok(tonic::Response::new(HelloReply { message, ..HelloReply::default() }))
    }

    async fn say_hellos(
        &self,
        _: tonic::Request<HelloRequest>,
    ) -> Result<tonic::Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn chat(
        &self,
        _: tonic::Request<Streaming<HelloRequest>>,
    ) -> Result<tonic::Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[tokio::test]
async fn the_policy_holds_on_our_own_transport_for_callers_of_the_mesh() {
    let authority = Authority::new();
    let rules = Rbac::allow()
        .rule("hello", Rule::new().path("/helloworld.Greeter/SayHello").port(0))
        .rule("plain", Rule::new().path("/helloworld.Greeter/SayHello").method("POST"));
    let settings = ServerSettings { mode: Mode::Permissive, ..authority.server() };
    let inbound = Inbound::builder().tls(settings).authorize(rules).bind(ANY).await.unwrap();
    let serving = Serving::of(inbound, Routes::new(GreeterServer::new(Polite)));
    let mesh = plain_mesh().await;
    let mut client = GreeterClient::new(mesh.fixed_channel(&[serving.addr]).unwrap());
    let request = || HelloRequest { name: "x".into(), count: 1 };
    assert_eq!(client.say_hello(request()).await.unwrap().into_inner().message, "Hello x");
    let denied = client.say_hellos(request()).await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::PermissionDenied, "RBAC: access denied"));
    assert_eq!(client.say_hello(request()).await.unwrap().into_inner().message, "Hello x", "the connection goes on");
    serving.end().await;
}

#[tokio::test]
async fn grpc_callers_get_permission_denied_and_their_trailers() {
    let rules = Rbac::allow().rule("hello", Rule::new().path("/helloworld.Greeter/SayHello"));
    let inbound = Inbound::builder().authorize(rules).bind(ANY).await.unwrap();
    let addr = inbound.local_addr();
    let server = tonic::transport::Server::builder()
        .layer(inbound.layer())
        .add_routes(Routes::new(GreeterServer::new(Service_)))
        .serve_with_incoming(inbound.incoming());
    let task = tokio::spawn(server);
    let channel = Endpoint::try_from(format!("http://{addr}")).unwrap().connect().await.unwrap();
    let mut client = GreeterClient::new(channel);
    let request = || HelloRequest { name: "x".into(), count: 1 };
    assert_eq!(client.say_hello(request()).await.unwrap().into_inner().message, "Hello x");
    let denied = client.say_hellos(request()).await.unwrap_err();
    assert_eq!((denied.code(), denied.message()), (Code::PermissionDenied, "RBAC: access denied"));
    task.abort();
}
