//! LDS validation of what servers are told (gRFC A36, A41).

use super::{Decoder, Valid, type_name};
use crate::resource::{
    CidrRange, ClientCertDetails, FilterChain, FilterChainMatch, ForwardClientCert, ServerConnections, ServerListener,
    ServerName, SourceType, TransportProtocol,
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{
                Address, CidrRange as ProtoRange, address::Address as AddressKind, socket_address::PortSpecifier,
                socket_address::Protocol,
            },
            listener::v3::{
                Filter, FilterChain as ProtoChain, FilterChainMatch as ProtoMatch, Listener as Proto, ListenerFilter,
                filter::ConfigType, filter_chain_match::ConnectionSourceType,
                listener_filter::ConfigType as ListenerFilterConfig,
            },
        },
        extensions::filters::network::http_connection_manager::v3::{
            HttpConnectionManager as ProtoHcm, http_connection_manager::ForwardClientCertDetails,
        },
    },
    google::protobuf::UInt32Value,
};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// We find out by ourselves what they find out for Envoy.
const INSPECTORS: [&str; 2] = [
    "envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector",
    "envoy.extensions.filters.listener.http_inspector.v3.HttpInspector",
];

impl Decoder<'_> {
    /// What a filter or a limit may say depends on whose listener it is in.
    pub(super) fn server_listener(&mut self, proto: Proto) -> Valid<ServerListener> {
        let before = std::mem::replace(&mut self.server, true);
        let listener = self.server_listener_of(proto);
        self.server = before;
        listener
    }

    fn server_listener_of(&mut self, proto: Proto) -> Valid<ServerListener> {
        let address = self.at("address", |cx| cx.listening_address(proto.address))?;
        if proto.use_original_dst.is_some_and(|value| value.value) {
            return Err(self.invalid_at("use_original_dst", "not supported (gRFC A36)"));
        }
        for (field, set) in [
            ("filter_chain_matcher", proto.filter_chain_matcher.is_some()),
            ("fcds_config", proto.fcds_config.is_some()),
            ("udp_listener_config", proto.udp_listener_config.is_some()),
            ("listener_specifier", proto.listener_specifier.is_some()),
            ("additional_addresses", !proto.additional_addresses.is_empty()),
        ] {
            if set {
                return Err(self.invalid_at(field, "not supported"));
            }
        }
        self.ignored(&[
            ("access_log", !proto.access_log.is_empty()),
            ("connection_balance_config", proto.connection_balance_config.is_some()),
            ("socket_options", !proto.socket_options.is_empty()),
            ("transparent", proto.transparent.is_some_and(|value| value.value)),
            ("freebind", proto.freebind.is_some_and(|value| value.value)),
            ("tcp_fast_open_queue_length", proto.tcp_fast_open_queue_length.is_some()),
            ("tcp_keepalive", proto.tcp_keepalive.is_some()),
            ("continue_on_listener_filters_timeout", proto.continue_on_listener_filters_timeout),
        ]);
        for (index, filter) in proto.listener_filters.into_iter().enumerate() {
            self.at_index("listener_filters", index, |cx| cx.listener_filter(&filter))?;
        }
        let detection_timeout = self.duration("listener_filters_timeout", proto.listener_filters_timeout)?;
        let mut filter_chains: Vec<Arc<FilterChain>> = Vec::with_capacity(proto.filter_chains.len());
        for (index, chain) in proto.filter_chains.into_iter().enumerate() {
            let chain = self.at_index("filter_chains", index, |cx| {
                let name = format!("filter_chains[{index}]");
                let Some(chain) = cx.filter_chain(chain, &name)? else { return Ok(None) };
                match filter_chains.iter().find(|other| overlap(&other.matcher, &chain.matcher)) {
                    Some(other) => {
                        let reason = format!("matches the same connections as chain \"{}\"", other.name);
                        Err(cx.invalid_at("filter_chain_match", reason))
                    }
                    None => Ok(Some(chain)),
                }
            })?;
            filter_chains.extend(chain.map(Arc::new));
        }
        let default_filter_chain = match proto.default_filter_chain {
            Some(chain) => self.at("default_filter_chain", |cx| {
                // Whatever it says of connections: it is the one for all that are left.
                let chain = ProtoChain { filter_chain_match: None, ..chain };
                cx.filter_chain(chain, "default_filter_chain")
            })?,
            None => None,
        };
        if filter_chains.is_empty() && default_filter_chain.is_none() {
            return Err(self.invalid_at("filter_chains", "is empty, and there is no default_filter_chain"));
        }
        Ok(ServerListener {
            name: proto.name.into(),
            address,
            filter_chains,
            default_filter_chain: default_filter_chain.map(Arc::new),
            detection_timeout,
        })
    }

    fn listening_address(&mut self, proto: Option<Address>) -> Valid<SocketAddr> {
        let socket = match proto.and_then(|proto| proto.address) {
            Some(AddressKind::SocketAddress(socket)) => socket,
            Some(_) => return Err(self.invalid("must be a socket_address")),
            None => return Err(self.invalid("is missing")),
        };
        self.at("socket_address", |cx| {
            if socket.protocol != Protocol::Tcp as i32 {
                return Err(cx.invalid_at("protocol", "must be TCP"));
            }
            let Ok(ip) = socket.address.parse::<IpAddr>() else {
                return Err(cx.invalid_at("address", format!("\"{}\" is not an IP address", socket.address)));
            };
            let port = match socket.port_specifier {
                Some(PortSpecifier::PortValue(port)) => u16::try_from(port).ok().filter(|port| *port != 0),
                Some(PortSpecifier::NamedPort(_)) => return Err(cx.invalid_at("named_port", "not supported")),
                None => None,
            };
            match port {
                Some(port) => Ok(SocketAddr::new(ip, port)),
                None => Err(cx.invalid_at("port_value", "must be between 1 and 65535")),
            }
        })
    }

    fn listener_filter(&mut self, proto: &ListenerFilter) -> Valid<()> {
        match &proto.config_type {
            Some(ListenerFilterConfig::TypedConfig(any)) if INSPECTORS.contains(&type_name(&any.type_url)) => Ok(()),
            Some(ListenerFilterConfig::TypedConfig(any)) => {
                let name = type_name(&any.type_url);
                Err(self.invalid_at("typed_config", format!("listener filter \"{name}\" is not supported")))
            }
            Some(ListenerFilterConfig::ConfigDiscovery(_)) => Err(self.invalid_at("config_discovery", "not supported")),
            None => Err(self.invalid_at("typed_config", "is missing")),
        }
    }

    /// `None`: it can match nothing here, which is noted.
    fn filter_chain(&mut self, proto: ProtoChain, name: &str) -> Valid<Option<FilterChain>> {
        if proto.use_proxy_proto.is_some_and(|value| value.value) {
            return Err(self.invalid_at("use_proxy_proto", "not supported"));
        }
        let (http, connections) = self.network_filters(proto.filters)?;
        let tls = match proto.transport_socket {
            Some(socket) => self.at("transport_socket", |cx| cx.server_socket(socket))?,
            None => None,
        };
        self.ignored(&[("transport_socket_connect_timeout", proto.transport_socket_connect_timeout.is_some())]);
        let matcher = proto.filter_chain_match.unwrap_or_default();
        let Some(matcher) = self.at("filter_chain_match", |cx| cx.chain_match(matcher))? else { return Ok(None) };
        let name = if proto.name.is_empty() { name } else { &proto.name };
        Ok(Some(FilterChain { name: name.into(), matcher, tls, http, connections }))
    }

    /// gRFC A36: the HTTP connection manager is the only filter.
    fn network_filters(
        &mut self,
        protos: Vec<Filter>,
    ) -> Valid<(crate::resource::HttpConnectionManager, ServerConnections)> {
        let count = protos.len();
        let mut manager = None;
        for (index, filter) in protos.into_iter().enumerate() {
            manager = Some(self.at_index("filters", index, |cx| {
                let Some(ConfigType::TypedConfig(any)) = filter.config_type else {
                    return Err(cx.invalid_at("typed_config", "is missing"));
                };
                cx.at("typed_config", |cx| {
                    let proto: ProtoHcm = cx.any(&any)?;
                    if index + 1 != count {
                        return Err(cx.invalid("must be the last filter, and the only one (gRFC A36)"));
                    }
                    let connections = cx.server_connections(&proto)?;
                    Ok((cx.connection_manager(proto)?, connections))
                })
            })?);
        }
        manager.ok_or_else(|| self.invalid_at("filters", "is empty: the HTTP connection manager must be the last one"))
    }

    fn server_connections(&mut self, proto: &ProtoHcm) -> Valid<ServerConnections> {
        // Rules by paths would let in what they should not, if paths were not read as they were meant to.
        let paths = [
            ("normalize_path", proto.normalize_path.is_some_and(|value| value.value)),
            ("merge_slashes", proto.merge_slashes),
            ("path_with_escaped_slashes_action", proto.path_with_escaped_slashes_action > 1),
        ];
        if let Some((field, _)) = paths.iter().find(|(_, set)| *set) {
            return Err(self.invalid_at(field, "not supported: paths are compared as they arrive"));
        }
        // So would rules by headers, and whom headers name, if what is to be taken away stayed.
        let headers = [
            ("forward_client_cert_matcher", proto.forward_client_cert_matcher.is_some()),
            ("early_header_mutation_extensions", !proto.early_header_mutation_extensions.is_empty()),
        ];
        if let Some((field, _)) = headers.iter().find(|(_, set)| *set) {
            return Err(
                self.invalid_at(field, "not supported: headers that a server is not to believe would be believed")
            );
        }
        self.ignored(&[("upgrade_configs", !proto.upgrade_configs.is_empty())]);
        let mut greater = |field, value: Option<UInt32Value>| match value.map(|value| value.value) {
            Some(0) => Err(self.invalid_at(field, "must be greater than zero")),
            other => Ok(other),
        };
        let h2 = proto.http2_protocol_options.as_ref();
        let max_concurrent_streams = greater(
            "http2_protocol_options.max_concurrent_streams",
            h2.and_then(|options| options.max_concurrent_streams),
        )?;
        let max_request_headers_kb = greater("max_request_headers_kb", proto.max_request_headers_kb)?;
        let common = proto.common_http_protocol_options.as_ref();
        let max_headers_count = greater(
            "common_http_protocol_options.max_headers_count",
            common.and_then(|common| common.max_headers_count),
        )?;
        let (idle_timeout, max_connection_duration) = self.at("common_http_protocol_options", |cx| {
            let idle = cx.duration("idle_timeout", common.and_then(|common| common.idle_timeout))?;
            let age = common.and_then(|common| common.max_connection_duration);
            Ok((idle, cx.duration("max_connection_duration", age)?))
        })?;
        let forward_client_cert = match ForwardClientCertDetails::try_from(proto.forward_client_cert_details) {
            Ok(ForwardClientCertDetails::Sanitize) => ForwardClientCert::Sanitize,
            Ok(ForwardClientCertDetails::ForwardOnly) => ForwardClientCert::ForwardOnly,
            Ok(ForwardClientCertDetails::AppendForward) => ForwardClientCert::AppendForward,
            Ok(ForwardClientCertDetails::SanitizeSet) => ForwardClientCert::SanitizeSet,
            Ok(ForwardClientCertDetails::AlwaysForwardOnly) => ForwardClientCert::AlwaysForwardOnly,
            Err(_) => return Err(self.invalid_at("forward_client_cert_details", "is unknown")),
        };
        let details = proto.set_current_client_cert_details.as_ref();
        let client_cert_details = details.map_or_else(ClientCertDetails::default, |details| ClientCertDetails {
            subject: details.subject.is_some_and(|value| value.value),
            cert: details.cert,
            chain: details.chain,
            dns: details.dns,
            uri: details.uri,
        });
        Ok(ServerConnections {
            max_concurrent_streams,
            max_request_headers_kb,
            max_headers_count,
            idle_timeout,
            max_connection_duration: max_connection_duration.filter(|age| !age.is_zero()),
            request_headers_timeout: self.duration("request_headers_timeout", proto.request_headers_timeout)?,
            drain_timeout: self.duration("drain_timeout", proto.drain_timeout)?,
            forward_client_cert,
            client_cert_details,
        })
    }

    fn chain_match(&mut self, proto: ProtoMatch) -> Valid<Option<FilterChainMatch>> {
        for (field, set) in [
            ("address_suffix", !proto.address_suffix.is_empty()),
            ("suffix_len", proto.suffix_len.is_some()),
            ("direct_source_prefix_ranges", !proto.direct_source_prefix_ranges.is_empty()),
        ] {
            if set {
                return Err(self.invalid_at(field, "not supported"));
            }
        }
        let destination_port = match proto.destination_port.map(|port| u16::try_from(port.value)) {
            Some(Err(_)) => return Err(self.invalid_at("destination_port", "is more than 65535")),
            port => port.and_then(Result::ok),
        };
        let transport = match proto.transport_protocol.as_str() {
            "" => None,
            "raw_buffer" => Some(TransportProtocol::RawBuffer),
            "tls" => Some(TransportProtocol::Tls),
            other => {
                self.note("transport_protocol", format!("\"{other}\" is never spoken here: the chain takes nothing"));
                return Ok(None);
            }
        };
        let source_type = match ConnectionSourceType::try_from(proto.source_type) {
            Ok(ConnectionSourceType::Any) => SourceType::Any,
            Ok(ConnectionSourceType::SameIpOrLoopback) => SourceType::SameIpOrLoopback,
            Ok(ConnectionSourceType::External) => SourceType::External,
            Err(_) => return Err(self.invalid_at("source_type", "is unknown")),
        };
        let ranges = |cx: &mut Self, field, protos| cx.each(field, protos, |cx, proto| cx.cidr(&proto)).map(set);
        Ok(Some(FilterChainMatch {
            destination_port,
            prefix_ranges: ranges(self, "prefix_ranges", proto.prefix_ranges)?,
            server_names: set(self.each("server_names", proto.server_names, |cx, name| cx.server_name(&name))?),
            transport,
            application_protocols: set(proto.application_protocols.into_iter().map(Arc::from).collect()),
            source_type,
            source_prefix_ranges: ranges(self, "source_prefix_ranges", proto.source_prefix_ranges)?,
            source_ports: set(self.each("source_ports", proto.source_ports, |cx, port| {
                u16::try_from(port).map_err(|_| cx.invalid(format!("{port} is more than 65535")))
            })?),
        }))
    }

    pub(super) fn cidr(&mut self, proto: &ProtoRange) -> Valid<CidrRange> {
        self.address_range(&proto.address_prefix, proto.prefix_len)
    }

    pub(super) fn address_range(&mut self, prefix: &str, length: Option<UInt32Value>) -> Valid<CidrRange> {
        let Ok(address) = prefix.parse::<IpAddr>() else {
            return Err(self.invalid_at("address_prefix", format!("\"{prefix}\" is not an IP address")));
        };
        let bits = length.map_or(0, |bits| bits.value);
        CidrRange::new(address, bits).map_err(|error| self.invalid_at("prefix_len", error.to_string()))
    }

    fn server_name(&mut self, name: &str) -> Valid<ServerName> {
        let lower = name.to_ascii_lowercase();
        match lower.strip_prefix('*') {
            Some(suffix) if suffix.len() > 1 && suffix.starts_with('.') && !suffix.contains('*') => {
                Ok(ServerName::Below(suffix.into()))
            }
            None if !lower.is_empty() && !lower.contains('*') => Ok(ServerName::Exact(lower.into())),
            _ => Err(self.invalid(format!("\"{name}\" is not a name: use name or *.suffix"))),
        }
    }
}

/// In order, each once.
fn set<T: Ord>(mut list: Vec<T>) -> Vec<T> {
    list.sort_unstable();
    list.dedup();
    list
}

/// Whether both could take one connection, and neither is more specific (gRFC A36).
fn overlap(a: &FilterChainMatch, b: &FilterChainMatch) -> bool {
    fn common<T: PartialEq>(a: &[T], b: &[T]) -> bool {
        (a.is_empty() && b.is_empty()) || a.iter().any(|one| b.contains(one))
    }
    a.destination_port == b.destination_port
        && a.transport == b.transport
        && a.source_type == b.source_type
        && common(&a.prefix_ranges, &b.prefix_ranges)
        && common(&a.server_names, &b.server_names)
        && common(&a.application_protocols, &b.application_protocols)
        && common(&a.source_prefix_ranges, &b.source_prefix_ranges)
        && common(&a.source_ports, &b.source_ports)
}
