//! Requests and responses over HTTP/1.1.

use super::support::{Heard, collect, feed, idle, lease, origin, post, within};
use crate::transport::{Connection, Kind, Protocol, TransportConfig};
use bytes::Bytes;
use http::{Request, Response, Version};
use http_body::Frame;
use http_body_util::{BodyExt, Empty, Full};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use std::{
    convert::Infallible,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::Poll,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

async fn connect() -> (Connection, DuplexStream, Arc<Heard>) {
    let (client, io) = tokio::io::duplex(1 << 16);
    let heard = Arc::new(Heard::default());
    let config = TransportConfig::default();
    let connection = Connection::handshake(client, Protocol::Http1, &config, origin(), Some(Arc::clone(&heard) as _));
    (connection.await.expect("handshake"), io, heard)
}

/// A hyper server that echoes; `/close` ends the connection.
async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    assert_eq!(request.version(), Version::HTTP_11);
    assert_eq!(request.headers()["host"], "x.test");
    assert!(request.uri().authority().is_none());
    let close = request.uri().path() == "/close";
    let body = request.into_body().collect().await.expect("body").to_bytes();
    let mut response = Response::new(Full::new(body));
    if close {
        response.headers_mut().insert("connection", "close".parse().expect("value"));
    }
    Ok(response)
}

fn serve(io: DuplexStream) {
    tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(io), service_fn(echo)));
}

async fn request_arrived(io: &mut DuplexStream) {
    let mut seen = Vec::new();
    while !seen.ends_with(b"\r\n\r\nx") {
        assert_ne!(within(io.read_buf(&mut seen)).await.expect("read"), 0);
    }
}

#[tokio::test]
async fn requests_follow_each_other_on_one_connection() {
    let (connection, io, heard) = connect().await;
    serve(io);
    for word in ["one", "two", "three"] {
        assert!(connection.has_capacity());
        let response = within(lease(&connection).send(post(word))).await.expect("response");
        assert!(!connection.has_capacity(), "busy until the body ended");
        assert!(connection.lease().is_none());
        assert_eq!(within(collect(response)).await.0, word);
        assert_eq!(connection.in_flight(), 0);
    }
    // No body at all.
    let get = Request::get("http://x.test/echo").body(Empty::<Bytes>::new()).expect("request");
    let response = within(lease(&connection).send(get)).await.expect("response");
    assert_eq!(connection.in_flight(), 0, "an empty response gives the connection back");
    drop(response);
    assert!(connection.is_usable());
    assert_eq!(heard.unusable.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_streamed_body_arrives_whole() {
    let (connection, io, _) = connect().await;
    serve(io);
    let (feeder, body) = feed(1);
    let request = Request::post("http://x.test/").body(body).expect("request");
    let call = tokio::spawn(lease(&connection).send(request));
    for _ in 0..50 {
        feeder.send(Ok(Frame::data(Bytes::from(vec![b'x'; 10_000])))).await.expect("taken");
    }
    drop(feeder);
    let response = within(call).await.expect("task").expect("response");
    assert_eq!(within(collect(response)).await.0.len(), 500_000);
    assert!(connection.has_capacity());
}

#[tokio::test]
async fn connection_close_is_the_end_of_the_connection_but_not_of_the_response() {
    let (connection, io, heard) = connect().await;
    serve(io);
    let request = Request::post("http://x.test/close").body(Full::new(Bytes::from("last"))).expect("request");
    let response = within(lease(&connection).send(request)).await.expect("response");
    assert!(!connection.is_usable());
    assert_eq!(heard.unusable.load(Ordering::SeqCst), 1);
    assert_eq!(within(collect(response)).await.0, "last");
    within(connection.closed()).await;
}

#[tokio::test]
async fn dropping_the_call_or_the_body_closes_the_connection() {
    let (connection, mut io, _) = connect().await;
    let mut call = Box::pin(lease(&connection).send(post("x")));
    let mut seen = Vec::new();
    while seen.is_empty() {
        let done = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut call).poll(cx).is_ready())).await;
        assert!(!done);
        tokio::select! {
            biased;
            read = io.read_buf(&mut seen) => assert_ne!(read.expect("read"), 0),
            () = tokio::task::yield_now() => {}
        }
    }
    drop(call);
    assert!(!connection.is_usable());
    idle(&connection).await;
    within(connection.closed()).await;
    let _ = io.read_to_end(&mut Vec::new()).await;

    let (connection, mut io, _) = connect().await;
    let call = tokio::spawn(lease(&connection).send(post("x")));
    request_arrived(&mut io).await;
    io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.expect("write");
    let response = within(call).await.expect("task").expect("response");
    drop(response);
    assert!(!connection.is_usable());
    within(connection.closed()).await;
}

#[tokio::test]
async fn a_response_cut_in_its_body_is_an_error() {
    let (connection, mut io, _) = connect().await;
    let call = tokio::spawn(lease(&connection).send(post("x")));
    request_arrived(&mut io).await;
    io.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await.expect("write");
    let response = within(call).await.expect("task").expect("response");
    drop(io);
    let error = within(response.into_body().collect()).await.expect_err("cut");
    assert!(!error.is_before_headers() && !error.is_unprocessed());
    assert_eq!(connection.in_flight(), 0);
    assert!(!connection.is_usable());
}

#[tokio::test]
async fn a_connection_closed_while_idle_gives_the_request_back() {
    let (connection, io, heard) = connect().await;
    let lease = lease(&connection);
    drop(io);
    within(heard.any.notified()).await;
    assert!(!connection.is_usable());
    let error = within(lease.send(post("x"))).await.expect_err("closed");
    assert_eq!(error.kind(), Kind::NotSent);
    assert!(error.is_unprocessed());
}

#[tokio::test]
async fn a_request_that_was_written_is_not_called_unprocessed() {
    let (connection, mut io, _) = connect().await;
    let call = tokio::spawn(lease(&connection).send(post("x")));
    request_arrived(&mut io).await;
    drop(io);
    let error = within(call).await.expect("task").expect_err("cut");
    assert_eq!(error.kind(), Kind::Closed);
    assert!(!error.is_unprocessed());
}

#[tokio::test]
async fn drain_and_abort_close() {
    let (connection, io, _) = connect().await;
    serve(io);
    connection.drain();
    within(connection.closed()).await;

    let (connection, io, _) = connect().await;
    let call = tokio::spawn(lease(&connection).send(post("x")));
    tokio::task::yield_now().await;
    connection.abort(Kind::Closed);
    let error = within(call).await.expect("task").expect_err("cut");
    assert!(matches!(error.kind(), Kind::Closed | Kind::NotSent), "{error:?}");
    within(connection.closed()).await;
    drop(io);
}
