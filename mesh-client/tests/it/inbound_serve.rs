//! The inbound side serves: gRPC and HTTP, both versions on one port, streaming, cancels and limits, and says goodbye well.

use crate::support::{
    GUARD,
    inbound::{Echo, Polite, Seen, Serving, plain},
    plain_mesh, until,
};
use bytes::Bytes;
use examples::greeter::{HelloRequest, greeter_client::GreeterClient, greeter_server::GreeterServer};
use futures::StreamExt;
use http::{Method, Request, Response, StatusCode, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::{
    ConnectionInfo, Inbound,
    inbound::{Limits, Rbac, Rule},
};
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{net::TcpStream, sync::mpsc, task::JoinSet, time::timeout};
use tonic::{
    Code,
    service::Routes,
    transport::{Channel, Endpoint},
};

pub(crate) async fn tonic_client(addr: SocketAddr) -> GreeterClient<Channel> {
    GreeterClient::new(Endpoint::try_from(format!("http://{addr}")).unwrap().connect().await.unwrap())
}

fn name(name: &str) -> HelloRequest {
    HelloRequest { name: name.into(), count: 0 }
}

pub(crate) type Sender<B> = hyper::client::conn::http2::SendRequest<B>;

pub(crate) async fn http2<B>(addr: SocketAddr) -> Sender<B>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<mesh_client::BoxError>,
{
    let io = TokioIo::new(TcpStream::connect(addr).await.unwrap());
    let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (sender, connection) = builder.handshake(io).await.unwrap();
    tokio::spawn(connection);
    sender
}

pub(crate) fn post(path: &str, body: impl Into<Bytes>) -> Request<Full<Bytes>> {
    Request::post(format!("http://x.test{path}")).body(Full::new(body.into())).unwrap()
}

pub(crate) async fn text(response: Response<hyper::body::Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

#[tokio::test]
async fn generated_clients_call_every_kind_of_method() {
    let serving = Serving::greeter().await;
    let mut client = tonic_client(serving.addr).await;
    let reply = client.say_hello(name("tonic")).await.unwrap().into_inner();
    assert_eq!((reply.message.as_str(), reply.backend), ("Hello tonic", serving.addr.to_string()));
    assert_eq!(reply.peer, "", "plaintext has no identity");

    let status = client.say_hello(name("nobody")).await.unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::NotFound, "nobody is here"));

    let replies = client.say_hellos(HelloRequest { name: "x".into(), count: 500 }).await.unwrap().into_inner();
    let replies: Vec<_> = replies.map(|reply| reply.unwrap().message).collect().await;
    assert_eq!((replies.len(), replies[499].as_str()), (500, "499 x"));

    let (send, receive) = mpsc::channel(1);
    let outgoing = tokio_stream::wrappers::ReceiverStream::new(receive);
    let mut replies = client.chat(outgoing).await.unwrap().into_inner();
    for turn in 0..20 {
        send.send(name(&format!("turn {turn}"))).await.unwrap();
        let reply = timeout(GUARD, replies.message()).await.unwrap().unwrap().unwrap();
        assert_eq!(reply.message, format!("turn {turn}"));
    }
    drop(send);
    assert_eq!(timeout(GUARD, replies.message()).await.unwrap().unwrap(), None);
    serving.end().await;
}

#[tokio::test]
async fn a_request_that_comes_with_the_preface_is_answered() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let (serving, _) = Serving::echo(Limits::default()).await;
    let mut socket = TcpStream::connect(serving.addr).await.unwrap();
    let all = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0\0\0\x03\x01\x05\0\0\0\x01\x83\x86\x84";
    socket.write_all(all).await.unwrap();
    let answered = timeout(GUARD, async {
        loop {
            let mut head = [0; 9];
            socket.read_exact(&mut head).await.unwrap();
            let mut payload = vec![0; usize::from(head[1]) << 8 | usize::from(head[2])];
            socket.read_exact(&mut payload).await.unwrap();
            if head[3] == 1 {
                return payload;
            }
        }
    });
    assert_eq!(answered.await.expect("an answer").first(), Some(&0x88), "200");
    drop(socket);
    serving.end().await;
}

#[tokio::test]
async fn our_own_channel_calls_it() {
    let serving = Serving::greeter().await;
    let mesh = plain_mesh().await;
    let mut client = GreeterClient::new(mesh.fixed_channel(&[serving.addr]).unwrap());
    assert_eq!(client.say_hello(name("mesh")).await.unwrap().into_inner().message, "Hello mesh");
    let status = client.say_hello(name("nobody")).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    let replies = client.say_hellos(HelloRequest { name: "x".into(), count: 300 }).await.unwrap().into_inner();
    assert_eq!(replies.collect::<Vec<_>>().await.len(), 300);
    serving.end().await;
}

