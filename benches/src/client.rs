//! The clients that are compared, behind one trait.

use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::path::Path;
use std::pin::pin;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, Uri, Version};
use http_body::Body;
use http_body_util::Full;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use mesh_client::bare::Bare;
use mesh_client::{Mesh, MeshChannel};
use mesh_tls::{ClientSettings, ClientTls};
use metrics_exporter_prometheus::PrometheusBuilder;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tonic::transport::{Channel, Endpoint};
use tonic_xds::{BootstrapConfig, XdsChannelBuilder, XdsChannelConfig, XdsChannelGrpc, XdsUri};
use tower::Service;

use crate::load::Shape;
use crate::{inbound, resource, server};

/// A client under measurement. Each task of the load holds a clone.
pub trait Client: Clone + Send + 'static {
    /// Sends `message` as the only one of a gRPC call of this shape, and waits for the end of the answer.
    fn call(&mut self, message: Bytes, shape: Shape) -> impl Future<Output = Result<Reply>> + Send;
}

/// The answer to a call that succeeded.
#[derive(Debug)]
pub struct Reply {
    /// Bytes of its body.
    pub length: usize,
    /// Its headers.
    pub headers: HeaderMap,
}

impl Reply {
    /// The port of the backend that answered; 0 if it did not say.
    #[must_use]
    pub fn backend(&self) -> u16 {
        let header = self.headers.get(server::BACKEND_HEADER);
        header.and_then(|port| port.to_str().ok()?.parse().ok()).unwrap_or(0)
    }
}

/// The clients, in the order of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// Bare hyper HTTP/2: one connection per backend, round robin. The reference.
    Hyper,
    /// Our transport, with no policy: one connection per backend, round robin.
    Bare,
    /// tonic's `Channel` to one address.
    Tonic,
    /// tonic's `Channel::balance_list`.
    BalanceList,
    /// tonic-xds.
    TonicXds,
    /// Bare hyper through an Envoy.
    Envoy,
    /// The mesh with everything on: xDS, routing, retries, outlier detection, breakers, metrics, trace propagation.
    Mesh,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Hyper, Self::Bare, Self::Tonic, Self::BalanceList, Self::TonicXds, Self::Envoy, Self::Mesh];

    /// Its name on command lines and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Hyper => "hyper",
            Self::Bare => "bare",
            Self::Tonic => "tonic",
            Self::BalanceList => "balance-list",
            Self::TonicXds => "tonic-xds",
            Self::Envoy => "envoy",
            Self::Mesh => "mesh",
        }
    }

    /// What it is, for the table.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Hyper => "bare hyper h2, round robin",
            Self::Bare => "our bare transport, round robin",
            Self::Tonic => "tonic Channel, one address",
            Self::BalanceList => "tonic balance_list",
            Self::TonicXds => "tonic-xds 0.1.0-alpha.4",
            Self::Envoy => "bare hyper through Envoy",
            Self::Mesh => "MESH, everything on",
        }
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kind| kind.name() == name);
        found.ok_or_else(|| anyhow!("no client named {name:?}; there are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

fn request<B>(uri: &Uri, shape: Shape, body: B) -> Request<B> {
    let mut request = Request::new(body);
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri.clone();
    let headers = request.headers_mut();
    headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
    headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    if let Some((name, value)) = shape.header() {
        headers.insert(name, value);
    }
    request
}

fn path() -> Uri {
    Uri::from_static("/bench.Echo/Unary")
}

fn absolute(authority: &str) -> Result<Uri> {
    Ok(Uri::builder().scheme("http").authority(authority).path_and_query("/bench.Echo/Unary").build()?)
}

/// Reads the answer to its end.
async fn finish<B>(response: Response<B>) -> Result<Reply>
where
    B: Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (parts, body) = response.into_parts();
    let mut body = pin!(body);
    let (mut length, mut succeeded) = (0, is_ok(&parts.headers));
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let frame = frame.map_err(|error| anyhow!(error.into()))?;
        if let Some(data) = frame.data_ref() {
            length += data.len();
        } else if let Some(trailers) = frame.trailers_ref() {
            succeeded |= is_ok(trailers);
        }
    }
    if !succeeded {
        bail!("the call failed: {} {:?}", parts.status, parts.headers);
    }
    Ok(Reply { length, headers: parts.headers })
}

