//! Which filter chain takes a connection: a pure function of what the chains ask for and what is known of the connection.

#[cfg(test)]
mod tests;

use mesh_xds::resource::{CidrRange, FilterChainMatch, ServerName, SourceType, TransportProtocol};
use std::net::{IpAddr, SocketAddr};

/// What a chain is chosen by.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) remote: SocketAddr,
    pub(crate) local: SocketAddr,
    /// What the client begins with.
    pub(crate) spoken: Spoken,
}

/// What the first bytes of a connection say, as far as they were looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spoken {
    /// `None`: not looked at.
    pub(crate) transport: Option<TransportProtocol>,
    /// SNI, in lower case.
    pub(crate) server_name: Option<String>,
    /// Offered by ALPN in the client's order; for plaintext what the first bytes are.
    pub(crate) protocols: Vec<String>,
}

/// How much of a connection has to be seen before its chain can be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Need {
    /// Where it comes from and goes to.
    Addresses,
    /// Whether it is TLS.
    Transport,
    /// The ClientHello, or the first line of plaintext.
    Hello,
}

impl Need {
    /// What these chains ask for.
    pub(crate) fn of<'a>(matchers: impl IntoIterator<Item = &'a FilterChainMatch>) -> Self {
        let need = |matcher: &FilterChainMatch| match matcher {
            m if !m.server_names.is_empty() || !m.application_protocols.is_empty() => Self::Hello,
            m if m.transport.is_some() => Self::Transport,
            _ => Self::Addresses,
        };
        matchers.into_iter().map(need).max().unwrap_or(Self::Addresses)
    }
}

/// The index of the chain that takes a connection; `None`: the default chain does, or nobody.
///
/// The order is Envoy's, of which gRFC A36 is the part without ports and protocols: destination port, destination range, server name,
/// transport protocol, application protocol, source type, source range, source port. Each step keeps the chains that are most
/// specific in it, and never goes back: where those then fail, no others are tried.
pub(crate) fn choose(matchers: &[&FilterChainMatch], facts: &Facts) -> Option<usize> {
    let (source, destination) = (facts.remote.ip().to_canonical(), facts.local.ip().to_canonical());
    let spoken = &facts.spoken;
    let mut left: Vec<usize> = (0..matchers.len()).collect();
    keep(&mut left, matchers, |m| listed(m.destination_port.as_slice(), &facts.local.port()));
    keep(&mut left, matchers, |m| in_range(&m.prefix_ranges, destination));
    keep(&mut left, matchers, |m| named(&m.server_names, spoken.server_name.as_deref()));
    keep(&mut left, matchers, |m| match m.transport {
        None => Some(0),
        wanted => (wanted == spoken.transport).then_some(1),
    });
    keep(&mut left, matchers, |m| {
        if m.application_protocols.is_empty() {
            return Some(0);
        }
        let is_listed = |protocol: &String| m.application_protocols.iter().any(|listed| **listed == **protocol);
        let place = spoken.protocols.iter().position(is_listed)?;
        Some(spoken.protocols.len() - place)
    });
    let local = source.is_loopback() || source == destination;
    keep(&mut left, matchers, |m| match m.source_type {
        SourceType::Any => Some(0),
        SourceType::SameIpOrLoopback => local.then_some(1),
        SourceType::External => (!local).then_some(1),
    });
    keep(&mut left, matchers, |m| in_range(&m.source_prefix_ranges, source));
    keep(&mut left, matchers, |m| listed(&m.source_ports, &facts.remote.port()));
    left.first().copied()
}

/// Keeps those with the highest rank; those without a rank do not match.
fn keep(left: &mut Vec<usize>, matchers: &[&FilterChainMatch], rank: impl Fn(&FilterChainMatch) -> Option<usize>) {
    let best = left.iter().filter_map(|index| rank(matchers[*index])).max();
    left.retain(|index| best.is_some() && rank(matchers[*index]) == best);
}

fn listed<T: PartialEq>(list: &[T], value: &T) -> Option<usize> {
    if list.is_empty() { Some(0) } else { list.contains(value).then_some(1) }
}

/// By the length of the longest range that has the address.
fn in_range(ranges: &[CidrRange], address: IpAddr) -> Option<usize> {
    if ranges.is_empty() {
        return Some(0);
    }
    let lengths = ranges.iter().filter(|range| range.contains(address)).map(|range| usize::from(range.bits()));
    lengths.max().map(|bits| bits + 1)
}

/// Exact names first, then the longest suffix.
fn named(names: &[ServerName], sent: Option<&str>) -> Option<usize> {
    if names.is_empty() {
        return Some(0);
    }
    let sent = sent?;
    let rank = |name: &ServerName| match name {
        ServerName::Exact(_) => usize::MAX,
        ServerName::Below(suffix) => suffix.len(),
    };
    names.iter().filter(|name| name.matches(sent)).map(rank).max()
}
