//! JWT SVIDs: callers get them from their workload endpoint, and servers verify them by the bundles of theirs.

use crate::support::{GUARD, assert_says, until};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use mesh_client::inbound::{Inbound, JwtClaims, JwtProvider, Rbac, Rule};
use mesh_control::ControlPlane;
use mesh_tls::{JwtBundles, WorkloadApiConfig, WorkloadApiSource, WorkloadEndpoint, default_provider};
use std::{net::SocketAddr, path::Path};
use tempfile::TempDir;
use tokio::{net::TcpStream, runtime::Handle, time::timeout};

const CART: &str = "spiffe://cluster.local/ns/shop/sa/cart";

/// A CA with workload endpoints for a server and two callers.
async fn authority() -> (ControlPlane, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let builder = ControlPlane::builder().ca(dir.path().join("ca"));
    let builder = builder.identity("shop", "orders").identity("shop", "cart").identity("web", "front");
    (builder.start().await.unwrap(), dir)
}

fn endpoint(path: &Path) -> WorkloadApiSource {
    let endpoint = WorkloadEndpoint::Unix(path.to_owned());
    WorkloadApiSource::new(WorkloadApiConfig::new("agent", endpoint, default_provider()), &Handle::current())
}

fn workload(cp: &ControlPlane, namespace: &str, account: &str) -> WorkloadApiSource {
    endpoint(&cp.ca().unwrap().socket(namespace, account))
}

async fn token(of: &WorkloadApiSource, audience: &str) -> String {
    timeout(GUARD, of.jwt_svid(&[audience], None)).await.unwrap().unwrap().token().to_owned()
}

async fn get(addr: SocketAddr, token: Option<&str>) -> (StatusCode, String) {
    let io = TokioIo::new(TcpStream::connect(addr).await.unwrap());
    let (mut client, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut request = Request::get("/").header("host", "orders");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let answer = client.send_request(request.body(Empty::<bytes::Bytes>::new()).unwrap()).await.unwrap();
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

/// Answers with the subject of the token.
fn serve(inbound: &Inbound) -> SocketAddr {
    let who = async |axum::Extension(claims): axum::Extension<JwtClaims>| claims.subject().unwrap().to_owned();
    let served = inbound.clone();
    tokio::spawn(async move { served.serve(axum::Router::new().route("/", axum::routing::get(who))).await });
    inbound.local_addr()
}

#[tokio::test]
async fn keys_that_are_taken_away_count_no_more_the_last_one_included() {
    let (cp, _dir) = authority().await;
    let orders = workload(&cp, "shop", "orders");
    let agent = orders.jwt_bundles();
    timeout(GUARD, agent.changed().wait_for(|generation| *generation > 0)).await.unwrap().unwrap();
    let map: serde_json::Value = serde_json::from_str(&agent.bundle_map().unwrap()).unwrap();
    let keys = map["trust_domains"]["cluster.local"].to_string();
    let domain = || "cluster.local".parse().unwrap();
    let bundles = JwtBundles::new("held");
    bundles.replace([(domain(), keys.as_bytes())]).unwrap();
    let builder = Inbound::builder().jwt(JwtProvider::spiffe(bundles.clone(), "orders"));
    let inbound = builder.bind("127.0.0.1:0").await.unwrap();
    let addr = serve(&inbound);
    let good = token(&workload(&cp, "shop", "cart"), "orders").await;
    assert_eq!(get(addr, Some(&good)).await, (StatusCode::OK, CART.to_owned()));
    bundles.replace([(domain(), &br#"{"keys": []}"#[..])]).unwrap();
    assert_eq!(get(addr, Some(&good)).await.0, StatusCode::UNAUTHORIZED);
    bundles.replace([(domain(), keys.as_bytes())]).unwrap();
    assert_eq!(get(addr, Some(&good)).await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_server_verifies_the_tokens_of_its_trust_domain_by_the_bundles_of_its_own_endpoint() {
    let (cp, _dir) = authority().await;
    let (stranger, _other) = authority().await;
    let orders = workload(&cp, "shop", "orders");
    let bundles = orders.jwt_bundles();
    let cart = Rule::new().claim("sub", CART);
    let builder = Inbound::builder().jwt(JwtProvider::spiffe(bundles.clone(), "orders"));
    let inbound = builder.authorize(Rbac::allow().rule("cart", cart)).bind("127.0.0.1:0").await.unwrap();
    let addr = serve(&inbound);

    let cart = workload(&cp, "shop", "cart");
    let good = token(&cart, "orders").await;
    assert_eq!(get(addr, Some(&good)).await, (StatusCode::OK, CART.to_owned()));
    assert_eq!(bundles.trust_domains(), ["cluster.local".parse().unwrap()]);
    assert_eq!(get(addr, None).await.0, StatusCode::UNAUTHORIZED);
    // For another audience, of another workload, and of another authority of the same name.
    assert_eq!(get(addr, Some(&token(&cart, "payments").await)).await.0, StatusCode::FORBIDDEN);
    let front = workload(&cp, "web", "front");
    assert_eq!(get(addr, Some(&token(&front, "orders").await)).await.0, StatusCode::FORBIDDEN);
    let forged = token(&workload(&stranger, "shop", "cart"), "orders").await;
    assert_eq!(get(addr, Some(&forged)).await.0, StatusCode::UNAUTHORIZED);
    // The keys stay while the endpoint is away.
    cp.shutdown().await;
    until("the endpoint is missed", async || bundles.last_error().is_some()).await;
    drop(orders);
    assert_eq!(get(addr, Some(&good)).await, (StatusCode::OK, CART.to_owned()));
    inbound.shutdown().await;
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_is_named_and_found_when_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("ca");
    let source = endpoint(&folder.join("ns/shop/sa/cart/api.sock"));
    let bundles = source.jwt_bundles();
    until("it is missed", async || bundles.last_error().is_some()).await;
    assert_says(&bundles.last_error().unwrap(), &["agent JWT bundles", "api.sock", "No such file"]);
    let _cp = ControlPlane::builder().ca(folder).identity("shop", "cart").start().await.unwrap();
    timeout(GUARD, bundles.changed().wait_for(|generation| *generation > 0)).await.unwrap().unwrap();
    assert_eq!(bundles.last_error(), None);
}