fn is_ok(headers: &HeaderMap) -> bool {
    headers.get("grpc-status").is_some_and(|status| status == "0")
}

/// Bare hyper: what there is to beat.
#[derive(Debug, Clone)]
pub struct Hyper {
    connections: Arc<[(SendRequest<Full<Bytes>>, Uri)]>,
    next: Arc<AtomicUsize>,
}

impl Hyper {
    /// Connects to each of `addresses`; with an identity, over mutual TLS.
    ///
    /// # Errors
    /// When one does not accept, or the identity cannot be read.
    pub async fn connect(addresses: &[SocketAddr], identity: Option<&Path>) -> Result<Self> {
        let tls = identity.map(client_tls).transpose()?;
        let mut connections = Vec::with_capacity(addresses.len());
        for address in addresses {
            let socket = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
            socket.set_nodelay(true)?;
            let sender = match &tls {
                None => http2(socket).await?,
                Some(tls) => http2(tls.connect(socket, None).await?.0).await?,
            };
            connections.push((sender, absolute(&address.to_string())?));
        }
        Ok(Self { connections: connections.into(), next: Arc::default() })
    }
}

/// hyper's connection over `io`.
async fn http2<IO>(io: IO) -> Result<SendRequest<Full<Bytes>>>
where
    IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
    let (sender, connection) = builder.handshake(TokioIo::new(io)).await?;
    tokio::spawn(connection);
    Ok(sender)
}

/// Mutual TLS with the certificate in this folder: our verification at the handshake, the streams are tokio-rustls'.
fn client_tls(identity: &Path) -> Result<ClientTls> {
    let mut settings = ClientSettings::mtls(Arc::new(inbound::source(identity)?));
    settings.alpn = vec![b"h2".to_vec()];
    Ok(ClientTls::new(settings, mesh_tls::default_provider())?)
}

impl Client for Hyper {
    async fn call(&mut self, message: Bytes, shape: Shape) -> Result<Reply> {
        let index = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let (sender, uri) = &self.connections[index];
        let mut sender = sender.clone();
        sender.ready().await?;
        finish(sender.send_request(request(uri, shape, Full::new(message))).await?).await
    }
}

/// Our transport, with no policy.
#[derive(Debug, Clone)]
pub struct Ours {
    transport: Bare,
    uri: Uri,
}

impl Ours {
    /// Connects to each of `addresses`.
    ///
    /// # Errors
    /// When one does not accept.
    pub async fn connect(addresses: &[SocketAddr]) -> Result<Self> {
        Ok(Self { transport: Bare::connect(addresses).await?, uri: absolute(resource::LISTENER)? })
    }
}

impl Client for Ours {
    async fn call(&mut self, message: Bytes, shape: Shape) -> Result<Reply> {
        finish(self.transport.call(request(&self.uri, shape, Full::new(message))).await?).await
    }
}

/// The mesh, with everything on.
#[derive(Debug, Clone)]
pub struct Meshed {
    channel: MeshChannel,
    uri: Uri,
}

/// From here on the process records metrics. The recorder calibrates its clock first, which takes a while.
///
/// # Errors
/// When one is installed already.
pub fn record_metrics() -> Result<()> {
    PrometheusBuilder::new().install_recorder().context("no metrics recorder")?;
    Ok(())
}

impl Meshed {
    /// A channel whose configuration comes from the control plane of `bootstrap`. Does not wait for anything.
    ///
    /// # Errors
    /// When the bootstrap is refused.
    pub async fn new(bootstrap: &str) -> Result<Self> {
        let mesh = Mesh::builder().bootstrap_json(bootstrap)?.build().await?;
        Ok(Self { channel: mesh.channel(resource::TARGET)?, uri: path() })
    }
}

/// A channel of the mesh as a client.
#[must_use]
pub fn over(channel: MeshChannel) -> Meshed {
    Meshed { channel, uri: path() }
}

impl Client for Meshed {
    async fn call(&mut self, message: Bytes, shape: Shape) -> Result<Reply> {
        let request = request(&self.uri, shape, Full::new(message));
        poll_fn(|cx| Service::<Request<Full<Bytes>>>::poll_ready(&mut self.channel, cx)).await?;
        finish(self.channel.call(request).await?).await
    }
}

