use std::net::Ipv4Addr;

use tonic::transport::Channel;

use super::*;
use crate::greeter::greeter_client::GreeterClient;

const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

async fn client(backend: &Backend) -> GreeterClient<Channel> {
    let channel = Channel::from_shared(format!("http://{}", backend.addr())).unwrap().connect().await.unwrap();
    GreeterClient::new(channel)
}

fn hello(name: &str) -> HelloRequest {
    HelloRequest { name: name.to_owned(), count: 0 }
}

#[tokio::test]
async fn every_kind_of_call_is_answered_with_what_the_backend_saw() {
    let backend = Backend::start("one", ANY, Options::default()).await.unwrap();
    let mut client = client(&backend).await;

    let mut request = Request::new(hello("you"));
    request.metadata_mut().insert("traceparent", "00-1-2-01".parse().unwrap());
    let reply = client.say_hello(request).await.unwrap().into_inner();
    assert_eq!(reply.message, "Hello you");
    assert_eq!((reply.backend.as_str(), reply.traceparent.as_str(), reply.peer.as_str()), ("one", "00-1-2-01", ""));

    let stream = client.say_hellos(HelloRequest { name: "all".to_owned(), count: 5 }).await.unwrap().into_inner();
    assert_eq!(stream.collect::<Vec<_>>().await.len(), 5);

    let chat = client.chat(futures::stream::iter([hello("a"), hello("b")])).await.unwrap().into_inner();
    let chat: Vec<_> = chat.map(|reply| reply.unwrap().message).collect().await;
    assert_eq!(chat, ["Hello a", "Hello b"]);

    assert_eq!(backend.state().calls(), 3);
    assert_eq!(backend.state().in_flight(), 0);
}

#[tokio::test]
async fn a_switched_backend_fails_and_heals() {
    let backend = Backend::start("one", ANY, Options::default()).await.unwrap();
    let mut client = client(&backend).await;
    backend.state().set_unavailable(true);
    assert_eq!(client.say_hello(hello("you")).await.unwrap_err().code(), Code::Unavailable);
    backend.state().set_unavailable(false);
    backend.state().set_fail_rate(1.0);
    assert_eq!(client.say_hello(hello("you")).await.unwrap_err().code(), Code::Unavailable);
    backend.state().set_fail_rate(0.0);
    assert_eq!(client.say_hello(hello("you")).await.unwrap().into_inner().backend, "one");
    assert_eq!((backend.state().calls(), backend.state().failed()), (3, 2));
}

#[tokio::test]
async fn a_killed_backend_cuts_calls_in_flight_and_comes_back_on_its_port() {
    let delay = Duration::from_secs(3600);
    let mut backend = Backend::start("one", ANY, Options { delay, ..Options::default() }).await.unwrap();
    let addr = backend.addr();
    let mut caller = client(&backend).await;
    let call = tokio::spawn(async move { caller.say_hello(hello("you")).await });
    while backend.state().in_flight() == 0 {
        tokio::task::yield_now().await;
    }

    backend.kill().await;
    assert!(call.await.unwrap().is_err());
    assert!(tokio::net::TcpStream::connect(addr).await.is_err(), "the port is closed");

    backend.state().set_delay(Duration::ZERO);
    backend.restart().await.unwrap();
    assert_eq!(backend.addr(), addr);
    assert!(client(&backend).await.say_hello(hello("you")).await.is_ok());
}

#[tokio::test]
async fn an_http_backend_answers_over_http1() {
    let backend = Backend::http("web", ANY, Options::default()).await.unwrap();
    let http =
        hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http::<Full<Bytes>>();
    let uri: http::Uri = format!("http://{}/reviews/1", backend.addr()).parse().unwrap();
    let answer = http.get(uri.clone()).await.unwrap();
    assert_eq!((answer.version(), answer.status().as_u16()), (http::Version::HTTP_11, 200));
    assert_eq!(answer.headers()["x-backend"], "web");

    backend.state().set_unavailable(true);
    assert_eq!(http.get(uri).await.unwrap().status().as_u16(), 503);
}
