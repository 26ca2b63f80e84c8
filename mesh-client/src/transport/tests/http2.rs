//! Requests and responses over HTTP/2.

use super::support::{collect, echo, feed, idle, lease, pair, post, read, serve, within, write};
use crate::transport::{BoxError, Kind, TransportConfig};
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body, Frame};
use http_body_util::{BodyExt, BodyStream, Empty, Full, StreamBody};
use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    task::Poll,
};
use tokio::sync::oneshot;

fn server() -> h2::server::Builder {
    h2::server::Builder::new()
}

#[tokio::test]
async fn a_unary_call_carries_head_body_and_trailers_both_ways() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |request, respond| {
        assert_eq!(request.uri(), "http://x.test/echo");
        assert_eq!(request.headers()["x-mine"], "1");
        echo(request, respond)
    });
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("0"));
    let frames = [Ok::<_, BoxError>(Frame::data(Bytes::from("ping"))), Ok(Frame::trailers(trailers.clone()))];
    let body = StreamBody::new(futures::stream::iter(frames));
    let request = Request::post("http://x.test/echo").header("x-mine", "1").body(body).expect("request");
    let response = within(lease(&connection).send(request)).await.expect("response");
    assert_eq!(response.status(), 200);
    assert_eq!(within(collect(response)).await, (Bytes::from("ping"), Some(trailers)));
    assert_eq!(connection.in_flight(), 0);
}

#[tokio::test]
async fn end_stream_comes_with_the_headers_or_the_last_data() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |request, mut respond| async move {
        let at_head = request.body().is_end_stream();
        let mut body = request.into_body();
        let mut frames = 0;
        while let Some(chunk) = body.data().await {
            assert!(!chunk.expect("data").is_empty(), "an empty DATA frame to say the end");
            frames += 1;
        }
        let length = respond.send_response(Response::builder().header("x-frames", frames).body(()).expect("r"), false);
        length.expect("open").send_data(Bytes::from(if at_head { "none" } else { "some" }), true).expect("send");
    });
    let empty = Request::get("http://x.test/").body(Empty::<Bytes>::new()).expect("request");
    let response = within(lease(&connection).send(empty)).await.expect("response");
    assert_eq!(collect(response).await.0, "none");

    let response = within(lease(&connection).send(post("x"))).await.expect("response");
    assert_eq!(response.headers()["x-frames"], "1");
    assert_eq!(collect(response).await.0, "some");

    // Unknown length, the end seen only by polling again.
    let body = StreamBody::new(futures::stream::iter([Ok::<_, BoxError>(Frame::data(Bytes::from("a")))]));
    let request = Request::post("http://x.test/").body(body).expect("request");
    let response = within(lease(&connection).send(request)).await.expect("response");
    assert_eq!(response.headers()["x-frames"], "1");
}

#[tokio::test]
async fn large_bodies_cross_small_windows_both_ways() {
    let config = TransportConfig { stream_window: 20_000, connection_window: 70_000, ..Default::default() };
    let (connection, server) = pair(config, server().initial_window_size(30_000)).await;
    serve(server, echo);
    let data: Bytes =
        (0..5_000_000u32).map(|i| i.wrapping_mul(2_654_435_761).to_be_bytes()[0]).collect::<Vec<_>>().into();
    let chunks: Vec<_> = data.chunks(300_000).map(|c| Ok::<_, BoxError>(Frame::data(data.slice_ref(c)))).collect();
    let calls = (0..3).map(|_| {
        let request = Request::post("http://x.test/echo").body(StreamBody::new(futures::stream::iter(
            chunks
                .iter()
                .map(|c| Ok::<_, BoxError>(Frame::data(c.as_ref().expect("ok").data_ref().expect("data").clone())))
                .collect::<Vec<_>>(),
        )));
        let lease = lease(&connection);
        async move { collect(lease.send(request.expect("request")).await.expect("response")).await.0 }
    });
    for echoed in within(futures::future::join_all(calls)).await {
        assert!(echoed == data, "{} bytes of {} came back", echoed.len(), data.len());
    }
    let one = within(lease(&connection).send(post(data.clone()))).await.expect("response");
    assert_eq!(within(collect(one)).await.0, data);
    idle(&connection).await;
}

