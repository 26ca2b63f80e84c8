//! `x-forwarded-client-cert`: what becomes of the header that came, and what we say of the client (Envoy).
//!
//! The header is a list of elements, one for each hop, divided by commas; an element is a list of `Key=value` pairs, divided by semicolons.
//! A value with one of `,;=` is in double quotes, in which a backslash escapes a quote.

use super::ConnectionInfo;
use base64::prelude::{BASE64_STANDARD, Engine as _};
use http::{HeaderMap, HeaderName, HeaderValue};
use mesh_tls::{CryptoProvider, PeerIdentity};
use mesh_xds::resource::{ClientCertDetails, ForwardClientCert};
use std::{fmt, fmt::Write as _, sync::Arc};

/// The header.
pub(super) const HEADER: HeaderName = HeaderName::from_static("x-forwarded-client-cert");

/// One hop in `x-forwarded-client-cert`: the certificate that its client showed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ForwardedClient {
    /// `By`: the URI SANs of the certificate of whoever wrote the element.
    pub by: Vec<String>,
    /// `Hash`: SHA-256 of the client's certificate, in hexadecimal digits.
    pub hash: Option<String>,
    /// `Cert`: the client's certificate, URL-encoded PEM.
    pub cert: Option<String>,
    /// `Chain`: its whole chain, URL-encoded PEM.
    pub chain: Option<String>,
    /// `Subject`: of the client's certificate (RFC 2253).
    pub subject: Option<String>,
    /// `URI`: the URI SANs of the client's certificate.
    pub uri: Vec<String>,
    /// `DNS`: the DNS SANs of the client's certificate.
    pub dns: Vec<String>,
}

/// The header is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardedClientError {
    /// A quote is not closed.
    #[error("a quoted value has no end")]
    Quote,
    /// A pair has no `=`.
    #[error("a part is not of the form key=value")]
    Pair,
    /// More elements than anybody sends.
    #[error("more than {MAX_ELEMENTS} elements")]
    TooMany,
}

/// Hops that are read.
const MAX_ELEMENTS: usize = 64;

impl ForwardedClient {
    /// The hops of a header's value, the first client's first. Keys that are not known are left out.
    ///
    /// # Errors
    /// It is malformed, or too long.
    pub fn parse(value: &str) -> Result<Vec<Self>, ForwardedClientError> {
        let mut elements = Vec::new();
        for element in split(value, ',')? {
            if element.trim().is_empty() {
                continue;
            }
            if elements.len() == MAX_ELEMENTS {
                return Err(ForwardedClientError::TooMany);
            }
            let mut client = Self::default();
            for pair in split(element, ';')? {
                let pair = pair.trim();
                if pair.is_empty() {
                    continue;
                }
                let (key, value) = pair.split_once('=').ok_or(ForwardedClientError::Pair)?;
                client.set(key.trim(), unquoted(value.trim()));
            }
            elements.push(client);
        }
        Ok(elements)
    }

    /// Of the headers of a request: all their lines.
    ///
    /// # Errors
    /// As of [`parse`](Self::parse).
    pub fn of(headers: &HeaderMap) -> Result<Vec<Self>, ForwardedClientError> {
        let lines: Vec<_> = headers.get_all(HEADER).iter().filter_map(|line| line.to_str().ok()).collect();
        Self::parse(&lines.join(","))
    }

    fn set(&mut self, key: &str, value: String) {
        match key.to_ascii_lowercase().as_str() {
            "by" => self.by.push(value),
            "hash" => self.hash = Some(value),
            "cert" => self.cert = Some(value),
            "chain" => self.chain = Some(value),
            "subject" => self.subject = Some(value),
            "uri" => self.uri.push(value),
            "dns" => self.dns.push(value),
            _ => {}
        }
    }
}

impl fmt::Display for ForwardedClient {
    /// One element, in Envoy's order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = self.by.iter().map(|value| ("By", value));
        let one = [("Hash", &self.hash), ("Cert", &self.cert), ("Chain", &self.chain)];
        let one = one.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let mut first = true;
        let mut part = |f: &mut fmt::Formatter<'_>, key: &str, value: &str, quote: bool| {
            let semicolon = if std::mem::take(&mut first) { "" } else { ";" };
            if quote || value.trim() != value || value.contains([',', ';', '=', '"', '\\']) {
                write!(f, "{semicolon}{key}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
            } else {
                write!(f, "{semicolon}{key}={value}")
            }
        };
        for (key, value) in by.chain(one) {
            part(f, key, value, matches!(key, "Cert" | "Chain"))?;
        }
        if let Some(subject) = &self.subject {
            part(f, "Subject", subject, true)?;
        }
        self.uri.iter().try_for_each(|uri| part(f, "URI", uri, false))?;
        self.dns.iter().try_for_each(|dns| part(f, "DNS", dns, false))
    }
}

