//! `server_uri`: the forms gRPC accepts that make sense for a control plane.

use std::{fmt, net::IpAddr, path::PathBuf};

/// Where a control plane listens.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ServerAddress {
    /// A host name or IP literal (without brackets) and a port.
    Tcp {
        /// Name or address.
        host: String,
        /// Port.
        port: u16,
    },
    /// A Unix domain socket.
    Unix(PathBuf),
}

impl ServerAddress {
    /// Whether what is said to it stays on this machine: a Unix socket, a loopback address, `localhost`.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Unix(_) => true,
            Self::Tcp { host, .. } => {
                host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
            }
        }
    }

    /// Accepts `host:port`, `http://host[:port]`, `https://host[:port]`, `dns:///host[:port]`, `dns:host[:port]`,
    /// `unix:path` and `unix:///path`. The default port is 80 for `http`, else 443.
    pub(crate) fn parse(uri: &str) -> Result<Self, String> {
        if uri.is_empty() {
            return Err("is empty".to_owned());
        }
        if let Some(path) = uri.strip_prefix("unix://").or_else(|| uri.strip_prefix("unix:")) {
            return if path.is_empty() { Err(format!("\"{uri}\" has no path")) } else { Ok(Self::Unix(path.into())) };
        }
        let (rest, default_port) = if let Some(rest) = uri.strip_prefix("http://") {
            (rest, 80)
        } else if let Some(rest) = uri.strip_prefix("https://") {
            (rest, 443)
        } else if let Some(rest) = uri.strip_prefix("dns:///").or_else(|| uri.strip_prefix("passthrough:///")) {
            (rest, 443)
        } else if uri.contains("://") {
            return Err(format!("\"{uri}\" has an unsupported scheme: use host:port, http, https, dns or unix"));
        } else {
            (uri.strip_prefix("dns:").unwrap_or(uri), 443)
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains(['/', '?', '#', '@', ' ']) {
            return Err(format!("\"{uri}\" is not of the form host:port"));
        }
        let (host, port) = split_host_port(rest).ok_or_else(|| format!("\"{uri}\" is not of the form host:port"))?;
        let port = match port {
            None => default_port,
            Some(port) => match port.parse::<u16>() {
                Ok(port) if port > 0 => port,
                _ => return Err(format!("\"{uri}\" has an invalid port \"{port}\"")),
            },
        };
        if host.is_empty() {
            return Err(format!("\"{uri}\" has no host"));
        }
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

/// Splits `host:port`, `host`, `[v6]:port` and `[v6]`. A bare IPv6 address is a host without a port.
pub(crate) fn split_host_port(text: &str) -> Option<(&str, Option<&str>)> {
    if let Some(rest) = text.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest {
            "" => Some((host, None)),
            _ => rest.strip_prefix(':').map(|port| (host, Some(port))),
        };
    }
    match text.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((text, None)),
        Some((host, port)) => Some((host, Some(port))),
        None => Some((text, None)),
    }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}