/// Any tower service that takes tonic's body: tonic's own channels and tonic-xds.
#[derive(Debug, Clone)]
pub struct Tonic<S> {
    service: S,
    uri: Uri,
}

/// tonic's channel to the first of `addresses`.
///
/// # Errors
/// When the address makes no URI.
pub async fn tonic_channel(address: SocketAddr) -> Result<Tonic<Channel>> {
    let service = endpoint(address)?.connect().await?;
    Ok(Tonic { service, uri: path() })
}

/// tonic's `balance_list` over `addresses`.
///
/// # Errors
/// When an address makes no URI.
pub fn balance_list(addresses: &[SocketAddr]) -> Result<Tonic<Channel>> {
    let endpoints = addresses.iter().map(|address| endpoint(*address)).collect::<Result<Vec<_>>>()?;
    Ok(Tonic { service: Channel::balance_list(endpoints.into_iter()), uri: path() })
}

/// Channels of tonic's, one to each of `addresses`, in turn: what a client of tonic's does at best. With an identity, over mutual TLS.
///
/// # Errors
/// When an address makes no URI, or a connection cannot be made.
pub async fn tonic_turns(addresses: &[SocketAddr], identity: Option<&Path>) -> Result<Tonic<InTurn>> {
    let tls = identity.map(client_tls).transpose()?;
    let mut channels = Vec::with_capacity(addresses.len());
    for address in addresses.iter().copied() {
        let endpoint = endpoint(address)?;
        channels.push(match tls.clone() {
            None => endpoint.connect().await?,
            Some(tls) => {
                let connect = move |_: Uri| {
                    let tls = tls.clone();
                    async move {
                        let socket = TcpStream::connect(address).await?;
                        socket.set_nodelay(true)?;
                        let (stream, _) = tls.connect(socket, None).await.map_err(std::io::Error::other)?;
                        Ok::<_, std::io::Error>(TokioIo::new(stream))
                    }
                };
                endpoint.connect_with_connector(tower::service_fn(connect)).await?
            }
        });
    }
    Ok(Tonic { service: InTurn { channels, next: Arc::default(), ready: None }, uri: path() })
}

/// Several channels of tonic's, one after the other.
#[derive(Debug)]
pub struct InTurn {
    channels: Vec<Channel>,
    next: Arc<AtomicUsize>,
    ready: Option<usize>,
}

impl Clone for InTurn {
    fn clone(&self) -> Self {
        Self { channels: self.channels.clone(), next: self.next.clone(), ready: None }
    }
}

impl Service<Request<tonic::body::Body>> for InTurn {
    type Response = Response<tonic::body::Body>;
    type Error = tonic::transport::Error;
    type Future = tonic::transport::channel::ResponseFuture;

    fn poll_ready(&mut self, cx: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Self::Error>> {
        let turn = *self.ready.get_or_insert_with(|| self.next.fetch_add(1, Ordering::Relaxed) % self.channels.len());
        self.channels[turn].poll_ready(cx)
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let turn = self.ready.take().unwrap_or_default();
        self.channels[turn].call(request)
    }
}

fn endpoint(address: SocketAddr) -> Result<Endpoint> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true))
}

/// tonic-xds, with its control plane from `bootstrap`.
///
/// # Errors
/// When it refuses the bootstrap.
pub fn tonic_xds(bootstrap: &str) -> Result<Tonic<XdsChannelGrpc>> {
    let config = XdsChannelConfig::new(XdsUri::parse(resource::TARGET)?);
    let config = config.with_bootstrap(BootstrapConfig::from_json(bootstrap)?);
    let service = XdsChannelBuilder::new(config).build_grpc_channel()?;
    Ok(Tonic { service, uri: path() })
}

impl<S, B> Client for Tonic<S>
where
    S: Service<Request<tonic::body::Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    async fn call(&mut self, message: Bytes, shape: Shape) -> Result<Reply> {
        let request = request(&self.uri, shape, tonic::body::Body::new(Full::new(message)));
        poll_fn(|cx| self.service.poll_ready(cx)).await.map_err(|error| anyhow!(error.into()))?;
        finish(self.service.call(request).await.map_err(|error| anyhow!(error.into()))?).await
    }
}