#[tokio::test]
async fn an_upload_waits_for_the_window_and_holds_little() {
    let (connection, server) = pair(TransportConfig::default(), server().initial_window_size(65_535)).await;
    let (go, gone) = oneshot::channel::<()>();
    let gone = Arc::new(tokio::sync::Mutex::new(Some(gone)));
    serve(server, move |request, mut respond| {
        let gone = Arc::clone(&gone);
        async move {
            gone.lock().await.take().expect("one request").await.expect("go");
            let (data, _) = read(request.into_body()).await;
            let response = Response::builder().header("x-length", data.len()).body(()).expect("response");
            respond.send_response(response, true).expect("send");
        }
    });
    let (feeder, body) = feed(1);
    let taken = Arc::clone(&body.taken);
    let call = tokio::spawn(lease(&connection).send(Request::post("http://x.test/").body(body).expect("request")));
    let feeding = tokio::spawn(async move {
        for _ in 0..100 {
            feeder.send(Ok(Frame::data(Bytes::from(vec![7; 100_000])))).await.expect("taken");
        }
    });
    // As long as the server reads nothing, at most the window, the chunk in hand and the one after it are taken.
    for _ in 0..10_000 {
        tokio::task::yield_now().await;
    }
    assert!(taken.load(Ordering::SeqCst) <= 4, "{} chunks were taken", taken.load(Ordering::SeqCst));
    go.send(()).expect("server");
    let response = within(call).await.expect("task").expect("response");
    within(feeding).await.expect("all taken");
    assert_eq!(response.headers()["x-length"], "10000000");
    idle(&connection).await;
}

#[tokio::test]
async fn a_bidirectional_stream_talks_both_ways_after_the_headers() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |request, mut respond| async move {
        let mut send = respond.send_response(Response::new(()), false).expect("open");
        let mut body = request.into_body();
        while let Some(Ok(chunk)) = body.data().await {
            body.flow_control().release_capacity(chunk.len()).expect("release");
            send.send_data(chunk, false).expect("send");
        }
        send.send_data(Bytes::from("bye"), true).expect("send");
    });
    let (feeder, body) = feed(1);
    // The response comes before the first byte of the request.
    let response = within(lease(&connection).send(Request::post("http://x.test/").body(body).expect("request"))).await;
    let mut body = response.expect("response").into_body();
    for word in ["a", "b", "c"] {
        feeder.send(Ok(Frame::data(Bytes::from(word)))).await.expect("fed");
        let frame = within(body.frame()).await.expect("frame").expect("data");
        assert_eq!(frame.into_data().expect("data"), word);
        assert_eq!(connection.in_flight(), 1);
    }
    drop(feeder);
    let rest = within(body.collect()).await.expect("end").to_bytes();
    assert_eq!(rest, "bye");
    idle(&connection).await;
}

#[tokio::test]
async fn dropping_the_response_body_cancels_the_stream_and_the_upload() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    let (seen, mut reset) = tokio::sync::mpsc::channel(2);
    serve(server, move |request, mut respond| {
        let seen = seen.clone();
        async move {
            let mut send = respond.send_response(Response::new(()), false).expect("open");
            let reason = poll_fn(|cx| send.poll_reset(cx)).await.expect("reset");
            drop(request);
            seen.send(reason).await.expect("test");
        }
    });
    let (feeder, body) = feed(1);
    let request = Request::post("http://x.test/").body(body).expect("request");
    let response = within(lease(&connection).send(request)).await.expect("response");
    drop(response);
    assert_eq!(within(reset.recv()).await, Some(h2::Reason::CANCEL));
    within(feeder.closed()).await;
    idle(&connection).await;

    let response = within(lease(&connection).send(post("all of it"))).await.expect("response");
    drop(response);
    assert_eq!(within(reset.recv()).await, Some(h2::Reason::CANCEL));
    idle(&connection).await;
}

#[tokio::test]
async fn an_upload_ends_with_its_response() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    let (seen, mut reset) = tokio::sync::mpsc::channel(2);
    serve(server, move |request, mut respond| {
        let seen = seen.clone();
        async move {
            let path = request.uri().path().to_owned();
            let mut body = request.into_body();
            let mut send = respond.send_response(Response::new(()), path == "/head").expect("open");
            match path.as_str() {
                "/data" => send.send_data(Bytes::from("all"), true).expect("send"),
                "/trailers" => send.send_trailers(HeaderMap::new()).expect("send"),
                _ => {}
            }
            // The request is still wanted, as far as HTTP goes.
            let reason = loop {
                match body.data().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break error.reason(),
                    None => break None,
                }
            };
            seen.send(reason).await.expect("test");
        }
    });
    // With the head, with the last frame (seen without a further poll), with trailers.
    for (path, frames) in [("/head", 0), ("/data", 1), ("/trailers", 1)] {
        let (feeder, body) = feed(1);
        feeder.send(Ok(Frame::data(Bytes::from("first")))).await.expect("room");
        let request = Request::post(format!("http://x.test{path}")).body(body).expect("request");
        let response = within(lease(&connection).send(request)).await.expect("response");
        let mut body = response.into_body();
        for _ in 0..frames {
            within(body.frame()).await.expect("frame").expect("no error");
        }
        within(feeder.closed()).await;
        assert_eq!(within(reset.recv()).await, Some(Some(h2::Reason::NO_ERROR)), "{path}");
        idle(&connection).await;
        assert!(within(body.frame()).await.is_none(), "{path}: complete, not cut");
    }
    assert!(connection.is_usable());
}

