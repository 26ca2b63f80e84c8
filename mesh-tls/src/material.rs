//! One generation of certificates: who we are, and whom we trust.

use crate::{
    CryptoProvider, MaterialError, SpiffeId, TrustRoots,
    x509::{Leaf, Utc},
};
use rustls::{InconsistentKeys, sign::CertifiedKey};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// How much later than ours the clock of who issued a certificate may be, in seconds.
const CLOCK_SKEW: i64 = 60;

/// What a [`Source`](crate::Source) holds at one time. Immutable.
#[derive(Clone, Debug, Default)]
pub struct Material {
    /// Our certificate chain and key.
    pub identity: Option<Arc<Identity>>,
    /// The roots that peers are verified with.
    pub roots: Option<Arc<TrustRoots>>,
    /// Grows by one with every change of the source; 0 means that nothing was loaded yet.
    pub generation: u64,
}

/// A certificate chain with its private key. `Debug` and `Display` never show the key.
pub struct Identity {
    certified: Arc<CertifiedKey>,
    leaf: Leaf,
    spiffe_id: Option<SpiffeId>,
}

impl Identity {
    /// From a PEM chain (leaf first) and a PEM key (PKCS#8, PKCS#1 or SEC1).
    ///
    /// # Errors
    /// Either is malformed or missing, the provider does not support the key, or the two do not belong together.
    pub fn from_pem(chain: &[u8], key: &[u8], provider: &CryptoProvider) -> Result<Self, MaterialError> {
        let chain = certificates(chain)?;
        Self::from_der(chain, private_key(key)?, provider)
    }

    /// From DER.
    ///
    /// # Errors
    /// As [`Identity::from_pem`].
    pub fn from_der(
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        provider: &CryptoProvider,
    ) -> Result<Self, MaterialError> {
        let first = chain.first().ok_or(MaterialError::NoCertificate)?;
        let unusable = |reason: String| MaterialError::Certificate { index: 1, reason };
        let leaf = Leaf::parse(first).map_err(|_| unusable("it is malformed".into()))?;
        webpki::EndEntityCert::try_from(first).map_err(|e| unusable(e.to_string()))?;
        let key = provider.key_provider.load_private_key(key).map_err(|e| MaterialError::Key(e.to_string()))?;
        let certified = CertifiedKey::new(chain, key);
        match certified.keys_match() {
            // a provider that cannot tell is not an error: the handshake will
            Ok(()) | Err(rustls::Error::InconsistentKeys(InconsistentKeys::Unknown)) => {}
            Err(_) => return Err(MaterialError::KeyMismatch(leaf.name())),
        }
        let spiffe_id = match leaf.uri_sans.as_slice() {
            [uri] => uri.parse().ok(),
            _ => None,
        };
        Ok(Self { certified: Arc::new(certified), leaf, spiffe_id })
    }

    /// The SPIFFE id, when the leaf has exactly one URI SAN and it is one.
    pub fn spiffe_id(&self) -> Option<&SpiffeId> {
        self.spiffe_id.as_ref()
    }

    /// URI SANs of the leaf.
    pub(crate) fn uri_sans(&self) -> &[String] {
        &self.leaf.uri_sans
    }

    /// From when on the leaf certificate is valid.
    pub fn not_before(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.leaf.not_before.max(0).unsigned_abs())
    }

    /// Whether the leaf certificate is valid at this time. One that begins within the next minute is, as the clocks of two machines
    /// differ.
    ///
    /// # Errors
    /// It has expired, or is not yet valid; the message says since or from when.
    pub fn check_validity(&self, now: SystemTime) -> Result<(), MaterialError> {
        let Leaf { not_before, not_after, .. } = self.leaf;
        let now = Utc::from(now).0;
        if now >= not_after {
            Err(MaterialError::Expired { not_after })
        } else if now + CLOCK_SKEW < not_before {
            Err(MaterialError::NotYetValid { not_before })
        } else {
            Ok(())
        }
    }

    /// When the leaf certificate expires.
    pub fn not_after(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.leaf.not_after.max(0).unsigned_abs())
    }

    /// How messages call it: the first SAN, or else the subject.
    pub fn name(&self) -> String {
        self.leaf.name()
    }

    pub(crate) fn certified(&self) -> Arc<CertifiedKey> {
        self.certified.clone()
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("certificate", &self.leaf)
            .field("chain", &self.certified.cert.len())
            .finish_non_exhaustive()
    }
}

/// Every certificate of a PEM text, at least one.
pub(crate) fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, MaterialError> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|e| MaterialError::Malformed(e.to_string()))?;
    if certificates.is_empty() { Err(MaterialError::NoCertificate) } else { Ok(certificates) }
}

pub(crate) fn private_key(pem: &[u8]) -> Result<PrivateKeyDer<'static>, MaterialError> {
    PrivateKeyDer::from_pem_slice(pem).map_err(|e| match e {
        rustls_pki_types::pem::Error::NoItemsFound => MaterialError::NoKey,
        other => MaterialError::Malformed(other.to_string()),
    })
}
