//! Errors of the identity path: which check failed, on whose certificate, and what was wanted instead.

use crate::{SpiffeIdError, alert, x509::Utc};
use rustls::AlertDescription;
use std::{borrow::Cow, fmt, io, path::PathBuf, time::Duration};

/// Longest name in a message, in characters.
const CLIP: usize = 256;

/// A certificate, key or bundle that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MaterialError {
    /// There is no certificate in the input.
    #[error("holds no PEM certificate")]
    NoCertificate,
    /// There is no private key in the input.
    #[error("holds no PEM private key")]
    NoKey,
    /// The PEM or JSON framing is damaged.
    #[error("is malformed: {0}")]
    Malformed(String),
    /// A certificate cannot be read.
    #[error("certificate {index} cannot be used: {reason}")]
    Certificate {
        /// Position in the file, from 1.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// The provider does not accept the private key.
    #[error("the private key cannot be used: {0}")]
    Key(String),
    /// The private key belongs to another certificate.
    #[error("the private key does not belong to the certificate {0}")]
    KeyMismatch(String),
    /// The certificate has expired.
    #[error("the certificate expired at {}", Utc(*not_after))]
    Expired {
        /// Unix seconds.
        not_after: i64,
    },
    /// The certificate is not yet valid.
    #[error("the certificate is not valid before {}", Utc(*not_before))]
    NotYetValid {
        /// Unix seconds.
        not_before: i64,
    },
    /// There is no revocation list in the input.
    #[error("holds no PEM revocation list")]
    NoRevocationList,
    /// A revocation list cannot be read.
    #[error("revocation list {index} cannot be used: {reason}")]
    RevocationList {
        /// Position in the input, from 1.
        index: usize,
        /// What is wrong.
        reason: String,
    },
    /// The SPIFFE bundle of a trust domain is not valid.
    #[error("the bundle of trust domain {domain:?} is not valid: {reason}")]
    Bundle {
        /// The trust domain.
        domain: String,
        /// What is wrong.
        reason: String,
    },
}

/// A certificate source that could not be read or set up.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("certificate source {name:?}: {}{reason}", file.as_ref().map(|f| format!("{}: ", f.display())).unwrap_or_default())]
#[non_exhaustive]
pub struct SourceError {
    /// Name of the source.
    pub name: String,
    /// The file at fault; none when the settings are.
    pub file: Option<PathBuf>,
    /// What is wrong.
    pub reason: String,
}

impl SourceError {
    /// One that is about no file, of a source of the caller's own.
    pub fn new(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self { name: name.into(), file: None, reason: reason.into() }
    }
}

/// Why a TLS connection was not made. The message is complete: it includes the cause, and there is no further source.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The settings cannot work.
    #[error("TLS settings: {0}")]
    Settings(String),
    /// A certificate source has nothing yet.
    #[error("certificate source {name:?} has no {missing} yet{}", reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default())]
    NotReady {
        /// Name of the source.
        name: String,
        /// `certificate` or `trust roots`.
        missing: &'static str,
        /// Its last error.
        reason: Option<String>,
    },
    /// The server name is not a DNS name or IP address, or is missing where it must be verified.
    #[error("server name: {0}")]
    ServerName(String),
    /// We refused the peer.
    #[error(transparent)]
    Refused(Box<Refusal>),
    /// The peer refused us, with this alert.
    #[error("{}", alert::sentence(*alert, *side, own.as_deref(), true))]
    RefusedByPeer {
        /// Which side the peer is.
        side: Side,
        /// What it sent.
        alert: AlertDescription,
        /// The name of the certificate that we presented.
        own: Option<String>,
    },
    /// The peer does not speak TLS.
    #[error("the {0} does not speak TLS: it answered in plaintext")]
    Plaintext(Side),
    /// The peer closed the connection before the handshake was over.
    #[error("the {0} closed the connection during the TLS handshake")]
    Closed(Side),
    /// The handshake took too long.
    #[error("the {side} did not finish the TLS handshake within {limit:?}")]
    Timeout {
        /// Which side the peer is.
        side: Side,
        /// The limit.
        limit: Duration,
    },
    /// Any other protocol failure.
    #[error("TLS handshake with the {side} failed: {error}")]
    Handshake {
        /// Which side the peer is.
        side: Side,
        /// What failed.
        error: rustls::Error,
    },
    /// The transport failed.
    #[error("connection to the {side} failed during the TLS handshake: {error}")]
    Io {
        /// Which side the peer is.
        side: Side,
        /// What failed.
        error: io::Error,
    },
}

/// The two ends of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// It opened the connection.
    Client,
    /// It accepted the connection.
    Server,
}

/// A certificate that we did not accept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the {side}'s certificate{} was refused: {reason}", if certificate.is_empty() { String::new() } else { format!(" {}", clip(certificate)) })]
#[non_exhaustive]
pub struct Refusal {
    /// Whose certificate.
    pub side: Side,
    /// Its first SAN, or else its subject; empty when there is none to read.
    pub certificate: String,
    /// Which check failed.
    pub reason: Reason,
}

