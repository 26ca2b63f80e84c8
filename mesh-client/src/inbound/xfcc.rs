//! `x-forwarded-client-cert`: what becomes of the header that came, and what we say of the client (Envoy).
//!
//! The header is a list of elements, one for each hop, divided by commas; an element is a list of `Key=value` pairs, divided by semicolons.
//! A value with one of `,;=` is in double quotes, in which a backslash escapes a quote. Subjects are in quotes as RFC 2253 has them, whose
//! escapes stay: `O=A\, B` is one name, and nobody makes two of it.

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
    /// `Subject`: of the client's certificate, as RFC 2253 writes it, escapes included.
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
    /// A quote is not closed, or stands in a value without a backslash.
    #[error("a quote is not closed, or not escaped")]
    Quote,
    /// A pair has no `=`.
    #[error("a part is not of the form key=value")]
    Pair,
    /// It has bytes that are no visible ASCII.
    #[error("not text")]
    Text,
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
                client.set(key.trim(), value.trim())?;
            }
            elements.push(client);
        }
        Ok(elements)
    }

    /// Of the headers of a request: all their lines.
    ///
    /// # Errors
    /// As of [`parse`](Self::parse), or a line is no text.
    pub fn of(headers: &HeaderMap) -> Result<Vec<Self>, ForwardedClientError> {
        Self::parse(&joined(headers)?)
    }

    fn set(&mut self, key: &str, value: &str) -> Result<(), ForwardedClientError> {
        let key = key.to_ascii_lowercase();
        let inner = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
        if closed(inner.unwrap_or(value)) != inner.unwrap_or(value) {
            return Err(ForwardedClientError::Quote);
        }
        let value = match inner {
            Some(subject) if key == "subject" => subject.to_owned(),
            Some(quoted) => unescaped(quoted),
            None => value.to_owned(),
        };
        match key.as_str() {
            "by" => self.by.push(value),
            "hash" => self.hash = Some(value),
            "cert" => self.cert = Some(value),
            "chain" => self.chain = Some(value),
            "subject" => self.subject = Some(value),
            "uri" => self.uri.push(value),
            "dns" => self.dns.push(value),
            _ => {}
        }
        Ok(())
    }
}

impl fmt::Display for ForwardedClient {
    /// One element, in Envoy's order.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let by = self.by.iter().map(|value| ("By", value));
        let one = [("Hash", &self.hash), ("Cert", &self.cert), ("Chain", &self.chain)];
        let one = one.into_iter().filter_map(|(key, value)| Some((key, value.as_ref()?)));
        let mut first = true;
        let part = |f: &mut fmt::Formatter<'_>, first: &mut bool, key: &str, value: &str, quote: bool| {
            let semicolon = if std::mem::take(first) { "" } else { ";" };
            if quote || value.trim() != value || value.contains([',', ';', '=', '"', '\\']) {
                write!(f, "{semicolon}{key}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\""))
            } else {
                write!(f, "{semicolon}{key}={value}")
            }
        };
        for (key, value) in by.chain(one) {
            part(f, &mut first, key, value, matches!(key, "Cert" | "Chain"))?;
        }
        if let Some(subject) = &self.subject {
            let semicolon = if std::mem::take(&mut first) { "" } else { ";" };
            write!(f, "{semicolon}Subject=\"{}\"", closed(subject))?;
        }
        self.uri.iter().try_for_each(|uri| part(f, &mut first, "URI", uri, false))?;
        self.dns.iter().try_for_each(|dns| part(f, &mut first, "DNS", dns, false))
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

/// All lines of the header as one.
fn joined(headers: &HeaderMap) -> Result<String, ForwardedClientError> {
    let mut text = String::new();
    for line in headers.get_all(HEADER) {
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(line.to_str().map_err(|_| ForwardedClientError::Text)?);
    }
    Ok(text)
}

/// A backslash escapes a quote and itself, and nothing else.
fn unescaped(quoted: &str) -> String {
    let mut out = String::with_capacity(quoted.len());
    let mut rest = quoted.chars();
    while let Some(c) = rest.next() {
        match (c, rest.as_str().chars().next()) {
            ('\\', Some(escaped @ ('"' | '\\'))) => {
                out.push(escaped);
                rest.next();
            }
            _ => out.push(c),
        }
    }
    out
}

