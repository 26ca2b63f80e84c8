//! Which versions of TLS are spoken.

use crate::TlsError;
use rustls::{
    CommonState, NamedGroup, ProtocolVersion, SupportedProtocolVersion,
    crypto::{CryptoProvider, SupportedKxGroup},
    version::{TLS12, TLS13},
};
use std::sync::Arc;

/// A version of TLS. Older ones are not supported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TlsVersion {
    /// TLS 1.2 (RFC 5246), with forward secrecy and AEAD ciphers only.
    V1_2,
    /// TLS 1.3 (RFC 8446).
    V1_3,
}

/// The versions that may be negotiated. Default: TLS 1.2 to 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TlsVersions {
    /// The lowest.
    pub min: TlsVersion,
    /// The highest.
    pub max: TlsVersion,
}

const ALL: &[&SupportedProtocolVersion] = &[&TLS13, &TLS12];
const ONLY_12: &[&SupportedProtocolVersion] = &[&TLS12];
const ONLY_13: &[&SupportedProtocolVersion] = &[&TLS13];

impl TlsVersion {
    pub(crate) fn negotiated(connection: &CommonState) -> Option<Self> {
        match connection.protocol_version()? {
            ProtocolVersion::TLSv1_2 => Some(Self::V1_2),
            ProtocolVersion::TLSv1_3 => Some(Self::V1_3),
            _ => None,
        }
    }
}

impl TlsVersions {
    /// Only this version.
    pub fn only(version: TlsVersion) -> Self {
        Self { min: version, max: version }
    }

    pub(crate) fn supported(self) -> Result<&'static [&'static SupportedProtocolVersion], TlsError> {
        match (self.min, self.max) {
            (TlsVersion::V1_2, TlsVersion::V1_3) => Ok(ALL),
            (TlsVersion::V1_2, TlsVersion::V1_2) => Ok(ONLY_12),
            (TlsVersion::V1_3, TlsVersion::V1_3) => Ok(ONLY_13),
            (TlsVersion::V1_3, TlsVersion::V1_2) => {
                Err(TlsError::Settings("the lowest TLS version is above the highest".into()))
            }
        }
    }
}

/// The provider, with the post-quantum key exchange first where it has one: what is recorded today cannot be read by who
/// breaks elliptic curves later. A provider whose `kx_groups` lack it stays as it is.
pub(crate) fn preferring_post_quantum(provider: Arc<CryptoProvider>) -> Arc<CryptoProvider> {
    let is_hybrid = |group: &&dyn SupportedKxGroup| group.name() == NamedGroup::X25519MLKEM768;
    match provider.kx_groups.iter().position(is_hybrid) {
        None | Some(0) => provider,
        Some(at) => {
            let mut preferring = (*provider).clone();
            preferring.kx_groups[..=at].rotate_right(1);
            Arc::new(preferring)
        }
    }
}

impl Default for TlsVersions {
    fn default() -> Self {
        Self { min: TlsVersion::V1_2, max: TlsVersion::V1_3 }
    }
}