/// Parts between separators that are not quoted.
fn split(text: &str, separator: char) -> Result<Vec<&str>, ForwardedClientError> {
    let (mut parts, mut start, mut quoted, mut escaped) = (Vec::new(), 0, false, false);
    for (at, c) in text.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            c if c == separator && !quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    if quoted {
        return Err(ForwardedClientError::Quote);
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn unquoted(value: &str) -> String {
    let Some(inner) = value.strip_prefix('"').and_then(|value| value.strip_suffix('"')) else {
        return value.to_owned();
    };
    let mut out = String::with_capacity(inner.len());
    let mut escaped = false;
    for c in inner.chars() {
        if c == '\\' && !escaped {
            escaped = true;
        } else {
            out.push(c);
            escaped = false;
        }
    }
    out
}

/// What is done to the header, compiled.
#[derive(Clone, Debug)]
pub(super) struct Forwarding {
    mode: ForwardClientCert,
    details: ClientCertDetails,
    provider: Arc<CryptoProvider>,
}

impl Forwarding {
    pub(super) fn new(mode: ForwardClientCert, details: ClientCertDetails, provider: Arc<CryptoProvider>) -> Self {
        Self { mode, details, provider }
    }

    /// Edits the header of a request.
    pub(super) fn apply(&self, connection: &ConnectionInfo, headers: &mut HeaderMap) {
        use ForwardClientCert as Mode;
        let mutual = connection.peer();
        match (self.mode, mutual) {
            (Mode::AlwaysForwardOnly, _) | (Mode::ForwardOnly, Some(_)) => {}
            (Mode::AppendForward, Some(peer)) => {
                let own = self.element(connection, peer);
                let mut value = Vec::new();
                for line in headers.get_all(HEADER).iter().filter(|line| !line.is_empty()).chain([&own]) {
                    if !value.is_empty() {
                        value.push(b',');
                    }
                    value.extend_from_slice(line.as_bytes());
                }
                if let Ok(value) = HeaderValue::from_bytes(&value) {
                    headers.insert(HEADER, value);
                }
            }
            (Mode::SanitizeSet, Some(peer)) => drop(headers.insert(HEADER, self.element(connection, peer))),
            _ => drop(headers.remove(HEADER)),
        }
    }

    /// What we say of the client; made once for a connection, unless the configuration changes.
    fn element(&self, connection: &ConnectionInfo, peer: &PeerIdentity) -> HeaderValue {
        let (of, value) = connection.seen().forwarded.get_or_init(|| (self.details, self.make(connection, peer)));
        if *of == self.details { value.clone() } else { self.make(connection, peer) }
    }

    fn make(&self, connection: &ConnectionInfo, peer: &PeerIdentity) -> HeaderValue {
        let ClientCertDetails { subject, cert, chain, dns, uri } = self.details;
        let own = connection.chain().acceptor().and_then(mesh_tls::Acceptor::spiffe_id);
        let pem = || encoded(&pem(peer.certificate()));
        let client = ForwardedClient {
            by: own.map(|id| id.to_string()).into_iter().collect(),
            hash: self.hash(peer.certificate()),
            cert: cert.then(pem),
            chain: chain.then(pem),
            subject: subject.then(|| connection.subject().to_owned()),
            uri: if uri { peer.uri_sans().to_vec() } else { Vec::new() },
            dns: if dns { peer.dns_sans().to_vec() } else { Vec::new() },
        };
        HeaderValue::try_from(client.to_string()).unwrap_or(HeaderValue::from_static(""))
    }

    /// SHA-256 in hexadecimal digits.
    fn hash(&self, der: &[u8]) -> Option<String> {
        let suites = self.provider.cipher_suites.iter().filter_map(|suite| suite.tls13());
        let hash = suites.map(|suite| suite.common.hash_provider).find(|hash| hash.output_len() == 32)?;
        Some(hash.hash(der).as_ref().iter().fold(String::with_capacity(64), |mut text, byte| {
            // Writing to a String does not fail.
            let _ = write!(text, "{byte:02x}");
            text
        }))
    }
}

fn pem(der: &[u8]) -> String {
    let base64 = BASE64_STANDARD.encode(der);
    let lines =
        base64.as_bytes().chunks(64).map(String::from_utf8_lossy).fold(String::new(), |text, line| text + &line + "\n");
    format!("-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n")
}

/// RFC 3986, all but unreserved characters.
fn encoded(text: &str) -> String {
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(byte.into());
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn elements_and_quotes_are_told_apart() {
        let value = "By=spiffe://td/a;Hash=ab;Subject=\"/C=US/CN=\\\"x\\\";, y\";URI=spiffe://td/b,By=spiffe://td/c;DNS=d;DNS=e;X=1";
        let hops = ForwardedClient::parse(value).unwrap();
        assert_eq!(hops.len(), 2);
        assert_eq!(hops[0].subject.as_deref(), Some("/C=US/CN=\"x\";, y"));
        assert_eq!(
            (&hops[0].by[..], &hops[0].uri[..]),
            (&["spiffe://td/a".to_owned()][..], &["spiffe://td/b".to_owned()][..])
        );
        assert_eq!(hops[1].dns, ["d", "e"]);
        assert_eq!(ForwardedClient::parse(""), Ok(vec![]));
    }

    #[test]
    fn what_is_malformed_is_an_error() {
        assert_eq!(ForwardedClient::parse("By=\"a"), Err(ForwardedClientError::Quote));
        assert_eq!(ForwardedClient::parse("By"), Err(ForwardedClientError::Pair));
        assert_eq!(ForwardedClient::parse(&"By=a,".repeat(65)), Err(ForwardedClientError::TooMany));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            by in proptest::collection::vec("[ -~]{1,8}", 0..3), subject in proptest::option::of("[ -~]{0,12}"),
            uri in proptest::collection::vec("[!-~]{1,8}", 0..3), hash in proptest::option::of("[a-f0-9]{1,8}"),
        ) {
            let trim = |text: String| text.trim().to_owned();
            let client = ForwardedClient {
                by: by.into_iter().map(trim).collect(), subject, uri, hash, ..ForwardedClient::default()
            };
            let text = client.to_string();
            let expected = if text.is_empty() { vec![] } else { vec![client] };
            prop_assert_eq!(ForwardedClient::parse(&text), Ok(expected), "{}", text);
        }

        #[test]
        fn no_text_panics(text in any::<String>()) {
            let _ = ForwardedClient::parse(&text);
        }
    }
}
