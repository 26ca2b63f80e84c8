//! Backends and calls that the tests share.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use examples::backend::{Backend, Options};
use examples::greeter::greeter_client::GreeterClient;
use examples::greeter::greeter_server::{Greeter, GreeterServer};
use examples::greeter::{HelloReply, HelloRequest};
use futures::stream::Empty;
use interop::Outcome;
use mesh_client::{ConnectionInfo, Inbound, Mesh};
use tonic::body::Body;
use tonic::client::GrpcService;
use tonic::codegen::StdError;
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic::service::Routes;
use tonic::{Request, Response, Status, Streaming};

/// The greeter at `addr`, that lets in these accounts of its namespace alone.
pub(crate) fn guarded(addr: SocketAddr, accounts: &[&str]) -> String {
    let principals: Vec<_> = accounts.iter().map(|account| format!("cluster.local/ns/default/sa/{account}")).collect();
    format!(
        "
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {{name: greeter, namespace: default}}
spec:
  hosts: [greeter.default.svc.cluster.local]
  location: MESH_INTERNAL
  resolution: STATIC
  ports: [{{number: 50051, name: grpc, protocol: GRPC}}]
  endpoints: [{{address: {}, ports: {{grpc: {}}}, serviceAccount: greeter, labels: {{app: greeter}}}}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {{name: greeter, namespace: default}}
spec:
  selector: {{matchLabels: {{app: greeter}}}}
  action: ALLOW
  rules: [{{from: [{{source: {{principals: [{}]}}}}]}}]
",
        addr.ip(),
        addr.port(),
        principals.join(", ")
    )
}

/// Three greeters: `v1-a`, `v1-b` and `v2-a`.
#[derive(Debug)]
pub(crate) struct Backends([Backend; 3]);

impl Backends {
    /// Each on a loopback address of its own, 127.0.1.1 to 127.0.1.3.
    pub(crate) async fn start_apart() -> Self {
        Self::start([[127, 0, 1, 1], [127, 0, 1, 2], [127, 0, 1, 3]]).await
    }

    /// All on 127.0.0.1.
    pub(crate) async fn start_together() -> Self {
        Self::start([[127, 0, 0, 1]; 3]).await
    }

    async fn start([one, two, three]: [[u8; 4]; 3]) -> Self {
        let start = async |host: [u8; 4], name| {
            let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::from(host)), 0);
            Backend::start(name, addr, Options::default()).await.expect("loopback has free ports")
        };
        Self([start(one, "v1-a").await, start(two, "v1-b").await, start(three, "v2-a").await])
    }

    /// Closes the port of this one and cuts its connections.
    pub(crate) async fn kill(&mut self, name: &str) {
        let backend = self.0.iter_mut().find(|backend| backend.state().name() == name).expect("a known name");
        backend.kill().await;
    }

    /// How many calls reached them.
    pub(crate) fn calls(&self) -> u64 {
        self.0.iter().map(|backend| backend.state().calls()).sum()
    }

    /// `yaml` with the ports of these backends in the place of 6001, 6002 and 6003.
    pub(crate) fn written_into(&self, yaml: &str) -> String {
        self.0.iter().zip(["6001", "6002", "6003"]).fold(yaml.to_owned(), |yaml, (backend, placeholder)| {
            assert!(yaml.contains(placeholder), "the YAML has no port {placeholder}");
            yaml.replace(placeholder, &backend.addr().port().to_string())
        })
    }
}

