//! The identity path of mesh: certificate source -> store -> TLS client and server.
//!
//! A [`Source`] holds one immutable [`Material`] at a time: our certificate and the roots we trust. [`ClientTls`] and
//! [`Acceptor`] keep one rustls configuration made from it, and make a new one when the material changes, so that every
//! handshake uses the newest. Sessions are never resumed: a resumed session skips the verifier, and would carry an old
//! trust decision over a rotation.
//!
//! The crypto provider is passed as a value; the process default of rustls is neither read nor set.

mod alert;
mod client;
mod error;
mod id;
mod material;
mod peer;
mod roots;
mod san;
mod server;
mod source;
mod store;
mod verify;
mod x509;

pub use alert::describe_alert;
pub use client::{ClientSettings, ClientStream, ClientTls, Generations, Roots};
pub use error::{MaterialError, Reason, Refusal, Side, SourceError, TlsError};
pub use id::{SpiffeId, SpiffeIdError, TrustDomain};
pub use material::{Identity, Material};
pub use peer::PeerIdentity;
pub use roots::TrustRoots;
pub use rustls::crypto::CryptoProvider;
pub use san::SanMatcher;
pub use server::{Accepted, Acceptor, ClientAuth, ConnectInfo, Incoming, Mode, ServerSettings};
pub use source::{FileSource, FileSourceConfig, MemorySource, Source};
pub use verify::PeerCheck;

/// The crypto provider of the enabled feature: `ring`, or else `aws-lc-rs`.
#[cfg(any(feature = "ring", feature = "aws-lc-rs"))]
pub fn default_provider() -> std::sync::Arc<CryptoProvider> {
    #[cfg(feature = "ring")]
    let provider = rustls::crypto::ring::default_provider();
    #[cfg(not(feature = "ring"))]
    let provider = rustls::crypto::aws_lc_rs::default_provider();
    std::sync::Arc::new(provider)
}
