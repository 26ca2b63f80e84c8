//! `axum::serve` itself on the connections of an inbound side: identity, policy, goodbyes.

use crate::{
    mtls::control_plane,
    support::{GUARD, until},
};
use axum::{Extension, Router, extract::ConnectInfo, routing::get};
use bytes::Bytes;
use examples::server::acceptor;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    ConnectionInfo, Inbound,
    inbound::{Limits, Rbac, Rule},
};
use mesh_tls::{ClientSettings, ClientTls, FileSource, FileSourceConfig, Mode, PeerIdentity, default_provider};
use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpStream, runtime::Handle, sync::Notify, time::timeout};

const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";

/// TLS of the client whose files these are.
fn client_tls(files: &Path) -> ClientTls {
    let source = FileSourceConfig {
        certificate_file: Some(files.join("cert.pem")),
        private_key_file: Some(files.join("key.pem")),
        ca_certificate_file: Some(files.join("ca.pem")),
        ..FileSourceConfig::new("client", default_provider())
    };
    let source = Arc::new(FileSource::new(source, &Handle::current()).unwrap());
    let settings = ClientSettings { alpn: vec![b"h2".to_vec()], ..ClientSettings::mtls(source) };
    ClientTls::new(settings, default_provider()).unwrap()
}

fn request(path: &str) -> Request<Empty<Bytes>> {
    Request::get(format!("http://shop.test{path}")).header("host", "shop.test").body(Empty::new()).unwrap()
}

async fn text(answer: http::Response<hyper::body::Incoming>) -> (StatusCode, String) {
    let status = answer.status();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn plain(addr: SocketAddr) -> http1::SendRequest<Empty<Bytes>> {
    let (client, connection) = http1::handshake(TokioIo::new(TcpStream::connect(addr).await.unwrap())).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn axums_own_server_knows_callers_obeys_the_policy_and_drains() {
    let (cp, dir) = control_plane().await;
    let acceptor = acceptor(&cp.ca().unwrap().ensure("default", "greeter").unwrap(), Mode::Permissive).unwrap();
    let rules = Rbac::allow()
        .rule("client", Rule::new().spiffe_id(CLIENT).path("/whoami").path("/slow"))
        .rule("anybody", Rule::new().path("/open"));
    let mut limits = Limits::default();
    limits.drain_notice = Duration::from_millis(50);
    let builder = Inbound::builder().acceptor(acceptor).authorize(rules).limits(limits);
    let inbound = builder.bind("127.0.0.1:0").await.unwrap();
    let addr = inbound.local_addr();

    let whoami = async |Extension(peer): Extension<PeerIdentity>, Extension(info): Extension<ConnectionInfo>| {
        assert!(info.is_tls());
        peer.to_string()
    };
    let (running, go) = (Arc::new(AtomicUsize::new(0)), Arc::new(Notify::new()));
    let slow = {
        let (running, go) = (running.clone(), go.clone());
        async move || {
            running.fetch_add(1, Ordering::SeqCst);
            go.notified().await;
            "done"
        }
    };
    let open =
        async |Extension(info): Extension<ConnectionInfo>| info.peer().map_or("nobody".to_owned(), ToString::to_string);
    let router = Router::new().route("/whoami", get(whoami)).route("/slow", get(slow)).route("/open", get(open));
    let router = router.route("/secret", get(async || "told"));

    let (stop, signal, incoming) = (inbound.clone(), Arc::new(Notify::new()), inbound.incoming());
    assert_eq!(axum::serve::Listener::local_addr(&incoming).unwrap(), addr);
    let serve = axum::serve(incoming, inbound.layer().into_make_service(router));
    let served = tokio::spawn({
        let signal = signal.clone();
        serve
            .with_graceful_shutdown(async move {
                signal.notified().await;
                stop.shutdown().await;
            })
            .into_future()
    });

    let tls = client_tls(&dir.path().join("ca/ns/default/sa/client"));
    let (stream, _) = tls.connect(TcpStream::connect(addr).await.unwrap(), None).await.unwrap();
    let (mut client, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    assert_eq!(text(client.send_request(request("/whoami")).await.unwrap()).await, (StatusCode::OK, CLIENT.to_owned()));
    assert_eq!(text(client.send_request(request("/secret")).await.unwrap()).await.0, StatusCode::FORBIDDEN);
    // Plaintext and HTTP/1.1 on the same port: nobody in particular.
    let mut stranger = plain(addr).await;
    assert_eq!(
        text(stranger.send_request(request("/open")).await.unwrap()).await,
        (StatusCode::OK, "nobody".to_owned())
    );
    assert_eq!(text(stranger.send_request(request("/whoami")).await.unwrap()).await.0, StatusCode::FORBIDDEN);

    // What is in progress ends well; the idle connection goes, and nobody new comes.
    let call = tokio::spawn(client.send_request(request("/slow")));
    until("the handler runs", async || running.load(Ordering::SeqCst) == 1).await;
    signal.notify_one();
    until("the socket is closed", async || TcpStream::connect(addr).await.is_err()).await;
    until("the idle client is told", async || stranger.is_closed()).await;
    assert!(!served.is_finished());
    go.notify_one();
    assert_eq!(text(call.await.unwrap().unwrap()).await, (StatusCode::OK, "done".to_owned()));
    timeout(GUARD, served).await.expect("it ends when all is answered").unwrap().unwrap();
    let _ = timeout(GUARD, connection).await.expect("the connection is closed");
}

#[tokio::test]
async fn axums_connect_info_is_the_connection_and_what_the_layer_asks() {
    let deny = Rbac::deny().rule("secret", Rule::new().path("/secret"));
    let inbound = Inbound::builder().authorize(deny).bind("127.0.0.1:0").await.unwrap();
    let addr = inbound.local_addr();
    let from = async |ConnectInfo(info): ConnectInfo<ConnectionInfo>| info.remote_addr().ip().to_string();
    let router = Router::new().route("/from", get(from)).route("/secret", get(async || "told")).layer(inbound.layer());
    let make = router.clone().into_make_service_with_connect_info::<ConnectionInfo>();
    let served = tokio::spawn(axum::serve(inbound.incoming(), make).into_future());
    let mut client = plain(addr).await;
    assert_eq!(
        text(client.send_request(request("/from")).await.unwrap()).await,
        (StatusCode::OK, "127.0.0.1".to_owned())
    );
    assert_eq!(text(client.send_request(request("/secret")).await.unwrap()).await.0, StatusCode::FORBIDDEN);
    timeout(GUARD, inbound.shutdown()).await.unwrap();
    served.abort();

    // Without the connection's info the policy is not known, and nobody is let in.
    let inbound = Inbound::builder().bind("127.0.0.1:0").await.unwrap();
    let addr = inbound.local_addr();
    let served = tokio::spawn(axum::serve(inbound.incoming(), router).into_future());
    let answer = plain(addr).await.send_request(request("/from")).await.unwrap();
    assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
    served.abort();
}
