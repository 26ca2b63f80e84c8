//! LDS for servers (gRFC A36).

use super::*;
use crate::resource::{
    ClientCertDetails, ForwardClientCert, RouteSource, ServerListener, ServerName, SourceType, TransportProtocol,
};
use envoy_types::pb::{
    envoy::{
        config::{
            core::v3::{
                Address, CidrRange as ProtoRange, Pipe, SocketAddress, TransportSocket,
                address::Address as Kind,
                socket_address::{PortSpecifier, Protocol},
                transport_socket::ConfigType as SocketConfig,
            },
            listener::v3::{
                Filter, FilterChain, FilterChainMatch, Listener as Proto, ListenerFilter, filter::ConfigType,
                listener_filter::ConfigType as ListenerFilterConfig,
            },
            route::v3::{
                NonForwardingAction, Route, RouteConfiguration, RouteMatch, VirtualHost, route::Action as ProtoAction,
                route_match::PathSpecifier,
            },
        },
        extensions::{
            filters::{
                http::router::v3::Router,
                listener::{http_inspector::v3::HttpInspector, tls_inspector::v3::TlsInspector},
                network::http_connection_manager::v3::{
                    HttpConnectionManager, HttpFilter,
                    http_connection_manager::{
                        ForwardClientCertDetails, RouteSpecifier, SetCurrentClientCertDetails, UpgradeConfig,
                    },
                    http_filter,
                },
            },
            transport_sockets::tls::v3::{
                CertificateProviderPluginInstance, CertificateValidationContext, CommonTlsContext,
                DownstreamTlsContext, certificate_validation_context::SystemRootCerts,
                common_tls_context::ValidationContextType,
            },
        },
    },
    google::protobuf::BoolValue,
};

fn manager() -> HttpConnectionManager {
    let route = Route {
        r#match: Some(RouteMatch { path_specifier: Some(PathSpecifier::Prefix("/".into())), ..RouteMatch::default() }),
        action: Some(ProtoAction::NonForwardingAction(NonForwardingAction {})),
        ..Route::default()
    };
    let host = VirtualHost { domains: vec!["*".into()], routes: vec![route], ..VirtualHost::default() };
    let routes = RouteConfiguration { virtual_hosts: vec![host], ..RouteConfiguration::default() };
    HttpConnectionManager {
        route_specifier: Some(RouteSpecifier::RouteConfig(routes)),
        http_filters: vec![HttpFilter {
            name: "router".into(),
            config_type: Some(http_filter::ConfigType::TypedConfig(any(&Router::default()))),
            ..HttpFilter::default()
        }],
        ..HttpConnectionManager::default()
    }
}

fn network(config: Any) -> Filter {
    Filter { name: "hcm".into(), config_type: Some(ConfigType::TypedConfig(config)) }
}

fn chain(matcher: FilterChainMatch) -> FilterChain {
    FilterChain { filters: vec![network(any(&manager()))], filter_chain_match: Some(matcher), ..FilterChain::default() }
}

fn socket(ip: &str, port: u32) -> Option<Address> {
    let address = SocketAddress {
        address: ip.into(),
        port_specifier: Some(PortSpecifier::PortValue(port)),
        ..SocketAddress::default()
    };
    Some(Address { address: Some(Kind::SocketAddress(address)) })
}

fn good() -> Proto {
    Proto {
        name: "server".into(),
        address: socket("127.0.0.1", 50051),
        filter_chains: vec![chain(FilterChainMatch::default())],
        ..Proto::default()
    }
}

fn inspector(config: Any) -> ListenerFilter {
    ListenerFilter {
        name: "inspector".into(),
        config_type: Some(ListenerFilterConfig::TypedConfig(config)),
        ..ListenerFilter::default()
    }
}

fn accepted(proto: &Proto) -> (ServerListener, Vec<Note>) {
    match decode(ResourceType::Listener, proto).unwrap() {
        (Resource::ServerListener(listener), notes) => (ServerListener::clone(&listener), notes),
        (other, _) => panic!("{other:?}"),
    }
}

fn range(address: &str, bits: u32) -> ProtoRange {
    ProtoRange { address_prefix: address.into(), prefix_len: uint(bits) }
}

