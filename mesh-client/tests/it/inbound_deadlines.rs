//! How long a request of a server may take: by its caller, and by its route.

use crate::{
    inbound_serve::{http2, post},
    support::{
        ANY, GUARD,
        inbound::{Echo, Seen, Serving, plain},
        until,
    },
};
use bytes::Bytes;
use futures::StreamExt;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use mesh_client::{
    Inbound,
    access_log::AccessLog,
    inbound::{Limits, RequestBody},
};
use std::{convert::Infallible, sync::Arc};
use tokio::{sync::mpsc, time::timeout};
use tower::Layer;

fn grpc(path: &str, limit: &str) -> Request<Full<Bytes>> {
    let mut request = post(path, "");
    request.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
    request.headers_mut().insert("grpc-timeout", limit.parse().unwrap());
    request
}

fn says<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).map_or("", |value| value.to_str().unwrap())
}

#[tokio::test]
async fn the_callers_deadline_is_the_handlers() {
    let (log, mut logs) = mpsc::unbounded_channel();
    let hook = move |entry: &AccessLog| _ = log.send((entry.status, entry.grpc_status, entry.flags.to_string()));
    let inbound = Inbound::builder().access_log(hook).bind(ANY).await.unwrap();
    let seen = Arc::<Seen>::default();
    let serving = Serving::of(inbound, Echo(seen.clone()));
    let mut client = http2(serving.addr).await;
    let answer = timeout(GUARD, client.send_request(grpc("/hang", "50m"))).await.expect("it ends").unwrap();
    assert_eq!((answer.status().as_u16(), says(answer.headers(), "grpc-status")), (200, "4"));
    until("its handler is gone", async || seen.running() == 0).await;
    assert_eq!(timeout(GUARD, logs.recv()).await.unwrap(), Some((200, Some(4), "UT".to_owned())));

    // One that is answered in time, and one that is none of gRPC's.
    let answer = client.send_request(grpc("/", "1H")).await.unwrap();
    assert_eq!(says(answer.headers(), "grpc-status"), "");
    let mut plain = post("/deaf", "");
    plain.headers_mut().insert("grpc-timeout", "0n".parse().unwrap());
    assert_eq!(client.send_request(plain).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_stream_ends_with_its_deadline() {
    let service = tower::service_fn(async |_: Request<RequestBody>| {
        let first = futures::stream::iter([Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"first")))]);
        Ok::<_, Infallible>(Response::new(StreamBody::new(first.chain(futures::stream::pending()))))
    });
    let serving = Serving::of(plain(Limits::default()).await, service);
    let mut client = http2(serving.addr).await;
    let answer = client.send_request(grpc("/", "100m")).await.unwrap();
    let body = timeout(GUARD, answer.into_body().collect()).await.expect("it ends").unwrap();
    assert_eq!(says(body.trailers().unwrap(), "grpc-status"), "4");
    assert_eq!(body.to_bytes(), "first");
}

#[tokio::test]
async fn the_layer_keeps_deadlines_too() {
    let inbound = plain(Limits::default()).await;
    let (mut incoming, addr, seen) = (inbound.incoming(), inbound.local_addr(), Arc::<Seen>::default());
    let served = seen.clone();
    tokio::spawn(async move {
        while let Some(Ok(stream)) = incoming.next().await {
            let hangs = tower::service_fn({
                let seen = served.clone();
                move |_: Request<hyper::body::Incoming>| {
                    let running = crate::support::inbound::Running::of(&seen);
                    async move {
                        let _running = running;
                        futures::future::pending::<Result<Response<Full<Bytes>>, Infallible>>().await
                    }
                }
            });
            let service = TowerToHyperService::new(stream.layer().layer(hangs));
            tokio::spawn(async move {
                let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let mut client = http2(addr).await;
    let answer = timeout(GUARD, client.send_request(grpc("/", "50m"))).await.expect("it ends").unwrap();
    assert_eq!(says(answer.headers(), "grpc-status"), "4");
    until("its handler is gone", async || seen.running() == 0).await;
}
