//! SDS: `envoy.extensions.transport_sockets.tls.v3.Secret`.

use bytes::Bytes;
use std::{fmt, path::PathBuf, sync::Arc};

/// A validated secret. Neither it nor its parts show key material in `Debug`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// Resource name.
    pub name: Arc<str>,
    /// What it is.
    pub kind: SecretKind,
}

/// The kinds of secrets that mean something here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretKind {
    /// `tls_certificate`
    Certificate(Arc<TlsCertificate>),
    /// `validation_context`
    Trust(Arc<TrustedCa>),
}

/// `TlsCertificate`: both in PEM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TlsCertificate {
    /// `certificate_chain`, leaf first.
    pub chain: DataSource,
    /// `private_key`
    pub key: DataSource,
}

/// What counts of a `CertificateValidationContext`: PEM.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TrustedCa {
    /// `trusted_ca`, or what the SPIFFE validator of `custom_validator_config` has instead.
    pub ca: RootSource,
    /// `crl`: certificates that count no more. Each issuer in the chain then needs a list.
    pub crl: Option<DataSource>,
}

/// Whose roots they are.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum RootSource {
    /// `trusted_ca`: everybody's, PEM.
    All(DataSource),
    /// `SPIFFECertValidatorConfig.trust_domains`: those of each trust domain, PEM. Peers of others are refused.
    ByDomain(Vec<(Arc<str>, DataSource)>),
    /// `SPIFFECertValidatorConfig.trust_bundles`: a SPIFFE bundle map in JSON.
    BundleMap(DataSource),
}

/// `DataSource`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub enum DataSource {
    /// `filename`: read again from time to time.
    File(PathBuf),
    /// `inline_bytes` and `inline_string`
    Bytes(Bytes),
}

impl fmt::Debug for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => f.debug_tuple("File").field(path).finish(),
            // It may be a private key.
            Self::Bytes(bytes) => write!(f, "Bytes({} bytes)", bytes.len()),
        }
    }
}
