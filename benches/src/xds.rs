//! A control plane of the bench's own (state of the world, one version per type): the same for every client, and it
//! keeps the time of each send and each answer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Result, anyhow};
use envoy_types::pb::envoy::service::discovery::v3::aggregated_discovery_service_server::{
    AggregatedDiscoveryService, AggregatedDiscoveryServiceServer,
};
use envoy_types::pb::envoy::service::discovery::v3::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};
use futures::{Stream, StreamExt, stream};
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tonic::{Request, Response, Status, Streaming};

use crate::resource::Resource;

/// What happened on a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A response left.
    Sent {
        /// Its type URL.
        type_url: String,
        /// Its version.
        version: u64,
        /// When.
        at: Instant,
    },
    /// The client accepted a response.
    Acked {
        /// The type URL.
        type_url: String,
        /// The version accepted.
        version: u64,
        /// When.
        at: Instant,
    },
}

#[derive(Debug, Clone, Default)]
struct Config {
    types: BTreeMap<String, (u64, Vec<Resource>)>,
}

impl Config {
    fn set(&mut self, resources: Vec<Resource>) {
        let mut by_type: BTreeMap<String, Vec<Resource>> = BTreeMap::new();
        for resource in resources {
            by_type.entry(resource.any.type_url.clone()).or_default().push(resource);
        }
        for (type_url, resources) in by_type {
            let entry = self.types.entry(type_url).or_default();
            *entry = (entry.0 + 1, resources);
        }
    }
}

/// A running control plane; it stops when this is dropped.
#[derive(Debug)]
pub struct ControlPlane {
    address: SocketAddr,
    config: Arc<watch::Sender<Config>>,
    events: Arc<Mutex<Vec<Event>>>,
    server: AbortHandle,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.server.abort();
    }
}

impl ControlPlane {
    /// Starts one on a free port of 127.0.0.1.
    ///
    /// # Errors
    /// When the socket cannot be opened.
    pub async fn start(resources: Vec<Resource>) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let address = listener.local_addr()?;
        let mut config = Config::default();
        config.set(resources);
        let config = Arc::new(watch::Sender::new(config));
        let events = Arc::default();
        let service = Ads { config: Arc::clone(&config), events: Arc::clone(&events) };
        let incoming = stream::unfold(listener, |listener| async {
            let accepted = listener.accept().await.map(|(socket, _)| {
                // Without it an update may wait for the acknowledgement of the last one.
                let _ = socket.set_nodelay(true);
                socket
            });
            Some((accepted, listener))
        });
        let server = tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(AggregatedDiscoveryServiceServer::new(service))
                .serve_with_incoming(incoming),
        );
        Ok(Self { address, config, events, server: server.abort_handle() })
    }

    /// A gRPC bootstrap that leads here. `scheme` goes before the address: tonic-xds wants `http://`, others nothing.
    #[must_use]
    pub fn bootstrap(&self, scheme: &str) -> String {
        bootstrap(&self.address.to_string(), scheme)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Replaces all resources of each type that occurs in `resources`, and sends them to who asked for them.
    pub fn set(&self, resources: Vec<Resource>) {
        self.config.send_modify(|config| config.set(resources));
    }

    /// All that happened so far.
    #[must_use]
    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A gRPC bootstrap for the control plane at `address`.
#[must_use]
pub fn bootstrap(address: &str, scheme: &str) -> String {
    serde_json::json!({
        "xds_servers": [{
            "server_uri": format!("{scheme}{address}"),
            "channel_creds": [{"type": "insecure"}],
            "server_features": ["xds_v3"],
        }],
        "node": {"id": "bench", "cluster": "bench", "locality": {"region": "bench", "zone": "z0"}},
    })
    .to_string()
}

struct Ads {
    config: Arc<watch::Sender<Config>>,
    events: Arc<Mutex<Vec<Event>>>,
}

type ResponseStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl AggregatedDiscoveryService for Ads {
    type StreamAggregatedResourcesStream = ResponseStream<DiscoveryResponse>;
    type DeltaAggregatedResourcesStream = ResponseStream<DeltaDiscoveryResponse>;

    async fn stream_aggregated_resources(
        &self,
        request: Request<Streaming<DiscoveryRequest>>,
    ) -> Result<Response<Self::StreamAggregatedResourcesStream>, Status> {
        let (sender, receiver) = mpsc::channel(16);
        let session = Session {
            config: self.config.subscribe(),
            events: Arc::clone(&self.events),
            sender,
            wanted: HashMap::new(),
            sent: HashMap::new(),
        };
        tokio::spawn(session.run(request.into_inner()));
        let responses = stream::unfold(receiver, |mut receiver| async {
            let response = receiver.recv().await?;
            Some((Ok(response), receiver))
        });
        Ok(Response::new(responses.boxed()))
    }

    async fn delta_aggregated_resources(
        &self,
        _: Request<Streaming<DeltaDiscoveryRequest>>,
    ) -> Result<Response<Self::DeltaAggregatedResourcesStream>, Status> {
        Err(Status::unimplemented("state of the world only"))
    }
}

/// One stream.
struct Session {
    config: watch::Receiver<Config>,
    events: Arc<Mutex<Vec<Event>>>,
    sender: mpsc::Sender<DiscoveryResponse>,
    wanted: HashMap<String, BTreeSet<String>>,
    sent: HashMap<String, u64>,
}

impl Session {
    async fn run(mut self, mut requests: Streaming<DiscoveryRequest>) -> Result<()> {
        loop {
            tokio::select! {
                request = requests.next() => match request {
                    Some(request) => self.request(request?).await?,
                    None => return Ok(()),
                },
                changed = self.config.changed() => {
                    changed?;
                    let types: Vec<String> = self.wanted.keys().cloned().collect();
                    for type_url in types {
                        self.send(&type_url, false).await?;
                    }
                }
            }
        }
    }

    async fn request(&mut self, request: DiscoveryRequest) -> Result<()> {
        let type_url = request.type_url;
        if let Some(error) = request.error_detail {
            return Err(anyhow!("the client rejected {type_url}: {}", error.message));
        }
        if !request.response_nonce.is_empty() {
            let version = request.version_info.parse().unwrap_or(0);
            self.event(Event::Acked { type_url: type_url.clone(), version, at: Instant::now() });
        }
        let names: BTreeSet<String> = request.resource_names.into_iter().collect();
        let before = self.wanted.insert(type_url.clone(), names);
        let changed = before.as_ref() != self.wanted.get(&type_url);
        if changed { self.send(&type_url, true).await } else { Ok(()) }
    }

    async fn send(&mut self, type_url: &str, always: bool) -> Result<()> {
        let response = {
            let config = self.config.borrow_and_update();
            let Some((version, resources)) = config.types.get(type_url) else { return Ok(()) };
            if !always && self.sent.get(type_url) == Some(version) {
                return Ok(());
            }
            let names = &self.wanted[type_url];
            let all = names.is_empty() || names.contains("*");
            let wanted = resources.iter().filter(|resource| all || names.contains(&resource.name));
            DiscoveryResponse {
                version_info: version.to_string(),
                resources: wanted.map(|resource| resource.any.clone()).collect(),
                type_url: type_url.to_owned(),
                nonce: version.to_string(),
                ..Default::default()
            }
        };
        let version = response.version_info.parse().unwrap_or(0);
        self.sent.insert(type_url.to_owned(), version);
        self.event(Event::Sent { type_url: type_url.to_owned(), version, at: Instant::now() });
        self.sender.send(response).await.map_err(|_| anyhow!("the stream is closed"))
    }

    fn event(&self, event: Event) {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).push(event);
    }
}
