//! One ADS stream on its own HTTP/2 connection, with keepalive so that a silent peer is noticed.

use super::{
    Service,
    transport::{BoxedIo, Connect},
};
use crate::bootstrap::{CallCreds, ChannelCreds, ServerAddress, ServerConfig, Timing};
use envoy_types::pb::envoy::service::{
    discovery::v3::{
        DiscoveryRequest, DiscoveryResponse, aggregated_discovery_service_client::AggregatedDiscoveryServiceClient,
    },
    secret::v3::secret_discovery_service_client::SecretDiscoveryServiceClient,
};
use futures::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use hyper_util::rt::TokioIo;
use std::{error::Error, io, sync::Arc};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Status, metadata::MetadataValue, transport::Endpoint};

/// Large responses in few round trips.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// An open stream.
pub(super) struct Connection {
    requests: mpsc::UnboundedSender<DiscoveryRequest>,
    responses: BoxStream<'static, Result<DiscoveryResponse, Status>>,
}

/// Opens a connection and, on it, a stream. The stream's headers may come with the first response only, so a connection
/// is taken for open before that.
pub(super) async fn dial(
    connect: Arc<dyn Connect>,
    server: ServerConfig,
    timing: Timing,
    service: Service,
) -> Result<Connection, String> {
    match timeout(timing.connect_timeout, open(connect, server, &timing, service)).await {
        Ok(result) => result,
        Err(_) => Err(format!("no connection within {:?}", timing.connect_timeout)),
    }
}

async fn open(
    connect: Arc<dyn Connect>,
    server: ServerConfig,
    timing: &Timing,
    service: Service,
) -> Result<Connection, String> {
    let io = connect.connect(&server).await.map_err(|error| describe(&error))?;
    let token = bearer_token(&server).await?;
    let secure = server.channel_creds != ChannelCreds::Insecure;
    let authority = match &server.address {
        ServerAddress::Tcp { .. } => server.address.to_string(),
        ServerAddress::Unix(_) => "localhost".to_owned(),
    };
    // The byte stream is there already: "http" keeps tonic from asking for TLS of its own.
    let endpoint = Endpoint::from_shared(format!("http://{authority}")).map_err(|error| describe(&error))?;
    let scheme = if secure { "https" } else { "http" };
    let origin = format!("{scheme}://{authority}").parse().map_err(|error: http::uri::InvalidUri| describe(&error))?;
    let mut endpoint = endpoint
        .origin(origin)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    // The system says when a process on this machine ends; and agents built on grpc-go send away who pings more often than every 5 min.
    if let ServerAddress::Tcp { .. } = server.address {
        endpoint = endpoint
            .http2_keep_alive_interval(timing.keepalive_interval)
            .keep_alive_timeout(timing.keepalive_timeout)
            .keep_alive_while_idle(true);
    }
    let mut io = Some(io);
    let connector = tower::service_fn(move |_| {
        let io = io.take();
        async move {
            // A channel that reconnects by itself would hide the loss of the stream.
            let io: BoxedIo = io.ok_or_else(|| io::Error::other("the connection is used up"))?;
            Ok::<_, io::Error>(TokioIo::new(io))
        }
    });
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| describe(&error))?;
    let (requests, outgoing) = mpsc::unbounded_channel();
    let mut request = tonic::Request::new(UnboundedReceiverStream::new(outgoing));
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", token);
    }
    let call = async move {
        let opened = match service {
            Service::Aggregated => {
                let client = AggregatedDiscoveryServiceClient::new(channel);
                client.max_decoding_message_size(usize::MAX).stream_aggregated_resources(request).await
            }
            Service::Secrets => SecretDiscoveryServiceClient::new(channel).stream_secrets(request).await,
        };
        opened.map(tonic::Response::into_inner)
    };
    Ok(Connection { requests, responses: futures::stream::once(call).try_flatten().boxed() })
}

impl Connection {
    /// Queues a request. Once the stream has ended it goes nowhere, which `next` tells.
    pub(super) fn send(&self, request: DiscoveryRequest) {
        let _ = self.requests.send(request);
    }

    /// The next response, or how the stream ended. Cancel safe.
    pub(super) async fn next(&mut self) -> Result<Option<DiscoveryResponse>, String> {
        match self.responses.next().await {
            Some(Ok(response)) => Ok(Some(response)),
            Some(Err(status)) => Err(describe_status(&status)),
            None => Ok(None),
        }
    }
}

/// Reads the token file anew, so that a rotated token is used (gRFC A97). Tokens never go over plaintext.
async fn bearer_token(server: &ServerConfig) -> Result<Option<MetadataValue<tonic::metadata::Ascii>>, String> {
    let Some(CallCreds::JwtTokenFile(path)) = server.call_creds.first() else { return Ok(None) };
    if server.channel_creds == ChannelCreds::Insecure {
        tracing::warn!(server = &*server.uri, "jwt_token_file is not used: the channel is insecure");
        return Ok(None);
    }
    let file = path.clone();
    let text = tokio::task::spawn_blocking(move || std::fs::read_to_string(file))
        .await
        .map_err(|error| describe(&error))?
        .map_err(|error| format!("jwt_token_file {}: {error}", path.display()))?;
    let mut value = MetadataValue::try_from(format!("Bearer {}", text.trim()))
        .map_err(|_| format!("jwt_token_file {}: not a token", path.display()))?;
    value.set_sensitive(true);
    Ok(Some(value))
}

/// The innermost message says most.
fn describe(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        source = inner.source();
    }
    text
}

fn describe_status(status: &Status) -> String {
    let mut text = format!("the stream ended: {:?}", status.code());
    if !status.message().is_empty() {
        text = format!("{text}: {}", status.message());
    }
    match status.source() {
        Some(source) => {
            let source = describe(source);
            if text.contains(&source) { text } else { format!("{text}: {source}") }
        }
        None => text,
    }
}

#[cfg(test)]
mod tests;
