//! Certificate revocation lists (RFC 5280 §5).

use crate::MaterialError;
use rustls_pki_types::{CertificateRevocationListDer, pem::PemObject};
use std::fmt;
use webpki::{
    CertRevocationList, ExpirationPolicy, OwnedCertRevocationList, RevocationCheckDepth, RevocationOptions,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

/// What revocation lists that are missing or too old mean. The default refuses exactly what a list names, whatever the
/// list's age: a revoked certificate is never forgiven because the list was not renewed, and a list that was not renewed
/// in time stops nobody else (as gRFC A69 without `denyUndetermined`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RevocationPolicy {
    /// Refuse certificates whose authority has no list here.
    pub refuse_unlisted_authorities: bool,
    /// Refuse every certificate of an authority whose list is past its `nextUpdate`.
    pub refuse_expired_lists: bool,
}

/// The lists, and what is made of them. All certificates of a chain are looked up, the root excepted.
pub(crate) struct Revocation {
    lists: Vec<CertRevocationList<'static>>,
    policy: RevocationPolicy,
}

impl Revocation {
    /// From PEM (`X509 CRL`), any number of them.
    pub(crate) fn from_pem(pem: &[u8], policy: RevocationPolicy) -> Result<Self, MaterialError> {
        let lists: Vec<_> = CertificateRevocationListDer::pem_slice_iter(pem)
            .collect::<Result<_, _>>()
            .map_err(|e| MaterialError::Malformed(e.to_string()))?;
        if lists.is_empty() {
            return Err(MaterialError::NoRevocationList);
        }
        Self::from_der(lists.iter().map(AsRef::as_ref), policy)
    }

    pub(crate) fn from_der<'a>(
        lists: impl IntoIterator<Item = &'a [u8]>,
        policy: RevocationPolicy,
    ) -> Result<Self, MaterialError> {
        let read = |(i, der)| match OwnedCertRevocationList::from_der(der) {
            Ok(list) => Ok(list.into()),
            Err(e) => Err(MaterialError::RevocationList { index: i + 1, reason: e.to_string() }),
        };
        Ok(Self { lists: lists.into_iter().enumerate().map(read).collect::<Result<_, _>>()?, policy })
    }

    /// The lists, as [`Self::options`] wants them.
    pub(crate) fn lists(&self) -> Vec<&CertRevocationList<'static>> {
        self.lists.iter().collect()
    }

    /// What webpki wants to know; `None` when there is no list.
    pub(crate) fn options<'a>(&self, lists: &'a [&'a CertRevocationList<'a>]) -> Option<RevocationOptions<'a>> {
        let unknown = match self.policy.refuse_unlisted_authorities {
            true => UnknownStatusPolicy::Deny,
            false => UnknownStatusPolicy::Allow,
        };
        let expired = match self.policy.refuse_expired_lists {
            true => ExpirationPolicy::Enforce,
            false => ExpirationPolicy::Ignore,
        };
        let builder = RevocationOptionsBuilder::new(lists).ok()?.with_depth(RevocationCheckDepth::Chain);
        Some(builder.with_status_policy(unknown).with_expiration_policy(expired).build())
    }

    /// Whether a list of this issuer names this serial number.
    pub(crate) fn names(&self, issuer: &[u8], serial: &[u8]) -> bool {
        let mut of_issuer = self.lists.iter().filter(|list| list.issuer() == issuer);
        of_issuer.any(|list| matches!(list.find_serial(serial), Ok(Some(_))))
    }
}

impl fmt::Debug for Revocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} revocation lists", self.lists.len())
    }
}