/// The check that a certificate failed. Times are Unix seconds.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reason {
    /// None was presented, and one is required.
    #[error("none was presented")]
    NotPresented,
    /// It cannot be parsed.
    #[error("it is malformed")]
    Malformed,
    /// Its time is over.
    #[error("{} expired at {}, it is {} now", if *issuer { "a certificate in its chain" } else { "it" }, Utc(*not_after), Utc(*now))]
    Expired {
        /// Whether it is an intermediate certificate that expired.
        issuer: bool,
        /// End of validity.
        not_after: i64,
        /// The time of the check.
        now: i64,
    },
    /// Its time has not begun.
    #[error("{} is not valid before {}, it is {} now", if *issuer { "a certificate in its chain" } else { "it" }, Utc(*not_before), Utc(*now))]
    NotYetValid {
        /// Whether it is an intermediate certificate.
        issuer: bool,
        /// Begin of validity.
        not_before: i64,
        /// The time of the check.
        now: i64,
    },
    /// No trusted root signed it.
    #[error("its issuer ({issuer}) is not signed by a certificate authority that we trust{}", domain.as_ref().map(|d| format!(" for trust domain {d}")).unwrap_or_default())]
    UnknownCa {
        /// Its issuer's distinguished name.
        issuer: String,
        /// The trust domain whose roots were asked.
        domain: Option<String>,
    },
    /// The bundle map has no such trust domain.
    #[error("its trust domain {domain} is not one of those that we trust ({})", list(known))]
    UnknownTrustDomain {
        /// The certificate's.
        domain: String,
        /// Ours.
        known: Vec<String>,
    },
    /// Its extended key usage does not allow this role.
    #[error("its extended key usage does not include {required}")]
    WrongUsage {
        /// `server authentication` or `client authentication`.
        required: &'static str,
    },
    /// A SPIFFE leaf has exactly one URI SAN.
    #[error("it must have exactly one URI SAN with a SPIFFE id, it has {}", if uris.is_empty() { "none".to_owned() } else { list(uris) })]
    NotOneUri {
        /// Those that it has.
        uris: Vec<String>,
    },
    /// Its URI SAN is not a SPIFFE id.
    #[error("its URI SAN {:?} {error}", clip(uri))]
    NotSpiffe {
        /// The URI.
        uri: String,
        /// What is wrong with it.
        error: SpiffeIdError,
    },
    /// It is a certificate authority's, or may sign certificates or revocation lists (X509-SVID §5.2).
    #[error("it is a signing certificate, not a leaf")]
    Signing,
    /// Its authority has revoked it.
    #[error("{} was revoked by its authority", if *issuer { "a certificate in its chain" } else { "it" })]
    Revoked {
        /// Whether it is an intermediate certificate that was revoked.
        issuer: bool,
    },
    /// The revocation lists do not say whether it was revoked, and must ([`RevocationPolicy`](crate::RevocationPolicy)).
    #[error("whether it was revoked is not known: {0}")]
    RevocationUnknown(&'static str),
    /// An authority in its chain may not issue certificates of this name (RFC 5280 §4.2.1.10). Constraints on URIs are
    /// not understood, and refuse every URI.
    #[error("the name constraints of an authority in its chain do not allow its names ({})", list(offered))]
    NameConstraints {
        /// The certificate's SANs.
        offered: Vec<String>,
    },
    /// A certificate in its chain is not an authority, or has more authorities below it than it may.
    #[error("{0}")]
    Authority(&'static str),
    /// It is signed in a way that we do not support: too weak, or unknown.
    #[error("it or a certificate in its chain has a key or signature that is too weak or not supported")]
    WeakSignature,
    /// It uses X.509 in a way that we do not accept.
    #[error("it or a certificate in its chain {0}")]
    Form(&'static str),
    /// The handshake was not signed with the certificate's key.
    #[error("its presenter did not prove to have its private key")]
    NoProof,
    /// No SAN satisfies any matcher.
    #[error("no subject alternative name matches: wanted {}, offered {}", list(wanted), if offered.is_empty() { "none".to_owned() } else { list(offered) })]
    San {
        /// The matchers, or the server name.
        wanted: Vec<String>,
        /// The certificate's SANs.
        offered: Vec<String>,
    },
    /// Any other failure of the chain.
    #[error("{0}")]
    Other(String),
}

fn list(items: &[String]) -> String {
    let clipped = |items: &[String]| items.iter().map(|item| clip(item)).collect::<Vec<_>>().join(", ");
    match items {
        [one] => clip(one).into_owned(),
        many if many.len() > 8 => format!("one of [{}, and {} more]", clipped(&many[..8]), many.len() - 8),
        many => format!("[{}]", clipped(many)),
    }
}

/// The peer chooses its names: no message grows with them.
pub(crate) fn clip(name: &str) -> Cow<'_, str> {
    match name.char_indices().nth(CLIP) {
        Some((end, _)) => format!("{}...", &name[..end]).into(),
        None => name.into(),
    }
}

impl TlsError {
    /// Whether the identity of one side was refused by the other; such a connection fails again until a certificate or the configuration changes.
    pub fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::RefusedByPeer { .. })
    }

    /// Sorts out what a handshake with the peer on `side` ended with.
    pub(crate) fn from_handshake(
        error: io::Error,
        refusal: Option<Box<Refusal>>,
        side: Side,
        own: Option<&str>,
    ) -> Self {
        if let Some(refusal) = refusal {
            return Self::Refused(refusal);
        }
        if let Some(tls) = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>()) {
            return match tls {
                rustls::Error::AlertReceived(alert) => {
                    Self::RefusedByPeer { side, alert: *alert, own: own.map(str::to_owned) }
                }
                rustls::Error::NoCertificatesPresented => {
                    Self::Refused(Box::new(Refusal { side, certificate: String::new(), reason: Reason::NotPresented }))
                }
                rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => Self::Plaintext(side),
                other => Self::Handshake { side, error: other.clone() },
            };
        }
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Closed(side),
            _ => Self::Io { side, error },
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Client => "client",
            Self::Server => "server",
        })
    }
}
