//! Plain HTTP through `mesh.layer()`: known hosts are routed by the mesh, all others go to the inner client.

use crate::support::{GUARD, HOUR, assert_says, http_backend, mesh_on, until};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use mesh_client::{BoxError, Error, LayerBody, Mesh};
use mesh_control::ControlPlane;
use std::{convert::Infallible, net::SocketAddr, time::Duration};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};
use tower::{Layer, ServiceExt, service_fn};

pub(crate) const URI: &str = "http://reviews.default.svc.cluster.local:9080/reviews/1";
const CLUSTER: &str = "outbound|9080||reviews.default.svc.cluster.local";

pub(crate) type Body = Full<Bytes>;

/// The reviews' ServiceEntry, a route with these fields, and this traffic policy.
pub(crate) fn reviews(endpoints: &[SocketAddr], route: &str, traffic: &str) -> String {
    let endpoint = |a: &SocketAddr| format!("  - {{address: {}, ports: {{http: {}}}}}\n", a.ip(), a.port());
    let endpoints: String = endpoints.iter().map(endpoint).collect();
    let host = "reviews.default.svc.cluster.local";
    let head = "apiVersion: networking.istio.io/v1\nmetadata: {name: reviews}\n";
    format!(
        "{head}kind: ServiceEntry\nspec:\n  hosts: [{host}]\n  resolution: STATIC\n  ports: [{{number: 9080, name: http, \
         protocol: HTTP}}]\n  endpoints:\n{endpoints}---\n{head}kind: VirtualService\nspec:\n  hosts: [{host}]\n  http: \
         [{{route: [{{destination: {{host: {host}}}}}], {route}}}]\n---\n{head}kind: DestinationRule\nspec: {{host: \
         {host}, trafficPolicy: {traffic}}}\n"
    )
}

/// A request through the layer; the inner client answers `inner: URI`.
pub(crate) async fn send(mesh: &Mesh, request: Request<Body>) -> Result<Response<LayerBody<Body>>, BoxError> {
    let inner = service_fn(|request: Request<Body>| async move {
        Ok::<_, Infallible>(Response::new(Body::from(format!("inner: {}", request.uri()))))
    });
    tokio::time::timeout(GUARD, mesh.layer().layer(inner).oneshot(request)).await.expect("hangs")
}

pub(crate) fn get(uri: &str) -> Request<Body> {
    Request::get(uri).body(Body::default()).unwrap()
}

