//! Where a SPIFFE workload endpoint listens (SPIFFE Workload Endpoint, section 4.2).

use super::BoxedIo;
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

/// The variable that names the socket.
const VARIABLE: &str = "SPIFFE_ENDPOINT_SOCKET";

/// The address of a SPIFFE workload endpoint: `unix:/path`, `unix:///path` or `tcp://IP:port`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum WorkloadEndpoint {
    /// A socket in the file system, by its absolute path.
    Unix(PathBuf),
    /// A TCP address. Whoever may connect gets our identity: for loopback addresses and link-local ones.
    Tcp(SocketAddr),
}

/// Why a text is no endpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("workload endpoint {text:?} {reason}")]
pub struct EndpointError {
    /// What was given.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl WorkloadEndpoint {
    /// From the environment variable `SPIFFE_ENDPOINT_SOCKET`.
    ///
    /// # Errors
    /// It is not set, or not an endpoint.
    pub fn from_env() -> Result<Self, EndpointError> {
        match std::env::var(VARIABLE) {
            Ok(text) => text.parse(),
            Err(_) => Err(EndpointError { text: VARIABLE.into(), reason: "is not in the environment" }),
        }
    }

    pub(super) async fn open(self) -> io::Result<BoxedIo> {
        match self {
            Self::Tcp(address) => {
                let stream = tokio::net::TcpStream::connect(address).await?;
                stream.set_nodelay(true)?;
                Ok(Box::new(stream))
            }
            #[cfg(unix)]
            Self::Unix(path) => Ok(Box::new(tokio::net::UnixStream::connect(path).await?)),
            #[cfg(not(unix))]
            Self::Unix(_) => Err(io::Error::new(io::ErrorKind::Unsupported, "no Unix sockets on this platform")),
        }
    }
}

impl FromStr for WorkloadEndpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let wrong = |reason| EndpointError { text: text.to_owned(), reason };
        if text.contains(['?', '#']) {
            return Err(wrong("has a query or a fragment"));
        }
        if let Some(rest) = text.strip_prefix("unix:") {
            // an authority, even an empty one, ends where the path begins
            let path = match rest.strip_prefix("//") {
                Some(rest) if !rest.starts_with('/') => return Err(wrong("has an authority: write unix:///path")),
                Some(rest) => rest,
                None => rest,
            };
            return match path.starts_with('/') && path.len() > 1 {
                true => Ok(Self::Unix(path.into())),
                false => Err(wrong("has no absolute path")),
            };
        }
        let Some(rest) = text.strip_prefix("tcp://") else {
            return Err(wrong("does not begin with unix: or tcp://"));
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        match rest.parse::<SocketAddr>() {
            Ok(address) if address.port() != 0 => Ok(Self::Tcp(address)),
            Ok(_) => Err(wrong("has no port")),
            Err(_) if rest.parse::<IpAddr>().is_ok() => Err(wrong("has no port")),
            Err(_) => Err(wrong("is not IP:port: names and paths are not allowed")),
        }
    }
}

impl fmt::Display for WorkloadEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp://{address}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_read_by_the_standard() {
        let unix = |path: &str| Ok(WorkloadEndpoint::Unix(path.into()));
        for (text, expected) in [
            ("unix:/run/spire/agent.sock", unix("/run/spire/agent.sock")),
            ("unix:///run/agent.sock", unix("/run/agent.sock")),
            ("tcp://127.0.0.1:8000", Ok(WorkloadEndpoint::Tcp(([127, 0, 0, 1], 8000).into()))),
            ("tcp://[::1]:8000", Ok(WorkloadEndpoint::Tcp("[::1]:8000".parse().unwrap()))),
            ("unix:agent.sock", Err("has no absolute path")),
            ("unix:///", Err("has no absolute path")),
            ("unix://host/agent.sock", Err("has an authority: write unix:///path")),
            ("unix:///a?b", Err("has a query or a fragment")),
            ("tcp://localhost:80", Err("is not IP:port: names and paths are not allowed")),
            ("tcp://127.0.0.1", Err("has no port")),
            ("tcp://127.0.0.1:0", Err("has no port")),
            ("tcp://127.0.0.1:80/a", Err("is not IP:port: names and paths are not allowed")),
            ("/run/agent.sock", Err("does not begin with unix: or tcp://")),
            ("", Err("does not begin with unix: or tcp://")),
        ] {
            let found = text.parse::<WorkloadEndpoint>();
            assert_eq!(found.clone().map_err(|e| e.reason), expected, "{text}");
            if let Ok(endpoint) = found {
                assert_eq!(endpoint.to_string().parse(), Ok(endpoint));
            }
        }
    }
}