#[tokio::test]
async fn both_versions_of_http_are_served_on_one_port() {
    let (serving, _) = Serving::echo(Limits::default()).await;
    let io = TokioIo::new(TcpStream::connect(serving.addr).await.unwrap());
    let (mut http1, connection) = hyper::client::conn::http1::handshake(io).await.unwrap();
    tokio::spawn(connection);
    for round in 0..3 {
        let mut request = Request::put("/one").body(Full::new(Bytes::from(format!("round {round}")))).unwrap();
        request.headers_mut().insert("host", "x.test".parse().unwrap());
        http1.ready().await.unwrap();
        let response = http1.send_request(request).await.unwrap();
        assert_eq!((response.status(), response.version()), (StatusCode::OK, Version::HTTP_11));
        assert_eq!(response.headers()["x-path"], "/one");
        assert_eq!(text(response).await, format!("round {round}"));
    }
    let mut http2 = http2(serving.addr).await;
    let response = http2.send_request(post("/two?q=1", "second")).await.unwrap();
    assert_eq!((response.version(), &response.headers()["x-method"]), (Version::HTTP_2, &"POST".parse().unwrap()));
    assert!(response.headers().contains_key("date"));
    assert_eq!(text(response).await, "second");
    drop((http1, http2));
    serving.end().await;
}