#[tokio::test]
async fn dropping_the_call_at_any_poll_gives_the_stream_back() {
    let (connection, server) = pair(TransportConfig::default(), server().initial_window_size(1000)).await;
    serve(server, echo);
    for polls in 0..40 {
        let (feeder, body) = feed(4);
        for _ in 0..3 {
            feeder.try_send(Ok(Frame::data(Bytes::from(vec![1; 70_000])))).expect("room");
        }
        drop(feeder);
        let request = Request::post("http://x.test/").body(body).expect("request");
        let lease = lease(&connection);
        assert_eq!(connection.in_flight(), 1);
        let mut call = Box::pin(async { collect(lease.send(request).await.expect("response")).await });
        for _ in 0..polls {
            if poll_fn(|cx| Poll::Ready(call.as_mut().poll(cx).is_ready())).await {
                break;
            }
            tokio::task::yield_now().await;
        }
        drop(call);
        idle(&connection).await;
    }
    assert!(connection.is_usable());
    let response = within(lease(&connection).send(post("still works"))).await.expect("response");
    assert_eq!(collect(response).await.0, "still works");
}

#[tokio::test]
async fn a_refused_stream_and_a_reset_say_what_they_are() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |request, mut respond| async move {
        match request.uri().path() {
            "/refused" => respond.send_reset(h2::Reason::REFUSED_STREAM),
            "/internal" => respond.send_reset(h2::Reason::INTERNAL_ERROR),
            _ => {
                let mut send = respond.send_response(Response::new(()), false).expect("open");
                send.send_data(Bytes::from("half"), false).expect("send");
                // The reset must not overtake the data.
                for _ in 0..10 {
                    tokio::task::yield_now().await;
                }
                send.send_reset(h2::Reason::INTERNAL_ERROR);
            }
        }
    });
    let call = |path: &str| {
        let request = Request::get(format!("http://x.test{path}")).body(Empty::<Bytes>::new()).expect("request");
        within(lease(&connection).send(request))
    };
    let error = call("/refused").await.expect_err("refused");
    assert_eq!(error.kind(), Kind::RefusedStream);
    assert!(error.is_unprocessed() && error.is_before_headers());

    let error = call("/internal").await.expect_err("reset");
    assert_eq!(error.kind(), Kind::Reset(h2::Reason::INTERNAL_ERROR));
    assert!(!error.is_unprocessed() && error.is_before_headers());

    let mut body = call("/half").await.expect("headers").into_body();
    let first = within(body.frame()).await.expect("frame").expect("data");
    assert_eq!(first.into_data().expect("data"), "half");
    let error = within(body.frame()).await.expect("an error, not an end").expect_err("cut");
    assert_eq!(error.kind(), Kind::Reset(h2::Reason::INTERNAL_ERROR));
    assert!(!error.is_unprocessed() && !error.is_before_headers());
    assert!(connection.is_usable());
    idle(&connection).await;
}

#[tokio::test]
async fn an_early_response_with_a_no_error_reset_is_a_response() {
    let (connection, server) = pair(TransportConfig::default(), server().initial_window_size(1000)).await;
    serve(server, |request, mut respond| async move {
        // Answers in full without reading: h2 resets with NO_ERROR when the request is dropped.
        let mut send =
            respond.send_response(Response::builder().status(413).body(()).expect("r"), false).expect("open");
        send.send_data(Bytes::from("too large"), true).expect("send");
        drop(request);
    });
    let (feeder, body) = feed(1);
    let feeding =
        tokio::spawn(async move { while feeder.send(Ok(Frame::data(Bytes::from(vec![0; 50_000])))).await.is_ok() {} });
    let response = within(lease(&connection).send(Request::post("http://x.test/").body(body).expect("request"))).await;
    let response = response.expect("response");
    assert_eq!(response.status(), 413);
    assert_eq!(within(collect(response)).await.0, "too large");
    within(feeding).await.expect("the upload stopped");
    idle(&connection).await;
}