fn of_range(address: &str, bits: u32) -> FilterChainMatch {
    FilterChainMatch { prefix_ranges: vec![range(address, bits)], ..FilterChainMatch::default() }
}

fn instance(name: &str) -> Option<CertificateProviderPluginInstance> {
    Some(CertificateProviderPluginInstance { instance_name: name.into(), certificate_name: "x".into() })
}

fn tls() -> DownstreamTlsContext {
    let context = CertificateValidationContext {
        ca_certificate_provider_instance: instance("default"),
        ..CertificateValidationContext::default()
    };
    let common = CommonTlsContext {
        tls_certificate_provider_instance: instance("default"),
        validation_context_type: Some(ValidationContextType::ValidationContext(context)),
        ..CommonTlsContext::default()
    };
    DownstreamTlsContext {
        common_tls_context: Some(common),
        require_client_certificate: Some(BoolValue { value: true }),
        ..DownstreamTlsContext::default()
    }
}

fn with_tls(change: impl FnOnce(&mut DownstreamTlsContext)) -> Proto {
    let mut context = tls();
    change(&mut context);
    let mut proto = good();
    proto.filter_chains[0].transport_socket =
        Some(TransportSocket { name: "tls".into(), config_type: Some(SocketConfig::TypedConfig(any(&context))) });
    proto
}

#[test]
fn a_listener_with_an_address_is_for_servers() {
    let mut proto = good();
    proto.listener_filters = vec![inspector(any(&TlsInspector::default())), inspector(any(&HttpInspector {}))];
    proto.listener_filters_timeout = seconds(3);
    proto.default_filter_chain = Some(FilterChain { name: "rest".into(), ..chain(of_range("10.0.0.0", 8)) });
    let (listener, notes) = accepted(&proto);
    assert_eq!(note_paths(&notes), [] as [&str; 0]);
    assert_eq!((&*listener.name, listener.address), ("server", "127.0.0.1:50051".parse().unwrap()));
    assert_eq!(listener.detection_timeout, Some(Duration::from_secs(3)));
    let names: Vec<_> = listener.chains().map(|chain| &*chain.name).collect();
    assert_eq!(names, ["filter_chains[0]", "rest"]);
    assert_eq!(listener.filter_chains[0].tls, None);
    assert!(matches!(listener.filter_chains[0].http.routes, RouteSource::Inline(_)));
    assert_eq!(listener.default_filter_chain.unwrap().matcher, Default::default());
}

