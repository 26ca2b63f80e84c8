//! Stateful sessions (gRFC A55, A60; `envoy.extensions.filters.http.stateful_session.v3`).

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{HeaderName, HeaderValue};
use std::{net::SocketAddr, time::Duration};

/// `StatefulSession`
#[derive(Clone, Debug, PartialEq)]
pub struct StatefulSessionConfig {
    /// Where the state is; `None`: there are no sessions.
    pub state: Option<SessionState>,
}

/// Where the state of a session is.
#[derive(Clone, Debug, PartialEq)]
pub enum SessionState {
    /// In a cookie.
    Cookie {
        /// Its name.
        name: String,
        /// How long it lasts; `None` is as long as the caller lives.
        ttl: Option<Duration>,
        /// The paths that have it; default `/`.
        path: String,
        /// More attributes, `name` or `name=value`.
        attributes: Vec<String>,
    },
    /// In a header of request and response.
    Header(HeaderName),
}

/// The endpoint of a session, and perhaps its cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionHost {
    /// The endpoint.
    pub address: SocketAddr,
    /// Where the route splits over several clusters.
    pub cluster: Option<String>,
}

impl SessionHost {
    /// From the value of a cookie or a header: base64 of `ip:port` or `ip:port;cluster:NAME`. `None`: it is neither.
    pub fn decode(value: &[u8]) -> Option<Self> {
        let text = String::from_utf8(STANDARD.decode(value).ok()?).ok()?;
        let (address, cluster) = match text.split_once(';') {
            Some((address, rest)) => (address, rest.strip_prefix("cluster:").map(str::to_owned)),
            None => (text.as_str(), None),
        };
        Some(Self { address: address.parse().ok()?, cluster })
    }

    /// The value.
    pub fn encode(&self) -> String {
        match &self.cluster {
            Some(cluster) => STANDARD.encode(format!("{};cluster:{cluster}", self.address)),
            None => STANDARD.encode(self.address.to_string()),
        }
    }
}

impl SessionState {
    /// The header of a response that begins a session with this host: `set-cookie`, or the header itself.
    pub fn header(&self, host: &SessionHost) -> Option<(HeaderName, HeaderValue)> {
        match self {
            Self::Header(name) => Some((name.clone(), HeaderValue::try_from(host.encode()).ok()?)),
            Self::Cookie { name, ttl, path, attributes } => {
                let mut text = format!("{name}=\"{}\"", host.encode());
                if let Some(ttl) = ttl {
                    text.push_str(&format!("; Max-Age={}", ttl.as_secs()));
                }
                text.push_str(&format!("; Path={path}; HttpOnly"));
                for attribute in attributes {
                    text.push_str("; ");
                    text.push_str(attribute);
                }
                Some((http::header::SET_COOKIE, HeaderValue::try_from(text).ok()?))
            }
        }
    }

    /// Whether a path has it: equal, or below it (gRFC A55).
    pub fn is_for(&self, path: &str) -> bool {
        match self {
            Self::Header(_) => true,
            Self::Cookie { path: of, .. } => match path.strip_prefix(of.as_str()) {
                Some(rest) => rest.is_empty() || of.ends_with('/') || rest.starts_with('/'),
                None => false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_are_read_as_they_are_written() {
        for cluster in [None, Some("outbound|80||a".to_owned())] {
            let host = SessionHost { address: ([127, 0, 0, 1], 8080).into(), cluster };
            assert_eq!(SessionHost::decode(host.encode().as_bytes()), Some(host));
        }
        assert_eq!(SessionHost::decode(b"MTI3LjAuMC4xOjgwODA=").unwrap().address, ([127, 0, 0, 1], 8080).into());
        for bad in ["", "!", "MTI3LjAuMC4x", "Ojs7"] {
            assert_eq!(SessionHost::decode(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_cookie_is_of_its_path_and_of_those_below() {
        let of =
            |path: &str| SessionState::Cookie { name: "n".into(), ttl: None, path: path.into(), attributes: vec![] };
        assert!(of("/").is_for("/a") && of("/a").is_for("/a") && of("/a").is_for("/a/b") && of("/a/").is_for("/a/b"));
        assert!(!of("/a").is_for("/ab") && !of("/a").is_for("/"));
    }
}