/// A text that no quote of its own ends, and no backslash leaves open: in RFC 2253 every quote is escaped already.
fn closed(subject: &str) -> String {
    let mut out = String::with_capacity(subject.len());
    let mut escaped = false;
    for c in subject.chars() {
        if c == '"' && !escaped {
            out.push('\\');
        }
        out.push(c);
        escaped = c == '\\' && !escaped;
    }
    if escaped {
        out.push('\\');
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
                let value = readable(headers).and_then(|came| {
                    let both = [came.as_bytes(), b",", own.as_bytes()].concat();
                    HeaderValue::from_bytes(&both).ok()
                });
                headers.insert(HEADER, value.unwrap_or(own));
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
        let own = connection.chain().acceptor().map(mesh_tls::Acceptor::uri_sans);
        let client = ForwardedClient {
            by: own.unwrap_or_default(),
            hash: self.hash(peer.certificate()),
            cert: cert.then(|| encoded(&pem(peer.certificate()))),
            chain: chain.then(|| encoded(&peer.chain().iter().map(|der| pem(der)).collect::<String>())),
            subject: subject.then(|| connection.subject().to_owned()),
            uri: if uri { peer.uri_sans().to_vec() } else { Vec::new() },
            dns: if dns { peer.dns_sans().to_vec() } else { Vec::new() },
        };
        let text = client.to_string();
        match HeaderValue::try_from(&text) {
            Ok(value) if !text.is_empty() && text.is_ascii() => value,
            // Names that are no text. There is an element all the same: else the last one would be the client's own.
            _ => HeaderValue::try_from(format!("Hash={}", client.hash.unwrap_or_default()))
                .expect("hexadecimal digits are text"),
        }
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

/// What came, if an element after it can be told from it.
fn readable(headers: &HeaderMap) -> Option<String> {
    let came = joined(headers).and_then(|text| Ok((ForwardedClient::parse(&text)?.len(), text)));
    match came {
        Ok((0, _)) => None,
        Ok((1..MAX_ELEMENTS, text)) => Some(text),
        other => {
            let reason = other.err().unwrap_or(ForwardedClientError::TooMany);
            metrics::counter!("mesh_xfcc_dropped_total").increment(1);
            tracing::debug!(target: "mesh::inbound", %reason, "the x-forwarded-client-cert that came is dropped");
            None
        }
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
        assert_eq!(hops[0].subject.as_deref(), Some("/C=US/CN=\\\"x\\\";, y"), "as it stands there");
        assert_eq!(
            (&hops[0].by[..], &hops[0].uri[..]),
            (&["spiffe://td/a".to_owned()][..], &["spiffe://td/b".to_owned()][..])
        );
        assert_eq!(hops[1].dns, ["d", "e"]);
        assert_eq!(ForwardedClient::parse(""), Ok(vec![]));
    }

    #[test]
    fn what_is_malformed_is_an_error() {
        for text in ["By=\"a", "By=a\"b\"", "By=\"a\"\"b\"", "Subject=a\\"] {
            assert_eq!(ForwardedClient::parse(text), Err(ForwardedClientError::Quote), "{text}");
        }
        assert_eq!(ForwardedClient::parse("By"), Err(ForwardedClientError::Pair));
        assert_eq!(ForwardedClient::parse(&"By=a,".repeat(65)), Err(ForwardedClientError::TooMany));
        let mut headers = HeaderMap::new();
        headers.append(HEADER, HeaderValue::from_static("By=a"));
        headers.append(HEADER, HeaderValue::from_bytes(b"By=\xff").unwrap());
        assert_eq!(ForwardedClient::of(&headers), Err(ForwardedClientError::Text), "not that nobody forwarded");
    }

    #[test]
    fn a_name_with_a_comma_stays_one_name() {
        let read = |text: &str| ForwardedClient::parse(text).unwrap().remove(0);
        let subject = r#"Subject="O=A\, CN=admin\\,CN=\"x\"""#;
        let hop = read(subject);
        assert_eq!(hop.subject.as_deref(), Some(r#"O=A\, CN=admin\\,CN=\"x\""#));
        assert_eq!(hop.to_string(), subject);
        assert_eq!(read(r#"URI="a\"b\\c\d""#).uri, [r#"a"b\c\d"#]);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            by in proptest::collection::vec("[ -~]{1,8}", 0..3), subject in proptest::option::of(r#"([ -!#-\[\]-~]|\\[ -~]){0,8}"#),
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
