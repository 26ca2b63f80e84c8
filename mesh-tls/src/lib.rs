//! The identity path of mesh: certificate source -> store -> TLS client and server.
//!
//! A [`Source`] holds one immutable [`Material`] at a time: our certificate and the roots we trust. [`ClientTls`] and
//! [`Acceptor`] keep one rustls configuration made from it, and make a new one when the material changes, so that every
//! handshake uses the newest. Sessions are never resumed: a resumed session skips the verifier, and would carry an old
//! trust decision over a rotation.
//!
//! ```no_run
//! use mesh_tls::{Acceptor, ClientSettings, ClientTls, FileSource, FileSourceConfig, SanMatcher, ServerSettings, Source};
//! use std::{error::Error, sync::Arc};
//!
//! # async fn run() -> Result<(), Box<dyn Error>> {
//! let provider = mesh_tls::default_provider();
//! let files = FileSourceConfig {
//!     certificate_file: Some("/var/run/secrets/cert.pem".into()),
//!     private_key_file: Some("/var/run/secrets/key.pem".into()),
//!     ca_certificate_file: Some("/var/run/secrets/ca.pem".into()),
//!     ..FileSourceConfig::new("default", provider.clone())
//! };
//! let source: Arc<dyn Source> = Arc::new(FileSource::new(files, &tokio::runtime::Handle::current())?);
//!
//! // the calling side
//! let client = ClientTls::new(
//!     ClientSettings {
//!         san_matchers: vec![SanMatcher::Exact("spiffe://cluster.local/ns/prod/sa/reviews".into())],
//!         alpn: vec![b"h2".to_vec()],
//!         ..ClientSettings::mtls(source.clone())
//!     },
//!     provider.clone(),
//! )?;
//! let tcp = tokio::net::TcpStream::connect("127.0.0.1:9080").await?;
//! let (_stream, peer) = client.connect(tcp, None).await?;
//! println!("connected to {peer}");
//!
//! // the accepting side
//! let acceptor = Acceptor::new(ServerSettings::mtls(source), provider)?;
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:9080").await?;
//! let stream = acceptor.accept(listener.accept().await?.0).await?;
//! println!("called by {:?}", stream.peer());
//! # Ok(())
//! # }
//! ```
//!
//! The crypto provider is passed as a value; the process default of rustls is neither read nor set.

mod alert;
mod bundle;
mod client;
mod error;
#[doc(hidden)]
pub mod fuzz_api;
#[cfg(feature = "grpc")]
pub mod grpc;
mod hello;
mod id;
mod material;
mod peer;
mod revocation;
mod rewind;
mod roots;
mod san;
mod server;
mod source;
mod store;
mod verify;
mod version;
mod x509;

pub use alert::describe_alert;
pub use bundle::TrustBundle;
pub use client::{ClientSettings, ClientStream, ClientTls, Roots};
pub use error::{MaterialError, Reason, Refusal, Side, SourceError, TlsError};
pub use hello::{ClientHello, FirstBytes};
pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use material::{Identity, Material};
pub use peer::PeerIdentity;
pub use revocation::RevocationPolicy;
pub use rewind::Rewind;
pub use roots::TrustRoots;
pub use rustls::crypto::CryptoProvider;
pub use san::{SanKind, SanMatcher};
pub use server::{Accepted, Acceptor, ClientAuth, ConnectInfo, Incoming, Mode, Presented, ServerSettings};
#[cfg(feature = "grpc")]
pub use source::{
    CaAuth, CaTls, EndpointError, IstioCaConfig, IstioCaSource, JwtToken, SvidChoice, WorkloadApiConfig,
    WorkloadApiSource, WorkloadEndpoint,
};
pub use source::{FileSource, FileSourceConfig, JwtBundles, MemorySource, Source, ready};
pub use store::Generations;
pub use verify::PeerCheck;
pub use version::{TlsVersion, TlsVersions};

/// The crypto provider of the enabled feature: `ring`, or else `aws-lc-rs`.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
pub fn default_provider() -> std::sync::Arc<CryptoProvider> {
    #[cfg(feature = "ring")]
    let provider = rustls::crypto::ring::default_provider();
    #[cfg(not(feature = "ring"))]
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    std::sync::Arc::new(provider)
}
