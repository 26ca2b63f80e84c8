//! LDS: `envoy.config.listener.v3.Listener` with an `address`: what a server does (gRFC A36).

use super::{CidrRange, DownstreamTls, HttpConnectionManager};
use std::{net::SocketAddr, sync::Arc, time::Duration};

/// A server-side listener.
#[derive(Clone, Debug, PartialEq)]
pub struct ServerListener {
    /// Resource name.
    pub name: Arc<str>,
    /// Where it listens: a server that listens elsewhere does not serve (gRFC A36).
    pub address: SocketAddr,
    /// How connections are taken: no two can match the same connection equally well.
    pub filter_chains: Vec<Arc<FilterChain>>,
    /// For connections that match none of the chains; `None`: those are closed.
    pub default_filter_chain: Option<Arc<FilterChain>>,
    /// `listener_filters_timeout`: how long the first bytes of a connection may take, where it is set; zero means no limit.
    pub detection_timeout: Option<Duration>,
}

/// How the connections that match are taken.
#[derive(Clone, Debug, PartialEq)]
pub struct FilterChain {
    /// Given, or else `filter_chains[i]` or `default_filter_chain`.
    pub name: Arc<str>,
    /// Which connections. Means nothing in the default chain.
    pub matcher: FilterChainMatch,
    /// `None`: plaintext.
    pub tls: Option<Arc<DownstreamTls>>,
    /// Routes and filters of the requests.
    pub http: HttpConnectionManager,
    /// How the connections are run.
    pub connections: ServerConnections,
}

/// `FilterChainMatch`: everything that is set must hold; of several chains the most specific one takes the connection, in
/// Envoy's order: destination port, destination range, server name, transport protocol, application protocol, source type,
/// source range, source port. gRPC knows only ranges, source type and source ports, and takes no chain that has
/// any of the others but the transport protocol `raw_buffer` (gRFC A36).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FilterChainMatch {
    /// The port the connection was made to.
    pub destination_port: Option<u16>,
    /// The address the connection was made to: in any of these; empty: everywhere.
    pub prefix_ranges: Vec<CidrRange>,
    /// SNI: any of these; a first label `*` stands for any names below. Lower case.
    pub server_names: Vec<ServerName>,
    /// What the connection begins with; `None`: either.
    pub transport: Option<TransportProtocol>,
    /// The first protocol of ALPN that any chain names; for plaintext `h2c` or `http/1.1`. Empty: any.
    pub application_protocols: Vec<Arc<str>>,
    /// Whether the client is on this machine.
    pub source_type: SourceType,
    /// The address of the client: in any of these; empty: everywhere.
    pub source_prefix_ranges: Vec<CidrRange>,
    /// The port of the client: any of these; empty: any.
    pub source_ports: Vec<u16>,
}

/// One entry of `server_names`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ServerName {
    /// This name.
    Exact(Arc<str>),
    /// Every name that ends so, dot included: `.example.com` of `*.example.com`.
    Below(Arc<str>),
}

/// `transport_protocol`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum TransportProtocol {
    /// `raw_buffer`: plaintext.
    RawBuffer,
    /// `tls`: begins with a ClientHello.
    Tls,
}

/// `ConnectionSourceType`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SourceType {
    /// Either.
    #[default]
    Any,
    /// From the loopback, or from the address it was made to.
    SameIpOrLoopback,
    /// From elsewhere.
    External,
}

/// What a connection manager says of connections and of the client's identity. `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ServerConnections {
    /// `http2_protocol_options.max_concurrent_streams`: greater than zero.
    pub max_concurrent_streams: Option<u32>,
    /// `max_request_headers_kb`: KiB, greater than zero.
    pub max_request_headers_kb: Option<u32>,
    /// `common_http_protocol_options.max_headers_count`: greater than zero.
    pub max_headers_count: Option<u32>,
    /// `common_http_protocol_options.idle_timeout`: of a connection without streams; zero means no limit.
    pub idle_timeout: Option<Duration>,
    /// `common_http_protocol_options.max_connection_duration`: then it drains.
    pub max_connection_duration: Option<Duration>,
    /// `request_headers_timeout`: of the head of a request; zero means no limit.
    pub request_headers_timeout: Option<Duration>,
    /// `drain_timeout`: between the first GOAWAY and the last.
    pub drain_timeout: Option<Duration>,
    /// `forward_client_cert_details`
    pub forward_client_cert: ForwardClientCert,
    /// `set_current_client_cert_details`
    pub client_cert_details: ClientCertDetails,
}

/// What becomes of `x-forwarded-client-cert`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForwardClientCert {
    /// Taken away.
    #[default]
    Sanitize,
    /// Kept on mTLS connections, taken away on others.
    ForwardOnly,
    /// On mTLS connections the client's certificate is appended.
    AppendForward,
    /// On mTLS connections replaced by the client's certificate.
    SanitizeSet,
    /// Kept on every connection.
    AlwaysForwardOnly,
}

/// `SetCurrentClientCertDetails`: what an element of `x-forwarded-client-cert` says besides `By` and `Hash`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClientCertDetails {
    /// `Subject`
    pub subject: bool,
    /// `Cert`: the certificate, URL-encoded PEM.
    pub cert: bool,
    /// `Chain`: the whole chain, URL-encoded PEM.
    pub chain: bool,
    /// `DNS`: each DNS SAN.
    pub dns: bool,
    /// `URI`: each URI SAN.
    pub uri: bool,
}

impl ServerListener {
    /// All its chains, the default last.
    pub fn chains(&self) -> impl Iterator<Item = &Arc<FilterChain>> {
        self.filter_chains.iter().chain(&self.default_filter_chain)
    }
}

impl ServerName {
    /// Whether the name of a ClientHello, in lower case, is one of these.
    pub fn matches(&self, name: &str) -> bool {
        match self {
            Self::Exact(exact) => **exact == *name,
            Self::Below(suffix) => name.len() > suffix.len() && name.ends_with(&**suffix),
        }
    }
}
