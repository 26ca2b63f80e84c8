//! The server's side: one gRPC echo service, behind tonic's own server and behind ours, each in a process of its own.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll};

use anyhow::Result;
use bytes::{Buf, BufMut, Bytes};
use futures::future::{BoxFuture, Ready, ready};
use http::{Request, Response};
use mesh_client::Inbound;
use mesh_client::inbound::{Rbac, Rule};
use mesh_tls::{Acceptor, FileSource, FileSourceConfig, ServerSettings};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tonic::Status;
use tonic::body::Body;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::server::{Grpc, NamedService, UnaryService};
use tonic::service::Routes;

use crate::process;
use crate::worker::{Memory, say};

/// The line that asks for the memory.
const MEMORY: &str = "\"memory\"";

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// tonic's own server, with nothing.
    Tonic,
    /// Ours, with no policy.
    Bare,
    /// Ours, with authorization, metrics and the caller's trace.
    Full,
}

impl Side {
    /// What it is, for the table.
    #[must_use]
    pub fn title(self) -> &'static str {
        match self {
            Self::Tonic => "tonic's server, nothing on",
            Self::Bare => "inbound.serve, no policy",
            Self::Full => "inbound.serve, RBAC, metrics, trace",
        }
    }
}

/// Serves on `listeners` free ports until the input ends: says the addresses, and for each line the CPU time used so far, in
/// microseconds, or where it asks for it, the memory ([`Memory`]). With an identity, only over mutual TLS.
///
/// # Errors
/// When a socket cannot be opened, or the identity not be read.
pub async fn serve(
    side: Side,
    listeners: usize,
    identity: Option<PathBuf>,
    mut lines: mpsc::Receiver<String>,
) -> Result<()> {
    if side == Side::Full {
        // First: handles of metrics are made with the policy.
        crate::client::record_metrics()?;
    }
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for _ in 0..listeners {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        addresses.push(listener.local_addr()?);
        let acceptor = identity.as_deref().map(acceptor).transpose()?;
        match side {
            Side::Tonic => drop(tokio::spawn(tonic_server(listener, acceptor))),
            Side::Bare | Side::Full => {
                let mut builder = Inbound::builder();
                if side == Side::Full {
                    builder = builder.service("echo.default.svc.cluster.local").authorize(rules());
                }
                let builder = match acceptor {
                    Some(acceptor) => builder.acceptor(acceptor),
                    None => builder,
                };
                let inbound = builder.listener(listener)?;
                tokio::spawn(async move { inbound.serve(Routes::new(Echo)).await });
            }
        }
    }
    say(&addresses)?;
    while let Some(line) = lines.recv().await {
        if line == MEMORY {
            say(&Memory { resident: process::resident_bytes(), most: process::most_resident_bytes() })?;
        } else {
            say(&u64::try_from(process::cpu_time().as_micros())?)?;
        }
    }
    Ok(())
}

/// Some of each kind; the last of them lets the calls in.
fn rules() -> Rbac {
    Rbac::allow()
        .rule("shop", Rule::new().namespace("shop").path("/shop.*"))
        .rule("admin", Rule::new().spiffe_id("spiffe://cluster.local/ns/ops/sa/admin").header("x-reason", "repair"))
        .rule("calls", Rule::new().method("POST").path("/bench.Echo/*"))
}

async fn tonic_server(listener: TcpListener, acceptor: Option<Acceptor>) -> Result<(), tonic::transport::Error> {
    let router = tonic::transport::Server::builder().add_service(Echo);
    match acceptor {
        Some(acceptor) => router.serve_with_incoming(acceptor.incoming(listener)).await,
        None => {
            let incoming = futures::stream::unfold(listener, |listener| async move {
                let accepted = listener.accept().await.and_then(|(socket, _)| no_delay(socket));
                Some((accepted, listener))
            });
            router.serve_with_incoming(incoming).await
        }
    }
}

fn no_delay(socket: TcpStream) -> std::io::Result<TcpStream> {
    socket.set_nodelay(true)?;
    Ok(socket)
}

/// An acceptor with the certificate in this folder.
fn acceptor(identity: &Path) -> Result<Acceptor> {
    let provider = mesh_tls::default_provider();
    let source = Arc::new(source(identity)?);
    Ok(Acceptor::new(ServerSettings::mtls(source), provider)?)
}

/// The certificate, key and roots in this folder.
///
/// # Errors
/// They cannot be read.
pub fn source(identity: &Path) -> Result<FileSource> {
    let config = FileSourceConfig {
        certificate_file: Some(identity.join("cert.pem")),
        private_key_file: Some(identity.join("key.pem")),
        ca_certificate_file: Some(identity.join("ca.pem")),
        ..FileSourceConfig::new("bench", mesh_tls::default_provider())
    };
    Ok(FileSource::new(config, &tokio::runtime::Handle::current())?)
}

/// What a generated server is: every method is unary and gives back its message.
#[derive(Debug, Clone, Copy)]
pub struct Echo;

impl NamedService for Echo {
    const NAME: &'static str = "bench.Echo";
}

impl<B> tower::Service<Request<B>> for Echo
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        Box::pin(async move { Ok(Grpc::new(Raw).unary(Unary, request).await) })
    }
}

struct Unary;

impl UnaryService<Bytes> for Unary {
    type Response = Bytes;
    type Future = Ready<Result<tonic::Response<Bytes>, Status>>;

    fn call(&mut self, request: tonic::Request<Bytes>) -> Self::Future {
        ready(Ok(tonic::Response::new(request.into_inner())))
    }
}

/// Messages as they are.
#[derive(Debug, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, out: &mut EncodeBuf<'_>) -> Result<(), Status> {
        out.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, message: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(message.copy_to_bytes(message.remaining())))
    }
}
