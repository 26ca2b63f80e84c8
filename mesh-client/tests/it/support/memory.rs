//! A network in memory, for tests on paused time: nothing in it depends on how fast the machine is.

use bytes::Bytes;
use futures::future::BoxFuture;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use mesh_client::{
    Mesh, MeshBuilder,
    dial::{BoxedIo, Dial, ServerAddress},
};
use mesh_control::ControlPlane;
use mesh_xds::server::{ServerOptions, serve_connection};
use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::{
    io::DuplexStream,
    sync::mpsc::{self, UnboundedReceiver, UnboundedSender},
    task::JoinSet,
    time::Instant,
};

/// What a connection holds on its way, in each direction.
const CAPACITY: usize = 64 << 10;

/// All hosts there are. A handle.
#[derive(Clone, Default)]
pub(crate) struct Memory(Arc<Mutex<HashMap<SocketAddr, UnboundedSender<DuplexStream>>>>);

/// An HTTP server, version 1.1 and 2. Answers with its name as `x-backend`. Serves until dropped.
pub(crate) struct Host {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

struct State {
    delay: Duration,
    status: StatusCode,
    /// When what was asked for.
    seen: Vec<(Instant, String)>,
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// A server of this name, at an address of its own.
    pub(crate) fn host(&self, name: &'static str) -> Host {
        let number = u8::try_from(self.0.lock().unwrap().len()).unwrap();
        let addr = SocketAddr::from(([10, 0, 0, number + 1], 80));
        let state = Arc::new(Mutex::new(State { delay: Duration::ZERO, status: StatusCode::OK, seen: Vec::new() }));
        let (mut pipes, answered) = (self.listen(addr), state.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Some(pipe) = pipes.recv().await {
                let state = answered.clone();
                let service = service_fn(move |request: Request<Incoming>| {
                    let state = state.clone();
                    async move {
                        let delay = {
                            let mut state = state.lock().unwrap();
                            state.seen.push((Instant::now(), request.uri().path().to_owned()));
                            state.delay
                        };
                        tokio::time::sleep(delay).await;
                        let response = Response::builder().status(state.lock().unwrap().status);
                        Ok::<_, Infallible>(response.header("x-backend", name).body(Full::<Bytes>::default()).unwrap())
                    }
                });
                connections.spawn(async move {
                    // A connection that breaks is the client's business.
                    let _ =
                        auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(pipe), service).await;
                });
            }
        });
        Host { addr, state, _tasks: tasks }
    }

    /// A mesh in this network, on this control plane.
    pub(crate) async fn mesh(&self, cp: &ControlPlane) -> Mesh {
        self.build(cp, Mesh::builder()).await
    }

    /// The same, of this builder.
    pub(crate) async fn build(&self, cp: &ControlPlane, builder: MeshBuilder) -> Mesh {
        let (mut pipes, cache) = (self.listen(control_plane()), cp.cache().clone());
        tokio::spawn(async move {
            while let Some(pipe) = pipes.recv().await {
                tokio::spawn(serve_connection(pipe, cache.clone(), ServerOptions::default()));
            }
        });
        builder.bootstrap_json(&cp.bootstrap()).unwrap().dial(self.clone()).build().await.unwrap()
    }

    fn listen(&self, addr: SocketAddr) -> UnboundedReceiver<DuplexStream> {
        let (backlog, pipes) = mpsc::unbounded_channel();
        self.0.lock().unwrap().insert(addr, backlog);
        pipes
    }
}

fn control_plane() -> SocketAddr {
    SocketAddr::from(([10, 1, 0, 1], 80))
}

impl Dial for Memory {
    fn endpoint(&self, address: SocketAddr) -> BoxFuture<'static, io::Result<BoxedIo>> {
        let backlog = self.0.lock().unwrap().get(&address).cloned();
        Box::pin(async move {
            let (near, far) = tokio::io::duplex(CAPACITY);
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            backlog.ok_or_else(refused)?.send(far).map_err(|_| refused())?;
            Ok(Box::new(near) as BoxedIo)
        })
    }

    /// There is only one, whatever its name.
    fn control_plane(&self, _: &ServerAddress) -> BoxFuture<'static, io::Result<BoxedIo>> {
        self.endpoint(control_plane())
    }
}

impl Host {
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Before each answer, from now on.
    pub(crate) fn set_delay(&self, delay: Duration) {
        self.state.lock().unwrap().delay = delay;
    }

    /// What it answers from now on.
    pub(crate) fn set_status(&self, status: u16) {
        self.state.lock().unwrap().status = StatusCode::from_u16(status).unwrap();
    }

    /// When it was asked for this path.
    pub(crate) fn seen(&self, path: &str) -> Vec<Instant> {
        let state = self.state.lock().unwrap();
        state.seen.iter().filter(|(_, asked)| asked == path).map(|(at, _)| *at).collect()
    }

    /// The time from each request for this path to the next.
    pub(crate) fn gaps(&self, path: &str) -> Vec<Duration> {
        self.seen(path).windows(2).map(|two| two[1] - two[0]).collect()
    }
}