#[test]
fn bad_server_listeners_are_rejected() {
    rejects(
        ResourceType::Listener,
        &good(),
        &[
            ("name", "empty", |l| l.name.clear()),
            ("address", "socket_address", |l| {
                l.address = Some(Address { address: Some(Kind::Pipe(Pipe::default())) });
            }),
            ("address.socket_address.address", "not an IP", |l| l.address = socket("localhost", 1)),
            ("address.socket_address.port_value", "between", |l| l.address = socket("::1", 0)),
            ("address.socket_address.protocol", "TCP", |l| {
                if let Some(Address { address: Some(Kind::SocketAddress(socket)) }) = &mut l.address {
                    socket.protocol = Protocol::Udp as i32;
                }
            }),
            ("use_original_dst", "A36", |l| l.use_original_dst = Some(BoolValue { value: true })),
            ("additional_addresses", "not supported", |l| l.additional_addresses = vec![Default::default()]),
            ("listener_filters[0].typed_config", "\"x.Proxy\" is not supported", |l| {
                l.listener_filters = vec![inspector(unknown("x.Proxy"))];
            }),
            ("filter_chains", "empty", |l| l.filter_chains.clear()),
            ("filter_chains[0].filters", "empty", |l| l.filter_chains[0].filters.clear()),
            ("filter_chains[0].filters[0].typed_config", "expected", |l| {
                l.filter_chains[0].filters.insert(0, network(unknown("x.Rbac")));
            }),
            ("filter_chains[0].filters[0].typed_config", "the last", |l| {
                l.filter_chains[0].filters.push(network(any(&manager())));
            }),
            ("filter_chains[0].filters[0].typed_config.xff_num_trusted_hops", "A41", |l| {
                let manager = HttpConnectionManager { xff_num_trusted_hops: 1, ..manager() };
                l.filter_chains[0].filters = vec![network(any(&manager))];
            }),
            ("filter_chains[0].filters[0].typed_config.normalize_path", "as they arrive", |l| {
                let manager = HttpConnectionManager { normalize_path: Some(BoolValue { value: true }), ..manager() };
                l.filter_chains[0].filters = vec![network(any(&manager))];
            }),
            ("filter_chains[0].filters[0].typed_config.http_filters", "empty", |l| {
                let manager = HttpConnectionManager { http_filters: Vec::new(), ..manager() };
                l.filter_chains[0].filters = vec![network(any(&manager))];
            }),
            ("filter_chains[0].transport_socket.typed_config", "unknown", |l| {
                let config = Some(SocketConfig::TypedConfig(unknown("x.Quic")));
                l.filter_chains[0].transport_socket = Some(TransportSocket { name: "x".into(), config_type: config });
            }),
            ("filter_chains[0].filter_chain_match.prefix_ranges[0].prefix_len", "33", |l| {
                l.filter_chains[0].filter_chain_match = Some(of_range("10.0.0.0", 33));
            }),
            ("filter_chains[0].filter_chain_match.server_names[0]", "*.suffix", |l| {
                let names = vec!["a*.b".into()];
                l.filter_chains[0].filter_chain_match =
                    Some(FilterChainMatch { server_names: names, ..FilterChainMatch::default() });
            }),
            ("filter_chains[0].filter_chain_match.address_suffix", "not supported", |l| {
                l.filter_chains[0].filter_chain_match =
                    Some(FilterChainMatch { address_suffix: "x".into(), ..FilterChainMatch::default() });
            }),
            ("filter_chains[1].filter_chain_match", "chain \"filter_chains[0]\"", |l| {
                l.filter_chains.push(chain(FilterChainMatch::default()));
            }),
            ("filter_chains[1].filter_chain_match", "same connections", |l| {
                // the same once the bits behind the prefix are cleared
                l.filter_chains[0].filter_chain_match = Some(of_range("10.1.2.3", 8));
                let ranges = vec![range("192.168.0.0", 16), range("10.9.9.9", 8)];
                l.filter_chains.push(chain(FilterChainMatch { prefix_ranges: ranges, ..Default::default() }));
            }),
        ],
    );
}

#[test]
fn chains_that_one_connection_can_tell_apart_are_taken() {
    let mut proto = good();
    let ports = |ports: &[u32]| FilterChainMatch { source_ports: ports.to_vec(), ..Default::default() };
    let istio = FilterChainMatch {
        transport_protocol: "tls".into(),
        application_protocols: vec!["istio".into(), "istio-h2".into()],
        ..Default::default()
    };
    let named = FilterChainMatch {
        destination_port: uint(8080),
        server_names: vec!["*.B.com".into(), "A.com".into()],
        source_type: 1,
        source_prefix_ranges: vec![range("10.0.0.0", 8)],
        ..Default::default()
    };
    let raw = FilterChainMatch { transport_protocol: "raw_buffer".into(), ..Default::default() };
    let quic = FilterChainMatch { transport_protocol: "quic".into(), ..Default::default() };
    proto.filter_chains.extend([ports(&[2, 1]), ports(&[3]), istio, named, raw, quic].map(chain));
    let (listener, notes) = accepted(&proto);
    assert_eq!(note_paths(&notes), ["filter_chains[6].filter_chain_match.transport_protocol"]);
    let matchers: Vec<_> = listener.filter_chains.iter().map(|chain| &chain.matcher).collect();
    assert_eq!(matchers[1].source_ports, [1, 2]);
    assert_eq!(matchers[3].transport, Some(TransportProtocol::Tls));
    assert_eq!(matchers[3].application_protocols, ["istio".into(), "istio-h2".into()]);
    assert_eq!((matchers[4].destination_port, matchers[4].source_type), (Some(8080), SourceType::SameIpOrLoopback));
    assert_eq!(matchers[4].server_names, [ServerName::Exact("a.com".into()), ServerName::Below(".b.com".into())]);
    assert_eq!(matchers[4].source_prefix_ranges[0].to_string(), "10.0.0.0/8");
    assert_eq!(matchers.len(), 6);
}

