//! The same key goes to the same backend, whether C-core's client or ours hashes it.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use examples::backend::{Backend, Options};
use examples::greeter::HelloRequest;
use examples::greeter::greeter_client::GreeterClient;
use interop::{ccore, report};
use mesh_client::{Mesh, MeshChannel};
use mesh_control::ControlPlane;

const TARGET: &str = "xds:///greeter.default.svc.cluster.local:50051";
const KEYS: usize = 400;

/// The greeter by these backends with their weights, hashed by the header `x-key` on a ring of `size` entries at least.
fn yaml(backends: &[(Backend, u32)], size: u32) -> String {
    let endpoint = |(backend, weight): &(Backend, u32)| {
        let addr = backend.addr();
        format!("  - {{address: {}, ports: {{grpc: {}}}, weight: {weight}}}\n", addr.ip(), addr.port())
    };
    let endpoints: String = backends.iter().map(endpoint).collect();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: greeter}}\nspec:\n  hosts: \
         [greeter.default.svc.cluster.local]\n  resolution: STATIC\n  ports: [{{number: 50051, name: grpc, protocol: \
         GRPC}}]\n  endpoints:\n{endpoints}---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: \
         greeter}}\nspec:\n  host: greeter.default.svc.cluster.local\n  trafficPolicy: {{loadBalancer: {{consistentHash: \
         {{httpHeaderName: x-key, ringHash: {{minimumRingSize: {size}}}}}}}}}\n"
    )
}

/// So many backends; their weights in turn.
async fn backends(count: u8, weights: &[u32]) -> Vec<(Backend, u32)> {
    let mut backends = Vec::new();
    for (number, weight) in (1..=count).zip(weights.iter().cycle()) {
        let addr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(127, 0, 1, number)), 0);
        let backend = Backend::start(&format!("b{number}"), addr, Options::default()).await.unwrap();
        backends.push((backend, *weight));
    }
    backends
}

/// The backend of each key, by our client.
async fn ours(channel: &MeshChannel, keys: &[String]) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for key in keys {
        let mut request = tonic::Request::new(HelloRequest { name: "mesh".to_owned(), count: 0 });
        request.metadata_mut().insert("x-key", key.parse().unwrap());
        let reply = GreeterClient::new(channel.clone()).say_hello(request).await.unwrap();
        found.insert(key.clone(), reply.into_inner().backend);
    }
    found
}

async fn compare(path: &str, backends: &[(Backend, u32)], size: u32) {
    let control = ControlPlane::builder().yaml(yaml(backends, size)).start().await.unwrap();
    let keys: Vec<String> = (0..KEYS).map(|number| format!("key-{number}")).collect();
    let theirs = ccore::backends_of(TARGET, &control.bootstrap(), "x-key", &keys).await.unwrap();
    let mesh = Mesh::builder().bootstrap_json(&control.bootstrap()).unwrap().build().await.unwrap();
    let ours = ours(&mesh.channel(TARGET).unwrap(), &keys).await;
    let differ: Vec<_> = keys.iter().filter(|key| ours.get(*key) != theirs.get(*key)).collect();
    assert!(differ.is_empty(), "{} of {KEYS} keys differ, such as {:?}", differ.len(), &differ[..differ.len().min(5)]);
    let mut counts = BTreeMap::<&str, u64>::new();
    ours.values().for_each(|backend| *counts.entry(backend).or_default() += 1);
    assert!(counts.len() > 1, "all keys go to one backend");
    report::row("ring hash: C-core = mesh", path, &crate::common::listed(&counts));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn a_key_has_the_same_backend_in_ccore() {
    compare("5 backends, 1,024 entries", &backends(5, &[1]).await, 1024).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs real peers: interop/run installs them and runs this"]
async fn a_key_has_the_same_backend_in_ccore_when_weights_differ() {
    compare("6 backends, weights 1, 3, 7", &backends(6, &[1, 3, 7]).await, 512).await;
}