#[tokio::test]
async fn bodies_of_many_megabytes_and_trailers_go_both_ways() {
    let (serving, _) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let chunk = Bytes::from((0..100_000u32).map(|i| i.to_le_bytes()[0]).collect::<Vec<_>>());
    let sent: usize = 300 * chunk.len();
    let mut trailers = http::HeaderMap::new();
    trailers.insert("x-sum", "42".parse().unwrap());
    let frames = (0..300).map({
        let chunk = chunk.clone();
        move |_| Ok::<_, mesh_client::BoxError>(Frame::data(chunk.clone()))
    });
    let body = StreamBody::new(futures::stream::iter(frames.chain([Ok(Frame::trailers(trailers.clone()))])));
    let response = client.send_request(Request::post("http://x.test/").body(body).unwrap()).await.unwrap();
    let collected = timeout(GUARD, response.into_body().collect()).await.unwrap().unwrap();
    assert_eq!(collected.trailers(), Some(&trailers));
    let received = collected.to_bytes();
    assert_eq!(received.len(), sent);
    assert!(received.chunks(chunk.len()).all(|piece| piece == chunk));
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn a_thousand_streams_are_open_at_the_same_time() {
    let (serving, seen) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let mut open = Vec::new();
    for i in 0..1000 {
        let (send, receive) = mpsc::channel::<Result<Frame<Bytes>, mesh_client::BoxError>>(2);
        let body = StreamBody::new(tokio_stream::wrappers::ReceiverStream::new(receive));
        client.ready().await.unwrap();
        let response = client.send_request(Request::post("http://x.test/").body(body).unwrap()).await.unwrap();
        send.send(Ok(Frame::data(Bytes::from(format!("stream {i}"))))).await.unwrap();
        open.push((send, response.into_body()));
    }
    assert_eq!(seen.running(), 1000);
    for (i, (_, body)) in open.iter_mut().enumerate() {
        let frame = timeout(GUARD, body.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), format!("stream {i}"));
    }
    drop(open);
    until("all are gone", async || seen.running() == 0).await;
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn more_streams_than_allowed_are_refused_and_can_be_tried_again() {
    let mut limits = Limits::default();
    limits.max_concurrent_streams = 4;
    let (serving, seen) = Serving::echo(limits).await;
    let io = TcpStream::connect(serving.addr).await.unwrap();
    let (client, connection) = h2::client::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = |path: &str| Request::post(format!("http://x.test{path}")).body(()).unwrap();
    // Before the server's SETTINGS are known, a client may open as many as it likes.
    let calls: Vec<_> = (0..6).map(|_| client.send_request(request("/hang"), true).unwrap().0).collect();
    let mut refused = 0;
    let mut held = Vec::new();
    for mut call in calls {
        match timeout(Duration::from_millis(300), &mut call).await {
            Ok(Err(error)) => {
                assert_eq!(error.reason(), Some(h2::Reason::REFUSED_STREAM));
                refused += 1;
            }
            Ok(Ok(_)) => panic!("it hangs"),
            Err(_) => held.push(call),
        }
    }
    assert_eq!((refused, seen.requests(), seen.running()), (2, 4, 4));
    drop(held);
    until("the handlers are dropped with their calls", async || seen.running() == 0).await;
    let (response, _) = client.ready().await.unwrap().send_request(request("/deaf"), true).unwrap();
    assert_eq!(response.await.unwrap().status(), StatusCode::OK);
    serving.end().await;
}

#[tokio::test]
async fn a_call_that_is_given_up_drops_its_handler() {
    let (serving, seen) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let call = tokio::spawn(client.send_request(post("/hang", "x")));
    until("the handler runs", async || seen.running() == 1).await;
    call.abort();
    until("it is dropped", async || seen.running() == 0).await;
    assert_eq!(text(client.send_request(post("/", "after")).await.unwrap()).await, "after");
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn a_handler_that_panics_fails_its_own_call_only() {
    let (serving, seen) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let hanging = tokio::spawn(client.send_request(post("/hang", "x")));
    until("another call is in progress", async || seen.running() == 1).await;
    let error = client.send_request(post("/panic", "x")).await.unwrap_err();
    let reason =
        std::error::Error::source(&error).and_then(|e| e.downcast_ref::<h2::Error>()).and_then(h2::Error::reason);
    assert_eq!(reason, Some(h2::Reason::INTERNAL_ERROR));
    assert_eq!(text(client.send_request(post("/", "after")).await.unwrap()).await, "after");
    assert!(!hanging.is_finished());
    hanging.abort();
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn answers_without_a_body_have_none() {
    let (serving, _) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let head = Request::builder().method(Method::HEAD).uri("http://x.test/status/200").body(Full::default()).unwrap();
    let response = client.send_request(head).await.unwrap();
    assert_eq!((response.status(), &response.headers()["content-length"]), (StatusCode::OK, &"11".parse().unwrap()));
    assert_eq!(text(response).await, "");
    for status in ["204", "304"] {
        let response = client.send_request(post(&format!("/status/{status}"), "")).await.unwrap();
        assert_eq!(response.status().as_str(), status);
        assert_eq!(text(response).await, "");
    }
    let response = client.send_request(post("/status/418", "")).await.unwrap();
    assert_eq!((response.status(), text(response).await.as_str()), (StatusCode::IM_A_TEAPOT, "with a body"));
    assert!(client.send_request(post("/status/103", "")).await.is_err(), "an interim answer is none");
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_request_is_complete_and_the_connection_goes_on() {
    let (serving, _) = Serving::echo(Limits::default()).await;
    let mut client = http2(serving.addr).await;
    let body = Full::new(Bytes::from(vec![7; 20 << 20]));
    let response = client.send_request(Request::post("http://x.test/deaf").body(body).unwrap()).await.unwrap();
    assert_eq!(text(response).await, "deaf");
    assert_eq!(text(client.send_request(post("/", "after")).await.unwrap()).await, "after");
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn headers_that_are_too_large_are_answered_with_431() {
    let mut limits = Limits::default();
    limits.max_header_bytes = 4 << 10;
    let (serving, seen) = Serving::echo(limits).await;
    let mut client = http2(serving.addr).await;
    let mut request = post("/", "x");
    request.headers_mut().insert("x-large", "y".repeat(5 << 10).parse().unwrap());
    let status = client.send_request(request).await.unwrap().status();
    assert_eq!((status, seen.requests()), (StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE, 0));
    assert_eq!(text(client.send_request(post("/", "after")).await.unwrap()).await, "after");
    drop(client);
    serving.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_call_fails_when_servers_are_shut_down_under_load() {
    let mesh = plain_mesh().await;
    let (first, second) = (Serving::greeter().await, Serving::greeter().await);
    let channel = mesh.fixed_channel(&[first.addr, second.addr]).unwrap();
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut callers = JoinSet::new();
    for _ in 0..16 {
        let (mut client, stop, calls) = (GreeterClient::new(channel.clone()), stop.clone(), calls.clone());
        callers.spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                client.say_hello(name("x")).await.expect("no call fails");
                calls.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    let more = async |calls: &AtomicUsize| {
        let before = calls.load(Ordering::Relaxed);
        until("calls go on", async || calls.load(Ordering::Relaxed) > before + 200).await;
    };
    more(&calls).await;
    timeout(GUARD, first.end()).await.expect("it ends while calls go on");
    more(&calls).await;
    stop.store(true, Ordering::Relaxed);
    while let Some(caller) = callers.join_next().await {
        caller.unwrap();
    }
    second.end().await;
}

#[tokio::test]
async fn what_does_not_end_within_the_drain_time_is_cut() {
    let mut limits = Limits::default();
    limits.drain_timeout = Duration::from_millis(200);
    let (serving, seen) = Serving::echo(limits).await;
    let mut client = http2(serving.addr).await;
    let call = tokio::spawn(client.send_request(post("/hang", "x")));
    until("the handler runs", async || seen.running() == 1).await;
    timeout(GUARD, serving.end()).await.expect("it does not wait for ever");
    assert!(call.await.unwrap().is_err());
    assert_eq!(seen.running(), 0);
}

#[tokio::test]
async fn the_service_is_named_in_a_struct_and_shut_down_by_a_signal() {
    let inbound: Inbound = plain(Limits::default()).await;
    let addr = inbound.local_addr();
    let (signal, stopped) = tokio::sync::oneshot::channel::<()>();
    let routes = Routes::new(GreeterServer::new(Polite));
    let served = tokio::spawn({
        let inbound = inbound.clone();
        async move { inbound.serve_with_shutdown(routes, async { drop(stopped.await) }).await }
    });
    let mut client = tonic_client(addr).await;
    client.say_hello(name("x")).await.unwrap();
    signal.send(()).unwrap();
    timeout(GUARD, served).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn an_axum_router_is_served_by_hypers_own_server_behind_the_policy_of_each_connection() {
    use axum::{Extension, Router, routing};
    use hyper_util::{server::conn::auto::Builder, service::TowerToHyperService};
    use tower::Layer;
    let deny = Rbac::deny().rule("secret", Rule::new().path("/secret"));
    let inbound = Inbound::builder().authorize(deny).bind("127.0.0.1:0").await.unwrap();
    let from = async |Extension(info): Extension<ConnectionInfo>| info.remote_addr().to_string();
    let router = Router::new().route("/from", routing::get(from)).route("/secret", routing::get(async || "told"));
    let (mut incoming, addr) = (inbound.incoming(), inbound.local_addr());
    tokio::spawn(async move {
        while let Some(Ok(stream)) = incoming.next().await {
            let service = TowerToHyperService::new(stream.layer().layer(router.clone()));
            tokio::spawn(async move {
                let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let mut client = http2::<Empty<Bytes>>(addr).await;
    let get = |path: &str| Request::get(format!("http://x.test{path}")).body(Empty::new()).unwrap();
    let answer = client.send_request(get("/from")).await.unwrap();
    assert!(text(answer).await.starts_with("127.0.0.1:"));
    assert_eq!(client.send_request(get("/secret")).await.unwrap().status(), StatusCode::FORBIDDEN);
    timeout(GUARD, inbound.shutdown()).await.expect("an idle client goes");
}

#[tokio::test]
async fn tonics_own_server_takes_its_connections_and_its_layer() {
    let inbound = plain(Limits::default()).await;
    let addr = inbound.local_addr();
    let server = tonic::transport::Server::builder().layer(inbound.layer()).add_service(GreeterServer::new(Polite));
    let served = tokio::spawn(server.serve_with_incoming(inbound.incoming()));
    let mut client = tonic_client(addr).await;
    assert_eq!(client.say_hello(name("x")).await.unwrap().into_inner().backend, addr.to_string());
    served.abort();

    // Without those connections nobody knows who calls: nothing is let in.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tonic::transport::Server::builder().layer(inbound.layer()).add_service(GreeterServer::new(Polite));
    let foreign = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let served = tokio::spawn(server.serve_with_incoming(foreign));
    let status = tonic_client(addr).await.say_hello(name("x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal);
    served.abort();
}

#[tokio::test]
async fn an_axum_router_is_served() {
    async fn whoami(axum::Extension(info): axum::Extension<ConnectionInfo>) -> String {
        format!("{} over TLS: {}", info.remote_addr().ip(), info.is_tls())
    }
    let router = axum::Router::new().route("/whoami", axum::routing::get(whoami));
    let serving = Serving::of(plain(Limits::default()).await, router);
    let mut client = http2(serving.addr).await;
    let request = |path: &str| Request::get(format!("http://x.test{path}")).body(Empty::<Bytes>::new()).unwrap();
    let response = client.send_request(request("/whoami")).await.unwrap();
    assert_eq!(text(response).await, "127.0.0.1 over TLS: false");
    assert_eq!(client.send_request(request("/none")).await.unwrap().status(), StatusCode::NOT_FOUND);
    drop(client);
    serving.end().await;
}

#[tokio::test]
async fn a_service_that_has_to_get_ready_is_waited_for() {
    let seen = Arc::<Seen>::default();
    let limited = tower::ServiceBuilder::new().concurrency_limit(1).service(Echo(seen.clone()));
    let serving = Serving::of(plain(Limits::default()).await, limited);
    let mut client = http2(serving.addr).await;
    let first = tokio::spawn(client.send_request(post("/hang", "x")));
    until("one runs", async || seen.running() == 1).await;
    let second = tokio::spawn(client.send_request(post("/deaf", "x")));
    let third = tokio::spawn(client.send_request(post("/deaf", "x")));
    first.abort();
    for waiting in [second, third] {
        assert_eq!(timeout(GUARD, waiting).await.unwrap().unwrap().unwrap().status(), StatusCode::OK);
    }
    drop(client);
    serving.end().await;
}
