use super::{
    super::{Any, ResourceSet, ResourceType},
    *,
};
use envoy_types::pb::{
    envoy::{
        config::core::v3::Node,
        service::discovery::v3::aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    google::rpc,
};
use examples::port::Port;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

/// A raw ADS client.
struct Client {
    requests: mpsc::Sender<DiscoveryRequest>,
    responses: Streaming<DiscoveryResponse>,
}

impl Client {
    async fn connect(addr: SocketAddr) -> Self {
        let mut client = AggregatedDiscoveryServiceClient::connect(format!("http://{addr}")).await.unwrap();
        let (requests, outbound) = mpsc::channel(16);
        let responses = client.stream_aggregated_resources(ReceiverStream::new(outbound)).await.unwrap().into_inner();
        Self { requests, responses }
    }

    async fn ask(&self, resource_type: ResourceType, names: &[&str], nonce: &str, error: Option<&str>) {
        let request = DiscoveryRequest {
            node: Some(Node { id: "raw".into(), ..Node::default() }),
            type_url: resource_type.type_url().to_owned(),
            resource_names: names.iter().map(|&n| n.to_owned()).collect(),
            response_nonce: nonce.to_owned(),
            error_detail: error.map(|m| rpc::Status { code: 3, message: m.to_owned(), details: Vec::new() }),
            ..DiscoveryRequest::default()
        };
        self.requests.send(request).await.unwrap();
    }

    async fn response(&mut self) -> DiscoveryResponse {
        self.responses.message().await.unwrap().expect("the stream is open")
    }
}

fn any(content: &str) -> Any {
    Any { type_url: ResourceType::Cluster.type_url().to_owned(), value: content.as_bytes().to_vec() }
}

async fn server() -> AdsServer {
    AdsServer::bind("127.0.0.1:0", ResourceCache::new()).await.unwrap()
}

#[tokio::test]
async fn a_client_gets_its_resources_and_every_change() {
    let server = server().await;
    server.cache().set(ResourceSet::new().with(ResourceType::Cluster, "c", any("1")));
    let mut client = Client::connect(server.addr()).await;
    client.ask(ResourceType::Cluster, &["c"], "", None).await;
    let first = client.response().await;
    assert_eq!((first.version_info.as_str(), &first.resources[..]), ("1", &[any("1")][..]));
    client.ask(ResourceType::Cluster, &["c"], &first.nonce, None).await;
    server.cache().settled(1).await;
    assert_eq!(server.connections(), 1);

    let version = server.cache().update(ResourceType::Cluster, "c", any("2"));
    let second = client.response().await;
    assert_eq!((second.version_info.as_str(), &second.resources[..]), ("2", &[any("2")][..]));
    client.ask(ResourceType::Cluster, &["c"], &second.nonce, None).await;
    server.cache().settled(version).await;
}

#[tokio::test]
async fn changes_faster_than_the_client_are_coalesced_into_the_last() {
    let server = server().await;
    let mut client = Client::connect(server.addr()).await;
    client.ask(ResourceType::Cluster, &[], "", None).await;
    client.response().await;
    let mut last = 0;
    for n in 0..1000 {
        last = server.cache().update(ResourceType::Cluster, "c", any(&n.to_string()));
    }
    let mut responses = 0;
    loop {
        let response = client.response().await;
        responses += 1;
        if response.version_info == last.to_string() {
            assert_eq!(response.resources, [any("999")]);
            break;
        }
    }
    assert!(responses <= 1000);
}

#[tokio::test]
async fn a_refusal_reaches_the_watchers_with_node_type_and_detail() {
    let server = server().await;
    server.cache().update(ResourceType::Cluster, "c", any("1"));
    let mut nacks = server.cache().nacks();
    let mut client = Client::connect(server.addr()).await;
    client.ask(ResourceType::Cluster, &["c"], "", None).await;
    let response = client.response().await;
    client.ask(ResourceType::Cluster, &["c"], &response.nonce, Some("Cluster c: lb_policy: not supported")).await;
    let nack = nacks.recv().await.unwrap();
    assert_eq!((nack.node_id.as_str(), nack.resource_type, nack.version), ("raw", ResourceType::Cluster, 1));
    assert_eq!(nack.detail, "Cluster c: lb_policy: not supported");
    assert_eq!(server.cache().recent_nacks(), [nack]);
}

#[tokio::test]
async fn shutdown_ends_streams_with_unavailable_and_frees_the_port() {
    let port = Port::take("127.0.0.1:0".parse().unwrap()).unwrap();
    let (addr, cache) = (port.addr(), ResourceCache::new());
    let server = AdsServer::bind(addr, cache.clone()).await.unwrap();
    let mut client = Client::connect(addr).await;
    client.ask(ResourceType::Listener, &["l"], "", None).await;
    client.response().await;
    server.shutdown().await;
    assert_eq!(client.responses.message().await.unwrap_err().code(), tonic::Code::Unavailable);
    assert!(cache.streams().borrow().is_empty());

    let again = AdsServer::bind(addr, cache).await.unwrap();
    let mut client = Client::connect(again.addr()).await;
    client.ask(ResourceType::Listener, &["l"], "", None).await;
    assert_eq!(client.response().await.nonce, "1");
}

#[tokio::test]
async fn dropping_the_server_cuts_its_clients() {
    let server = server().await;
    let cache = server.cache().clone();
    let mut client = Client::connect(server.addr()).await;
    client.ask(ResourceType::Listener, &["l"], "", None).await;
    client.response().await;
    drop(server);
    assert!(client.responses.message().await.is_err());
    cache.streams().wait_for(|streams| streams.is_empty()).await.unwrap();
}

#[tokio::test]
async fn a_stream_that_the_client_ends_is_forgotten() {
    let server = server().await;
    let mut client = Client::connect(server.addr()).await;
    client.ask(ResourceType::Listener, &["l"], "", None).await;
    client.response().await;
    assert_eq!(server.connections(), 1);
    drop(client);
    server.cache().streams().wait_for(|streams| streams.is_empty()).await.unwrap();
    assert_eq!(server.connections(), 0);
}