/// Makes `requests` calls one after another over `channel`, with these headers on each.
pub(crate) async fn call<T>(channel: T, requests: u32, headers: &[(&'static str, &'static str)]) -> Outcome
where
    T: GrpcService<Body>,
    T::Error: Into<StdError>,
    T::ResponseBody: http_body::Body<Data = Bytes> + Send + 'static,
    <T::ResponseBody as http_body::Body>::Error: Into<StdError> + Send,
{
    let mut client = GreeterClient::new(channel);
    let mut outcome = Outcome::default();
    for _ in 0..requests {
        let mut request = Request::new(HelloRequest { name: "mesh".to_owned(), count: 0 });
        for &(name, value) in headers {
            let name = AsciiMetadataKey::from_static(name);
            request.metadata_mut().insert(name, AsciiMetadataValue::from_static(value));
        }
        match client.say_hello(request).await {
            Ok(reply) => {
                *outcome.codes.entry("OK".to_owned()).or_default() += 1;
                let reply = reply.into_inner();
                *outcome.backends.entry(reply.backend).or_default() += 1;
                *outcome.callers.entry(reply.peer).or_default() += 1;
            }
            Err(status) => {
                *outcome.codes.entry(name(status.code())).or_default() += 1;
                *outcome.details.entry(status.message().to_owned()).or_default() += 1;
            }
        }
    }
    outcome
}

/// Calls by our client, with no identity, in plain text.
pub(crate) async fn call_plainly(addr: SocketAddr) -> Outcome {
    let mesh = Mesh::builder().build().await.unwrap();
    call(mesh.fixed_channel(&[addr]).unwrap(), 1, &[]).await
}

/// The certificates that callers showed, each once, in DER.
pub(crate) type Seen = Arc<Mutex<BTreeSet<Vec<u8>>>>;

/// Tells callers who they are.
struct Mirror(Seen);

#[tonic::async_trait]
impl Greeter for Mirror {
    type SayHellosStream = Empty<Result<HelloReply, Status>>;
    type ChatStream = Empty<Result<HelloReply, Status>>;

    async fn say_hello(&self, request: Request<HelloRequest>) -> Result<Response<HelloReply>, Status> {
        let connection = request.extensions().get::<ConnectionInfo>().expect("it came over our own connections");
        if let Some(peer) = connection.peer() {
            self.0.lock().unwrap().insert(peer.certificate().to_vec());
        }
        let peer = connection.peer().and_then(|peer| peer.spiffe_id()).map(ToString::to_string).unwrap_or_default();
        Ok(Response::new(HelloReply { backend: "mesh".to_owned(), peer, ..HelloReply::default() }))
    }

    async fn say_hellos(&self, _: Request<HelloRequest>) -> Result<Response<Self::SayHellosStream>, Status> {
        Err(Status::unimplemented("SayHello is enough here"))
    }

    async fn chat(&self, _: Request<Streaming<HelloRequest>>) -> Result<Response<Self::ChatStream>, Status> {
        Err(Status::unimplemented("SayHello is enough here"))
    }
}

/// A greeter that tells callers who they are, and what it sees of them.
pub(crate) fn greeter() -> (Routes, Seen) {
    let seen = Seen::default();
    (Routes::new(GreeterServer::new(Mirror(seen.clone()))), seen)
}

/// Serves [`greeter`] until the runtime ends.
pub(crate) fn serve(inbound: &Inbound) -> Seen {
    let (inbound, (greeter, seen)) = (inbound.clone(), greeter());
    tokio::spawn(async move { inbound.serve(greeter).await });
    seen
}

/// The status by its name in the protocol, as C-core prints it.
fn name(code: tonic::Code) -> String {
    let mut name = String::new();
    for letter in format!("{code:?}").chars() {
        if letter.is_uppercase() && !name.is_empty() && code != tonic::Code::Ok {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

/// Checks that `part` of `whole` is `share` within five standard deviations of a fair draw.
#[track_caller]
pub(crate) fn assert_share(part: u64, whole: u64, share: f64) {
    let (part, whole) = (part as f64, whole as f64);
    let spread = 5.0 * (whole * share * (1.0 - share)).sqrt();
    let expected = whole * share;
    assert!((part - expected).abs() <= spread, "{part} of {whole}, where {expected} +- {spread:.0} were expected");
}

/// `{"a": 1, "b": 2}` as `a 1, b 2`.
pub(crate) fn listed(counts: &std::collections::BTreeMap<impl std::fmt::Display, u64>) -> String {
    counts.iter().map(|(name, count)| format!("{name} {count}")).collect::<Vec<_>>().join(", ")
}