#[test]
fn tls_of_servers_is_read() {
    let (listener, _) = accepted(&with_tls(|_| {}));
    let tls = listener.filter_chains[0].tls.as_ref().unwrap();
    assert!(tls.require_client_certificate);
    assert!(matches!(&tls.identity, Credential::Provider(own) if own.instance == "default"));
    assert!(tls.ca.is_some());
    let quiet = accepted(&with_tls(|tls| {
        tls.common_tls_context.as_mut().unwrap().validation_context_type = None;
        tls.require_client_certificate = None;
    }));
    let tls = quiet.0.filter_chains[0].tls.clone().unwrap();
    assert_eq!((&tls.ca, tls.require_client_certificate), (&None, false));
}

#[test]
fn tls_of_servers_that_we_cannot_honour_is_rejected() {
    fn common(tls: &mut DownstreamTlsContext) -> &mut CommonTlsContext {
        tls.common_tls_context.as_mut().unwrap()
    }
    type Change = fn(&mut DownstreamTlsContext);
    let cases: &[(&str, &str, Change)] = &[
        ("require_sni", "A29", |t| t.require_sni = Some(BoolValue { value: true })),
        ("ocsp_staple_policy", "LENIENT", |t| t.ocsp_staple_policy = 2),
        ("common_tls_context", "missing", |t| t.common_tls_context = None),
        ("common_tls_context.tls_params", "A29", |t| common(t).tls_params = Some(Default::default())),
        ("common_tls_context.tls_certificate_provider_instance", "a server needs one", |t| {
            common(t).tls_certificate_provider_instance = None;
        }),
        ("common_tls_context.tls_certificate_provider_instance", "\"nope\"", |t| {
            common(t).tls_certificate_provider_instance = instance("nope");
        }),
        ("common_tls_context.validation_context", "whom to trust", |t| common(t).validation_context_type = None),
        ("common_tls_context.validation_context.system_root_certs", "A82", |t| {
            let context = CertificateValidationContext {
                system_root_certs: Some(SystemRootCerts {}),
                ..CertificateValidationContext::default()
            };
            common(t).validation_context_type = Some(ValidationContextType::ValidationContext(context));
        }),
    ];
    for (path, reason, change) in cases {
        let error = decode(ResourceType::Listener, &with_tls(change))
            .err()
            .unwrap_or_else(|| panic!("{path}: {reason}: was accepted"));
        assert_eq!(error.path, format!("filter_chains[0].transport_socket.typed_config.{path}"), "{error}");
        assert!(error.reason.contains(reason), "{error} does not say \"{reason}\"");
    }
}

#[test]
fn what_is_said_of_connections_and_client_certificates_is_read() {
    let details = SetCurrentClientCertDetails {
        subject: Some(BoolValue { value: true }),
        uri: true,
        ..SetCurrentClientCertDetails::default()
    };
    let manager = HttpConnectionManager {
        forward_client_cert_details: ForwardClientCertDetails::AppendForward as i32,
        set_current_client_cert_details: Some(details),
        max_request_headers_kb: uint(8),
        drain_timeout: seconds(7),
        upgrade_configs: vec![UpgradeConfig::default()],
        ..manager()
    };
    let mut proto = good();
    proto.filter_chains[0].filters = vec![network(any(&manager))];
    let (listener, notes) = accepted(&proto);
    let connections = &listener.filter_chains[0].connections;
    assert_eq!(connections.forward_client_cert, ForwardClientCert::AppendForward);
    let expected = ClientCertDetails { subject: true, uri: true, ..ClientCertDetails::default() };
    assert_eq!(connections.client_cert_details, expected);
    assert_eq!(
        (connections.max_request_headers_kb, connections.drain_timeout),
        (Some(8), Some(Duration::from_secs(7)))
    );
    assert_eq!(note_paths(&notes), ["filter_chains[0].filters[0].typed_config.upgrade_configs"]);
}