#[tokio::test]
async fn a_failing_request_body_resets_the_stream_and_is_the_error() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |request, mut respond| async move {
        let mut body = request.into_body();
        while let Some(Ok(_)) = body.data().await {}
        let reason = poll_fn(|cx| respond.poll_reset(cx)).await.expect("reset");
        assert_eq!(reason, h2::Reason::CANCEL);
    });
    let frames = [Ok(Frame::data(Bytes::from("a"))), Err(BoxError::from("disk on fire"))];
    let request =
        Request::post("http://x.test/").body(StreamBody::new(futures::stream::iter(frames))).expect("request");
    let error = within(lease(&connection).send(request)).await.expect_err("body failed");
    assert_eq!(error.kind(), Kind::RequestBody);
    assert_eq!(std::error::Error::source(&error).expect("source").to_string(), "disk on fire");
    idle(&connection).await;
    assert!(connection.is_usable());
}

#[tokio::test]
async fn the_response_of_one_connection_can_be_the_request_of_another() {
    // No PINGs, which would set a stalled connection going again.
    let small =
        || TransportConfig { stream_window: 70_000, connection_window: 70_000, keepalive: None, ..Default::default() };
    let (upstream, source) = pair(small(), &server()).await;
    let (downstream, sink) = pair(small(), &server()).await;
    serve(source, |_, mut respond| async move {
        let mut send = respond.send_response(Response::new(()), false).expect("open");
        write(&mut send, vec![3; 3_000_000].into(), true).await;
    });
    serve(sink, echo);
    let source = within(lease(&upstream).send(post("go"))).await.expect("response");
    // The upstream's window fills, so that the first read opens it again, behind two frames: that read comes while this
    // thread polls the idle downstream connection by itself.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let own = [Frame::data(Bytes::from("a")), Frame::data(Bytes::from("b"))].map(Ok);
    let body = StreamBody::new(futures::stream::iter(own).chain(BodyStream::new(source.into_body())));
    let request = Request::post("http://x.test/").body(body).expect("request");
    let response = within(lease(&downstream).send(request)).await.expect("response");
    assert_eq!(within(collect(response)).await.0.len(), 3_000_002);
    idle(&upstream).await;
    idle(&downstream).await;
}

#[tokio::test]
async fn a_request_that_cannot_be_sent_is_not_to_be_sent_again() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, echo);
    let request = Request::get("/").header("host", "not a host").body(Empty::<Bytes>::new()).expect("request");
    let error = within(lease(&connection).send(request)).await.expect_err("invalid");
    assert_eq!(error.kind(), Kind::InvalidRequest);
    assert!(!error.is_unprocessed());
    assert!(connection.is_usable());
    assert_eq!(connection.in_flight(), 0);
}

#[tokio::test]
async fn a_slow_reader_of_tiny_messages_keeps_its_connection() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    const MESSAGES: usize = 30_000;
    serve(server, |_, mut respond| async move {
        let mut send = respond.send_response(Response::new(()), false).expect("open");
        for i in 0..MESSAGES {
            write(&mut send, Bytes::from_static(b"tiny"), i + 1 == MESSAGES).await;
            if i % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
    });
    let get = Request::get("http://x.test/").body(Empty::<Bytes>::new()).expect("request");
    let response = within(lease(&connection).send(get)).await.expect("response");
    for _ in 0..5_000 {
        tokio::task::yield_now().await;
    }
    assert_eq!(within(collect(response)).await.0.len(), MESSAGES * 4);
    assert!(connection.is_usable());
}

#[tokio::test]
async fn the_size_of_a_response_is_known_from_its_content_length() {
    let (connection, server) = pair(TransportConfig::default(), &server()).await;
    serve(server, |_, mut respond| async move {
        let response = Response::builder().header("content-length", "6").body(()).expect("response");
        let mut send = respond.send_response(response, false).expect("open");
        send.send_data(Bytes::from("abc"), false).expect("send");
        send.send_data(Bytes::from("def"), true).expect("send");
    });
    let response = within(lease(&connection).send(post(""))).await.expect("response");
    let mut body = response.into_body();
    assert_eq!(body.size_hint().exact(), Some(6));
    within(body.frame()).await.expect("frame").expect("data");
    assert_eq!(body.size_hint().exact(), Some(3));
    within(body.frame()).await.expect("frame").expect("data");
    assert!(body.is_end_stream());
    assert!(within(body.frame()).await.is_none());
    // A body that ended has given its stream back, dropped or not.
    assert_eq!(connection.in_flight(), 0);
}

#[test]
fn the_future_of_a_call_is_small_and_the_types_can_move() {
    fn is_send_unpin<T: Send + Unpin>() {}
    is_send_unpin::<crate::transport::RecvBody>();
    is_send_unpin::<crate::transport::TransportError>();
    assert!(size_of::<crate::transport::TransportError>() == size_of::<usize>());
    fn size<F: Future + Send>(_: &impl Fn(crate::transport::Lease, Request<Full<Bytes>>) -> F) -> usize {
        size_of::<F>()
    }
    let size = size(&|lease, request| lease.send(request));
    assert!(size <= 1600, "{size} bytes");
}
