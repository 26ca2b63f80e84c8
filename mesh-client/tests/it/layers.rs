//! The public layers, without a mesh, around a real hyper client and real connections.

use crate::support::nobody;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_client::{
    balance::{LoadBalanceLayer, ServiceList},
    circuit_breaker::{CircuitBreaker, CircuitBreakerLayer, Limits},
    retry::{Condition, HedgeBody, HedgeLayer, Policy, ReplayBody, Retry, RetryBudget, RetryLayer},
    timeout::{Timeout, TimeoutLayer},
    trace::{TracePropagation, TracePropagationLayer},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};
use tokio::net::TcpListener;
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

type Body = Full<Bytes>;
type Hyper = Client<HttpConnector, ReplayBody<Body>>;

/// The whole stack has a type that can be named.
#[derive(Clone)]
struct App {
    client: Retry<CircuitBreaker<Timeout<TracePropagation<Hyper>>>>,
}

impl App {
    fn new(policy: Policy, breaker: &CircuitBreakerLayer) -> Self {
        let hyper = Client::builder(TokioExecutor::new()).build_http();
        let client = ServiceBuilder::new()
            .layer(RetryLayer::new(policy).budget(RetryBudget::percent(20.0, 3)))
            .layer(breaker.clone())
            .layer(TimeoutLayer::new(Duration::from_secs(20)))
            .layer(TracePropagationLayer::new())
            .service(hyper);
        Self { client }
    }
}

fn policy(condition: Condition) -> Policy {
    Policy::http().on(condition).max_retries(3).back_off(Duration::from_millis(1), Duration::from_millis(2)).build()
}

fn request(address: SocketAddr) -> Request<Body> {
    Request::post(format!("http://{address}/echo")).body(Full::from("hello")).expect("a legal request")
}

/// Echoes bodies, after it hung up on `hang_up` connections and answered 503 `refuse` times.
async fn server(hang_up: usize, refuse: usize) -> (SocketAddr, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("it is bound");
    let requests = Arc::new(AtomicUsize::new(0));
    let counted = requests.clone();
    tokio::spawn(async move {
        for connection in 0.. {
            let (stream, _) = listener.accept().await.expect("a connection");
            if connection < hang_up {
                continue;
            }
            let counted = counted.clone();
            let echo = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                let refused = counted.fetch_add(1, SeqCst) < refuse;
                async move {
                    assert!(request.headers().contains_key("traceparent"));
                    if refused {
                        let refusal = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE);
                        return Ok::<_, hyper::Error>(refusal.body(Full::default()).expect("a legal response"));
                    }
                    Ok(Response::new(Full::new(request.into_body().collect().await?.to_bytes())))
                }
            });
            tokio::spawn(async move {
                auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), echo).await
            });
        }
    });
    (address, requests)
}

#[tokio::test]
async fn dropped_connections_and_refusals_are_hidden_from_the_caller() {
    for (hang_up, refuse, condition) in [(2, 0, Condition::Reset), (0, 2, Condition::GatewayError)] {
        let (address, requests) = server(hang_up, refuse).await;
        let breaker = CircuitBreakerLayer::new(Limits::max_requests(10));
        let response = App::new(policy(condition), &breaker).client.oneshot(request(address)).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(breaker.in_flight(), 1, "until the body is read");
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        assert_eq!(requests.load(SeqCst), refuse + 1);
        assert_eq!(breaker.in_flight(), 0);
    }
}

#[tokio::test]
async fn a_refused_connection_is_a_connect_failure() {
    let refusing = nobody();
    for (condition, expected) in [(Condition::ConnectFailure, 4), (Condition::RefusedStream, 1)] {
        let hyper: Hyper = Client::builder(TokioExecutor::new()).build_http();
        let attempts = Arc::new(AtomicUsize::new(0));
        let counted = attempts.clone();
        let counting = tower::service_fn(move |request| {
            counted.fetch_add(1, SeqCst);
            hyper.request(request)
        });
        let client = ServiceBuilder::new().layer(RetryLayer::new(policy(condition))).service(counting);
        client.oneshot(request(refusing.addr())).await.unwrap_err();
        assert_eq!(attempts.load(SeqCst), expected, "{condition:?}");
    }
}

#[tokio::test]
async fn futures_and_clients_can_be_sent_and_shared() {
    fn check<T: Send + Sync + Clone + 'static>(_: &T) {}
    fn send<T: Send>(future: T) -> T {
        future
    }
    let (address, _) = server(0, 0).await;
    let app = App::new(policy(Condition::Http5xx), &CircuitBreakerLayer::new(Limits::default()));
    check(&app.client);
    let call = send(app.client.clone().oneshot(request(address)));
    tokio::spawn(async move { call.await.map(drop).map_err(|error| error.to_string()) }).await.unwrap().unwrap();
}

/// A client of one server.
fn client_of(
    address: SocketAddr,
) -> impl Service<
    Request<HedgeBody<Body>>,
    Response = Response<hyper::body::Incoming>,
    Error = hyper_util::client::legacy::Error,
    Future: Send,
> + Clone {
    let hyper: Client<HttpConnector, HedgeBody<Body>> = Client::builder(TokioExecutor::new()).build_http();
    tower::service_fn(move |mut request: Request<HedgeBody<Body>>| {
        *request.uri_mut() = format!("http://{address}/echo").parse().expect("a legal URI");
        hyper.request(request)
    })
}

#[tokio::test]
async fn requests_are_balanced_and_hedged_over_clients_without_a_mesh() {
    // It takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (good, requests) = server(0, 0).await;
    let clients = ServiceList::new([client_of(silent.local_addr().unwrap()), client_of(good)]);
    let client = ServiceBuilder::new()
        .layer(HedgeLayer::new(Policy::http().max_retries(1).build(), Duration::from_millis(50)))
        .layer(TracePropagationLayer::new())
        .service(LoadBalanceLayer::round_robin().layer(clients));
    for calls in 1..=4 {
        let call = client.clone().oneshot(request(good));
        let response = tokio::time::timeout(Duration::from_secs(20), call).await.expect("hangs").unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "hello");
        assert_eq!(requests.load(SeqCst), calls);
    }
}
