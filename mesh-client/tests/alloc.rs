//! A unary call through the whole channel allocates at most two blocks more than the bare transport does.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, Version};
use http_body::Body;
use http_body_util::{BodyExt, Full};
use mesh_client::{Mesh, MeshChannel, bare::Bare};
use mesh_xds::{
    resource::{CircuitBreakers, Cluster, OutlierDetection, RetryOn, RetryPolicy, Thresholds},
    source::Policy,
};
use metrics_util::debugging::DebuggingRecorder;
use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    net::{Ipv4Addr, SocketAddr},
    sync::{Arc, mpsc},
    time::Duration,
};
use tokio::{net::TcpListener, runtime::Builder, task::JoinSet};
use tower::{Service, ServiceExt};

/// Blocks that the channel may allocate above the bare transport's.
const ALLOWED: f64 = 2.0;
/// What is no part of a call, spread over many calls: a table that grows, a block of samples of a histogram.
const NOISE: f64 = 0.1;

thread_local! {
    /// Of this thread: the server runs on another one.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[global_allocator]
static GLOBAL: Counting = Counting;

/// The system allocator, with a count by thread.
struct Counting;

fn count() {
    // Not counted while a thread ends.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

#[allow(unsafe_code, reason = "GlobalAlloc is an unsafe trait; every call is passed to the system allocator unchanged")]
// SAFETY: each method only counts and forwards its arguments to `System`, which upholds the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller upholds the contract of `alloc`, which is the one of `System.alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, ptr: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        count();
        // SAFETY: as above.
        unsafe { System.realloc(ptr, layout, new_size) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

/// A client under test.
trait Call: Clone + 'static {
    fn call(&self) -> impl Future<Output = ()>;
}

impl Call for Bare {
    async fn call(&self) {
        finish(Self::call(self, request()).await.expect("the server answers")).await;
    }
}

impl Call for MeshChannel {
    async fn call(&self) {
        let mut channel = self.clone();
        let channel = ServiceExt::<Request<Full<Bytes>>>::ready(&mut channel).await.expect("always ready");
        finish(channel.call(request()).await.expect("the server answers")).await;
    }
}

#[test]
fn a_unary_call_allocates_at_most_two_blocks_more_than_the_bare_transport() {
    DebuggingRecorder::new().install().expect("the only recorder of this process");
    let address = serve();
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let bare = Bare::connect(&[address]).await.expect("the server listens");
        let mesh = Mesh::builder().policy(everything_on()).build().await.expect("inside a runtime");
        let channel = mesh.fixed_channel(&[address]).expect("one address");
        for tasks in [1, 16] {
            let (bare, channel) = (per_call(&bare, tasks).await, per_call(&channel, tasks).await);
            assert!(bare > 1.0, "the counter does not count: {bare}");
            assert!(
                channel <= bare + ALLOWED + NOISE,
                "{tasks} at a time: {channel:.2} allocations per call, the bare transport needs {bare:.2}"
            );
        }
    });
}

/// Blocks allocated per call by this thread, with `tasks` calls in flight.
async fn per_call(client: &impl Call, tasks: u64) -> f64 {
    calls(client, tasks, 200).await;
    // Twice, so that what the tasks themselves cost falls out.
    let (short, long) = (calls(client, tasks, 200).await, calls(client, tasks, 700).await);
    (long - short) as f64 / (500 * tasks) as f64
}

async fn calls(client: &impl Call, tasks: u64, each: u64) -> u64 {
    let before = ALLOCATIONS.get();
    let mut running = JoinSet::new();
    for _ in 0..tasks {
        let client = client.clone();
        running.spawn_local(async move {
            for _ in 0..each {
                client.call().await;
            }
        });
    }
    while let Some(joined) = running.join_next().await {
        joined.expect("no task panics");
    }
    ALLOCATIONS.get() - before
}

/// What Istio puts on a route, and all that counts requests.
fn everything_on() -> Policy {
    let on = RetryOn { grpc_codes: 1 << 14, connect_failure: true, refused_stream: true, ..RetryOn::default() };
    let retry = RetryPolicy { on, num_retries: 2, avoid_previous_hosts: true, ..RetryPolicy::default() };
    let cluster = Cluster {
        circuit_breakers: CircuitBreakers {
            default: Thresholds { max_requests: 100, ..Thresholds::default() },
            ..CircuitBreakers::default()
        },
        outlier_detection: Some(Arc::new(OutlierDetection::default())),
        ..Cluster::fixed("", Arc::default())
    };
    Policy { cluster: Some(cluster), retry: Some(Arc::new(retry)), timeout: Some(Duration::ZERO), ..Policy::default() }
}

fn request() -> Request<Full<Bytes>> {
    let mut request = Request::post("/test.Echo/Unary").version(Version::HTTP_2);
    let headers = request.headers_mut().expect("a valid request");
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    request.body(Full::new(Bytes::from_static(&[0; 69]))).expect("a valid request")
}

async fn finish<B: Body<Data = Bytes, Error: std::fmt::Debug>>(response: Response<B>) {
    let mut body = std::pin::pin!(response.into_body());
    let (mut length, mut status) = (0, None);
    while let Some(frame) = body.frame().await {
        match frame.expect("the response is whole").into_data() {
            Ok(data) => length += data.len(),
            Err(frame) => status = frame.into_trailers().ok().and_then(|trailers| trailers.get("grpc-status").cloned()),
        }
    }
    assert_eq!((length, status), (69, Some(HeaderValue::from_static("0"))));
}

/// A gRPC echo on a thread of its own, which lives as long as the process.
fn serve() -> SocketAddr {
    let (started, address) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a free port");
            started.send(listener.local_addr().expect("it is bound")).expect("the test waits");
            while let Ok((socket, _)) = listener.accept().await {
                socket.set_nodelay(true).expect("a TCP socket");
                tokio::spawn(connection(socket));
            }
        });
    });
    address.recv().expect("the server starts")
}

async fn connection(socket: tokio::net::TcpStream) -> Result<(), h2::Error> {
    let mut connection = h2::server::handshake(socket).await?;
    while let Some(request) = connection.accept().await {
        let (request, mut respond) = request?;
        tokio::spawn(async move {
            let mut body = request.into_body();
            let mut stream = respond.send_response(Response::new(()), false)?;
            while let Some(chunk) = body.data().await {
                let chunk = chunk?;
                body.flow_control().release_capacity(chunk.len())?;
                stream.send_data(chunk, false)?;
            }
            stream.send_trailers(HeaderMap::from_iter([(
                "grpc-status".parse().expect("a name"),
                "0".parse().expect("a value"),
            )]))?;
            Ok::<_, h2::Error>(())
        });
    }
    Ok(())
}
