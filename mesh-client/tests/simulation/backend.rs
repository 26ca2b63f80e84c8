//! A backend that can be slow, fail, crash and come back, and that notes who comes when.

use crate::{
    ledger::Ledger,
    net::{LATENCY, Net, Pipe},
};
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
    ledger: Arc<Mutex<Ledger>>,
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
    pub(crate) fn start(net: &Net, address: SocketAddr, ledger: &Arc<Mutex<Ledger>>) -> Self {
        let mut this = Self { address, state: Arc::default(), ledger: ledger.clone(), net: net.clone(), task: None };
        this.restart();
        this
    }

    pub(crate) fn restart(&mut self) {
        let pipes = self.net.listen(self.address);
        let (state, ledger) = (self.state.clone(), self.ledger.clone());
        self.task = Some(tokio::spawn(serve(pipes, state, ledger, self.net.clone(), self.address)));
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

async fn serve(
    mut pipes: mpsc::UnboundedReceiver<Pipe>,
    state: Arc<Mutex<State>>,
    ledger: Arc<Mutex<Ledger>>,
    net: Net,
    address: SocketAddr,
) {
    let mut connections = JoinSet::new();
    while let Some(pipe) = pipes.recv().await {
        let (state, ledger, net) = (state.clone(), ledger.clone(), net.clone());
        connections.spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let retried = request.uri().path() == "/unary";
                let attempt = Ledger::arrived(&ledger, request.headers(), retried);
                let answer = answer(request, state.clone(), net.clone(), address);
                async move {
                    let (response, well) = answer.await;
                    attempt.answered(well);
                    Ok::<_, Infallible>(response)
                }
            });
            // A connection that breaks is the client's business.
            let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(pipe), service).await;
        });
    }
}

/// Whether it is a good answer, is said too.
async fn answer(
    request: Request<Incoming>,
    state: Arc<Mutex<State>>,
    net: Net,
    address: SocketAddr,
) -> (Response<Body>, bool) {
    let (head, body) = request.into_parts();
    let grpc = head.headers.contains_key("content-type");
    let (delay, fails) = {
        let mut state = state.lock().unwrap();
        state.requests += 1;
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
    let Ok(body) = body.collect().await else { return (status(503, grpc), false) };
    tokio::time::sleep(delay).await;
    if fails {
        return (status(503, grpc), false);
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
    (response, true)
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
