//! Target URIs: `xds:///name`, `xds://authority/name`, `host:///name`, `dns:///host:port`, `ipv4:addr:port,…`, `ipv6:[addr]:port,…`.

use std::{fmt, net::SocketAddr};

/// A parsed target of [`Mesh::channel`](crate::Mesh::channel).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// Through the control plane.
    Xds {
        /// An authority of the bootstrap; `None` is the default control plane.
        authority: Option<String>,
        /// The target's name, `host:port` as a rule.
        name: String,
    },
    /// Addresses from DNS.
    Dns {
        /// `host:port`
        host: String,
    },
    /// A fixed list.
    Fixed(Vec<SocketAddr>),
    /// One of the hosts that the mesh was built with.
    Host {
        /// `host` or `host:port`
        name: String,
    },
}

/// A target URI that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("target `{target}`: {reason}")]
pub struct TargetError {
    pub(crate) target: String,
    pub(crate) reason: String,
}

impl Target {
    /// Parses a target URI.
    pub(crate) fn parse(target: &str) -> Result<Self, TargetError> {
        let fail = |reason: String| TargetError { target: target.to_owned(), reason };
        let Some((scheme, rest)) = target.split_once(':') else {
            return Err(fail("has no scheme; known are xds:///NAME, xds://AUTHORITY/NAME, host:///NAME, dns:///HOST:PORT, ipv4:ADDR:PORT,… and ipv6:[ADDR]:PORT,…".into()));
        };
        match scheme {
            "xds" => {
                let rest = rest
                    .strip_prefix("//")
                    .ok_or_else(|| fail("must be xds:///NAME or xds://AUTHORITY/NAME".into()))?;
                let (authority, name) =
                    rest.split_once('/').ok_or_else(|| fail("must be xds:///NAME or xds://AUTHORITY/NAME".into()))?;
                if name.is_empty() {
                    return Err(fail("has no name after the authority".into()));
                }
                Ok(Self::Xds {
                    authority: (!authority.is_empty()).then(|| authority.to_owned()),
                    name: name.to_owned(),
                })
            }
            "host" => match rest.strip_prefix("///") {
                Some(name) if !name.is_empty() => Ok(Self::Host { name: name.to_owned() }),
                _ => Err(fail("must be host:///NAME or host:///NAME:PORT".into())),
            },
            "dns" => {
                // `dns:host`, `dns:///host`, and `dns://resolver/host` as in gRPC's naming document; a resolver is not chosen by the URI here.
                let host = match rest.strip_prefix("//") {
                    Some(rest) => match rest.split_once('/') {
                        Some(("", host)) => host,
                        Some((server, _)) => {
                            return Err(fail(format!(
                                "names the DNS server `{server}`: the system's resolver is used, write dns:///HOST:PORT"
                            )));
                        }
                        None => return Err(fail("must be dns:///HOST:PORT".into())),
                    },
                    None => rest,
                };
                let (name, port) = host.rsplit_once(':').ok_or_else(|| fail("has no port".into()))?;
                if name.is_empty() || port.parse::<u16>().is_err() {
                    return Err(fail("must be dns:///HOST:PORT".into()));
                }
                Ok(Self::Dns { host: host.to_owned() })
            }
            "ipv4" | "ipv6" => {
                let addresses = rest
                    .trim_start_matches('/')
                    .split(',')
                    .map(|a| a.parse::<SocketAddr>().map_err(|_| fail(format!("`{a}` is not ADDRESS:PORT"))))
                    .collect::<Result<Vec<_>, _>>()?;
                match addresses.iter().find(|a| a.is_ipv4() != (scheme == "ipv4")) {
                    Some(wrong) => Err(fail(format!("`{wrong}` is not an {scheme} address"))),
                    None => Ok(Self::Fixed(addresses)),
                }
            }
            other => Err(fail(format!("has the unknown scheme `{other}`; known are xds, host, dns, ipv4 and ipv6"))),
        }
    }

    /// The `:authority` of requests that carry none, and the host that chooses the virtual host.
    pub(crate) fn host(&self) -> String {
        match self {
            Self::Xds { name, .. } => name.clone(),
            Self::Dns { host } => host.clone(),
            Self::Host { name } => name.clone(),
            Self::Fixed(addresses) => addresses.first().map_or_else(String::new, ToString::to_string),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xds { authority, name } => write!(f, "xds://{}/{name}", authority.as_deref().unwrap_or_default()),
            Self::Dns { host } => write!(f, "dns:///{host}"),
            Self::Host { name } => write!(f, "host:///{name}"),
            Self::Fixed(addresses) => {
                f.write_str(if addresses.iter().any(SocketAddr::is_ipv6) { "ipv6:" } else { "ipv4:" })?;
                for (i, a) in addresses.iter().enumerate() {
                    write!(f, "{}{a}", if i > 0 { "," } else { "" })?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_schemes_parse_and_print_back() {
        for target in [
            "xds:///greeter.default.svc.cluster.local:50051",
            "xds://traffic-director/greeter",
            "dns:///greeter:50051",
            "host:///greeter.example",
            "ipv4:127.0.0.1:1,127.0.0.1:2",
            "ipv6:[::1]:1",
        ] {
            assert_eq!(Target::parse(target).unwrap().to_string(), target);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        for (target, reason) in [
            ("greeter", "has no scheme"),
            ("http://greeter", "unknown scheme `http`"),
            ("xds:greeter", "must be xds:///NAME"),
            ("xds://authority/", "has no name"),
            ("dns:///greeter", "has no port"),
            ("host://greeter/", "must be host:///NAME"),
            ("host:///", "must be host:///NAME"),
            ("dns://8.8.8.8/greeter:1", "names the DNS server `8.8.8.8`"),
            ("ipv4:127.0.0.1", "`127.0.0.1` is not ADDRESS:PORT"),
            ("ipv4:[::1]:1", "is not an ipv4 address"),
        ] {
            let error = Target::parse(target).unwrap_err().to_string();
            assert!(error.starts_with(&format!("target `{target}`")) && error.contains(reason), "{error}");
        }
    }
}