pub(crate) async fn text<R>(response: Response<LayerBody<R>>) -> String
where
    R: http_body::Body<Data = Bytes>,
    R::Error: Into<BoxError>,
{
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn of_mesh(error: &BoxError) -> &Error {
    error.downcast_ref().expect("an error of the mesh")
}

#[tokio::test]
async fn known_hosts_are_routed_and_all_others_go_to_the_inner_client() {
    let backend = http_backend("r1").await;
    let cp = ControlPlane::builder().yaml(reviews(&[backend.addr()], "timeout: 10s", "{}")).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let response = send(&mesh, get(URI)).await.unwrap();
    assert!(response.body().is_mesh());
    assert_eq!(text(response).await, "hello from r1 at /reviews/1\n");
    let by_header = Request::get("/by-header").header("host", "reviews.default.svc.cluster.local:9080");
    assert_eq!(
        text(send(&mesh, by_header.body(Body::default()).unwrap()).await.unwrap()).await,
        "hello from r1 at /by-header\n"
    );

    for uri in ["http://elsewhere.example/", "https://reviews.default.svc.cluster.local:9080/", "/no-host"] {
        let response = send(&mesh, get(uri)).await.unwrap();
        assert!(!response.body().is_mesh(), "{uri}");
        assert_eq!(text(response).await, format!("inner: {uri}"));
    }
    assert_eq!(backend.state().calls(), 2);
}

#[tokio::test]
async fn a_host_can_join_and_leave_the_mesh() {
    let backend = http_backend("r1").await;
    let cp = ControlPlane::builder().start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let layer = mesh.layer();
    let through_mesh = async || {
        let inner = service_fn(|_| async { Ok::<_, Infallible>(Response::new(Body::from("inner"))) });
        layer.layer(inner).oneshot(get(URI)).await.unwrap().body().is_mesh()
    };
    assert!(!through_mesh().await);
    cp.apply(&reviews(&[backend.addr()], "timeout: 10s", "{}")).await.unwrap();
    until("the host has joined", through_mesh).await;
    cp.apply("").await.unwrap();
    until("the host has left", async || !through_mesh().await).await;
}

#[tokio::test]
async fn http_conditions_are_retried_on_another_endpoint() {
    let (good, bad) = (http_backend("good").await, http_backend("bad").await);
    bad.state().set_unavailable(true);
    let endpoints = [good.addr(), bad.addr()];
    let retries = "retries: {attempts: 2, retryOn: \"gateway-error,reset,connect-failure\", backoff: 1ms}";
    let cp = ControlPlane::builder().yaml(reviews(&endpoints, retries, "{}")).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let layer = mesh.layer();
    for n in 0..20 {
        let inner = service_fn(|_| async { Err::<Response<Body>, _>("not for the inner client") });
        let request = Request::post(URI).body(Body::from(format!("body {n}"))).unwrap();
        let response = layer.layer(inner).oneshot(request).await.unwrap();
        assert_eq!((response.status(), &response.headers()["x-backend"]), (StatusCode::OK, &"good".parse().unwrap()));
    }
    assert!(bad.state().failed() >= 5, "{} retries", bad.state().failed());

    cp.apply(&reviews(&[bad.addr()], "retries: {attempts: 0}", "{}")).await.unwrap();
    until("the answer comes as it is", async || {
        send(&mesh, get(URI)).await.unwrap().status() == StatusCode::SERVICE_UNAVAILABLE
    })
    .await;
}

#[tokio::test]
async fn timeouts_and_faults_hold() {
    let backend = http_backend("slow").await;
    backend.state().set_delay(HOUR);
    let yaml = reviews(&[backend.addr()], "timeout: 100ms, retries: {attempts: 0}", "{}");
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let error = send(&mesh, get(URI)).await.unwrap_err();
    let error = of_mesh(&error);
    assert!(error.is_timeout());
    assert_eq!(error.http_status(), StatusCode::GATEWAY_TIMEOUT);
    assert_says(&error.to_string(), &["deadline of 100ms exceeded", CLUSTER, &backend.addr().to_string()]);
    until("the server was told", async || backend.state().in_flight() == 0).await;

    let abort = "fault: {abort: {percentage: {value: 100}, httpStatus: 418}}";
    cp.apply(&reviews(&[backend.addr()], abort, "{}")).await.unwrap();
    until("the fault is injected", async || {
        send(&mesh, get(URI)).await.is_ok_and(|r| r.status() == StatusCode::IM_A_TEAPOT)
    })
    .await;
}

#[tokio::test]
async fn one_connection_and_one_in_line_is_all_that_is_admitted() {
    let backend = http_backend("slow").await;
    backend.state().set_delay(HOUR);
    let limits = "{connectionPool: {tcp: {maxConnections: 1}, http: {http1MaxPendingRequests: 1}}}";
    let yaml = reviews(&[backend.addr()], "retries: {attempts: 0}", limits);
    let cp = ControlPlane::builder().yaml(yaml).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let request = || {
        let mesh = mesh.clone();
        tokio::spawn(async move { send(&mesh, get(URI)).await.map(|r| r.status()) })
    };
    let first = request();
    until("the first request is in flight", async || backend.state().in_flight() == 1).await;
    let channel = {
        let line = || mesh.explain(&get(URI).into_parts().0).to_string();
        let second = request();
        until("the second request is in line", async || line().contains("max_pending_requests 1 of 1")).await;
        second
    };
    let error = send(&mesh, get(URI)).await.unwrap_err();
    let error = of_mesh(&error);
    assert!(error.is_overloaded() && error.is_local(), "{error:?}");
    assert_says(&error.to_string(), &[CLUSTER, "circuit breaker is open", "limit of 1 reached"]);

    backend.state().set_delay(Duration::ZERO);
    first.abort();
    assert_eq!(channel.await.unwrap().unwrap(), StatusCode::OK, "the second has its turn");
    assert_eq!(backend.state().calls(), 2);
}

#[tokio::test]
async fn connections_are_used_again() {
    let backend = http_backend("r1").await;
    let cp = ControlPlane::builder().yaml(reviews(&[backend.addr()], "timeout: 10s", "{}")).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    for _ in 0..20 {
        text(send(&mesh, get(URI)).await.unwrap()).await;
    }
    assert_eq!((backend.state().calls(), backend.connections()), (20, 1));
}

#[tokio::test]
async fn a_response_that_is_cut_fails_through_its_body() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        let mut request = [0; 1024];
        assert!(tcp.read(&mut request).await.unwrap() > 0);
        tcp.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await.unwrap();
    });
    let cp = ControlPlane::builder().yaml(reviews(&[addr], "timeout: 10s", "{}")).start().await.unwrap();
    let mesh = mesh_on(&cp).await;
    let response = send(&mesh, get(URI)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    let error = response.into_body().collect().await.unwrap_err();
    assert_says(&of_mesh(&error).to_string(), &["the response was cut off", CLUSTER, &addr.to_string()]);
}

#[tokio::test]
async fn without_a_control_plane_the_error_names_host_and_server() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = silent.local_addr().unwrap().to_string();
    let bootstrap = mesh_control::bootstrap::Bootstrap::new(&*addr).to_string();
    let mesh = Mesh::builder().bootstrap_json(&bootstrap).unwrap().resolve_timeout(Duration::from_millis(100));
    let mesh = mesh.build().await.unwrap();
    let error = send(&mesh, get(URI)).await.unwrap_err();
    assert!(of_mesh(&error).is_timeout());
    assert_says(&error.to_string(), &["reviews.default.svc.cluster.local:9080", &addr, "within 100ms"]);
    // Without any control plane there is nothing to wait for.
    let mesh = Mesh::builder().build().await.unwrap();
    assert_eq!(text(send(&mesh, get(URI)).await.unwrap()).await, format!("inner: {URI}"));
}
