//! TLS alerts in words: what the peer did not like about us.

use crate::{Side, TlsError};
use rustls::AlertDescription;
use std::{error::Error, io};

/// The sentence for the TLS alert in `error` or in its sources, if there is one: why the server refused us.
///
/// Under TLS 1.3 a client's handshake is over before the server has looked at the client's certificate, so the refusal
/// arrives as an error of the first read or write. Streams of [`ClientTls`](crate::ClientTls) put the sentence into
/// their own I/O errors; this function is for errors of other streams, and for errors that wrap those.
pub fn describe_alert(error: &(dyn Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::AlertReceived(alert)) = error.downcast_ref() {
            return Some(sentence(*alert, Side::Server, None, false));
        }
        if let Some(refused @ TlsError::RefusedByPeer { .. }) = error.downcast_ref() {
            return Some(refused.to_string());
        }
        // an io::Error's source() is the source of what it wraps: what it wraps is asked for with get_ref
        if let Some(inner) = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            next = Some(inner);
            continue;
        }
        next = error.source();
    }
    None
}

/// What `alert`, sent by the peer on `side`, means. `own` names the certificate that we presented; `certain` says that
/// without it we presented none.
pub(crate) fn sentence(alert: AlertDescription, side: Side, own: Option<&str>, certain: bool) -> String {
    use AlertDescription as A;
    let ours = match own {
        Some(name) => format!("our certificate {name}"),
        None if certain => format!("us without a {} certificate", other(side)),
        None => "our certificate".to_owned(),
    };
    let refused = |why: &str| format!("the {side} refused {ours}: {why}");
    match alert {
        A::CertificateRequired => {
            format!("the {side} refused us: it requires a {} certificate and we presented none", other(side))
        }
        A::BadCertificate => refused("it says the certificate is bad (bad_certificate)"),
        A::UnsupportedCertificate => {
            refused("it says the certificate is of the wrong type or usage (unsupported_certificate)")
        }
        A::CertificateRevoked => refused("it says the certificate was revoked (certificate_revoked)"),
        A::CertificateExpired => {
            refused("it says the certificate has expired or is not valid yet (certificate_expired)")
        }
        A::CertificateUnknown => refused("it does not accept the certificate (certificate_unknown)"),
        A::UnknownCA => refused("it does not trust the certificate authority that signed it (unknown_ca)"),
        A::AccessDenied => refused("the certificate is valid, but its name is not allowed here (access_denied)"),
        A::DecryptError => format!("the {side} could not verify our signature (decrypt_error)"),
        A::HandshakeFailure => {
            format!("the {side} found no common parameters, or requires a certificate (handshake_failure)")
        }
        A::ProtocolVersion => format!("the {side} does not support our TLS versions (protocol_version)"),
        A::InsufficientSecurity => format!("the {side} requires stronger ciphers (insufficient_security)"),
        A::UnrecognisedName => {
            format!("the {side} does not know the server name that we sent (unrecognized_name)")
        }
        A::NoApplicationProtocol => {
            format!("the {side} supports none of our ALPN protocols (no_application_protocol)")
        }
        other => format!("the {side} ended the TLS connection with the alert {other:?}"),
    }
}

fn other(side: Side) -> Side {
    match side {
        Side::Client => Side::Server,
        Side::Server => Side::Client,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alert_is_found_under_io_errors() {
        let alert = rustls::Error::AlertReceived(AlertDescription::UnknownCA);
        let wrapped = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, alert));
        let text = describe_alert(&wrapped).unwrap();
        assert!(text.contains("does not trust the certificate authority"), "{text}");
        assert_eq!(describe_alert(&io::Error::other("no alert")), None);
        assert_eq!(describe_alert(&rustls::Error::DecryptError), None);
    }

    #[test]
    fn a_missing_certificate_is_said_to_be_missing() {
        let text = sentence(AlertDescription::CertificateRequired, Side::Server, None, true);
        assert_eq!(text, "the server refused us: it requires a client certificate and we presented none");
        let text = sentence(AlertDescription::BadCertificate, Side::Server, None, true);
        assert!(text.contains("us without a client certificate"), "{text}");
        let text = sentence(AlertDescription::UnknownCA, Side::Server, Some("spiffe://td/a"), true);
        assert!(text.contains("our certificate spiffe://td/a"), "{text}");
    }
}
