//! A backend that can be slow, fail, crash and come back, and that notes who comes when.

use crate::net::{LATENCY, Net, Pipe};
use bytes::Bytes;
use futures::stream;
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    sync::mpsc,
    task::{JoinHandle, JoinSet},
    time::Instant,
};

/// One backend, at one address.
pub(crate) struct Backend {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
    net: Net,
    task: Option<JoinHandle<()>>,
}

/// How it is, and what it has seen.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Before each answer.
    pub(crate) delay: Duration,
    /// Of a hundred requests, so many fail.
    pub(crate) failing: u32,
    pub(crate) requests: u32,
    /// Those of them that say that they were tried before.
    pub(crate) retries: u32,
    /// Streams that are being answered.
    pub(crate) streams: u32,
    /// Since then its client knows that it is no endpoint any more.
    pub(crate) gone: Option<Instant>,
    /// What should not have come.
    pub(crate) wrong: Vec<String>,
}

/// A stream, while it is answered.
struct Streaming(Arc<Mutex<State>>);

type Body = BoxBody<Bytes, Infallible>;

/// Requests were on their way for so long at most when their endpoint was removed.
const ON_ITS_WAY: Duration = LATENCY.saturating_mul(4);
/// Between two messages of a stream.
const BEAT: Duration = Duration::from_millis(200);

impl Backend {
    pub(crate) fn start(net: &Net, address: SocketAddr) -> Self {
        let mut this = Self { address, state: Arc::default(), net: net.clone(), task: None };
        this.restart();
        this
    }

    pub(crate) fn restart(&mut self) {
        let pipes = self.net.listen(self.address);
        self.task = Some(tokio::spawn(serve(pipes, self.state.clone(), self.net.clone(), self.address)));
    }

    /// `silently`: its clients are not told.
    pub(crate) fn crash(&mut self, silently: bool) {
        self.net.crash(self.address, silently);
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    pub(crate) fn is_up(&self) -> bool {
        self.task.is_some()
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn serve(mut pipes: mpsc::UnboundedReceiver<Pipe>, state: Arc<Mutex<State>>, net: Net, address: SocketAddr) {
    let mut connections = JoinSet::new();
    while let Some(pipe) = pipes.recv().await {
        let (state, net) = (state.clone(), net.clone());
        connections.spawn(async move {
            let service = service_fn(move |request| answer(request, state.clone(), net.clone(), address));
            // A connection that breaks is the client's business.
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(pipe), service).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    net: Net,
    address: SocketAddr,
) -> Result<Response<Body>, Infallible> {
    let (head, body) = request.into_parts();
    let grpc = head.headers.contains_key("content-type");
    let (delay, fails) = {
        let mut state = state.lock().unwrap();
        state.requests += 1;
        state.retries += u32::from(is_retry(&head.headers));
        if let Some(gone) = state.gone
            && gone.elapsed() > ON_ITS_WAY
            && net.quiet_since(address, gone)
        {
            let line = format!("{} came to {address} {:?} after its removal", head.uri.path(), gone.elapsed());
            state.wrong.push(line);
        }
        (state.delay, fastrand::u32(..100) < state.failing)
    };
    // What cannot be read is not answered either.
    let Ok(body) = body.collect().await else { return Ok(status(503, grpc)) };
    tokio::time::sleep(delay).await;
    if fails {
        return Ok(status(503, grpc));
    }
    let beats = head.headers.get("x-beats").and_then(|beats| beats.to_str().ok()?.parse().ok()).unwrap_or(0);
    let size = body.to_bytes().len();
    state.lock().unwrap().streams += 1;
    let streaming = Streaming(state);
    let frames = stream::unfold((0, Some(streaming)), move |(sent, streaming)| async move {
        let streaming = streaming?;
        if sent > beats {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", HeaderValue::from_static("0"));
            return grpc.then(|| (Ok(Frame::trailers(trailers)), (sent, None)));
        }
        if sent > 0 {
            tokio::time::sleep(BEAT).await;
        }
        Some((Ok(Frame::data(Bytes::from(vec![b'.'; size + 5]))), (sent + 1, Some(streaming))))
    });
    let mut response = Response::new(BodyExt::boxed(StreamBody::new(frames)));
    if grpc {
        response.headers_mut().insert("content-type", HeaderValue::from_static("application/grpc"));
    }
    let name = HeaderValue::from_str(&address.to_string()).unwrap();
    response.headers_mut().insert("x-backend", name);
    Ok(response)
}

/// Any attempt but the first says so, as its profile does.
fn is_retry(headers: &HeaderMap) -> bool {
    let number = |name| headers.get(name).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    number("grpc-previous-rpc-attempts").is_some_and(|previous| previous > 0)
        || number("x-envoy-attempt-count").is_some_and(|count| count > 1)
}

fn status(status: u16, grpc: bool) -> Response<Body> {
    let response = match grpc {
        false => Response::builder().status(status),
        true => Response::builder().header("content-type", "application/grpc").header("grpc-status", 14),
    };
    response.body(http_body_util::Empty::new().boxed()).unwrap()
}

impl Drop for Streaming {
    fn drop(&mut self) {
        self.0.lock().unwrap().streams -= 1;
    }
}
